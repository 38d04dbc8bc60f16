"""What a task is, and how a group of tasks runs here and now."""

from __future__ import annotations

import asyncio
import enum
import inspect
import logging
import math
import traceback
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime
from threading import Lock, get_ident, main_thread
from time import time
from types import FunctionType, coroutine
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
)

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import starlette.background
from starlette.background import BackgroundTask as StockTask
from starlette.background import BackgroundTasks as StockTasks
from typing_extensions import override

from ._limits import Call
from ._options import (
    GENERATOR,
    Options,
    Receipt,
    call_fits,
    check_call,
    check_foreign,
    check_outermost,
    handing_over,
    limiter_here,
    name_of,
    options_of,
    run_options_of,
)

if TYPE_CHECKING:
    from starlette.responses import Response

P = ParamSpec("P")
T = TypeVar("T")
Failure: TypeAlias = tuple[StockTask, Exception]

logger = logging.getLogger("postlude")

# How many threads the tasks of one event loop may hold at once.
_THREADS = 40
_limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar(
    "postlude_threads"
)
# Calls that have been given up, but whose threads go on.
_left_behind: set[Call] = set()
# How long tasks may share a thread before others have their turn, and how often they
# look for a cancellation meanwhile: to look takes longer than a short task.
_TRIP_SECONDS = 0.005
_CHECK_SECONDS = 0.000_05
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
    """Returned; or handed over, if the function has an engine."""
    FAILED = "failed"
    """Raised; `BackgroundTask.exception` is what it raised."""
    CANCELLED = "cancelled"
    """Stopped or never started, because its request was cancelled or failed."""
    LOST = "lost"
    """Accepted, but not finished when the application stopped."""


# Looking a member up on its enum costs as much as starting a task does.
_PENDING, _RUNNING, _SUCCEEDED, _FAILED, _CANCELLED, _LOST = TaskState

# By this a response that is being sent hears whether its background has been started:
# the list holds the response, and is empty from then on.
unstarted: ContextVar[list[Response] | None] = ContextVar(
    "postlude_unstarted", default=None
)


class Home(Protocol):
    """What tasks belong to where they are made: a request, or the job they are part of.

    Only `BackgroundTasksMiddleware` makes one.
    """

    @property
    def is_open(self) -> bool:
        """Whether tasks may still be added."""
        ...

    def take(self, task: BackgroundTask) -> Awaitable[object] | None:
        """Takes over a task that is called, unless that is to run here and now.

        Returns what its caller has to wait for.
        """

    def add(self, task: StockTask) -> None:
        """Runs a task after those that are there already."""

    def adopt(self, task: BackgroundTask) -> bool:
        """Takes over what a response that was cut short has not called any more.

        Returns whether it did: only if the response has been sent all the same.
        """
        ...


# By this a test keeps what is called from running; it returns whether it does.
keep: Callable[[StockTask], bool] | None = None

# By this a test hears of failures that are logged, as they cannot be raised.
hear: Callable[[list[Failure]], None] | None = None

# A context that knows of one belongs to a request, and so tasks are to run in a copy.
home: ContextVar[Home | None] = ContextVar("postlude_home", default=None)


class BackgroundTask(StockTask):
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
            run nothing), or the task object of another library, or cannot be called
            with these arguments, or not handed over with them to its engine.

    .. versionadded:: 0.1.0
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]  # type: ignore[assignment]
    kwargs: dict[str, Any]  # type: ignore[assignment]
    is_async: bool

    # Set by the constructor: defaults on the class would slow each run by a tenth.
    # None unless they matter to how the task runs.
    _options: Options | None
    _pickled: bytes | None = None
    _submit: Callable[[], Awaitable[Receipt]] | None = None
    _receipt: Receipt | None = None
    _context: Context | None
    _state: TaskState
    _started: float | None
    _finished: float | None
    _exception: Exception | None = None

    def __init__(
        self, func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        # The code of a plain function tells at once what takes Starlette long to find.
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
            self._options = None
        else:
            check_foreign(func)
            check_call(func, args, kwargs)
            super().__init__(func, *args, **kwargs)
            self._options = options = run_options_of(func)
            if options is not None and options.engine is not None:
                self._submit = handing_over(func, args, kwargs)
            elif options is not None and options.process:
                self._pickled = _pickle(func, args, kwargs)
        self._state = _PENDING
        self._started = None
        self._finished = None
        has_context = home.get() is not None or (
            get_ident() != _MAIN_THREAD and _in_worker_thread()
        )
        self._context = copy_context() if has_context else None

    @override
    async def __call__(self) -> None:
        """Runs the task here and now.

        Raises:
            Exception: What the task raised, with a note naming the task.
            RuntimeError: If the task raised something that is no `Exception`, say by
                calling `sys.exit()`, or a cancellation that nobody asked for; that is
                the cause.
        """
        if "_options" not in vars(self):
            _prepare(self)
        if (here := home.get()) and (taken := here.take(self)) is not None:
            await taken
            return
        if keep is not None and keep(self):
            return
        if failures := await _run_in_order([self], direct=self):
            raise _combined(failures)

    @property
    def name(self) -> str:
        """What logs and notes call the task.

        The dotted name of its function, such as `shop.receipts.send_receipt`, unless
        `task` has given it another.
        """
        return _name(self)

    @property
    def id(self) -> str:
        """A random UUID, made when it is first asked for."""
        if "_id" not in vars(self):
            import uuid  # noqa: PLC0415 - whoever asks for no id is spared it

            # Another thread may have been asked for it meanwhile.
            vars(self).setdefault("_id", str(uuid.uuid4()))
        made: str = vars(self)["_id"]
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
    def receipt(self) -> Receipt | None:
        """What its engine calls it once it has been handed over, otherwise `None`."""
        return self._receipt

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

    _concurrency = 1
    _runs: tuple[_ConcurrentRun, ...] = ()

    def __init__(
        self,
        tasks: Iterable[
            starlette.background.BackgroundTask | Callable[[], Awaitable[Any]]
        ]
        | None = None,
        *,
        concurrency: int = 1,
    ) -> None:
        if not isinstance(concurrency, int):
            raise TypeError(f"concurrency must be an int, not {concurrency!r}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency!r}")
        self.tasks: list[StockTask] = [] if tasks is None else [*map(_checked, tasks)]
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
        if (responses := unstarted.get()) and responses[0].background is self:
            responses.clear()
        if (here := home.get()) and (taken := here.take(self)) is not None:
            await taken
            return
        if keep is not None and keep(self):
            return
        if failures := await self._complete():
            error = self._exception = _combined(failures)
            raise error

    async def _complete(self) -> list[Failure]:
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
        else:
            self._state = _SUCCEEDED
        return failures

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
        run = _ConcurrentRun(self, _run_alone)
        try:
            return await run.complete()
        except BaseException as exc:
            _log_failures(run.failures)
            position = run.position
            await cut_short(self.tasks, exc, logging.WARNING, position=position)
            raise

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> NoReturn:
        # FastAPI asks this of a parameter that it does not know how to fill.
        raise TypeError(
            "FastAPI cannot inject postlude.BackgroundTasks: import BackgroundTasks "
            "from postlude.fastapi, or return a response with background=tasks"
        )


async def cut_short(
    tasks: list[StockTask],
    cause: BaseException | None,
    level: int,
    *,
    position: int = 0,
    unfinished: Iterable[str] = (),
    trip: _Trip | None = None,
    here: Home | None = None,
) -> None:
    """Names the tasks whose turn will not come, and runs those declared `always=True`.

    Args:
        tasks: The list they are in, to which more may be added meanwhile.
        cause: What is on its way out, or `None` if another response has been sent.
            After Ctrl+C nothing is run.
        level: The level of the log record.
        position: Where in the list they begin.
        unfinished: What the record names before them.
        trip: A trip to a thread that has to end before anything is run.
        here: What runs those instead, if it still can.
    """
    by = "another response" if cause is None else type(cause).__name__
    interrupted = cause is not None and any(map(_is_interrupt, _parts(cause)))
    named = [*unfinished]
    while named or position < len(tasks):
        always: list[StockTask] = []
        for task in _give_up(tasks[position:]):
            if _is_always(task) and not interrupted:
                always.append(task)
            else:
                named.append(f"{_name(task)!r} (not started)")
        # Said before they run, in case the process is given no time for it.
        named += [f"{_name(task)!r} (runs all the same)" for task in always]
        if named:
            message = "background tasks cut short by %s: %s"
            logger.log(level, message, by, ", ".join(named))
        named, position = [], len(tasks)
        if here is not None and here.is_open:
            for task in always:
                here.add(task)
        elif always:
            await _run_always(always, trip)


def _give_up(tasks: list[StockTask]) -> Iterator[StockTask]:
    """Yields the single tasks that tasks are or hold, all of them cancelled by now."""
    for task in tasks:
        if isinstance(task, BackgroundTask):
            task._state = _CANCELLED
        group = _group(task)
        if group is None:
            yield task
        else:
            yield from _give_up(group.tasks)


async def _run_always(tasks: list[StockTask], trip: _Trip | None) -> None:
    """Runs each task, whatever comes in between, and logs what fails."""
    left: list[BaseException] = []
    with anyio.CancelScope(shield=True):
        # asyncio's own cancellation reaches behind the shield.
        if trip is not None:
            try:
                await trip.end()
            except anyio.get_cancelled_exc_class() as exc:
                left.append(exc)
        for task in tasks:
            if keep is not None and keep(task):
                continue
            try:
                failures = await _run_in_order([task])
            except BaseException as exc:
                if any(map(_is_interrupt, _parts(exc))):
                    raise
                left.append(exc)
            else:
                _log_failures(failures)
    if left:
        raise left.pop()


async def _run_in_order(  # noqa: PLR0912, PLR0915 - in one piece for the sake of short tasks
    tasks: list[StockTask], direct: Any = None
) -> list[Failure]:
    """Runs tasks one after the other and returns what failed.

    Only a cancellation or an interrupt leaves, once what it cuts short has been told.

    Args:
        tasks: What to run; it may grow meanwhile.
        direct: The one to run by its function although its class may have a `__call__`
            of its own, for that is what has called us.
    """
    failures: list[Failure] = []
    position = 0
    task: Any = None
    trip: _Trip | None = None
    now = time()
    try:
        while position < len(tasks):
            task = tasks[position]
            if type(task) is not BackgroundTask and task is not direct:
                position += 1
                try:
                    failures += await _run_other(task)
                except BaseException as exc:
                    if not _fails(task, exc, failures, _leaves):
                        raise
                now = time()
            elif task.is_async or _is_limited(task):
                position += 1
                task._state = _RUNNING
                task._started = now
                try:
                    options = task._options
                    if task._context is None and options is None:
                        await task.func(*task.args, **task.kwargs)
                    else:
                        context = task._context and task._context.copy()
                        shield = options is not None and options.always
                        await _await(_call(task), context, shield=shield)
                except BaseException as exc:
                    if not _fails(task, exc, failures, _leaves):
                        raise
                else:
                    task._state = _SUCCEEDED
                # The next task starts as this one ends.
                task._finished = now = time()
            else:
                trip = _Trip(tasks, position, direct, failures)
                await trip.make()
                position = trip.position
                trip = None
                now = time()
    except BaseException as exc:
        unfinished: list[str] = []
        if trip is not None:
            unfinished += trip.abandon()
            position = trip.position
        elif not _tells_itself(task, direct):
            goes_on = any(call.task is task for call in _left_behind.copy())
            what = "its thread goes on" if goes_on else "stopped"
            unfinished.append(f"{_name(task)!r} ({what})")
        _log_failures(failures)
        await cut_short(
            tasks,
            exc,
            logging.WARNING,
            position=position,
            unfinished=unfinished,
            trip=trip,
        )
        raise
    return failures


async def _run_other(task: StockTask) -> list[Failure]:
    """Runs a group, or a task that runs in a way of its own."""
    call = type(task).__call__
    if isinstance(task, BackgroundTasks) and call is BackgroundTasks.__call__:
        return await task._complete()
    if isinstance(task, StockTasks) and call is StockTasks.__call__:
        return await _run_in_order(task.tasks)
    await task()
    return []


def _tells_itself(task: StockTask, direct: Any) -> bool:
    """Whether what a cancellation cuts short in a task has been told already."""
    if type(task) is BackgroundTask or task is direct:
        return _group(task) is not None
    calls = BackgroundTask.__call__, BackgroundTasks.__call__, StockTasks.__call__
    return type(task).__call__ in calls


class TripOwner(Protocol):
    """How a trip's tasks run when they belong to the application."""

    def threads(self) -> anyio.CapacityLimiter:
        """Returns the limit of threads."""
        ...

    def call(self, task: BackgroundTask) -> Any:
        """Calls the function of a sync task, in the task's context."""

    def fails(
        self, task: BackgroundTask, exc: BaseException, failures: list[Failure]
    ) -> bool:
        """Books and logs what a task has raised on the event loop, as `_fails` does."""
        ...

    def hears(self, trip: _Trip) -> None:
        """Hears that the thread has returned what is to be awaited."""

    def log(self, failures: list[Failure]) -> None:
        """Logs what has failed in a thread."""


class _Trip:
    """One trip to a worker thread, for as many tasks in a row as it can take along.

    The event loop may go away while the thread works, as asyncio's own cancellation
    does not wait for threads. What both touch is under the lock. An abandoned thread
    starts nothing more, and tells by itself what has become of its last task.
    """

    __slots__ = (
        "_abandoned",
        "_awaitable",
        "_direct",
        "_failures",
        "_job",
        "_lock",
        "_stopped",
        "_task",
        "_tasks",
        "_working",
        "awaits",
        "position",
    )

    def __init__(
        self,
        tasks: list[StockTask],
        position: int,
        direct: Any,
        failures: list[Failure],
        job: TripOwner | None = None,
    ) -> None:
        self.position = position
        # Whether the thread has ended its work, and the event loop goes on with it.
        self.awaits = False
        self._tasks = tasks
        self._direct = direct
        self._failures = failures
        self._job = job
        self._stopped = False
        self._lock = Lock()
        self._working = Lock()
        self._abandoned = False
        # The task under way, and what it has returned for the event loop to await.
        self._task: BackgroundTask | None = None
        self._awaitable: tuple[Awaitable[Any], Context] | None = None

    async def make(self) -> None:
        """Runs at least one task, and those after it that share the trip."""
        task: Any = self._tasks[self.position]
        try:
            limiter = _worker_threads() if self._job is None else self._job.threads()
            trip = anyio.to_thread.run_sync(self._work, limiter=limiter)
            if task._options is not None:
                with anyio.CancelScope(shield=True):
                    await trip
            else:
                await trip
        except Exception as exc:
            # There was no thread to be had, and so the task has failed.
            self.position += 1
            self._fails(task, exc)
        if self._task is not None and self._awaitable is not None:
            task, (awaitable, context) = self._task, self._awaitable
            self._awaitable = None
            self.awaits = True
            if self._job is not None:
                self._job.hears(self)
            try:
                shield = task._options is not None
                await _await(awaitable, context, shield=shield)
            except BaseException as exc:
                if not context.run(self._fails, task, exc):
                    raise
            else:
                task._state = _SUCCEEDED
            task._finished = time()
            self._task = None

    def stop(self) -> None:
        """Keeps the thread from starting more tasks; what it is about is awaited."""
        self._stopped = True

    def under_way(self) -> tuple[BackgroundTask | None, bool]:
        """Returns the task that has been started, and whether it is in the thread."""
        with self._lock:
            return self._task, not self.awaits and self._working.locked()

    def abandon(self) -> list[str]:
        """Keeps the thread from starting more tasks; returns what is unfinished."""
        with self._lock:
            self._abandoned = True
            task, awaitable = self._task, self._awaitable
        if task is None:
            return []
        if awaitable is None and self._working.locked():
            return [f"{_name(task)!r} (its thread goes on)"]
        if awaitable is not None:
            _close(task, awaitable[0])
        return [f"{_name(task)!r} (stopped)"]

    async def end(self) -> None:
        """Waits until the thread has ended its work."""

        def wait() -> None:
            with self._working:
                pass

        # Others are in need of the threads that anyio and postlude allow.
        await anyio.to_thread.run_sync(wait, limiter=anyio.CapacityLimiter(1))

    def _work(self) -> None:
        with self._working:
            self._run_tasks()

    def _run_tasks(self) -> None:  # noqa: PLR0912 - likewise
        tasks, direct, position = self._tasks, self._direct, self.position
        call = None if self._job is None else self._job.call
        first: Any = tasks[position]
        # Those without limits: there is none, or what says that it always runs.
        options = first._options
        # As `with lock`, which for a short task would be a tenth of the costs.
        acquire, release = self._lock.acquire, self._lock.release
        began = check_at = now = time()
        while position < len(tasks):
            task: Any = tasks[position]
            if type(task) is not BackgroundTask and task is not direct:
                return
            # The trip is shielded from cancellation, or not, as a whole.
            if task.is_async or task._options is not options:
                return
            position += 1
            acquire()
            if self._abandoned or self._stopped:
                release()
                return
            self.position = position
            self._task = task
            release()
            task._state = _RUNNING
            task._started = now
            context = copy_context() if task._context is None else task._context.copy()
            try:
                if call is not None:
                    result = context.run(call, task)
                elif task.kwargs:
                    result = context.run(task.func, *task.args, **task.kwargs)
                else:
                    result = context.run(task.func, *task.args)
                if result is not None and inspect.isawaitable(result):
                    self._hand_back(task, result, context)
                    return
            except BaseException as exc:
                if not context.run(self._fails_in_thread, task, exc):
                    raise
            else:
                task._state = _SUCCEEDED
            self._task = None
            task._finished = now = time()
            if began <= now < check_at:
                continue
            # A clock that has been set back ends the trip as well.
            if not began <= now < began + _TRIP_SECONDS:
                return
            # For anyio's cancellation; of asyncio's own the flag tells.
            check_at = now + _CHECK_SECONDS
            if position < len(tasks) and options is None:
                anyio.from_thread.check_cancelled()

    def _hand_back(
        self, task: BackgroundTask, result: Awaitable[Any], context: Context
    ) -> None:
        with self._lock:
            abandoned = self._abandoned
            if not abandoned:
                self._awaitable = result, context
        if abandoned:
            _close(task, result)
            logger.warning(
                "background task %r cut short: it was cancelled before what it "
                "returned could be awaited",
                _name(task),
            )

    def _fails(self, task: BackgroundTask, exc: BaseException) -> bool:
        if self._job is not None:
            return self._job.fails(task, exc, self._failures)
        return _fails(task, exc, self._failures, _leaves)

    def _fails_in_thread(self, task: BackgroundTask, exc: BaseException) -> bool:
        failures: list[Failure] = []
        if not _fails(task, exc, failures, _leaves_thread):
            return False
        with self._lock:
            abandoned = self._abandoned
            if not abandoned:
                self._failures += failures
        if self._job is not None:
            self._job.log(failures)
        elif abandoned:
            _log_failures(failures)
        return True


class _ConcurrentRun:
    """Runs a group's tasks, several at once; what ends or adds a task wakes it up."""

    def __init__(
        self,
        group: BackgroundTasks,
        run_one: Callable[[StockTask], Awaitable[list[Failure]]],
    ) -> None:
        self.position = 0
        self.failures: list[Failure] = []
        self._group = group
        self._run_one = run_one
        self._called = 0
        self._running = 0
        self._stopped = False
        self._wakeup = anyio.Event()
        self._thread = get_ident()

    async def complete(self) -> list[Failure]:
        """Runs all tasks and returns what failed, as `_run_in_order` does."""
        group, tasks = self._group, self._group.tasks
        group._runs += (self,)
        try:
            async with anyio.create_task_group() as children:
                while True:
                    while (
                        self._running < group._concurrency
                        and self._called < len(tasks)
                        and not self._stopped
                    ):
                        children.start_soon(self._run)
                        self._called += 1
                        self._running += 1
                    if not self._running:
                        break
                    await self._wakeup.wait()
                    self._wakeup = anyio.Event()
        finally:
            group._runs = tuple(other for other in group._runs if other is not self)
        return self.failures

    async def _run(self) -> None:
        # asyncio may cancel a child before it gets here.
        task = self._group.tasks[self.position]
        self.position += 1
        self.failures += await self._run_one(task)
        self._running -= 1
        self._wakeup.set()

    def stop(self) -> None:
        """Starts no more tasks."""
        self._stopped = True
        self._wakeup.set()

    def wake(self) -> None:
        """Makes the run look for added tasks; from any thread."""
        if get_ident() == self._thread:
            self._wakeup.set()
        else:
            # In a thread that is none of anyio's, the end of a task makes it look.
            with suppress(RuntimeError):
                anyio.from_thread.run_sync(self.wake)


async def _run_alone(task: StockTask) -> list[Failure]:
    """Runs one of several tasks that run at once."""
    try:
        return await _run_in_order([task])
    except anyio.get_cancelled_exc_class():
        # Unless the group is cancelled, asyncio's own cancellation met this task
        # alone. It has been told, and the others go on.
        if anyio.current_effective_deadline() == -math.inf:
            raise
        return []


def _checked(task: StockTask | Callable[[], Awaitable[Any]]) -> StockTask:
    if isinstance(task, StockTask):
        return task
    checked = BackgroundTask(task)
    if not checked.is_async:
        raise TypeError(f"{task!r} is not a task; write BackgroundTask(func, ...)")
    return checked


# A tuple, as it takes longer to make a union than to look a task up in it.
_GROUPS = BackgroundTasks, StockTasks


def _group(task: object) -> BackgroundTasks | StockTasks | None:
    """Returns the group that a task is, or that it runs as its function."""
    if isinstance(task, _GROUPS):
        return task
    func = getattr(task, "func", None)
    return func if isinstance(func, BackgroundTasks) else None


def _func(task: object) -> object:
    # What has been put into the list by hand may be any awaitable callable.
    return getattr(task, "func", task) if isinstance(task, StockTask) else task


def _is_always(task: StockTask) -> bool:
    return options_of(_func(task)).always


def _name(task: StockTask) -> str:
    return name_of(_func(task))


def _prepare(task: BackgroundTask) -> None:
    """Sets what our constructor does, which that of a subclass may not have called."""
    task._options = run_options_of(task.func)
    task._context = None
    task._state = _PENDING
    task._started = task._finished = None


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
    return limiter_here(_limiter, _THREADS)


def _is_limited(task: BackgroundTask) -> bool:
    return task._options is not None and task._options.are_limits


def _pickle(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bytes:
    """Returns a call as a process takes it."""
    from ._processes import pickle_call  # noqa: PLC0415 - few have need of processes

    check_outermost(func)
    return pickle_call(func, args, kwargs, name_of(func))


async def _call(task: BackgroundTask) -> None:
    if _is_limited(task):
        await Call(task, _worker_threads(), _left_behind).complete()
    else:
        await task.func(*task.args, **task.kwargs)


async def _await(
    awaitable: Awaitable[Any], context: Context | None, *, shield: bool
) -> None:
    """Awaits something in a context, shielded from cancellation or not."""

    async def steps() -> None:
        await awaitable

    stepped = awaitable if context is None else _in_context(context, steps())
    if shield:
        with anyio.CancelScope(shield=True):
            await stepped
    else:
        await stepped


# What a coroutine has yielded that has not taken its first step.
_UNBEGUN = object()


@coroutine
def _in_context(
    context: Context, call: Coroutine[Any, Any, T], yielded: Any = _UNBEGUN
) -> Generator[Any, Any, T]:
    """Awaits a coroutine, with each of its steps run in a context.

    Args:
        context: The context.
        call: The coroutine.
        yielded: What its first step has yielded, if that has been taken.
    """
    step: Callable[[Any], Any] = call.send
    value: Any = None
    while True:
        if yielded is not _UNBEGUN:
            try:
                value = yield yielded
                step = call.send
            except GeneratorExit:
                context.run(call.close)
                raise
            except BaseException as exc:
                value = exc
                step = call.throw
        try:
            yielded = context.run(step, value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except GeneratorExit as exc:
            raise _no_exit() from exc


def _no_exit() -> RuntimeError:
    """Returns what is raised in place of a `GeneratorExit` by which nobody closed."""
    return RuntimeError("GeneratorExit raised")


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
    try:
        current = asyncio.current_task()
    except RuntimeError:
        return False
    if current is not None and current.cancelling() > 0:
        return True
    # A task group of anyio's that is cancelled while it waits for its tasks may have
    # taken back the request by now. Then nothing but that group has raised this.
    frames = [frame for frame, _ in traceback.walk_tb(exc.__traceback__)][-1:]
    return any(
        frame.f_code.co_name == "__aexit__"
        and isinstance(frame.f_locals.get("self"), anyio.abc.TaskGroup)
        for frame in frames
    )


def _leaves(exc: BaseException) -> bool:
    """Whether this is no failure of the task that has raised it; on the event loop."""
    return _is_interrupt(exc) or _is_cancellation(exc)


def _leaves_thread(exc: BaseException) -> bool:
    """Whether this is no failure of the task that has raised it; in a worker thread."""
    try:
        anyio.from_thread.check_cancelled()
    except BaseException as cancellation:
        if isinstance(exc, type(cancellation)):
            return True
    return isinstance(exc, KeyboardInterrupt)


def _fails(
    task: StockTask,
    exc: BaseException,
    failures: list[Failure],
    leaves: Callable[[BaseException], bool],
) -> bool:
    """Books what a task has raised as its failure, unless that is to leave the run.

    The failure gets a note that names the task.
    """
    if not isinstance(exc, Exception) and any(map(leaves, _parts(exc))):
        if isinstance(task, BackgroundTask):
            task._state = _CANCELLED
            task._finished = time()
        return False
    name = _name(task)
    if isinstance(exc, Exception):
        failure = exc
    else:
        failure = RuntimeError(f"background task {name!r} raised {type(exc).__name__}")
        failure.__cause__ = exc
    if isinstance(task, BackgroundTask):
        task._state = _FAILED
        task._exception = failure
    # A group has named its tasks already; and some exceptions refuse notes.
    if _group(task) is None:
        note = f"in background task {name!r}"
        with suppress(Exception):
            if note not in getattr(failure, "__notes__", ()):
                failure.add_note(note)
    failures.append((task, failure))
    return True


def _combined(failures: list[Failure]) -> Exception:
    if len(failures) == 1:
        return failures[0][1]
    # Not every server logs what is in a group, nor notes.
    names = ", ".join(repr(_name(task)) for task, _ in failures)
    return ExceptionGroup(
        f"{len(failures)} background tasks failed: {names}",
        [failure for _, failure in failures],
    )


def _log_failures(
    failures: list[Failure], request: Mapping[str, object] | None = None
) -> None:
    if hear is not None:
        hear(failures)
    for task, failure in failures:
        extra: dict[str, object] = {"task_name": _name(task), **(request or {})}
        if isinstance(task, BackgroundTask):
            extra["task_id"] = task.id
        message = "background task %r failed"
        logger.error(message, _name(task), exc_info=failure, extra=extra)


class Watched:
    """What a sync task has returned to be awaited, with the observers around it.

    Args:
        leave: Tells the observers of the end, and of what was raised.
        result: What to await.
    """

    def __init__(
        self,
        leave: Callable[[BaseException | None], object],
        result: Awaitable[object],
    ) -> None:
        self._leave = leave
        self._result = result

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield from self._result.__await__()
        except BaseException as exc:
            self._leave(exc)
            raise
        self._leave(None)

    def close(self) -> None:
        """Gives up what has not been awaited."""
        try:
            _discard(self._result)
        finally:
            self._leave(None)


def _close(task: BackgroundTask, result: Awaitable[Any]) -> None:
    """Gives up what a sync task has returned, as nobody is left to await it."""
    if task._state is _RUNNING:
        task._state = _CANCELLED
    task._finished = time()
    _discard(result)


def _discard(result: Awaitable[object]) -> None:
    if inspect.iscoroutine(result) or isinstance(result, Watched):
        result.close()


def _datetime(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
