"""Handing tasks over to RQ.

Needs `rq`: `pip install 'postlude[rq]'`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import rq
from redis.exceptions import ConnectionError as RedisConnectionError
from rq.job import Job

from ._adapter import Adapter, Headers

__all__ = ["RQEngine"]

_queue_class: Any = rq.Queue  # its types are not complete
_OPTIONS = {*inspect.signature(_queue_class.create_job).parameters, "at_front", "queue"}
# What tells of one call, and is no option of a function.
_OF_A_CALL = {"self", "func", "args", "kwargs", "job_id", "status", "group_id"}


class _Call(NamedTuple):
    """A call, as a job without an id."""

    name: str
    job: Job


class RQEngine(Adapter):
    """Hands tasks over to the workers of an RQ queue.

    RQ registers no functions: a worker imports whatever a job names. So its own
    `Queue.enqueue_in` and the like take the function itself. Each call of an async one
    has an event loop of its own.

    Headers are in the job's `meta`, as `get_current_job().meta["postlude"]`.

    Example:
        .. code-block:: python

            import redis
            import rq

            from postlude import task
            from postlude.engines.rq import RQEngine

            engine = RQEngine(rq.Queue("images", connection=redis.Redis()))


            @task(engine=engine.options(timeout=60, retry=rq.Retry(max=3)))
            def resize(photo: int) -> None: ...

    Args:
        queue: The queue, whose connection, serializer and time limit are used.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        queue: rq.Queue,
        *,
        timeout: float | None = 2,
        threads: int = 10,
        headers: Headers | None = None,
    ) -> None:
        _check_queue(queue)
        super().__init__(
            "rq",
            timeout=timeout,
            threads=threads,
            headers=headers,
            unreachable=(RedisConnectionError,),
        )
        self._options = {"queue": queue}

    def options(self, **native: Any) -> Self:
        """Returns the same engine, with options for what is declared with it.

        Args:
            **native: What `rq.Queue.enqueue_call` takes: `timeout`, `retry`,
                `result_ttl`, `at_front` and others; and `queue`, another `rq.Queue`.

        Raises:
            TypeError: If RQ has no such option, or it is one of a single job, such as
                `job_id`.
            ValueError: If RQ refuses its value.
        """
        for option in native:
            if option in _OF_A_CALL:
                raise TypeError(
                    f"{option}= is for one job, not for a function: write "
                    f"queue.enqueue_call(func, ..., {option}=...)"
                )
            if option not in _OPTIONS:
                known = ", ".join(sorted(_OPTIONS - _OF_A_CALL))
                raise TypeError(f"{option}= is no option of RQ; there are {known}")
        engine = self._with(native)
        _check_queue(engine._options["queue"])
        try:
            engine._job("options", (), {}, {})
        except AttributeError as exc:
            raise TypeError(f"RQ does not take {native!r}: {exc}") from exc
        return engine

    def register(self, func: Callable[..., Any], name: str) -> None:
        """Adds a function to `functions`.

        Raises:
            TypeError: If RQ would not find it, as it is in a class in a class.
        """
        if func.__qualname__.count(".") > 1:
            raise TypeError(
                "RQ finds the functions of a module and of the classes in it, not "
                f"{name}: move it there"
            )
        super().register(func, name)

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> _Call:
        """Makes a job, whose call the queue's serializer has serialised.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
            TypeError: If it is the class method of a subclass.
        """
        args = _without_class(name, args)

        def dump() -> Job:
            job = self._job(name, args, kwargs, headers)
            # RQ would serialise it when it is sent.
            job.data = job.data
            return job

        return _Call(name, self._serialised(name, dump))

    def _job(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> Job:
        native: dict[str, Any] = {**self._options}
        queue: Any = native.pop("queue")
        native.pop("at_front", None)
        if headers:
            native["meta"] = {**(native.get("meta") or {}), "postlude": dict(headers)}
        # RQ's own description has the arguments, and is logged.
        if native.get("description") is None:
            native["description"] = name
        job: Job = queue.create_job(name, args, kwargs, **native)
        return job

    def _send(self, call: _Call) -> str:
        # What has no id yet makes one.
        job, queue = copy.copy(call.job), self._options["queue"]
        queue.enqueue_job(job, at_front=bool(self._options.get("at_front")))
        made: str = job.id
        return made


def _check_queue(queue: Any) -> None:
    if not isinstance(queue, rq.Queue):
        raise TypeError(
            f"queue must be an rq.Queue, not {queue!r}: write "
            "rq.Queue(name, connection=...)"
        )


def _without_class(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leaves out the class of a class method, which RQ finds by its name.

    Raises:
        TypeError: If RQ would find another one.
    """
    if not args or not isinstance(args[0], type):
        return args
    kind, method = args[0], name.rpartition(".")[2]
    if not isinstance(inspect.getattr_static(kind, method, None), classmethod):
        return args
    if name != f"{kind.__module__}.{kind.__qualname__}.{method}":
        raise TypeError(
            f"RQ would call {name} of the class that it is written in, not of {kind}: "
            "declare a function of the module that calls it"
        )
    return args[1:]
