"""What runs the tasks of an application, drains them, and names what is lost."""

from __future__ import annotations

import asyncio
import logging
import math
import weakref
from asyncio.tasks import _enter_task, _leave_task
from collections import Counter, deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import Context, copy_context
from functools import partial
from inspect import isawaitable
from threading import Lock
from time import monotonic, time
from types import FunctionType
from typing import Any, NamedTuple, NoReturn, Self, TypeAlias, TypeGuard, cast

import anyio
import anyio.abc
import anyio.lowlevel
from starlette.background import BackgroundTask as StockTask
from starlette.background import BackgroundTasks as StockTasks
from starlette.types import Scope
from typing_extensions import override

from ._limits import Call
from ._options import limiter_here
from ._tasks import (
    _CANCELLED,
    _COROUTINE,
    _FAILED,
    _LOST,
    _PENDING,
    _RUNNING,
    _SUCCEEDED,
    BackgroundTask,
    BackgroundTasks,
    Failure,
    TaskState,
    Watched,
    _combined,
    _ConcurrentRun,
    _fails,
    _group,
    _in_context,
    _is_always,
    _is_interrupt,
    _is_limited,
    _leaves,
    _log_failures,
    _no_exit,
    _prepare,
    _Trip,
    cut_short,
    home,
)

# An async task that has taken its first step, its context and its coroutine, and what
# that has yielded.
_Begun: TypeAlias = tuple[BackgroundTask, Context, Coroutine[Any, Any, Any], Any]

Observer: TypeAlias = Callable[[BackgroundTask], AbstractContextManager[object]]

logger = logging.getLogger("postlude")

# How tasks are called unless a subclass has a way of its own.
_CALLS = (
    BackgroundTask.__call__,
    BackgroundTasks.__call__,
    StockTask.__call__,
    StockTasks.__call__,
)

# What is cancelled has so long for its `finally`, then so long under constant pressure.
_CLEANUP_SECONDS = 1.5
_PRESSURE_SECONDS = 0.5
_PROGRESS_SECONDS = 5

# Those there are, for a test that waits for their jobs: the middleware may be hidden.
live: set[weakref.ref[Supervisor]] = set()

# Guards the moment in which a request or a job ends against what other threads add.
lock = Lock()


class Settings(NamedTuple):
    """What the middleware has been told, checked."""

    drain_timeout: float
    max_running: float
    threads: float
    observers: tuple[Observer, ...]
    # Those of them that want to be told of accepted tasks.
    accepting: tuple[Observer, ...]
    on_lost: Callable[[list[BackgroundTask]], object] | None
    # One an event loop.
    limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter]
    # The jobs that run within their requests.
    unsupervised: set[Job]
    # Calls that have been given up, but whose threads go on.
    left_behind: set[Call]


class Job:
    """The tasks that one request leaves to be done, and the home of what they add.

    Args:
        tasks: What to run. Groups among them may grow; this list does by `add` alone.
        request: What log records tell of the request. Not its scope: contexts that
            live on hold the job, such as those of a server's timers.
        settings: What the middleware has been told.
        supervisor: What the job belongs to, or `None` if it runs within its request.
    """

    __slots__ = (
        "_accepted",
        "_handles",
        "_is_lost",
        "_observers",
        "_settings",
        "_stopping",
        "_strands",
        "_supervisor",
        "_tasks",
        "_waiters",
        "cancel_scope",
        "context",
        "is_open",
        "native",
        "request",
        "since",
    )

    def __init__(
        self,
        tasks: list[StockTask],
        request: dict[str, str],
        settings: Settings,
        supervisor: Supervisor | None,
    ) -> None:
        self.request = request
        self.since = monotonic()
        self.is_open = True
        # By one of these the job is cancelled: on asyncio, where it is there from the
        # first step on and may have served other jobs before, and on Trio.
        self.native: asyncio.Task[Any] | None = None
        self.cancel_scope: anyio.CancelScope | None = None
        # What the job runs in if that is not what it is started in.
        self.context: Context | None = None
        self._tasks = tasks
        self._settings = settings
        self._observers = settings.observers
        if logger.isEnabledFor(logging.DEBUG):
            # The innermost, so that its records carry what the others set.
            self._observers += (partial(_logged, request=request),)
        self._supervisor = supervisor
        # Where there is but a group, its tasks are what the job begins with.
        group: Any = tasks[0] if len(tasks) == 1 else None
        if type(group) is BackgroundTasks and group._concurrency == 1:
            strand = _Strand(group.tasks)
            strand.group = group
        else:
            strand = _Strand(tasks)
        self._strands = [strand]
        self._stopping = self._is_lost = False
        self._waiters: tuple[Callable[[], None], ...] = ()
        self._handles: dict[int, BackgroundTask] = {}
        self._accepted: dict[int, object] = {}
        if settings.accepting:
            for task in self._singles(tasks):
                self._accept(task)

    def take(self, task: BackgroundTask) -> Awaitable[object] | None:
        """Leaves the task to run here and now, unless its own turn is to come."""
        is_due = task.state is TaskState.PENDING and task in self._tasks
        return NOTHING if is_due else None

    def adopt(self, task: BackgroundTask) -> bool:  # noqa: ARG002 - what a home takes
        """Leaves the task where it is."""
        return False

    def add(self, task: StockTask) -> None:
        """Runs a task after those that are there already; from any thread.

        Raises:
            RuntimeError: If the job has ended.
        """
        if not self.extend([task]):
            raise has_ended()

    def extend(self, tasks: list[StockTask]) -> bool:
        """Adds tasks unless the job has ended; returns whether it did."""
        with lock:
            if not self.is_open:
                return False
            self._tasks += tasks
            if all(strand.tasks is not self._tasks for strand in self._strands):
                # It goes on after the group that the job has begun with.
                strand = _Strand(self._tasks)
                strand.position = 1
                self._strands.insert(0, strand)
        if self._settings.accepting:
            for task in self._singles(tasks):
                self._accept(task)
        return True

    def begins_here(self) -> bool:
        """Whether the first task may end before anything has to be waited for."""
        tasks = self._strands[-1].tasks
        return not tasks or getattr(tasks[0], "is_async", True)

    @property
    def is_supervised(self) -> bool:
        """Whether it belongs to the application, and not to its request."""
        return self._supervisor is not None

    def complete(self) -> Awaitable[None]:
        """Waits for the end of the job, or runs it here if it belongs to its request.

        To cancel the waiting does not touch the job.
        """
        if self._supervisor is None and self not in self._settings.unsupervised:
            return self._run_here()
        if self.is_open and self.native is not None:
            # A tenth of the costs of an event.
            waiter = self.native.get_loop().create_future()
            self._waiters += (partial(_wake, waiter),)
            return waiter
        if self.is_open:
            event = anyio.Event()
            self._waiters += (event.set,)
            return event.wait()
        return NOTHING

    async def leave(self, cause: BaseException) -> None:
        """Does not wait as the request fails, unless the job belongs to that."""
        if self._supervisor is None:
            if isinstance(cause, Exception):
                await self.complete()
            else:
                await self._cut_short(cause)
                self.end()

    async def _run_here(self) -> None:
        self._settings.unsupervised.add(self)
        try:
            await self.run()
        except BaseException as exc:
            await self._cut_short(exc)
            raise
        finally:
            self._settings.unsupervised.remove(self)
            self.end()

    async def _cut_short(self, cause: BaseException) -> None:
        """Names the tasks that are left, and runs those declared `always=True`."""
        pending: list[StockTask] = []
        unfinished: list[str] = []
        trip: _Trip | None = None
        for strand in reversed(self._strands):
            if strand.trip is not None:
                trip = strand.trip
                unfinished += trip.abandon()
            elif strand.task is not None:
                goes_on = strand.call is not None and strand.call.is_in_thread
                what = "its thread goes on" if goes_on else "stopped"
                unfinished.append(f"{strand.task.name!r} ({what})")
            pending += strand.tasks[strand.reached() :]
        rest = Job([], self.request, self._settings, None)
        rest._accepted = self._accepted
        await cut_short(
            pending, cause, logging.WARNING, unfinished=unfinished, here=rest
        )
        if not rest._tasks:
            return
        left: BaseException | None = None
        with anyio.CancelScope(shield=True):
            # asyncio's own cancellation reaches behind the shield.
            try:
                if trip is not None:
                    await trip.end()
            except anyio.get_cancelled_exc_class() as exc:
                left = exc
            await rest.complete()
        if left is not None:
            raise left

    def end(self, *, broken_off: bool = False) -> None:
        """Lets go those who wait for the job, and starts the next one.

        Args:
            broken_off: Whether tasks are left although nothing has stopped the job.
        """
        self.is_open = False
        for wake in self._waiters:
            wake()
        if not broken_off and not self._stopping:
            # The tasks' contexts hold the request, which holds the job.
            self._strands, self._tasks = [], []
            self.native = None
        if self._supervisor is not None:
            self._supervisor.ended(self, broken_off=broken_off)

    def lose(self) -> list[tuple[BackgroundTask, str]]:
        """Gives up what has not ended, and lists it as `outstanding` does, once."""
        if self._is_lost:
            return []
        self._is_lost = True
        with lock:
            self.is_open = False
        lost = self.outstanding()
        for strand in self._strands:
            _set_state(strand.tasks[strand.reached() :], _LOST)
            for handle in strand.handles():
                handle._state = _LOST
        for task, _ in lost:
            task._state = _LOST
            if self._settings.accepting:
                # It may have been added to a group without the job's knowledge.
                self._accept(task)
        return lost

    def stop(self) -> None:
        """Starts no more tasks, and cancels the running ones, once.

        A worker thread ends the task that it is about, as it cannot be stopped.
        """
        self._stopping = True
        if self.cancel_scope is not None:
            self.cancel_scope.cancel()
        for strand in self._strands:
            if strand.run is not None:
                strand.run.stop()
            elif strand.trip is not None and not strand.trip.awaits:
                strand.trip.stop()
            elif strand.call is not None and strand.call.is_in_thread:
                continue
            elif strand.task is not None or strand.trip is not None:
                self._cancel(strand)

    def press(self) -> None:
        """Cancels whatever goes on, once more."""
        for strand in self._strands:
            self._cancel(strand, again=True)

    def _cancel(self, strand: _Strand, *, again: bool = False) -> None:
        native = strand.native or self.native
        # When its event loop ends, asyncio has done so already.
        if native is not None and (again or not native.cancelling()):
            native.cancel()

    def outstanding(self) -> list[tuple[BackgroundTask, str]]:
        """Lists the tasks that have not ended, each with where it stands."""
        strands = reversed(self._strands.copy())
        return [entry for strand in strands for entry in self._left_of(strand)]

    def count(self) -> tuple[int, int]:
        """Returns how many tasks are running, and how many have not been started."""
        running = waiting = 0
        for strand in self._strands.copy():
            under_way = (
                strand.task if strand.trip is None else strand.trip.under_way()[0]
            )
            running += under_way is not None
            waiting += sum(1 for _ in _singles(strand.tasks[strand.reached() :]))
        return running, waiting

    def threads(self) -> anyio.CapacityLimiter:
        """Returns the limit of threads for the tasks of this event loop."""
        return limiter_here(self._settings.limiter, self._settings.threads)

    def call(self, task: BackgroundTask) -> Any:
        """Calls the function of a sync task, in the task's context."""
        home.set(self)
        if not self._observers:
            return task.func(*task.args, **task.kwargs)
        if self._settings.accepting:
            self._accept(task)
        entered = _enter(task, self._observers)
        try:
            result = task.func(*task.args, **task.kwargs)
            if result is not None and isawaitable(result):
                return Watched(partial(_exit, task, entered), result)
        except BaseException as exc:
            _exit(task, entered, exc)
            raise
        _exit(task, entered)
        return result

    def fails(
        self, task: StockTask, exc: BaseException, failures: list[Failure]
    ) -> bool:
        """Books and logs what a task has raised, unless that is to leave the job."""
        booked: list[Failure] = []
        if not _fails(task, exc, booked, self._leaves):
            return False
        failures += booked
        self.log(booked)
        return True

    def hears(self, trip: _Trip) -> None:
        """Cancels what a thread has returned to be awaited, if the job is stopped."""
        if self._stopping:
            for strand in self._strands:
                if strand.trip is trip:
                    self._cancel(strand)

    def log(self, failures: list[Failure]) -> None:
        """Logs what has failed."""
        _log_failures(failures, self.request)

    def _left_of(self, strand: _Strand) -> Iterator[tuple[BackgroundTask, str]]:
        task = strand.task
        in_thread = strand.call is not None and strand.call.is_in_thread
        if strand.trip is not None:
            task, in_thread = strand.trip.under_way()
        if task is not None:
            yield task, "in a thread" if in_thread else "running"
        for pending in self._singles(strand.tasks[strand.reached() :]):
            yield pending, "pending"

    def _singles(self, tasks: Iterable[StockTask]) -> Iterator[BackgroundTask]:
        return map(self._handle, _singles(tasks))

    def _handle(self, task: StockTask) -> BackgroundTask:
        """Returns the task itself, or for what is none of ours, one that is."""
        if isinstance(task, BackgroundTask) and not isinstance(task, BackgroundTasks):
            return _handle(task)
        if id(task) not in self._handles:
            self._handles[id(task)] = _handle(task)
        return self._handles[id(task)]

    def begin(self) -> Coroutine[Any, Any, None] | None:
        """Takes the first step of the job; returns how to go on, unless that was all.

        For one that is run by its `native`. A short async function, which most jobs
        are, costs least so.
        """
        strand = self._strands[-1]
        tasks = strand.tasks
        task = tasks[0] if tasks and not self._stopping else None
        if not _is_plain(task) or not task.is_async:
            return self.run()
        if (group := strand.group) is not None:
            group._state = _RUNNING
        native: Any = self.native
        try:
            begun = self._step(strand, task, is_plain=True)
        except BaseException as exc:
            if group is not None:
                self._go_back(strand, is_cut_short=True)
            self.end(broken_off=True)
            if _is_cancelled_error(exc):
                return None
            raise
        if begun or len(tasks) > 1 or native.cancelling():
            return self.run(begun=begun)
        if group is not None:
            self._go_back(strand)
        if self._next() is not None:
            return self.run()
        self.end()
        return None

    async def run(  # noqa: PLR0912, PLR0915 - in one piece, as short tasks cost less so
        self, alone: _Strand | None = None, *, begun: _Begun | None = None
    ) -> None:
        """Runs the tasks, one after the other.

        The tasks of a group run on a strand of their own, and then the one around it
        goes on; in the end what has been added meanwhile. For the supervisor, only what
        ends everything leaves, and on Trio the cancellation, as it must.

        Args:
            alone: The strand of one of several tasks that run at once, to run nothing
                but that.
            begun: What has taken its first step.
        """
        first = strand = alone or self._strands[-1]
        task: Any
        if (group := strand.group) is not None:
            group._state = _RUNNING
        try:
            while True:
                if begun is not None:
                    task, context, call, yielded = begun
                    try:
                        await _in_context(context, call, yielded)
                    except BaseException as exc:
                        if not context.run(self.fails, task, exc, strand.failures):
                            raise
                    else:
                        task._state = _SUCCEEDED
                    task._finished = time()
                    strand.task = strand.call = begun = None
                # An eager task begins before the job is told of it.
                native = strand.native or self.native
                if native is not None and native.cancelling():
                    await self._forgive(native)
                tasks, position = strand.tasks, strand.position
                if position >= len(tasks) or self._stopping:
                    outer: Any = strand.outer
                    if strand is not first:
                        self._go_back(strand)
                    else:
                        if group is not None:
                            self._go_back(strand)
                        # One of several at once has none to go back to either.
                        outer = None if self._stopping or outer else self._next()
                        if outer is None:
                            break
                        first, group = outer, None
                    strand = outer
                    continue
                task = tasks[position]
                # To tell that one is none of the special takes as long as it does.
                is_plain = _is_plain(task)
                if not is_plain and (inner := self._enter(strand, task)) is not None:
                    strand.position = position + 1
                    strand = inner
                    if strand.group is not None and strand.group._concurrency > 1:
                        await self._run_concurrently(strand, strand.group)
                elif not task.is_async and (is_plain or _shares_thread(task)):
                    await self._make_trip(strand, task)
                else:
                    begun = self._step(strand, task, is_plain=is_plain)
        except BaseException as exc:
            while strand is not first:
                self._go_back(strand, is_cut_short=True)
                strand = cast("_Strand", strand.outer)
            if group is not None:
                self._go_back(first, is_cut_short=True)
            if self._supervisor is None or first.outer is not None:
                raise
            self.end(broken_off=True)
            if self.native is None or not _is_cancelled_error(exc):
                raise
        else:
            if self._supervisor is not None and first.outer is None:
                self.end()

    def _step(
        self, strand: _Strand, task: BackgroundTask, *, is_plain: bool
    ) -> _Begun | None:
        """Takes the first step of an async task; returns it, unless it was the last."""
        strand.position += 1
        strand.task = task
        context = task._context
        context = copy_context() if context is None else context.copy()
        task._state = _RUNNING
        task._started = time()
        try:
            func: Any = task.func
            if is_plain and func.__code__.co_flags & _COROUTINE and not self._observers:
                # To call it is not to take a step yet.
                context.run(home.set, self)
                call = func(*task.args, **task.kwargs)
            else:
                call = self._call(strand, task)
            try:
                # Most short functions have ended by then, and send() would raise.
                yielded = context.run(next, call.__await__(), NOTHING)
            except GeneratorExit as exc:
                raise _no_exit() from exc
            if yielded is not NOTHING:
                return task, context, call, yielded
            task._state = _SUCCEEDED
        except BaseException as exc:
            # Log records carry what is in the context, such as a request id.
            if not context.run(self.fails, task, exc, strand.failures):
                raise
        task._finished = time()
        strand.task = strand.call = None
        return None

    def _enter(self, outer: _Strand, task: StockTask) -> _Strand | None:
        """Returns a strand for what a task stands for, unless that is itself."""
        if type(task) is BackgroundTasks:
            group: BackgroundTasks | StockTasks | None = task
        else:
            group = _plain_group(task)
        if group is not None:
            strand = _Strand(group.tasks, outer.native, outer)
        elif (handle := self._handle(task)) is not task:
            strand = _Strand([handle], outer.native, outer)
        else:
            return None
        # Both are handles by which a group may be watched.
        if isinstance(group, BackgroundTasks):
            strand.group = group
            group._state = _RUNNING
            if task is not group:
                strand.handle = cast("BackgroundTask", task)
                strand.handle._state = _RUNNING
                strand.handle._started = time()
        self._strands.append(strand)
        return strand

    def _go_back(self, strand: _Strand, *, is_cut_short: bool = False) -> None:
        """Ends a strand."""
        group, failures = strand.group, strand.failures
        state = _FAILED if failures else _SUCCEEDED
        is_left = False
        if is_cut_short or self._stopping:
            # What has been stopped stays, to tell what is left of it.
            is_left = is_cut_short or any(self._left_of(strand))
            if is_cut_short or not self._is_finished(strand):
                state = _CANCELLED if self._supervisor is None else _LOST
        if not is_left:
            self._strands.remove(strand)
        if group is not None:
            group._state = state
            if (handle := strand.handle) is not None:
                handle._state = state
                handle._finished = time()
        if failures:
            for one in strand.handles():
                one._exception = _combined(failures)
            if strand.outer is not None:
                strand.outer.failures += failures

    def _is_finished(self, strand: _Strand) -> bool:
        ends = (_SUCCEEDED, _FAILED)
        return all(task.state in ends for task in self._singles(strand.tasks))

    async def _make_trip(self, strand: _Strand, task: BackgroundTask) -> None:
        # What has a class of its own is let in as the one that is called.
        trip = _Trip(strand.tasks, strand.position, task, strand.failures, self)
        strand.trip = trip
        try:
            await trip.make()
        except BaseException:
            trip.abandon()
            raise
        strand.position = trip.position
        strand.trip = None

    def _next(self) -> _Strand | None:
        """Returns what the job goes on with, or lets no more be added to it."""
        strands = self._strands
        with lock:
            # Another thread may have added a task meanwhile.
            if strands and strands[0].position < len(strands[0].tasks):
                return strands[0]
            self.is_open = False
        return None

    async def _forgive(self, native: asyncio.Task[Any]) -> None:
        """Keeps the cancellation of a task by itself from those after it."""
        if not self._is_asked():
            # The next await would raise it.
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.lowlevel.checkpoint()
            while native.cancelling():
                native.uncancel()

    async def _call(self, strand: _Strand, task: BackgroundTask) -> None:
        home.set(self)
        call: Callable[[], Awaitable[object]]
        if type(task) is not BackgroundTask and _overrides_call(task):
            # It runs here and now, in the context that it is in already.
            call, task._context = task.__call__, None
        elif _is_limited(task):
            settings = self._settings
            strand.call = Call(task, self.threads(), settings.left_behind)
            call = strand.call.complete
        else:
            call = partial(task.func, *task.args, **task.kwargs)
        if not self._observers:
            await call()
            return
        if self._settings.accepting:
            self._accept(task)
        entered = _enter(task, self._observers)
        try:
            await call()
        except BaseException as exc:
            _exit(task, entered, exc)
            raise
        _exit(task, entered)

    async def _run_concurrently(self, strand: _Strand, group: BackgroundTasks) -> None:
        async def run_one(task: StockTask) -> list[Failure]:
            native = None
            if self.native is not None:
                native = asyncio.current_task()
            one = _Strand([task], native, strand)
            self._strands.append(one)
            try:
                await self.run(one)
            except anyio.get_cancelled_exc_class():
                # To be stopped is told to each task by itself, and then the group ends.
                if anyio.current_effective_deadline() == -math.inf:
                    raise
            else:
                self._go_back(one)
            return []

        strand.run = _ConcurrentRun(group, run_one)
        await strand.run.complete()
        strand.position, strand.run = strand.run.position, None

    def _leaves(self, exc: BaseException) -> bool:
        """Whether this is no failure of the task that has raised it."""
        if self.native is None:
            return _leaves(exc)
        return _is_interrupt(exc) or (_is_cancelled_error(exc) and self._is_asked())

    def _is_asked(self) -> bool:
        """Whether the job is being cancelled, which only its supervisor does."""
        supervisor = self._supervisor
        return (
            self._stopping
            or (supervisor is not None and supervisor.is_cancelled())
            or anyio.current_effective_deadline() == -math.inf
        )

    def _accept(self, task: BackgroundTask) -> None:
        """Tells the observers of a task, once."""
        mark = object()
        # Atomic, as other threads add tasks as well.
        if self._accepted.setdefault(id(task), mark) is mark:
            _tell(self._settings.accepting, "accepted", task)


class _Ahead(Coroutine[Any, Any, None]):
    """What a task of asyncio's has for its coroutine, to run a job ahead of its turn.

    The job takes its first step as this task. If that is its last as well, the
    task serves the next job: to make one for each would double what it costs to run a
    function that waits for nothing. If not, the task goes on with this job, and ends
    with it.

    Args:
        loop: The event loop, which must have no task factory.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._job: Coroutine[Any, Any, None] | None = None
        self._context = Context()
        # What the first step has yielded, until the task hears of it.
        self._yielded: list[Any] = []
        # What the task waits for if it has its turn before it has a job.
        self._turn: asyncio.Future[None] | None = None
        self.task = loop.create_task(self, context=Context())

    @property
    def is_idle(self) -> bool:
        """Whether it can serve a job: nobody has cancelled it, were it taken back."""
        task, turn = self.task, self._turn
        return not (
            task.cancelling()
            or task.done()
            or getattr(task, "_must_cancel", False)
            or (turn is not None and turn.done())
        )

    def ends(self, begin: Callable[[], Coroutine[Any, Any, None] | None]) -> bool:
        """Begins a job, and goes on to its first step; returns whether that is all.

        Args:
            begin: Begins the job, and returns what is to go on, unless it has ended.
        """
        loop, task = self._loop, self.task
        outer = asyncio.current_task(loop)
        if outer is not None:
            _leave_task(loop, outer)
        _enter_task(loop, task)
        try:
            rest = begin()
            if rest is None:
                return True
            yielded = rest.send(None)
        except StopIteration:
            return True
        except BaseException:
            task.cancel()
            raise
        finally:
            _leave_task(loop, task)
            if outer is not None:
                _enter_task(loop, outer)
        self._job, self._context = rest, copy_context()
        # A future is marked from being awaited until its task hears of it.
        self._yielded.append(_mark(yielded, is_awaited=False))
        if self._turn is not None:
            _wake(self._turn)
        return False

    @override
    def send(self, value: Any) -> Any:
        if self._job is None:
            self._turn = self._loop.create_future()
            return _mark(self._turn, is_awaited=True)
        if self._yielded:
            return _mark(self._yielded.pop(), is_awaited=True)
        return self._context.run(self._job.send, value)

    @override
    def throw(self, *exc: Any) -> Any:
        if self._job is None:
            self.close()
            raise exc[0]
        if self._yielded:
            yielded = self._yielded.pop()
            # Cancelled before its task awaits the future, which is to be as well, with
            # what a scope of anyio's knows its own cancellation by.
            if _is_future(yielded) and yielded.cancel(*exc[0].args):
                return _mark(yielded, is_awaited=True)
        return self._context.run(self._job.throw, *exc)

    @override
    def close(self) -> None:
        if self._job is not None:
            self._job.close()

    @override
    def __await__(self) -> NoReturn:
        raise TypeError("only a task can go on with it")


def _mark(yielded: Any, *, is_awaited: bool) -> Any:
    if _is_future(yielded):
        yielded._asyncio_future_blocking = is_awaited
    return yielded


def _is_future(yielded: object) -> bool:
    # What asyncio knows them by.
    return getattr(yielded, "_asyncio_future_blocking", None) is not None


class _Strand:
    """A list of tasks that run one after the other, and how far they have come."""

    __slots__ = (
        "call",
        "failures",
        "group",
        "handle",
        "native",
        "outer",
        "position",
        "run",
        "task",
        "tasks",
        "trip",
    )

    def __init__(
        self,
        tasks: list[StockTask],
        native: asyncio.Task[Any] | None = None,
        outer: _Strand | None = None,
    ) -> None:
        self.tasks = tasks
        # The task of asyncio's that runs it, if that is not the job's own.
        self.native = native
        # The one to go on with after this one.
        self.outer = outer
        # The group whose tasks these are, if it is ours, and the task that has brought
        # it in, if it is another one.
        self.group: BackgroundTasks | None = None
        self.handle: BackgroundTask | None = None
        self.position = 0
        self.failures: list[Failure] = []
        # What is under way: a task on the event loop, or called within limits; a trip
        # to a worker thread; or a group whose tasks are on strands of their own, as
        # several run at once.
        self.task: BackgroundTask | None = None
        self.call: Call | None = None
        self.trip: _Trip | None = None
        self.run: _ConcurrentRun | None = None

    def handles(self) -> list[BackgroundTask]:
        """Lists what the group is watched by."""
        return [one for one in (self.group, self.handle) if one is not None]

    def reached(self) -> int:
        """Returns the position of the first task that has not been started."""
        by = self.trip or self.run or self
        return by.position


class Supervisor:
    """Owns the jobs of an application for as long as its lifespan goes on.

    Args:
        settings: What the middleware has been told.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running: set[Job] = set()
        self._waiting: deque[Job] = deque()
        # Jobs that have ended with tasks left, although they had not been stopped.
        self._broken_off: list[Job] = []
        # Jobs that have been stopped, and when they have to have cleaned up.
        self._stopped: list[Job] = []
        self._cleanup_end = math.inf
        # What `on_lost` has not been told yet.
        self._lost: list[BackgroundTask] = []
        # The calls left behind that the log has named.
        self._told: set[Call] = set()
        # What the next job begins as.
        self._ahead: _Ahead | None = None
        self._idle = anyio.Event()
        self._deadline: float | None = None
        self._closed = False
        self._reported = False

    async def __aenter__(self) -> Self:
        # On asyncio there is none: to leave it would let the event loop have its turn,
        # and hypercorn takes an error at start-up to be one only before that.
        self._children: anyio.abc.TaskGroup | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: asyncio.Task[Any] | None = None
        try:
            self._host = asyncio.current_task()
            self._here: Callable[[], object] = asyncio.get_running_loop
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._here = anyio.lowlevel.current_token
            self._children = anyio.create_task_group()
            await self._children.__aenter__()
        self._token = self._here()
        live.add(weakref.ref(self, live.discard))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancels what still runs, and reports what is lost."""
        try:
            await self._wind_up()
        finally:
            self._tell_lost()
            for call in self._calls:
                await call
            if self._ahead is not None:
                self._ahead.task.cancel()
            if self._children is not None:
                await self._children.__aexit__(None, None, None)

    def is_here(self) -> bool:
        """Whether the running event loop is the one whose jobs it owns."""
        try:
            return self._here() == self._token
        except RuntimeError:
            return False

    def is_cancelled(self) -> bool:
        """Whether the server is cancelling everything, and so the lifespan as well."""
        return self._host is not None and self._host.cancelling() > 0

    def accept(self, job: Job, *, at_once: bool = False) -> None:
        """Takes a job. Nothing can come in between, as nothing is awaited.

        Args:
            job: What to run.
            at_once: Whether its caller is going to wait for it. Then it takes its first
                step now, and if that is the last, both are spared the event loop.
        """
        if self._closed:
            job.end(broken_off=True)
            if self._reported:
                self._lose_now()
        elif len(self._running) < self._settings.max_running:
            self._start(job, at_once=at_once)
        else:
            job.context = copy_context()
            self._waiting.append(job)

    def ended(self, job: Job, *, broken_off: bool) -> None:
        """Hears of the end of a job, and starts the next."""
        self._running.discard(job)
        if broken_off:
            self._broken_off.append(job)
            if not (
                self._closed
                or self.is_cancelled()
                or anyio.current_effective_deadline() == -math.inf
            ):
                # An interrupt, or a cancellation that none but this job has met.
                self._lose_now()
        if self._waiting and len(self._running) < self._settings.max_running:
            self._start(self._waiting.popleft())
        if self._loop is None and not self._running:
            self._idle.set()

    async def drain(self) -> None:
        """Waits until all jobs have ended, or the time for that has; then stops them.

        To cancel it ends the waiting; called again, it goes on.
        """
        timeout = self._settings.drain_timeout
        if self._deadline is None:
            self._deadline = anyio.current_time() + timeout
            if self._running:
                limit = "" if timeout == math.inf else f", up to {timeout} s"
                message = "shutdown waits for background tasks%s: %s"
                logger.info(message, limit, self._names())
        while (left := self._deadline - anyio.current_time()) > 0:
            if await self._is_idle_within(min(left, _PROGRESS_SECONDS)):
                break
            if left > _PROGRESS_SECONDS:
                left -= _PROGRESS_SECONDS
                limit = "" if left == math.inf else f", up to {left:.0f} s"
                message = "shutdown still waits for background tasks%s: %s"
                logger.warning(message, limit, self._names())
        await self._wind_up()

    def groups(self) -> tuple[int, int]:
        """Returns how many jobs are running, and how many are waiting for them."""
        return len(self._running), len(self._waiting)

    def jobs(self) -> list[Job]:
        """Lists the jobs that have not ended; from any thread."""
        return [*self._running.copy(), *self._waiting.copy()]

    def _start(self, job: Job, *, at_once: bool = False) -> None:
        self._running.add(job)
        loop = self._loop
        if loop is None:
            context = job.context or copy_context()
            children = cast("anyio.abc.TaskGroup", self._children)
            context.run(children.start_soon, self._run_in_scope, job)
        elif not job.begins_here():
            # A task of asyncio's has half the costs of one in a task group of anyio's.
            job.native = loop.create_task(job.run(), context=job.context)
        elif at_once:
            self._begin(job)
        else:
            loop.call_soon(self._begin, job, context=job.context)
        # It holds the request, which holds the job.
        job.context = None

    def _begin(self, job: Job) -> None:
        loop: Any = self._loop
        if loop.get_task_factory() is not None:
            # It may begin by itself, or wrap what it is given.
            job.native = loop.create_task(job.run())
            return
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.is_idle:
            ahead = _Ahead(loop)
        job.native = ahead.task
        if ahead.ends(job.begin):
            # A task may have called the application, and so need another one.
            if self._ahead is not None:
                self._ahead.task.cancel()
            self._ahead = ahead

    def _lose_now(self) -> None:
        self._tell_lost()
        if not self._closed or not self._lost:
            return
        if self._loop is not None:
            self._calls.add(self._loop.create_task(self._call_on_lost()))
        else:
            children = cast("anyio.abc.TaskGroup", self._children)
            children.start_soon(self._call_on_lost)

    async def _run_in_scope(self, job: Job) -> None:
        with anyio.CancelScope() as job.cancel_scope:
            await job.run()

    async def _wind_up(self) -> None:
        """Stops the jobs that have not ended, and reports what is lost.

        To cancel it ends the waiting for them; called again, it goes on.
        """
        if not self._closed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._stopped = [*self._running, *waiting]
            self._cleanup_end = anyio.current_time() + _CLEANUP_SECONDS
            for job in self._stopped:
                job.stop()
            for job in waiting:
                job.end()
        if self.is_cancelled():
            # A server in a hurry might not wait for the report.
            end = anyio.current_time() + _CLEANUP_SECONDS / 3
            self._cleanup_end = min(self._cleanup_end, end)
        with anyio.CancelScope(shield=True):
            await self._is_idle_within(self._cleanup_end - anyio.current_time())
            pressure_end = self._cleanup_end + _PRESSURE_SECONDS
            while self._running and anyio.current_time() < pressure_end:
                for job in self._running:
                    job.press()
                await self._is_idle_within(0.05)
            self._tell_lost()
            self._reported = True
            await self._call_on_lost()

    async def _is_idle_within(self, seconds: float) -> bool:
        """Waits for the end of all jobs for so long, and returns whether that came."""
        end = anyio.current_time() + seconds
        while self._running and (left := end - anyio.current_time()) > 0:
            if self._loop is None:
                self._idle = anyio.Event()
                with anyio.move_on_after(left):
                    await self._idle.wait()
                continue
            natives = {job.native: job for job in self._running if job.native}
            if not natives:
                # They are about to take their first step.
                await asyncio.sleep(0)
                continue
            done, _ = await asyncio.wait(natives, timeout=left)
            for native in done:
                # One that is cancelled before its first step tells nothing by itself.
                if (job := natives[native]) in self._running:
                    job.end(broken_off=True)
        return not self._running

    def _names(self) -> str:
        return _listed(
            task.name for job in self.jobs() for task, _ in job.outstanding()
        )

    def _tell_lost(self) -> None:
        """Says in the log what jobs have left undone, and to the observers."""
        jobs = dict.fromkeys([*self._broken_off, *self._stopped])
        self._broken_off, self._stopped = [], []
        lost = [entry for job in jobs for entry in job.lose()]
        if lost:
            logger.error(
                "%d background tasks lost: %s",
                len(lost),
                ", ".join(f"{task.name!r} ({where})" for task, where in lost),
            )
        calls = self._settings.left_behind - self._told
        if calls and self._closed:
            self._told |= calls
            logger.warning(
                "threads of background tasks that have been given up go on, and may "
                "delay the exit: %s",
                _listed(call.task.name for call in calls),
            )
        for task, _ in lost:
            _tell(self._settings.observers, "lost", task)
            self._lost.append(task)

    async def _call_on_lost(self) -> None:
        lost, self._lost = self._lost, []
        if self._settings.on_lost is None or not lost:
            return
        try:
            result = self._settings.on_lost(lost)
            if isawaitable(result):
                await result
        except BaseException as exc:
            if _leaves(exc):
                raise
            logger.exception("on_lost failed")


def _enter(
    task: BackgroundTask, observers: tuple[Observer, ...]
) -> list[tuple[Observer, AbstractContextManager[object]]]:
    """Enters the observers of a task, none of whom can do any harm to it.

    Not a context manager, which would take longer than many a task.
    """
    entered: list[tuple[Observer, AbstractContextManager[object]]] = []
    for observer in observers:
        try:
            manager = observer(task)
            manager.__enter__()
        except BaseException as exc:
            _contain(exc, observer, task)
        else:
            entered.append((observer, manager))
    return entered


def _exit(
    task: BackgroundTask,
    entered: list[tuple[Observer, AbstractContextManager[object]]],
    cause: BaseException | None = None,
) -> None:
    """Tells the observers of the end of a task, and what it has raised."""
    kind = None if cause is None else type(cause)
    traceback = None if cause is None else cause.__traceback__
    for observer, manager in reversed(entered):
        try:
            manager.__exit__(kind, cause, traceback)
        except BaseException as exc:
            # To raise what the task has raised is what most of them do.
            if exc is not cause:
                _contain(exc, observer, task)


def _contain(exc: BaseException, observer: Observer, task: BackgroundTask) -> None:
    """Logs what an observer has raised, unless that ends everything."""
    if _is_interrupt(exc):
        raise exc
    message = "observer %r failed for background task %r"
    logger.error(message, observer, task.name, exc_info=exc)


@contextmanager
def _logged(task: BackgroundTask, request: dict[str, str]) -> Generator[None]:
    """Logs when a task starts, and when and how it ends."""
    extra = {"task_name": task.name, "task_id": task.id, **request}
    logger.debug("background task %r started", task.name, extra=extra)
    began = monotonic()
    how = "ended"
    try:
        yield
    except BaseException as exc:
        how = f"raised {type(exc).__name__}"
        raise
    finally:
        took = monotonic() - began
        message = "background task %r %s after %.3f s"
        logger.debug(message, task.name, how, took, extra=extra)


def _tell(observers: tuple[Observer, ...], what: str, task: BackgroundTask) -> None:
    """Calls the method of that name of each observer that has one."""
    for observer in observers:
        method = getattr(observer, what, None)
        if callable(method):
            try:
                method(task)
            except BaseException as exc:
                _contain(exc, observer, task)


def _listed(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name!r} ({count})" for name, count in counts.items())


def _plain_group(task: object) -> BackgroundTasks | StockTasks | None:
    """Returns the group that a task is or runs, if that runs its tasks as a list."""
    group = _group(task)
    return None if group is None or _overrides_call(group) else group


def _is_plain(task: object) -> TypeGuard[BackgroundTask]:
    """Whether a task is a plain function, of which nothing special is wanted."""
    return (
        type(task) is BackgroundTask
        and type(task.func) is FunctionType
        and task._options is None
    )


def _shares_thread(task: BackgroundTask) -> bool:
    """Whether a sync task can be called in one trip to a thread with others."""
    return not _overrides_call(task) and not _is_limited(task)


def _overrides_call(task: StockTask) -> bool:
    """Whether a task runs in a way of its own."""
    return type(task).__call__ not in _CALLS


def _singles(tasks: Iterable[StockTask]) -> Iterator[StockTask]:
    """Yields the single tasks that tasks are or hold."""
    for task in tasks:
        group = _plain_group(task)
        if group is None:
            yield task
        else:
            yield from _singles(group.tasks)


def give_up(tasks: list[StockTask], why: str, scope: Scope) -> list[StockTask]:
    """Names the tasks that are not to run; returns those declared `always=True`."""
    always: list[StockTask] = []
    names: list[str] = []
    _set_state(tasks, _CANCELLED)
    for task in map(_handle, _singles(tasks)):
        if _is_always(task):
            task._state = _PENDING
            always.append(task)
        else:
            names.append(repr(task.name))
    if names:
        logger.info(
            "background tasks not run, as %s: %s",
            why,
            ", ".join(names),
            extra=describe(scope),
        )
    return always


def has_ended() -> RuntimeError:
    """Returns what is raised when a task is added too late."""
    return RuntimeError(
        "the request has ended, and so have its tasks: add tasks before that"
    )


def plain(task: BackgroundTask) -> BackgroundTask:
    """Returns the task without a way of its own to run, for that has been gone already.

    What is set on the one is seen on the other.
    """
    if not _overrides_call(task):
        return task
    kind = BackgroundTasks if isinstance(task, BackgroundTasks) else BackgroundTask
    twin = kind.__new__(kind)
    twin.__dict__ = vars(task)
    return twin


def describe(scope: Scope) -> dict[str, str]:
    """Returns what log records tell of a request."""
    method = scope.get("method", "WEBSOCKET")
    return {"request_method": method, "request_path": scope.get("path", "")}


def _set_state(tasks: Iterable[StockTask], state: TaskState) -> None:
    """Sets the state of tasks, groups, and what they hold."""
    for task in tasks:
        group = _plain_group(task)
        for handle in task, group:
            if isinstance(handle, BackgroundTask):
                handle._state = state
        if group is not None:
            _set_state(group.tasks, state)


def _handle(task: StockTask) -> BackgroundTask:
    """Returns the task itself, or for what is none of ours, one of ours."""
    if isinstance(task, BackgroundTask) and not isinstance(task, BackgroundTasks):
        if "_options" not in vars(task):
            _prepare(task)
        return task
    handle = BackgroundTask.__new__(BackgroundTask)
    if type(task) is StockTask:
        handle.func, handle.args, handle.kwargs = task.func, task.args, task.kwargs
        handle.is_async = task.is_async
    else:
        handle.func, handle.args, handle.kwargs = task, (), {}
        handle.is_async = True
    _prepare(handle)
    return handle


class _Nothing:
    """What there is to wait for if there is nothing to wait for."""

    def __await__(self) -> Generator[None]:
        return _ENDED


# It has come to its end, and takes less time than a generator that has.
_ENDED = cast("Generator[None]", iter(()))
NOTHING = _Nothing()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _is_cancelled_error(exc: BaseException) -> bool:
    return isinstance(exc, anyio.get_cancelled_exc_class())
