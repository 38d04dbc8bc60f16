"""The event loops that tests run on, and how they wait for what happens there."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import pytest

Backend = tuple[str, dict[str, Any]]

BACKENDS: dict[str, Backend] = {
    "asyncio": ("asyncio", {"debug": True}),
    "uvloop": ("asyncio", {"debug": True, "use_uvloop": True}),
    "trio": ("trio", {}),
}

# Reached by nothing but a failure.
SECONDS = 30


def only_on(*names: str) -> pytest.MarkDecorator:
    backends = [BACKENDS[name] for name in names]
    return pytest.mark.parametrize("anyio_backend", backends, ids=names)


only_asyncio = only_on("asyncio", "uvloop")


def run(backend: Backend, main: Callable[[], Awaitable[Any]]) -> None:
    """Runs an event loop of its own."""
    name, options = backend
    anyio.run(main, backend=name, backend_options=options)


def run_until_interrupt(backend: Backend, main: Callable[[], Awaitable[Any]]) -> None:
    """Runs an event loop of its own, which Ctrl+C ends."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - Trio puts it in groups
        run(backend, main)
    kinds = [type(part) for part in _parts(caught.value)]
    # What is left behind complains when it is collected: here, not in a later test.
    del caught
    gc.collect()
    assert KeyboardInterrupt in kinds, kinds


def _parts(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [part for each in error.exceptions for part in _parts(each)]
    return [error]


def is_trio() -> bool:
    return anyio.get_cancelled_exc_class() is not asyncio.CancelledError


async def until(condition: Callable[[], object]) -> None:
    """Waits for what a thread does, of which the event loop is not told."""
    with anyio.fail_after(SECONDS):
        while not condition():  # noqa: ASYNC110 - a thread sets no event
            await anyio.sleep(0.001)


class Held:
    """A sync task that is held in its thread until it is told to go on."""

    def __init__(self, then: Callable[[], Any] = lambda: None) -> None:
        self.entered = anyio.Event()
        self.go_on = threading.Event()
        self.then = then

    def __call__(self) -> Any:
        anyio.from_thread.run_sync(self.entered.set)
        assert self.go_on.wait(SECONDS)
        return self.then()
