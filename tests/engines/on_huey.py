"""Huey, on SQLite and Redis."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from huey import Huey, RedisHuey, SqliteHuey
from huey.exceptions import TaskException
from servers import wait_until

from postlude.engines import Receipt
from postlude.engines.huey import HueyEngine

BROKERS = ("sqlite", "redis")
IS_ASYNC = True
OPTIONS = {"retries": 0, "priority": 0}
# The consumer removes a task before it runs it.
AFTER_KILL = "lost"
READY = "Huey consumer started"


def make(
    url: str, queue: str, directory: Path, **options: Any
) -> tuple[HueyEngine, Huey]:
    if url.startswith("redis"):
        huey = RedisHuey(queue, url=url)
    else:
        huey = SqliteHuey(queue, filename=url.removeprefix("sqlite:///"))
    return HueyEngine(huey, **options), huey


def command() -> list[str]:
    return [
        *[sys.executable, "-m", "huey.bin.huey_consumer", "engines.declared.app"],
        *["--workers=2", "--delay=0.01", "--max-delay=0.1"],
    ]


def send(native: Any, *args: object) -> None:
    """Sends a task by the engine's own means."""
    native(*args)


def failure(declared: Any, receipt: Receipt) -> str:
    """Returns what the engine's own tools tell of a task that has failed."""

    def told() -> str:
        try:
            declared.app.result(receipt.id, preserve=True)
        except TaskException as exc:
            return str(exc.metadata)
        return ""

    return wait_until(told)


def is_unknown(declared: Any, receipt: Receipt, log: Callable[[], str]) -> bool:
    """Whether one sees what has become of a task that the worker does not know."""
    return "engines.declared.unknown not found in TaskRegistry" in log()


def close(declared: Any) -> None:
    """Closes what is the user's own."""
    declared.app.storage.close()


def clean(url: str, queue: str) -> None:
    """Removes from the broker what the tests have made."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            for key in client.scan_iter(f"huey.*.{queue.replace('-', '')}*"):
                client.delete(key)
