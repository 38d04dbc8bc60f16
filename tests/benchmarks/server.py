"""Serves responses with tasks that do nothing, on uvicorn with httptools.

Arguments: `asyncio` or `uvloop`, and whose tasks: `stock`, `postlude`, `responses` for
those of `postlude.responses`, `middleware` for postlude's in its middleware, `detached`
for the same with `detach=True`, `fastapi` for those that FastAPI injects, and
`fastapi-stock` for its own. Prints its port once it accepts connections.
"""

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
import starlette.background
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import postlude
import postlude.fastapi
import postlude.responses

# What is served in the middleware, and how.
DETACH = {"middleware": False, "detached": True}


async def do_nothing() -> None: ...


def do_nothing_sync() -> None: ...


def endpoint(
    whose: str, func: Callable[[], object], count: int
) -> Callable[[Request], Awaitable[Response]]:
    if whose == "responses":

        async def respond_by_method(_: Request) -> Response:
            response = postlude.responses.PlainTextResponse("done")
            for _number in range(count):
                response.add_task(func)
            return response

        return respond_by_method

    kind = (
        starlette.background.BackgroundTasks
        if whose == "stock"
        else postlude.BackgroundTasks
    )

    async def respond(_: Request) -> Response:
        tasks = kind()
        for _number in range(count):
            tasks.add_task(func)
        return PlainTextResponse("done", background=tasks)

    return respond


async def respond_without_tasks(_: Request) -> Response:
    return PlainTextResponse("done")


def groups() -> int:
    """Counts the groups that have not ended, as far as the middleware knows them."""
    if whose not in DETACH:
        return 0
    status = postlude.BackgroundTasksMiddleware.current().status()
    return status.running_groups + status.waiting_groups


async def drain(_: Request) -> Response:
    """Answers when no other request has tasks left to run."""
    # Neither uvicorn nor the middleware tells of the end.
    while len(server.server_state.tasks) > 1 or groups():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return PlainTextResponse("done")


def injected() -> fastapi.FastAPI:
    kind: Any = (
        fastapi.BackgroundTasks
        if whose == "fastapi-stock"
        else postlude.fastapi.BackgroundTasks
    )

    async def respond(tasks: Any) -> str:
        tasks.add_task(do_nothing)
        return "done"

    respond.__annotations__["tasks"] = kind
    app = fastapi.FastAPI()
    app.add_api_route("/injected", respond, response_class=PlainTextResponse)
    app.add_route("/drain", drain)
    return app


loop, whose = sys.argv[1:]
app: ASGIApp = Starlette(
    routes=[
        Route("/0", respond_without_tasks),
        Route("/1-async", endpoint(whose, do_nothing, 1)),
        Route("/1-sync", endpoint(whose, do_nothing_sync, 1)),
        Route("/10-sync", endpoint(whose, do_nothing_sync, 10)),
        Route("/drain", drain),
    ]
)
if whose.startswith("fastapi"):
    app = injected()
elif whose in DETACH:
    app = postlude.BackgroundTasksMiddleware(app, detach=DETACH[whose])
server = uvicorn.Server(
    uvicorn.Config(
        app,
        loop=loop,
        http="httptools",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=60,
    )
)
# asyncio looks at the protocol before it turns off Nagle's algorithm, which would hold
# back each response body for 40 ms.
with socket.socket(proto=socket.IPPROTO_TCP) as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])
