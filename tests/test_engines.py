"""Tasks that are handed over: when, with what, and what is told if that fails."""

import functools
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import Mock

import anyio
import httpx2
import pytest
import starlette.background
from loops import until
from places import alive
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from starlette.types import Message as ASGIMessage

import postlude.responses
from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    TaskState,
    add_task,
    task,
)
from postlude.engines import (
    BrokerUnreachable,
    Receipt,
    Refused,
    enqueue,
    enqueue_sync,
)

request_id: ContextVar[str] = ContextVar("request_id", default="")


class Adapter:
    """An engine that keeps what it is given, and submits when it may."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.reset()

    def reset(self) -> None:
        self.prepared: list[tuple[Any, ...]] = []
        self.submitted: list[Any] = []
        self.failure: Exception | None = None
        self.gate: anyio.Event | None = None

    def headers(self) -> Mapping[str, str]:
        return {"request-id": request_id.get()}

    def register(self, func: Callable[..., Any], name: str) -> None:
        self.functions[name] = func

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> str:
        self.prepared.append((name, args, kwargs, headers))
        return f"message {len(self.prepared)}"

    async def submit(self, message: str) -> Receipt:
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.submitted.append(message)
        return Receipt("adapter", f"id of {message}")


class Bare(Adapter):
    """An engine that has no headers."""

    headers = None  # type: ignore[assignment]


adapter, bare = Adapter(), Bare()


@pytest.fixture(autouse=True)
def without_a_past() -> None:
    adapter.reset()


@task(engine=adapter, name="photos.resize")
def resize(photo: int, *, width: int = 64) -> None:
    raise AssertionError("it is not to run here")


@task(engine=adapter)
async def index(photo: int) -> None:
    raise AssertionError("it is not to run here")


@task(engine=adapter, process=True, timeout=1e-9, limiter=1)
def limited(photo: object) -> None: ...


@task(engine=bare)
def without_headers() -> None: ...


@task(engine=None)
def plain(photo: int) -> None: ...


class Album:
    def __call__(self) -> None: ...

    class Index:
        @task(engine=adapter)
        def __call__(self, photo: int) -> None: ...

    @task(engine=adapter)
    def add(self, photo: int) -> None: ...

    @task(engine=adapter)
    @staticmethod
    def sort(by: str) -> None: ...


# --- declared ------------------------------------------------------------------------


def test_a_function_stays_what_it_is_and_is_registered_by_its_dotted_name() -> None:
    def show(photo: int) -> int:
        return photo

    show.__qualname__ = "show"
    assert task(engine=adapter, name="photos.show")(show) is show
    assert show(42) == 42
    assert adapter.functions[f"{__name__}.show"] is show
    assert BackgroundTask(show, 42).name == "photos.show"


@pytest.mark.parametrize(
    "engine", [5, object(), Adapter, Mock(spec=["register", "prepare"])]
)
def test_what_is_no_engine_is_refused(engine: Any) -> None:
    with pytest.raises(TypeError, match="engine must be an object with the methods"):
        task(engine=engine)


def nested() -> Callable[[], None]:
    def inside() -> None: ...

    return inside


@pytest.mark.parametrize(
    "func",
    [
        lambda: None,
        nested(),
        functools.partial(plain, 42),
        os.remove,
        Album(),
        Album().__call__,
    ],
    ids=["lambda", "nested", "partial", "builtin", "object", "method"],
)
def test_what_a_worker_cannot_find_by_its_name_is_refused(func: Any) -> None:
    functions = {*adapter.functions}
    with pytest.raises(TypeError, match="which a worker finds by their names, not "):
        task(engine=adapter)(func)
    assert {*adapter.functions} == functions


def test_a_function_of_main_is_refused_when_it_is_added() -> None:
    def script() -> None: ...

    script.__module__, script.__qualname__ = "__main__", "script"
    task(engine=adapter)(script)
    with pytest.raises(
        TypeError, match=r"__main__\.script cannot be handed over, .* mov"
    ):
        BackgroundTask(script)


def test_an_engine_on_an_inner_decorator_is_refused() -> None:
    @functools.wraps(index)
    async def wrapper(photo: int) -> None: ...

    with pytest.raises(TypeError, match=r"task\(engine=\.\.\.\) must be the outermost"):
        BackgroundTask(wrapper, 42)
    with pytest.raises(TypeError, match=r"task\(engine=\.\.\.\) must be the outermost"):
        task(name="index")(wrapper)


def test_a_later_decorator_keeps_the_engine() -> None:
    def later() -> None: ...

    later.__qualname__ = "later"
    task(always=True)(task(engine=adapter)(later))
    BackgroundTask(later)
    assert adapter.prepared[0][0] == f"{__name__}.later"


# --- prepared ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "name", "prepared"),
    [
        (resize, (42,), {"width": 8}, "resize", ((42,), {"width": 8})),
        (index, (42,), {}, "index", ((42,), {})),
        (functools.partial(resize, 42, width=8), (), {}, "resize", None),
        (functools.partial(resize, width=9), (42,), {"width": 8}, "resize", None),
        (Album.sort, ("size",), {}, "Album.sort", (("size",), {})),
    ],
    ids=["sync", "async", "partial", "partial with more", "static method"],
)
def test_a_call_is_prepared_when_it_is_added(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
    prepared: tuple[Any, ...] | None,
) -> None:
    token = request_id.set("7")
    BackgroundTasks().add_task(func, *args, **kwargs)
    request_id.reset(token)
    args, kwargs = prepared or ((42,), {"width": 8})
    headers = {"request-id": "7"}
    assert adapter.prepared == [(f"{__name__}.{name}", args, kwargs, headers)]
    assert adapter.submitted == []


def test_a_method_takes_its_object_along() -> None:
    album = Album()
    BackgroundTask(album.add, 42)
    assert adapter.prepared[0][:2] == (f"{__name__}.Album.add", (album, 42))


def test_an_object_is_handed_over_to_its_call_method() -> None:
    index = Album.Index()
    BackgroundTask(functools.partial(index, 42))
    name = f"{__name__}.Album.Index.__call__"
    assert adapter.functions[name] is Album.Index.__call__
    assert adapter.prepared[0][:2] == (name, (index, 42))


def test_an_engine_need_not_have_headers() -> None:
    BackgroundTask(without_headers)
    assert bare.prepared == [(f"{__name__}.without_headers", (), {}, {})]


def test_arguments_are_checked_as_for_any_task() -> None:
    with pytest.raises(TypeError, match="cannot be called with these arguments"):
        BackgroundTask(resize)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    assert adapter.prepared == []


# --- handed over after the response --------------------------------------------------

Add = Callable[[Request], tuple[Response, BackgroundTask]]


def by_background(request: Request) -> tuple[Response, BackgroundTask]:
    task = BackgroundTask(resize, 42)
    return Response(background=task), task


def by_group(request: Request) -> tuple[Response, BackgroundTask]:
    tasks = BackgroundTasks(concurrency=2)
    task = tasks.add_task(resize, 42)
    return Response(background=tasks), task


def by_response(request: Request) -> tuple[Response, BackgroundTask]:
    response = postlude.responses.Response()
    return response, response.add_task(resize, 42)


def by_function(request: Request) -> tuple[Response, BackgroundTask]:
    return Response(), add_task(resize, 42)


def client_of(app: ASGIApp) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app)
    return httpx2.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("mode", "add"),
    [
        (mode, add)
        for mode in ("none", "waiting", "detached")
        for add in (by_background, by_group, by_response, by_function)
        if (mode, add) != ("none", by_function)
    ],
)
async def test_a_task_is_handed_over_after_the_response(mode: str, add: Add) -> None:
    tasks: list[BackgroundTask] = []
    log: list[object] = []

    async def endpoint(request: Request) -> Response:
        response, task = add(request)
        assert adapter.prepared
        assert (task.state, task.receipt) == (TaskState.PENDING, None)
        tasks.append(task)
        return response

    inner = Starlette(routes=[Route("/", endpoint)])

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: ASGIMessage) -> None:
            await send(message)
            log.append((message["type"], len(adapter.submitted)))

        await inner(scope, receive, note)

    app: ASGIApp = noting
    if mode != "none":
        app = BackgroundTasksMiddleware(noting, detach=mode == "detached")
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 200
    assert ("http.response.body", 0) in log
    assert adapter.submitted == ["message 1"]
    assert tasks[0].state is TaskState.SUCCEEDED
    assert tasks[0].receipt == Receipt("adapter", "id of message 1")


@pytest.mark.anyio
async def test_tasks_are_handed_over_in_their_turn_and_fail_alone() -> None:
    adapter.failure = BrokerUnreachable("gone")
    log: list[str] = []
    tasks = BackgroundTasks()
    tasks.add_task(log.append, "before")
    failing = tasks.add_task(resize, 42)
    tasks.add_task(log.append, "after")
    with pytest.raises(BrokerUnreachable, match="gone") as caught:
        await tasks()
    assert caught.value.__notes__ == ["in background task 'photos.resize'"]
    assert log == ["before", "after"]
    assert (failing.state, failing.receipt) == (TaskState.FAILED, None)
    assert failing.exception is caught.value


@pytest.mark.anyio
async def test_the_limits_of_a_function_do_not_apply_to_its_hand_over() -> None:
    task = BackgroundTask(limited, threading.Lock())
    await task()
    assert task.receipt == Receipt("adapter", "id of message 1")


@pytest.mark.anyio
async def test_what_another_class_has_made_is_prepared_when_its_turn_comes() -> None:
    class Made(BackgroundTask):
        def __init__(self) -> None:
            self.func, self.args, self.kwargs = resize, (42,), {}
            self.is_async = False

    made = Made()
    await made()
    assert made.receipt == Receipt("adapter", "id of message 1")

    stock = starlette.background.BackgroundTask(resize, 43)
    group = BackgroundTasks([stock])

    async def endpoint(request: Request) -> Response:
        return Response(background=group)

    app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", endpoint)]))
    async with client_of(app) as client:
        await client.get("/")
    assert [call[1] for call in adapter.prepared] == [(42,), (43,)]


@pytest.mark.anyio
@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
async def test_what_waits_at_shutdown_is_handed_over_first(
    caplog: pytest.LogCaptureFixture, *, detach: bool
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    adapter.gate = anyio.Event()
    closed: list[int] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        closed.append(len(adapter.submitted))

    async def endpoint(request: Request) -> Response:
        add_task(resize, 42)
        add_task(index, 42)
        return Response()

    inner = Starlette(routes=[Route("/", endpoint)], lifespan=lifespan)
    app = BackgroundTasksMiddleware(inner, detach=detach, max_running=1)
    async with (
        alive(app) as stopping,
        client_of(app) as client,
        anyio.create_task_group() as requests,
    ):
        for _ in range(3):
            requests.start_soon(client.get, "/")
        await until(lambda: app.status().waiting_groups == 2)
        stopping.set()
        await until(lambda: "shutdown waits for background tasks" in caplog.text)
        assert (adapter.submitted, closed) == ([], [])
        adapter.gate.set()
    assert closed == [6]


def test_add_task_without_a_request_names_enqueue() -> None:
    with pytest.raises(RuntimeError, match=r"postlude\.engines\.enqueue\(\) hands a"):
        add_task(resize, 42)


# --- enqueue -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_enqueue_hands_over_at_once() -> None:
    assert await enqueue(resize, 42) == Receipt("adapter", "id of message 1")
    assert adapter.submitted == ["message 1"]
    adapter.failure = Refused("no such queue")
    with pytest.raises(Refused, match="no such queue"):
        await enqueue(index, 42)
    with pytest.raises(TypeError, match="cannot be called with these arguments"):
        await enqueue(resize)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


@pytest.mark.anyio
async def test_enqueue_of_what_has_no_engine_adds_a_task() -> None:
    receipts: list[Receipt] = []
    ran: list[str] = []

    @task()
    def note(what: str) -> None:
        ran.append(what)

    async def endpoint(request: Request) -> Response:
        receipts.append(await enqueue(note, "async"))
        assert not ran
        return Response()

    def sync_endpoint(request: Request) -> Response:
        receipts.append(enqueue_sync(note, "sync"))
        receipts.append(enqueue_sync(resize, 42))
        return Response()

    routes = [Route("/", endpoint), Route("/sync", sync_endpoint)]
    app = BackgroundTasksMiddleware(Starlette(routes=routes))
    async with client_of(app) as client:
        for path in "/", "/sync":
            assert (await client.get(path)).status_code == 200
    assert ran == ["async", "sync"]
    assert [receipt.engine for receipt in receipts] == ["here", "here", "adapter"]
    assert receipts[0].id != receipts[1].id
    with pytest.raises(RuntimeError, match=r"add_task\(\) needs a request"):
        await enqueue(plain, 42)


@pytest.mark.anyio
async def test_enqueue_sync_does_not_block_an_event_loop() -> None:
    for func in resize, plain:
        with pytest.raises(RuntimeError, match=r"write await enqueue\(\.\.\.\)"):
            enqueue_sync(func, 42)


def test_enqueue_sync_runs_an_event_loop_of_its_own_where_there_is_none() -> None:
    assert enqueue_sync(resize, 42) == Receipt("adapter", "id of message 1")
    with pytest.raises(RuntimeError, match=r"add_task\(\) needs a request"):
        enqueue_sync(plain, 42)


# --- the tasks of other libraries ----------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "spelling"),
    [
        ("celery.app.task", "Task", "task.delay, ..."),
        ("dramatiq.actor", "Actor", "task.send, ..."),
        ("huey.api", "TaskWrapper", "huey.enqueue, task.s(...)"),
        ("procrastinate.tasks", "Task", "task.defer_async, ..."),
        ("taskiq.decor", "AsyncTaskiqDecoratedTask", "task.kiq, ..."),
    ],
)
def test_the_task_of_another_library_is_refused_with_the_right_spellings(
    module: str, name: str, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign:
        def __call__(self, photo: int) -> None: ...

    fake: Any = types.ModuleType(module)
    setattr(fake, name, Foreign)
    BackgroundTask(Foreign(), 42)
    monkeypatch.setitem(sys.modules, module, fake)
    for add in BackgroundTask, BackgroundTasks().add_task:
        with pytest.raises(TypeError) as caught:
            add(Foreign(), 42)
        library = module.partition(".")[0]
        assert f"is a task of {library}: write add_task({spelling})" in str(
            caught.value
        )
        assert "declared with postlude's task(engine=...)" in str(caught.value)
    BackgroundTask(Mock(), 42)


def test_a_job_of_rq_is_refused_with_the_right_spellings() -> None:
    def job() -> None: ...

    def other() -> None: ...

    namespace: dict[str, Any] = {"__name__": "rq.decorators"}
    exec("def delay(): ...", namespace)
    job.delay = namespace["delay"]  # type: ignore[attr-defined]
    other.delay = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(
        TypeError, match=r"is a task of rq: write add_task\(task\.delay"
    ):
        BackgroundTask(job)
    BackgroundTask(other)


# --- the package ---------------------------------------------------------------------


def test_no_plain_import_of_postlude_imports_an_engine() -> None:
    code = (
        "import sys, postlude; assert 'postlude.engines' not in sys.modules; "
        "import postlude.engines; names = {name.partition('.')[0] for name in "
        "sys.modules}; print(names & set('celery dramatiq huey redis rq taskiq dbos "
        "procrastinate'.split()))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert output.stdout == "set()\n"
