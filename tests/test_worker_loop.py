"""What adapters share that an engine's worker uses: its event loop, and headers."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

import pytest
import redis.exceptions
from loops import SECONDS

from postlude.engines import _worker_loop
from postlude.engines._adapter import (
    Adapter,
    connection_errors_of_redis,
    is_plain,
)
from postlude.engines._worker_loop import run_async

request_id: ContextVar[str] = ContextVar("request_id", default="")


@pytest.fixture(autouse=True)
def new_loop() -> Generator[None]:
    """Gives each test a loop of its own, as to a process that has been forked."""
    _worker_loop._forget()
    yield
    loop = _worker_loop._loop
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)
        for thread in threading.enumerate():
            if thread.name == "postlude-loop":
                thread.join(SECONDS)
        loop.close()
    _worker_loop._forget()


def test_all_functions_run_in_one_event_loop_that_goes_on() -> None:
    async def where(*args: object, **kwargs: object) -> object:
        return asyncio.get_running_loop(), threading.get_ident(), args, kwargs

    first, second = run_async(where, 1, func=2), run_async(where, 1, func=2)
    assert first == second
    assert first[1] != threading.get_ident()
    assert first[2:] == ((1,), {"func": 2})


def test_a_function_knows_the_context_that_it_is_called_in() -> None:
    async def read() -> str:
        return request_id.get()

    token = request_id.set("7f3a")
    try:
        assert run_async(read) == "7f3a"
    finally:
        request_id.reset(token)


@pytest.mark.parametrize("error", [LookupError, SystemExit, asyncio.CancelledError])
def test_what_a_function_raises_does_not_end_the_loop(
    error: type[BaseException],
) -> None:
    async def fail() -> NoReturn:
        raise error

    async def succeed() -> int:
        return 1

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        run_async(fail)
    assert caught.type.__name__ == error.__name__
    assert run_async(succeed) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_a_function_is_cancelled_if_the_waiting_is_broken_off() -> None:
    is_cancelled = threading.Event()

    class TimeIsUp(Exception):
        pass

    def waits() -> bool:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        return frame.f_code.co_name == "wait"

    async def hang() -> None:
        while not waits():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGALRM)
        try:
            await asyncio.sleep(SECONDS)
        finally:
            is_cancelled.set()

    def time_is_up(*_: object) -> NoReturn:
        raise TimeIsUp

    earlier = signal.signal(signal.SIGALRM, time_is_up)
    try:
        with pytest.raises(TimeIsUp):
            run_async(hang)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert is_cancelled.wait(SECONDS)


FORKED = """
import os
from postlude.engines._worker_loop import run_async

async def process():
    return os.getpid()

assert run_async(process) == os.getpid()
child = os.fork()
if not child:
    os._exit(run_async(process) != os.getpid())
assert os.waitpid(child, 0)[1] == 0
print("both")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_that_has_been_forked_has_a_loop_of_its_own() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout == "both\n"


# --- headers, options ----------------------------------------------------------------


@contextmanager
def restore(headers: Mapping[str, str]) -> Generator[None]:
    token = request_id.set(headers["request-id"])
    yield
    request_id.reset(token)


def adapter(**options: object) -> Adapter:
    shared: dict[str, object] = {"timeout": 2, "threads": 1, "headers": None}
    make: type[Adapter] = Adapter
    return make("spool", **shared | options)  # type: ignore[arg-type]


def test_headers_are_restored_if_there_are_any_and_something_restores_them() -> None:
    headers = {"request-id": "7f3a"}
    with adapter(restore=restore)._restored(headers):
        assert request_id.get() == "7f3a"
    with adapter(restore=restore)._restored({}), adapter()._restored(headers):
        assert request_id.get() == ""


def test_what_restores_headers_must_be_callable() -> None:
    with pytest.raises(TypeError, match="restore must be callable, or None, not 5"):
        adapter(restore=5)


def test_an_engine_with_options_is_the_same_engine() -> None:
    engine = adapter()
    other = engine._with({"queue": "a", "limit": 1})._with({"limit": 2})
    assert other._options == {"queue": "a", "limit": 2}
    assert engine._options == {}
    other.register(restore, "restore")
    assert engine.functions == {"restore": restore}
    assert other._client is engine._client


@pytest.mark.parametrize(
    ("argument", "plain"),
    [("x", True), (None, True), (0.5, True), ([1], False), ({}, False), (b"x", False)],
)
def test_plain_is_what_cannot_change_and_any_serialiser_carries(
    argument: object, *, plain: bool
) -> None:
    assert is_plain((1, argument), {"x": True}) is plain
    assert is_plain((1,), {"x": argument}) is plain


def test_what_redis_raises_is_known_once_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "redis.exceptions", redis.exceptions)
    assert connection_errors_of_redis() == (redis.ConnectionError,)
    monkeypatch.delitem(sys.modules, "redis.exceptions")
    assert connection_errors_of_redis() == ()


def test_what_an_engine_has_made_of_a_function_is_found_by_its_name() -> None:
    engine = adapter()
    engine._tasks[f"{__name__}.restore"] = made = object()
    assert engine._task(restore) is made
    with pytest.raises(LookupError, match="is not declared with task"):
        engine._task(print)
