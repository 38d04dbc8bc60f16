"""Async functions in the workers of engines that know plain ones only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from threading import Lock, Thread
from typing import Any

_lock = Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run_async(
    func: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, **kwargs: Any
) -> Any:
    """Runs an async function in this process's one event loop, and waits for it.

    One event loop for all calls, as clients that a module keeps belong to the one that
    they were first used in. Context variables go there. If the waiting is broken off,
    say by a time limit of the worker, the function is cancelled.

    Returns:
        What the function returns.
    """
    call = _call(func, args, kwargs)
    future = asyncio.run_coroutine_threadsafe(call, _loop_here())
    try:
        result, failure = future.result()
    except BaseException:
        future.cancel()
        raise
    if failure is not None:
        raise failure
    return result


async def _call(
    func: Callable[..., Coroutine[Any, Any, Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, BaseException | None]:
    try:
        return await func(*args, **kwargs), None
    except asyncio.CancelledError:
        raise
    except BaseException as exc:
        # A SystemExit would end the event loop.
        return None, exc


def _loop_here() -> asyncio.AbstractEventLoop:
    global _loop  # noqa: PLW0603
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            Thread(target=_loop.run_forever, name="postlude-loop", daemon=True).start()
        return _loop


def _forget() -> None:
    """Leaves to the parent process the event loop whose thread a fork does not copy."""
    global _lock, _loop
    _lock, _loop = Lock(), None


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_forget)
