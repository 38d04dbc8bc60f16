"""Dramatiq, on Redis and RabbitMQ."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from dramatiq import Message
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, CurrentMessage
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import RedisBackend

from engines.brokers import SERVERS
from postlude.engines import Receipt
from postlude.engines.dramatiq import DramatiqEngine

BROKERS = ("redis", "rabbitmq")
IS_ASYNC = True
OPTIONS = {"max_age": 3_600_000, "max_retries": 1}
# Dramatiq acknowledges a message once the function has ended.
AFTER_KILL = "again"
READY = "Worker process is ready for action."

# Not all of Dramatiq is typed.
make_redis: Any = RedisBroker
make_backend: Any = RedisBackend
make_results: Any = Results
message: Any = Message


def make(
    url: str, queue: str, directory: Path, **options: Any
) -> tuple[DramatiqEngine, Any]:
    broker: Any
    if url.startswith("redis"):
        # What a worker has that is not heard of for so long, is soon given to another.
        dead = {"heartbeat_timeout": 10_000, "maintenance_chance": 100_000}
        broker = make_redis(url=url, namespace=queue, **dead)
    else:
        # Pika means the virtual host `/` by no path at all.
        broker = RabbitmqBroker(url=url.rstrip("/"), confirm_delivery=True)
    broker.add_middleware(CurrentMessage())
    broker.add_middleware(AsyncIO())
    backend = make_backend(url=SERVERS["redis"], namespace=queue)
    broker.add_middleware(make_results(backend=backend, result_ttl=60_000))
    engine = DramatiqEngine(broker, **options)
    return engine.options(queue_name=queue, max_retries=0, store_results=True), broker


def command() -> list[str]:
    return [
        *[sys.executable, "-m", "dramatiq", "engines.declared:app"],
        *["--processes=1", "--threads=4"],
    ]


def send(native: Any, *args: object) -> None:
    """Sends a task by the engine's own means."""
    native.send(*args)


def failure(declared: Any, receipt: Receipt) -> str:
    """Returns what the engine's own tools tell of a task that has failed."""
    queue = declared.engine._options["queue_name"]
    sent = message(queue, "engines.declared.fail", (), {}, {}, message_id=receipt.id)
    try:
        backend = declared.app.get_results_backend()
        return f"succeeded: {sent.get_result(backend=backend, block=True)}"
    except ResultFailure as exc:
        assert receipt.id in dead_letters(declared)
        return str(exc)


def is_unknown(declared: Any, receipt: Receipt, log: Callable[[], str]) -> bool:
    """Whether one sees what has become of a task that the worker does not know."""
    told = "Received message for undefined actor 'engines.declared.unknown'." in log()
    return told and receipt.id in dead_letters(declared)


def dead_letters(declared: Any) -> list[str]:
    """Returns the ids of the messages in the dead-letter queue."""
    broker, queue = declared.app, declared.engine._options["queue_name"]
    if isinstance(broker, RedisBroker):
        client: Any = broker.client
        bodies = client.hvals(f"{broker.namespace}:{queue}.XQ.msgs")
    else:
        bodies = [*unacknowledged(broker, f"{queue}.XQ")]
    return [message.decode(body).message_id for body in bodies]


def unacknowledged(broker: Any, queue: str) -> Generator[bytes]:
    """Yields the messages of a queue, which go back there."""
    with closing(broker.connection.channel()) as channel:
        while (body := channel.basic_get(queue)[2]) is not None:
            yield body


def close(declared: Any) -> None:
    """Closes what is the user's own."""
    declared.app.close()


def clean(url: str, queue: str) -> None:
    """Removes from the broker what the tests have made."""
    if url.startswith("redis"):
        client = make_redis(url=url).client
        for key in client.scan_iter(f"{queue}:*"):
            client.delete(key)
    else:
        broker = RabbitmqBroker(url=url.rstrip("/"))
        for suffix in "", ".DQ", ".XQ":
            broker.channel.queue_delete(queue + suffix)
        broker.close()
