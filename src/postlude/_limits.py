"""How a function is called within the limits that `task` has declared for it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from ._options import Options, Receipt, handing_over, limiter_here

if TYPE_CHECKING:
    from ._processes import Worker

T = TypeVar("T")

logger = logging.getLogger("postlude")

# As many processes as can do something at once.
_PROCESSES = os.cpu_count() or 1
_processes: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar(
    "postlude_processes"
)


class LimitedTask(Protocol):
    """What there is to call, and how."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_async: bool
    _options: Options | None
    # The call as a process takes it.
    _pickled: bytes | None
    # What hands it over to its engine, and what has come of that.
    _submit: Callable[[], Awaitable[Receipt]] | None
    _receipt: Receipt | None

    @property
    def name(self) -> str:
        """What messages call it."""
        ...


class Call:
    """One call of a function within limits.

    Args:
        task: What to call; its options are limits.
        threads: The limit of threads.
        left_behind: Where the call is from when it has been given up until its thread
            ends.
    """

    def __init__(
        self,
        task: LimitedTask,
        threads: anyio.CapacityLimiter,
        left_behind: set[Call],
    ) -> None:
        self.task = task
        # Whether a thread works on it, even if nobody waits for that any more.
        self.is_in_thread = False
        self._options = cast("Options", task._options)
        self._threads = threads
        self._left_behind = left_behind
        self._cancelled = anyio.get_cancelled_exc_class()
        # What threads touch as well is under the lock.
        self._lock = Lock()
        self._is_given_up = False
        # What the thread has come to: what was returned, or else raised.
        self._outcome: tuple[object, BaseException | None] | None = None
        self._worker: Worker | None = None
        self._is_running = False

    async def complete(self) -> None:
        """Makes the call, or hands it over to the engine that is to make it.

        Raises:
            TimeoutError: If it takes too long. A thread goes on all the same.
            BaseException: What the function raises.
        """
        if self._options.engine is not None:
            task = self.task
            submit = task._submit or handing_over(task.func, task.args, task.kwargs)
            task._receipt = await submit()
            return
        limiter = self._options.limiter
        limiters = [] if limiter is None else [limiter.here()]
        if self._options.process:
            limiters.append(limiter_here(_processes, _PROCESSES))
            call = self._call_in_process
        elif self.task.is_async:
            call = self._call_here
        else:
            limiters.append(self._threads)
            call = self._call_in_thread
        async with self._holding(limiters):
            await call()

    async def _call_here(self) -> None:
        task = self.task
        with anyio.move_on_after(self._options.timeout) as scope:
            await task.func(*task.args, **task.kwargs)
        self._check(scope)

    def _check(self, scope: anyio.CancelScope, addition: str = "") -> None:
        if scope.cancelled_caught:
            raise TimeoutError(f"timed out after {self._options.timeout} s{addition}")

    @asynccontextmanager
    async def _holding(
        self, limiters: list[anyio.CapacityLimiter]
    ) -> AsyncGenerator[None]:
        """Takes its part of what is limited, until the call, or its thread, ends."""
        held: list[anyio.CapacityLimiter] = []

        def release() -> None:
            while held:
                held.pop().release_on_behalf_of(self)

        self._release_from_thread = _from_thread(release)
        try:
            for limiter in limiters:
                await limiter.acquire_on_behalf_of(self)
                held.append(limiter)
            yield
        finally:
            if not self._goes_on():
                release()

    def _goes_on(self) -> bool:
        """Gives up what has not ended; returns whether a thread cannot be stopped."""
        with self._lock:
            self._is_given_up = True
            if self.is_in_thread:
                self._left_behind.add(self)
                return True
            if self._worker is not None and self._is_running:
                self._worker.kill()
            elif self._worker is not None:
                self._worker.give_back()
        if self._outcome is not None:
            self._discard(*self._outcome)
        return False

    async def _call_in_thread(self) -> None:
        # As long as the thread works, nothing but the time limit ends the waiting.
        with anyio.move_on_after(self._options.timeout, shield=True) as scope:
            await _in_thread(self._work)
            result, failure = cast("tuple[Any, BaseException | None]", self._outcome)
            self._outcome = None
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure
            scope.shield = False
            if inspect.isawaitable(result):
                await result
        self._check(scope, "; its thread goes on" if self.is_in_thread else "")

    def _work(self) -> None:
        with self._lock:
            if self._is_given_up:
                return
            self.is_in_thread = True
        result: object = None
        failure: BaseException | None = None
        try:
            result = self.task.func(*self.task.args, **self.task.kwargs)
        except BaseException as exc:
            failure = exc
        with self._lock:
            self.is_in_thread = False
            if not self._is_given_up:
                self._outcome = result, failure
                return
        self._left_behind.discard(self)
        self._release_from_thread()
        self._discard(result, failure)

    def _discard(self, result: object, failure: BaseException | None) -> None:
        """Tells what nobody waits for any more."""
        if inspect.iscoroutine(result):
            result.close()
        # A function may ask whether it has been cancelled, and end by that.
        if failure is not None and not isinstance(failure, self._cancelled):
            name = self.task.name
            logger.warning(
                "background task %r failed after it had been given up",
                name,
                exc_info=failure,
                extra={"task_name": name},
            )

    async def _call_in_process(self) -> None:
        failure: Exception | None = None
        # What its start takes is no fault of the function.
        with anyio.CancelScope(shield=True):
            failure = await _in_thread(self._take_worker)
        with anyio.move_on_after(self._options.timeout) as scope:
            if failure is None:
                failure = await _in_thread(self._run)
        self._check(scope)
        if failure is not None:
            raise failure

    def _take_worker(self) -> Exception | None:
        """Hands the call to a process; returns what failed."""
        from . import _processes  # noqa: PLC0415 - few have need of processes

        task, pickled = self.task, self.task._pickled
        if pickled is None:
            name = task.name
            pickled = _processes.pickle_call(task.func, task.args, task.kwargs, name)
        worker, failure = _processes.Worker.take(pickled)
        with self._lock:
            if failure is None and not self._is_given_up:
                self._worker = worker
                return None
        worker.give_back()
        return failure

    def _run(self) -> Exception | None:
        """Has the process make the call; returns what failed."""
        with self._lock:
            if self._is_given_up:
                return None
            self._is_running = True
        worker = cast("Worker", self._worker)
        failure = worker.run()
        with self._lock:
            self._worker = None
            is_killed = self._is_given_up
        if is_killed:
            worker.dismiss()
        else:
            worker.give_back()
        return failure


def _from_thread(callback: Callable[[], object]) -> Callable[[], object]:
    """Returns what has the running event loop call back, unless that has ended."""
    try:
        schedule: Any = asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio  # noqa: PLC0415 - only who runs on Trio has it

        schedule = trio.lowlevel.current_trio_token().run_sync_soon

    def call() -> None:
        with suppress(RuntimeError):
            schedule(callback)

    return call


async def _in_thread(func: Callable[..., T], *args: object) -> T:
    """Calls something that blocks, in a thread of its own, that may be left behind."""
    limiter = anyio.CapacityLimiter(1)
    # In a list, as Trio refuses what returns a coroutine.
    [result] = await anyio.to_thread.run_sync(
        lambda: [func(*args)], abandon_on_cancel=True, limiter=limiter
    )
    return result
