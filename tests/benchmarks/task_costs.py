"""Times adding and running tasks, Starlette's and postlude's by turns.

Arguments: `asyncio` or `uvloop`, how many rounds, how many seconds each takes of one
round. Prints JSON: per measure, the medians of the microseconds and of the ratios.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from statistics import median
from time import perf_counter
from typing import TypeAlias

import starlette.background
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import postlude

Stock: TypeAlias = starlette.background.BackgroundTasks
Group: TypeAlias = Stock | postlude.BackgroundTasks
Kind: TypeAlias = type[Stock] | type[postlude.BackgroundTasks]

# Few enough to stay in the processor's caches, as the tasks of one request do.
BATCH = 100


async def do_nothing() -> None: ...


def do_nothing_sync() -> None: ...


async def notify(email: str, message: str = "") -> None: ...


def add_async(group: Group) -> None:
    for _ in range(BATCH):
        group.add_task(do_nothing)


def add_sync(group: Group) -> None:
    for _ in range(BATCH):
        group.add_task(do_nothing_sync)


def add_keyword(group: Group) -> None:
    for _ in range(BATCH):
        group.add_task(notify, "ada@example.org", message="some notification")


def adding(add: Callable[[Group], None]) -> Callable[[Kind], Awaitable[float]]:
    async def seconds(kind: Kind) -> float:
        group = kind()
        began = perf_counter()
        add(group)
        return (perf_counter() - began) / BATCH

    return seconds


def running(
    count: int, *functions: Callable[[], object]
) -> Callable[[Kind], Awaitable[float]]:
    async def seconds(kind: Kind) -> float:
        groups = [kind() for _ in range(BATCH // count)]
        for group in groups:
            for number in range(count):
                group.add_task(functions[number % len(functions)])
        began = perf_counter()
        for group in groups:
            await group()
        return (perf_counter() - began) / len(groups)

    return seconds


def observe(task: postlude.BackgroundTask) -> AbstractContextManager[None]:
    return nullcontext()


@asynccontextmanager
async def alive(app: ASGIApp) -> AsyncGenerator[None]:
    """Keeps an application's lifespan going."""
    started, stopping = asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        if not started.is_set():
            return {"type": "lifespan.startup"}
        await stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Message) -> None:
        started.set()

    running = asyncio.ensure_future(app({"type": "lifespan"}, receive, send))
    await started.wait()
    yield
    stopping.set()
    await running


async def send(message: Message) -> None: ...


async def receive() -> Message:
    return {"type": "http.request"}


async def respond(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})
    began = perf_counter()
    await scope["group"]()
    scope["seconds"] = perf_counter() - began


def observed(count: int) -> Callable[[Kind], Awaitable[float]]:
    """Measures groups which, if they are ours, the middleware runs for an observer."""
    app = postlude.BackgroundTasksMiddleware(respond, observers=[observe])

    async def seconds(kind: Kind) -> float:
        scopes: list[Scope] = []
        for _ in range(BATCH // count):
            group = kind()
            for _ in range(count):
                group.add_task(do_nothing_sync)
            scopes.append(
                {"type": "http", "method": "GET", "path": "/", "group": group}
            )
        async with alive(app):
            serve = app if kind is postlude.BackgroundTasks else respond
            for scope in scopes:
                await serve(scope, receive, send)
        spent: list[float] = [scope["seconds"] for scope in scopes]
        return sum(spent) / len(spent)

    return seconds


MEASURES = {
    "add async": adding(add_async),
    "add sync": adding(add_sync),
    "add keyword": adding(add_keyword),
    "run 1 async": running(1, do_nothing),
    "run 100 async": running(100, do_nothing),
    "run 1 sync": running(1, do_nothing_sync),
    "run 10 sync": running(10, do_nothing_sync),
    "run 100 sync": running(100, do_nothing_sync),
    "run 10 mixed": running(10, do_nothing_sync, do_nothing),
    "observed 10 sync": observed(10),
}


async def one_round(
    measure: Callable[[Kind], Awaitable[float]], kind: Kind, seconds: float
) -> float:
    results: list[float] = []
    until = perf_counter() + seconds
    while not results or perf_counter() < until:
        results.append(await measure(kind))
    return sum(results) / len(results)


async def compare(
    measure: Callable[[Kind], Awaitable[float]], rounds: int, seconds: float
) -> dict[str, float]:
    stock: list[float] = []
    ours: list[float] = []
    turns: list[tuple[list[float], Kind]] = [
        (stock, starlette.background.BackgroundTasks),
        (ours, postlude.BackgroundTasks),
    ]
    for _ in range(rounds + 1):
        for results, kind in turns:
            results.append(await one_round(measure, kind, seconds) * 1e6)
        turns.reverse()
    del stock[0], ours[0]  # warming up
    return {
        "stock": median(stock),
        "postlude": median(ours),
        "ratio": median(s / p for s, p in zip(stock, ours, strict=True)),
    }


async def main(rounds: int, seconds: float) -> None:
    results = {
        name: await compare(measure, rounds, seconds)
        for name, measure in MEASURES.items()
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main_coroutine = main(int(sys.argv[2]), float(sys.argv[3]))
    if sys.argv[1] == "uvloop":
        import uvloop

        uvloop.run(main_coroutine)
    else:
        asyncio.run(main_coroutine)
