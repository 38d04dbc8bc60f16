"""Handing tasks over to Celery.

Needs `celery`: `pip install 'postlude[celery]'`; for Redis also `'celery[redis]'`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, cast

import celery
import kombu.serialization
from celery.local import PromiseProxy
from kombu.exceptions import OperationalError
from starlette.background import BackgroundTask as StockTask

from ._adapter import Adapter, Headers, Restore, is_plain
from ._client import is_timeout
from ._worker_loop import run_async

__all__ = ["CeleryEngine"]

# Its functions have no types.
_serialization: Any = kombu.serialization

# Celery's own call of a task takes this keyword for itself.
_SELF = "postlude.self"

# They tell which declaration of a name is the newest.
_numbers = itertools.count(1)

# What Celery takes when a task is sent, not when it is declared: for each call,
_SENT_WITH_ALL = {
    *("queue", "exchange", "exchange_type", "routing_key", "delivery_mode"),
    *("priority", "argsrepr", "kwargsrepr"),
}
# and for those made here.
_SENT_WITH = {
    *_SENT_WITH_ALL,
    *("countdown", "link", "link_error", "shadow", "retry", "retry_policy"),
}
_REFUSED = {
    "bind": "the function would not get what it is given here; use celery.current_task",
    "name": "workers find the function by its own name",
    "expiration": "Celery works it out; write expires=...",
    **dict.fromkeys(
        [
            *("args", "kwargs", "task_id", "eta", "headers", "producer", "connection"),
            *("reply_to", "router", "add_to_parent", "root_id", "parent_id"),
            *("group_id", "chain", "chord"),
        ],
        "it is for one call: write engine.native(func).apply_async(...)",
    ),
}


class _Call(NamedTuple):
    """A call whose arguments are serialised, unless they need not be."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    body: tuple[str, str, Any] | None
    headers: dict[str, str]


class CeleryEngine(Adapter):
    """Hands tasks over to the workers of a Celery app.

    Each function is a Celery task under its dotted name. Async ones run in one event
    loop for each process of the worker.

    Example:
        .. code-block:: python

            from celery import Celery

            from postlude import task
            from postlude.engines.celery import CeleryEngine

            celery_app = Celery("shop", broker="redis://localhost")
            engine = CeleryEngine(celery_app)


            @task(engine=engine.options(queue="images", autoretry_for=(OSError,)))
            def resize(photo: int) -> None: ...


            assert engine.native(resize).autoretry_for == (OSError,)

    Args:
        app: The Celery app, which stays yours to configure.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id.
        restore: Called in the worker with these headers, if there are any. Returns a
            context manager that is entered around the function.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        app: celery.Celery,
        *,
        timeout: float | None = 2,
        threads: int = 10,
        headers: Headers | None = None,
        restore: Restore | None = None,
    ) -> None:
        if not isinstance(app, celery.Celery):
            raise TypeError(f"app must be a celery.Celery, not {app!r}")
        super().__init__(
            "celery",
            timeout=timeout,
            threads=threads,
            headers=headers,
            restore=restore,
            unreachable=(OperationalError,),
        )
        self._app: Any = app
        self._sent_with: dict[str, dict[str, Any]] = {}

    def options(self, **native: Any) -> Self:
        """Returns the same engine, with options for what is declared with it.

        Args:
            **native: What `celery.Celery.task` takes, such as `autoretry_for`,
                `time_limit`, `acks_late`; and what `apply_async` takes: `queue`,
                `priority`, `argsrepr` and others, and for what is handed over here
                also `countdown`, `link`, `retry_policy` and others.

        Raises:
            TypeError: If it is something for a single call, or if the function would
                not stay what it is.
        """
        for option in native.keys() & _REFUSED.keys():
            raise TypeError(f"{option}= is no option here: {_REFUSED[option]}")
        return self._with(native)

    def native(self, func: Callable[..., Any]) -> Any:
        """Returns the Celery task of a function, for `apply_async()`, chains, `.s()`.

        Raises:
            LookupError: If the function is not declared for this engine.
        """
        return self._task(func)

    def register(self, func: Callable[..., Any], name: str) -> None:
        """Makes a Celery task of a function, instead of an earlier one of that name."""
        super().register(func, name)
        is_async = StockTask(func).is_async

        @functools.wraps(func)
        def run(*args: Any, **kwargs: Any) -> Any:
            if _SELF in kwargs:
                kwargs["self"] = kwargs.pop(_SELF)
            headers: dict[str, Any] = native.request.headers or {}
            with self._restored(headers.get("postlude", {})):
                if is_async:
                    return run_async(func, *args, **kwargs)
                return func(*args, **kwargs)

        # Not shared: other Celery apps of this process are not to know it.
        options = {"shared": False, "apply": _apply, **self._options, "name": name}
        sent_with = {
            option: options.pop(option) for option in options.keys() & _SENT_WITH
        }
        self._sent_with[name] = sent_with
        # As attributes of a task, Celery calls them deprecated.
        routing = {
            option: sent_with[option] for option in sent_with.keys() & _SENT_WITH_ALL
        }
        if routing:
            options["apply_async"] = _sending_with(routing)
        native = self._tasks[name] = self._declared(options, run)

    def _declared(self, options: dict[str, Any], run: Callable[..., Any]) -> Any:
        """Returns a Celery task, made as late as Celery itself would make it."""
        app, name, number = self._app, options["name"], next(_numbers)

        def make() -> Any:
            # The public `app.tasks` would end what Celery puts off.
            tasks = app._tasks
            if getattr(tasks.get(name), "postlude", 0) > number:
                return tasks[name]
            # Celery would keep the earlier one.
            tasks.pop(name, None)
            return app.task(**{**options, "lazy": False, "postlude": number})(run)

        if app.finalized:
            return make()
        native: Any = PromiseProxy(make, __doc__=run.__doc__)
        app._pending.append(native)
        return native

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> _Call:
        """Serialises a call as Celery will.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        if "self" in kwargs:
            kwargs = {_SELF if key == "self" else key: kwargs[key] for key in kwargs}
        native = self._tasks[name]
        if type(native) is PromiseProxy:
            native = self._tasks[name] = native._get_current_object()
        serializer = native.serializer or self._app.conf.task_serializer
        if is_plain(args, kwargs) and serializer in ("json", "pickle"):
            self._client.check_open()
            return _Call(name, args, kwargs, None, dict(headers))
        dump = _serialization.dumps
        body = self._serialised(name, lambda: dump((args, kwargs), serializer))
        return _Call(name, (), {}, body, dict(headers))

    def _send(self, message: _Call) -> str:
        native = self._tasks[message.name]
        args, kwargs = message.args, message.kwargs
        if message.body is not None:
            content_type, encoding, payload = message.body
            load = _serialization.loads
            args, kwargs = load(payload, content_type, encoding, accept=[content_type])
        # What the worker is told, and Celery itself if it runs the task here.
        headers: dict[str, Any] = {"ignore_result": native.ignore_result}
        if message.headers:
            headers["postlude"] = message.headers
        # Nobody waits for the result in this thread. So Celery need not subscribe to
        # it, for which it would try to reach a dead backend twenty times.
        options = {**self._sent_with[message.name], "ignore_result": True}
        try:
            made: str = native.apply_async(args, kwargs, headers=headers, **options).id
        except OperationalError as exc:
            # Celery does not tell apart whether anything has been sent.
            if is_timeout(exc.__cause__):
                raise TimeoutError(str(exc)) from exc
            raise
        return made


def _sending_with(defaults: dict[str, Any]) -> Callable[..., Any]:
    """Returns the method of a task by which Celery sends it, with these defaults."""

    def apply_async(task: object, /, *args: Any, **options: Any) -> Any:
        parent = cast("Any", super(type(task), task))
        return parent.apply_async(*args, **{**defaults, **options})

    return apply_async


def _apply(task: object, /, *args: Any, **options: Any) -> Any:
    """Runs a task here, and keeps its result as it has been declared."""
    told: dict[str, Any] = options.get("headers") or {}
    kept = {option: told[option] for option in told if option == "ignore_result"}
    return cast("Any", super(type(task), task)).apply(*args, **options | kept)
