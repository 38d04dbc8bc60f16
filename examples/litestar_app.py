"""Litestar in the middleware: add_task(), and `background=` with a task of postlude."""

import os
import tempfile
import time
from pathlib import Path

import anyio
import uvicorn
from litestar import Litestar, Response, post
from litestar.params import FromPath

from postlude import BackgroundTask, BackgroundTasksMiddleware, add_task

LOG = Path(tempfile.gettempdir(), "litestar.log")


def note(line: str) -> None:
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


async def send_receipt(number: int) -> None:
    await anyio.sleep(0.2)
    note(f"sent the receipt of order {number}")


def make_thumbnail(name: str) -> None:
    time.sleep(0.2)
    note(f"made the thumbnail of {name}")


@post("/orders/{number:int}")
async def order(number: FromPath[int]) -> Response[str]:
    add_task(note, f"packed order {number}")
    # Litestar calls whatever it is given, but its annotation names its own classes.
    receipt = BackgroundTask(send_receipt, number)
    return Response("Thank you!\n", background=receipt)  # type: ignore[arg-type]


@post("/photos/{name:str}", sync_to_thread=True)
def photo(name: FromPath[str]) -> str:
    add_task(make_thumbnail, name)
    return "Thank you!\n"


# Not Litestar(middleware=[...]), which is never told that the server stops.
app = BackgroundTasksMiddleware(Litestar([order, photo]), detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/orders/7; sleep 1; tail {LOG}")
    print(f"curl -X POST {url}/photos/cat; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
