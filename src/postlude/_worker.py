"""Makes calls in a process of its own, as a script that `_processes.py` starts.

It imports nothing but the standard library, and what the calls need.
"""

import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing import current_process, spawn
from threading import Thread
from typing import Any

Failure = tuple[bytes | None, str, str]

SIGNALS = signal.SIGINT, signal.SIGTERM


def main() -> None:
    """Answers requests until there are no more."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    # Whatever a function prints or reads is not to get between them.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in 0, 1, 2:
        os.dup2(nothing, descriptor)
    # They are for the server, which may drain, even if they are sent to all.
    before = {number: signal.signal(number, ignore) for number in SIGNALS}

    if sys.platform != "win32":  # pragma: no branch - tests run elsewhere
        files = [requests.fileno(), replies.fileno()]
        os.register_at_fork(
            # A signal to a fork waits until that can end by it.
            before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS),
            after_in_parent=partial(
                signal.pthread_sigmask, signal.SIG_UNBLOCK, SIGNALS
            ),
            after_in_child=partial(release, files, before),
        )
        Thread(target=end_with_server, args=[requests.fileno()], daemon=True).start()
    call: Any = None
    while True:
        try:
            request: Any = pickle.load(requests)
        except EOFError:
            return
        failure: Failure | None = None
        try:
            if request is None:
                make, call = call, None
                run(*make)
            elif type(request) is bytes:
                call = pickle.loads(request)
            else:
                prepare(request)
        except BaseException as exc:
            failure = describe(exc)
        pickle.dump(failure, replies)
        replies.flush()


def release(files: list[int], handlers: dict[signal.Signals, Any]) -> None:
    """Makes a fork of the process one that could be anybody's."""
    for file in files:
        os.close(file)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore(number: int, frame: object) -> None:
    """Does nothing, which programs that are started do not inherit."""


def prepare(data: dict[str, Any]) -> None:
    """Makes the process one that can call the functions of the server."""
    process: Any = current_process()
    # By it a program is told that it ought to guard what it does.
    process._inheriting = True
    try:
        spawn.prepare(data)
    finally:
        del process._inheriting


def run(
    func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Makes a call, and drops what it returns."""
    if isinstance(func(*args, **kwargs), Awaitable):
        raise TypeError("it returned something to be awaited, which no process does")


def end_with_server(requests: int) -> None:
    """Ends what is busy when the server has ended, and cannot say so any more."""
    poll = select.poll()
    poll.register(requests, select.POLLHUP)
    poll.poll()
    # What is not busy ends by itself.
    time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def describe(exc: BaseException) -> Failure:
    """Returns an exception itself, if it can travel, its text, and its traceback."""
    pickled: bytes | None = None
    try:
        pickled = pickle.dumps(exc)
        if type(pickle.loads(pickled)) is not type(exc):
            pickled = None
    except Exception:
        pickled = None
    try:
        text = f"{type(exc).__name__}: {exc}"
    except Exception:
        text = type(exc).__name__
    return pickled, text, "".join(traceback.format_exception(exc))


if __name__ == "__main__":  # pragma: no cover - what runs as a script is killed
    main()
