"""What calls an engine's client: errors told apart, few threads, a real broker."""

import functools
import json
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import redis
from loops import Backend
from servers import Server, start, wait_until

from postlude import (
    BackgroundTask,
    task,
)
from postlude.engines import (
    BrokerUnreachable,
    CallableEngine,
    Client,
    EngineError,
    Message,
    NotSerialisable,
    OutcomeUnknown,
    Receipt,
    Refused,
    enqueue,
    enqueue_sync,
    from_callable,
)
from postlude.engines._client import _Attempt


def declared(engine: Any) -> Callable[..., None]:
    """Returns a function of that engine."""

    def upload(*args: object, **kwargs: object) -> None: ...

    upload.__qualname__ = "upload"
    return task(engine=engine)(upload)


UPLOAD = f"{__name__}.upload"


async def wait_for(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


# --- from_callable -------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["sync", "async", "awaitable"])
async def test_a_callable_gets_the_call_and_returns_the_id(
    kind: str, anyio_backend: Backend
) -> None:
    messages: list[Message] = []
    threads: list[int] = []

    def send(message: Message) -> int:
        messages.append(message)
        threads.append(threading.get_ident())
        return 17

    async def send_async(message: Message) -> int:
        return send(message)

    how: dict[str, Any] = {
        "sync": send,
        "async": send_async,
        "awaitable": functools.partial(lambda call, message: call(message), send_async),
    }
    engine = from_callable(how[kind], name="spool", headers=lambda: {"request-id": "7"})
    func = declared(engine)
    assert engine.functions == {UPLOAD: func}
    async with engine:
        assert await enqueue(func, 42, task="x", name="y") == Receipt("spool", "17")
    [(name, body, headers)] = messages
    assert (name, headers) == (UPLOAD, {"request-id": "7"})
    assert json.loads(body) == {
        "name": UPLOAD,
        "args": [42],
        "kwargs": {"task": "x", "name": "y"},
        "headers": {"request-id": "7"},
    }
    assert (threads == [threading.get_ident()]) is (kind != "sync")


def shape(send: Any = print, name: str = "spool", **options: Any) -> CallableEngine:
    return from_callable(send, name=name, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"send": 5}, TypeError, "send must be callable, not 5"),
        ({"serialize": 5}, TypeError, "serialize must be callable, not 5"),
        ({"headers": {}}, TypeError, "headers must be callable, or None, not {}"),
        ({"name": ""}, TypeError, "name of an engine must be a string, not ''"),
        ({"timeout": "2"}, TypeError, "timeout must be seconds, or None"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0, .*, not 0"),
        ({"threads": 1.5}, TypeError, "threads must be an int, not 1.5"),
        ({"threads": 0}, ValueError, "threads must be at least 1, not 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shape(**options)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("serialize", "argument"), [(json.dumps, {1}), (pickle.dumps, threading.Lock())]
)
async def test_what_cannot_be_sent_is_refused_when_it_is_added(
    serialize: Any, argument: object
) -> None:
    async with shape(serialize=serialize) as engine:
        with pytest.raises(TypeError, match=f"spool cannot be sent a call of {UPLOAD}"):
            BackgroundTask(declared(engine), argument)
        with pytest.raises(NotSerialisable):
            await enqueue(declared(engine), argument)


@pytest.mark.parametrize("headers", [None, "x", {"id": 7}, {7: "id"}])
def test_headers_must_be_strings(headers: Any) -> None:
    func = declared(shape(headers=lambda: headers))
    with pytest.raises(TypeError, match="headers= must return a mapping of strings"):
        BackgroundTask(func)


@pytest.mark.anyio
async def test_an_engine_is_used_within_its_lifespan_alone() -> None:
    engine = shape(send=lambda message: None)
    func = declared(engine)
    with pytest.raises(RuntimeError, match="'spool' is not open: write `async with en"):
        BackgroundTask(func)
    for _ in range(2):
        async with engine, engine:
            assert await enqueue(func) == Receipt("spool", "")
            late = BackgroundTask(func)
        with pytest.raises(RuntimeError, match="is not open"):
            await late()
        with pytest.raises(RuntimeError, match="is not open"):
            await enqueue(func)


class Exotic(Exception):
    """What a client raises that has errors of its own."""


class Taken(EngineError):
    """What an adapter raises that knows better."""


@pytest.mark.anyio
@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (ConnectionRefusedError("no"), BrokerUnreachable, "out of reach for .*: no"),
        (socket.gaierror("no"), ConnectionError, "spool is out of reach"),
        (Exotic("no"), BrokerUnreachable, "Exotic: no"),
        (LookupError("no"), Refused, f"spool did not take {UPLOAD}: LookupError: no"),
        (SystemExit("no"), Refused, f"spool did not take {UPLOAD}: SystemExit: no"),
        (TimeoutError("no"), OutcomeUnknown, f"{UPLOAD} may still run: spool did not"),
        (
            redis.TimeoutError("no"),
            OutcomeUnknown,
            f"{UPLOAD} may still run: spool did",
        ),
        (Taken("it is"), Taken, "^it is$"),
    ],
    ids=lambda value: (
        type(value).__name__ if isinstance(value, BaseException) else None
    ),
)
async def test_what_a_callable_raises_is_told_apart(
    failure: BaseException, error: type[Exception], message: str, *, sync: bool
) -> None:
    def send(message: Message) -> NoReturn:
        raise failure

    async def send_async(message: Message) -> NoReturn:
        raise failure

    how: Any = send if sync else send_async
    async with shape(send=how, unreachable=(Exotic,)) as engine:
        with pytest.raises(EngineError, match=message) as caught:
            await enqueue(declared(engine))
    assert isinstance(caught.value, error)
    assert failure in (caught.value, caught.value.__cause__)


@pytest.mark.anyio
async def test_enqueue_sync_in_a_worker_thread_submits_on_the_event_loop() -> None:
    here, there = threading.get_ident(), []

    async def send(message: Message) -> str:
        there.append(threading.get_ident())
        return "17"

    async with from_callable(send, name="spool") as engine:
        func = declared(engine)
        receipt = await anyio.to_thread.run_sync(lambda: enqueue_sync(func, 42))
    assert receipt == Receipt("spool", "17")
    assert there == [here]


def test_enqueue_sync_in_a_script_runs_an_event_loop_of_its_own() -> None:
    func = declared(from_callable(lambda message: 17, name="spool"))
    assert enqueue_sync(func, 42) == Receipt("spool", "17")


def test_enqueue_sync_in_a_script_starts_no_more_than_it_takes_to_hand_over() -> None:
    class Embedded(CallableEngine):
        async def __aenter__(self) -> NoReturn:
            raise AssertionError("this starts a worker")

        @asynccontextmanager
        async def submitting(self) -> AsyncGenerator[None]:
            await super().__aenter__()
            yield
            await super().__aexit__()

    engine = Embedded(
        "spool", lambda message: 17, str, timeout=2, threads=1, headers=None
    )
    assert enqueue_sync(declared(engine), 42) == Receipt("spool", "17")


# --- time ----------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("translates", [False, True])
async def test_the_outcome_of_an_async_call_that_takes_too_long_is_unknown(
    *, translates: bool
) -> None:
    async def send(message: Message) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException:
            if translates:
                raise ConnectionError("cancelled") from None
            raise

    async with shape(send=send, timeout=0.01) as engine:
        with pytest.raises(
            TimeoutError, match=f"{UPLOAD} may still run: spool did not"
        ):
            await enqueue(declared(engine))


@pytest.mark.anyio
async def test_an_async_call_that_goes_on_when_it_is_cancelled_is_cancelled_again() -> (
    None
):
    async def send(message: Message) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep_forever()

    async with shape(send=send, timeout=0.01) as engine:
        with anyio.fail_after(10), pytest.raises(OutcomeUnknown):
            await enqueue(declared(engine))


@pytest.mark.anyio
async def test_the_callers_own_cancellation_is_not_taken_for_the_time_limit() -> None:
    scope = anyio.CancelScope()

    async def send(message: Message) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            scope.cancel()
            await anyio.sleep_forever()

    async with shape(send=send, timeout=0.01) as engine:
        with scope:
            await enqueue(declared(engine))
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_each_async_call_has_its_own_time() -> None:
    took: list[float] = []

    async def send(message: Message) -> None:
        await anyio.sleep_forever()

    async def fail() -> None:
        began = anyio.current_time()
        with pytest.raises(OutcomeUnknown):
            await enqueue(func)
        took.append(anyio.current_time() - began)

    async with shape(send=send, timeout=0.1) as engine:
        func = declared(engine)
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(fail)
                await anyio.sleep(0.05)
                group.start_soon(fail)
    assert min(took) > 0.09


class Blocking:
    """A client that blocks, and the threads that it holds."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.begun = 0
        self.ended = 0

    def send(self, message: Message) -> None:
        self.begun += 1
        self.released.wait(30)
        self.ended += 1
        if message.headers:
            raise LookupError("too late")


@contextmanager
def blocking() -> Generator[Blocking]:
    client = Blocking()
    try:
        yield client
    finally:
        client.released.set()
        wait_until(lambda: client.ended == client.begun)


async def kind_of_failure(func: Callable[..., None]) -> type[BaseException] | None:
    try:
        await enqueue(func)
    except EngineError as exc:
        return type(exc)
    return None


@pytest.mark.anyio
async def test_threads_are_few_and_keep_their_places_until_they_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[object] = []

    async def fail(func: Callable[..., None]) -> None:
        failures.append(await kind_of_failure(func))

    with blocking() as client:
        async with shape(send=client.send, threads=2, timeout=1) as engine:
            func = declared(engine)
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(fail, func)
            # Those that found no place have certainly not been sent.
            assert failures.count(OutcomeUnknown) == 2
            assert failures.count(BrokerUnreachable) == 3
            # To wait would take 250 seconds.
            with anyio.fail_after(30):
                for _ in range(250):
                    with pytest.raises(BrokerUnreachable, match="all 2 threads wait"):
                        await enqueue(func)
            assert client.begun == 2
            client.released.set()
            await wait_for(lambda: engine._client._left_behind == 0)
            with anyio.fail_after(10):
                while await kind_of_failure(func) is not None:
                    await anyio.lowlevel.checkpoint()
    what = f"the call of 'spool' for {UPLOAD!r} has come to its end after it had been"
    # A place is free a moment before its thread has told.
    await wait_for(lambda: sum(what in message for message in caplog.messages) == 2)


@pytest.mark.anyio
async def test_a_cancelled_hand_over_keeps_its_place_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with blocking() as client:
        engine = shape(send=client.send, threads=1, headers=lambda: {"x": "y"})
        async with engine:
            func = declared(engine)
            async with anyio.create_task_group() as group:
                group.start_soon(enqueue, func)
                await wait_for(lambda: client.begun)
                group.cancel_scope.cancel()
            assert await kind_of_failure(func) is BrokerUnreachable
    wait_until(lambda: engine._client._left_behind == 0)
    wait_until(lambda: "failed with LookupError after it had been" in caplog.text)


@pytest.mark.anyio
async def test_what_is_given_up_before_its_thread_begins_is_not_sent() -> None:
    sent: list[int] = []
    client = Client("spool")
    client.open()
    attempt = _Attempt(client, client._here(), "task", lambda: sent.append(1))
    attempt._is_given_up = True
    await attempt.in_thread()
    client.close()
    with pytest.raises(RuntimeError, match="'spool' is not open"):
        client.close()
    assert (sent, attempt.is_begun) == ([], False)
    assert client._left_behind == 0


def test_an_event_loop_that_has_ended_is_forgotten() -> None:
    client = Client("spool")

    async def leave_open() -> None:
        client.open()

    for _ in range(2):
        anyio.run(leave_open)
    assert len(client._open_in) == 1


def test_threads_left_behind_by_event_loops_that_have_ended_count() -> None:
    with blocking() as client:
        engine = shape(send=client.send, threads=1, timeout=1)
        func = declared(engine)
        with pytest.raises(OutcomeUnknown):
            enqueue_sync(func)
        with pytest.raises(BrokerUnreachable, match="all 1 threads wait for it"):
            enqueue_sync(func)
        client.released.set()
        wait_until(lambda: engine._client._left_behind == 0)
        enqueue_sync(func)


# --- a real broker -------------------------------------------------------------------

NEEDS = "POSTLUDE_REQUIRE_SERVICES"


@pytest.fixture
def broker(tmp_path: Path) -> Generator[Server]:
    """Runs a Redis of its own, so that it can be stopped."""
    try:
        command = ["redis-server", "--port", "{port}", "--save", "", "--dir"]
        with start([*command, str(tmp_path)], log=tmp_path / "redis.log") as server:
            yield server
            server.process.send_signal(signal.SIGCONT)
    except FileNotFoundError:
        if os.environ.get(NEEDS):
            raise
        pytest.skip("redis-server is not installed")


def engine_on(port: int, **options: Any) -> CallableEngine:
    """Makes an engine that adds to a list in Redis."""
    # Newer versions have a time limit of their own.
    client = redis.Redis("127.0.0.1", port, socket_timeout=None)

    def send(message: Message) -> object:
        return client.lpush("jobs", message.body)

    gone: Any = (redis.ConnectionError,)
    return from_callable(send, name="redis", unreachable=gone, **options)


@pytest.mark.anyio
async def test_a_broker_is_given_each_task_once(broker: Server) -> None:
    async with engine_on(broker.port, timeout=30) as engine:
        func = declared(engine)

        async def hand_over(number: int) -> None:
            for i in range(20):
                await enqueue(func, 20 * number + i)

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(hand_over, number)
        with redis.Redis(port=broker.port) as client:
            bodies: Any = client.lrange("jobs", 0, -1)
        assert sorted(json.loads(body)["args"][0] for body in bodies) == [*range(1000)]


@pytest.mark.anyio
async def test_a_broker_that_hangs_or_ends_costs_few_threads(broker: Server) -> None:
    stalls: list[float] = []
    async with engine_on(broker.port, timeout=0.5) as engine:
        func = declared(engine)
        await enqueue(func)
        # The connection stands, but nobody answers.
        broker.process.send_signal(signal.SIGSTOP)
        before = threading.active_count()
        kinds: list[object] = []

        async def fail() -> None:
            kinds.append(await kind_of_failure(func))

        async def watch(scope: anyio.CancelScope) -> None:
            with scope:
                while True:
                    began = time.perf_counter()
                    await anyio.sleep(0.001)
                    stalls.append(time.perf_counter() - began - 0.001)

        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()
            group.start_soon(watch, scope)
            async with anyio.create_task_group() as calls:
                for _ in range(250):
                    calls.start_soon(fail)
                    await anyio.sleep(0.005)
            scope.cancel()
        assert 1 <= kinds.count(OutcomeUnknown) <= 10
        assert kinds.count(OutcomeUnknown) + kinds.count(BrokerUnreachable) == 250
        assert threading.active_count() - before <= 10
        # On the event loop a call would have hung for good.
        assert sorted(stalls)[int(0.99 * len(stalls))] < 0.25

        broker.process.send_signal(signal.SIGCONT)
        await wait_for(lambda: engine._client._left_behind == 0)
        broker.process.send_signal(signal.SIGTERM)
        await anyio.to_thread.run_sync(broker.process.wait)
        with pytest.raises(EngineError) as caught:
            await enqueue(func)
        assert isinstance(caught.value, BrokerUnreachable | OutcomeUnknown)
        # What has been given up tells of its end in the log of this test.
        await wait_for(lambda: engine._client._left_behind == 0)


@pytest.mark.anyio
async def test_a_broker_that_is_not_there_is_told() -> None:
    with socket.socket() as reservation:
        reservation.bind(("127.0.0.1", 0))
        async with engine_on(reservation.getsockname()[1], timeout=30) as engine:
            with pytest.raises(BrokerUnreachable, match="redis is out of reach for"):
                await enqueue(declared(engine))
