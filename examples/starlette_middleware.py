"""Starlette in the middleware: tasks end before the lifespan closes what they use."""

import io
import os
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTask, BackgroundTasksMiddleware, add_task

LOG = Path(tempfile.gettempdir(), "starlette.log")


def note(log: io.FileIO, line: str) -> None:
    log.write(f"{line}\n".encode())


async def send_receipt(log: io.FileIO, number: str) -> None:
    await anyio.sleep(0.2)
    note(log, f"sent the receipt of order {number}")


def pack(log: io.FileIO, number: str) -> None:
    time.sleep(0.1)
    note(log, f"packed order {number}")


async def order(request: Request) -> PlainTextResponse:
    log, number = request.state.log, request.path_params["number"]
    add_task(pack, log, number)
    receipt = BackgroundTask(send_receipt, log, number)
    return PlainTextResponse("Thank you!\n", status_code=202, background=receipt)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, io.FileIO]]:
    with io.FileIO(LOG, "a") as log:
        yield {"log": log}
        note(log, "closed")


routes = [Route("/orders/{number}", order, methods=["POST"])]
shop = Starlette(routes=routes, lifespan=lifespan)
app = BackgroundTasksMiddleware(shop, detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"curl -X POST http://127.0.0.1:{port}/orders/7; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
