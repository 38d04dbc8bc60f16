"""Celery, on Redis and RabbitMQ."""

import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from servers import wait_until

from postlude.engines import Receipt
from postlude.engines.celery import CeleryEngine

BROKERS = ("redis", "rabbitmq")
IS_ASYNC = True
OPTIONS = {"ignore_result": True, "max_retries": 1, "countdown": 0.01, "shadow": "x"}
# Celery acknowledges a task before it runs it, unless it is told otherwise.
AFTER_KILL = "lost"
AT_LEAST_ONCE = {"acks_late": True, "reject_on_worker_lost": True}
READY = " ready."


def make(
    url: str, queue: str, directory: Path, **options: Any
) -> tuple[CeleryEngine, Celery]:
    app = Celery("declared", broker=url)
    app.conf.task_default_queue = queue
    app.conf.broker_connection_retry_on_startup = True
    prefix = {"global_keyprefix": f"{queue}:"}
    if url.startswith("redis"):
        transport: dict[str, Any] = {**prefix}
        if "VISIBILITY" in os.environ:
            # After so many seconds a task that is not acknowledged runs again.
            transport["visibility_timeout"] = int(os.environ["VISIBILITY"])
            transport |= {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}
        app.conf.update(result_backend=url, broker_transport_options=transport)
        app.conf.result_backend_transport_options = prefix
    else:
        # Otherwise nobody knows whether RabbitMQ has taken a message, and threads wait
        # for one that hangs for ever.
        limits = {"read_timeout": 5, "write_timeout": 5}
        app.conf.broker_transport_options = {"confirm_publish": True, **limits}
        app.conf.update(result_backend=f"file://{directory}")
    return CeleryEngine(app, **options), app


def command() -> list[str]:
    return [
        *[sys.executable, "-m", "celery", "--app=engines.declared:app"],
        *["worker", "--concurrency=2", "--loglevel=INFO", "--without-mingle"],
        # RabbitMQ allows one of a name.
        f"--hostname={uuid.uuid4().hex}@%h",
    ]


def send(native: Any, *args: object) -> None:
    """Sends a task by the engine's own means."""
    native.delay(*args)


def failure(declared: Any, receipt: Receipt) -> str:
    """Returns what the engine's own tools tell of a task that has failed."""
    result = declared.app.AsyncResult(receipt.id)
    wait_until(result.ready)
    return f"{result.state}: {result.result!r}"


def is_unknown(declared: Any, receipt: Receipt, log: Callable[[], str]) -> bool:
    """Whether one sees what has become of a task that the worker does not know."""
    logged = "Received unregistered task of type 'engines.declared.unknown'"
    return logged in log() and "never registered" in failure(declared, receipt)


def close(declared: Any) -> None:
    """Closes what is the user's own."""
    declared.app.close()


def clean(url: str, queue: str) -> None:
    """Removes from the broker what the tests have made."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            for key in client.scan_iter(f"{queue}:*"):
                client.delete(key)
    else:
        with Celery(broker=url).connection_for_write() as connection:
            connection.default_channel.queue_delete(queue)
