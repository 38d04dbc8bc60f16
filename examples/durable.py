"""Tasks that outlive their process, with nothing but a file."""

import os
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from postlude import BackgroundTasksMiddleware, task
from postlude.engines import enqueue
from postlude.engines.dbos import DBOSEngine

path = Path(tempfile.gettempdir(), "durable.sqlite")
engine = DBOSEngine(f"sqlite:///{path}")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with engine:
        yield


api = FastAPI(lifespan=lifespan)
app = BackgroundTasksMiddleware(api)


@task(engine=engine)
def ship(order: int) -> None:
    print(f"process {os.getpid()} packs order {order}", flush=True)
    time.sleep(float(os.environ.get("SECONDS_TO_PACK", "5")))
    print(f"process {os.getpid()} has shipped order {order}", flush=True)


@api.post("/orders/{order}", status_code=202)
async def buy(order: int) -> dict[str, str]:
    # Once this has returned, the order is in the file.
    return (await enqueue(ship, order))._asdict()


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(
        f"curl -X POST http://127.0.0.1:{port}/orders/7; sleep 3; kill -9 {os.getpid()}"
    )
    print("Then start it again, and it ships the order.", flush=True)
    uvicorn.run("durable:app", port=port)
