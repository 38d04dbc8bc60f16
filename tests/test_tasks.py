"""The pair without middleware, beside Starlette's where they do the same."""

import asyncio
import contextvars
import functools
import inspect
import threading
import types
import uuid
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from unittest.mock import AsyncMock, Mock

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import starlette.background
from anyio.lowlevel import checkpoint
from loops import only_asyncio
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

import postlude
from postlude import BackgroundTask, BackgroundTasks, TaskState

pytestmark = pytest.mark.anyio

StockTask = starlette.background.BackgroundTask
StockTasks = starlette.background.BackgroundTasks

drop_in = pytest.mark.parametrize(
    "library", [starlette.background, postlude], ids=["starlette", "postlude"]
)
kinds = pytest.mark.parametrize("kind", ["sync", "async"])

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")


def make(kind: str, func: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a sync function, or an async one that does the same."""
    if kind == "sync":
        return func

    async def call(*args: Any, **kwargs: Any) -> Any:
        await checkpoint()
        return func(*args, **kwargs)

    return call


def fail(error: BaseException) -> None:
    raise error


def nothing() -> None: ...


async def anothing() -> None: ...


def returns_coroutine() -> Coroutine[Any, Any, None]:
    return anothing()


class Recorder:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __call__(self, value: int) -> None:
        self.log.append(value)

    def method(self, value: int) -> None:
        self.log.append(value)

    async def amethod(self, value: int) -> None:
        self.log.append(value)


class AsyncRecorder(Recorder):
    async def __call__(self, value: int) -> None:  # type: ignore[override]
        self.log.append(value)


# --- the drop-in ---------------------------------------------------------------------


@drop_in
def test_the_signatures_are_starlettes(library: Any) -> None:
    for name in ["BackgroundTask", "BackgroundTasks.add_task"]:
        ours: Any = library
        stock: Any = starlette.background
        for part in name.split("."):
            ours, stock = getattr(ours, part), getattr(stock, part)
        parameters = list(inspect.signature(ours).parameters.values())
        expected = list(inspect.signature(stock).parameters.values())
        assert [(p.name, p.kind, p.default) for p in parameters] == [
            (p.name, p.kind, p.default) for p in expected
        ]
    first, *others = inspect.signature(library.BackgroundTasks).parameters.values()
    assert (first.name, first.default) == ("tasks", None)
    assert all(p.kind is p.KEYWORD_ONLY for p in others)


@drop_in
def test_a_task_has_the_attributes_of_starlettes(library: Any) -> None:
    task = library.BackgroundTask(print, 1, end="")
    assert isinstance(task, StockTask)
    assert (task.func, task.args, task.kwargs) == (print, (1,), {"end": ""})
    assert task.is_async is False
    assert library.BackgroundTask(anothing).is_async is True
    assert library.BackgroundTasks([task]).tasks == [task]
    assert library.BackgroundTasks().tasks == []


@drop_in
async def test_the_function_may_be_given_by_keyword(library: Any) -> None:
    log: list[int] = []
    tasks = library.BackgroundTasks([library.BackgroundTask(func=anothing)])
    tasks.add_task(func=Recorder(log), value=1)
    await tasks()
    assert log == [1]


@pytest.mark.parametrize(
    ("func", "args"),
    [
        pytest.param(*case, id=id_)
        for id_, case in {
            "function": (nothing, ()),
            "coroutine function": (anothing, ()),
            "builtin": (print, ()),
            "class": (int, ()),
            "method": (Recorder([]).method, (1,)),
            "async method": (Recorder([]).amethod, (1,)),
            "callable": (Recorder([]), (1,)),
            "async callable": (AsyncRecorder([]), (1,)),
            "partial": (functools.partial(Recorder([]), 1), ()),
            "partials": (functools.partial(functools.partial(AsyncRecorder([]))), (1,)),
            "mock": (Mock(), ()),
            "async mock": (AsyncMock(), ()),
            "returns coroutine": (returns_coroutine, ()),
            "wrapper": (functools.wraps(anothing)(returns_coroutine), ()),
            "decorated": (postlude.task()(functools.wraps(anothing)(Mock())), ()),
        }.items()
    ],
)
def test_async_callables_are_told_as_starlette_tells_them(
    func: Any, args: tuple[Any, ...]
) -> None:
    assert BackgroundTask(func, *args).is_async is StockTask(func, *args).is_async


@drop_in
@kinds
async def test_tasks_run_after_the_body_has_been_sent(library: Any, kind: str) -> None:
    log: list[Any] = []

    async def send(message: Any) -> None:
        log.append(message["type"])

    tasks = library.BackgroundTasks()
    tasks.add_task(make(kind, log.append), 1)
    tasks.add_task(make(kind, log.append), 2)
    response = PlainTextResponse("hello", background=tasks)
    await response({"type": "http", "method": "GET"}, AsyncMock(), send)
    assert log == ["http.response.start", "http.response.body", 1, 2]


@drop_in
async def test_sync_tasks_run_in_worker_threads_and_async_ones_do_not(
    library: Any,
) -> None:
    threads: list[int] = []

    def sync() -> None:
        threads.append(threading.get_ident())

    async def coroutine() -> None:
        sync()

    await library.BackgroundTasks(
        [library.BackgroundTask(sync), library.BackgroundTask(coroutine)]
    )()
    assert threads[0] != threading.get_ident()
    assert threads[1] == threading.get_ident()


@drop_in
async def test_every_kind_of_callable_runs(library: Any) -> None:
    log: list[int] = []
    tasks = library.BackgroundTasks()
    tasks.add_task(log.append, 1)
    tasks.add_task(Recorder(log), 2)
    tasks.add_task(Recorder(log).method, value=3)
    tasks.add_task(Recorder(log).amethod, 4)
    tasks.add_task(AsyncRecorder(log), 5)
    tasks.add_task(functools.partial(Recorder(log), value=6))
    tasks.add_task(functools.partial(AsyncRecorder(log), 7))
    tasks.add_task(Recorder, log)
    tasks.add_task(AsyncMock(side_effect=log.append), 8)
    tasks.add_task(Mock(side_effect=log.append, return_value=None), 9)
    await tasks()
    assert log == [*range(1, 10)]


@drop_in
@kinds
async def test_a_running_task_may_add_more(library: Any, kind: str) -> None:
    log: list[int] = []
    tasks = library.BackgroundTasks()

    def add(value: int) -> None:
        log.append(value)
        if value < 3:
            tasks.add_task(make(kind, add), value + 1)

    tasks.add_task(make(kind, add), 1)
    await tasks()
    assert log == [1, 2, 3]


@drop_in
async def test_a_middleware_may_add_a_background_to_a_group_of_its_own(
    library: Any,
) -> None:
    log: list[int] = []
    background = library.BackgroundTask(log.append, 1)
    tasks = library.BackgroundTasks()
    tasks.add_task(background.func, *background.args, **background.kwargs)
    await tasks()
    assert log == [1]


@drop_in
async def test_sync_tasks_can_call_the_event_loop(library: Any) -> None:
    log: list[int] = []

    async def append(value: int) -> None:
        log.append(value)

    def task(value: int) -> None:
        anyio.from_thread.run(append, value)
        anyio.from_thread.run_sync(log.append, value)

    await library.BackgroundTasks([library.BackgroundTask(task, i) for i in (1, 2)])()
    assert log == [1, 1, 2, 2]


@drop_in
async def test_tasks_see_the_context_that_they_run_in(library: Any) -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(variable.get())

    async def alook() -> None:
        look()

    tasks = library.BackgroundTasks()
    for func in look, alook, look:
        tasks.add_task(func)
    variable.set("running")
    await tasks()
    assert seen == ["running"] * 3


@drop_in
async def test_what_a_sync_task_sets_is_seen_by_no_other(library: Any) -> None:
    seen: list[str] = []

    def setter() -> None:
        seen.append(variable.get())
        variable.set("leaked")

    tasks = library.BackgroundTasks([library.BackgroundTask(setter)] * 3)
    await tasks()
    assert seen == ["", "", ""]
    assert variable.get() == ""


@drop_in
async def test_the_tasks_of_a_reused_response_run_for_each_request(
    library: Any,
) -> None:
    log: list[int] = []
    tasks = library.BackgroundTasks()
    tasks.add_task(log.append, 1)
    tasks.add_task(AsyncMock(side_effect=log.append), 2)
    await tasks()
    await tasks()
    assert log == [1, 2, 1, 2]


@drop_in
def test_tasks_run_for_a_test_client(library: Any) -> None:
    log: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks = library.BackgroundTasks()
        tasks.add_task(log.append, 1)
        tasks.add_task(AsyncMock(side_effect=log.append), 2)
        await PlainTextResponse("hello", background=tasks)(scope, receive, send)

    # Whose event loop does not run in the main thread.
    assert TestClient(app).get("/").text == "hello"
    assert log == [1, 2]


@drop_in
@kinds
async def test_a_task_awaited_by_itself_raises_its_error(
    library: Any, kind: str
) -> None:
    with pytest.raises(ValueError, match="broken"):
        await library.BackgroundTask(make(kind, fail), ValueError("broken"))()


# --- groups in groups ----------------------------------------------------------------


async def test_stock_tasks_and_async_callables_work_in_a_group() -> None:
    log: list[int] = []

    async def bare() -> None:
        log.append(4)

    await BackgroundTasks(
        [
            StockTask(log.append, 1),
            StockTask(AsyncMock(side_effect=log.append), 2),
            StockTasks([StockTask(log.append, 3)]),
            bare,
            BackgroundTask(log.append, 5),
        ]
    )()
    assert log == [1, 2, 3, 4, 5]


async def test_a_group_works_in_a_stock_group() -> None:
    log: list[int] = []
    tasks = BackgroundTasks([BackgroundTask(log.append, 2)])
    await StockTasks([StockTask(log.append, 1), tasks, StockTask(log.append, 3)])()
    assert log == [1, 2, 3]


async def test_a_stock_task_that_fails_before_a_group_stops_it() -> None:
    log: list[int] = []
    tasks = BackgroundTasks([BackgroundTask(log.append, 2)])
    with pytest.raises(ValueError, match="stock"):
        await StockTasks([StockTask(fail, ValueError("stock")), tasks])()
    assert log == []
    assert tasks.state is TaskState.PENDING


def test_a_group_is_a_task_of_postlude_but_no_stock_group() -> None:
    tasks = BackgroundTasks()
    assert isinstance(tasks, BackgroundTask)
    assert not isinstance(tasks, StockTasks)


async def test_a_group_can_be_used_as_a_single_task() -> None:
    log: list[int] = []
    tasks = BackgroundTasks([BackgroundTask(log.append, 1)])
    assert (tasks.args, tasks.kwargs, tasks.is_async) == ((), {}, True)
    await tasks.func(*tasks.args, **tasks.kwargs)
    outer = BackgroundTasks()
    outer.add_task(tasks.func, *tasks.args, **tasks.kwargs)
    await outer()
    assert log == [1, 1]


@pytest.mark.parametrize("added", [False, True])
async def test_failures_of_a_group_in_a_group_are_told_once(added: bool) -> None:
    inner = BackgroundTasks([BackgroundTask(fail, ValueError("inner"))])
    log: list[int] = []
    outer = BackgroundTasks([inner, BackgroundTask(log.append, 1)])
    if added:
        outer = BackgroundTasks()
        outer.add_task(inner.func)
        outer.add_task(log.append, 1)
    with pytest.raises(ValueError, match="inner") as caught:
        await outer()
    assert (inner.state, outer.state) == ("failed", "failed")
    assert caught.value.__notes__ == [f"in background task {__name__ + '.fail'!r}"]
    assert log == [1]


@drop_in
async def test_subclasses_may_have_constructors_of_their_own(library: Any) -> None:
    log: list[int] = []

    class Task(library.BackgroundTask):  # type: ignore[misc]
        def __init__(self, func: Any) -> None:
            self.__dict__.update(func=func, args=(1,), kwargs={}, is_async=False)

    class Tasks(library.BackgroundTasks):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tasks = [Task(log.append)]

    await Task(log.append)()
    await Tasks()()
    assert log == [1, 1]


# --- the handle ----------------------------------------------------------------------


@kinds
async def test_add_task_returns_a_handle_that_tells_what_becomes_of_it(
    kind: str,
) -> None:
    states: list[Any] = []
    tasks = BackgroundTasks()

    def look() -> None:
        states.append((handle.state, handle.finished_at))

    handle = tasks.add_task(make(kind, look))
    assert tasks.tasks == [handle]
    assert type(handle) is BackgroundTask
    assert handle.state is TaskState.PENDING
    assert (handle.started_at, handle.finished_at, handle.exception) == (None,) * 3
    before = datetime.now(UTC)
    await tasks()
    assert states == [(TaskState.RUNNING, None)]
    assert (handle.state, handle.exception) == ("succeeded", None)
    assert handle.started_at
    assert handle.finished_at
    assert before <= handle.started_at <= handle.finished_at <= datetime.now(UTC)


@kinds
async def test_the_handle_of_a_failed_task_has_its_exception(kind: str) -> None:
    error = ValueError("broken")
    task = BackgroundTask(make(kind, fail), error)
    with pytest.raises(ValueError, match="broken"):
        await task()
    assert task.state is TaskState.FAILED
    assert task.exception is error
    assert task.finished_at


async def test_the_handle_shows_the_latest_run() -> None:
    outcomes = [ValueError("first"), None]
    task = BackgroundTask(Mock(side_effect=outcomes, return_value=None))
    with pytest.raises(ValueError, match="first"):
        await task()
    assert task.state is TaskState.FAILED
    await task()
    assert (task.state, task.exception) == ("succeeded", None)


async def test_each_run_of_a_reused_group_raises_its_own_failures() -> None:
    errors = [ValueError("first"), ValueError("second")]
    tasks = BackgroundTasks([BackgroundTask(Mock(side_effect=errors))])
    for error in errors:
        with pytest.raises(ValueError, match=str(error)):
            await tasks()


async def test_a_group_that_runs_for_two_requests_at_once_runs_twice() -> None:
    log: list[int] = []
    both = anyio.Event()
    waiting = 0

    async def wait() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 2:
            both.set()
        await both.wait()

    tasks = BackgroundTasks([BackgroundTask(wait), BackgroundTask(log.append, 1)])
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(tasks)
            group.start_soon(tasks)
    assert log == [1, 1]


def test_the_id_is_a_uuid_that_stays() -> None:
    task = BackgroundTask(nothing)
    assert uuid.UUID(task.id).version == 4
    assert task.id == task.id
    assert task.id != BackgroundTask(nothing).id


def test_a_state_is_a_string() -> None:
    assert [*TaskState] == [
        "pending",
        "running",
        "succeeded",
        "failed",
        "cancelled",
        "lost",
    ]


def test_the_representation_shows_name_and_state_but_no_arguments() -> None:
    task = BackgroundTask(print, "a secret")
    assert repr(task) == "<BackgroundTask 'builtins.print' pending>"


async def test_a_group_is_a_handle_of_the_whole() -> None:
    tasks = BackgroundTasks()
    assert (tasks.state, tasks.started_at, tasks.finished_at) == ("pending", None, None)
    await tasks()
    assert (tasks.state, tasks.started_at, tasks.finished_at) == (
        "succeeded",
        None,
        None,
    )
    first, last = tasks.add_task(nothing), tasks.add_task(anothing)
    tasks.tasks.insert(1, StockTask(nothing))
    await tasks()
    assert tasks.started_at == first.started_at
    assert tasks.finished_at == last.finished_at
    failed = tasks.add_task(fail, ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await tasks()
    assert (tasks.state, tasks.exception) == ("failed", failed.exception)


async def test_a_group_says_that_it_is_running() -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append((tasks.state, tasks.finished_at, tasks.started_at is not None))

    tasks = BackgroundTasks([BackgroundTask(nothing), BackgroundTask(look)])
    await tasks()
    assert seen == [("running", None, True)]


# --- failures ------------------------------------------------------------------------


def note(name: str) -> str:
    return f"in background task {__name__ + '.' + name!r}"


@kinds
async def test_every_task_runs_whatever_its_siblings_do(kind: str) -> None:
    log: list[int] = []
    error = ValueError("broken")
    tasks = BackgroundTasks()
    tasks.add_task(make(kind, log.append), 1)
    tasks.add_task(make(kind, fail), error)
    tasks.add_task(make(kind, log.append), 2)
    with pytest.raises(ValueError, match="broken") as caught:
        await tasks()
    assert caught.value is error
    assert log == [1, 2]
    name = "fail" if kind == "sync" else "make.<locals>.call"
    assert error.__notes__ == [note(name)]


async def test_several_failures_are_raised_as_a_group() -> None:
    errors = [ValueError("sync"), KeyError("async"), OSError("stock")]
    tasks = BackgroundTasks()
    tasks.add_task(fail, errors[0])
    tasks.add_task(make("async", fail), errors[1])
    tasks.tasks.append(StockTask(fail, errors[2]))
    with pytest.raises(ExceptionGroup, match="3 background tasks failed") as caught:
        await tasks()
    assert [*caught.value.exceptions] == errors
    assert [error.__notes__ for error in errors] == [
        [note("fail")],
        [note("make.<locals>.call")],
        [note("fail")],
    ]
    assert tasks.exception is caught.value


async def test_an_exception_that_fails_two_tasks_gets_one_note_for_each_name() -> None:
    error = ValueError("shared")
    tasks = BackgroundTasks()
    tasks.add_task(fail, error)
    tasks.add_task(fail, error)
    tasks.add_task(postlude.task(name="other")(functools.partial(fail)), error)
    with pytest.raises(ExceptionGroup) as caught:
        await tasks()
    assert [*caught.value.exceptions] == [error] * 3
    assert error.__notes__ == [note("fail"), "in background task 'other'"]


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@kinds
async def test_an_exception_that_refuses_notes_is_raised_without(kind: str) -> None:
    log: list[int] = []
    error = FrozenError(1)
    tasks = BackgroundTasks()
    tasks.add_task(make(kind, fail), error)
    tasks.add_task(make(kind, log.append), 1)
    with pytest.raises(FrozenError) as caught:
        await tasks()
    assert caught.value is error
    assert log == [1]


@kinds
async def test_an_exception_group_is_one_failure(kind: str) -> None:
    log: list[int] = []
    error = ExceptionGroup("several", [ValueError(), KeyError()])
    tasks = BackgroundTasks()
    tasks.add_task(make(kind, fail), error)
    tasks.add_task(make(kind, log.append), 1)
    with pytest.raises(ExceptionGroup) as caught:
        await tasks()
    assert caught.value is error
    assert log == [1]


class OwnBaseError(BaseException):
    pass


@kinds
@pytest.mark.parametrize(
    "error",
    [
        SystemExit(1),
        asyncio.CancelledError(),
        OwnBaseError(),
        BaseExceptionGroup("several", [SystemExit(1), asyncio.CancelledError()]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_is_no_exception_is_a_failure_with_that_cause(
    kind: str, error: BaseException
) -> None:
    log: list[int] = []
    tasks = BackgroundTasks()
    failed = tasks.add_task(make(kind, fail), error)
    tasks.add_task(make(kind, log.append), 1)
    with pytest.raises(RuntimeError) as caught:
        await tasks()
    assert str(caught.value) == (
        f"background task {failed.name!r} raised {type(error).__name__}"
    )
    assert caught.value.__cause__ is error
    assert failed.exception is caught.value
    assert log == [1]


@only_asyncio
async def test_awaiting_a_cancelled_future_is_a_failure() -> None:
    log: list[int] = []

    async def wait() -> None:
        future: asyncio.Future[None] = asyncio.Future()
        future.cancel()
        await future

    tasks = BackgroundTasks([BackgroundTask(wait), BackgroundTask(log.append, 1)])
    with pytest.raises(RuntimeError, match="raised CancelledError"):
        await tasks()
    assert log == [1]


@only_asyncio
async def test_a_cancelled_future_in_a_task_group_is_a_failure() -> None:
    log: list[int] = []

    async def wait() -> None:
        future: asyncio.Future[None] = asyncio.Future()
        future.cancel()
        async with anyio.create_task_group():
            await future

    tasks = BackgroundTasks([BackgroundTask(wait), BackgroundTask(log.append, 1)])
    with pytest.raises(RuntimeError, match="raised CancelledError"):
        await tasks()
    assert log == [1]


async def test_a_cancellation_that_got_out_of_its_scope_is_a_failure() -> None:
    stray: list[BaseException] = []
    log: list[int] = []

    async def wait() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            except BaseException as exc:
                stray.append(exc)
        raise stray[0]

    tasks = BackgroundTasks([BackgroundTask(wait), BackgroundTask(log.append, 1)])
    with pytest.raises(RuntimeError) as caught:
        await tasks()
    assert caught.value.__cause__ is stray[0]
    assert log == [1]


@kinds
async def test_ctrl_c_leaves_at_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[int] = []
    tasks = BackgroundTasks()
    tasks.add_task(fail, ValueError("earlier"))
    tasks.add_task(make(kind, fail), KeyboardInterrupt())
    never = tasks.add_task(postlude.task(always=True)(functools.partial(log.append)), 1)
    # Driven by hand, as an event loop would not survive it.
    with pytest.raises(KeyboardInterrupt):
        await tasks()
    assert log == []
    assert never.state is TaskState.CANCELLED
    assert "ValueError: earlier" in caplog.text
    assert "cut short by KeyboardInterrupt" in caplog.text


async def test_a_group_that_is_closed_ends_without_running_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log: list[int] = []

    @types.coroutine
    def suspend() -> Generator[None, None, None]:
        yield

    async def wait() -> None:
        await suspend()

    tasks = BackgroundTasks([BackgroundTask(wait), BackgroundTask(log.append, 1)])
    running = tasks()
    running.send(None)
    running.close()
    assert log == []
    assert [task.state for task in tasks.tasks if isinstance(task, BackgroundTask)] == [
        TaskState.CANCELLED
    ] * 2
    assert "cut short by GeneratorExit" in caplog.text


async def test_a_task_fails_that_can_get_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[int] = []
    run_sync = anyio.to_thread.run_sync

    async def refuse(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
    tasks = BackgroundTasks()
    failed = tasks.add_task(log.append, 1)
    tasks.add_task(log.append, 2)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await tasks()
    assert failed.state is TaskState.FAILED
    assert log == [2]
