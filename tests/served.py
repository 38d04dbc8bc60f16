"""What the tests of real servers serve; its tasks write to standard output.

`app` stands alone. `owned` is the same in the middleware, as the environment says:
`DETACH`, `DRAIN_TIMEOUT`; `BROKEN` if it is not to start; and `RELEASE`, the path of a
file that held tasks wait for.
"""

import functools
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import chores
from starlette.applications import Starlette
from starlette.background import BackgroundTask as StockTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    add_task,
    task,
)

# Not the root logger, to which some servers would then log as well.
handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
logging.getLogger("postlude").addHandler(handler)
logging.getLogger("postlude").setLevel(logging.INFO)

# What tells a task that it is watched, and those who watch that it has failed.
events: dict[str, anyio.Event] = {}


def say(text: str) -> None:
    # In one piece: several threads and processes write to the same file.
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def is_released() -> bool:
    return Path(os.environ["RELEASE"]).exists()


def work(number: int) -> None:
    time.sleep(0.1)
    say(f"did {number}")


async def work_async(number: int) -> None:
    await anyio.sleep(0.1)
    say(f"did {number} async")


def hold(number: int) -> None:
    say(f"holds {number}")
    while not is_released():
        time.sleep(0.01)
    say(f"did {number}")


async def hold_async(number: int) -> None:
    say(f"holds {number} async")
    while not is_released():  # noqa: ASYNC110 - another process does that
        await anyio.sleep(0.01)
    say(f"did {number} async")


async def tidy_up() -> None:
    say("begins")
    try:
        await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.3)
        say("tidied up")


async def take_6_s() -> None:
    say("begins")
    await anyio.sleep(6)
    say("took 6 s")


def leave() -> None:
    raise SystemExit(1)


async def leave_async() -> None:
    sys.exit(1)


async def break_down() -> None:
    raise ValueError("broken")


async def break_down_watched() -> None:
    """Fails while another request is in flight, if that can be."""
    with anyio.move_on_after(0.5):
        await events["watched"].wait()
    events["failed"].set()
    raise ValueError("broken")


@task(always=True)
async def clean() -> None: ...


def tasks_of(request: Request) -> BackgroundTasks:
    """Makes `number` tasks, sync or async as the query says."""
    func = work if "sync" in request.query_params else work_async
    tasks = BackgroundTasks()
    for number in range(int(request.query_params.get("number", 50))):
        tasks.add_task(func, number)
    return tasks


async def many(request: Request) -> PlainTextResponse:
    tasks = tasks_of(request)
    tasks.add_task(clean)
    return PlainTextResponse("many", background=tasks)


async def failing(request: Request) -> PlainTextResponse:
    tasks = BackgroundTasks()
    for func in break_down, leave:
        tasks.add_task(func)
    tasks.add_task(work, 1)
    tasks.add_task(work_async, 2)
    return PlainTextResponse("failing", background=tasks)


async def failing_watched(request: Request) -> PlainTextResponse:
    events.update(watched=anyio.Event(), failed=anyio.Event())
    return PlainTextResponse("failing", background=BackgroundTask(break_down_watched))


async def watching(request: Request) -> PlainTextResponse:
    """Answers when the task before it has failed."""
    events["watched"].set()
    await events["failed"].wait()
    # So much later that the server has done about it what it does.
    await anyio.sleep(0.05)
    return PlainTextResponse("watching")


async def leaving(request: Request) -> PlainTextResponse:
    tasks = BackgroundTasks()
    tasks.add_task(leave)
    tasks.add_task(leave_async)
    tasks.add_task(work, 1)
    return PlainTextResponse("leaving", background=tasks)


async def held(request: Request) -> PlainTextResponse:
    func = hold if "sync" in request.query_params else hold_async
    add_task(func, int(request.query_params["number"]))
    return PlainTextResponse("held")


async def called(request: Request) -> PlainTextResponse:
    """Tells when its response calls the tasks."""
    number, size = (int(request.query_params[name]) for name in ("number", "size"))
    tasks = BackgroundTasks()
    tasks.add_task(work, number)

    async def call() -> None:
        say(f"called {number}")
        await tasks()

    add_task(work_async, number)
    return PlainTextResponse("x" * size, background=StockTask(call))


async def processing(request: Request) -> PlainTextResponse:
    chore = getattr(chores, request.query_params["chore"])
    args = [request.query_params["path"]]
    if chore is chores.hold_until:
        args.append(os.environ["RELEASE"])
    add_task(task(process=True)(functools.partial(chore)), *args)
    return PlainTextResponse("process")


async def tidying(request: Request) -> PlainTextResponse:
    return PlainTextResponse("tidying", background=BackgroundTask(tidy_up))


async def slow(request: Request) -> PlainTextResponse:
    return PlainTextResponse("slow", background=BackgroundTask(take_6_s))


def plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("plain")


async def tell_lost(lost: list[BackgroundTask]) -> None:
    for each in lost:
        kind = " async" if each.is_async else ""
        say(f"lost {each.args[0] if each.args else each.name}{kind}")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    if "BROKEN" in os.environ:
        raise LookupError("there is no database")
    say("opened")
    yield
    await anyio.sleep(0.2)
    say("closed")


app = Starlette(
    routes=[
        Route("/many", many),
        Route("/failing", failing),
        Route("/failing_watched", failing_watched),
        Route("/watching", watching),
        Route("/leaving", leaving),
        Route("/held", held),
        Route("/called", called),
        Route("/process", processing),
        Route("/tidying", tidying),
        Route("/slow", slow),
        Route("/plain", plain),
    ],
    lifespan=lifespan,
)
owned = BackgroundTasksMiddleware(
    app,
    detach="DETACH" in os.environ,
    drain_timeout=float(os.environ.get("DRAIN_TIMEOUT", "20")),
    on_lost=tell_lost,
)
