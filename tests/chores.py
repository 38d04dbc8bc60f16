"""What worker processes are given to do by the tests; it imports little."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from postlude import task


class TwoArguments(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("it has a lock")
        self.lock = threading.Lock()


class Altered(Exception):
    """Becomes something else on its way."""

    def __init__(self) -> None:
        super().__init__("it is another")

    def __reduce__(self) -> Any:
        return ValueError, self.args


class Remade:
    """Does something when it arrives."""

    def __init__(self, func: Callable[..., object], *args: object) -> None:
        self.call = func, args

    def __reduce__(self) -> Any:
        return self.call


class Fatal(BaseException):
    """No `Exception`."""


def write(path: str, *texts: object) -> None:
    Path(path).write_text(" ".join(map(str, texts)), encoding="utf-8")


def write_pid(path: str) -> None:
    # In one piece: who waits for the file is to find all of it.
    write(f"{path}.new", os.getpid())
    Path(f"{path}.new").rename(path)


def hold(path: str) -> None:
    """Says who it is, and never ends."""
    write_pid(path)
    while True:
        time.sleep(1)


def burn(path: str) -> None:
    """Never ends, nor lets anybody else have its turn for long."""
    write_pid(path)
    while True:
        sum(range(1000))


def hold_child(path: str) -> None:
    """Has a program started that never ends."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as it:
        write(f"{path}.new", it.pid)
        Path(f"{path}.new").rename(path)


def hold_until(path: str, release: str) -> None:
    write_pid(path)
    while not Path(release).exists():
        time.sleep(0.01)
    write(path, "released")


def leave_fork() -> None:
    """Dies, and leaves a fork of itself to the world."""
    if os.fork() == 0:
        time.sleep(30)
    os._exit(4)


def fork_and_terminate() -> None:
    """Ends a fork by the signal that its parent is not to die of."""
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=time.sleep, args=[600])
    process.start()
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM


def die_later() -> None:
    threading.Timer(0.1, os._exit, [5]).start()


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def throw(error: type[BaseException], *args: object) -> None:
    raise error(*args)


def flood() -> None:
    for stream in sys.stdout, sys.stderr:
        stream.write("x" * 1_000_000)
        stream.flush()
    assert not sys.stdin.read()


def return_lambda() -> Callable[[], None]:
    return lambda: None


def return_awaitable() -> Awaitable[None]:
    class Ready:
        def __await__(self) -> Any:
            yield

    return Ready()


class Chores:
    """Holds methods of each kind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        write(self.path, "called")

    def method(self, text: str) -> None:
        write(self.path, text)

    @classmethod
    def class_method(cls, path: str) -> None:
        write(path, cls.__name__)

    @staticmethod
    def static(path: str) -> None:
        write(path, "static")


class Declared:
    @task(process=True)
    def __call__(self, path: str) -> None:
        write(path, "itself")

    @task(process=True)
    def method(self, path: str) -> None:
        write(path, "its method")
