"""One setting moves a function into the process of a worker."""

import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from postlude import BackgroundTasksMiddleware, add_task, task
from postlude.engines import Message, enqueue, from_callable


def send(message: Message) -> str:
    part = Path(tempfile.gettempdir(), f"{time.time_ns()}.part")
    part.write_text(message.body, encoding="utf-8")
    return part.rename(part.with_suffix(".call")).stem


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with spool:
        yield


spool = from_callable(send, name="spool")
api = FastAPI(lifespan=lifespan)
app = BackgroundTasksMiddleware(api)


@task(engine=spool if os.environ.get("ENGINE") == "spool" else None)
def make_thumbnail(photo: str, width: int) -> None:
    print(f"process {os.getpid()} made {photo}, {width} wide", flush=True)


@api.post("/photos/{photo}", status_code=202)
async def upload(photo: str) -> dict[str, str]:
    add_task(make_thumbnail, photo, 64)
    return (await enqueue(make_thumbnail, photo, 1024))._asdict()


def work() -> None:
    while True:
        for path in sorted(Path(tempfile.gettempdir()).glob("*.call")):
            call = json.loads(path.read_text(encoding="utf-8"))
            spool.functions[call["name"]](*call["args"], **call["kwargs"])
            path.unlink()
        time.sleep(0.01)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"curl -X POST http://127.0.0.1:{port}/photos/cat")
    uvicorn.run("engine_switch:app", port=port)
