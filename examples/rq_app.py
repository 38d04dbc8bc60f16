"""An app and its RQ worker, which need a Redis. In this directory run:

uvicorn rq_app:app
rq worker --config rq_app
curl -X POST http://127.0.0.1:8000/photos/cat
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import redis
import rq
from redis.backoff import NoBackoff
from redis.retry import Retry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from postlude import BackgroundTasksMiddleware, add_task, task
from postlude.engines import enqueue
from postlude.engines.rq import RQEngine

# The worker's settings. To read them it imports this module, before it forks.
REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
QUEUES = [os.environ.get("QUEUE", "photos")]

# Without retries, by which the client could add a job twice.
connection = redis.Redis.from_url(REDIS_URL, retry=Retry(NoBackoff(), 0))
queue = rq.Queue(QUEUES[0], connection=connection)
engine = RQEngine(queue)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    async with engine:
        yield


@task(engine=engine.options(timeout=60, retry=rq.Retry(max=3)))
def make_thumbnail(photo: str, width: int) -> None:
    print(f"process {os.getpid()} made {photo}, {width} wide", flush=True)


async def upload(request: Request) -> JSONResponse:
    photo = request.path_params["photo"]
    add_task(make_thumbnail, photo, 64)  # handed over after the response
    receipt = await enqueue(make_thumbnail, photo, 1024)  # handed over now
    return JSONResponse({"job": f"/{receipt.id}"}, status_code=202)


def show(request: Request) -> JSONResponse:
    job = queue.fetch_job(request.path_params["job"])
    return JSONResponse(job and {"status": job.get_status()}, 200 if job else 404)


routes = [Route("/photos/{photo}", upload, methods=["POST"]), Route("/{job}", show)]
app = BackgroundTasksMiddleware(Starlette(routes=routes, lifespan=lifespan))
