"""Handing tasks over to an engine that runs them in processes of its own.

`task(engine=...)` declares where a function runs. Then `add_task()` hands it over after
the response, and `enqueue()` at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, ParamSpec

import anyio
import anyio.from_thread

from postlude import _tasks
from postlude._options import (
    Engine,
    Receipt,
    check_call,
    check_foreign,
    handing_over,
    in_event_loop,
    options_of,
)
from postlude._tasks import BackgroundTask, _in_worker_thread
from postlude.middleware import add_task

from ._adapter import Adapter
from ._client import (
    BrokerUnreachable,
    Client,
    EngineError,
    NotSerialisable,
    OutcomeUnknown,
    Refused,
)

__all__ = [
    "BrokerUnreachable",
    "CallableEngine",
    "Client",
    "Engine",
    "EngineError",
    "Message",
    "NotSerialisable",
    "OutcomeUnknown",
    "Receipt",
    "Refused",
    "enqueue",
    "enqueue_sync",
    "from_callable",
]

P = ParamSpec("P")


async def enqueue(
    func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
) -> Receipt:
    """Hands a task over to the engine of its function, now.

    For a response that is to say that the task has been taken, and wherever there is no
    request. A function without an engine is given to `postlude.add_task`; the receipt's
    engine is `here` then, and its id that of the task.

    Example:
        .. code-block:: python

            import anyio

            from postlude import task
            from postlude.engines import Message, Receipt, enqueue, from_callable


            async def send(message: Message) -> str:
                return "17"


            engine = from_callable(send, name="example")


            @task(engine=engine)
            def resize(photo: int) -> None: ...


            async def main() -> None:
                async with engine:
                    assert await enqueue(resize, 42) == Receipt("example", "17")


            anyio.run(main)

    Args:
        func: What to call.
        *args: Positional arguments to call it with.
        **kwargs: Keyword arguments to call it with.

    Raises:
        EngineError: If the engine has not taken it, or may not have: `NotSerialisable`,
            `BrokerUnreachable`, `Refused`, `OutcomeUnknown`.
        RuntimeError: If the engine is not open; or if there is no engine, and no
            request either.
        TypeError: If `func` is not callable, cannot be called with these arguments, or
            cannot be found by a worker.

    .. versionadded:: 0.1.0
    """
    if options_of(func).engine is None:
        return _add(func, *args, **kwargs)
    return await _prepared(func, args, kwargs)()


def enqueue_sync(
    func: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
) -> Receipt:
    """Does what `enqueue` does, for code that is not async.

    In a worker thread, such as that of a `def` endpoint, the event loop hands the task
    over. In a script, or in the worker of another engine, an event loop is run just for
    this, and the engine opened meanwhile, by its `submitting()` if it has that.

    Args:
        func: What to call.
        *args: Positional arguments to call it with.
        **kwargs: Keyword arguments to call it with.

    Raises:
        RuntimeError: In the thread of an event loop, which it would block; otherwise as
            `enqueue`, which also tells what else is raised.

    .. versionadded:: 0.1.0
    """
    in_worker_thread = _in_worker_thread()
    if not in_worker_thread and in_event_loop():
        raise RuntimeError(
            "enqueue_sync() would block the event loop: write await enqueue(...)"
        )
    engine = options_of(func).engine
    if engine is None:
        return _add(func, *args, **kwargs)
    if in_worker_thread:
        return anyio.from_thread.run(_prepared(func, args, kwargs))
    return anyio.run(_open_and_submit, engine, func, args, kwargs)


async def _open_and_submit(
    engine: Any,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Receipt:
    if not hasattr(engine, "__aenter__") or _tasks.keep is not None:
        return await _prepared(func, args, kwargs)()
    submitting = getattr(engine, "submitting", None)
    async with engine if submitting is None else submitting():
        return await _prepared(func, args, kwargs)()


def _add(func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Receipt:
    return Receipt("here", add_task(func, *args, **kwargs).id)


def _prepared(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Coroutine[Any, Any, Receipt]]:
    check_foreign(func)
    check_call(func, args, kwargs)
    if _tasks.keep is not None:
        task = BackgroundTask(functools.partial(func, *args, **kwargs))
        return functools.partial(_keep, task)
    return handing_over(func, args, kwargs)


async def _keep(task: BackgroundTask) -> Receipt:
    """Lets a test have a task, unless it is part of one that is running."""
    if _tasks.keep is not None and _tasks.keep(task):
        return Receipt("captured", task.id)
    submit: Any = task._submit
    receipt: Receipt = await submit()
    return receipt


class Message(NamedTuple):
    """A task as `from_callable` hands it over.

    Example:
        .. code-block:: python

            from postlude.engines import Message

            message = Message("photos.resize", '{"name": "photos.resize"}', {})
            assert message.name == "photos.resize"

    .. versionadded:: 0.1.0
    """

    name: str
    """The dotted name of the function."""
    body: Any
    """The whole call, serialised."""
    headers: Mapping[str, str]
    """What travels beside the arguments; the body has it as well."""


def from_callable(
    send: Callable[[Message], Any],
    *,
    name: str,
    timeout: float | None = 2,
    threads: int = 10,
    serialize: Callable[[dict[str, Any]], Any] = json.dumps,
    headers: Callable[[], Mapping[str, str]] | None = None,
    unreachable: tuple[type[Exception], ...] = (),
) -> CallableEngine:
    """Makes an engine of a function that sends a message somewhere.

    Example:
        .. code-block:: python

            import queue

            from postlude import task
            from postlude.engines import Message, from_callable

            jobs: queue.SimpleQueue[str] = queue.SimpleQueue()


            def send(message: Message) -> None:
                jobs.put(message.body)


            engine = from_callable(send, name="jobs")

    Args:
        send: Called with each message; awaited if it is async, otherwise called in a
            thread. What it returns becomes the receipt's id; what it raises is told
            apart as `Client.call` says. The client that it uses is yours to open and
            to close.
        name: What receipts and errors call the engine.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
        serialize: Makes the body of a message. It is called when the task is added,
            with a dictionary of `name`, `args`, `kwargs` and `headers`.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id.
        unreachable: What `send` raises if there is no connection, beside `OSError`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.

    .. versionadded:: 0.1.0
    """
    for option, value in {"send": send, "serialize": serialize}.items():
        if not callable(value):
            raise TypeError(f"{option} must be callable, not {value!r}")
    return CallableEngine(
        name,
        send,
        serialize,
        timeout=timeout,
        threads=threads,
        headers=headers,
        unreachable=unreachable,
    )


class CallableEngine(Adapter):
    """The engine that `from_callable` makes.

    Enter it with `async with` in the application's lifespan.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        name: str,
        send: Callable[[Message], Any],
        serialize: Callable[[dict[str, Any]], Any],
        **shared: Any,
    ) -> None:
        super().__init__(name, **shared)
        self._send = send
        self._serialize = serialize

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> Message:
        """Serialises a call.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        headers = dict(headers)
        call = {"name": name, "args": args, "kwargs": kwargs, "headers": headers}
        body = self._serialised(name, lambda: self._serialize(call))
        return Message(name, body, headers)
