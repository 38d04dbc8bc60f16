"""What type checkers must accept, and what they must refuse. Nothing here is run."""

import functools
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import assert_type

import starlette.background
import starlette.responses
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp

from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    TaskState,
    add_task,
    task,
)
from postlude.fastapi import BackgroundTasks as Injected
from postlude.middleware import OutstandingTask, Status
from postlude.responses import JSONResponse, StreamingResponse
from postlude.testing import (
    CapturedTasks,
    call,
    capture_tasks,
    raise_failures,
    wait_for_tasks,
    wait_for_tasks_sync,
)


def sync(number: int, *, text: str = "") -> int:
    return number


async def coroutine(number: int, *, text: str = "") -> int:
    return number


async def bare() -> None: ...


# A task takes what its function takes, whether sync or async.
BackgroundTask(sync, 1, text="one")
BackgroundTask(func=bare)
BackgroundTask(coroutine, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
BackgroundTask(sync)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
BackgroundTask(sync, 1, other=1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
BackgroundTask(sync(1))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

# A group holds tasks of either library, groups and bare async callables.
tasks = BackgroundTasks(
    [
        BackgroundTask(sync, 1),
        BackgroundTasks(concurrency=2),
        starlette.background.BackgroundTask(sync, 1),
        starlette.background.BackgroundTasks(),
        bare,
    ]
)
BackgroundTasks([5])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]
BackgroundTasks([], 2)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]

# add_task() returns the handle.
handle = tasks.add_task(coroutine, 1, text="one")
assert_type(handle, BackgroundTask)
assert_type(handle.state, TaskState)
assert_type(handle.exception, Exception | None)
assert_type(handle.started_at, datetime | None)
assert_type(handle.name, str)
assert_type(handle.id, str)
tasks.add_task(coroutine, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

# Ours go wherever Starlette's do.
stock: starlette.background.BackgroundTask = tasks
assert_type(tasks.func, Callable[[], Awaitable[None]])
tasks.add_task(tasks.func, *tasks.args, **tasks.kwargs)


async def endpoint(request: Request) -> starlette.responses.Response:
    response = JSONResponse({}, background=tasks)
    assert_type(response.add_task(sync, 1), BackgroundTask)
    response.add_task(sync, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    StreamingResponse([b""], background=BackgroundTask(sync, 1)).add_task(bare)
    return response


# A decorated function is what it was.
@task(name="name")
def decorated(number: int) -> str:
    return str(number)


assert_type(decorated(1), str)
decorated("1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
once = task(always=True)(functools.partial(sync, 1))
assert_type(once, functools.partial[int])


@task(timeout=1.5, limiter=2, always=True)
async def limited(number: int, *, text: str = "") -> int:
    return number


@task(process=True, limiter=CapacityLimiter(1))
def processed(number: int) -> str:
    return str(number)


tasks.add_task(limited, 1, text="one")
tasks.add_task(limited, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
assert_type(processed(1), str)
tasks.add_task(processed, 1)
tasks.add_task(processed, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
assert_type(task(timeout=1)(sync)(1), int)
assert_type(task(limiter=1)(functools.partial(sync, 1)), functools.partial[int])
task(timeout="5")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
task(limiter=1.5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
task(process=1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
task("name")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
task(name=1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


class Service:
    @task(name="service.send")
    def send(self, number: int) -> None: ...

    @task()
    @classmethod
    def build(cls) -> "Service":
        return cls()

    @task()
    @staticmethod
    def close(number: int) -> None: ...


tasks.add_task(Service.build().send, 1)
tasks.add_task(Service.close, 1)
tasks.add_task(Service().send, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# With the middleware, which any ASGI framework takes.
@contextmanager
def observer(task: BackgroundTask) -> Generator[None]:
    yield


async def on_lost(tasks: list[BackgroundTask]) -> None: ...


wrapped = BackgroundTasksMiddleware(
    Starlette(middleware=[Middleware(BackgroundTasksMiddleware, detach=True)]),
    drain_timeout=None,
    max_running=None,
    threads=None,
    observers=[observer],
    on_lost=on_lost,
)
app: ASGIApp = wrapped
Starlette().add_middleware(BackgroundTasksMiddleware, drain_timeout=0.5)
BackgroundTasksMiddleware(app, True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
assert_type(wrapped.status(), Status)
assert_type(wrapped.tasks(), list[OutstandingTask])
assert_type(BackgroundTasksMiddleware.current(), BackgroundTasksMiddleware)
assert_type(add_task(coroutine, 1), BackgroundTask)
add_task(sync, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

# In tests.
with capture_tasks() as captured, raise_failures():
    assert_type(captured, CapturedTasks)
    assert_type(captured[0], call)
    assert_type(captured.tasks, list[BackgroundTask])
    assert_type(captured == [call(coroutine, 1, text="one")], bool)
    call(sync, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    captured.run_sync()
    wait_for_tasks_sync(timeout=None)


async def test() -> None:
    await captured.run()
    await wait_for_tasks(0.5)
    captured.run()  # type: ignore[unused-coroutine] # pyright: ignore[reportUnusedCoroutine]


# What FastAPI injects is ours.
async def path_operation(tasks: Injected) -> None:
    assert_type(tasks, BackgroundTasks)
    assert_type(tasks.add_task(coroutine, 1, text="one"), BackgroundTask)
    tasks.add_task(coroutine, "1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
