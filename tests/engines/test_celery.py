"""What is particular to Celery."""

import functools
import inspect
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch
from uuid import UUID

import anyio
import anyio.lowlevel
import celery
import pytest

from engines.brokers import closed_port, stoppable, url_of
from postlude import BackgroundTask, task
from postlude.engines import (
    NotSerialisable,
    OutcomeUnknown,
    Refused,
    enqueue,
    enqueue_sync,
)
from postlude.engines.celery import CeleryEngine

pytestmark = pytest.mark.anyio

request_id: ContextVar[str] = ContextVar("request_id", default="")

MOMENT = datetime(2026, 1, 2, 3, tzinfo=UTC)


@contextmanager
def restore(headers: Mapping[str, str]) -> Generator[None]:
    token = request_id.set(headers["request-id"])
    try:
        yield
    finally:
        request_id.reset(token)


@pytest.fixture
def app() -> Generator[celery.Celery]:
    """An app that runs its tasks where they are sent."""
    with celery.Celery("test", broker="memory://", set_as_current=False) as app:
        app.conf.task_always_eager = True
        yield app


def declared(
    engine: Any, func: Callable[..., Any], name: str = "func"
) -> Callable[..., Any]:
    """Declares a function of this module."""
    func.__name__ = func.__qualname__ = name
    return task(engine=engine)(func)


def test_an_app_must_be_one_of_celery() -> None:
    with pytest.raises(TypeError, match=r"app must be a celery\.Celery, not 're"):
        CeleryEngine(cast("Any", "redis"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("bind", "bind= is no option here: .* use celery.current_task"),
        ("name", "workers find the function by its own name"),
        ("eta", r"write engine\.native\(func\)\.apply_async"),
        ("task_id", "it is for one call"),
        ("reply_to", "it is for one call"),
        ("expiration", "write expires="),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    app: celery.Celery, option: str, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        CeleryEngine(app).options(**{option: "x"})


def test_options_of_a_task_reach_celery(app: celery.Celery) -> None:
    engine = CeleryEngine(app)
    one = declared(engine.options(queue="a", time_limit=5), lambda: None, "one")
    other = declared(engine.options(time_limit=5).options(time_limit=6), print_it, "o")
    assert engine.native(one).time_limit == 5
    assert engine.native(other).time_limit == 6
    assert engine.native(one).name == f"{__name__}.one"
    assert engine.native(other).__doc__ == print_it.__doc__


def print_it() -> None:
    """Prints it."""


async def test_options_of_a_call_reach_celery(app: celery.Celery) -> None:
    sent: list[dict[str, Any]] = []
    engine = CeleryEngine(app)
    func = declared(engine.options(queue="a", countdown=3), lambda: None)
    engine.native(func).apply_async = lambda *args, **options: sent.append(options)
    async with engine:
        with pytest.raises(Refused, match="has no attribute 'id'"):
            await enqueue(func)
    assert (sent[0]["queue"], sent[0]["countdown"]) == ("a", 3)


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("renewed", [False, True], ids=["engine", "two engines"])
def test_the_newest_function_of_a_name_runs(
    app: celery.Celery, *, finalized: bool, renewed: bool
) -> None:
    engine, done = CeleryEngine(app), list[str]()
    declared(engine, lambda: done.append("old"))
    if finalized:
        app.finalize()
    if renewed:
        engine = CeleryEngine(app)
    newest = declared(engine.options(time_limit=5), lambda: done.append("new"))
    app.finalize()
    name = f"{__name__}.func"
    assert app.tasks[name].time_limit == 5
    app.tasks[name].delay()
    enqueue_sync(newest)
    assert done == ["new", "new"]


async def test_a_task_that_runs_where_it_is_handed_over_keeps_its_result(
    app: celery.Celery, tmp_path: Path
) -> None:
    app.conf.task_always_eager = False
    app.conf.update(task_store_eager_result=True, result_backend=f"file://{tmp_path}")
    engine = CeleryEngine(app)
    kept = declared(engine, lambda: 42, "kept")
    ignored = declared(engine.options(ignore_result=True), lambda: 42, "ignored")
    async with engine:
        # The engine does not ask only once.
        app.conf.task_always_eager = True
        receipts = [await enqueue(kept), await enqueue(ignored)]
    states = [app.backend.get_task_meta(receipt.id)["status"] for receipt in receipts]
    assert states == ["SUCCESS", "PENDING"]
    assert engine.native(kept).apply().state == "SUCCESS"


async def published(app: celery.Celery, send: Callable[[], Any]) -> dict[str, Any]:
    """Returns what Kombu has published by a function."""
    app.conf.task_always_eager = False
    with patch("kombu.messaging.Producer.publish", autospec=True) as publish:
        result = send()
        if inspect.isawaitable(result):
            await result
    return cast("dict[str, Any]", publish.call_args.kwargs)


@pytest.mark.parametrize(
    ("send", "is_later"),
    [
        (lambda native: native.delay(), False),
        (lambda native: native.s().apply_async(), False),
        (lambda native: celery.chain(native.si(), native.si()).apply_async(), False),
        (lambda native: native.apply_async((), {}, eta=MOMENT), True),
        (None, True),
    ],
    ids=["delay", "signature", "chain", "eta", "postlude"],
)
async def test_what_celery_sends_itself_goes_where_it_is_declared_to_go(
    app: celery.Celery, send: Callable[..., Any] | None, *, is_later: bool
) -> None:
    engine = CeleryEngine(app)
    engine_of = engine.options(queue="images", priority=3, argsrepr="(hidden)")
    func = declared(engine_of.options(countdown=5), lambda: None)
    async with engine:
        how = functools.partial(send, engine.native(func)) if send else None
        sent = await published(app, how or functools.partial(enqueue, func))
    assert (sent["routing_key"], sent["priority"]) == ("images", 3)
    assert sent["headers"]["argsrepr"] == "(hidden)"
    # What is handed over here has the `countdown` as well.
    assert (sent["headers"]["eta"] is not None) is is_later


async def test_celery_sends_it_elsewhere_if_it_is_told_to(app: celery.Celery) -> None:
    engine = CeleryEngine(app)
    native = engine.native(declared(engine.options(queue="images"), lambda: None))
    sent = await published(app, lambda: native.apply_async(queue="others"))
    assert sent["routing_key"] == "others"


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_task_that_celery_has_already_gives_way(
    app: celery.Celery, *, finalized: bool, is_async: bool
) -> None:
    done: list[Any] = []

    def func_sync(photo: object) -> None:
        done.append((request_id.get(), photo))

    async def func_async(photo: object) -> None:
        func_sync(photo)

    func: Callable[..., Any] = func_async if is_async else func_sync
    engine = CeleryEngine(app, headers=lambda: {"request-id": "7f3a"}, restore=restore)
    func.__name__ = func.__qualname__ = "func"
    app.task(shared=False)(func)
    if finalized:
        app.finalize()
    declared(engine, func)
    app.finalize()
    enqueue_sync(func, 1)
    app.tasks[f"{__name__}.func"].delay(2)
    assert done == [("7f3a", 1), ("", 2)]


def test_what_is_declared_again_is_the_newest_whoever_looks_first() -> None:
    with celery.Celery("x", set_as_current=False, autofinalize=False) as app:
        engine = CeleryEngine(app)
        old = engine.native(declared(engine, lambda: None))
        new = engine.native(declared(engine.options(time_limit=5), lambda: None))
        with pytest.raises(RuntimeError, match="app not finalized"):
            assert new.name
        app.autofinalize = True
        assert new.time_limit == 5
        app.finalize()
        assert app.tasks[f"{__name__}.func"].time_limit == old.time_limit == 5


def test_another_app_does_not_know_it(app: celery.Celery) -> None:
    declared(CeleryEngine(app), lambda: None)
    app.finalize()
    with celery.Celery("other", set_as_current=False) as other:
        other.finalize()
        assert f"{__name__}.func" not in other.tasks


# --- in the worker -------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_headers_are_restored_whoever_tries_again(
    app: celery.Celery, *, is_async: bool
) -> None:
    seen: list[Any] = []

    def func(*args: object, **kwargs: object) -> None:
        seen.append((request_id.get(), celery.current_task.name, args, kwargs))
        if len(seen) == 1:
            raise LookupError("not yet")

    async def func_async(*args: object, **kwargs: object) -> None:
        # Celery knows its task in the thread of the worker alone.
        assert not celery.current_task
        seen.append((request_id.get(), engine.native(func).name, args, kwargs))
        if len(seen) == 1:
            raise LookupError("not yet")

    engine = CeleryEngine(app, headers=lambda: {"request-id": "7f3a"}, restore=restore)
    options = {"autoretry_for": (LookupError,), "retry_backoff": False}
    engine_of = engine.options(**options, default_retry_delay=0)
    func = declared(engine_of, func_async if is_async else func)
    async with engine:
        await enqueue(func, 1, self=2, args=3)
    expected = ("7f3a", f"{__name__}.func", (1,), {"self": 2, "args": 3})
    assert seen == [expected] * 2


def test_what_celery_sends_itself_has_no_headers(app: celery.Celery) -> None:
    done: list[int] = []
    engine = CeleryEngine(app, restore=restore)
    func = declared(engine, lambda number=0: done.append(number))
    engine.native(func).apply_async((1,), countdown=5)
    engine.native(func)(2)
    assert done == [1, 2]


# --- serialised, sent ----------------------------------------------------------------


async def test_a_task_is_serialised_as_it_is_declared(app: celery.Celery) -> None:
    done: list[Any] = []
    engine = CeleryEngine(app)
    engine_of = engine.options(serializer="pickle")
    by_pickle = declared(engine_of, lambda item=None: done.append(item), "one")
    by_json = declared(engine, lambda item=None: done.append(item), "two")
    async with engine:
        await enqueue(by_pickle, {(1, 2)})
        await enqueue(by_json, (1, 2))
        with pytest.raises(NotSerialisable, match="is not JSON seri"):
            BackgroundTask(by_json, {object()})
    assert done == [{(1, 2)}, [1, 2]]


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ((1, 2), [1, 2]),
        ({1: 2}, {"1": 2}),
        *((value, value) for value in (MOMENT, MOMENT.date(), MOMENT.time())),
        *((value, value) for value in (UUID(int=5), Decimal("1.1"), b"\xff")),
        *((value, None) for value in ({1}, timedelta(1), Path())),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_some_arguments_arrive_as_they_are(
    app: celery.Celery, sent: object, arrives: object
) -> None:
    done: list[object] = []
    engine = CeleryEngine(app)
    func = declared(engine, lambda item=None: done.append(item))
    async with engine:
        if arrives is None:
            with pytest.raises(NotSerialisable):
                await enqueue(func, sent)
        else:
            await enqueue(func, sent)
            assert done == [arrives]


async def test_a_dead_result_backend_does_not_matter(tmp_path: Path) -> None:
    with (
        closed_port() as port,
        stoppable("redis", tmp_path) as (url, _),
        celery.Celery("test", broker=url, set_as_current=False) as app,
    ):
        app.conf.update(result_backend=f"redis://127.0.0.1:{port}")
        engine = CeleryEngine(app, timeout=10)
        func = declared(engine, lambda: None)
        async with engine:
            with anyio.fail_after(5):
                receipt = await enqueue(func)
        assert receipt.id


async def test_a_time_limit_of_celery_itself_leaves_the_outcome_unknown(
    tmp_path: Path,
) -> None:
    with (
        stoppable("redis", tmp_path) as (url, server),
        celery.Celery("test", broker=url, set_as_current=False) as app,
    ):
        limits = {"socket_timeout": 0.2, "retry_on_timeout": False}
        app.conf.update(broker_transport_options=limits, task_publish_retry=False)
        engine = CeleryEngine(app, timeout=30)
        func = declared(engine, lambda: None)
        async with engine:
            await enqueue(func)
            server.process.send_signal(signal.SIGSTOP)
            with anyio.fail_after(20), pytest.raises(OutcomeUnknown, match="may still"):
                await enqueue(func)
        assert engine._client._left_behind == 0


@pytest.mark.parametrize("confirms", [False, True])
async def test_only_with_confirms_rabbitmq_has_taken_what_was_handed_over(
    tmp_path: Path, *, confirms: bool
) -> None:
    url_of("rabbitmq", tmp_path)
    with (
        stoppable("rabbitmq", tmp_path) as (url, server),
        celery.Celery("test", broker=url, set_as_current=False) as app,
    ):
        queue = f"postlude-{tmp_path.name}"
        app.conf.task_default_queue = queue
        app.conf.broker_transport_options = {"confirm_publish": confirms}
        engine = CeleryEngine(app, timeout=0.5)
        func = declared(engine, lambda: None)
        async with engine:
            await enqueue(func)
            server.process.send_signal(signal.SIGSTOP)
            if confirms:
                with pytest.raises(OutcomeUnknown):
                    await enqueue(func)
            else:
                await enqueue(func)
            server.process.send_signal(signal.SIGCONT)
            with anyio.fail_after(10):
                while engine._client._left_behind:
                    await anyio.lowlevel.checkpoint()
        with app.connection_for_write() as connection:
            delete = functools.partial(connection.default_channel.queue_delete, queue)
            await anyio.to_thread.run_sync(delete)
