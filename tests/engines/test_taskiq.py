"""What is particular to Taskiq."""

import asyncio
import dataclasses
import functools
import gc
import os
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pydantic
import pytest
import redis
from loops import BACKENDS, Backend
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from taskiq import (
    BrokerMessage,
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqEvents,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqState,
)
from taskiq_redis import ListQueueBroker, RedisStreamBroker

from engines.brokers import stoppable
from engines.functions import declared, returning
from postlude import BackgroundTask
from postlude.engines import (
    BrokerUnreachable,
    OutcomeUnknown,
    Refused,
    enqueue,
    enqueue_sync,
)
from postlude.engines import taskiq as taskiq_engine
from postlude.engines.taskiq import TaskiqEngine

request_id: ContextVar[str] = ContextVar("request_id", default="none")


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """Runs each async test where Taskiq does."""
    return BACKENDS[request.param]


class Broker(InMemoryBroker):
    """Runs what it is sent, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[BrokerMessage] = []
        self.started = 0
        self.in_loops: list[object] = []
        self.failure: Exception | None = None

    async def startup(self) -> None:
        self.started += 1
        if self.failure is not None:
            raise self.failure
        await super().startup()

    async def shutdown(self) -> None:
        self.started -= 1

    async def kick(self, message: BrokerMessage) -> None:
        self.sent.append(message)
        self.in_loops.append(asyncio.get_running_loop())
        await super().kick(message)

    async def result(self, task_id: str) -> Any:
        await self.wait_all()
        result = await self.result_backend.get_result(task_id)
        result.raise_for_error()
        return result.return_value


@pytest.fixture
def broker() -> Broker:
    return Broker()


# --- declared ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_options_are_labels(broker: Broker) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine.options(timeout=5, queue="big", retry=True))
    async with engine:
        await enqueue(func)
    message = broker.formatter.loads(broker.sent[0].message)
    message.parse_labels()
    assert message.labels == {"timeout": 5, "queue": "big", "retry": True}
    assert engine._options == {}


@pytest.mark.parametrize("option", ["func", "task_name"])
def test_options_by_which_a_worker_would_not_find_it_are_refused(
    broker: Broker, option: str
) -> None:
    with pytest.raises(TypeError, match=f"^{option}= is not for postlude: the worker"):
        TaskiqEngine(broker).options(**{option: "x"})


@pytest.mark.parametrize("broker", [None, "redis://", InMemoryBroker])
def test_what_is_no_broker_is_refused(broker: Any) -> None:
    with pytest.raises(TypeError, match=r"broker must be a taskiq\.AsyncBroker, not "):
        TaskiqEngine(broker)


@pytest.mark.anyio
async def test_of_two_functions_of_a_name_the_newest_runs(broker: Broker) -> None:
    engine = TaskiqEngine(broker)

    def returning(value: int) -> Callable[..., Any]:
        async def twice() -> int:
            return value

        return declared(engine, twice)

    returning(1)
    newest = returning(2)
    async with engine:
        receipt = await enqueue(newest)
        assert await broker.result(receipt.id) == 2


def depending(
    photo: int,
    context: Annotated[Context | None, TaskiqDepends(Context)] = None,
    **rest: Any,
) -> Any:
    assert context is not None
    return [photo, context.message.task_name, rest]


async def also_depending(
    photo: "int", *, context: "Annotated[Context | None, TaskiqDepends(Context)]" = None
) -> Any:
    assert context is not None
    return [photo, context.message.task_name, {}]


@pytest.mark.anyio
@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("func", [depending, also_depending])
async def test_what_a_function_depends_on_taskiq_gives_it(
    broker: Broker, func: Any, restores: bool
) -> None:
    restore: Any = restoring if restores else None
    engine = TaskiqEngine(broker, restore=restore)
    engine.register(func, name := f"{__name__}.{func.__name__}")
    async with engine:
        receipt = await engine.submit(engine.prepare(name, ("42",), {}, {}))
        assert await broker.result(receipt.id) == [42, name, {}]


# --- sent ----------------------------------------------------------------------------


class Photo(pydantic.BaseModel):
    id: int


@dataclasses.dataclass
class Size:
    width: int


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("argument", "arrives"),
    [
        (Photo(id=1), {"id": 1}),
        (Size(2), {"width": 2}),
        ((1, 2), [1, 2]),
        ({1: 2}, {"1": 2}),
        (Decimal("1.5"), "1.5"),
    ],
    ids=["model", "dataclass", "tuple", "int keys", "decimal"],
)
async def test_arguments_arrive_as_taskiq_writes_them(
    broker: Broker, argument: object, arrives: object
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    async with engine:
        receipt = await enqueue(func, photo=argument)
        assert await broker.result(receipt.id) == [(), {"photo": arrives}]


@pytest.mark.anyio
async def test_a_generator_arrives_as_a_list(broker: Broker) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    async with engine:
        receipt = await enqueue(func, (i for i in range(2)))
        assert await broker.result(receipt.id) == [([0, 1],), {}]


@pytest.mark.anyio
async def test_the_middlewares_of_the_broker_see_what_is_sent(broker: Broker) -> None:
    seen: list[Any] = []

    class Noting(TaskiqMiddleware):
        def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
            message.labels["order"] = message.labels.get("order", "") + "a"
            return message

        async def post_send(self, message: TaskiqMessage) -> None:
            seen.append((message.task_id, message.labels["order"]))

    class Later(TaskiqMiddleware):
        async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
            message.labels["order"] += "b"
            return message

        def post_send(self, message: TaskiqMessage) -> None:
            seen.append("later")

    broker.add_middlewares(Noting(), Later())
    engine = TaskiqEngine(broker)
    func = returning(engine)
    async with engine:
        task = BackgroundTask(func)
        for _ in range(2):
            await task()
            assert task.receipt is not None
            assert seen[-2:] == ["later", (task.receipt.id, "ab")]
    assert broker.sent[1].labels["order"] == "ab"


@pytest.mark.anyio
async def test_a_middleware_that_fails_once_it_is_sent_does_not_make_it_refused(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    class Noting(TaskiqMiddleware):
        def post_send(self, message: TaskiqMessage) -> None:
            seen.append(message.task_id)

    class Failing(TaskiqMiddleware):
        async def post_send(self, message: TaskiqMessage) -> None:
            raise LookupError("no such metric")

    broker.add_middlewares(Noting(), Failing())
    engine = TaskiqEngine(broker)
    func = returning(engine)
    async with engine:
        receipt = await enqueue(func, 42)
        assert await broker.result(receipt.id) == [(42,), {}]
    assert seen == [receipt.id]
    [record] = caplog.records
    assert record.name == "postlude"
    assert record.levelname == "ERROR"
    assert record.message.startswith("post_send of ")
    assert record.message.endswith(f"failed for '{returning.__module__}.call'")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "no such metric"


@pytest.mark.anyio
async def test_taskiq_tries_again_what_fails(broker: Broker) -> None:
    broker.add_middlewares(SimpleRetryMiddleware())
    tried: list[str] = []
    engine = TaskiqEngine(broker, headers=headers, restore=restoring)
    retrying = engine.options(
        retry_on_error=True, max_retries=3, types_of_exceptions=(LookupError,)
    )

    async def failing() -> None:
        tried.append(request_id.get())
        raise LookupError

    declared(retrying, failing)
    async with engine:
        token = request_id.set("7")
        added = BackgroundTask(failing)
        request_id.reset(token)
        await added()
        with anyio.fail_after(10):
            while len(tried) < 3:
                await broker.wait_all()
    assert tried == ["7"] * 3


# --- headers -------------------------------------------------------------------------


def headers() -> Mapping[str, str]:
    return {"request-id": request_id.get()}


@contextmanager
def restoring(headers: Mapping[str, str]) -> Generator[None]:
    token = request_id.set(headers["request-id"])
    try:
        yield
    finally:
        request_id.reset(token)


@pytest.mark.anyio
async def test_headers_are_restored_around_the_function(broker: Broker) -> None:
    engine = TaskiqEngine(broker, headers=headers, restore=restoring)

    async def waiting(photo: int) -> str:
        await anyio.lowlevel.checkpoint()
        return request_id.get()

    def working(photo: int, /, **rest: object) -> str:
        assert rest == {"size": 1}
        return request_id.get()

    declared(engine, waiting)
    declared(engine, working)
    async with engine:
        token = request_id.set("7")
        added = BackgroundTask(waiting, 42)
        request_id.reset(token)
        await added()
        assert added.receipt is not None
        assert await broker.result(added.receipt.id) == "7"
        receipt = await enqueue(working, 42, size=1)
        assert await broker.result(receipt.id) == "none"
        # What another program sends has none.
        native = await engine.native(waiting).kiq(42)
        assert await broker.result(native.task_id) == "none"
    assert "request-id" not in broker.formatter.loads(broker.sent[0].message).kwargs


@pytest.mark.anyio
async def test_a_trace_goes_on_in_the_worker(broker: Broker) -> None:
    tracer = TracerProvider().get_tracer(__name__)

    def inject() -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return carrier

    @contextmanager
    def span(headers: Mapping[str, str]) -> Generator[None]:
        parent = propagate.extract(headers)
        with tracer.start_as_current_span("run", context=parent):
            yield

    engine = TaskiqEngine(broker, headers=inject, restore=span)

    async def traced() -> list[int]:
        here: Any = trace.get_current_span()
        return [here.get_span_context().trace_id, here.parent.span_id]

    declared(engine, traced)
    async with engine:
        with tracer.start_as_current_span("request") as request:
            receipt = await enqueue(traced)
        context = request.get_span_context()
        told = await broker.result(receipt.id)
    assert told == [context.trace_id, context.span_id]


# --- open ----------------------------------------------------------------------------


def test_the_engine_starts_the_broker_in_each_lifespan_and_event_loop(
    broker: Broker,
) -> None:
    engine = TaskiqEngine(broker)

    async def waiting() -> None: ...

    declared(engine, waiting)

    async def live() -> None:
        for _ in range(2):
            async with engine, engine:
                assert broker.started == 1
                await enqueue(waiting)
            assert broker.started == 0
            with pytest.raises(RuntimeError, match="'taskiq' is not open"):
                await enqueue(waiting)

    for _ in range(2):
        anyio.run(live)
    assert len(broker.sent) == 4
    assert len({*broker.in_loops}) == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (ConnectionError("no"), BrokerUnreachable, "cannot start: ConnectionError: no"),
        (redis.ConnectionError("no"), BrokerUnreachable, "cannot start: .*: no"),
        (redis.TimeoutError("no"), BrokerUnreachable, "cannot start: .*: no"),
        (TimeoutError("no"), BrokerUnreachable, "cannot start: TimeoutError: no"),
        # Of an event handler, say.
        (LookupError("no"), LookupError, "^no$"),
    ],
)
async def test_a_start_that_fails_leaves_the_engine_closed(
    broker: Broker, failure: Exception, error: type[Exception], message: str
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    broker.failure = failure
    with pytest.raises(error, match=message):
        await engine.__aenter__()
    with pytest.raises(RuntimeError, match="'taskiq' is not open"):
        await enqueue(func)
    broker.failure = None
    async with engine:
        await enqueue(func)


@pytest.mark.anyio
async def test_hand_overs_from_other_event_loops_go_to_that_of_the_broker(
    broker: Broker,
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)

    async with engine:
        # Of the thread postlude knows as little as of one of a worker.
        script = functools.partial(enqueue_sync, func, 42)
        loop = asyncio.get_running_loop()
        receipt = await loop.run_in_executor(None, script)
        assert broker.started == 1
        assert broker.in_loops == [asyncio.get_running_loop()]
        assert await broker.result(receipt.id) == [(42,), {}]


@pytest.mark.anyio
@pytest.mark.parametrize("ends", ["too late", "with its loop", "with an error"])
async def test_what_becomes_of_a_hand_over_elsewhere_is_told(
    broker: Broker, ends: str
) -> None:
    engine = TaskiqEngine(broker, timeout=0.2 if ends == "too late" else 10)
    func = returning(engine)
    is_open, is_kicked, is_closed = (threading.Event() for _ in range(3))

    async def kick(message: BrokerMessage) -> None:
        is_kicked.set()
        if ends == "with an error":
            raise LookupError("no such queue")
        await anyio.sleep_forever()

    broker.kick = kick  # type: ignore[method-assign]

    async def elsewhere() -> None:
        async with engine:
            is_open.set()
            await anyio.to_thread.run_sync(is_kicked.wait, 10)
            if ends != "with its loop":
                await anyio.to_thread.run_sync(is_closed.wait, 10)

    error, told = {
        "too late": (OutcomeUnknown, "taskiq did not answer within"),
        "with its loop": (OutcomeUnknown, "the event loop of the broker has ended"),
        "with an error": (Refused, "no such queue"),
    }[ends]
    async with anyio.create_task_group() as group:
        in_thread = functools.partial(anyio.run, elsewhere)
        group.start_soon(functools.partial(anyio.to_thread.run_sync, in_thread))
        await anyio.to_thread.run_sync(is_open.wait, 10)
        async with engine:
            with anyio.fail_after(5), pytest.raises(error, match=told):
                await enqueue(func)
        is_closed.set()


@pytest.mark.anyio
async def test_once_the_event_loop_of_the_broker_has_closed_it_others_are_told(
    broker: Broker,
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    is_open, is_closed = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        async with engine:
            is_open.set()
            await anyio.to_thread.run_sync(is_closed.wait, 10)
            with pytest.raises(BrokerUnreachable, match="opened the engine first has"):
                await enqueue(func)

    async with anyio.create_task_group() as group:
        async with engine:
            in_thread = functools.partial(anyio.run, elsewhere)
            group.start_soon(functools.partial(anyio.to_thread.run_sync, in_thread))
            await anyio.to_thread.run_sync(is_open.wait, 10)
        is_closed.set()
    assert broker.sent == []


def test_an_event_loop_that_ended_without_closing_the_engine_leaves_it_usable(
    broker: Broker,
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)

    async def leave() -> None:
        await engine.__aenter__()
        await enqueue(func)

    async def live() -> None:
        async with engine:
            assert broker.started == 1
            await enqueue(func)
        assert broker.started == 0

    anyio.run(leave)
    for _ in range(2):
        anyio.run(live)
    assert len({*broker.in_loops}) == 3


@pytest.mark.parametrize("kind", [ListQueueBroker, RedisStreamBroker])
def test_the_connections_of_an_event_loop_that_ended_are_not_used(
    kind: Any, tmp_path: Path
) -> None:
    def leave_and_live(url: str) -> None:
        engine = TaskiqEngine(kind(url))
        func = returning(engine)

        async def leave() -> None:
            await engine.__aenter__()
            await enqueue(func)

        async def live() -> None:
            async with engine:
                await enqueue(func)

        anyio.run(leave)
        anyio.run(live)

    with stoppable("redis", tmp_path) as (url, _), warnings.catch_warnings():
        # Some connections say when they go that nobody has closed them.
        warnings.simplefilter("ignore", ResourceWarning)
        leave_and_live(url)
        gc.collect()


@pytest.mark.anyio
async def test_hand_overs_to_an_event_loop_that_ended_are_told_so(
    broker: Broker,
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    is_open, is_entered = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        await engine.__aenter__()
        is_open.set()
        await anyio.to_thread.run_sync(is_entered.wait, 10)

    async with anyio.create_task_group() as group:
        group.start_soon(
            anyio.to_thread.run_sync, functools.partial(anyio.run, elsewhere)
        )
        await anyio.to_thread.run_sync(is_open.wait, 10)
        await engine.__aenter__()
        is_entered.set()
    with pytest.raises(BrokerUnreachable, match="or is closed itself"):
        await enqueue(func)
    await engine.__aexit__()


@pytest.mark.anyio
async def test_a_broker_is_shut_down_also_if_the_lifespan_is_cancelled(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TaskiqEngine(broker)

    async def shutdown() -> None:
        await anyio.lowlevel.checkpoint()
        broker.started -= 1

    monkeypatch.setattr(broker, "shutdown", shutdown)
    with anyio.CancelScope() as scope:
        async with engine:
            scope.cancel()
    assert broker.started == 0


@pytest.mark.anyio
async def test_a_broker_that_does_not_shut_down_is_given_up(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    with monkeypatch.context() as patched:
        patched.setattr(taskiq_engine, "_SHUTDOWN_SECONDS", 0.01)
        patched.setattr(broker, "shutdown", anyio.sleep_forever)
        with anyio.fail_after(10):
            async with engine:
                pass
    assert caplog.messages == ["the Taskiq broker did not shut down within 0.01 s"]
    async with engine:
        await enqueue(func)


@pytest.mark.anyio
async def test_a_process_forked_from_that_of_the_broker_is_told(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    async with engine:
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: 0)
            with pytest.raises(RuntimeError, match="open it after the fork, or hand"):
                await engine.__aenter__()
        await enqueue(func)


def test_trio_is_told_to_be_none_of_taskiq(broker: Broker) -> None:
    engine = TaskiqEngine(broker)
    with pytest.raises(RuntimeError, match="Taskiq needs asyncio, and this is Trio"):
        anyio.run(engine.__aenter__, backend="trio")


@pytest.mark.anyio
async def test_in_a_worker_the_engine_is_open_and_starts_nothing(
    broker: Broker,
) -> None:
    broker.is_worker_process = True
    engine = TaskiqEngine(broker)
    func = returning(engine)
    await broker.startup()
    await enqueue(func)
    async with engine:
        await enqueue(func)
    assert broker.started == 1
    await enqueue(func)


@pytest.mark.anyio
async def test_only_in_a_worker_the_start_of_the_broker_opens_the_engine(
    broker: Broker,
) -> None:
    engine = TaskiqEngine(broker)
    func = returning(engine)
    await broker.startup()
    with pytest.raises(RuntimeError, match="'taskiq' is not open"):
        await enqueue(func)


def test_the_engine_leaves_other_handlers_of_the_broker_alone(broker: Broker) -> None:
    async def mine(state: TaskiqState) -> None: ...

    broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, mine)
    TaskiqEngine(broker)
    assert broker.event_handlers[TaskiqEvents.WORKER_STARTUP][0] is mine
