"""Processes that call functions, one at a time, for all event loops."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import spawn
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import IO, Any, ClassVar, cast

_IDLE_SECONDS = 300
_SCRIPT = str(Path(__file__).with_name("_worker.py"))


class Worker:
    """A process that makes calls, one at a time; its methods block."""

    # Those of all event loops, the last to have worked at the end.
    _idle: ClassVar[list[Worker]] = []
    _lock: ClassVar = Lock()

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.process = subprocess.Popen(
            # Without the path of the script, where modules have the names of others.
            [spawn.get_executable(), "-P", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Where the terminal's Ctrl+C does not reach it.
            start_new_session=True,
        )
        self._requests = cast("IO[bytes]", self.process.stdin)
        self._replies = cast("IO[bytes]", self.process.stdout)
        self._knows_main = False
        self._ask(_preparation(with_main=False))

    @classmethod
    def take(cls, pickled: bytes) -> tuple[Worker, Exception | None]:
        """Hands a call to a process that has nothing to do; returns what failed."""
        while (worker := cls._take_idle()) is not None:
            failure = worker._load(pickled)
            # What the last call has left there may have ended it only now.
            if worker.process.poll() is None:
                return worker, failure
            worker.dismiss()
        worker = cls()
        return worker, worker._load(pickled)

    @classmethod
    def _take_idle(cls) -> Worker | None:
        with cls._lock:
            worker = cls._idle.pop() if cls._idle else None
            old = monotonic() - _IDLE_SECONDS
            dismissed = [other for other in cls._idle if other.idle_since < old]
            for other in dismissed:
                cls._idle.remove(other)
        for other in dismissed:
            other.dismiss()
        return worker

    @classmethod
    def dismiss_idle(cls) -> None:
        """Ends those that have nothing to do."""
        with cls._lock:
            dismissed = cls._idle.copy()
            cls._idle.clear()
        for worker in dismissed:
            worker.dismiss()

    def give_back(self) -> None:
        """Lets it make other calls, if it still can."""
        if self.process.poll() is None:
            self.idle_since = monotonic()
            with self._lock:
                self._idle.append(self)
        else:
            self.dismiss()

    def _load(self, pickled: bytes) -> Exception | None:
        """Hands a call over, and imports its function; returns what failed."""
        # Only a call that refers to it needs the program itself.
        if not self._knows_main and b"__main__" in pickled:
            if failure := self._ask(_preparation(with_main=True)):
                return failure
            self._knows_main = True
        return self._ask(pickled)

    def run(self) -> Exception | None:
        """Makes the call; returns what failed."""
        return self._ask(None)

    def kill(self) -> None:
        """Ends the process, and what it has started; what waits for it hears of it."""
        if sys.platform == "win32":  # pragma: no cover - tests run elsewhere
            self.process.kill()
        elif self.process.poll() is None:
            # Another thread may have seen its end meanwhile.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def dismiss(self) -> None:
        """Ends the process, and waits for its end."""
        self.kill()
        self.process.wait()
        for stream in self._requests, self._replies:
            # What it has not read nobody reads any more.
            with suppress(OSError):
                stream.close()

    def _ask(self, request: object) -> Exception | None:
        try:
            pickle.dump(request, self._requests)
            self._requests.flush()
            failure: tuple[bytes | None, str, str] | None = pickle.load(self._replies)
        except Exception:
            # Whatever it is, the process is of no use any more.
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self.dismiss()
            return RuntimeError(
                f"its process ended with exit code {self.process.returncode}"
            )
        return None if failure is None else _raised(*failure)


atexit.register(Worker.dismiss_idle)
if sys.platform != "win32":  # pragma: no branch - tests run elsewhere
    # They belong to the process that has started them.
    os.register_at_fork(after_in_child=Worker._idle.clear)


def pickle_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> bytes:
    """Returns a call as a process takes it.

    Raises:
        TypeError: If something in it cannot be pickled.
    """
    func = _bare(func)
    try:
        return pickle.dumps((func, args, kwargs))
    except Exception as exc:
        numbered = ((f"argument {number}", arg) for number, arg in enumerate(args, 1))
        named = ((f"argument {key!r}", value) for key, value in kwargs.items())
        for what, value in [("the function", func), *numbered, *named]:
            try:
                pickle.dumps(value)
            except Exception as cause:
                raise TypeError(
                    f"{name} has process=True, and {what} cannot be pickled: {cause}"
                ) from cause
        raise TypeError(f"{name} cannot be pickled: {exc}") from exc


def _bare(func: Callable[..., Any]) -> Callable[..., Any]:
    """Returns partials without the notes they carry, which stay here."""
    if not isinstance(func, partial):
        return func
    return partial(_bare(func.func), *func.args, **func.keywords)


def _raised(pickled: bytes | None, text: str, trace: str) -> Exception:
    """Returns what a function has raised in a process."""
    raised: object = None
    if pickled is not None:
        # It may have come from a module that only the process could import.
        with suppress(Exception):
            raised = pickle.loads(pickled)
    if not isinstance(raised, Exception):
        raised = RuntimeError(f"its process raised {text}")
    with suppress(Exception):
        raised.add_note(f"in its process:\n{trace}")
    return raised


def _preparation(*, with_main: bool) -> dict[str, Any]:
    """Returns what a process has to know of this one."""
    data: dict[str, Any] = spawn.get_preparation_data("postlude worker")
    del data["authkey"]
    if not with_main:
        data.pop("init_main_from_name", None)
        data.pop("init_main_from_path", None)
    return data
