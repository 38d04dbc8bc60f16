"""A shop that follows an order up after the response; only one import is postlude's."""

import os
import tempfile
import time
from pathlib import Path

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTasks

LOG = Path(tempfile.gettempdir(), "notifications.log")


async def update_stock() -> None:
    await anyio.sleep(0.05)


async def book_courier(city: str) -> None:
    await anyio.sleep(0.04)
    if city == "Atlantis":
        raise LookupError(f"no courier goes to {city}")


def notify_warehouse(city: str) -> None:
    time.sleep(0.07)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"pack the order for {city}\n")


async def send_receipt(to: str) -> None:
    await anyio.sleep(0.03)


async def order(request: Request) -> PlainTextResponse:
    city = request.path_params["city"]
    tasks = BackgroundTasks()
    tasks.add_task(update_stock)
    tasks.add_task(book_courier, city)
    tasks.add_task(notify_warehouse, city)
    tasks.add_task(send_receipt, to="ada@example.org")
    return PlainTextResponse("Thank you!\n", status_code=202, background=tasks)


app = Starlette(routes=[Route("/orders/{city}", order, methods=["POST"])])

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    for city in "Paris", "Atlantis":
        url = f"http://127.0.0.1:{port}/orders/{city}"
        print(f"curl -X POST {url}; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
