"""Counts the requests a second that servers complete, their tasks included.

Arguments: the event loop of the servers (`asyncio` or `uvloop`), how many rounds, how
many seconds of load each server gets in one round. All servers live at the same time;
one at a time is loaded, over connections that each send a request as soon as the last
response is there. Prints JSON: per measure, the medians of the rates and of the ratios.

The client never sleeps. On one machine it is the server that wakes it, at up to 10 µs a
response on a virtual one, the more often the slower the server is; a client elsewhere
costs its server nothing.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import cast

CONNECTIONS = 12
# Two processes of the same program differ by some percent for all their life.
LAUNCHES = 4
# What each path is compared on, the framework's own first.
PATHS = {
    "0": ["stock", "middleware"],
    "1-async": ["stock", "postlude", "responses", "middleware", "detached"],
    "1-sync": ["stock", "postlude", "responses"],
    "10-sync": ["stock", "postlude", "responses", "middleware", "detached"],
    "injected": ["fastapi-stock", "fastapi"],
}
SERVERS = list(dict.fromkeys(whose for servers in PATHS.values() for whose in servers))


class Connection(asyncio.Protocol):
    """Sends one request after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_exception(exc or ConnectionError("the server hung up"))

    async def repeat(self, path: str, until: float) -> int:
        self.request = f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self.until = until
        self.responses = 0
        self.received = b""
        self.finished = asyncio.get_running_loop().create_future()
        self.transport.write(self.request)
        await self.finished
        return self.responses

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.received.startswith(b"HTTP/1.1 200 "):
            self.finished.set_exception(ConnectionError(repr(self.received)))
        elif self.received.endswith(b"\r\n\r\ndone"):
            self.responses += 1
            self.received = b""
            if perf_counter() < self.until:
                self.transport.write(self.request)
            else:
                self.finished.set_result(None)


@contextmanager
def serving(loop: str, whose: str) -> Generator[int, None, None]:
    script = Path(__file__).with_name("server.py")
    with subprocess.Popen(
        [sys.executable, script, loop, whose], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


async def connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


async def rate(connections: list[Connection], path: str, seconds: float) -> float:
    began = perf_counter()
    until = began + seconds
    counts = await asyncio.gather(*(c.repeat(path, until) for c in connections))
    # A response leaves before its tasks run: what is still to do counts, too.
    await connections[0].repeat("drain", 0)
    return sum(counts) / (perf_counter() - began)


async def stay_awake() -> None:
    while True:  # noqa: ASYNC110 - there is nothing to wait for
        await asyncio.sleep(0)


async def main(loop: str, rounds: int, seconds: float) -> None:
    awake = asyncio.create_task(stay_awake())
    rates: dict[tuple[str, str], list[float]] = {
        (whose, path): [] for path, servers in PATHS.items() for whose in servers
    }
    launches = min(LAUNCHES, rounds)
    for _ in range(launches):
        with ExitStack() as stack:
            ports = [stack.enter_context(serving(loop, whose)) for whose in SERVERS]
            connections = {
                whose: [await connect(port) for _ in range(CONNECTIONS)]
                for whose, port in zip(SERVERS, ports, strict=True)
            }
            for path, servers in PATHS.items():
                for number in range(rounds // launches + 1):
                    for whose in servers[:: -1 if number % 2 else 1]:
                        result = await rate(connections[whose], path, seconds)
                        if number:  # the first round warms up
                            rates[whose, path].append(result)

    awake.cancel()
    results: dict[str, dict[str, float]] = {}
    for path, servers in PATHS.items():
        stock = rates[servers[0], path]
        for whose in servers[1:]:
            ours = rates[whose, path]
            results[f"{whose} {path}"] = {
                "stock": median(stock),
                "postlude": median(ours),
                "ratio": median(p / s for s, p in zip(stock, ours, strict=True)),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main_coroutine = main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    try:
        # Whatever the servers run on: the client must not be what is measured.
        import uvloop
    except ImportError:
        asyncio.run(main_coroutine)
    else:
        uvloop.run(main_coroutine)
