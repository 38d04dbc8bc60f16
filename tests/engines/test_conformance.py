"""What holds on every engine, on each of its brokers, with its real worker."""

import functools
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import pytest
from opentelemetry.sdk.trace import TracerProvider
from servers import start, wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from engines.brokers import at, closed_port, stoppable
from engines.conftest import Setup, Worker
from postlude import BackgroundTask, BackgroundTasksMiddleware, TaskState, add_task
from postlude.engines import (
    BrokerUnreachable,
    EngineError,
    NotSerialisable,
    OutcomeUnknown,
    Receipt,
    enqueue,
    enqueue_sync,
)

pytestmark = pytest.mark.anyio

Recorded = Callable[..., list[dict[str, Any]]]

KINDS = ["record", "record_async", "record_with_options"]


def function(setup: Setup, name: str, why: str = "runs no async functions") -> Any:
    if not hasattr(setup.declared, name):
        pytest.skip(f"{setup.library} {why}")
    return getattr(setup.declared, name)


def test_a_function_stays_what_it_is(setup: Setup, key: str) -> None:
    record = setup.declared.record
    assert type(record) is FunctionType
    assert (record.__name__, record.__qualname__) == ("record", "record")
    assert vars(record).keys() == {"__postlude_options__"}
    assert setup.declared.engine.functions["engines.declared.record"] is record
    record(key)
    assert [entry["process"] for entry in setup.records(key)] == [os.getpid()]


# --- handed over ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_function_runs_in_the_worker(
    setup: Setup, worker: Worker, key: str, recorded: Recorded, kind: str
) -> None:
    async with setup.declared.engine:
        receipt = await enqueue(function(setup, kind), key, 1, [2], x={"y": None})
    assert receipt.engine == setup.library
    assert receipt.id
    [entry] = recorded()
    assert (entry["args"], entry["kwargs"]) == ([1, [2]], {"x": {"y": None}})
    assert entry["process"] != os.getpid()


def test_enqueue_sync_works_in_a_script(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    assert enqueue_sync(setup.declared.record, key).engine == setup.library
    assert recorded()


async def test_no_keyword_of_a_function_is_an_option_of_the_engine(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    kwargs = {name: f"the {name}" for name in setup.declared.COLLIDING}
    collide, record = setup.declared.collide, setup.declared.record
    async with setup.declared.engine:
        await enqueue(collide, key, **kwargs)
        await enqueue(record, key, **kwargs)
        await BackgroundTask(functools.partial(collide, key, **kwargs))()
    assert [entry["kwargs"] for entry in recorded(3)] == [kwargs] * 3


async def test_enqueue_hands_over_before_the_response_and_add_task_after_it(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    record, tasks, states = setup.declared.record, list[BackgroundTask](), list[Any]()

    async def endpoint(request: Request) -> Response:
        tasks.append(add_task(record, key, "after"))
        receipt = await enqueue(record, key, "before")
        return JSONResponse(receipt._asdict(), status_code=202)

    app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", endpoint)]))

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            await send(message)
            states.append((tasks[0].state, tasks[0].receipt))

        await app(scope, receive, watch)

    async with setup.declared.engine:
        transport = httpx2.ASGITransport(watched)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://test"
        ) as http:
            response = await http.get("/")
    assert response.status_code == 202
    assert {*states} == {(TaskState.PENDING, None)}
    assert tasks[0].state is TaskState.SUCCEEDED
    assert tasks[0].receipt
    assert tasks[0].receipt.engine == response.json()["engine"] == setup.library
    assert tasks[0].receipt.id != response.json()["id"]
    assert sorted(entry["args"] for entry in recorded(2)) == [["after"], ["before"]]


async def test_what_was_added_is_sent_each_time_as_a_task_of_its_own(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    items, receipts = {"x": [1]}, list[Receipt | None]()
    async with setup.declared.engine:
        task = BackgroundTask(setup.declared.record, key, items)
        items["x"].append(2)
        for _ in range(2):
            await task()
            receipts.append(task.receipt)
    assert receipts[0] != receipts[1]
    assert [entry["args"] for entry in recorded(2)] == [[{"x": [1]}]] * 2


async def test_the_means_of_the_engine_itself_work(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    engine, record = setup.declared.engine, setup.declared.record
    native = record
    # RQ takes the function itself.
    if hasattr(engine, "native"):
        native = engine.native(record)
        with pytest.raises(LookupError, match="is not declared with task"):
            engine.native(setup.declared.note)
    async with engine:
        await anyio.to_thread.run_sync(setup.on.send, native, key, 1)
    [entry] = recorded()
    assert (entry["args"], entry["kwargs"]) == ([1], {})


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_what_a_request_knows_reaches_the_function(
    setup: Setup, worker: Worker, key: str, recorded: Recorded, kind: str
) -> None:
    func, request_id = function(setup, kind), setup.declared.request_id
    tracer = TracerProvider().get_tracer(__name__)
    token = request_id.set("7f3a")
    try:
        async with setup.declared.engine:
            with tracer.start_as_current_span("request") as span:
                task = BackgroundTask(func, key)
            request_id.set("another")
            await task()
            await enqueue(func, key)
    finally:
        request_id.reset(token)
    trace_id = format(span.get_span_context().trace_id, "032x")
    first, second = sorted(recorded(2), key=lambda entry: entry["request_id"])
    assert (first["request_id"], first["trace_id"]) == ("7f3a", trace_id)
    assert (second["request_id"], second["trace_id"]) == ("another", "0" * 32)
    # They are not among the keywords.
    assert first["kwargs"] == {}


# --- lifespan, bad input -------------------------------------------------------------


async def test_an_engine_is_used_within_its_lifespan_alone(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    engine, record = setup.declared.engine, setup.declared.record
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"'{setup.library}' is not open"):
            BackgroundTask(record, key)
        with pytest.raises(RuntimeError, match=f"'{setup.library}' is not open"):
            await enqueue(record, key)
        async with engine:
            await enqueue(record, key)
            late = BackgroundTask(record, key)
        with pytest.raises(RuntimeError, match=f"'{setup.library}' is not open"):
            await late()
    assert len(recorded(2)) == 2


def test_an_engine_works_in_one_event_loop_after_the_other(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    async def lifespan() -> Receipt:
        async with setup.declared.engine:
            return await enqueue(setup.declared.record, key)

    assert len({anyio.run(lifespan).id for _ in range(3)}) == 3
    assert len(recorded(3)) == 3


async def test_what_cannot_be_sent_is_refused_when_it_is_added(setup: Setup) -> None:
    record = setup.declared.record
    async with setup.declared.engine:
        with pytest.raises(NotSerialisable, match=r"engines\.declared\.record"):
            BackgroundTask(record, "key", threading.Lock())
        with pytest.raises(NotSerialisable, match=f"{setup.library} cannot be sent"):
            await enqueue(record, "key", lock=threading.Lock())


# --- in the worker -------------------------------------------------------------------


async def test_a_failure_stays_in_the_worker_where_the_engine_tells_of_it(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    async with setup.declared.engine:
        task = BackgroundTask(setup.declared.fail, key)
        await task()
        assert (task.state, task.exception) == (TaskState.SUCCEEDED, None)
        assert recorded()
        tell = functools.partial(setup.on.failure, setup.declared, task.receipt)
        told = await anyio.to_thread.run_sync(tell)
        assert "LookupError" in told
        assert key in told
        # The worker goes on.
        await enqueue(setup.declared.record, key, "next")
    assert recorded(2)[-1]["args"] == ["next"]


@pytest.mark.parametrize("kind", ["hand_on", "hand_on_async"])
async def test_in_a_worker_tasks_are_enqueued_not_added(
    setup: Setup, worker: Worker, key: str, recorded: Recorded, kind: str
) -> None:
    async with setup.declared.engine:
        await enqueue(function(setup, kind), key)
    [[refused], next_one] = [entry["args"] for entry in recorded(2)]
    assert "enqueue" in refused
    assert next_one == ["handed on"]


async def test_a_function_that_the_worker_does_not_know_does_no_harm(
    setup: Setup, worker: Worker, key: str, recorded: Recorded
) -> None:
    declared = setup.declared
    async with declared.engine:
        receipt = await enqueue(declared.unknown, key)
        await enqueue(declared.record, key, "next")
        assert [entry["args"] for entry in recorded()] == [["next"]]
        seen = functools.partial(setup.on.is_unknown, declared, receipt, worker.output)
        await anyio.to_thread.run_sync(lambda: wait_until(seen, seconds=30))


@pytest.mark.parametrize("kind", ["hang", "hang_at_least_once"])
async def test_a_task_whose_worker_is_killed_is_lost_or_runs_again(
    setup: Setup,
    key: str,
    tmp_path: Path,
    kind: str,
    measured: Callable[[str, str], None],
) -> None:
    is_lost = kind == "hang" and setup.on.AFTER_KILL == "lost"
    function(setup, kind, "has one guarantee")
    own = Setup(setup.on, setup.broker, setup.url, tmp_path, {"VISIBILITY": "2"})
    declared = own.load()
    try:
        async with declared.engine:
            await enqueue(getattr(declared, kind), key)
            with own.worker("killed") as killed:
                wait_until(lambda: own.records(key), seconds=30)
                [entry] = own.records(key)
                # Some engines take a moment to acknowledge what has begun.
                await anyio.sleep(0.5)
                killed.kill(entry["process"])
            assert len(own.records(key)) == 1
            count = 2 if is_lost else 3
            with own.worker():
                # Some engines look for what has been left when something comes.
                await enqueue(declared.record, key, "next")
                wait_until(lambda: len(own.records(key)) >= count, seconds=60)
        assert len(own.records(key)) == count
        measured(f"{kind} whose worker is killed", "lost" if is_lost else "runs again")
    finally:
        own.on.close(declared)
        own.on.clean(own.url, own.queue)


# --- a broker that is not there ------------------------------------------------------


async def kind_of_failure(func: Callable[..., None]) -> type[BaseException] | None:
    try:
        await enqueue(func, "key")
    except EngineError as exc:
        return type(exc)
    return None


@asynccontextmanager
async def stalls_measured() -> AsyncGenerator[list[float]]:
    """Measures how late the event loop is, in seconds."""
    stalls: list[float] = []

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await anyio.sleep(0.001)
            stalls.append(time.perf_counter() - began - 0.001)

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield stalls
        group.cancel_scope.cancel()


def p99(stalls: list[float]) -> float:
    return sorted(stalls)[int(0.99 * len(stalls))]


def need_a_server(setup: Setup) -> None:
    if setup.broker == "sqlite":
        pytest.skip("there is no server")


async def test_a_broker_that_is_not_there_is_told_in_time(setup: Setup) -> None:
    need_a_server(setup)
    with closed_port() as port:
        url = at(setup.url, port)
        declared = setup.load(POSTLUDE_BROKER=url, POSTLUDE_TIMEOUT="10")
        with anyio.fail_after(15), pytest.raises(BrokerUnreachable):
            # Some engines say so when they are opened.
            async with declared.engine:
                await enqueue(declared.record, "key")


# Pika leaves sockets of its own open if a connection breaks while it is being made.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)
async def test_a_broker_that_is_stopped_costs_little(
    setup: Setup, tmp_path: Path, measured: Callable[[str, str], None]
) -> None:
    need_a_server(setup)
    before = threading.active_count()

    async def call_250_times(func: Callable[..., None], broker: str) -> list[Any]:
        kinds: list[Any] = []

        async def call() -> None:
            kinds.append(await kind_of_failure(func))

        most = 0
        async with stalls_measured() as stalls, anyio.create_task_group() as calls:
            for _ in range(250):
                calls.start_soon(call)
                await anyio.sleep(0.005)
                most = max(most, threading.active_count() - before)
        stall = f"p99 of the event loop's stalls {p99(stalls) * 1e3:.1f} ms"
        measured(f"250 calls while it {broker}", f"{most} threads, {stall}")
        # Ten may call; a place is free a moment before its thread is; and Pika looks
        # addresses up in threads of its own.
        assert most <= 30
        # A call on the event loop would have stalled it for seconds.
        assert p99(stalls) < 0.05
        return kinds

    with stoppable(setup.broker, tmp_path) as (url, server):
        declared = setup.load(POSTLUDE_BROKER=url, POSTLUDE_TIMEOUT="0.5")
        engine, record = declared.engine, declared.record
        async with engine:
            with anyio.fail_after(20):
                while await kind_of_failure(record):
                    await anyio.lowlevel.checkpoint()
            server.process.send_signal(signal.SIGSTOP)
            with anyio.fail_after(5):
                with pytest.raises(OutcomeUnknown, match="may still run"):
                    await enqueue(record, "key")
            kinds = await call_250_times(record, "hangs")
            assert {*kinds} <= {OutcomeUnknown, BrokerUnreachable}
            # It works again as soon as the broker does.
            server.process.send_signal(signal.SIGCONT)
            with anyio.fail_after(20):
                while await kind_of_failure(record):
                    await anyio.lowlevel.checkpoint()
            server.process.kill()
            await anyio.to_thread.run_sync(server.process.wait)
            kinds = await call_250_times(record, "is gone")
            assert {*kinds} <= {OutcomeUnknown, BrokerUnreachable}
            assert BrokerUnreachable in kinds
    # Here, and not in the next test.
    gc.collect()


# --- many ----------------------------------------------------------------------------


async def test_a_burst_runs_each_task_once(
    setup: Setup, worker: Worker, key: str, recorded: Recorded, tmp_path: Path
) -> None:
    command = ["-m", "uvicorn", "engines.served:app", "--port={port}"]
    with start(
        [sys.executable, *command],
        log=tmp_path / "log",
        environment=setup.environment | {"POSTLUDE_TIMEOUT": "60"},
    ) as server:
        codes: list[int] = []
        async with httpx2.AsyncClient(base_url=server.url, timeout=90) as http:

            async def ask(number: int) -> None:
                response = await http.post(f"/{key}/{number}")
                codes.append(response.status_code)

            async with anyio.create_task_group() as requests:
                for number in range(50):
                    requests.start_soon(ask, number)
        assert codes == [202] * 50, server.output
        # What is still to be handed over is handed over before it ends.
        server.stop(seconds=60)
        assert "Traceback" not in server.output
    entries = recorded(1000, seconds=120)
    numbers = sorted(entry["args"][0] for entry in entries)
    assert numbers == [*range(1000)]
