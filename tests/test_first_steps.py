"""A job that its request waits for takes its first step at once, on asyncio."""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from loops import only_asyncio
from places import alive
from starlette.types import Message, Receive, Scope, Send

import postlude
from postlude import BackgroundTask, BackgroundTasks, BackgroundTasksMiddleware
from postlude._supervisor import _Ahead
from postlude._tasks import home

pytestmark = [pytest.mark.anyio, only_asyncio]

Serve = Callable[..., Coroutine[Any, Any, BackgroundTask]]


def group(func: Callable[[], Awaitable[object]]) -> BackgroundTasks:
    tasks = BackgroundTasks()
    tasks.add_task(func)
    return tasks


@asynccontextmanager
async def serving(
    *, drain_timeout: float = 20, detach: bool = False
) -> AsyncGenerator[Serve]:
    """Lets requests run one task each, in a group or not, and ends when they have."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        await scope["tasks"]()

    wrapped = BackgroundTasksMiddleware(app, detach=detach, drain_timeout=drain_timeout)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None: ...

    async def serve(
        func: Callable[[], Awaitable[object]],
        kind: Callable[..., BackgroundTask] = group,
    ) -> BackgroundTask:
        tasks = kind(func)
        scope = {"type": "http", "method": "GET", "path": "/", "tasks": tasks}
        await wrapped(scope, receive, send)
        return tasks

    async with alive(wrapped):
        yield serve


async def test_a_task_that_awaits_nothing_ends_before_the_event_loop_has_its_turn() -> (
    None
):
    async with serving() as serve:
        turns: list[str] = []
        asyncio.get_running_loop().call_soon(turns.append, "turn")

        async def work() -> None:
            turns.append("task")

        await serve(work)
        turns.append("request")
    assert turns == ["task", "request", "turn"]


async def test_the_first_step_is_taken_as_the_task_of_the_later_ones() -> None:
    seen: set[object] = set()

    async def work() -> None:
        seen.add(asyncio.current_task())
        async with asyncio.timeout(10):
            await asyncio.sleep(0)
            seen.add(asyncio.current_task())
            await asyncio.sleep(0.001)
        seen.add(asyncio.current_task())

    async with serving() as serve:
        await serve(work)
    assert len(seen) == 1
    assert asyncio.current_task() not in seen


async def test_a_future_may_be_awaited_by_the_tasks_of_several_requests() -> None:
    future = asyncio.get_running_loop().create_future()

    async def work() -> None:
        assert await future == "result"

    async with serving() as serve:
        requests = [asyncio.create_task(serve(work)) for _ in range(3)]
        await asyncio.sleep(0)
        future.set_result("result")
        groups = await asyncio.gather(*requests)
    assert [group.state for group in groups] == ["succeeded"] * 3


def traced(
    loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
) -> asyncio.Task[Any]:
    """Makes a task as some tools for tracing do."""

    async def wrap() -> Any:
        return await coro

    return asyncio.Task(wrap(), loop=loop, **options)


async def test_a_factory_may_wrap_the_coroutines_of_tasks() -> None:
    loop = asyncio.get_running_loop()
    log: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0)
        log.append("done")

    loop.set_task_factory(traced)
    try:
        async with serving() as serve:
            tasks = await serve(work)
    finally:
        loop.set_task_factory(None)
    assert tasks.state == "succeeded"
    assert log == ["done"]


@pytest.mark.parametrize("detach", [False, True])
async def test_a_factory_set_before_the_first_step_is_asked(detach: bool) -> None:
    loop = asyncio.get_running_loop()

    async def work() -> None:
        await asyncio.sleep(0)

    try:
        async with serving(detach=detach) as serve:
            if not detach:
                loop.set_task_factory(traced)
            tasks = await serve(work)
            loop.set_task_factory(traced)
    finally:
        loop.set_task_factory(None)
    assert tasks.state == "succeeded"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio starts none eagerly")
async def test_an_eager_task_keeps_its_cancellation_from_those_after_it() -> None:
    loop = asyncio.get_running_loop()
    if type(loop).__module__.startswith("uvloop"):
        pytest.skip("uvloop does not know of it everywhere")

    async def cancel() -> None:
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def work() -> None:
        await asyncio.sleep(0)

    def two(func: Callable[[], Awaitable[object]]) -> BackgroundTasks:
        tasks = group(func)
        tasks.add_task(work)
        return tasks

    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
    try:
        async with serving() as serve:
            tasks = await serve(cancel, two)
    finally:
        loop.set_task_factory(None)
    assert tasks.state == "succeeded"


async def test_a_group_may_change_before_the_first_step() -> None:
    seen: list[str] = []
    tasks = BackgroundTasks()
    async with serving(detach=True) as serve:
        await serve(asyncio.sleep, lambda _: tasks)
        tasks.add_task(lambda: seen.append(threading.current_thread().name))
    assert tasks.state == "succeeded"
    assert seen != ["MainThread"]
    assert len(seen) == 1


async def test_what_is_awaited_wrongly_fails_alone() -> None:
    class Foreign:
        def __await__(self) -> Generator[str]:
            yield "what no event loop knows"

    async def work() -> None:
        await Foreign()

    async with serving() as serve:
        tasks = await serve(work)
    assert tasks.state == "failed"
    assert "bad yield" in str(tasks.exception)


@pytest.mark.parametrize("kind", [group, BackgroundTask])
async def test_ctrl_c_in_the_first_step_leaves_at_once(
    kind: Callable[..., BackgroundTask],
) -> None:
    async def work() -> None:
        raise KeyboardInterrupt

    async with serving() as serve:
        with pytest.raises(KeyboardInterrupt):
            await serve(work, kind)
        assert asyncio.current_task() is not None


async def test_a_stopped_job_may_end_by_its_cancellation_in_the_first_step() -> None:
    async def work() -> None:
        job: Any = home.get()
        job.stop()
        raise asyncio.CancelledError

    async with serving() as serve:
        tasks = await serve(work)
    assert tasks.state == "lost"


async def test_what_a_task_adds_in_its_first_step_runs_after_it() -> None:
    log: list[str] = []

    async def add() -> None:
        postlude.add_task(log.append, "added")
        log.append("adds")

    async with serving() as serve:
        await serve(add)
    assert log == ["adds", "added"]


async def test_jobs_that_wait_for_nothing_share_a_task_until_the_end() -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def work() -> None:
        seen.append(asyncio.current_task())

    async with serving() as serve:
        before = len(asyncio.all_tasks())
        for _ in range(3):
            await serve(work)
        assert len(asyncio.all_tasks()) == before + 1
    assert len({*seen}) == 1
    assert seen[0] is not None
    with pytest.raises(asyncio.CancelledError):
        await seen[0]


async def test_a_task_may_call_the_application_in_its_first_step() -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def work() -> None:
        seen.append(asyncio.current_task())

    async with serving() as serve:

        async def outer() -> None:
            await work()
            await serve(work)
            await work()

        await serve(outer)
        await serve(work)
    # Each begins as itself, and only one of the two is kept.
    assert seen[0] is seen[2] is seen[3]
    assert seen[1] is not seen[0]
    for task in {*seen}:
        assert task is not None
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_job_that_waits_keeps_its_task_to_itself() -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def work() -> None:
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)

    async with serving() as serve:
        for _ in range(3):
            await serve(work)
        await asyncio.gather(*(serve(work) for _ in range(3)))
    assert len({*seen}) == 6


async def test_a_task_that_was_cancelled_by_its_job_serves_no_other() -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def cancel() -> None:
        task = asyncio.current_task()
        assert task is not None
        seen.append(task)
        task.cancel()

    async def work() -> None:
        seen.append(asyncio.current_task())

    async with serving() as serve:
        first = await serve(cancel)
        second = await serve(work)
    assert (first.state, second.state) == ("succeeded", "succeeded")
    assert len({*seen}) == 2


@pytest.mark.parametrize("turns", range(4))
async def test_a_task_whose_cancellation_was_taken_back_serves_no_other(
    turns: int,
) -> None:
    """It comes all the same, on some versions of Python."""

    async def cancel() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        task.uncancel()

    async def work() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)

    async with serving() as serve:
        for before in 0, 2:
            # The kept task has not had its turn the first time.
            await asyncio.sleep(0)
            await serve(cancel)
            for _ in range(turns + before):
                await asyncio.sleep(0)
            assert (await serve(work)).state == "succeeded"


async def test_a_task_that_somebody_else_cancels_serves_no_other() -> None:
    seen: list[asyncio.Task[Any]] = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        seen.append(task)

    async with serving() as serve:
        await serve(work)
        seen[0].cancel()
        tasks = await serve(work)
    assert tasks.state == "succeeded"
    assert len({*seen}) == 2


@pytest.mark.parametrize("turns", [0, 1], ids=["not started", "started"])
async def test_each_step_is_taken_in_the_context_of_the_job(turns: int) -> None:
    variable = ContextVar("variable", default="none")
    seen: list[str] = []

    async def work() -> None:
        seen.append(variable.get())
        await asyncio.sleep(0)
        seen.append(variable.get())

    ahead = _Ahead(asyncio.get_running_loop())
    for _ in range(turns):
        await asyncio.sleep(0)
    variable.set("job")
    assert not ahead.ends(work)
    variable.set("later")
    await ahead.task
    assert seen == ["job", "job"]


def begin(steps: Any) -> asyncio.Task[None]:
    ahead = _Ahead(asyncio.get_running_loop())
    assert not ahead.ends(steps)
    return ahead.task


async def test_a_cancellation_before_the_second_step_cancels_what_is_awaited() -> None:
    future = asyncio.get_running_loop().create_future()
    log: list[str] = []

    async def work() -> None:
        try:
            await future
        finally:
            await asyncio.sleep(0)
            log.append("cleaned")

    task = begin(work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert future.cancelled()
    assert log == ["cleaned"]


async def test_a_cancellation_before_the_second_step_is_raised_if_nothing_is() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise AssertionError("went on")

    task = begin(work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_ctrl_c_in_the_first_step_ends_its_task() -> None:
    async def work() -> None:
        raise KeyboardInterrupt

    ahead = _Ahead(asyncio.get_running_loop())
    with pytest.raises(KeyboardInterrupt):
        ahead.ends(work)
    with pytest.raises(asyncio.CancelledError):
        await ahead.task


async def test_what_has_begun_can_be_closed_but_not_awaited() -> None:
    closed: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append("closed")

    ahead = _Ahead(asyncio.get_running_loop())
    ahead.close()
    ahead.ends(work)
    with pytest.raises(TypeError, match="only a task"):
        await ahead
    ahead.close()
    assert closed == ["closed"]
    with pytest.raises(RuntimeError, match="already awaited"):
        await ahead.task
