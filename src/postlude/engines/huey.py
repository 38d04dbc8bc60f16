"""Handing tasks over to Huey.

Needs `huey`: `pip install 'postlude[huey]'`.
"""

from __future__ import annotations

import functools
import inspect
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

from huey import Huey
from huey.api import Task
from huey.serializer import Serializer
from starlette.background import BackgroundTask as StockTask
from typing_extensions import override

from ._adapter import Adapter, Headers, Restore, connection_errors_of_redis, is_plain
from ._worker_loop import run_async

__all__ = ["HueyEngine"]

# Where the headers are in a message, as Huey has no place for them: with the keywords,
# by what can be the name of none.
_HEADERS = "postlude:headers"

# The names of the functions that each Huey instance knows from here.
_known: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()

# What would break a function that is to stay what it is.
_REFUSED = {
    "context": "the function would be given what it is not given here",
    "name": "the consumer finds the function by its own name",
}


class _Call(NamedTuple):
    """A call whose arguments are serialised, unless they need not be."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    body: bytes | None


class HueyEngine(Adapter):
    """Hands tasks over to the consumer of a Huey instance.

    Each function is a Huey task under its dotted name. Async ones run in one event loop
    for each process of the consumer.

    Example:
        .. code-block:: python

            import anyio
            from huey import SqliteHuey

            from postlude import task
            from postlude.engines import enqueue
            from postlude.engines.huey import HueyEngine

            huey = SqliteHuey(filename="tasks.db")
            engine = HueyEngine(huey)


            @task(engine=engine.options(retries=3, retry_delay=10))
            def resize(photo: int) -> None: ...


            async def main() -> None:
                async with engine:
                    await enqueue(resize, 42)


            anyio.run(main)
            assert [waiting.args for waiting in huey.pending()] == [(42,)]
            huey.storage.close()

    Args:
        huey: The Huey instance.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
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
        huey: Huey,
        *,
        timeout: float | None = 2,
        threads: int = 10,
        headers: Headers | None = None,
        restore: Restore | None = None,
    ) -> None:
        if not isinstance(huey, Huey):
            raise TypeError(f"huey must be a huey.Huey, not {huey!r}")
        self._huey: Any = huey
        # What those on a database raise; older versions do not say.
        error = getattr(
            self._huey.storage, "operational_error", sqlite3.OperationalError
        )
        super().__init__(
            "huey",
            timeout=timeout,
            threads=threads,
            headers=headers,
            restore=restore,
            unreachable=(*connection_errors_of_redis(), error),
        )

    def options(self, **native: Any) -> Self:
        """Returns the same engine, with options for what is declared with it.

        Args:
            **native: What `huey.Huey.task` takes: `retries`, `retry_delay`, `priority`,
                `expires`, `timeout` and others; and attributes that its `task_base`
                has.

        Raises:
            TypeError: If Huey has no such option, or if the function would not stay
                what it is.
        """
        engine = self._with(native)
        wrapper = self._huey.task_wrapper_class
        base = engine._options.get("task_base", wrapper.task_base)
        known = {*inspect.signature(self._huey.task).parameters, "task_base"}
        known -= {*_REFUSED, "kwargs"}
        for option in native:
            if option in _REFUSED:
                raise TypeError(f"{option}= is not for postlude: {_REFUSED[option]}")
            # Huey would make an attribute of it, in place of one of its own even.
            is_own = hasattr(base, option) and not hasattr(Task, option)
            if option not in known and not is_own:
                told = ", ".join(sorted(known))
                raise TypeError(
                    f"{option}= is no option of Huey; there are {told}; for an "
                    "attribute of your own, write task_base=..., a class that has it"
                )
        return engine

    def native(self, func: Callable[..., Any]) -> Any:
        """Returns the Huey task of a function, for `schedule()`, `s()`, `revoke()`.

        Raises:
            LookupError: If the function is not declared for this engine.
        """
        return self._task(func)

    @override
    def register(self, func: Callable[..., Any], name: str) -> None:
        """Makes a Huey task of a function, in place of an earlier one of that name.

        Raises:
            ValueError: If there is one that has not been made here.
        """
        super().register(func, name)
        known = _known.setdefault(self._huey, set())
        if name in known:
            # Huey would refuse the later one.
            registry = self._huey._registry
            registry.unregister(registry.string_to_task(name))
        is_async = StockTask(func).is_async

        @functools.wraps(func)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._restored(kwargs.pop(_HEADERS, {})):
                if is_async:
                    return run_async(func, *args, **kwargs)
                return func(*args, **kwargs)

        options = {**self._options, "name": func.__qualname__}
        self._tasks[name] = self._huey.task(**options)(run)
        known.add(name)

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> _Call:
        """Serialises a call as Huey will.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        sent = {**kwargs, _HEADERS: dict(headers)} if headers else {**kwargs}
        serializer = self._huey.serializer
        if is_plain(args, kwargs) and type(serializer) is Serializer:
            self._client.check_open()
            return _Call(name, args, sent, None)
        body = self._serialised(name, lambda: serializer.serialize((args, sent)))
        return _Call(name, (), {}, body)

    def _send(self, call: _Call) -> str:
        args, kwargs = call.args, {**call.kwargs}
        if call.body is not None:
            args, kwargs = self._huey.serializer.deserialize(call.body)
        task = self._tasks[call.name].task_class(args, kwargs)
        self._huey.enqueue(task)
        made: str = task.id
        return made
