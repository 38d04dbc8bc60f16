"""FastAPI: a database session, an e-mail, a warm cache, an upload, an audit trail."""

import os
import smtplib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, UploadFile

from postlude import BackgroundTasksMiddleware, task
from postlude.fastapi import BackgroundTasks

HOME = Path(tempfile.gettempdir())
cache: dict[str, object] = {}


def session() -> Iterator[sqlite3.Connection]:
    with sqlite3.connect(HOME / "users.db", check_same_thread=False) as database:
        database.execute("create table if not exists users (name unique)")
        yield database  # committed or rolled back after that
    database.close()


def send_welcome(name: str) -> None:
    with smtplib.SMTP("127.0.0.1", int(os.environ.get("SMTP_PORT", "8025"))) as smtp:
        smtp.sendmail("shop@example.org", f"{name}@example.org", f"Welcome, {name}!")


def warm_cache() -> None:
    for database in session():  # one of its own, as that of the request is closed
        names = database.execute("select name from users order by name")
        cache["users"] = [name for [name] in names]


def count_lines(name: str, content: bytes) -> None:
    cache[name] = content.count(b"\n")


@task(always=True)
def write_audit(line: str) -> None:
    with (HOME / "audit.log").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def audit(request: Request, tasks: BackgroundTasks) -> None:
    tasks.add_task(write_audit, f"{request.method} {request.url.path}")


Session = Annotated[sqlite3.Connection, Depends(session)]
api = FastAPI(dependencies=[Depends(audit)])


@api.post("/users/{name}", status_code=201)
def sign_up(name: str, database: Session, tasks: BackgroundTasks) -> None:
    tasks.add_task(send_welcome, name)
    tasks.add_task(warm_cache)
    if not database.execute("insert or ignore into users values (?)", [name]).rowcount:
        raise HTTPException(409)  # of the tasks, only the audit is run


@api.post("/uploads/{name}", status_code=202)
async def upload(name: str, file: UploadFile, tasks: BackgroundTasks) -> None:
    tasks.add_task(count_lines, name, await file.read())


@api.get("/cache")
async def read_cache() -> dict[str, object]:
    return cache


app = BackgroundTasksMiddleware(api, detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/users/ada; curl -F file=@{__file__} {url}/uploads/app")
    print(f"curl {url}/cache; cat {HOME}/audit.log")
    uvicorn.run(app, port=port)
