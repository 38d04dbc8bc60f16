"""The second part of FastAPI's tutorial, a dependency, with one import changed."""

import os
import tempfile
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI

from postlude.fastapi import BackgroundTasks

app = FastAPI()


def write_log(message: str) -> None:
    with open("log.txt", mode="a") as log:
        log.write(message)


def get_query(background_tasks: BackgroundTasks, q: str | None = None) -> str | None:
    if q:
        message = f"found query: {q}\n"
        background_tasks.add_task(write_log, message)
    return q


@app.post("/send-notification/{email}")
async def send_notification(
    email: str, background_tasks: BackgroundTasks, q: Annotated[str, Depends(get_query)]
) -> dict[str, str]:
    message = f"message to {email}\n"
    background_tasks.add_task(write_log, message)
    return {"message": "Message sent"}


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    os.chdir(tempfile.gettempdir())
    url = f"http://127.0.0.1:{port}/send-notification/ada@example.org?q=postlude"
    print(f"curl -X POST '{url}'; sleep 1; cat {os.getcwd()}/log.txt")
    uvicorn.run(app, port=port)
