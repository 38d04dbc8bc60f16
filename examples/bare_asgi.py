"""An ASGI function without a framework, which need not know of `lifespan`."""

import os
import tempfile
import time
from pathlib import Path

import anyio
import uvicorn
from starlette.types import Receive, Scope, Send

from postlude import BackgroundTasksMiddleware, add_task

LOG = Path(tempfile.gettempdir(), "asgi.log")


def note(line: str) -> None:
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


async def send_receipt(number: str) -> None:
    await anyio.sleep(0.2)
    note(f"sent the receipt of order {number}")


def make_thumbnail(name: str) -> None:
    time.sleep(0.2)
    note(f"made the thumbnail of {name}")


async def shop(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    match scope["method"], *scope["path"].split("/"):
        case "POST", "", "orders", number:
            add_task(note, f"packed order {number}")
            add_task(send_receipt, number)
            status, body = 202, b"Thank you!\n"
        case "POST", "", "photos", name:
            add_task(make_thumbnail, name)
            status, body = 202, b"Thank you!\n"
        case _:
            status, body = 404, b"Not found\n"
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


app = BackgroundTasksMiddleware(shop, detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/orders/7; sleep 1; tail {LOG}")
    print(f"curl -X POST {url}/photos/cat; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
