"""Servers in processes of their own, for what only a real server shows."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

HERE = Path(__file__).parent

UVICORN = ["uvicorn", "{app}", "--port={port}", f"--app-dir={HERE}"]
HYPERCORN = ["hypercorn", f"{HERE}/{{app}}", "--bind=127.0.0.1:{port}"]
GRANIAN = [
    *["granian", "{app}", "--interface=asgi", f"--working-dir={HERE}"],
    *["--host=127.0.0.1", "--port={port}"],
]
GUNICORN = [
    *["gunicorn", "{app}", f"--chdir={HERE}", "--bind=127.0.0.1:{port}"],
    "--no-control-socket",
]

# How to serve an application of a module beside this one.
COMMANDS = {
    "uvicorn": UVICORN,
    "uvicorn h11": [*UVICORN, "--http=h11", "--loop=asyncio"],
    "hypercorn": HYPERCORN,
    "hypercorn uvloop": [*HYPERCORN, "--worker-class=uvloop"],
    "hypercorn trio": [*HYPERCORN, "--worker-class=trio"],
    "granian": GRANIAN,
    "gunicorn": [*GUNICORN, "--worker-class=asgi"],
    "gunicorn uvicorn": [*GUNICORN, "--worker-class=uvicorn_worker.UvicornWorker"],
}


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

    def stop(self, by: signal.Signals = signal.SIGTERM, *, seconds: float = 10) -> int:
        """Sends it a signal, waits for its end and returns its exit code."""
        self.process.send_signal(by)
        return self.process.wait(timeout=seconds)

    def signal_all(self, by: signal.Signals) -> None:
        """Sends a signal to all its processes, as Ctrl+C does and systemd."""
        os.killpg(self.process.pid, by)

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
    `{port}` stands for it. What still runs of it in the end is killed.

    Args:
        command: What to run.
        log: Where to write what it prints and logs.
        environment: Variables to set for it beside those of this process.
    """
    # To measure coverage there would slow it down, and make its time limits others.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("COVERAGE_")
    }
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
            env=inherited
            | {"PORT": str(port), "PYTHONUNBUFFERED": "1"}
            | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            # By it all processes of the server can be reached.
            start_new_session=True,
        )
        with process:
            try:
                server = Server(process, port, log)
                wait_until(server.is_up)
                yield server
            finally:
                if sys.platform == "win32":
                    process.kill()
                else:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)


def serve(
    server: str,
    directory: Path,
    *,
    app: str = "served:owned",
    **environment: str,
) -> AbstractContextManager[Server]:
    """Starts one of the servers that `COMMANDS` lists.

    Args:
        server: Which one, and options for it, if any.
        directory: Where its log goes; what is held there, waits for a file `release`.
        app: What it serves.
        **environment: Variables to set for it.
    """
    return start(
        [sys.executable, "-m", *command_of(server, app)],
        log=directory / "log",
        environment={"RELEASE": str(directory / "release"), **environment},
    )


def command_of(server: str, app: str) -> list[str]:
    """Returns what to run; in it `{port}` stands for the port."""
    name, *options = re.split(" (?=--)", server)
    return [*(part.replace("{app}", app) for part in COMMANDS[name]), *options]


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
