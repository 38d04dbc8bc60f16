"""Where the brokers are, and some that a test may stop."""

import os
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import Server, start

REQUIRED = bool(os.environ.get("POSTLUDE_REQUIRE_SERVICES"))

SERVERS = {
    "redis": os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"),
    "rabbitmq": os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//"),
    "postgresql": os.environ.get(
        "DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres"
    ),
}


def at(url: str, port: int) -> str:
    """Returns the URL of a server with another port, on this machine."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return url.replace(parts.netloc, f"{user}{at}127.0.0.1:{port}", 1)


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port, f"a URL with a port is needed, not {url}"
    return parts.hostname, parts.port


def url_of(broker: str, directory: Path) -> str:
    """Returns the URL of a broker; skips the test, or fails, if it is not there."""
    if broker == "sqlite":
        return f"sqlite:///{directory}/tasks.sqlite"
    url = SERVERS[broker]
    try:
        socket.create_connection(address(url), timeout=5).close()
    except OSError as exc:
        if REQUIRED:
            raise
        pytest.skip(f"there is no {broker} at {url}: {exc}")
    return url


@contextmanager
def closed_port() -> Generator[int]:
    """Reserves a port that refuses connections."""
    with socket.socket() as reservation:
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]


@contextmanager
def stoppable(broker: str, directory: Path) -> Generator[tuple[str, Server]]:
    """Runs a broker to be stopped: a Redis of its own, or what stands before another.

    A process that gets SIGSTOP keeps its connections, takes new ones, and answers none.
    """
    url = SERVERS[broker]
    command = ["redis-server", "--port", "{port}", "--save", "", "--dir"]
    if broker != "redis":
        host, port = address(url_of(broker, directory))
        proxy = str(Path(__file__).with_name("proxy.py"))
        command = [sys.executable, proxy, "{port}", host, str(port)]
    try:
        with start(
            [*command, *[str(directory)] * (broker == "redis")],
            log=directory / "broker.log",
        ) as server:
            yield at(url, server.port), server
            server.process.send_signal(signal.SIGCONT)
    except FileNotFoundError:
        if REQUIRED:
            raise
        pytest.skip(f"{command[0]} is not installed")
