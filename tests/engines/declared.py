"""What the app and the worker import: functions, and the engine that they are for."""

import importlib
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.propagate import extract, inject

from postlude import add_task, task
from postlude.engines import enqueue, enqueue_sync

RECORD = Path(os.environ["POSTLUDE_RECORD"])

request_id: ContextVar[str] = ContextVar("request_id", default="")


def headers() -> dict[str, str]:
    carrier = {"request-id": request_id.get()}
    inject(carrier)
    return carrier


@contextmanager
def restore(carrier: Mapping[str, str]) -> Generator[None]:
    here, there = request_id.set(carrier["request-id"]), otel.attach(extract(carrier))
    try:
        yield
    finally:
        otel.detach(there)
        request_id.reset(here)


on: Any = importlib.import_module(f"engines.on_{os.environ['POSTLUDE_ENGINE']}")
# `app` is what the engine's own commands are told of.
engine, app = on.make(
    os.environ["POSTLUDE_BROKER"],
    os.environ["POSTLUDE_QUEUE"],
    RECORD.parent,
    timeout=float(os.environ.get("POSTLUDE_TIMEOUT", "20")),
    headers=headers,
    restore=restore,
)


def note(key: str, *args: object, **kwargs: object) -> None:
    """Adds a line to the record, in one piece."""
    span = trace.get_current_span().get_span_context()
    line = {
        "key": key,
        "args": args,
        "kwargs": kwargs,
        "process": os.getpid(),
        "request_id": request_id.get(),
        "trace_id": format(span.trace_id, "032x"),
    }
    with RECORD.open("ab", buffering=0) as file:
        file.write(json.dumps(line, default=repr).encode() + b"\n")


@task(engine=engine)
def record(key: str, *args: object, **kwargs: object) -> None:
    note(key, *args, **kwargs)


@task(engine=engine.options(**on.OPTIONS))
def record_with_options(key: str, *args: object, **kwargs: object) -> None:
    note(key, *args, **kwargs)


@task(engine=engine)
def collide(  # noqa: PLR0917
    key: str,
    id: object,  # noqa: A002 - so are options of engines called
    timeout: object,
    priority: object,
    delay: object,
    retries: object,
    queue: object,
    countdown: object,
    args: object,
    kwargs: object,
    func: object,
    job_id: object,
    description: object,
    name: object,
    task: object,
    self: object,
    queue_name: object,
    cls: object,
    **others: object,
) -> None:
    given = {**locals(), **others}
    note(key, **{name: given[name] for name in COLLIDING})


COLLIDING = [
    *("id", "timeout", "priority", "delay", "retries", "queue", "countdown", "args"),
    *("kwargs", "func", "job_id", "description", "name", "task", "self"),
    *("queue_name", "cls", "broker", "context", "data", "eta", "expires", "headers"),
    *("labels", "message", "on_complete", "on_error", "retry_delay", "target"),
    *("task_id", "task_name"),
]


@task(engine=engine)
def fail(key: str) -> None:
    note(key)
    raise LookupError(f"nothing is called {key}")


@task(engine=engine)
def hang(key: str) -> None:
    """Takes long, at the first try."""
    note(key)
    if len(RECORD.read_text(encoding="utf-8").split(key)) == 2:
        time.sleep(60)


if hasattr(on, "AT_LEAST_ONCE"):

    @task(engine=engine.options(**on.AT_LEAST_ONCE))
    def hang_at_least_once(key: str) -> None:
        hang(key)


@task(engine=engine)
def hand_on(key: str) -> None:
    try:
        add_task(record, key, "added")
    except RuntimeError as exc:
        note(key, str(exc))
    enqueue_sync(record, key, "handed on")


if on.IS_ASYNC:

    @task(engine=engine)
    async def record_async(key: str, *args: object, **kwargs: object) -> None:
        note(key, *args, **kwargs)

    @task(engine=engine)
    async def hand_on_async(key: str) -> None:
        try:
            add_task(record, key, "added")
        except RuntimeError as exc:
            note(key, str(exc))
        async with engine:
            await enqueue(record, key, "handed on")


if "POSTLUDE_WORKER" not in os.environ:

    @task(engine=engine)
    def unknown(key: str) -> None:
        note(key)
