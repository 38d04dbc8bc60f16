"""How a group runs: threads, contexts, cancellation, several tasks at once."""

import asyncio
import contextvars
import functools
import gc
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import starlette.background
from hypothesis import given
from hypothesis import strategies as st
from loops import Held, only_asyncio, until

import postlude
from postlude import BackgroundTask, BackgroundTasks, TaskState, _tasks

pytestmark = pytest.mark.anyio

drop_in = pytest.mark.parametrize(
    "library", [starlette.background, postlude], ids=["starlette", "postlude"]
)
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")


def fail(error: BaseException) -> None:
    raise error


def always(func: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return postlude.task(always=True)(functools.partial(func, *args))


def cancel(scope: anyio.CancelScope) -> None:
    """Cancels a scope from a worker thread."""
    anyio.from_thread.run_sync(scope.cancel)  # type: ignore[arg-type, unused-ignore]


def states(tasks: BackgroundTasks) -> list[str]:
    return [task.state for task in tasks.tasks if isinstance(task, BackgroundTask)]


# --- the trip to a worker thread -----------------------------------------------------


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the trips to a worker thread."""
    made: list[int] = []
    run_sync = anyio.to_thread.run_sync

    async def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return await run_sync(*args, **kwargs)

    monkeypatch.setattr(anyio.to_thread, "run_sync", counted)
    # However slow the machine is.
    monkeypatch.setattr(_tasks, "_TRIP_SECONDS", 60)
    monkeypatch.setattr(_tasks, "_CHECK_SECONDS", 60)
    return made


async def test_consecutive_sync_tasks_share_a_trip(trips: list[int]) -> None:
    log: list[int] = []
    threads: set[int] = set()

    def task(value: int) -> None:
        log.append(value)
        threads.add(threading.get_ident())

    tasks = BackgroundTasks()
    for value in range(100):
        tasks.add_task(task, value)
    await tasks()
    assert log == [*range(100)]
    assert len(threads) == len(trips) == 1


async def test_tasks_that_are_added_on_the_trip_share_it(trips: list[int]) -> None:
    tasks = BackgroundTasks()
    tasks.add_task(tasks.add_task, print, end="")
    await tasks()
    assert states(tasks) == ["succeeded", "succeeded"]
    assert len(trips) == 1


async def test_an_async_task_ends_a_trip(trips: list[int]) -> None:
    log: list[int] = []

    async def append(value: int) -> None:
        log.append(value)

    tasks = BackgroundTasks()
    for value, func in enumerate([log.append, append, log.append, log.append]):
        tasks.add_task(func, value)
    await tasks()
    assert log == [0, 1, 2, 3]
    assert len(trips) == 2


async def test_a_trip_ends_after_some_time(
    trips: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tasks, "_TRIP_SECONDS", 0)
    tasks = BackgroundTasks([BackgroundTask(print, end="")] * 3)
    await tasks()
    assert len(trips) == 3


async def test_tasks_that_may_run_at_once_take_trips_of_their_own(
    trips: list[int],
) -> None:
    tasks = BackgroundTasks([BackgroundTask(print, end="")] * 3, concurrency=2)
    await tasks()
    assert len(trips) == 3


async def test_a_failure_does_not_end_a_trip(trips: list[int]) -> None:
    tasks = BackgroundTasks()
    tasks.add_task(fail, ValueError())
    tasks.add_task(fail, SystemExit())
    tasks.add_task(print, end="")
    with pytest.raises(ExceptionGroup):
        await tasks()
    assert states(tasks) == ["failed", "failed", "succeeded"]
    assert len(trips) == 1


async def test_tasks_have_threads_of_their_own_limit() -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    seen: list[tuple[float, int]] = []

    def look() -> None:
        seen.append((limiter.borrowed_tokens, _tasks._limiter.get().borrowed_tokens))

    def task() -> None:
        anyio.from_thread.run_sync(look)

    await BackgroundTask(task)()
    assert seen == [(0, 1)]
    assert _tasks._limiter.get().total_tokens == 40


def test_each_event_loop_has_a_limit_of_its_own() -> None:
    async def main() -> anyio.CapacityLimiter:
        await BackgroundTask(print, end="")()
        return _tasks._limiter.get()

    assert anyio.run(main) is not anyio.run(main)


async def test_sync_tasks_wait_for_a_thread_when_all_are_taken() -> None:
    limiter = _tasks._worker_threads()
    limiter.total_tokens = 1
    entered, leave = anyio.Event(), threading.Event()

    def hold() -> None:
        anyio.from_thread.run_sync(entered.set)
        leave.wait(5)

    second = BackgroundTask(print, end="")
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(BackgroundTask(hold))
            await entered.wait()
            group.start_soon(second)
            await anyio.wait_all_tasks_blocked()
            assert second.state is TaskState.PENDING
            leave.set()
    assert second.state is TaskState.SUCCEEDED


# --- what a sync callable returns ----------------------------------------------------


class Awaited:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __await__(self) -> Generator[Any, Any, None]:
        yield from anyio.lowlevel.checkpoint().__await__()
        self.log.append("awaited")


def returns(kind: str, log: list[str]) -> Callable[[], Any]:
    async def coroutine() -> None:
        await anyio.lowlevel.checkpoint()
        log.append("awaited")

    @types.coroutine
    def generator() -> Generator[Any, Any, None]:
        yield from anyio.lowlevel.checkpoint().__await__()
        log.append("awaited")

    kinds: dict[str, Callable[[], Any]] = {
        "lambda": lambda: coroutine(),  # noqa: PLW0108 - as people write it
        "partial": functools.partial(lambda call: call(), coroutine),
        "types.coroutine": generator,
        "awaitable": lambda: Awaited(log),
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["lambda", "partial", "types.coroutine", "awaitable"])
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_what_a_sync_callable_returns_is_awaited(
    kind: str, concurrency: int
) -> None:
    log: list[str] = []
    tasks = BackgroundTasks(concurrency=concurrency)
    task = tasks.add_task(returns(kind, log))
    await tasks()
    assert log == ["awaited"]
    assert task.state is TaskState.SUCCEEDED


async def test_what_is_returned_is_awaited_before_the_next_task() -> None:
    log: list[str] = []
    tasks = BackgroundTasks()
    tasks.add_task(log.append, "before")
    tasks.add_task(lambda: Awaited(log))
    tasks.add_task(log.append, "after")
    await tasks()
    assert log == ["before", "awaited", "after"]


async def test_what_is_returned_may_fail() -> None:
    async def broken() -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("broken")

    log: list[int] = []
    tasks = BackgroundTasks()
    task = tasks.add_task(lambda call: call(), broken)
    tasks.add_task(log.append, 1)
    with pytest.raises(ValueError, match="broken"):
        await tasks()
    assert task.state is TaskState.FAILED
    assert task.finished_at
    assert log == [1]


async def test_what_is_returned_can_be_cancelled(
    records: Callable[[str], list[str]],
) -> None:
    tasks = BackgroundTasks([BackgroundTask(lambda call: call(), sleep_forever)])
    tasks.add_task(print)
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await until(lambda: states(tasks)[0] == "running")
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert states(tasks) == ["cancelled", "cancelled"]
    [warning] = records("WARNING")
    assert "(stopped), 'builtins.print' (not started)" in warning


async def test_what_is_returned_is_awaited_in_the_context_of_the_call() -> None:
    seen: list[str] = []

    async def look() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(variable.get())

    def call() -> Awaitable[None]:
        variable.set("call")
        return look()

    await BackgroundTask(call)()
    assert seen == ["call"]
    assert variable.get() == ""


# --- contexts ------------------------------------------------------------------------


async def test_tasks_added_in_a_worker_thread_run_in_its_context() -> None:
    seen: list[str] = []
    tasks = BackgroundTasks()

    def look() -> None:
        seen.append(variable.get())

    async def alook() -> None:
        for _ in range(3):
            seen.append(variable.get())
            await anyio.lowlevel.checkpoint()
        variable.set("leaked")

    def endpoint() -> None:
        variable.set("endpoint")
        for func in look, alook, functools.partial(lambda call: call(), alook), alook:
            tasks.add_task(func)
        variable.set("later")

    await anyio.to_thread.run_sync(endpoint)
    assert variable.get() == ""
    await tasks()
    assert seen == ["endpoint"] * 10
    await tasks()
    assert seen == ["endpoint"] * 20
    assert variable.get() == ""


async def test_a_task_made_in_a_cancelled_worker_thread_has_its_context() -> None:
    seen: list[str] = []
    made: list[BackgroundTask] = []

    def endpoint() -> None:
        variable.set("endpoint")
        cancel(scope)
        made.append(BackgroundTask(lambda: seen.append(variable.get())))

    with anyio.CancelScope() as scope:
        await anyio.to_thread.run_sync(endpoint)
    await made[0]()
    assert seen == ["endpoint"]


@drop_in
async def test_tasks_added_elsewhere_see_the_context_that_they_run_in(
    library: Any,
) -> None:
    seen: list[str] = []
    tasks = library.BackgroundTasks()
    # A module is imported like this, with its response objects and no event loop.
    thread = threading.Thread(
        target=tasks.add_task, args=(lambda: seen.append(variable.get()),)
    )
    thread.start()
    thread.join()
    variable.set("request")
    await tasks()
    assert seen == ["request"]


async def in_captured_context(func: Callable[[], Awaitable[None]]) -> BackgroundTask:
    """Runs an async function as a task that was added in a worker thread."""
    task: BackgroundTask = await anyio.to_thread.run_sync(BackgroundTask, func)
    assert task._context is not None
    await task()
    return task


async def test_cancel_scopes_locks_and_task_groups_work_in_a_captured_context() -> None:
    log: list[str] = []
    lock = anyio.Lock()
    limiter = anyio.CapacityLimiter(1)

    async def child() -> None:
        await anyio.lowlevel.checkpoint()
        log.append("child")

    async def task() -> None:
        with anyio.move_on_after(0) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        async with lock, limiter, anyio.create_task_group() as group:
            group.start_soon(child)
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        log.append("end")

    await in_captured_context(task)
    assert log == ["child", "end"]


async def test_tokens_and_async_generators_work_in_a_captured_context() -> None:
    log: list[str] = []

    async def generate() -> AsyncIterator[str]:
        for value in "ab":
            token = variable.set(value)
            await anyio.lowlevel.checkpoint()
            yield variable.get()
            variable.reset(token)

    async def task() -> None:
        log.extend([value async for value in generate()])
        assert variable.get() == ""

    await in_captured_context(task)
    assert log == ["a", "b"]


async def test_a_task_in_a_captured_context_can_be_cancelled() -> None:
    log: list[str] = []

    async def wait() -> None:
        try:
            scope.cancel()
            await anyio.sleep_forever()
        finally:
            log.append(variable.get())

    def endpoint() -> BackgroundTask:
        variable.set("endpoint")
        return BackgroundTask(wait)

    task = await anyio.to_thread.run_sync(endpoint)
    with anyio.CancelScope() as scope:
        await task()
    assert scope.cancelled_caught
    assert log == ["endpoint"]
    assert task.state is TaskState.CANCELLED


async def test_a_task_in_a_captured_context_can_be_closed() -> None:
    log: list[str] = []

    @types.coroutine
    def suspend() -> Generator[None, None, None]:
        yield

    async def wait() -> None:
        try:
            await suspend()
        finally:
            log.append("closed")

    task: BackgroundTask = await anyio.to_thread.run_sync(BackgroundTask, wait)
    running = task()
    running.send(None)
    running.close()
    assert log == ["closed"]


# --- cancellation --------------------------------------------------------------------


def name(func: str) -> str:
    return repr(f"{__name__}.{func}")


async def sleep_forever() -> None:
    await anyio.sleep_forever()


async def test_a_cancellation_leaves_and_earlier_failures_are_logged(
    caplog: pytest.LogCaptureFixture, records: Callable[[str], list[str]]
) -> None:
    log: list[int] = []
    tasks = BackgroundTasks()
    failed = tasks.add_task(fail, ValueError("earlier"))
    sleeping = tasks.add_task(sleep_forever)
    tasks.add_task(log.append, 1)
    tasks.tasks.append(starlette.background.BackgroundTask(log.append, 2))
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await until(lambda: sleeping.state is TaskState.RUNNING)
        group.cancel_scope.cancel()
    assert log == []
    assert states(tasks) == ["failed", "cancelled", "cancelled"]
    assert tasks.state is TaskState.CANCELLED
    assert records("ERROR") == [f"background task {name('fail')} failed"]
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.exc_info
    assert record.exc_info[1] is failed.exception
    assert record.__dict__["task_name"] == failed.name
    assert record.__dict__["task_id"] == failed.id
    [warning] = records("WARNING")
    assert warning.startswith("background tasks cut short by Cancelled")
    assert warning.endswith(
        f": {name('sleep_forever')} (stopped), "
        "'list.append' (not started), 'list.append' (not started)"
    )


async def test_a_failing_stock_task_is_logged_on_cancellation(
    records: Callable[[str], list[str]],
) -> None:
    tasks = BackgroundTasks()
    tasks.tasks.append(starlette.background.BackgroundTask(fail, ValueError("stock")))
    with anyio.CancelScope() as scope:
        tasks.add_task(cancel, scope)
        tasks.add_task(sleep_forever)
        await tasks()
    assert records("ERROR") == [f"background task {name('fail')} failed"]


async def test_an_error_beside_a_cancellation_is_told_once(
    records: Callable[[str], list[str]],
) -> None:
    async def broken() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("while cancelled")

    async def nursery() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(broken)
            await anyio.sleep_forever()

    log: list[int] = []
    raised: list[BaseException] = []
    tasks = BackgroundTasks([BackgroundTask(nursery), BackgroundTask(log.append, 1)])
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(tasks)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    except ExceptionGroup as error:
        # Trio's groups carry the cancellation along with the error.
        raised.append(error)
    assert log == []
    assert len(raised) + len(records("ERROR")) == 1


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_tasks_declared_always_run_though_the_request_is_cancelled(
    concurrency: int, records: Callable[[str], list[str]]
) -> None:
    log: list[str] = []

    async def clean() -> None:
        await anyio.lowlevel.checkpoint()
        log.append("async")

    tasks = BackgroundTasks(concurrency=concurrency)
    for _ in range(concurrency):
        tasks.add_task(sleep_forever)
    tasks.add_task(always(log.append, "sync"))
    tasks.add_task(log.append, "never")
    tasks.add_task(always(clean))
    tasks.add_task(always(fail, ValueError("cleaning")))
    tasks.tasks.append(BackgroundTasks([BackgroundTask(always(log.append, "inner"))]))
    inner = BackgroundTasks([BackgroundTask(always(log.append, "added"))])
    tasks.add_task(inner.func)
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert log == ["sync", "async", "inner", "added"]
    assert records("ERROR") == [f"background task {name('fail')} failed"]


async def test_a_nested_group_reports_its_unfinished_tasks_once(
    records: Callable[[str], list[str]],
) -> None:
    tasks = BackgroundTasks([BackgroundTasks([BackgroundTask(sleep_forever)])])
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    [warning] = records("WARNING")
    assert warning.endswith(f": {name('sleep_forever')} (stopped)")


async def test_a_cancelled_scope_stops_a_trip_before_the_next_task() -> None:
    log: list[int] = []
    tasks = BackgroundTasks()
    with anyio.CancelScope() as scope:
        tasks.add_task(log.append, 1)
        tasks.add_task(cancel, scope)
        tasks.add_task(log.append, 2)
        await tasks()
    assert scope.cancelled_caught
    assert log == [1]
    assert states(tasks) == ["succeeded", "succeeded", "cancelled"]


async def test_a_scope_that_is_cancelled_in_the_last_task_does_not_undo_it() -> None:
    tasks = BackgroundTasks()
    with anyio.CancelScope() as scope:
        tasks.add_task(cancel, scope)
        await tasks()
    assert tasks.state is TaskState.SUCCEEDED


async def test_a_sync_task_that_looks_for_cancellation_is_stopped_by_it(
    records: Callable[[str], list[str]],
) -> None:
    entered = anyio.Event()
    cancelled = threading.Event()

    def work() -> None:
        anyio.from_thread.run_sync(entered.set)
        cancelled.wait(5)
        anyio.from_thread.check_cancelled()

    tasks = BackgroundTasks([BackgroundTask(work), BackgroundTask(print)])
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await entered.wait()
        group.cancel_scope.cancel()
        cancelled.set()
    assert states(tasks) == ["cancelled", "cancelled"]
    [warning] = records("WARNING")
    assert "work' (stopped), 'builtins.print' (not started)" in warning


async def test_a_failure_in_a_cancelled_trip_is_logged(
    records: Callable[[str], list[str]],
) -> None:
    def work() -> None:
        cancel(scope)
        raise SystemExit(1)

    tasks = BackgroundTasks([BackgroundTask(work), BackgroundTask(print)])
    with anyio.CancelScope() as scope:
        await tasks()
    assert states(tasks) == ["failed", "cancelled"]
    assert len(records("ERROR")) == 1


@only_asyncio
async def test_asyncios_cancellation_stops_a_trip_before_the_next_task(
    records: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the trip does not end for its length.
    monkeypatch.setattr(_tasks, "_TRIP_SECONDS", 60)
    log: list[str] = []
    held = Held(then=lambda: log.append("held"))
    tasks = BackgroundTasks()
    tasks.add_task(fail, ValueError("earlier"))
    first = tasks.add_task(held)
    tasks.add_task(log.append, "never")
    running = asyncio.create_task(tasks())
    await held.entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert records("ERROR") == [f"background task {name('fail')} failed"]
    [warning] = records("WARNING")
    assert warning == (
        "background tasks cut short by CancelledError: "
        "'loops.Held' (its thread goes on), 'list.append' (not started)"
    )
    assert first.state is TaskState.RUNNING
    held.go_on.set()
    await until(lambda: first.state is TaskState.SUCCEEDED)
    assert log == ["held"]
    assert states(tasks) == ["failed", "succeeded", "cancelled"]


@only_asyncio
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_asyncios_cancellation_leaves_through_task_groups(
    concurrency: int,
) -> None:
    async def child() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child)

    log: list[int] = []
    inner = BackgroundTasks([parent], concurrency=concurrency)
    running = asyncio.create_task(
        BackgroundTasks([inner, BackgroundTask(log.append, 1)])()
    )
    await until(lambda: states(inner) == ["running"])
    await anyio.wait_all_tasks_blocked()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == []


@only_asyncio
async def test_a_failure_in_an_abandoned_thread_is_logged_by_it(
    records: Callable[[str], list[str]],
) -> None:
    held = Held(then=lambda: fail(ValueError("late")))
    task = BackgroundTask(held)
    running = asyncio.create_task(task())
    await held.entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert records("ERROR") == []
    held.go_on.set()
    await until(lambda: records("ERROR") != [])
    assert records("ERROR") == ["background task 'loops.Held' failed"]
    assert task.state is TaskState.FAILED


@only_asyncio
async def test_what_an_abandoned_thread_returns_is_given_up(
    records: Callable[[str], list[str]],
) -> None:
    held = Held(then=sleep_forever)
    task = BackgroundTask(held)
    running = asyncio.create_task(task())
    await held.entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    held.go_on.set()
    await until(lambda: len(records("WARNING")) == 2)
    assert records("WARNING")[1].startswith("background task 'loops.Held' cut short")
    assert task.state is TaskState.CANCELLED


@only_asyncio
@pytest.mark.parametrize("returned", [sleep_forever, lambda: Awaited([])])
async def test_what_was_returned_is_given_up_by_a_cancellation_in_between(
    returned: Callable[[], Any],
) -> None:
    task = BackgroundTask(lambda call: call(), returned)
    trip = _tasks._Trip([task], 0, None, [])
    # The thread is done, and the loop that was to await the result is cancelled.
    await anyio.to_thread.run_sync(trip._work)
    assert trip.abandon() == [f"{task.name!r} (stopped)"]
    assert task.state is TaskState.CANCELLED


@only_asyncio
async def test_tasks_declared_always_wait_for_an_abandoned_thread() -> None:
    log: list[str] = []
    held = Held(then=lambda: log.append("held"))
    tasks = BackgroundTasks()
    tasks.add_task(held)
    tasks.add_task(always(log.append, "always"))
    running = asyncio.create_task(tasks())
    await held.entered.wait()
    running.cancel()
    await asyncio.wait([running], timeout=0)
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == ["held", "always"]


@only_asyncio
async def test_a_trip_that_is_cancelled_before_it_begins_starts_nothing() -> None:
    log: list[str] = []
    tasks = BackgroundTasks()
    tasks.add_task(log.append, "never")
    tasks.add_task(always(log.append, "always"))
    limiter = _tasks._worker_threads()
    limiter.total_tokens = 1
    await limiter.acquire_on_behalf_of(tasks)
    running = asyncio.create_task(tasks())
    await anyio.wait_all_tasks_blocked()
    running.cancel()
    await asyncio.wait([running], timeout=0)
    limiter.release_on_behalf_of(tasks)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == ["always"]


@only_asyncio
async def test_tasks_declared_always_run_though_the_wait_is_cancelled() -> None:
    log: list[str] = []
    held = Held()
    tasks = BackgroundTasks()
    first = tasks.add_task(held)
    tasks.add_task(always(log.append, "always"))
    running = asyncio.create_task(tasks())
    await held.entered.wait()
    running.cancel()
    await asyncio.wait([running], timeout=0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == ["always"]
    held.go_on.set()
    await until(lambda: first.state is TaskState.SUCCEEDED)


async def test_tasks_that_are_added_while_others_run_always_are_told(
    records: Callable[[str], list[str]],
) -> None:
    tasks = BackgroundTasks()
    tasks.add_task(sleep_forever)
    tasks.add_task(always(tasks.add_task, sleep_forever))
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert states(tasks) == ["cancelled", "succeeded", "cancelled"]
    assert records("WARNING")[1].endswith(f": {name('sleep_forever')} (not started)")


async def test_sync_tasks_declared_always_do_not_see_a_cancellation() -> None:
    log: list[str] = []

    def clean() -> None:
        cancel(scope)
        anyio.from_thread.check_cancelled()
        anyio.from_thread.run(anyio.lowlevel.checkpoint)
        log.append("clean")

    tasks = BackgroundTasks()
    with anyio.CancelScope() as scope:
        tasks.add_task(log.append, "before")
        tasks.add_task(always(clean))
        tasks.add_task(log.append, "after")
        await tasks()
    assert log == ["before", "clean"]


async def test_stock_tasks_and_groups_are_cut_short_like_ours(
    records: Callable[[str], list[str]],
) -> None:
    log: list[str] = []
    stock = starlette.background.BackgroundTask
    inner = starlette.background.BackgroundTasks(
        [
            stock(fail, ValueError("stock")),
            stock(sleep_forever),
            stock(always(log.append, "always")),
            stock(print),
        ]
    )
    tasks = BackgroundTasks([inner, BackgroundTasks([BackgroundTasks()])])
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert log == ["always"]
    assert records("ERROR") == [f"background task {name('fail')} failed"]
    [warning] = records("WARNING")
    assert warning.endswith(
        f": {name('sleep_forever')} (stopped), 'builtins.print' (not started), "
        "'list.append' (runs all the same)"
    )
    assert tasks.tasks[1].tasks[0].state is TaskState.CANCELLED  # type: ignore[attr-defined]


async def test_tasks_declared_always_run_though_one_ends_in_a_group_of_errors() -> None:
    log: list[str] = []

    async def broken() -> None:
        raise BaseExceptionGroup("", [KeyboardInterrupt()] if interrupted else [error])

    for interrupted in False, True:
        stop = anyio.Event()
        error = SystemExit()
        tasks = BackgroundTasks([BackgroundTask(stop.wait)])
        tasks.add_task(always(broken))
        tasks.add_task(always(log.append, "always"))
        try:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await tasks()
        except BaseExceptionGroup:
            assert interrupted
    assert log == ["always"]


class OwnTask(BackgroundTask):
    pass


class OwnGroup(starlette.background.BackgroundTasks):
    async def __call__(self) -> None:
        for task in self.tasks:
            await task()


@pytest.mark.parametrize(
    ("task", "stopped"),
    [
        (OwnTask(sleep_forever), "sleep_forever"),
        (OwnGroup([starlette.background.BackgroundTask(sleep_forever)]), "OwnGroup"),
    ],
    ids=["task", "group"],
)
async def test_a_task_of_a_subclass_is_named_once(
    task: Any, stopped: str, records: Callable[[str], list[str]]
) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(BackgroundTasks([task]))
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    [warning] = records("WARNING")
    assert warning.endswith(f": {name(stopped)} (stopped)")


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_run_leaves_no_garbage(cancelled: bool) -> None:
    async def run() -> None:
        tasks = BackgroundTasks([sleep_forever if cancelled else BackgroundTasks()])
        with anyio.CancelScope() as scope:
            tasks.add_task(print, end="")
            if cancelled:
                scope.cancel()
            await tasks()

    await run()
    gc.disable()
    try:
        found: list[int] = []
        for _ in range(3):
            gc.collect()
            for _ in range(10):
                await run()
            # What other tests have left running may leave some as well, meanwhile.
            found.append(gc.collect())
        assert min(found) < 10
    finally:
        gc.enable()


class Lazy:
    """Fails as soon as it is asked for its class."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise LookupError("unbound")


async def test_a_result_that_cannot_be_looked_at_fails_its_task() -> None:
    log: list[int] = []
    tasks = BackgroundTasks()
    task = tasks.add_task(Lazy)
    tasks.add_task(log.append, 1)
    with pytest.raises(LookupError, match="unbound"):
        await tasks()
    assert task.state is TaskState.FAILED
    assert log == [1]


@only_asyncio
async def test_tasks_declared_always_can_be_cancelled_again(
    records: Callable[[str], list[str]],
) -> None:
    entered = anyio.Event()

    async def clean() -> None:
        entered.set()
        await anyio.sleep_forever()

    tasks = BackgroundTasks()
    tasks.add_task(sleep_forever)
    tasks.add_task(always(clean))
    tasks.add_task(always(print))
    running = asyncio.create_task(tasks())
    await anyio.wait_all_tasks_blocked()
    running.cancel()
    await entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert states(tasks) == ["cancelled", "cancelled", "succeeded"]
    assert len(records("WARNING")) == 2


async def test_the_group_goes_on_when_a_task_swallows_a_cancellation_of_its_own() -> (
    None
):
    log: list[int] = []

    async def wait() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()

    await BackgroundTasks([BackgroundTask(wait), BackgroundTask(log.append, 1)])()
    assert log == [1]


# --- several at once -----------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_no_more_tasks_run_at_once_than_the_group_says(limit: int) -> None:
    running = most = 0
    changed = anyio.Event()

    async def task() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == limit:
            changed.set()
        await changed.wait()
        running -= 1

    with anyio.fail_after(5):
        await BackgroundTasks([task] * 10, concurrency=limit)()
    assert most == limit


async def test_sync_and_async_tasks_run_at_once() -> None:
    event = anyio.Event()

    def release() -> None:
        anyio.from_thread.run_sync(event.set)

    tasks = BackgroundTasks([BackgroundTask(event.wait)], concurrency=2)
    tasks.add_task(release)
    with anyio.fail_after(5):
        await tasks()
    assert states(tasks) == ["succeeded", "succeeded"]


async def test_failures_of_tasks_that_run_at_once_are_raised_at_the_end() -> None:
    log: list[int] = []
    tasks = BackgroundTasks(concurrency=3)
    tasks.add_task(fail, ValueError("one"))
    tasks.add_task(log.append, 1)
    tasks.tasks.append(BackgroundTasks([BackgroundTask(fail, KeyError("two"))]))
    with pytest.raises(ExceptionGroup) as caught:
        await tasks()
    assert {type(error) for error in caught.value.exceptions} == {ValueError, KeyError}
    assert log == [1]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_running_task_may_add_one_that_it_waits_for(kind: str) -> None:
    event = anyio.Event()
    tasks = BackgroundTasks(concurrency=2)

    async def add() -> None:
        tasks.add_task(anyio.from_thread.run_sync, event.set)
        await event.wait()

    def add_sync() -> None:
        tasks.add_task(anyio.from_thread.run_sync, event.set)
        anyio.from_thread.run(event.wait)

    tasks.add_task(add if kind == "async" else add_sync)
    with anyio.fail_after(5):
        await tasks()
    assert states(tasks) == ["succeeded", "succeeded"]


async def test_a_task_added_by_a_thread_of_somebody_else_runs_too() -> None:
    log: list[int] = []
    tasks = BackgroundTasks(concurrency=2)

    def add() -> None:
        thread = threading.Thread(target=tasks.add_task, args=(log.append, 1))
        thread.start()
        thread.join()

    tasks.add_task(add)
    await tasks()
    assert log == [1]


async def test_tasks_that_run_at_once_are_cancelled_together(
    records: Callable[[str], list[str]],
) -> None:
    tasks = BackgroundTasks([sleep_forever], concurrency=3)
    tasks.add_task(fail, ValueError("earlier"))
    tasks.add_task(sleep_forever)
    tasks.add_task(sleep_forever)
    tasks.add_task(print)
    async with anyio.create_task_group() as group:
        group.start_soon(tasks)
        await until(
            lambda: (
                states(tasks) == ["running", "failed", "running", "running", "pending"]
            )
        )
        group.cancel_scope.cancel()
    assert states(tasks) == ["cancelled", "failed", *["cancelled"] * 3]
    assert records("ERROR") == [f"background task {name('fail')} failed"]
    assert len([w for w in records("WARNING") if "(stopped)" in w]) == 3
    assert len([w for w in records("WARNING") if "(not started)" in w]) == 1


@only_asyncio
async def test_asyncios_cancellation_of_one_task_leaves_its_siblings_alone(
    records: Callable[[str], list[str]],
) -> None:
    event = anyio.Event()

    async def end_itself() -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        await anyio.sleep_forever()

    async def set_event() -> None:
        event.set()

    tasks = BackgroundTasks(concurrency=2)
    for func in event.wait, end_itself, set_event:
        tasks.add_task(func)
    tasks.add_task(fail, ValueError("sibling"))
    with pytest.raises(ValueError, match="sibling"):
        await tasks()
    assert states(tasks) == ["succeeded", "cancelled", "succeeded", "failed"]
    assert len(records("WARNING")) == 1


# --- properties ----------------------------------------------------------------------


@given(
    plan=st.lists(
        st.tuples(
            st.sampled_from(["sync", "async", "returns", "stock", "bare", "group"]),
            st.booleans(),
        ),
        max_size=12,
    ),
    backend=st.sampled_from(["asyncio", "trio"]),
)
def test_order_and_isolation_hold_for_any_mixture(
    plan: list[tuple[str, bool]], backend: str
) -> None:
    log: list[int] = []
    tasks = BackgroundTasks()

    def act(index: int, fails: bool) -> None:
        log.append(index)
        if fails:
            raise ValueError(index)

    async def aact(index: int, fails: bool) -> None:
        await anyio.lowlevel.checkpoint()
        act(index, fails)

    for index, (kind, fails) in enumerate(plan):
        args = index, fails
        item: Any = {
            "sync": BackgroundTask(act, *args),
            "async": BackgroundTask(aact, *args),
            "returns": BackgroundTask(lambda args: aact(*args), args),
            "stock": starlette.background.BackgroundTask(act, *args),
            "bare": functools.partial(aact, *args),
            "group": BackgroundTasks([BackgroundTask(act, *args)]),
        }[kind]
        tasks.tasks.append(item)

    expected = [index for index, (_, fails) in enumerate(plan) if fails]
    failed: list[int] = []
    try:
        anyio.run(tasks, backend=backend)
    except ValueError as error:
        failed = [error.args[0]]
    except ExceptionGroup as error:
        failed = [part.args[0] for part in error.exceptions]
    assert log == [*range(len(plan))]
    assert failed == expected
