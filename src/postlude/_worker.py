"""Makes calls in a process of its own, as a script that `_limits.py` starts.

It imports nothing but the standard library, and what the calls need.
"""

import os
import pickle
import signal
import traceback
from multiprocessing import spawn
from typing import Any

Failure = tuple[bytes | None, str, str]


def main() -> None:
    """Answers requests until there are no more."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    # Whatever a function prints or reads is not to get between them.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in 0, 1, 2:
        os.dup2(nothing, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call: Any = None
    while True:
        try:
            request: Any = pickle.load(requests)
        except EOFError:
            return
        failure: Failure | None = None
        try:
            if request is None:
                (func, args, kwargs), call = call, None
                func(*args, **kwargs)
            elif type(request) is bytes:
                call = pickle.loads(request)
            else:
                spawn.prepare(request)
        except BaseException as exc:
            failure = _describe(exc)
        pickle.dump(failure, replies)
        replies.flush()


def _describe(exc: BaseException) -> Failure:
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


if __name__ == "__main__":
    main()
