"""Handing tasks over to Dramatiq.

Needs `dramatiq`: `pip install 'postlude[dramatiq]'`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple, Self, cast

import dramatiq
from dramatiq.errors import ConnectionClosed, ConnectionFailed
from dramatiq.middleware import AsyncIO, CurrentMessage, Middleware
from starlette.background import BackgroundTask as StockTask

from ._adapter import Adapter, Headers, Restore, connection_errors_of_redis, is_plain
from ._client import EngineError

__all__ = ["DramatiqEngine"]

_REFUSED = {
    "fn": "the function is the one that is declared",
    "actor_name": "the worker finds the function by its own name",
    "broker": "the broker is that of the engine",
    **dict.fromkeys(
        ["args", "kwargs", "delay", "broker_priority"],
        "it is for one message: write engine.native(func).send_with_options(...)",
    ),
}


# What carries plain arguments.
_ENCODERS = {dramatiq.JSONEncoder, dramatiq.PickleEncoder}


class _Call(NamedTuple):
    """A call whose arguments are serialised, in a message, unless they need not be."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]
    body: bytes | None


class _Actor(dramatiq.Actor[..., Any]):
    """An actor whose function may have a parameter `self`."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if "self" in kwargs:
            return self.fn(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class DramatiqEngine(Adapter):
    """Hands tasks over to the workers of a Dramatiq broker.

    Each function is an actor under its dotted name.

    Example:
        .. code-block:: python

            from dramatiq.brokers.redis import RedisBroker

            from postlude import task
            from postlude.engines.dramatiq import DramatiqEngine

            broker = RedisBroker(url="redis://localhost")
            engine = DramatiqEngine(broker)


            @task(engine=engine.options(queue_name="images", max_retries=3))
            def resize(photo: int) -> None: ...


            assert engine.native(resize).queue_name == "images"

    Args:
        broker: The broker, which stays yours to configure and to close.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
            With RabbitMQ each has a connection.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id.
        restore: Called in the worker with these headers. Returns a context manager that
            is entered around the function.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small, or a `RabbitmqBroker` does not wait for
            RabbitMQ's confirmation.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        broker: dramatiq.Broker,
        *,
        timeout: float | None = 2,
        threads: int = 10,
        headers: Headers | None = None,
        restore: Restore | None = None,
    ) -> None:
        if not isinstance(broker, dramatiq.Broker):
            raise TypeError(f"broker must be a dramatiq.Broker, not {broker!r}")
        # What a broker uses has been imported.
        rabbitmq: Any = sys.modules.get("dramatiq.brokers.rabbitmq")
        is_rabbitmq = rabbitmq and isinstance(broker, rabbitmq.RabbitmqBroker)
        if is_rabbitmq and not cast("Any", broker).confirm_delivery:
            raise ValueError(
                "a RabbitmqBroker needs confirm_delivery=True: without it, what is "
                "sent into a broken connection is lost, and no error tells"
            )
        super().__init__(
            "dramatiq",
            timeout=timeout,
            threads=threads,
            headers=headers,
            restore=restore,
            unreachable=(
                ConnectionClosed,
                ConnectionFailed,
                *connection_errors_of_redis(),
            ),
        )
        # Its types are not complete.
        self._broker: Any = broker
        self._connections = _Connections(broker) if is_rabbitmq else None

    def options(self, **native: Any) -> Self:
        """Returns the same engine, with options for what is declared with it.

        Args:
            **native: What `dramatiq.actor` takes: `queue_name`, `max_retries`,
                `time_limit` in milliseconds, and others. Which there are depends on
                the broker's middleware, so that a wrong one is told at declaration.

        Raises:
            TypeError: If it is something for a single message, such as `delay`, or if
                the worker would not find the function.
        """
        for option in native:
            if option in _REFUSED:
                raise TypeError(f"{option}= is no option here: {_REFUSED[option]}")
        return self._with(native)

    def native(self, func: Callable[..., Any]) -> dramatiq.Actor[..., Any]:
        """Returns the actor of a function, for `send_with_options()`, pipelines.

        Raises:
            LookupError: If the function is not declared for this engine.
        """
        actor: dramatiq.Actor[..., Any] = self._task(func)
        return actor

    def register(self, func: Callable[..., Any], name: str) -> None:
        """Makes an actor of a function, in place of an earlier one of that name.

        Raises:
            ValueError: If the broker lacks the middleware that async functions need,
                or `restore`, or an option.
        """
        if StockTask(func).is_async:
            self._check_has(AsyncIO, "async functions")
        if self._restore is not None:
            self._check_has(CurrentMessage, "restore=")
        # Dramatiq would refuse the newer one.
        self._broker.actors.pop(name, None)
        options: dict[str, Any] = {"actor_class": _Actor, **self._options}
        declare = dramatiq.actor(broker=self._broker, actor_name=name, **options)
        run = func if self._restore is None else self._restoring(func)
        self._tasks[name] = declare(run)
        super().register(func, name)

    def _check_has(self, middleware: type[Middleware], what: str) -> None:
        if not any(isinstance(one, middleware) for one in self._broker.middleware):
            name = middleware.__name__
            raise ValueError(
                f"{what} need the middleware {name}: write "
                f"broker.add_middleware(dramatiq.middleware.{name}()) before"
            )

    def _restoring(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that has what `restore` returns around it."""

        @functools.wraps(func)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._restored(_headers()):
                return func(*args, **kwargs)

        @functools.wraps(func)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with self._restored(_headers()):
                return await func(*args, **kwargs)

        return run_async if StockTask(func).is_async else run

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> _Call:
        """Serialises a call with Dramatiq's encoder.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        options = {"postlude": dict(headers)} if headers else {}
        if is_plain(args, kwargs) and type(dramatiq.get_encoder()) in _ENCODERS:
            self._client.check_open()
            return _Call(name, args, {**kwargs}, options, None)
        actor = self._tasks[name]
        message = actor.message_with_options(args=args, kwargs=kwargs)
        return _Call(name, (), {}, options, self._serialised(name, message.encode))

    def _send(self, call: _Call) -> str:
        args, kwargs = call.args, call.kwargs
        if call.body is not None:
            decoded = cast("Any", dramatiq.Message).decode(call.body)
            args, kwargs = decoded.args, decoded.kwargs
        actor = self._tasks[call.name]
        # It gets an id and a time of its own, and options that middleware may change.
        message: dramatiq.Message[Any] = actor.message_with_options(
            args=args, kwargs={**kwargs}, **call.options
        )
        if self._connections:
            self._connections.lend(self._broker.enqueue, message)
        else:
            self._broker.enqueue(message)
        return message.message_id

    async def __aenter__(self) -> Self:
        if self._connections:
            self._connections.count(1)
        return await super().__aenter__()

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            connections = self._connections
            # Another lifespan goes on with them.
            if connections and not connections.count(-1):
                with suppress(EngineError):
                    await self._client.call("its connections", connections.close)
        finally:
            await super().__aexit__(*exc_info)


class _Connections:
    """The connections of a `RabbitmqBroker` that no thread uses.

    It makes one for each thread, and leaves it open when that ends. Threads of an event
    loop come and go.

    Args:
        broker: The broker.
    """

    def __init__(self, broker: dramatiq.Broker) -> None:
        self._idle: list[dict[str, Any]] = []
        self._broker: Any = broker
        self._users = 0
        self._lock = Lock()

    def count(self, more: int) -> int:
        """Returns how many lifespans use them, from now on."""
        with self._lock:
            self._users += more
            return self._users

    def lend(self, func: Callable[..., object], *args: object) -> None:
        """Calls what may use one, if there is one; takes back what it has then."""
        here = cast("dict[str, Any]", vars(self._broker.state))
        before = {**here}
        here.clear()
        with suppress(IndexError):
            here.update(self._idle.pop())
        try:
            func(*args)
        finally:
            if here:
                self._idle.append({**here})
            here.clear()
            here.update(before)

    def close(self) -> None:
        """Closes them."""
        while self._idle:
            self.lend(delattr, self._broker, "connection")


def _headers() -> Mapping[str, str]:
    """Returns the headers of the message that this thread works on, if any."""
    message: Any = CurrentMessage.get_current_message()
    headers: Mapping[str, str] = message.options.get("postlude", {}) if message else {}
    return headers
