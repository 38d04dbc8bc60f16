"""For tests: record tasks instead of running them, see failures, wait for tasks.

What tests switch on here concerns the whole process, as the app may run in another
thread, such as that of Starlette's `TestClient`. It works with and without the
middleware, whose failures a test would find in the log only.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock
from time import monotonic
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from starlette.background import BackgroundTask as StockTask
from typing_extensions import override

from . import _tasks, middleware
from ._options import in_event_loop
from ._supervisor import (
    NOTHING,
    Job,
    Settings,
    Supervisor,
    _handle,
    _set_state,
    _singles,
    live,
)
from ._tasks import (
    BackgroundTask,
    BackgroundTasks,
    Failure,
    TaskState,
    _combined,
    _in_context,
    _name,
    _run_in_order,
    cut_short,
    home,
)

__all__ = [
    "CapturedTasks",
    "call",
    "capture_tasks",
    "raise_failures",
    "wait_for_tasks",
    "wait_for_tasks_sync",
]

P = ParamSpec("P")
T = TypeVar("T")

# How long to wait for a job at a time, should its end have come meanwhile.
_WAIT_SECONDS = 0.05


@dataclass(init=False, repr=False)
class call:  # noqa: N801 - it reads as the call that it stands for
    """A call, to compare with those that were captured.

    Two are equal if function and arguments are. What a `functools.partial` holds counts
    as given. In a failing assertion it reads `send_receipt(42)`.

    Example:
        .. code-block:: python

            from unittest.mock import ANY

            from postlude.testing import call

            assert call(print, 42, end="") == call(print, ANY, end="")
            assert repr(call(print, 42, end="")) == "print(42, end='')"

    Args:
        func: What is called.
        *args: Positional arguments it is called with.
        **kwargs: Keyword arguments it is called with.

    .. versionadded:: 0.1.0
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(
        self, func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        called: Any = func
        self.args, self.kwargs = args, kwargs
        while isinstance(called, partial):
            self.args = called.args + self.args
            self.kwargs = called.keywords | self.kwargs
            called = called.func
        self.func = called

    @override
    def __repr__(self) -> str:
        name = getattr(self.func, "__qualname__", None) or repr(self.func)
        named = (f"{key}={value!r}" for key, value in self.kwargs.items())
        arguments = ", ".join([*map(repr, self.args), *named])
        return f"{name.rpartition('<locals>.')[2]}({arguments})"


class CapturedTasks(list[call]):
    """What `capture_tasks` has recorded: the calls, in the order they would be made.

    Example:
        .. code-block:: python

            from postlude.testing import CapturedTasks, call


            def test_an_order_is_confirmed(captured_tasks: CapturedTasks) -> None:
                print("order something here")
                assert captured_tasks == [call(print, "ordered")]
                captured_tasks.run_sync()

    .. versionadded:: 0.1.0
    """

    tasks: list[BackgroundTask]
    """The handles, one a call, `PENDING` until run.

    Those that `add_task()` has returned, and those of what `enqueue()` has been given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks = []
        # What is to be awaited to run them, and the event loop that they are from.
        self._runs: list[Callable[[], Awaitable[list[Failure]]]] = []
        self._loop: Any = None

    @override
    def clear(self) -> None:
        """Forgets all calls, also those that have not been run."""
        super().clear()
        self.tasks.clear()
        self._runs.clear()

    def run(self) -> Coroutine[Any, Any, None]:
        """Runs what has not been run yet, in order, and what that adds.

        It runs as it would have, in its own context and with the observers of the
        middleware. The calls stay in the list. To be awaited, in an async test.

        Raises:
            Exception: What the only failing task raised, with a note naming the task.
            ExceptionGroup: If several tasks failed, with what each of them raised.
            RuntimeError: If no event loop is running here: call `run_sync`.
        """
        if not in_event_loop():
            raise RuntimeError("run() is to be awaited: in a sync test, use run_sync()")
        return self._run()

    def run_sync(self) -> None:
        """Does what `run` does, in a sync test.

        The tasks run in the event loop they are from if that is still there, as in
        `with TestClient(app)`, where they find what belongs to it; if not, in a new one
        of the same kind.

        Raises:
            Exception: What the only failing task raised, with a note naming the task.
            ExceptionGroup: If several tasks failed, with what each of them raised.
            RuntimeError: If an event loop is running here: await `run`.
        """
        if in_event_loop():
            raise RuntimeError("run_sync() is for sync tests: await run() instead")
        loop = self._loop
        if loop is None or isinstance(loop, asyncio.AbstractEventLoop):
            if loop is None or not loop.is_running():
                anyio.run(self._run)
            else:
                asyncio.run_coroutine_threadsafe(self._run(), loop).result()
        else:
            import trio  # noqa: PLC0415 - only who runs on Trio needs it

            try:
                trio.from_thread.run(self._run, trio_token=loop)
            except trio.RunFinishedError:
                anyio.run(self._run, backend="trio")

    async def _run(self) -> None:
        runs, self._runs = self._runs, []
        # What runs captures nothing.
        with _innermost(_captures, None), _heard() as failures:
            for run in runs:
                failures.extend(await run())
        if failures:
            raise _combined(failures)

    def _record(
        self,
        tasks: list[StockTask],
        handles: Iterable[BackgroundTask],
        run: Callable[[], Awaitable[list[Failure]]] | None,
    ) -> None:
        """Records tasks, and how to run them unless that is known."""
        # A group that has been called has ended for those who would add to it.
        _set_state(tasks, TaskState.CANCELLED)
        for task in handles:
            task._state = TaskState.PENDING
            self.tasks.append(task)
            self.append(call(task.func, *task.args, **task.kwargs))
        if run is not None:
            self._runs.append(run)
            self._loop = _event_loop()

    def _keep(self, task: StockTask) -> bool:
        """Records what is called with no middleware to take it over."""
        # What a task calls is part of that task, which was running before.
        if isinstance(home.get(), Job):
            return False
        context = copy_context()

        def run() -> Awaitable[list[Failure]]:
            if isinstance(task, BackgroundTasks):
                steps = task._complete()
            else:
                direct = task if isinstance(task, BackgroundTask) else None
                steps = _run_in_order([task], direct)
            return _in_context(context.copy(), steps)

        listed = task.tasks if isinstance(task, BackgroundTasks) else [task]
        self._record([task], map(_handle, _singles(listed)), run)
        return True


class _CapturedJob(Job):
    """The tasks of a request in the middleware, which nobody runs."""

    def __init__(
        self,
        capture: CapturedTasks,
        tasks: list[StockTask],
        request: dict[str, str],
        settings: Settings,
        supervisor: Supervisor | None,
    ) -> None:
        super().__init__(tasks, request, settings, None)
        self._capture = capture
        self._called_in = copy_context()
        self._is_captured = False
        # What belongs to its request is captured only when that comes to run it.
        self._belongs_to_request = supervisor is None
        if supervisor is not None:
            self._be_captured()

    def _be_captured(self) -> None:
        if not self._is_captured:
            self._is_captured = True
            tasks = self._tasks
            self._capture._record(tasks, self._singles(tasks), self._run_captured)

    async def _run_captured(self) -> list[Failure]:
        self._is_captured = False
        await _in_context(self._called_in.copy(), self._run_here())
        # The test hears of them as they are logged.
        return []

    @override
    def extend(self, tasks: list[StockTask]) -> bool:
        if self._is_captured and self._belongs_to_request:
            # It would have ended by now.
            return False
        is_extended = super().extend(tasks)
        if is_extended and self._is_captured:
            self._capture._record(tasks, self._singles(tasks), None)
        return is_extended

    @override
    def complete(self) -> Awaitable[None]:
        self._be_captured()
        return NOTHING

    @override
    async def leave(self, cause: BaseException) -> None:
        if isinstance(cause, Exception) or not self._belongs_to_request:
            self._be_captured()
        else:
            rest = _CapturedJob(
                self._capture, [], self.request, self._settings, self._supervisor
            )
            rest._belongs_to_request = False
            rest._be_captured()
            await cut_short(self._tasks, cause, logging.WARNING, here=rest)


@contextmanager
def capture_tasks() -> Generator[CapturedTasks]:
    """Records tasks, wherever they come from, instead of running them.

    It records what would have been run: the background of a response that was sent,
    the tasks added by `add_task()` unless the response was an error. They stay
    `PENDING` until `CapturedTasks.run`. Of nested captures the innermost records.

    Tasks that have an engine are checked as ever, and not handed over, so that it need
    not be open. What `enqueue()` is given is recorded at once; it returns a receipt
    whose engine is `captured`, and whose id is that of the handle.

    Tasks of Starlette's own class run, unless they are in a group of postlude's.

    Example:
        .. code-block:: python

            from starlette.applications import Starlette
            from starlette.requests import Request
            from starlette.responses import PlainTextResponse
            from starlette.routing import Route
            from starlette.testclient import TestClient

            from postlude import BackgroundTask
            from postlude.testing import call, capture_tasks


            def send_receipt(order: int) -> None:
                raise ConnectionError("not in a test")


            async def order(request: Request) -> PlainTextResponse:
                task = BackgroundTask(send_receipt, 42)
                return PlainTextResponse("Thank you!", background=task)


            app = Starlette(routes=[Route("/", order)])

            with capture_tasks() as captured:
                TestClient(app).get("/")
            assert captured == [call(send_receipt, 42)]

    .. versionadded:: 0.1.0
    """
    captured = CapturedTasks()
    with _innermost(_captures, captured):
        yield captured


@contextmanager
def raise_failures() -> Generator[None]:
    """Raises at its end the failures of tasks that the middleware only logs.

    They are logged all the same. The test has to wait for the tasks before: put this
    around `with TestClient(app)`, or call `wait_for_tasks` within. If it is left by an
    exception, that gets a note of each failure instead.

    Example:
        .. code-block:: python

            from starlette.applications import Starlette
            from starlette.requests import Request
            from starlette.responses import PlainTextResponse
            from starlette.routing import Route
            from starlette.testclient import TestClient

            from postlude import BackgroundTasksMiddleware, add_task
            from postlude.testing import raise_failures


            def send_receipt(order: int) -> None:
                raise ConnectionError("nobody answers")


            async def order(request: Request) -> PlainTextResponse:
                add_task(send_receipt, 42)
                return PlainTextResponse("Thank you!")


            app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", order)]))

            try:
                with raise_failures(), TestClient(app) as client:
                    client.get("/")
            except ConnectionError as error:
                print(error)

    Raises:
        Exception: What the only failing task raised, with a note naming the task.
        ExceptionGroup: If several tasks failed, with what each of them raised.

    .. versionadded:: 0.1.0
    """
    with _heard() as failures:
        try:
            yield
        except BaseException as exc:
            for task, failure in failures:
                exc.add_note(f"background task {_name(task)!r} failed: {failure!r}")
            raise
    if failures:
        raise _combined(failures)


def wait_for_tasks(timeout: float | None = 10) -> Coroutine[Any, Any, None]:
    """Waits until no task of any app in the middleware is left; to be awaited.

    Only with `detach=True` and a running lifespan is there something to wait for: else
    clients such as `TestClient` and httpx's `ASGITransport` wait by themselves.

    Example:
        .. code-block:: python

            from postlude.testing import wait_for_tasks


            async def test_an_order_is_confirmed() -> None:
                print("order something here")
                await wait_for_tasks()

    Args:
        timeout: How long, in seconds; `None` for no limit.

    Raises:
        RuntimeError: If no event loop is running here: call `wait_for_tasks_sync`.
        TimeoutError: If there are tasks left, which it names.

    .. versionadded:: 0.1.0
    """
    if not in_event_loop():
        raise RuntimeError(
            "wait_for_tasks() is to be awaited: in a sync test, use "
            "wait_for_tasks_sync()"
        )
    # The event loop goes on meanwhile, and no thread is missed by anybody.
    return anyio.to_thread.run_sync(
        _wait, timeout, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
    )


def wait_for_tasks_sync(timeout: float | None = 10) -> None:
    """Does what `wait_for_tasks` does, in a sync test.

    Args:
        timeout: How long, in seconds; `None` for no limit.

    Raises:
        RuntimeError: If an event loop is running here: await `wait_for_tasks`.
        TimeoutError: If there are tasks left, which it names.

    .. versionadded:: 0.1.0
    """
    if in_event_loop():
        raise RuntimeError(
            "wait_for_tasks_sync() is for sync tests: await wait_for_tasks() instead"
        )
    _wait(timeout)


def _wait(timeout: float | None) -> None:
    end = math.inf if timeout is None else monotonic() + timeout
    while jobs := _jobs():
        left = end - monotonic()
        if left <= 0:
            names = ", ".join(
                f"{task.name!r} ({where})"
                for job in jobs
                for task, where in job.outstanding()
            )
            raise TimeoutError(f"background tasks not ended in {timeout} s: {names}")
        ended = Event()
        jobs[0]._waiters += (ended.set,)
        ended.wait(min(left, _WAIT_SECONDS))


def _jobs() -> list[Job]:
    """Lists the jobs of all supervisors; from any thread."""
    supervisors = [ref() for ref in live.copy()]
    return [job for each in supervisors if each is not None for job in each.jobs()]


# Those that are active in the process, the innermost last.
_captures: dict[object, CapturedTasks | None] = {}
_hearers: dict[object, list[Failure]] = {}
_lock = Lock()


@contextmanager
def _innermost(active: dict[object, T], entry: T) -> Generator[None]:
    """Makes an entry the innermost one for a while."""
    key = object()
    with _lock:
        active[key] = entry
        _install()
    try:
        yield
    finally:
        with _lock:
            del active[key]
            _install()


@contextmanager
def _heard() -> Generator[list[Failure]]:
    """Lists the failures that are logged meanwhile."""
    failures: list[Failure] = []
    with _innermost(_hearers, failures):
        yield failures


def _install() -> None:
    """Lets postlude know of the innermost entries."""
    capture = next(reversed(_captures.values()), None)
    failures = next(reversed(_hearers.values()), None)
    _tasks.keep = None if capture is None else capture._keep
    middleware.job_class = Job if capture is None else partial(_CapturedJob, capture)
    _tasks.hear = None if failures is None else failures.extend


def _event_loop() -> Any:
    """Returns the running event loop of asyncio's, or what Trio knows its own by."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        import trio  # noqa: PLC0415 - likewise

        return trio.lowlevel.current_trio_token()
