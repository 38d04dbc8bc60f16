"""What tests of an application use: captured tasks, raised failures, waiting."""

import functools
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NoReturn
from unittest.mock import ANY, Mock

import anyio
import anyio.to_thread
import fastapi
import httpx2
import pytest
import starlette.background
from places import alive
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

import postlude.responses
from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    TaskState,
    _tasks,
    add_task,
    middleware,
    task,
)
from postlude._supervisor import Job
from postlude.engines import Message as EngineMessage
from postlude.engines import Receipt as SentReceipt
from postlude.engines import enqueue, enqueue_sync, from_callable
from postlude.fastapi import BackgroundTasks as Injected
from postlude.testing import (
    CapturedTasks,
    call,
    capture_tasks,
    raise_failures,
    wait_for_tasks,
    wait_for_tasks_sync,
)

pytest_plugins = ["pytester"]

Make = Callable[[], ASGIApp]

ran: list[str] = []
variable: ContextVar[str] = ContextVar("variable", default="")
release = threading.Event()


@pytest.fixture(autouse=True)
def clean() -> Generator[None]:
    ran.clear()
    sent.clear()
    release.clear()
    yield
    release.set()
    assert _tasks.keep is None
    assert _tasks.hear is None
    assert middleware.job_class is Job


def note(what: str, *, to: str = "") -> None:
    ran.append(what + to + variable.get())


async def note_async(what: str, *, to: str = "") -> None:
    note(what, to=to)


@task(always=True)
def clean_up() -> None:
    ran.append("clean up")


def fail(what: str) -> None:
    raise ConnectionError(what)


async def released() -> None:
    await anyio.to_thread.run_sync(release.wait, 10)


async def hold() -> None:
    await released()
    ran.append("held")


async def add_another() -> None:
    add_task(note, "another")


async def call_another() -> None:
    await hold()
    await BackgroundTasks([BackgroundTask(note, "one")])()


# --- an application whose endpoints add tasks in each way ----------------------------


async def pair(request: Request) -> Response:
    tasks = BackgroundTasks([BackgroundTask(note, "one")])
    tasks.add_task(note_async, "two", to="you")
    return Response(background=tasks)


async def nested(request: Request) -> Response:
    stock = starlette.background.BackgroundTasks()
    inner = BackgroundTasks([starlette.background.BackgroundTask(note, "one")])
    ours = BackgroundTasks([BackgroundTask(inner)])
    stock.tasks.append(ours)
    stock.add_task(BackgroundTask(note_async, "two", to="you"))
    return Response(background=stock)


async def responded(request: Request) -> Response:
    response = postlude.responses.PlainTextResponse("")
    response.add_task(note, "one")
    response.add_task(note_async, "two", to="you")
    return response


async def by_hand(request: Request) -> Response:
    await BackgroundTask(note, "one")()
    await BackgroundTasks([BackgroundTask(note_async, "two", to="you")])()
    return Response()


async def broken_body(request: Request) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        raise LookupError

    response = postlude.responses.StreamingResponse(body())
    response.add_task(note, "not run")
    response.add_task(clean_up)
    return response


async def failing(request: Request) -> Response:
    names = request.query_params.getlist("name") or ["one"]
    group = BackgroundTasks([BackgroundTask(fail, name) for name in names])
    return Response(background=group)


def added(request: Request) -> Response:
    variable.set("!")
    add_task(note, "one")
    add_task(note_async, "two", to="you")
    status = int(request.query_params.get("status", "200"))
    if status == 500:
        add_task(clean_up)
    return Response(status_code=status)


async def adding(request: Request) -> Response:
    for name in request.query_params.getlist("task"):
        add_task(TASKS[name])
    return Response()


async def crashing(request: Request) -> Response:
    class Crashing(Response):
        async def __call__(self, *args: Any) -> None:
            await super().__call__(*args)
            raise LookupError

    add_task(note, "one")
    return Crashing()


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    add_task(note, "one")
    await websocket.close()


TASKS: dict[str, Callable[[], Any]] = {
    "one": functools.partial(note, "one"),
    "hold": hold,
    "adds": add_another,
    "calls": call_another,
}
ENDPOINTS = (
    failing,
    pair,
    nested,
    responded,
    by_hand,
    broken_body,
    added,
    adding,
    crashing,
)


def starlette_app() -> Starlette:
    routes = [Route(f"/{endpoint.__name__}", endpoint) for endpoint in ENDPOINTS]
    return Starlette(routes=[*routes, WebSocketRoute("/socket", socket)])


def bare() -> ASGIApp:
    return starlette_app()


def waiting() -> ASGIApp:
    return BackgroundTasksMiddleware(starlette_app())


def detached() -> ASGIApp:
    return BackgroundTasksMiddleware(starlette_app(), detach=True)


def hidden() -> ASGIApp:
    app = starlette_app()
    app.add_middleware(BackgroundTasksMiddleware, detach=True)
    return app


APPS = [bare, waiting, detached, hidden]
WRAPPED = [waiting, detached, hidden]


@contextmanager
def without_lifespan(app: ASGIApp, **options: Any) -> Generator[TestClient]:
    yield TestClient(app, **options)


CLIENTS: list[Callable[..., Any]] = [without_lifespan, TestClient]
each_app = pytest.mark.parametrize("make", APPS)
each_wrapped = pytest.mark.parametrize("make", WRAPPED)
each_client = pytest.mark.parametrize("serve", CLIENTS, ids=["plain", "lifespan"])
each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@asynccontextmanager
async def lively(app: ASGIApp) -> AsyncGenerator[httpx2.AsyncClient]:
    """Runs the lifespan of an application, with a client of it."""
    async with alive(app), connected(app) as client:
        yield client


def connected(app: ASGIApp) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app)
    return httpx2.AsyncClient(transport=transport, base_url="http://app")


# --- captured tasks ------------------------------------------------------------------


BOTH = [call(note, "one"), call(note_async, "two", to="you")]
ONE = [call(note, "one")]
ALWAYS = [call(clean_up)]
# What follows each request, without the middleware too; then that of add_task().
FOLLOWED = {
    "/pair": BOTH,
    "/nested": BOTH,
    "/responded": BOTH,
    "/by_hand": BOTH,
    "/broken_body": ALWAYS,
}
FOLLOWED_IN_MIDDLEWARE = {
    "/added": BOTH,
    "/added?status=404": [],
    "/added?status=500": ALWAYS,
    "/crashing": ONE,
    "/socket": ONE,
    "/adding?task=adds": [call(add_another)],
}


def visit(client: TestClient, path: str) -> None:
    if path == "/socket":
        with client.websocket_connect(path):
            pass
    else:
        with suppress(LookupError):
            client.get(path)


@pytest.mark.parametrize(
    ("path", "make"),
    [
        *itertools.product(FOLLOWED, APPS),
        *itertools.product(FOLLOWED_IN_MIDDLEWARE, WRAPPED),
    ],
)
@each_client
@each_backend
def test_what_is_recorded_is_what_would_have_run_and_runs_on_demand(
    path: str, make: Make, serve: Any, backend: str
) -> None:
    with serve(make(), backend=backend) as client:
        visit(client, path)
        wait_for_tasks_sync()
        expected = ran.copy()
        ran.clear()
        with capture_tasks() as captured:
            visit(client, path)
            assert captured == (FOLLOWED | FOLLOWED_IN_MIDDLEWARE)[path]
            assert {task.state for task in captured.tasks} <= {TaskState.PENDING}
        assert not ran
        captured.run_sync()
        assert ran == expected
        assert len(ran) == len(captured)
        if path != "/nested":
            assert {task.state for task in captured.tasks} <= {TaskState.SUCCEEDED}
        captured.run_sync()
        assert ran == expected


@each_app
@pytest.mark.anyio
async def test_tasks_of_an_async_test_are_recorded_and_run(
    make: Make,
) -> None:
    for connect in connected, lively:
        ran.clear()
        async with connect(make()) as client:
            with capture_tasks() as captured:
                await client.get("/nested")
                assert captured == BOTH
                assert not ran
                await captured.run()
                assert ran == ["one", "twoyou"]


@pytest.mark.anyio
@pytest.mark.parametrize("detach", [False, True], ids=["waiting", "detached"])
@pytest.mark.parametrize("has_lifespan", [False, True], ids=["plain", "lifespan"])
async def test_a_request_cancelled_at_its_end_has_its_tasks_recorded_if_they_would_run(
    *, has_lifespan: bool, detach: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        background = BackgroundTask(note, "one")
        await Response(background=background)(scope, receive, send)
        add_task(note, "two")
        add_task(clean_up)
        cancelled.cancel()
        await anyio.sleep_forever()

    wrapped = BackgroundTasksMiddleware(app, detach=detach)
    connect = lively if has_lifespan else connected
    expected = [call(note, "one"), call(note, "two"), call(clean_up)]
    if not has_lifespan:
        del expected[0 if detach else 1 : 2]
    with capture_tasks() as captured:
        async with connect(wrapped) as client:
            with anyio.CancelScope() as cancelled:
                await client.get("/")
            assert captured == expected
            await captured.run()
    assert len(ran) == len(expected)


def test_what_a_running_task_calls_is_not_recorded() -> None:
    with TestClient(detached()) as client:
        client.get("/adding?task=calls")
        with capture_tasks() as captured:
            release.set()
            wait_for_tasks_sync()
    assert not captured
    assert ran == ["held", "one"]


@each_client
@pytest.mark.parametrize("wrap", [lambda app: app, BackgroundTasksMiddleware])
def test_tasks_run_in_the_context_that_they_were_called_in(
    serve: Any, wrap: Any
) -> None:
    made_before = BackgroundTask(note_async, "one")

    async def endpoint(request: Request) -> Response:
        variable.set(" of the request")
        return Response(background=made_before)

    app = wrap(Starlette(routes=[Route("/", endpoint)]))
    with capture_tasks() as captured, serve(app) as client:
        client.get("/")
        captured.run_sync()
    assert ran == ["one of the request"]
    assert not variable.get()


@each_backend
def test_tasks_run_in_the_event_loop_of_the_application_while_there_is_one(
    backend: Any,
) -> None:
    threads: list[int] = []

    async def look() -> None:
        threads.append(threading.get_ident())

    async def endpoint(request: Request) -> Response:
        await look()
        add_task(look)
        return Response()

    app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", endpoint)]))
    with capture_tasks() as captured:
        with TestClient(app, backend=backend) as client:
            client.get("/")
            captured.run_sync()
            client.get("/")
        captured.run_sync()
    first, *rest = threads
    assert rest == [first, first, threading.get_ident()]


@each_app
def test_failures_of_what_was_recorded_are_raised_into_the_test(make: Make) -> None:
    client = TestClient(make())
    with capture_tasks() as captured:
        client.get("/failing")
    with pytest.raises(ConnectionError, match="one") as raised:
        captured.run_sync()
    assert raised.value.__notes__ == [f"in background task '{__name__}.fail'"]
    with capture_tasks() as captured:
        client.get("/failing?name=two&name=three")
        client.get("/failing")
    with pytest.RaisesGroup(*[ConnectionError] * 3, match="3 background tasks failed"):
        captured.run_sync()
    assert {task.state for task in captured.tasks} == {TaskState.FAILED}


def test_a_captured_group_has_ended_until_it_is_run() -> None:
    group = BackgroundTasks([BackgroundTask(note, "one")])
    with capture_tasks() as captured:
        TestClient(BackgroundTasksMiddleware(Response(background=group))).get("/")
    assert group.state == "cancelled"
    captured.run_sync()
    assert group.state == "succeeded"


def test_of_nested_captures_the_innermost_records() -> None:
    client = TestClient(waiting())
    with capture_tasks() as outer:
        client.get("/adding?task=one")
        with capture_tasks() as inner:
            client.get("/pair")
        client.get("/adding?task=one")
    assert outer == [call(note, "one")] * 2
    assert inner == BOTH


def test_captures_may_end_in_any_order() -> None:
    client = TestClient(waiting())
    first, second = capture_tasks(), capture_tasks()
    first.__enter__()
    inner = second.__enter__()
    first.__exit__(None, None, None)
    client.get("/adding?task=one")
    second.__exit__(None, None, None)
    assert inner == [call(note, "one")]
    assert not ran


def test_what_is_cleared_is_not_run() -> None:
    client = TestClient(waiting())
    with capture_tasks() as captured:
        client.get("/pair")
        captured.clear()
        assert captured == []
        assert captured.tasks == []
        client.get("/adding?task=one")
    captured.run_sync()
    assert ran == ["one"]
    captured.clear()
    captured.run_sync()
    CapturedTasks().run_sync()
    assert ran == ["one"]


# --- the tasks of an engine ----------------------------------------------------------

sent: list[EngineMessage] = []
engine = from_callable(sent.append, name="spool")


@task(engine=engine)
def resize(photo: object, *, func: str = "") -> None: ...


def handing_over() -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        add_task(resize, 1)
        receipt = await enqueue(resize, 2, func="x")
        return JSONResponse(receipt, 202)

    def sync(request: Request) -> Response:
        receipt = enqueue_sync(resize, 3)
        if request.query_params:
            raise HTTPException(404)
        return JSONResponse(receipt, background=BackgroundTask(resize, 4))

    routes = [Route("/", endpoint), Route("/sync", sync)]
    return BackgroundTasksMiddleware(Starlette(routes=routes))


@each_backend
def test_what_would_be_handed_over_is_captured_without_a_lifespan(
    backend: Any,
) -> None:
    client = TestClient(handing_over(), backend=backend)
    with capture_tasks() as captured:
        receipt = client.get("/").json()
        assert receipt == ["captured", captured.tasks[0].id]
        # What is enqueued does not wait for the end of the request.
        assert captured == [call(resize, 2, func="x"), call(resize, 1)]
        captured.clear()
        receipt = client.get("/sync").json()
        assert receipt == ["captured", captured.tasks[0].id]
        assert captured == [call(resize, 3), call(resize, 4)]
        captured.clear()
        assert client.get("/sync?fail=1").status_code == 404
        assert captured == [call(resize, 3)]
        assert {task.state for task in captured.tasks} == {TaskState.PENDING}
        with pytest.raises(RuntimeError, match="'spool' is not open"):
            captured.run_sync()
    assert not sent


@pytest.mark.anyio
async def test_what_is_captured_is_handed_over_once_the_engine_is_open() -> None:
    with capture_tasks() as captured:
        receipt = await enqueue(resize, 42)
        assert captured == [call(resize, 42)]
        async with engine:
            await captured.run()
    [message] = sent
    assert message.name == f"{__name__}.resize"
    [handle] = captured.tasks
    assert handle.state is TaskState.SUCCEEDED
    assert (receipt.id, handle.receipt) == (handle.id, SentReceipt("spool", ""))
    with pytest.raises(RuntimeError, match="'spool' is not open"):
        await enqueue(resize, 42)


def test_what_a_script_enqueues_is_captured_and_the_engine_not_opened() -> None:
    class Unreachable(type(engine)):  # type: ignore[misc]
        async def __aenter__(self) -> NoReturn:
            raise ConnectionError

    unreachable = Unreachable(
        "spool", sent.append, str, timeout=2, threads=1, headers=None
    )

    def index() -> None: ...

    index.__qualname__ = "index"
    task(engine=unreachable)(index)
    with pytest.raises(ConnectionError):
        enqueue_sync(index)
    with capture_tasks() as captured:
        assert enqueue_sync(index).engine == "captured"
    assert captured == [call(index)]


@pytest.mark.anyio
async def test_what_is_captured_is_checked_as_if_it_were_handed_over() -> None:
    def script() -> None: ...

    script.__module__, script.__qualname__ = "__main__", "script"
    task(engine=engine)(script)
    wrong: list[tuple[Any, ...]] = [(resize, {1}), (resize,), (script,)]
    errors = "cannot be sent a call", "cannot be called with", "cannot be handed over"
    with capture_tasks() as captured:
        for args, error in zip(wrong, errors, strict=True):
            with pytest.raises(TypeError, match=error):
                BackgroundTask(*args)
            with pytest.raises(TypeError, match=error):
                await enqueue(*args)
    assert not captured


def test_what_a_running_task_enqueues_is_not_captured() -> None:
    async def endpoint(request: Request) -> Response:
        add_task(hold)
        return Response()

    async def hold() -> None:
        await anyio.to_thread.run_sync(release.wait, 10)
        async with engine:
            assert (await enqueue(resize, 42)).engine == "spool"
        ran.append("handed over")

    app = Starlette(routes=[Route("/", endpoint)])
    with TestClient(BackgroundTasksMiddleware(app, detach=True)) as client:
        client.get("/")
        with capture_tasks() as captured:
            release.set()
            wait_for_tasks_sync()
    assert not captured
    assert ran == ["handed over"]
    assert len(sent) == 1


class Receipt:
    def send(self, to: str) -> None: ...


def test_calls_are_equal_if_function_and_arguments_are() -> None:
    receipt = Receipt()
    assert call(receipt.send, "ada") == call(receipt.send, "ada")
    assert call(receipt.send, to="ada") == call(receipt.send, to=ANY)
    assert call(receipt.send, "ada") != call(receipt.send, "bob")
    assert call(receipt.send, "ada") != call(Receipt().send, "ada")
    assert call(note, "one", to="you") != call(note_async, "one", to="you")
    assert call(functools.partial(note, "one", to="me"), to="you") == call(
        note, "one", to="you"
    )
    assert call(task(always=True)(os.remove), "file") == call(os.remove, "file")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (call(note, "one", to="you"), "note('one', to='you')"),
        (call(Receipt().send, "ada"), "Receipt.send('ada')"),
        (call(functools.partial(note, "one")), "note('one')"),
        (call(lambda: None), "<lambda>()"),
        (call(Mock(name="send"), 42), "<Mock name='send' id="),
    ],
)
def test_a_call_reads_as_in_code(made: call, expected: str) -> None:
    assert repr(made).startswith(expected)


# --- failures ------------------------------------------------------------------------


def get_and_wait(client: TestClient, path: str) -> None:
    client.get(path)
    wait_for_tasks_sync()


@each_wrapped
@each_client
@each_backend
def test_failures_in_the_middleware_are_raised_into_the_test(
    make: Make,
    serve: Any,
    backend: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        pytest.raises(ConnectionError, match="one") as raised,
        raise_failures(),
        serve(make(), backend=backend) as client,
    ):
        assert client.get("/failing").status_code == 200
    assert raised.value.__notes__ == [f"in background task '{__name__}.fail'"]
    levels = [record.levelno for record in caplog.records if record.name == "postlude"]
    assert levels == [logging.ERROR]
    with (
        pytest.RaisesGroup(ConnectionError, ConnectionError),
        raise_failures(),
        serve(make(), backend=backend) as client,
    ):
        client.get("/failing?name=two&name=three")
    with raise_failures(), serve(make(), backend=backend) as client:
        client.get("/pair")
        with pytest.raises(ConnectionError), raise_failures():
            get_and_wait(client, "/failing?name=two")


def test_a_test_that_fails_by_itself_gets_a_note_of_each_failure() -> None:
    with pytest.raises(AttributeError) as raised, raise_failures():
        TestClient(waiting()).get("/failing").no_such_attribute  # type: ignore[attr-defined] # noqa: B018
    assert raised.value.__notes__ == [
        f"background task '{__name__}.fail' failed: ConnectionError('one')"
    ]


# --- waiting -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [detached, hidden])
@each_backend
def test_a_sync_test_waits_for_all_tasks_of_a_detached_application(
    make: Make, backend: Any
) -> None:
    with TestClient(make(), backend=backend) as client:
        wait_for_tasks_sync()
        client.get("/adding?task=hold")
        client.get("/adding?task=hold")
        with pytest.raises(TimeoutError, match=rf"in 0.01 s: '{__name__}.hold' \(run"):
            wait_for_tasks_sync(timeout=0.01)
        assert not ran
        release.set()
        wait_for_tasks_sync(timeout=None)
        assert ran == ["held", "held"]


@pytest.mark.anyio
@pytest.mark.parametrize("make", [detached, hidden])
async def test_an_async_test_waits_for_all_tasks_of_a_detached_application(
    make: Make,
) -> None:
    async with lively(make()) as client:
        await wait_for_tasks()
        await client.get("/adding?task=hold")
        with pytest.raises(TimeoutError):
            await wait_for_tasks(timeout=0.01)
        release.set()
        await wait_for_tasks()
        assert ran == ["held"]


def test_tasks_that_wait_for_others_are_waited_for_too() -> None:
    app = BackgroundTasksMiddleware(starlette_app(), detach=True, max_running=1)
    with TestClient(app) as client:
        for _ in range(3):
            client.get("/adding?task=hold")
        release.set()
        wait_for_tasks_sync()
        assert ran == ["held"] * 3


@pytest.mark.anyio
async def test_what_is_for_sync_tests_says_so_in_an_async_one() -> None:
    with pytest.raises(RuntimeError, match=r"await wait_for_tasks\(\)"):
        wait_for_tasks_sync()
    with pytest.raises(RuntimeError, match=r"await run\(\)"):
        CapturedTasks().run_sync()


def test_what_is_for_async_tests_says_so_in_a_sync_one() -> None:
    with pytest.raises(RuntimeError, match=r"use wait_for_tasks_sync\(\)"):
        _ = wait_for_tasks()
    with pytest.raises(RuntimeError, match=r"use run_sync\(\)"):
        _ = CapturedTasks().run()


# --- the plugin ----------------------------------------------------------------------

TEST = """
import pytest
from starlette.responses import Response
from starlette.testclient import TestClient
from postlude import BackgroundTask, BackgroundTasksMiddleware
from postlude.testing import call

def send_receipt(order):
    raise ConnectionError("nobody answers")

app = Response(background=BackgroundTask(send_receipt, 42))
client = TestClient(BackgroundTasksMiddleware(app))

def test_captures(captured_tasks):
    client.get("/")
    assert captured_tasks == [call(send_receipt, 42)]

def test_reads_well(captured_tasks):
    client.get("/")
    assert captured_tasks == [call(send_receipt, 41), call(send_receipt, order=42)]

@pytest.mark.usefixtures("raised_failures")
def test_raises():
    client.get("/")
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The plugin may be installed or not, and so may others.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.usefixtures("environment")
def test_the_fixtures_capture_tasks_and_raise_failures(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(TEST)
    result = pytester.runpytest_subprocess("-p", "_postlude_pytest", "-v")
    result.assert_outcomes(passed=2, failed=1, errors=1)
    for line in (
        "ERROR at teardown of test_raises",
        "ConnectionError: nobody answers",
        "assert [send_receipt(42)] == [send_receipt",
        "At index 0 diff: send_receipt(42) != send_receipt(41)",
        "Right contains one more item: send_receipt(order=42)",
    ):
        assert f" {line}" in result.stdout.str()


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return {*done.stdout.split()}


def test_the_plugin_imports_nothing_but_pytest() -> None:
    modules = imported_by("import pytest; import _postlude_pytest")
    assert "_postlude_pytest" in modules
    assert not {"postlude", "starlette", "anyio"} & modules


def test_the_package_does_not_import_what_is_for_tests() -> None:
    modules = imported_by("import postlude.responses")
    assert "postlude.middleware" in modules
    assert not {"postlude.testing", "_postlude_pytest", "pytest"} & modules


@pytest.mark.parametrize("detach", [None, False, True])
def test_what_fastapi_injects_is_captured(detach: bool | None) -> None:
    log: list[str] = []
    api = fastapi.FastAPI()

    @api.post("/")
    def endpoint(background: Injected) -> None:
        background.add_task(log.append, "ran")

    app: ASGIApp = api
    if detach is not None:
        app = BackgroundTasksMiddleware(api, detach=detach)
    with TestClient(app) as client, capture_tasks() as captured:
        client.post("/")
        assert captured == [call(log.append, "ran")]
        assert log == []
        captured.run_sync()
    assert log == ["ran"]
