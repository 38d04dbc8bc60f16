"""RQ, on Redis."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
import rq
from redis.backoff import NoBackoff
from redis.retry import Retry
from servers import wait_until

from postlude._options import options_of
from postlude.engines import Receipt
from postlude.engines.rq import RQEngine

BROKERS = ("redis",)
IS_ASYNC = True
OPTIONS = {"result_ttl": 60, "retry": rq.Retry(max=1)}
# RQ finds it among the failed, once its worker has not been heard of for long enough.
AFTER_KILL = "lost"
READY = "*** Listening on "


def make(
    url: str, queue: str, directory: Path, **options: Any
) -> tuple[RQEngine, rq.Queue]:
    # It is the class of the worker's jobs that restores.
    del options["restore"]
    connection = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0))
    app = rq.Queue(queue, connection=connection)
    return RQEngine(app, **options), app


def command() -> list[str]:
    return [
        *[sys.executable, "-m", "rq.cli", "worker", "--config=engines.rq_settings"],
        "--job-class=engines.rq_settings.RestoringJob",
    ]


def send(native: Any, *args: object) -> None:
    """Sends a task by the engine's own means."""
    engine: Any = options_of(native).engine
    engine._options["queue"].enqueue(native, *args)


def failure(declared: Any, receipt: Receipt) -> str:
    """Returns what the engine's own tools tell of a task that has failed."""
    job = declared.app.fetch_job(receipt.id)
    wait_until(lambda: job.is_failed)
    return f"{job.get_status()}: {job.latest_result().exc_string}"


def is_unknown(declared: Any, receipt: Receipt, log: Callable[[], str]) -> bool:
    """Whether one sees what has become of a task that the worker does not know."""
    return "Invalid attribute name: unknown" in failure(declared, receipt)


def close(declared: Any) -> None:
    """Closes what is the user's own."""
    declared.app.connection.close()


def clean(url: str, queue: str) -> None:
    """Removes from the broker what the tests have made."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for key in client.scan_iter("rq:job:*"):
            if client.hget(key, "origin") == queue:
                client.delete(key, key.replace(":job:", ":results:"))
        for key in client.scan_iter(f"rq:*{queue}*"):
            client.delete(key)
        client.srem("rq:queues", f"rq:queue:{queue}")
