"""Times handing a task over, by the engine's own client and by postlude, by turns.

Arguments: how many rounds, how many seconds each takes of one round. Prints JSON: per
engine, the medians of the microseconds and of the differences of the rounds; and the
engines whose library or broker is not there.
"""

import asyncio
import importlib
import json
import logging
import socket
import sys
import tempfile
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, TypeAlias

import anyio
import anyio.to_thread

from postlude import task
from postlude.engines import Message, enqueue, from_callable

# The tests have what makes the engines.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.task_costs import notify
from engines.brokers import SERVERS, address

Call: TypeAlias = Callable[[], Awaitable[object]]

ARGS = ("ada@example.org",)
KWARGS = {"message": "some notification"}

LIBRARIES = {
    "celery": "Celery",
    "dbos": "DBOS",
    "dramatiq": "Dramatiq",
    "huey": "Huey",
    "rq": "RQ",
    "taskiq": "Taskiq",
}
BROKERS = {
    "postgresql": "PostgreSQL",
    "rabbitmq": "RabbitMQ",
    "redis": "Redis",
    "sqlite": "SQLite",
}


# The engines' own calls, which take no keyword of the task for an option.


def call_celery(engine: Any, queue: str) -> Callable[[], object]:
    send = engine.native(notify).apply_async
    # As postlude does: nobody here waits for the result, so there is no need to
    # subscribe to it.
    return lambda: send(ARGS, KWARGS, ignore_result=True)


def call_dbos(engine: Any, queue: str) -> Callable[[], object]:
    client = engine._process.client
    options = {"workflow_name": f"{notify.__module__}.notify", "queue_name": queue}
    return lambda: client.enqueue(options, ARGS, KWARGS, {})


def call_dramatiq(engine: Any, queue: str) -> Callable[[], object]:
    send = engine.native(notify).send_with_options
    return lambda: send(args=ARGS, kwargs=KWARGS)


def call_huey(engine: Any, queue: str) -> Callable[[], object]:
    huey, make = engine._huey, engine.native(notify).task_class
    return lambda: huey.enqueue(make(ARGS, KWARGS))


def call_rq(engine: Any, queue: str) -> Callable[[], object]:
    send = engine._options["queue"].enqueue_call
    return lambda: send(notify, ARGS, KWARGS)


def call_taskiq(engine: Any, queue: str) -> Callable[[], object]:
    send = engine.native(notify).kiq
    return lambda: send(*ARGS, **KWARGS)


async def by_postlude() -> None:
    await enqueue(notify, *ARGS, **KWARGS)


def by_its_own(call: Callable[[], Any], *, is_async: bool = False) -> Call:
    """Returns what makes an engine's own call as it should be made in an endpoint."""
    if is_async:
        return call
    limiter = anyio.CapacityLimiter(10)
    return lambda: anyio.to_thread.run_sync(call, limiter=limiter)


async def one_round(call: Call, seconds: float) -> float:
    results: list[float] = []
    until = perf_counter() + seconds
    while not results or perf_counter() < until:
        began = perf_counter()
        await call()
        results.append(perf_counter() - began)
    # Now and then a broker or a disk takes very long.
    return median(results)


async def compare(own: Call, rounds: int, seconds: float) -> dict[str, float]:
    stock: list[float] = []
    ours: list[float] = []
    turns = [(stock, own), (ours, by_postlude)]
    for _ in range(rounds + 1):
        for results, call in turns:
            results.append(await one_round(call, seconds) * 1e6)
        turns.reverse()
    del stock[0], ours[0]  # warming up
    return {
        "stock": median(stock),
        "postlude": median(ours),
        "difference": median(p - s for s, p in zip(stock, ours, strict=True)),
    }


def is_there(broker: str) -> bool:
    try:
        if broker in SERVERS:
            socket.create_connection(address(SERVERS[broker]), timeout=5).close()
    except OSError:
        return False
    return True


@asynccontextmanager
async def opened(on: Any, broker: str, library: str) -> AsyncGenerator[Call]:
    """Opens an engine; removes afterwards what has been sent, as no worker does."""
    queue = f"postlude-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as directory:
        url = SERVERS.get(broker, f"sqlite:///{directory}/tasks.sqlite")
        make = on.make
        engine, app = make(url, queue, Path(directory), headers=None, restore=None)
        try:
            task(engine=engine)(notify)
            async with engine:
                call = globals()[f"call_{library}"](engine, queue)
                yield by_its_own(call, is_async=library == "taskiq")
        finally:
            on.close(SimpleNamespace(engine=engine, app=app))
            on.clean(url, queue)


def do_nothing(message: Message | None = None) -> None: ...


async def main(rounds: int, seconds: float) -> None:
    # DBOS warns of a function that is declared for its second database.
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, float]] = {}
    missing: list[str] = []
    for library, name in LIBRARIES.items():
        try:
            on: Any = importlib.import_module(f"engines.on_{library}")
        except ModuleNotFoundError:
            missing.append(name)
            continue
        for broker in on.BROKERS:
            label = f"{name} on {BROKERS[broker]}"
            if not is_there(broker):
                missing.append(label)
                continue
            async with opened(on, broker, library) as own:
                results[label] = await compare(own, rounds, seconds)

    async with from_callable(do_nothing, name="nothing") as engine:
        task(engine=engine)(notify)
        own = by_its_own(do_nothing)
        results["`from_callable`, which does nothing"] = await compare(
            own, rounds, seconds
        )
    print(json.dumps({"results": results, "missing": missing}))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
