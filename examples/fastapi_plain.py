"""FastAPI: add_task() in a dependency, in a `def` and in an `async def` endpoint."""

import os
import tempfile
import time
from pathlib import Path

import anyio
import uvicorn
from fastapi import Depends, FastAPI, Request

from postlude import BackgroundTasksMiddleware, add_task

LOG = Path(tempfile.gettempdir(), "signups.log")


def note(line: str) -> None:
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


async def send_welcome(name: str) -> None:
    await anyio.sleep(0.1)
    note(f"welcomed {name}")


def make_thumbnail(name: str) -> None:
    time.sleep(0.1)
    note(f"made the thumbnail of {name}")


def audit(request: Request) -> None:
    add_task(note, f"{request.method} {request.url.path}")


api = FastAPI(dependencies=[Depends(audit)])


@api.post("/users/{name}", status_code=201)
def signup(name: str) -> dict[str, str]:
    add_task(send_welcome, name)
    return {"name": name}


@api.post("/users/{name}/photo", status_code=202)
async def photo(name: str) -> dict[str, str]:
    add_task(make_thumbnail, name)
    return {"photo": "accepted"}


app = BackgroundTasksMiddleware(api)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/users/ada; sleep 1; tail {LOG}")
    print(f"curl -X POST {url}/users/ada/photo; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
