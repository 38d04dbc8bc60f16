"""Quart in the middleware: add_task() in an async view and in a sync one."""

import os
import tempfile
import time
from pathlib import Path

import anyio
import uvicorn
from quart import Quart

from postlude import BackgroundTasksMiddleware, add_task

LOG = Path(tempfile.gettempdir(), "quart.log")
quart = Quart(__name__)


def note(line: str) -> None:
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


async def send_receipt(number: int) -> None:
    await anyio.sleep(0.2)
    note(f"sent the receipt of order {number}")


def make_thumbnail(name: str) -> None:
    time.sleep(0.2)
    note(f"made the thumbnail of {name}")


@quart.post("/orders/<int:number>")
async def order(number: int) -> tuple[str, int]:
    add_task(note, f"packed order {number}")
    add_task(send_receipt, number)
    return "Thank you!\n", 202


@quart.post("/photos/<name>")
def photo(name: str) -> tuple[str, int]:
    add_task(make_thumbnail, name)
    return "Thank you!\n", 202


@quart.after_serving
async def close() -> None:
    note("closed")


app = BackgroundTasksMiddleware(quart, detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/orders/7; sleep 1; tail {LOG}")
    print(f"curl -X POST {url}/photos/cat; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
