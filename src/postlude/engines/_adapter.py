"""What the engines of this package share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Self

from postlude._options import Receipt, dotted_name_of

from ._client import Client, NotSerialisable

Headers = Callable[[], Mapping[str, str]]
Restore = Callable[[Mapping[str, str]], AbstractContextManager[object]]

# What nobody can change, and JSON and pickle can carry.
_PLAIN = {bool, float, int, str, type(None)}


def is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments need not be serialised to be kept, or to be refused."""
    return _PLAIN.issuperset(map(type, (*args, *kwargs.values())))


def _are_strings(headers: Any) -> bool:
    return issubclass(type(headers), Mapping) and all(
        isinstance(text, str) for pair in headers.items() for text in pair
    )


def connection_errors_of_redis() -> tuple[type[Exception], ...]:
    """Returns what redis-py raises if there is no connection, if that is in use."""
    module = sys.modules.get("redis.exceptions")
    return () if module is None else (module.ConnectionError,)


class Adapter:
    """Has a client, headers, native options, and is open during a lifespan.

    Args:
        name: What receipts and errors call the engine.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id.
        restore: Called in the worker with these headers, if there are any. Returns a
            context manager that is entered around the function.
        unreachable: What the engine's client raises if there is no connection, beside
            `OSError`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.
    """

    # Sends what `prepare` has returned; returns what the engine knows it by.
    _send: Callable[[Any], Any]

    def __init__(
        self,
        name: str,
        *,
        timeout: float | None,
        threads: int,
        headers: Headers | None,
        restore: Restore | None = None,
        unreachable: tuple[type[Exception], ...] = (),
    ) -> None:
        for option, value in {"headers": headers, "restore": restore}.items():
            if value is not None and not callable(value):
                raise TypeError(f"{option} must be callable, or None, not {value!r}")
        self._name = name
        self._client = Client(
            name, timeout=timeout, threads=threads, unreachable=unreachable
        )
        self._headers = headers
        self._restore = restore
        self._functions: dict[str, Callable[..., Any]] = {}
        self._options: dict[str, Any] = {}
        # What the engine itself has made of the functions.
        self._tasks: dict[str, Any] = {}

    @property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """The functions declared for it, by their names; a worker may call these."""
        return MappingProxyType(self._functions)

    def _with(self, native: dict[str, Any]) -> Self:
        """Returns the same engine with native options for what it is to be told of."""
        engine = copy.copy(self)
        engine._options = {**self._options, **native}
        return engine

    def register(self, func: Callable[..., Any], name: str) -> None:
        """Adds a function to `functions`, in place of an earlier one of that name."""
        self._functions[name] = func

    def _task(self, func: Callable[..., Any]) -> Any:
        """Returns what the engine has made of a function.

        Raises:
            LookupError: If the function is not declared for this engine.
        """
        task = self._tasks.get(dotted_name_of(func))
        if task is None:
            message = f"{func!r} is not declared with task(engine=...) for this engine"
            raise LookupError(message)
        return task

    def headers(self) -> Mapping[str, str]:
        """Returns what is to travel beside the arguments of a task.

        Raises:
            TypeError: If that is no mapping of strings to strings.
        """
        if self._headers is None:
            return {}
        headers = self._headers()
        if not _are_strings(headers):
            raise TypeError(
                f"headers= must return a mapping of strings to strings, not {headers!r}"
            )
        return headers

    async def submit(self, message: Any) -> Receipt:
        """Sends what `prepare` has returned; each time as a task of its own.

        Raises:
            EngineError: If it cannot tell that it has been taken.
            RuntimeError: If the engine is not open in this event loop.
        """
        made = await self._client.call(message.name, self._send, message)
        return Receipt(self._name, "" if made is None else str(made))

    def _restored(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        """Returns what is entered around a function in the worker.

        What somebody has sent by the engine's own means has no headers.
        """
        if self._restore is None or not headers:
            return nullcontext()
        return self._restore(headers)

    def _serialised(self, name: str, dump: Callable[[], Any]) -> Any:
        """Serialises a call of the function of that name.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        self._client.check_open()
        try:
            return dump()
        except Exception as exc:
            message = f"{self._name} cannot be sent a call of {name}: {exc}"
            raise NotSerialisable(message) from exc

    async def __aenter__(self) -> Self:
        self._client.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()
