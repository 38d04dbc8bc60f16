"""The app that the tests of real servers serve; its tasks write to standard output."""

import time

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTasks, task


def work(number: int) -> None:
    time.sleep(0.1)
    print(f"did {number}", flush=True)


async def work_async(number: int) -> None:
    await anyio.sleep(0.1)
    print(f"did {number}", flush=True)


def leave() -> None:
    raise SystemExit(1)


async def break_down() -> None:
    raise ValueError("broken")


@task(always=True)
async def clean() -> None: ...


async def many(request: Request) -> PlainTextResponse:
    tasks = BackgroundTasks()
    for number in range(50):
        tasks.add_task(work if "sync" in request.query_params else work_async, number)
    tasks.add_task(clean)
    return PlainTextResponse("many", background=tasks)


async def failing(request: Request) -> PlainTextResponse:
    tasks = BackgroundTasks()
    for func in break_down, leave:
        tasks.add_task(func)
    tasks.add_task(work, 1)
    tasks.add_task(work_async, 2)
    return PlainTextResponse("failing", background=tasks)


app = Starlette(routes=[Route("/many", many), Route("/failing", failing)])
