"""FastAPI apps with its own tasks and with ours, for tests in process and on servers.

Of those that are served, `own` has FastAPI's own; `attached` and `detached` have ours
in the middleware, in both modes.
"""

import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import fastapi
import fastapi.responses
from fastapi import Depends, FastAPI, HTTPException, UploadFile, WebSocket
from starlette.background import BackgroundTask as StockTask

import postlude.fastapi
from postlude import BackgroundTask, BackgroundTasks, BackgroundTasksMiddleware, task
from postlude.fastapi import JSONResponse

F = TypeVar("F", bound=Callable[..., Any])

OWN: Any = fastapi.BackgroundTasks
OURS: Any = postlude.fastapi.BackgroundTasks

log: list[str] = []
user: ContextVar[str] = ContextVar("user", default="nobody")


class Tasks(BackgroundTasks):
    """Stands for what is injected, of whichever kind."""


class Shared(BackgroundTasks):
    """Stands for the same, by way of a dependency that adds some."""


def injecting(kinds: dict[object, Any]) -> Callable[[F], F]:
    """Annotates functions with what these annotations are to stand for."""

    def annotate(func: F) -> F:
        for name, annotation in func.__annotations__.items():
            func.__annotations__[name] = kinds.get(annotation, annotation)
        return func

    return annotate


def write(line: str) -> None:
    log.append(line)


async def write_async(line: str) -> None:
    write(line)


@task(always=True)
async def clean_up() -> None:
    write("clean-up")


def fail() -> None:
    raise LookupError("a broken task")


def tell_user() -> None:
    write(user.get())


async def run(tasks: Any) -> None:
    await tasks()


async def count(file: UploadFile) -> None:
    write(f"{len(await file.read())} bytes")


async def query(connection: sqlite3.Connection) -> None:
    write(f"{connection.execute('select 1').fetchone()}")


class Odd(Exception):
    """What a handler answers with 200."""


async def say_fine(request: fastapi.Request, exc: Exception) -> fastapi.Response:
    return fastapi.Response("fine")


def broken_body() -> Generator[str]:
    yield "half"
    raise LookupError("a broken body")


async def session() -> AsyncGenerator[None]:
    try:
        yield
    except LookupError:
        write("rolled back")
        raise
    else:
        write("committed")


async def connection() -> AsyncGenerator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    yield connection
    connection.close()


def api_of(kind: Any) -> FastAPI:  # noqa: PLR0915 - as many traps as there are
    """Makes an app in which each path is a trap of FastAPI's own tasks."""
    api = FastAPI(exception_handlers={Odd: say_fine})
    kinds: dict[object, Any] = {Tasks: kind}
    inject = injecting(kinds)

    @inject
    async def shared(tasks: Tasks) -> Tasks:
        tasks.add_task(write_async, "dependency")
        tasks.add_task(clean_up)
        with suppress(RuntimeError):  # as there is no middleware
            postlude.add_task(write, "added")
        return tasks

    @inject
    def late(tasks: Tasks) -> Generator[None]:
        yield
        tasks.add_task(write, "late")

    @inject
    def set_user(tasks: Tasks) -> None:
        user.set("ada")
        tasks.add_task(tell_user)

    def break_down() -> None:
        raise ValueError("a broken dependency")

    kinds[Shared] = Annotated[Any, Depends(shared)]

    @api.get("/background/{whose}")
    @inject
    async def own_background(tasks: Shared, whose: str) -> fastapi.Response:
        tasks.add_task(write, "endpoint")
        backgrounds: dict[str, Any] = {
            "ours": BackgroundTask(write, "response"),
            "stock": StockTask(write, "response"),
            "empty": BackgroundTasks(),
            "injected": tasks,
            "nested": BackgroundTasks([BackgroundTask(write, "response"), tasks]),
            "by hand": BackgroundTask(run, tasks),
        }
        if whose == "re-added":
            backgrounds[whose] = group = BackgroundTasks()
            group.add_task(tasks.__call__ if kind is OWN else tasks.func)
        return fastapi.Response(background=backgrounds[whose])

    @api.get("/fails/{how}", dependencies=[Depends(shared)])
    async def fails(how: str, number: int = 0) -> int:
        if how == "raised":
            raise HTTPException(404)
        if how == "handled":
            raise Odd
        if how == "broken":
            raise ValueError("a broken endpoint")
        response: Any = {
            "returned": fastapi.Response(status_code=404),
            "ours": JSONResponse({}, 404),
            "body": fastapi.responses.StreamingResponse(broken_body()),
            "our body": postlude.fastapi.StreamingResponse(broken_body()),
        }
        failed: int = response.get(how, "no number")
        return failed

    broken = [Depends(shared), Depends(break_down)]
    api.add_api_route("/dependency", lambda: None, dependencies=broken)

    @api.get("/late", dependencies=[Depends(late)])
    @inject
    async def add_late(tasks: Shared, how: str = "") -> fastapi.Response:
        if how == "empty":
            tasks.tasks.clear()
        return fastapi.Response(status_code=201)

    @api.get("/postlude/{what}", dependencies=[Depends(late)])
    @inject
    async def respond(
        tasks: Shared, stock: fastapi.BackgroundTasks, what: str
    ) -> JSONResponse:
        response = JSONResponse({})
        if what == "response":
            response.add_task(write, "response")
        elif what == "stock":
            stock.add_task(write, "stock")
        return response

    def fastapis(tasks: fastapi.BackgroundTasks) -> fastapi.BackgroundTasks:
        return tasks

    @api.get("/mixed/{what}")
    @inject
    async def mix(
        stock: Annotated[Any, Depends(fastapis)], tasks: Tasks, what: str
    ) -> None:
        first = fail if what == "failing" else clean_up
        kind_of_task = BackgroundTask if what == "both" else StockTask
        stock.tasks.insert(0, kind_of_task(first))
        tasks.add_task(write, "ours")
        stock.add_task(write, "stock")

    @api.get("/failing", dependencies=[Depends(session)])
    @inject
    async def fail_in_task(tasks: Tasks) -> None:
        tasks.add_task(fail)
        tasks.add_task(write, "after")

    @api.get("/user/sync")
    @inject
    def set_user_sync(tasks: Tasks) -> None:
        set_user(tasks)

    @api.get("/user/dependency", dependencies=[Depends(set_user)])
    async def set_user_by_dependency() -> None: ...

    @api.post("/upload")
    @inject
    async def upload(tasks: Tasks, file: UploadFile) -> None:
        tasks.add_task(count, file)

    @api.get("/session")
    @inject
    async def use(
        tasks: Tasks, connection: Annotated[sqlite3.Connection, Depends(connection)]
    ) -> None:
        tasks.add_task(query, connection)

    @api.websocket("/socket/{what}")
    async def converse(
        websocket: WebSocket, what: str, _: Annotated[None, Depends(shared)]
    ) -> None:
        if what == "accepted":
            await websocket.accept()
        await websocket.close()
        write("closed")

    @api.get("/hold")
    @inject
    async def hold(tasks: Tasks, _: Annotated[None, Depends(pooled)]) -> None:
        tasks.add_task(wait)

    return api


# --- for what only a server shows ----------------------------------------------------

pool = anyio.CapacityLimiter(5)


async def pooled() -> AsyncGenerator[None]:
    """Holds one of five connections, for as long as FastAPI says."""
    borrower = object()
    try:
        with anyio.fail_after(float(os.environ["POOL_TIMEOUT"])):
            await pool.acquire_on_behalf_of(borrower)
    except TimeoutError:
        raise HTTPException(503) from None
    yield
    pool.release_on_behalf_of(borrower)


def is_released() -> bool:
    return Path(os.environ["RELEASE"]).exists()


async def wait() -> None:
    while not is_released():  # noqa: ASYNC110 - another process does that
        await anyio.sleep(0.01)


own = api_of(OWN)
attached = BackgroundTasksMiddleware(api_of(OURS))
detached = BackgroundTasksMiddleware(api_of(OURS), detach=True)
