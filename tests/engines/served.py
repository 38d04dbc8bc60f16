"""An app that hands over twenty tasks a request."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engines.declared import engine, record
from postlude import BackgroundTasksMiddleware, add_task
from postlude.engines import enqueue


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    async with engine:
        yield


async def hand_over(request: Request) -> Response:
    key, first = request.path_params["key"], 20 * request.path_params["number"]
    for number in range(first, first + 10):
        add_task(record, key, number)
        await enqueue(record, key, number + 10)
    return Response(status_code=202)


routes = [Route("/{key}/{number:int}", hand_over, methods=["POST"])]
app = BackgroundTasksMiddleware(
    Starlette(routes=routes, lifespan=lifespan), drain_timeout=60
)
