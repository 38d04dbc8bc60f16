"""Taskiq, on Redis streams."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.from_thread
import redis
from servers import wait_until
from taskiq import AsyncBroker
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from postlude.engines import Receipt
from postlude.engines.taskiq import TaskiqEngine

BROKERS = ("redis",)
IS_ASYNC = True
OPTIONS = {"priority": 1, "max_retries": 1}
# What has not been acknowledged is taken over, once other messages come.
AFTER_KILL = "again"
READY = "Listening started."


def make(
    url: str, queue: str, directory: Path, **options: Any
) -> tuple[TaskiqEngine, AsyncBroker]:
    results: Any = RedisAsyncResultBackend(url, prefix_str=queue, result_ex_time=600)
    broker = RedisStreamBroker(
        url,
        queue_name=queue,
        # By default ten minutes.
        idle_timeout=400 if "VISIBILITY" in os.environ else 600_000,
    ).with_result_backend(results)
    return TaskiqEngine(broker, **options), broker


def command() -> list[str]:
    return [
        *[sys.executable, "-m", "taskiq", "worker", "engines.declared:app"],
        *["--workers=1", "--log-level=INFO"],
    ]


def send(native: Any, *args: object) -> None:
    """Sends a task by the engine's own means."""
    anyio.from_thread.run(native.kiq, *args)


def failure(declared: Any, receipt: Receipt) -> str:
    """Returns what the engine's own tools tell of a task that has failed."""
    results = declared.app.result_backend
    wait_until(lambda: anyio.from_thread.run(results.is_result_ready, receipt.id))
    return repr(anyio.from_thread.run(results.get_result, receipt.id).error)


def is_unknown(declared: Any, receipt: Receipt, log: Callable[[], str]) -> bool:
    """Whether one sees what has become of a task that the worker does not know."""
    return 'task "engines.declared.unknown" is not found.' in log()


def close(declared: Any) -> None:
    """Closes what is the user's own."""


def clean(url: str, queue: str) -> None:
    """Removes from the broker what the tests have made."""
    with redis.Redis.from_url(url) as client:
        client.delete(queue)
        for key in client.scan_iter(f"{queue}:*"):
            client.delete(key)
