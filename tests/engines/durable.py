"""An app on DBOS whose tasks wait for a file, to be killed meanwhile."""

import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from dbos import DBOS
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from postlude import task
from postlude.engines import enqueue
from postlude.engines.dbos import DBOSEngine

RECORD = Path(os.environ["RECORD"])
RELEASE = RECORD.with_name("release")
EXECUTOR = os.environ.get("EXECUTOR")

engine = DBOSEngine(
    os.environ["URL"],
    executor_id=EXECUTOR,
    concurrency=2,
    drain_timeout=float(os.environ.get("DRAIN", "5")),
)


def note(what: str, key: str) -> None:
    with RECORD.open("ab", buffering=0) as file:
        file.write(f"{key} {what} {EXECUTOR} {os.getpid()}\n".encode())


@DBOS.step()
def weigh(key: str) -> None:
    note("weighed", key)


@task(engine=engine)
def hold(key: str) -> None:
    weigh(key)
    note("begun", key)
    while not RELEASE.exists():
        time.sleep(0.01)
    note("ended", key)


@task(engine=engine)
async def hold_async(key: str) -> None:
    note("begun", key)
    while not RELEASE.exists():  # noqa: ASYNC110 - there is only the file to look at
        await anyio.sleep(0.01)
    note("ended", key)


# At once, though all that may run at once are held.
@task(engine=engine.options(queue_name="pings"))
def ping(key: str) -> None:
    note("pinged", key)


if "LESS" not in os.environ:

    @task(engine=engine)
    def gone(key: str) -> None:
        note("ended", key)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    async with engine:
        await DBOS.register_queue_async("pings", polling_interval_sec=0.05)
        yield


async def hand_over(request: Request) -> Response:
    func = globals()[request.path_params["name"]]
    receipt = await enqueue(func, request.path_params["key"])
    return JSONResponse(receipt._asdict(), status_code=202)


routes = [Route("/{name}/{key}", hand_over, methods=["POST"])]
app = Starlette(routes=routes, lifespan=lifespan)
