"""How an engine's client is called: within a time limit, and in few threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from functools import partial
from inspect import CO_COROUTINE, isawaitable
from threading import Lock
from types import CodeType
from typing import Any, Self, cast

import anyio
import anyio.to_thread
from starlette.background import BackgroundTask as StockTask
from typing_extensions import override

from postlude import _tasks
from postlude._limits import _from_thread
from postlude._options import check_timeout, event_loop

logger = logging.getLogger("postlude")


class EngineError(Exception):
    """Raised when a task has not been handed over, or may not have been.

    .. versionadded:: 0.1.0
    """


class BrokerUnreachable(EngineError, ConnectionError):
    """Raised when there is no connection, or no place left to wait for one.

    A client that lost its connection in the middle does not always tell that apart: the
    task may have arrived then.

    .. versionadded:: 0.1.0
    """


class Refused(EngineError):
    """Raised when the engine, or its client, did not take the task; the cause says why.

    .. versionadded:: 0.1.0
    """


class NotSerialisable(EngineError, TypeError):
    """Raised when a task is added with arguments that its engine cannot send.

    .. versionadded:: 0.1.0
    """


class OutcomeUnknown(EngineError, TimeoutError):
    """Raised when the engine has not answered in time: the task may still run.

    .. versionadded:: 0.1.0
    """


class Client:
    """Calls what hands tasks over to an engine, as every adapter has to.

    A call that takes too long is given up. If it is async, it is cancelled, and again
    each time that it has gone on for as long. If it blocks, its thread goes on and
    keeps its place until it ends, so that a dead broker cannot fill the process with
    threads. Once all places are held like that, calls fail at once. As the exit of the
    process waits for such threads, what is called should have a time limit of its own,
    too.

    Example:
        .. code-block:: python

            import anyio

            from postlude.engines import Client


            def send(task: str) -> str:
                return f"id of {task}"


            async def main() -> None:
                client = Client("spool", timeout=2)
                client.open()
                assert await client.call("resize", send, "resize") == "id of resize"
                client.close()


            anyio.run(main)

    Args:
        engine: The name of the engine.
        timeout: How long a call may take, in seconds, the waiting for a thread
            included; `None` for no limit.
        threads: How many threads those that block may hold at once, in an event loop;
            and how many of those given up there may be, in all.
        unreachable: What is raised when there is no connection, beside `OSError`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        engine: str,
        *,
        timeout: float | None = 2,
        threads: int = 10,
        unreachable: tuple[type[Exception], ...] = (),
    ) -> None:
        _check(engine, timeout, threads)
        self._engine = engine
        self._timeout = timeout
        self._threads = threads
        self._unreachable: tuple[type[Exception], ...] = (OSError, *unreachable)
        # The event loops that it is open in.
        self._open_in: dict[object, _Here] = {}
        # How many threads go on with calls that have been given up. Event loops come
        # and go meanwhile, so that it is counted by the threads.
        self._left_behind = 0
        self._lock = Lock()

    def open(self) -> None:
        """Allows calls in the running event loop, until it is closed as often."""
        loop = event_loop()
        for other in [*self._open_in]:
            if isinstance(other, asyncio.AbstractEventLoop) and other.is_closed():
                # It can no longer be closed there.
                self._open_in.pop(other, None)
        if loop not in self._open_in:
            self._open_in[loop] = _Here(self._threads, self._timeout)
        self._open_in[loop].opened += 1

    def close(self) -> None:
        """Ends what `open` has begun.

        Raises:
            RuntimeError: If it is not open in this event loop.
        """
        here = self._here()
        here.opened -= 1
        if not here.opened:
            del self._open_in[event_loop()]

    def check_open(self) -> None:
        """Refuses to be used outside the application's lifespan; from any thread.

        Within `postlude.testing.capture_tasks`, by which nothing is sent, it allows it.

        Raises:
            RuntimeError: If it is not open in any event loop.
        """
        if not self._open_in and _tasks.keep is None:
            raise self._not_open()

    async def call(self, task: str, send: Callable[..., Any], *args: Any) -> Any:
        """Calls what sends a task: awaits it if it is async, or else in a thread.

        Args:
            task: What messages call the task.
            send: What to call.
            *args: Arguments to call it with.

        Returns:
            What it returns; if that is awaitable, what comes of it.

        Raises:
            RuntimeError: If it is not open in this event loop.
            BrokerUnreachable: If it raises `OSError` or what counts as that, or finds
                no thread in time.
            OutcomeUnknown: If it takes too long, or raises `TimeoutError`, be it the
                client's own class of that name.
            Refused: If it raises anything else, but for an `EngineError`.
        """
        here = self._here()
        attempt = _Attempt(self, here, task, partial(send, *args))
        with here.limited() as limit:
            try:
                if _is_async(send):
                    attempt.is_begun = True
                    result = await send(*args)
                else:
                    result = await attempt.in_thread()
                if type(result) is str:  # as most
                    return result
                return await result if isawaitable(result) else result
            except EngineError:
                raise
            # A SystemExit would end the event loop.
            except (Exception, SystemExit) as exc:
                # Some clients make an error of their own of the cancellation.
                is_late = limit.cancel_called or is_timeout(exc)
                raise self._error(task, exc, is_late=is_late) from exc
        if attempt.is_begun:
            raise OutcomeUnknown(
                f"{task} may still run: {self._engine} did not answer within "
                f"{self._timeout} s"
            )
        raise BrokerUnreachable(
            f"{self._engine} is out of reach for {task}: all {self._threads} threads "
            f"waited for it for {self._timeout} s"
        )

    def _here(self) -> _Here:
        here = self._open_in.get(event_loop())
        if here is None:
            raise self._not_open()
        return here

    def _not_open(self) -> RuntimeError:
        return RuntimeError(
            f"the engine {self._engine!r} is not open: write `async with engine:` "
            "around what the application's lifespan yields to"
        )

    def _error(self, task: str, cause: BaseException, *, is_late: bool) -> EngineError:
        told = f"{type(cause).__name__}: {cause}"
        if is_late:
            return OutcomeUnknown(
                f"{task} may still run: {self._engine} did not answer in time: {told}"
            )
        if isinstance(cause, self._unreachable):
            return BrokerUnreachable(
                f"{self._engine} is out of reach for {task}: {told}"
            )
        return Refused(f"{self._engine} did not take {task}: {told}")


class _Here:
    """What a client has in an event loop.

    Args:
        threads: How many it may have at once.
        timeout: How long a call may take, in seconds.
    """

    def __init__(self, threads: int, timeout: float | None) -> None:
        # How often it has been opened.
        self.opened = 0
        self.places = anyio.CapacityLimiter(threads)
        loop = event_loop()
        self.limited: Callable[[], _TimeLimit | anyio.CancelScope]
        if isinstance(loop, asyncio.AbstractEventLoop) and timeout is not None:
            self.limited = partial(_TimeLimit, _Timer(loop, timeout))
        else:
            self.limited = partial(anyio.move_on_after, timeout)


class _TimeLimit:
    """Cancels what takes too long, as `asyncio.timeout()` does.

    That costs more than a short call, and so does a scope of AnyIO's.

    Args:
        timer: What tells when time is up.
    """

    def __init__(self, timer: _Timer) -> None:
        self._timer = timer
        self._cancels = 0

    @property
    def cancel_called(self) -> bool:
        """Whether time is up."""
        return self._cancels > 0

    def cancel(self) -> None:
        """Cancels what is going on, which does not always end by that."""
        self._cancels += 1
        self._task.cancel()

    def __enter__(self) -> Self:
        # There is always one.
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        # Somebody else may cancel it, too.
        self._others = self._task.cancelling()
        self._timer.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        self._timer.remove(self)
        if not self._cancels:
            return False
        for _ in range(self._cancels):
            self._task.uncancel()
        is_cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
        return is_cancelled and self._task.cancelling() <= self._others


class _Timer:
    """Cancels what takes too long; one for all calls in an event loop of asyncio's.

    Args:
        loop: The event loop.
        timeout: How long it may take, in seconds. What goes on all the same is
            cancelled again each time that so much has passed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self._loop = loop
        self._timeout = timeout
        # In the order in which their time is up.
        self._deadlines: dict[_TimeLimit, float] = {}
        self._handle: asyncio.TimerHandle | None = None

    def add(self, limit: _TimeLimit) -> None:
        """Makes its time begin."""
        self._deadlines[limit] = self._loop.time() + self._timeout
        if self._handle is None:
            self._start()

    def remove(self, limit: _TimeLimit) -> None:
        """Has nothing to do with it any more."""
        del self._deadlines[limit]

    def _start(self) -> None:
        deadline = next(iter(self._deadlines.values()))
        # In no context, as that of a request would be kept alive.
        self._handle = self._loop.call_at(deadline, self._check, context=Context())

    def _check(self) -> None:
        now = self._loop.time()
        for limit, deadline in [*self._deadlines.items()]:
            if deadline > now:
                break
            limit.cancel()
            # Once more, should it go on.
            del self._deadlines[limit]
            self._deadlines[limit] = now + self._timeout
        self._handle = None
        if self._deadlines:
            self._start()


class _Unlimited(anyio.CapacityLimiter):
    """For AnyIO, which would give a place back while its thread goes on.

    One of its own without a limit would cost a round of the event loop.
    """

    def __new__(cls) -> Self:
        return object.__new__(cls)

    @override
    async def __aenter__(self) -> None: ...

    @override
    async def __aexit__(self, *_: object) -> None: ...

    # Trio calls these instead.

    @override
    async def acquire_on_behalf_of(self, borrower: object) -> None: ...

    @override
    def release_on_behalf_of(self, borrower: object) -> None: ...


_unlimited = _Unlimited()


class _Attempt:
    """One call in a thread, which may be left behind.

    Args:
        client: Whose call it is.
        here: What that has in the running event loop.
        task: What messages call the task.
        send: What to call.
    """

    def __init__(
        self, client: Client, here: _Here, task: str, send: Callable[[], Any]
    ) -> None:
        self.is_begun = False
        self._client = client
        self._here = here
        self._task = task
        self._send = send
        self._is_in_thread = False
        self._is_given_up = False

    async def in_thread(self) -> Any:
        """Makes the call, as soon as it has a place."""
        client = self._client
        if client._left_behind >= client._threads:
            raise BrokerUnreachable(
                f"{client._engine} is out of reach for {self._task}: all "
                f"{client._threads} threads wait for it, and have been given up"
            )
        places = self._here.places
        try:
            # It spares the event loop a round.
            places.acquire_on_behalf_of_nowait(self)
        except Exception:
            # There is none; on Trio older versions of AnyIO raise something else.
            await places.acquire_on_behalf_of(self)
        try:
            [result] = await anyio.to_thread.run_sync(
                self._work, abandon_on_cancel=True, limiter=_unlimited
            )
            return result
        finally:
            with client._lock:
                self._is_given_up = True
                goes_on = self._is_in_thread
                if goes_on:
                    client._left_behind += 1
                    release = partial(places.release_on_behalf_of, self)
                    self._release_from_thread = _from_thread(release)
            if not goes_on:
                places.release_on_behalf_of(self)

    def _work(self) -> list[Any]:
        """Makes the call; returns a list, as Trio refuses what returns a coroutine."""
        lock = self._client._lock
        with lock:
            if self._is_given_up:
                return [None]
            self.is_begun = self._is_in_thread = True
        failure: BaseException | None = None
        try:
            return [self._send()]
        except BaseException as exc:
            failure = exc
            raise
        finally:
            with lock:
                self._is_in_thread = False
                is_left_behind = self._is_given_up
            if is_left_behind:
                # The only one left to say what has become of it.
                kind = type(failure).__name__
                how = f"failed with {kind}" if failure else "has come to its end"
                message = "the call of %r for %r %s after it had been given up"
                logger.warning(message, self._client._engine, self._task, how)
                with lock:
                    self._client._left_behind -= 1
                self._release_from_thread()


def _is_async(send: Any) -> bool:
    # The code of a function tells at once what takes Starlette long to find.
    code = getattr(send, "__code__", None)
    if type(code) is CodeType:
        return code.co_flags & CO_COROUTINE != 0
    return StockTask(send).is_async


def is_timeout(exc: BaseException | None) -> bool:
    """Whether it says that time has run out; Redis' does not inherit from Python's."""
    return any(kind.__name__ == "TimeoutError" for kind in type(exc).__mro__)


def _check(engine: Any, timeout: Any, threads: Any) -> None:
    if not isinstance(engine, str) or not engine:
        raise TypeError(f"the name of an engine must be a string, not {engine!r}")
    check_timeout(timeout)
    if not isinstance(threads, int) or isinstance(threads, bool):
        raise TypeError(f"threads must be an int, not {threads!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads!r}")
