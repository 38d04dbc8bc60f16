"""Serves 20,000 requests of five tasks each, one of which fails, on uvicorn.

In both modes of the middleware and on each event loop: every task has to run exactly
once, at most `max_running` groups at a time, each failure has to be logged once, and
the memory in the end may be 10% more than after the first 2,000 requests. Prints what
it finds, and exits with 1 if something is wrong.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TypeAlias

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from postlude import BackgroundTasks, BackgroundTasksMiddleware

LOOPS = ["asyncio", "uvloop"] if find_spec("uvloop") else ["asyncio"]
MODES = ["detach=False", "detach=True"]
CONNECTIONS = 200
TASKS = 5
MAX_RUNNING = 100
# Endpoints wait while there are so many groups, or else the memory would tell how fast
# requests come in.
MAX_LEFT = 500
# How long a group takes at least, so that some have to wait for others.
SECONDS = 0.02
GROWTH = 1.1

Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Report(NamedTuple):
    """What a server knows when it has nothing left to do."""

    runs: dict[str, int]
    logged_failures: int
    other_errors: int
    most_running: int
    most_left: int
    megabytes: float


class Fault(Exception):
    """What the failing tasks raise."""


class Counter(logging.Handler):
    """Counts what is logged, for writing it is not what is to be measured."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.failures = self.others = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and isinstance(record.exc_info[1], Fault):
            self.failures += 1
        else:
            self.others += 1


def megabytes() -> float:
    """Returns how much memory this process takes."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        # The most that it has ever taken, on macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Site:
    """The application, and what it knows of its tasks by itself."""

    def __init__(self, mode: str, requests: int) -> None:
        self.app = BackgroundTasksMiddleware(
            Starlette(routes=[Route("/", self.respond), Route("/report", self.report)]),
            detach=mode == "detach=True",
            max_running=MAX_RUNNING,
        )
        self.counter = Counter()
        self.room = asyncio.Semaphore(MAX_LEFT)
        self.groups = 0
        self.runs = bytearray(requests * TASKS)
        self.left = self.most_left = self.running = self.most_running = 0

    async def respond(self, _: Request) -> Response:
        await self.room.acquire()
        self.left += 1
        self.most_left = max(self.most_left, self.left)
        first = self.groups * TASKS
        self.groups += 1
        tasks = BackgroundTasks()
        tasks.add_task(self.begin, first)
        tasks.add_task(self.work, first + 1)
        tasks.add_task(self.fail if self.groups % 2 else self.fail_async, first + 2)
        tasks.add_task(self.work, first + 3)
        tasks.add_task(self.end, first + 4)
        return PlainTextResponse("done", background=tasks)

    async def begin(self, task: int) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.work(task)
        await asyncio.sleep(SECONDS)

    def work(self, task: int) -> None:
        self.runs[task] += 1

    def fail(self, task: int) -> None:
        self.work(task)
        raise Fault

    async def fail_async(self, task: int) -> None:
        self.fail(task)

    async def end(self, task: int) -> None:
        self.work(task)
        self.running -= 1
        self.left -= 1
        self.room.release()

    async def report(self, _: Request) -> Response:
        """Answers once all tasks have run."""
        # The middleware tells nobody of the end.
        while self.left or self.app.status().running_groups:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        report = Report(
            {str(times): self.runs.count(times) for times in {*self.runs}},
            self.counter.failures,
            self.counter.others,
            self.most_running,
            self.most_left,
            megabytes(),
        )
        return JSONResponse(report._asdict())


def serve(loop: str, mode: str, requests: int) -> None:
    """Serves the application until it is told to stop; prints its port."""
    site = Site(mode, requests)
    logging.getLogger().addHandler(site.counter)
    config = uvicorn.Config(
        site.app, loop=loop, log_config=None, access_log=False, timeout_keep_alive=60
    )
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(CONNECTIONS)
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(config).run(sockets=[listener])


async def get(streams: Streams, path: str) -> bytes:
    reader, writer = streams
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    [length] = [
        int(line.split(b":")[1])
        for line in head.lower().splitlines()
        if line.startswith(b"content-length:")
    ]
    return await reader.readexactly(length)


async def load(port: int, *levels: int) -> list[Report]:
    """Sends requests up to each level, and returns what the server then reports."""
    connections = [
        await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)
    ]
    reports: list[Report] = []
    sent = 0

    async def send(streams: Streams, level: int) -> None:
        nonlocal sent
        while sent < level:
            sent += 1
            await get(streams, "/")

    for level in levels:
        await asyncio.gather(*(send(streams, level) for streams in connections))
        reports.append(Report(**json.loads(await get(connections[0], "/report"))))
    for _, writer in connections:
        writer.close()
    return reports


def soak(loop: str, mode: str, requests: int) -> bool:
    """Lets a server work, prints what comes of it, and returns whether all is well."""
    first = requests // 10
    options = [f"--requests={requests}", f"--loop={loop}", f"--serve={mode}"]
    with subprocess.Popen(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            began = perf_counter()
            early, late = asyncio.run(load(port, first, requests))
            seconds = perf_counter() - began
        finally:
            process.terminate()

    growth = late.megabytes / early.megabytes
    findings = {
        f"{late.runs.get('1', 0):,} of {requests * TASKS:,} tasks ran exactly once": (
            late.runs == {"1": requests * TASKS}
        ),
        f"{late.logged_failures:,} of {requests:,} failures were logged": (
            late.logged_failures == requests
        ),
        f"{late.other_errors or 'no'} other error was logged": not late.other_errors,
        f"at most {late.most_running} of {late.most_left:,} groups ran at once": (
            # Fewer would mean that the load was not enough to tell.
            late.most_running == MAX_RUNNING
        ),
        f"memory {early.megabytes:.1f} MB after {first:,} requests, "
        f"{late.megabytes:.1f} MB in the end ({growth - 1:+.1%})": growth <= GROWTH,
    }
    print(f"{loop}, {mode}: {requests:,} requests, {seconds:.0f} s")
    for finding, is_well in findings.items():
        print(f"  {'✓' if is_well else '✗'} {finding}")
    return all(findings.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--loop", choices=LOOPS, help="on this event loop alone")
    parser.add_argument("--serve", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.loop, options.serve, options.requests)
        return
    loops = [options.loop] if options.loop else LOOPS
    results = [soak(loop, mode, options.requests) for loop in loops for mode in MODES]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
