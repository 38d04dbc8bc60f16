"""An app and its Celery worker, which need a Redis and `pip install 'celery[redis]'`.

In this directory run:

uvicorn celery_app:app
celery -A celery_app:celery_app worker --loglevel info
curl -X POST http://127.0.0.1:8000/photos/cat
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from celery import Celery
from celery.result import AsyncResult
from fastapi import FastAPI

from postlude import BackgroundTasksMiddleware, add_task, task
from postlude.engines import enqueue
from postlude.engines.celery import CeleryEngine

redis = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
celery_app = Celery("photos", broker=redis, backend=redis)
engine = CeleryEngine(celery_app)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with engine:
        yield


api = FastAPI(lifespan=lifespan)
app = BackgroundTasksMiddleware(api)


@task(engine=engine.options(autoretry_for=(OSError,), time_limit=60))
def make_thumbnail(photo: str, width: int) -> str:
    return f"{photo}, {width} wide, made by process {os.getpid()}"


@task(engine=engine.options(ignore_result=True))
async def tell_followers(photo: str) -> None:
    print(f"process {os.getpid()} told all followers of {photo}")


@api.post("/photos/{photo}", status_code=202)
async def upload(photo: str) -> dict[str, str]:
    add_task(tell_followers, photo)  # handed over after the response
    receipt = await enqueue(make_thumbnail, photo, 64)  # handed over now
    return {"result": f"/results/{receipt.id}"}


@api.get("/results/{task_id}")
def result(task_id: str) -> dict[str, Any]:
    made = AsyncResult(task_id, app=celery_app)
    return {"state": made.state, "result": made.result if made.successful() else None}
