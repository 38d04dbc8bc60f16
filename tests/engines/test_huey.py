"""What is particular to Huey."""

import sqlite3
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest
from huey import Huey, MemoryHuey, SqliteHuey
from huey.api import Task

from engines.functions import declared, returning
from postlude.engines import BrokerUnreachable, enqueue, enqueue_sync
from postlude.engines.huey import HueyEngine

request_id: ContextVar[str] = ContextVar("request_id", default="none")


@pytest.fixture
def huey() -> Any:
    return MemoryHuey()


def consume(huey: Any) -> Any:
    """Does what a consumer does with the next task; returns its result."""
    waiting = huey.dequeue()
    huey.execute(waiting)
    return huey.result(waiting.id)


# --- declared ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_options_are_those_of_huey(huey: Any) -> None:
    engine = HueyEngine(huey)
    func = returning(engine.options(retries=3, retry_delay=5, priority=7, expires=60))
    async with engine:
        await enqueue(func)
    [waiting] = huey.pending()
    assert (waiting.retries, waiting.retry_delay, waiting.priority) == (3, 5, 7)
    assert waiting.expires_resolved is not None
    assert engine._options == {}


@pytest.mark.parametrize("option", ["context", "name"])
def test_options_that_would_break_the_function_are_refused(
    huey: Any, option: str
) -> None:
    with pytest.raises(TypeError, match=f"^{option}= is not for postlude: the "):
        HueyEngine(huey).options(**{option: True})


def test_an_option_that_huey_does_not_have_is_refused(huey: Any) -> None:
    tagged = type("Tagged", (Task,), {"tag": "none"})
    engine = HueyEngine(huey)
    for option in "retrys", "execute", "kwargs":
        with pytest.raises(
            TypeError, match=rf"{option}= is no option .* retry_delay, "
        ):
            engine.options(**{option: 3})
    with pytest.raises(
        TypeError, match=r"tag= .* write task_base=\.\.\., a class that"
    ):
        engine.options(tag="big")
    func = returning(engine.options(task_base=tagged).options(tag="big"))
    assert engine.native(func).task_class.tag == "big"


@pytest.mark.parametrize("huey", [None, "tasks.db", Huey])
def test_what_is_no_huey_is_refused(huey: Any) -> None:
    with pytest.raises(TypeError, match=r"huey must be a huey\.Huey, not "):
        HueyEngine(huey)


@pytest.mark.anyio
async def test_of_two_functions_of_a_name_the_newest_runs(huey: Any) -> None:
    def returning(value: int) -> Callable[..., Any]:
        def twice() -> int:
            return value

        # A module that is imported again makes its engine again.
        return declared(HueyEngine(huey), twice)

    returning(1)
    newest = returning(2)
    async with HueyEngine(huey) as engine:
        engine.register(newest, f"{__name__}.twice")
        message = engine.prepare(f"{__name__}.twice", (), {}, {})
        await engine.submit(message)
    assert consume(huey) == 2


def test_a_task_of_the_application_is_not_replaced(huey: Any) -> None:
    def mine() -> None: ...

    huey.task()(mine)
    with pytest.raises(ValueError, match="with the same identifier as existing task"):
        declared(HueyEngine(huey), mine)


# --- sent ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_signals_of_huey_are_sent_and_immediate_mode_runs_at_once() -> None:
    huey: Any = MemoryHuey(immediate=True)
    seen: list[str] = []

    def note(signal: str, task: Any) -> None:
        seen.append(signal)

    huey.signal()(note)
    engine = HueyEngine(huey)
    func = returning(engine)
    async with engine:
        receipt = await enqueue(func, 42)
    assert huey.result(receipt.id) == [(42,), {}]
    assert seen == ["enqueued", "executing", "complete"]


# --- run -----------------------------------------------------------------------------


def test_async_functions_run_in_one_event_loop(huey: Any) -> None:
    loops: list[object] = []
    engine = HueyEngine(huey)

    async def waiting(photo: int) -> int:
        await anyio.lowlevel.checkpoint()
        loops.append(anyio.lowlevel.current_token())
        return 2 * photo

    declared(engine, waiting)
    for _ in range(2):
        enqueue_sync(waiting, 21)
        assert consume(huey) == 42
    assert loops[0] == loops[1]


def headers() -> Mapping[str, str]:
    return {"request-id": request_id.get()}


@contextmanager
def restoring(headers: Mapping[str, str]) -> Generator[None]:
    token = request_id.set(headers["request-id"])
    try:
        yield
    finally:
        request_id.reset(token)


def test_headers_are_restored_around_the_function(huey: Any) -> None:
    engine = HueyEngine(huey, headers=headers, restore=restoring)
    tried: list[str] = []

    async def waiting(*args: object, **kwargs: object) -> Any:
        return [request_id.get(), args, kwargs]

    def working(**kwargs: object) -> None:
        tried.append(request_id.get())
        raise LookupError

    declared(engine, waiting)
    declared(engine.options(retries=1), working)
    token = request_id.set("7")
    enqueue_sync(waiting, 42, size=1)
    enqueue_sync(working)
    request_id.reset(token)
    assert consume(huey) == ["7", (42,), {"size": 1}]
    # Tried again, it still has them.
    for _ in range(2):
        huey.execute(huey.dequeue())
    assert tried == ["7", "7"]
    # What Huey's own tools send has none.
    engine.native(waiting).schedule((42,), delay=-1)
    assert consume(huey) == ["none", (42,), {}]


# --- brokers -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_database_that_cannot_be_opened_is_out_of_reach(tmp_path: Path) -> None:
    huey = SqliteHuey(filename=str(tmp_path / "tasks.db"), timeout=0.01)
    engine = HueyEngine(huey)
    func = returning(engine)
    blocker = sqlite3.connect(tmp_path / "tasks.db")
    blocker.execute("begin exclusive")
    async with engine:
        with pytest.raises(
            BrokerUnreachable, match=r"huey is out of reach for .* locked"
        ):
            await enqueue(func)
        blocker.close()
        await enqueue(func)
    assert len(huey) == 1
    huey.storage.close()
