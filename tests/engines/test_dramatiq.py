"""What is particular to Dramatiq."""

import functools
import socket
import threading
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO, CurrentMessage
from redis.backoff import NoBackoff
from redis.retry import Retry

from engines.brokers import address, at, url_of
from postlude import BackgroundTask, task
from postlude.engines import NotSerialisable, OutcomeUnknown, Receipt, enqueue
from postlude.engines.dramatiq import DramatiqEngine

pytestmark = pytest.mark.anyio

request_id: ContextVar[str] = ContextVar("request_id", default="")


def declared(engine: Any) -> Callable[..., None]:
    """Returns a function of that engine."""

    def upload(*args: object, **kwargs: object) -> None: ...

    upload.__qualname__ = "upload"
    return task(engine=engine)(upload)


UPLOAD = f"{__name__}.upload"
NO_RETRY = Retry(NoBackoff(), 0)
make_redis: Any = RedisBroker  # it is not typed


def stub(*middleware: dramatiq.Middleware) -> StubBroker:
    broker = StubBroker()
    for one in middleware:
        broker.add_middleware(one)
    return broker


@contextmanager
def working(broker: StubBroker) -> Generator[None]:
    """Runs what has been sent, in threads of this process."""
    worker = dramatiq.Worker(broker, worker_timeout=100, worker_threads=1)
    worker.start()
    try:
        yield
        broker.join("default", fail_fast=False)
        worker.join()
    finally:
        worker.stop()


def messages(broker: StubBroker, queue: str = "default") -> list[Any]:
    return [dramatiq.Message.decode(body) for body in [*broker.queues[queue].queue]]


async def test_an_actor_has_the_options_declared() -> None:
    broker = stub()
    engine = DramatiqEngine(broker).options(queue_name="images")
    func = declared(engine.options(max_retries=3, time_limit=1000))
    actor = engine.native(func)
    assert (actor.actor_name, actor.queue_name) == (UPLOAD, "images")
    assert actor.options == {"max_retries": 3, "time_limit": 1000}
    assert actor.fn is func
    async with engine:
        receipt = await enqueue(func, 1, queue_name="mine", delay=5)
    [message] = messages(broker, "images")
    assert receipt == Receipt("dramatiq", message.message_id)
    assert (message.args, message.kwargs) == ((1,), {"queue_name": "mine", "delay": 5})
    assert message.options == {}


def test_the_tools_of_dramatiq_take_the_actor() -> None:
    broker = stub()
    engine = DramatiqEngine(broker)
    engine.native(declared(engine)).send_with_options(args=(1,), max_age=1000)
    [message] = messages(broker)
    assert (message.args, message.options) == ((1,), {"max_age": 1000})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actor_name": "x"}, "actor_name= is no option here: the worker finds the"),
        ({"broker": None}, "broker= is no option here: the broker is that of"),
        ({"delay": 5}, r"delay= .* write engine\.native\(func\)\.send_with_options"),
    ],
)
def test_what_is_no_option_of_a_function_is_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DramatiqEngine(stub()).options(**options)


def test_options_that_dramatiq_does_not_know_are_told_at_declaration() -> None:
    engine = DramatiqEngine(stub()).options(countdown=5)
    with pytest.raises(ValueError, match="actor options are undefined: countdown"):
        declared(engine)


def test_a_broker_that_is_none_is_refused() -> None:
    url: Any = "redis://127.0.0.1"
    with pytest.raises(TypeError, match=r"must be a dramatiq\.Broker, not 'redis:"):
        DramatiqEngine(url)


def test_a_broker_that_does_not_wait_for_rabbitmq_is_refused() -> None:
    with pytest.raises(ValueError, match="RabbitmqBroker needs confirm_delivery=True"):
        DramatiqEngine(RabbitmqBroker())
    DramatiqEngine(RabbitmqBroker(confirm_delivery=True))


class Marking(dramatiq.Middleware):
    """Changes what is sent."""

    def before_enqueue(self, broker: Any, message: Any, delay: object) -> None:
        message.options["seen"] = message.options.get("seen", 0) + 1


@pytest.mark.parametrize("photo", [[1, {2: "two"}], "plain"], ids=["list", "plain"])
async def test_what_was_prepared_is_sent_each_time_as_a_message_of_its_own(
    photo: Any,
) -> None:
    broker = stub(Marking())
    headers = {"request-id": "7"}
    async with DramatiqEngine(broker, headers=lambda: headers) as engine:
        job = BackgroundTask(declared(engine), photo, width=64)
        if isinstance(photo, list):
            photo.append(3)
        job.kwargs["width"] = 1024
        headers["request-id"] = "8"
        await job()
        await job()
    first, second = messages(broker)
    assert first.message_id != second.message_id
    for message in first, second:
        # JSON knows no keys but strings.
        assert message.args == ("plain" if photo == "plain" else [1, {"2": "two"}],)
        assert message.kwargs == {"width": 64}
        assert message.options == {"postlude": {"request-id": "7"}, "seen": 1}


@pytest.mark.parametrize("argument", [{1}, Path(), threading.Lock()])
async def test_what_json_cannot_say_is_refused_when_it_is_added(
    argument: object,
) -> None:
    async with DramatiqEngine(stub()) as engine:
        with pytest.raises(
            NotSerialisable, match=f"dramatiq cannot be sent .*{UPLOAD}"
        ):
            BackgroundTask(declared(engine), argument)


# --- in a worker ---------------------------------------------------------------------


@contextmanager
def restore(headers: Mapping[str, str]) -> Generator[None]:
    token = request_id.set(headers["request-id"])
    yield
    request_id.reset(token)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_headers_are_restored_around_the_function(*, is_async: bool) -> None:
    broker = stub(CurrentMessage(), AsyncIO())
    engine = DramatiqEngine(
        broker, headers=lambda: {"request-id": "7"}, restore=restore
    )
    told: list[tuple[str, Any]] = []

    def tell(**kwargs: object) -> None:
        told.append((request_id.get(), kwargs))

    async def tell_async(**kwargs: object) -> None:
        tell(**kwargs)

    func: Any = tell_async if is_async else tell
    func.__qualname__ = "tell"
    task(engine=engine)(func)
    async with engine:
        await enqueue(func, self=1, func=2, message=3)
    engine.native(func).send()
    with working(broker):
        pass
    told.sort()
    assert told == [("", {}), ("7", {"self": 1, "func": 2, "message": 3})]
    if not is_async:
        engine.native(func)()
        assert told[2:] == [("", {})]


def test_what_the_middleware_has_to_be_told_at_declaration() -> None:
    async def send() -> None: ...

    send.__qualname__ = "send"
    broker = stub()
    with pytest.raises(ValueError, match=r"async functions need the middleware AsyncI"):
        task(engine=DramatiqEngine(broker))(send)
    with pytest.raises(
        ValueError, match=r"add_middleware\(dramatiq\.middleware\.CurrentMessage\(\)\)"
    ):
        declared(DramatiqEngine(broker, restore=restore))
    assert broker.actors == {}


def test_a_module_that_is_imported_again_declares_the_newer_functions() -> None:
    broker = stub()
    ran: list[str] = []

    def declare(version: str) -> Any:
        func = functools.partial(ran.append, version)

        def tell() -> None:
            func()

        tell.__qualname__ = "tell"
        return task(engine=DramatiqEngine(broker))(tell)

    async def send(func: Any) -> None:
        async with DramatiqEngine(broker), func.__postlude_options__.engine:
            await enqueue(func)

    anyio.run(send, declare("older"))
    anyio.run(send, declare("newer"))
    with working(broker):
        pass
    assert ran == ["newer", "newer"]


# --- brokers -------------------------------------------------------------------------


async def test_a_redis_that_does_not_answer_in_time_may_have_the_message() -> None:
    # What listens, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        broker = make_redis(port=port, retry=NO_RETRY, socket_timeout=0.1)
        async with DramatiqEngine(broker, timeout=30) as engine:
            with pytest.raises(OutcomeUnknown, match=f"{UPLOAD} may still run: dramat"):
                await enqueue(declared(engine))


class Proxy:
    """What stands before a RabbitMQ, and may break its connections."""

    def __init__(self, url: str) -> None:
        self._there = address(url)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = at(url, self._server.getsockname()[1])
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                there = socket.create_connection(self._there)
                self.accepted += 1
                self._sockets += [here, there]
                for pair in (here, there), (there, here):
                    threading.Thread(target=self._pass_on, args=pair).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def cut(self) -> None:
        while self._sockets:
            with self._sockets.pop() as one, suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()


def pika_url(directory: Path) -> str:
    # Others than Pika mean the virtual host `/` by two slashes.
    return url_of("rabbitmq", directory).rstrip("/")


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Generator[Proxy]:
    proxy = Proxy(pika_url(tmp_path))
    yield proxy
    proxy.close()


class Queue:
    """A queue of the test's own, and the engine that sends there."""

    def __init__(self, url: str) -> None:
        self.name = f"postlude-{uuid.uuid4().hex}"
        self.broker = RabbitmqBroker(url=url, confirm_delivery=True)
        self.engine = DramatiqEngine(self.broker).options(queue_name=self.name)
        self.func = declared(self.engine)


@pytest.fixture
def queue(rabbitmq: Proxy, tmp_path: Path) -> Generator[Queue]:
    queue = Queue(rabbitmq.url)
    yield queue
    with connected(tmp_path) as channel:
        for suffix in "", ".DQ", ".XQ":
            channel.queue_delete(queue.name + suffix)


@contextmanager
def connected(directory: Path) -> Generator[Any]:
    broker = RabbitmqBroker(url=pika_url(directory))
    yield broker.channel
    broker.close()


def waiting(queue: Queue, directory: Path) -> int:
    """Returns how many messages RabbitMQ has."""
    with connected(directory) as channel:
        count: int = channel.queue_declare(
            queue.name, passive=True
        ).method.message_count
    return count


async def test_no_message_is_lost_in_a_connection_that_has_been_broken(
    queue: Queue, rabbitmq: Proxy, tmp_path: Path
) -> None:
    async with queue.engine:
        for _ in range(5):
            await enqueue(queue.func)
            rabbitmq.cut()
    assert rabbitmq.accepted == 5
    assert waiting(queue, tmp_path) == 5


def test_threads_that_come_and_go_leave_no_connections_behind(
    queue: Queue, rabbitmq: Proxy, tmp_path: Path
) -> None:
    mine = queue.broker.connection

    async def hand_over() -> None:
        async with queue.engine:
            for _ in range(3):
                async with anyio.create_task_group() as group:
                    for _ in range(20):
                        group.start_soon(enqueue, queue.func)
            assert len(queue.broker.connections) <= 11

    # Each has threads of its own.
    for _ in range(2):
        anyio.run(hand_over)
        assert queue.broker.connections == {mine}
    assert waiting(queue, tmp_path) == 120
    assert mine.is_open
    assert queue.broker.connection is mine
    queue.broker.close()


async def test_connections_are_closed_with_the_last_lifespan(
    queue: Queue, rabbitmq: Proxy
) -> None:
    async with queue.engine:
        await enqueue(queue.func)
        async with queue.engine:
            await enqueue(queue.func)
        await enqueue(queue.func)
        assert rabbitmq.accepted == 1
    assert not queue.broker.connections
