"""What a task is, and how a group of tasks runs here and now."""

from __future__ import annotations

import enum
import inspect
import logging
import math
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime
from threading import Lock, get_ident, main_thread
from time import time
from types import FunctionType, coroutine
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeAlias, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import starlette.background
from typing_extensions import override

if TYPE_CHECKING:
    from starlette.responses import Response

from ._options import GENERATOR, call_fits, check_call, name_of, options_of

P = ParamSpec("P")
T = TypeVar("T")
Item: TypeAlias = starlette.background.BackgroundTask | Callable[[], Awaitable[Any]]
Failure: TypeAlias = tuple[Item, Exception]

logger = logging.getLogger("postlude")

_THREADS = 40
_TRIP_SECONDS = 0.005
_CHECK_SECONDS = 0.000_005
_limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar(
    "postlude_threads"
)
_MAIN_THREAD = main_thread().ident
_COROUTINE = inspect.CO_COROUTINE


class TaskState(enum.StrEnum):
    """Where a task stands.

    Example:
        .. code-block:: python

            from postlude import BackgroundTask, TaskState

            task = BackgroundTask(print, "hello")
            assert task.state is TaskState.PENDING
            assert task.state == "pending"

    .. versionadded:: 0.1.0
    """

    PENDING = "pending"
    """Added, not started."""
    RUNNING = "running"
    """Started, not finished."""
    SUCCEEDED = "succeeded"
    """Returned."""
    FAILED = "failed"
    """Raised; `BackgroundTask.exception` is what it raised."""
    CANCELLED = "cancelled"
    """Stopped or never started, because its request was cancelled or failed."""
    LOST = "lost"
    """Accepted, but not finished when the application had to stop."""


# Looking a member up on its enum costs as much as starting a task does.
_PENDING, _RUNNING, _SUCCEEDED, _FAILED, _CANCELLED, _LOST = TaskState


class BackgroundTask(starlette.background.BackgroundTask):
    """A callable that runs after the response, and the handle to watch it by.

    A drop-in for `starlette.background.BackgroundTask`: give it to a response as
    `background=`. An async callable is awaited; any other is called in a worker thread,
    and if it returns something awaitable, that is awaited. It runs in the context of
    the request, as in Starlette; made in a worker thread (a `def` endpoint), it runs in
    the context it was made in.

    Example:
        .. code-block:: python

            from starlette.requests import Request
            from starlette.responses import PlainTextResponse, Response

            from postlude import BackgroundTask


            async def homepage(request: Request) -> Response:
                task = BackgroundTask(print, "somebody came", flush=True)
                return PlainTextResponse("Welcome!", background=task)

    Args:
        func: What to call. `task` declares its options.
        *args: Positional arguments to call it with.
        **kwargs: Keyword arguments to call it with.

    Raises:
        TypeError: If `func` is not callable, is a generator function (calling it would
            run nothing), or cannot be called with these arguments.

    .. versionadded:: 0.1.0
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]  # type: ignore[assignment]
    kwargs: dict[str, Any]  # type: ignore[assignment]
    is_async: bool

    # These are set in the constructor, since defaults on the class would slow each run
    # down by a tenth; and read with a default for subclasses that have their own.
    _always: bool
    _context: Context | None
    _state: TaskState
    _started: float | None
    _finished: float | None
    _exception: Exception | None = None

    def __init__(
        self, func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        # The code of a plain function tells at once what Starlette is long to find.
        if type(func) is FunctionType and not func.__dict__:
            code = func.__code__
            flags = code.co_flags
            as_many = code.co_argcount == len(args) and not code.co_kwonlyargcount
            if flags & GENERATOR or not (
                (as_many and not kwargs) or call_fits(func, args, kwargs)
            ):
                check_call(func, args, kwargs)
            self.func = func
            self.args = args
            self.kwargs = kwargs
            self.is_async = flags & _COROUTINE != 0
            self._always = False
        else:
            check_call(func, args, kwargs)
            super().__init__(func, *args, **kwargs)
            self._always = options_of(func).always
        self._state = _PENDING
        self._started = None
        self._finished = None
        in_worker = get_ident() != _MAIN_THREAD and _in_worker_thread()
        self._context = copy_context() if in_worker else None

    @override
    async def __call__(self) -> None:
        """Runs the task here and now.

        Raises:
            Exception: What the task raised, with a note naming the task.
            RuntimeError: If the task raised something that is no `Exception`, say by
                calling `sys.exit()`, or a cancellation that nobody asked for; that is
                the cause.
        """
        if failures := await _run_in_order([self], itself=self):
            raise _combined(failures)

    @property
    def name(self) -> str:
        """What logs, notes and reports call the task.

        The dotted name of its function, such as `shop.receipts.send_receipt`, unless
        `task` has given it another.
        """
        return _name(self)

    @property
    def id(self) -> str:
        """A random UUID, made when it is first asked for."""
        import uuid  # noqa: PLC0415 - whoever asks for no id is spared it

        made: str = self.__dict__.setdefault("_id", str(uuid.uuid4()))
        return made

    @property
    def state(self) -> TaskState:
        """Where the task stands; in its latest run, if it runs more than once."""
        return getattr(self, "_state", _PENDING)

    @property
    def exception(self) -> Exception | None:
        """What the task failed with, or `None` unless its state is `FAILED`."""
        return self._exception if self.state is _FAILED else None

    @property
    def started_at(self) -> datetime | None:
        """When the task was started, in UTC, or `None` before that."""
        return _datetime(getattr(self, "_started", None))

    @property
    def finished_at(self) -> datetime | None:
        """When the task ended, in UTC, or `None` before that."""
        if self.state is _RUNNING:
            return None
        return _datetime(getattr(self, "_finished", None))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.state}>"


class BackgroundTasks(BackgroundTask):
    """A list of tasks that run after the response, each whatever its siblings do.

    A drop-in for `starlette.background.BackgroundTasks`, which stops at the first
    failure. Here the others run all the same, and then one failure is raised as itself,
    several as an `ExceptionGroup`. Consecutive tasks for worker threads share the trip
    to one, in order and each in a context of its own. Stock tasks and other groups may
    be among the tasks; the group itself may be used wherever one task is expected.

    Example:
        .. code-block:: python

            from starlette.requests import Request
            from starlette.responses import PlainTextResponse, Response

            from postlude import BackgroundTasks


            async def order(request: Request) -> Response:
                tasks = BackgroundTasks()
                tasks.add_task(print, "send the receipt")
                tasks.add_task(print, "update the stock", flush=True)
                return PlainTextResponse("Thank you!", background=tasks)

    Args:
        tasks: What to start with: tasks, or async callables that take no arguments.
        concurrency: How many tasks may run at once. With 1 they run one after the
            other, in the order added; a running task may add more.

    Raises:
        TypeError: If `tasks` holds something else, or `concurrency` is not an int.
        ValueError: If `concurrency` is less than 1.

    .. versionadded:: 0.1.0
    """

    # What makes the group a usable task: middlewares re-add a response's background as
    # `tasks.add_task(background.func, *background.args, **background.kwargs)`.
    args: tuple[Any, ...] = ()
    is_async: bool = True

    _runs: tuple[_ConcurrentRun, ...] = ()

    def __init__(
        self, tasks: Iterable[Item] | None = None, *, concurrency: int = 1
    ) -> None:
        if not isinstance(concurrency, int):
            raise TypeError(f"concurrency must be an int, not {concurrency!r}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency!r}")
        self.tasks: list[Item] = [] if tasks is None else [*map(_checked, tasks)]
        self._concurrency = concurrency
        self._state = _PENDING

    @property
    @override
    def func(self) -> Callable[[], Awaitable[None]]:  # type: ignore[override]
        """The group itself, as calling it runs the tasks."""
        return self

    @property
    @override
    def kwargs(self) -> dict[str, Any]:  # type: ignore[override]
        """Nothing, as the group is called without arguments."""
        return {}

    def add_task(
        self, func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> BackgroundTask:
        """Adds a call to run after the response.

        Args:
            func: What to call, sync or async.
            *args: Positional arguments to call it with.
            **kwargs: Keyword arguments to call it with.

        Returns:
            The task, whose state can be watched.

        Raises:
            TypeError: If `func` is not callable, is a generator function, or cannot be
                called with these arguments.
        """
        task = BackgroundTask(func, *args, **kwargs)
        self.tasks.append(task)
        if self._runs:
            for run in self._runs:
                run.wake()
        return task

    @override
    async def __call__(self) -> None:
        """Runs all tasks here and now.

        Raises:
            Exception: What the only failing task raised, with a note naming the task.
            ExceptionGroup: If several tasks failed, with what each of them raised.
        """
        if (responses := sending.get()) and responses[0].background is self:
            responses.clear()
        self._state = _RUNNING
        try:
            if self._concurrency == 1:
                failures = await _run_in_order(self.tasks)
            else:
                failures = await self._complete_concurrently()
        except BaseException:
            self._state = _CANCELLED
            raise
        if failures:
            self._state = _FAILED
            self._exception = _combined(failures)
            raise self._exception
        self._state = _SUCCEEDED

    @property
    @override
    def started_at(self) -> datetime | None:
        """When the first of the tasks was started, in UTC, or `None` before that."""
        return min(self._times("started_at"), default=None)

    @property
    @override
    def finished_at(self) -> datetime | None:
        """When the last of the tasks ended, in UTC, or `None` before that."""
        if self._state in (_PENDING, _RUNNING):
            return None
        return max(self._times("finished_at"), default=None)

    def _times(self, which: str) -> list[datetime]:
        found = (getattr(task, which, None) for task in self.tasks)
        return [at for at in found if isinstance(at, datetime)]

    async def _complete_concurrently(self) -> list[Failure]:
        run = _ConcurrentRun(self.tasks, self._concurrency)
        self._runs += (run,)
        try:
            return await run.complete()
        finally:
            self._runs = tuple(other for other in self._runs if other is not run)

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> NoReturn:
        # FastAPI asks this of a parameter that it does not know how to fill.
        raise TypeError(
            "FastAPI cannot inject postlude.BackgroundTasks: "
            "import BackgroundTasks from postlude.fastapi"
        )


# The response on its way out, which its background takes from the list as it starts.
sending: ContextVar[list[Response] | None] = ContextVar(
    "postlude_sending", default=None
)


async def cut_short(
    items: list[Item],
    cause: BaseException | None,
    level: int,
    *,
    unfinished: Iterable[str] = (),
    trip: _Trip | None = None,
) -> None:
    """Deals with tasks whose turn will not come, and names them in one log record.

    Those declared `always=True` run, shielded from cancellation; their failures are
    logged. After Ctrl+C nothing more is run.

    Args:
        items: The tasks, and groups of them.
        cause: What is on its way out, or `None` if another response has been sent.
        level: The level of the log record.
        unfinished: What the log record names first.
        trip: What may still be under way and is to end before anything is run.
    """
    interrupted = cause is not None and any(map(_is_interrupt, _parts(cause)))
    always: list[Item] = []
    named = [*unfinished]
    for item in items:
        if isinstance(item, BackgroundTasks):
            item._state = _CANCELLED
    for task in _singles(items):
        if getattr(task, "_always", False) and not interrupted:
            always.append(task)
            continue
        if isinstance(task, BackgroundTask):
            task._state = _CANCELLED
        named.append(f"{_name(task)!r} (not started)")
    # Said before they run, in case the process is not given the time for it.
    named += [f"{_name(task)!r} (runs all the same)" for task in always]
    if named:
        by = "another response" if cause is None else type(cause).__name__
        logger.log(level, "background tasks cut short by %s: %s", by, ", ".join(named))
    if always:
        with anyio.CancelScope(shield=True):
            if trip is not None:
                await trip.end()
            for failure in await _run_in_order(always):
                _log_failure(*failure)


async def _run_in_order(tasks: list[Item], itself: Any = None) -> list[Failure]:
    """Runs tasks one after the other and returns what failed.

    Only a cancellation or an interrupt leaves, after a report of what is unfinished.

    Args:
        tasks: What to run; it may grow meanwhile.
        itself: The one that is to be run by its function, whatever class it has.
    """
    failures: list[Failure] = []
    position = 0
    task: Any = None
    trip: _Trip | None = None
    now = time()
    try:
        while position < len(tasks):
            task = tasks[position]
            if type(task) is not BackgroundTask and task is not itself:
                position += 1
                try:
                    await task()
                except BaseException as exc:
                    failures.append(_failure(task, exc, _is_cancellation))
                now = time()
            elif task.is_async:
                position += 1
                task._state = _RUNNING
                task._started = now
                try:
                    if task._context is None and not task._always:
                        await task.func(*task.args, **task.kwargs)
                    else:
                        await _await(task, _call(task), task._context)
                except BaseException as exc:
                    failures.append(_failure(task, exc, _is_cancellation))
                else:
                    task._state = _SUCCEEDED
                # The next task starts as this one ends.
                task._finished = now = time()
            else:
                trip = _Trip(tasks, position, itself)
                await trip.make()
                failures += trip.failures
                position = trip.position
                trip = None
                now = time()
    except BaseException as exc:
        if trip is None:
            # A group has named its own.
            named = isinstance(task, BackgroundTasks)
            unfinished = [] if named else [f"{_name(task)!r} (stopped)"]
        else:
            unfinished = trip.abandon()
            failures += trip.failures
            position = trip.position
        await _break_off(exc, failures, tasks[position:], unfinished, trip)
        raise
    return failures


class _Trip:
    """One trip to a worker thread, for as many tasks in a row as it can take along.

    The event loop may go away while the thread works: asyncio's own cancellation does
    not wait for threads. What both touch is under the lock, and the abandoned thread
    starts nothing more and reports its last task itself.
    """

    __slots__ = (
        "_abandoned",
        "_itself",
        "_lock",
        "_task",
        "_tasks",
        "_unawaited",
        "_working",
        "failures",
        "position",
    )

    def __init__(self, tasks: list[Item], position: int, itself: Any) -> None:
        self.position = position
        self.failures: list[Failure] = []
        self._tasks = tasks
        self._itself = itself
        self._lock = Lock()
        self._working = Lock()
        self._abandoned = False
        self._task: BackgroundTask | None = None
        self._unawaited: tuple[Context, Awaitable[Any]] | None = None

    async def make(self) -> None:
        """Runs at least one task, and those after it that share the trip."""
        try:
            await anyio.to_thread.run_sync(self._work, limiter=_worker_threads())
        except Exception as exc:
            # For want of a thread nothing ran, and that is how the next task failed.
            task = self._tasks[self.position]
            self.position += 1
            self.failures.append(_failure(task, exc, _is_cancellation))
        if self._task is not None and self._unawaited is not None:
            context, result = self._unawaited
            self._unawaited = None
            try:
                await _await(self._task, result, context)
            except BaseException as exc:
                self.failures.append(_failure(self._task, exc, _is_cancellation))
            else:
                self._task._state = _SUCCEEDED
            self._task._finished = time()

    def abandon(self) -> list[str]:
        """Keeps the thread from starting more tasks; returns what is unfinished."""
        with self._lock:
            self._abandoned = True
        task = self._task
        if task is None:
            return []
        if self._unawaited is not None:
            _drop(task, self._unawaited[1])
        if task._state is _CANCELLED:
            return [f"{task.name!r} (stopped)"]
        if task._state is _RUNNING:
            return [f"{task.name!r} (its thread goes on)"]
        return []

    async def end(self) -> None:
        """Waits for the thread, if it has begun to work."""
        if self._task is not None:
            await anyio.to_thread.run_sync(self._working.acquire)

    def _work(self) -> None:
        with self._working:
            self._run_tasks()

    def _run_tasks(self) -> None:  # noqa: PLR0912 - a call more is what a short task costs
        tasks, itself, lock = self._tasks, self._itself, self._lock
        began = check_at = now = time()
        position = self.position
        # As `with lock`, which for a short task would be a tenth of the costs.
        acquire, release = lock.acquire, lock.release
        while True:
            if position >= len(tasks):
                return
            task: Any = tasks[position]
            if (
                type(task) is not BackgroundTask and task is not itself
            ) or task.is_async:
                return
            position += 1
            acquire()
            if self._abandoned:
                release()
                return
            self.position = position
            self._task = task
            task._state = _RUNNING
            release()
            task._started = now
            context = copy_context() if task._context is None else task._context.copy()
            try:
                if task.kwargs:
                    result = context.run(task.func, *task.args, **task.kwargs)
                else:
                    result = context.run(task.func, *task.args)
            except BaseException as exc:
                failure = _failure(task, exc, _is_cancellation_in_thread)
                with lock:
                    abandoned = self._abandoned
                    if not abandoned:
                        self.failures.append(failure)
                if abandoned:
                    _log_failure(*failure)
            else:
                if result is not None and inspect.isawaitable(result):
                    with lock:
                        abandoned = self._abandoned
                        if not abandoned:
                            self._unawaited = context, result
                    if abandoned:
                        _drop(task, result)
                    return
                task._state = _SUCCEEDED
            task._finished = now = time()
            if began <= now < check_at:
                continue
            # A clock that has been set back ends the trip as well.
            if not began <= now < began + _TRIP_SECONDS:
                return
            # For anyio's cancellations, of which the flag does not tell. To look each
            # time would take longer than a short task.
            check_at = now + _CHECK_SECONDS
            if position < len(tasks):
                anyio.from_thread.check_cancelled()


class _ConcurrentRun:
    """Runs tasks, several at once."""

    def __init__(self, tasks: list[Item], limit: int) -> None:
        self._tasks = tasks
        self._limit = limit
        self._running = 0
        self._failures: list[Failure] = []
        self._changed = anyio.Event()
        self._thread = get_ident()

    async def complete(self) -> list[Failure]:
        """Runs all tasks and returns what failed, as `_run_in_order` does."""
        position = 0
        try:
            async with anyio.create_task_group() as group:
                while True:
                    while self._running < self._limit and position < len(self._tasks):
                        group.start_soon(self._run_one, self._tasks[position])
                        self._running += 1
                        position += 1
                    if not self._running:
                        break
                    await self._changed.wait()
                    self._changed = anyio.Event()
        except BaseException as exc:
            await _break_off(exc, self._failures, self._tasks[position:])
            raise
        return self._failures

    async def _run_one(self, task: Item) -> None:
        self._failures += await _run_in_order([task])
        self._running -= 1
        self._changed.set()

    def wake(self) -> None:
        """Makes the run look for added tasks; from any thread."""
        if get_ident() == self._thread:
            self._changed.set()
        else:
            # In a thread that is none of anyio's, the end of a task makes it look.
            with suppress(RuntimeError):
                anyio.from_thread.run_sync(self.wake)


async def _break_off(
    exc: BaseException,
    failures: list[Failure],
    rest: list[Item],
    unfinished: Iterable[str] = (),
    trip: _Trip | None = None,
) -> None:
    """Tells what failed before a run was broken off, and what did not finish."""
    for failure in failures:
        _log_failure(*failure)
    await cut_short(rest, exc, logging.WARNING, unfinished=unfinished, trip=trip)


def _checked(item: Item) -> Item:
    if isinstance(item, starlette.background.BackgroundTask):
        return item
    if not BackgroundTask(item).is_async:
        raise TypeError(f"{item!r} is not a task; write BackgroundTask(func, ...)")
    return item


def _in_worker_thread() -> bool:
    try:
        anyio.from_thread.check_cancelled()
    except RuntimeError:
        return False
    except BaseException:  # noqa: S110 - cancelled, and so in a worker thread
        pass
    return True


def _worker_threads() -> anyio.CapacityLimiter:
    """Returns the running event loop's limit of threads that tasks may hold at once."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
        return limiter


async def _call(task: BackgroundTask) -> None:
    await task.func(*task.args, **task.kwargs)


async def _await(
    task: BackgroundTask, awaitable: Awaitable[Any], context: Context | None
) -> None:
    """Awaits a task that is in need of a context, of a shield, or of both."""

    async def run() -> None:
        await awaitable

    with anyio.CancelScope(shield=task._always):
        if context is None:
            await awaitable
        else:
            await _in_context(context.copy(), run())


@coroutine
def _in_context(
    context: Context, call: Coroutine[Any, Any, T]
) -> Generator[Any, Any, T]:
    """Awaits a coroutine, with each of its steps run in a context."""
    step: Callable[[Any], Any] = call.send
    value: Any = None
    while True:
        try:
            yielded = context.run(step, value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        try:
            value = yield yielded
            step = call.send
        except GeneratorExit:
            context.run(call.close)
            raise
        except BaseException as exc:
            value = exc
            step = call.throw


def _parts(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for part in cast("BaseExceptionGroup[BaseException]", exc).exceptions:
            yield from _parts(part)
    else:
        yield exc


def _is_interrupt(exc: BaseException) -> bool:
    """Whether this ends everything: Ctrl+C, or a coroutine that is being closed."""
    return isinstance(exc, KeyboardInterrupt | GeneratorExit)


def _is_cancellation(exc: BaseException) -> bool:
    """Whether this is the cancellation that somebody asked for; on the event loop."""
    if not isinstance(exc, anyio.get_cancelled_exc_class()):
        return False
    if anyio.current_effective_deadline() == -math.inf:
        return True
    import asyncio  # noqa: PLC0415 - nobody who runs on Trio needs it

    try:
        current = asyncio.current_task()
    except RuntimeError:
        return False
    return current is not None and current.cancelling() > 0


def _is_cancellation_in_thread(exc: BaseException) -> bool:
    """Whether this is the cancellation that somebody asked for; in a worker thread."""
    try:
        anyio.from_thread.check_cancelled()
    except BaseException as cancellation:
        return isinstance(exc, type(cancellation))
    return False


def _failure(
    task: Item, exc: BaseException, is_cancellation: Callable[[BaseException], bool]
) -> Failure:
    """Books what a task raised as its failure, unless that is to leave the run.

    The failure has a note that names the task.
    """
    if not isinstance(exc, Exception) and any(
        _is_interrupt(part) or is_cancellation(part) for part in _parts(exc)
    ):
        if isinstance(task, BackgroundTask):
            task._state = _CANCELLED
        raise exc
    name = _name(task)
    if isinstance(exc, Exception):
        failure = exc
    else:
        failure = RuntimeError(f"background task {name!r} raised {type(exc).__name__}")
        failure.__cause__ = exc
    if isinstance(task, BackgroundTask):
        task._state = _FAILED
        task._exception = failure
    # A group has named its own tasks; and some exceptions refuse notes.
    if not isinstance(task, BackgroundTasks):
        note = f"in background task {name!r}"
        with suppress(Exception):
            if note not in getattr(failure, "__notes__", ()):
                failure.add_note(note)
    return task, failure


def _combined(failures: list[Failure]) -> Exception:
    if len(failures) == 1:
        return failures[0][1]
    # Not every server logs what is in a group, nor notes.
    names = ", ".join(repr(_name(task)) for task, _ in failures)
    return ExceptionGroup(
        f"{len(failures)} background tasks failed: {names}",
        [failure for _, failure in failures],
    )


def _log_failure(task: Item, failure: Exception) -> None:
    extra = {"task_name": _name(task)}
    if isinstance(task, BackgroundTask):
        extra["task_id"] = task.id
    logger.error(
        "background task %r failed", extra["task_name"], exc_info=failure, extra=extra
    )


def _drop(task: BackgroundTask, result: Awaitable[Any]) -> None:
    """Gives up what a sync task returned and nobody is left to await."""
    task._state = _CANCELLED
    if inspect.iscoroutine(result):
        result.close()
    logger.warning(
        "background task %r cut short: its request was cancelled before what it "
        "returned could be awaited",
        task.name,
    )


def _name(task: Item) -> str:
    return name_of(getattr(task, "func", task))


def _singles(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the single tasks that items are or hold, as groups do."""
    for item in items:
        if isinstance(item, BackgroundTasks | starlette.background.BackgroundTasks):
            yield from _singles(item.tasks)
        elif isinstance(func := getattr(item, "func", None), BackgroundTasks):
            yield from _singles([func])
        else:
            yield item


def _datetime(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
