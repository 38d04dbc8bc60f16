"""Servers in processes of their own, for what only a real server shows."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: Its process.
        port: Where it listens, on 127.0.0.1.
        log: The file that its standard output and error go to.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Returns the address it is reached at, without a final slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """Returns what it has printed and logged so far."""
        return self.log.read_text(encoding="utf-8")

    def connect(self) -> socket.socket:
        """Opens a plain connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Sends it a signal, waits for its end and returns its exit code."""
        self.process.send_signal(by)
        return self.process.wait(timeout=10)

    def is_up(self) -> bool:
        """Whether it accepts connections; fails if it has ended instead."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{self.output}")
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return False
        return True


@contextmanager
def start(
    command: Sequence[str], *, log: Path, environment: dict[str, str] | None = None
) -> Generator[Server]:
    """Starts a server and waits until it accepts connections.

    The server is told its port by the variable `PORT`, and by its command, in which
    `{port}` stands for it. If it still runs in the end, it is killed.

    Args:
        command: What to run.
        log: Where to write what it prints and logs.
        environment: Variables to set for it beside those of this process.
    """
    with socket.socket() as reservation, log.open("wb") as output:
        # As long as this socket is bound nobody else is given the port, and a server,
        # which sets the same option, may still listen there.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        port: int = reservation.getsockname()[1]
        if sys.platform != "linux":
            reservation.close()
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            env=os.environ
            | {"PORT": str(port), "PYTHONUNBUFFERED": "1"}
            | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with process:
            try:
                server = Server(process, port, log)
                wait_until(server.is_up)
                yield server
            finally:
                process.kill()


def wait_until(condition: Callable[[], T], *, seconds: float = 10) -> T:
    """Waits until a condition holds and returns what it returned then.

    Raises:
        TimeoutError: If it does not hold within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition!r} did not hold within {seconds} seconds")
        time.sleep(0.01)
    return result
