"""Handing tasks over to Taskiq.

Needs `taskiq`, and the package of a broker, such as that for Redis:
`pip install 'postlude[taskiq]' taskiq-redis`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, NamedTuple, Self

import anyio
from starlette.background import BackgroundTask as StockTask
from taskiq import (
    AsyncBroker,
    AsyncTaskiqDecoratedTask,
    Context,
    TaskiqDepends,
    TaskiqEvents,
    TaskiqMessage,
    TaskiqState,
)
from taskiq.formatters.proxy_formatter import ProxyFormatter
from taskiq.labels import prepare_label
from taskiq.serializers import JSONSerializer
from taskiq.utils import maybe_awaitable
from typing_extensions import override

from ._adapter import Adapter, Headers, Restore, connection_errors_of_redis, is_plain
from ._client import BrokerUnreachable, is_timeout

__all__ = ["TaskiqEngine"]

_logger = logging.getLogger("postlude")

_SHUTDOWN_SECONDS = 10

# The label that has the headers, and the parameter that a worker gives them to.
_LABEL = "postlude_headers"
_PARAMETER = "_postlude_headers"


class _Call(NamedTuple):
    """A call, and what makes a message of it, each time one of its own."""

    name: str
    make: Callable[[], TaskiqMessage]


class _Home:
    """The event loop that the broker lives in, while it is open there."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.process = 0
        self.opened = 0


def _headers_of(context: Annotated[Context, TaskiqDepends()]) -> dict[str, str]:
    headers: dict[str, str] = json.loads(context.message.labels.get(_LABEL, "{}"))
    return headers


class TaskiqEngine(Adapter):
    """Hands tasks over to the workers of a Taskiq broker.

    Each function is a Taskiq task under its dotted name. The engine starts the broker
    and shuts it down. The broker belongs to the event loop that opens the engine first;
    hand-overs from others go there. In a worker the engine is open.

    Example:
        .. code-block:: python

            import anyio
            from taskiq import InMemoryBroker

            from postlude import task
            from postlude.engines import enqueue
            from postlude.engines.taskiq import TaskiqEngine

            broker = InMemoryBroker()
            engine = TaskiqEngine(broker)


            @task(engine=engine.options(retry_on_error=True, max_retries=3))
            async def resize(photo: int) -> int:
                return 2 * photo


            async def main() -> None:
                async with engine:
                    receipt = await enqueue(resize, 21)
                    await broker.wait_all()
                    result = await broker.result_backend.get_result(receipt.id)
                    assert result.return_value == 42


            anyio.run(main)

    Args:
        broker: The Taskiq broker.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id.
        restore: Called in the worker with these headers. Returns a context manager that
            is entered around the function.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        broker: AsyncBroker,
        *,
        timeout: float | None = 2,
        headers: Headers | None = None,
        restore: Restore | None = None,
    ) -> None:
        if not isinstance(broker, AsyncBroker):
            raise TypeError(f"broker must be a taskiq.AsyncBroker, not {broker!r}")
        super().__init__(
            "taskiq",
            timeout=timeout,
            threads=1,  # it needs none
            headers=headers,
            restore=restore,
            unreachable=connection_errors_of_redis(),
        )
        self._broker = broker
        self._home = _Home()
        broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, self._open_in_worker)

    def options(self, **labels: Any) -> Self:
        """Returns the same engine, with labels for what is declared with it.

        Args:
            **labels: What the broker and the middlewares of Taskiq look for:
                `queue_name`, `timeout`, `retry_on_error`, `schedule` and others.

        Raises:
            TypeError: If it is no label, but what Taskiq calls the function.
        """
        for label in labels:
            if label in ("func", "task_name"):
                raise TypeError(
                    f"{label}= is not for postlude: the worker finds the function by "
                    "its own name"
                )
        return self._with(labels)

    def native(self, func: Callable[..., Any]) -> AsyncTaskiqDecoratedTask[Any, Any]:
        """Returns the Taskiq task of a function, for `kicker()`, `schedule_by_time()`.

        Raises:
            LookupError: If the function is not declared for this engine.
        """
        native: AsyncTaskiqDecoratedTask[Any, Any] = self._task(func)
        return native

    @override
    def register(self, func: Callable[..., Any], name: str) -> None:
        """Makes a Taskiq task of a function, in place of an earlier one of that name.

        Raises:
            NameError: If Taskiq, which converts arguments to their annotations, cannot
                evaluate these.
        """
        super().register(func, name)

        # Taskiq renames what it is given.
        @functools.wraps(func)
        def run_here(*args: Any, **kwargs: Any) -> Any:
            with self._restored(kwargs.pop(_PARAMETER, {})):
                return func(*args, **kwargs)

        @functools.wraps(func)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with self._restored(kwargs.pop(_PARAMETER, {})):
                return await func(*args, **kwargs)

        run: Any = run_async if StockTask(func).is_async else run_here
        if self._restore is not None:
            run.__signature__ = _with_headers(inspect.signature(func, eval_str=True))
        self._tasks[name] = self._broker.register_task(run, name, **self._options)

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> _Call:
        """Serialises a call as the broker will.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        labels = dict(self._tasks[name].labels)
        # Classes, which Taskiq looks up in the worker.
        labels.pop("types_of_exceptions", None)
        if headers:
            labels[_LABEL] = json.dumps(dict(headers))
        prepared = {label: prepare_label(value) for label, value in labels.items()}
        make = functools.partial(
            TaskiqMessage,
            task_id="",
            task_name=name,
            labels={label: value for label, (value, _) in prepared.items()},
            labels_types={label: kind for label, (_, kind) in prepared.items()},
            args=list(args),
            kwargs={**kwargs},
        )
        formatter = self._broker.formatter
        if (
            is_plain(args, kwargs)
            and type(formatter) is ProxyFormatter
            and type(self._broker.serializer) is JSONSerializer
        ):
            self._client.check_open()
            return _Call(name, make)
        body = self._serialised(name, lambda: formatter.dumps(make()).message)
        return _Call(name, functools.partial(formatter.loads, body))

    async def _send(self, call: _Call) -> str:
        loop = self._home.loop
        if loop is asyncio.get_running_loop():
            return await self._kick(call)
        if loop is None or loop.is_closed():
            raise BrokerUnreachable(
                f"taskiq is out of reach for {call.name}: the event loop that opened "
                "the engine first has closed it, or is closed itself"
            )
        kicked = asyncio.run_coroutine_threadsafe(self._kick(call), loop)
        future = asyncio.wrap_future(kicked)
        try:
            await asyncio.wait([future])
        finally:
            future.cancel()
        if future.cancelled():
            raise TimeoutError("the event loop of the broker has ended")
        return future.result()

    async def _kick(self, call: _Call) -> str:
        """Does what a kicker of Taskiq does, but for keywords, which may be any."""
        broker = self._broker
        message = call.make()
        message.task_id = broker.id_generator()
        for middleware in broker.middlewares:
            message = await maybe_awaitable(middleware.pre_send(message))
        await broker.kick(broker.formatter.dumps(message))
        for middleware in reversed(broker.middlewares):
            try:
                await maybe_awaitable(middleware.post_send(message))
            except Exception:
                # The broker has the task, so that to raise would say what is not so.
                _logger.exception(
                    "post_send of %r failed for %r", middleware, call.name
                )
        return message.task_id

    @override
    async def __aenter__(self) -> Self:
        """Starts the broker, unless it is open in this process.

        Raises:
            BrokerUnreachable: If the broker is not there, or does not answer within
                the time that its own client allows.
            RuntimeError: If there is no event loop of asyncio's, or if this process was
                forked from that of the broker.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError("Taskiq needs asyncio, and this is Trio") from None
        home = self._home
        is_left = home.loop is not None and home.loop.is_closed()
        if is_left:
            # It ended without closing the engine.
            home.loop, home.opened = None, 0
        if home.loop is not None and home.process != os.getpid():
            raise RuntimeError(
                "the Taskiq broker is open in the process that this one was forked "
                "from: open it after the fork, or hand over there"
            )
        self._client.open()
        if home.loop is None:
            home.loop, home.process = loop, os.getpid()
            try:
                if is_left and not self._broker.is_worker_process:
                    await self._drop_connections()
                await self._start()
            except BaseException:
                home.loop = None
                self._client.close()
                raise
        if home.loop is loop:
            home.opened += 1
        return self

    async def _drop_connections(self) -> None:
        """Shuts down what an event loop that is closed has left."""
        with suppress(Exception), anyio.move_on_after(_SHUTDOWN_SECONDS):
            await self._broker.shutdown()

    async def _start(self) -> None:
        # That of a worker is there, and starts what opens the engine.
        if not self._broker.is_worker_process:
            try:
                await self._broker.startup()
            except Exception as exc:
                if not (is_timeout(exc) or isinstance(exc, self._client._unreachable)):
                    raise
                told = f"{type(exc).__name__}: {exc}"
                raise BrokerUnreachable(f"taskiq cannot start: {told}") from exc

    @override
    async def __aexit__(self, *_: object) -> None:
        self._client.close()
        home = self._home
        if home.loop is asyncio.get_running_loop():
            home.opened -= 1
            if not home.opened:
                try:
                    # Also if the lifespan is cancelled, in which nothing else waits.
                    with anyio.move_on_after(_SHUTDOWN_SECONDS, shield=True) as scope:
                        await self._broker.shutdown()
                finally:
                    home.loop = None
                if scope.cancelled_caught:
                    message = "the Taskiq broker did not shut down within %s s"
                    _logger.warning(message, _SHUTDOWN_SECONDS)

    async def _open_in_worker(self, _: TaskiqState) -> None:
        if self._broker.is_worker_process:
            await self.__aenter__()


def _with_headers(signature: inspect.Signature) -> inspect.Signature:
    """Adds the parameter by which the function is given the headers."""
    parameters = [*signature.parameters.values()]
    has_any = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(
        len(parameters) - bool(has_any),
        inspect.Parameter(
            _PARAMETER,
            inspect.Parameter.KEYWORD_ONLY,
            default=TaskiqDepends(_headers_of),
        ),
    )
    return signature.replace(parameters=parameters)
