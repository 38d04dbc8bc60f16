"""The middleware, from inside a request: whose tasks they are, which run, and how."""

import asyncio
import contextvars
import functools
import gc
import itertools
import logging
import math
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
)
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import starlette.background
import starlette.responses
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import BACKENDS, Backend, only_asyncio, only_on, run, run_until_interrupt
from places import alive
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

import postlude.responses
from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    TaskState,
    _supervisor,
    _tasks,
    add_task,
)
from postlude._tasks import home

pytestmark = pytest.mark.anyio

Records = Callable[..., list[logging.LogRecord]]
Task = Callable[[], Any]

ERROR, WARNING, INFO = logging.ERROR, logging.WARNING, logging.INFO
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")


class Mode(NamedTuple):
    """Where tasks run."""

    detach: bool
    lifespan: bool


MODES = {
    "waiting": Mode(detach=False, lifespan=True),
    "detached": Mode(detach=True, lifespan=True),
    "waiting without lifespan": Mode(detach=False, lifespan=False),
    "detached without lifespan": Mode(detach=True, lifespan=False),
}


@pytest.fixture(params=MODES.values(), ids=[*MODES])
def mode(request: pytest.FixtureRequest) -> Mode:
    """Runs each test in both modes, with a lifespan and without."""
    made: Mode = request.param
    return made


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mode", [MODES[name] for name in names], ids=names)


supervised = only("waiting", "detached")
both_kinds = pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Records:
    """Returns what postlude has logged by then, at a level or at all.

    But for what the drain says, in which detached tasks may come to their end.
    """
    caplog.set_level(INFO, "postlude")

    def at(level: int | None = None) -> list[logging.LogRecord]:
        return [
            record
            for record in caplog.records
            if record.name == "postlude"
            and level in (None, record.levelno)
            and not record.getMessage().startswith("shutdown waits")
        ]

    return at


def messages(records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records]


# --- an application, and what is served of it ----------------------------------------


@asynccontextmanager
async def served(
    app: ASGIApp, mode: Mode, **options: Any
) -> AsyncGenerator[BackgroundTasksMiddleware]:
    """Wraps an application; in the end all that its requests have left is done."""

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await app(scope, receive, send)

    wrapped = BackgroundTasksMiddleware(endpoint, detach=mode.detach, **options)
    if not mode.lifespan:
        yield wrapped
        return
    async with alive(wrapped):
        yield wrapped


async def request(
    app: ASGIApp,
    path: str = "/",
    *,
    on_sent: Callable[[Message], object] = lambda message: None,
    **scope: Any,
) -> list[Message]:
    """Makes a request, and returns what was sent."""
    sent: list[Message] = []
    has_body = True

    async def receive() -> Message:
        nonlocal has_body
        if has_body:
            has_body = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        await checkpoint()
        sent.append(message)
        on_sent(message)

    base = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    with anyio.fail_after(10):
        await app({**base, **scope}, receive, send)
    return sent


async def connect(app: ASGIApp) -> list[Message]:
    """Opens a WebSocket that the client closes once it has been accepted."""
    sent: list[Message] = []
    received = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect"}])

    async def receive() -> Message:
        await checkpoint()
        return next(received)

    async def send(message: Message) -> None:
        await checkpoint()
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/",
        "query_string": b"",
        "headers": [],
        "extensions": {"websocket.http.response": {}},
    }
    with anyio.fail_after(10):
        await app(scope, receive, send)
    return sent


async def serve(app: ASGIApp, mode: Mode, **options: Any) -> list[Message]:
    """Wraps an application, and makes one request to it."""
    async with served(app, mode, **options) as wrapped:
        return await request(wrapped)


def answering(make: Callable[[], Response]) -> ASGIApp:
    """Makes an application of a function that returns a response."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await make()(scope, receive, send)

    return app


async def respond(send: Send, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"hello", "more_body": False})


def is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body")


def noting(
    log: list[str],
    name: str,
    *,
    sync: bool = False,
    always: bool = False,
    error: BaseException | None = None,
) -> Task:
    """Makes a task that writes its name into the log, and may fail then."""

    def note() -> None:
        log.append(name)
        if error is not None:
            raise error

    async def anote() -> None:
        await checkpoint()
        note()

    return postlude.task(name=name, always=always)(note if sync else anote)


class Held:
    """A task that is held until it is told to go on."""

    def __init__(self, *, sync: bool = False) -> None:
        self.entered = anyio.Event()
        self.done = False
        self.func: Task = self._wait_in_thread if sync else self._wait
        self._go_on = anyio.Event()
        self._go_on_in_thread = threading.Event()

    def release(self) -> None:
        self._go_on.set()
        self._go_on_in_thread.set()

    async def _wait(self) -> None:
        self.entered.set()
        await self._go_on.wait()
        self.done = True

    def _wait_in_thread(self) -> None:
        anyio.from_thread.run_sync(self.entered.set)
        self.done = self._go_on_in_thread.wait(10)


def states(*tasks: BackgroundTask) -> list[str]:
    return [task.state for task in tasks]


# --- bad input -----------------------------------------------------------------------


class WithoutCall:
    def __repr__(self) -> str:
        return "<no function>"


NO_FUNCTION: Any = WithoutCall()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"detach": "yes"},
            TypeError,
            "detach must be True or False, not 'yes'",
        ),
        (
            {"drain_timeout": -1},
            ValueError,
            "drain_timeout must be at least 0, or None for no limit, not -1",
        ),
        (
            {"drain_timeout": math.nan},
            ValueError,
            "drain_timeout must be at least 0, or None for no limit, not nan",
        ),
        (
            {"drain_timeout": "5"},
            TypeError,
            "drain_timeout must be seconds, or None for no limit, not '5'",
        ),
        (
            {"drain_timeout": True},
            TypeError,
            "drain_timeout must be seconds, or None for no limit, not True",
        ),
        (
            {"max_running": 0},
            ValueError,
            "max_running must be at least 1, or None for no limit, not 0",
        ),
        (
            {"max_running": 1.5},
            TypeError,
            "max_running must be an int, or None for no limit, not 1.5",
        ),
        (
            {"threads": 0},
            ValueError,
            "threads must be at least 1, or None for no limit, not 0",
        ),
        (
            {"threads": True},
            TypeError,
            "threads must be an int, or None for no limit, not True",
        ),
        (
            {"observers": [print, NO_FUNCTION]},
            TypeError,
            (
                "an observer must be callable with a task and return a context "
                "manager; <no function> is not"
            ),
        ),
        (
            {"on_lost": NO_FUNCTION},
            TypeError,
            "on_lost must be callable with a list of tasks, not <no function>",
        ),
    ],
    ids=str,
)
def test_bad_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        BackgroundTasksMiddleware(answering(Response), **options)
    assert str(caught.value) == message


def test_a_single_observer_is_to_be_given_in_a_list() -> None:
    observers: Any = print
    with pytest.raises(TypeError, match="observers"):
        BackgroundTasksMiddleware(answering(Response), observers=observers)


def test_what_is_no_application_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        BackgroundTasksMiddleware(NO_FUNCTION)
    assert str(caught.value) == "app must be an ASGI application, not <no function>"


# --- who owns the tasks --------------------------------------------------------------


class Hanging:
    """An application that adds tasks, responds, and then does not return."""

    def __init__(self, *, sync: bool = False) -> None:
        self.log: list[str] = []
        self.held = Held(sync=sync)
        self.tasks = BackgroundTasks()
        self.added: list[BackgroundTask] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.tasks.add_task(self.held.func)
        self.tasks.add_task(noting(self.log, "background"))
        self.added.append(add_task(noting(self.log, "added")))
        await Response(background=self.tasks)(scope, receive, send)
        await anyio.sleep_forever()

    def has_run_all(self) -> bool:
        assert self.log == ["background", "added"]
        assert states(self.tasks, *self.added) == ["succeeded", "succeeded"]
        return self.held.done


@supervised
@both_kinds
async def test_a_cancelled_scope_around_a_request_does_not_touch_its_tasks(
    mode: Mode, sync: bool, records: Records
) -> None:
    app = Hanging(sync=sync)
    async with served(app, mode) as wrapped:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await anyio.wait_all_tasks_blocked()
            if not mode.detach:
                await app.held.entered.wait()
            group.cancel_scope.cancel()
        app.held.release()
    assert app.has_run_all()
    assert records(ERROR) == records(WARNING) == []


@only_asyncio
@supervised
@both_kinds
async def test_asyncios_cancellation_of_a_request_does_not_touch_its_tasks(
    mode: Mode, sync: bool, records: Records
) -> None:
    app = Hanging(sync=sync)
    async with served(app, mode) as wrapped:
        running = asyncio.ensure_future(request(wrapped))
        await anyio.wait_all_tasks_blocked()
        if not mode.detach:
            await app.held.entered.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        app.held.release()
    assert app.has_run_all()
    assert records(ERROR) == records(WARNING) == []


@supervised
async def test_middlewares_that_cancel_do_not_touch_the_tasks(mode: Mode) -> None:
    app = Hanging()
    scopes: list[anyio.CancelScope] = []

    async def cancelling(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as timeout:
            scopes.append(timeout)
            await app(scope, receive, send)
        assert timeout.cancelled_caught

    async with served(cancelling, mode) as wrapped:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await anyio.wait_all_tasks_blocked()
            scopes[0].cancel()
        app.held.release()
    assert app.has_run_all()


@supervised
async def test_no_cancellation_comes_between_a_response_and_its_tasks(
    mode: Mode,
) -> None:
    app = Hanging()
    app.held.release()

    def cancel(message: Message) -> None:
        if is_last(message):
            scope.cancel()

    async with served(app, mode) as wrapped:
        with anyio.CancelScope() as scope:
            await request(wrapped, on_sent=cancel)
        assert scope.cancelled_caught
    assert app.has_run_all()


@only_asyncio
@supervised
async def test_no_cancellation_of_asyncios_comes_in_between_either(mode: Mode) -> None:
    app = Hanging()
    app.held.release()

    def cancel(message: Message) -> None:
        if is_last(message):
            running.cancel()

    async with served(app, mode) as wrapped:
        running = asyncio.ensure_future(request(wrapped, on_sent=cancel))
        with pytest.raises(asyncio.CancelledError):
            await running
    assert app.has_run_all()


@only("waiting")
async def test_a_request_that_is_cancelled_while_it_waits_for_its_turn_keeps_it(
    mode: Mode,
) -> None:
    first, second = Hanging(), Hanging()
    second.held.release()
    apps = iter([first, second])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await next(apps)(scope, receive, send)

    async with served(app, mode, max_running=1) as wrapped:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(request, wrapped)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert not second.held.entered.is_set()
        first.held.release()
    assert first.has_run_all()
    assert second.has_run_all()


async def pass_on(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    return response


LAYERS = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)] * 2


async def test_tasks_run_behind_two_layers_of_base_http_middleware(mode: Mode) -> None:
    log: list[str] = []

    async def endpoint(request: Request) -> Response:
        add_task(noting(log, "added"))
        return Response(background=BackgroundTask(noting(log, "background")))

    app = Starlette(routes=[Route("/", endpoint)], middleware=LAYERS)
    async with served(app, mode) as wrapped:
        await request(wrapped)
        if not mode.detach or not mode.lifespan:
            assert log == ["background", "added"]
    assert log == ["background", "added"]


# Up to 1.6 the background runs before the last bytes leave, and so as part of that.
@pytest.mark.skipif(
    tuple(map(int, starlette.__version__.split(".")[:2])) < (1, 7),
    reason="Starlette calls the background before the last bytes leave",
)
@supervised
async def test_a_cancelled_request_behind_two_layers_does_not_touch_its_tasks(
    mode: Mode,
) -> None:
    log: list[str] = []
    held = Held()

    async def endpoint(request: Request) -> Response:
        tasks = BackgroundTasks([BackgroundTask(held.func)])
        tasks.add_task(noting(log, "background", error=ValueError()))
        add_task(noting(log, "added"))
        return Response(background=tasks)

    app = Starlette(routes=[Route("/", endpoint)], middleware=LAYERS)
    async with served(app, mode) as wrapped:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await held.entered.wait()
            group.cancel_scope.cancel()
        held.release()
    assert held.done
    assert log == ["background", "added"]


async def test_a_dispatch_that_raises_after_call_next(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []
    tasks = BackgroundTasks()

    async def endpoint(request: Request) -> Response:
        tasks.add_task(noting(log, "background"))
        add_task(noting(log, "plain"))
        add_task(noting(log, "always", always=True))
        return Response(background=tasks)

    async def dispatch(request: Request, call_next: Any) -> Response:
        await call_next(request)
        raise LookupError

    middleware = [Middleware(BaseHTTPMiddleware, dispatch=dispatch)]
    app = Starlette(routes=[Route("/", endpoint)], middleware=middleware)
    async with served(app, mode) as wrapped:
        with pytest.raises(LookupError):
            await request(wrapped)
    # Its response was thrown away, and Starlette has not called the background.
    assert tasks.state is TaskState.PENDING
    assert log == ["always"]
    assert messages(records()) == [
        "background tasks not run, as the response had status 500: 'plain'"
    ]


async def test_a_middleware_that_raises_after_the_response_changes_nothing(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def raising(scope: Scope, receive: Receive, send: Send) -> None:
        tasks = BackgroundTasks()
        tasks.add_task(noting(log, "background"))
        add_task(noting(log, "added"))
        await Response(background=tasks)(scope, receive, send)
        raise LookupError

    async with served(raising, mode) as wrapped:
        with pytest.raises(LookupError):
            await request(wrapped)
    assert log == ["background", "added"]


def cut_short(log: list[str], held: Held, concurrency: int) -> BackgroundTasks:
    tasks = BackgroundTasks(concurrency=concurrency)
    tasks.add_task(noting(log, "failing", error=ValueError()))
    tasks.add_task(postlude.task(name="held")(functools.partial(held.func)))
    if concurrency == 2:
        tasks.add_task(postlude.task(name="held too")(anyio.sleep_forever))
    tasks.add_task(noting(log, "plain"))
    tasks.add_task(noting(log, "always", always=True, sync=True))
    return tasks


@only("waiting without lifespan", "detached without lifespan")
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_without_lifespan_tasks_are_cut_short_with_their_request(
    mode: Mode, concurrency: int, records: Records
) -> None:
    log: list[str] = []
    held = Held()
    tasks = BackgroundTasks()

    def answer() -> Response:
        tasks.tasks += [cut_short(log, held, concurrency)]
        add_task(noting(log, "added"))
        add_task(noting(log, "always added", always=True))
        return Response(background=tasks)

    async with served(answering(answer), mode) as wrapped:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await held.entered.wait()
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert wrapped.status()[:4] == (0, 0, 0, 0)
    assert log == ["failing", "always", "always added"]
    assert tasks.state is TaskState.CANCELLED
    assert messages(records(ERROR)) == ["background task 'failing' failed"]
    [warning] = messages(records(WARNING))
    stopped = ["'held' (stopped)", "'held too' (stopped)"][:concurrency]
    assert all(warning.count(task) == 1 for task in stopped)
    for task in "'plain' (not started)", "'added' (not started)":
        assert warning.count(task) == 1
    assert warning.endswith("'always added' (runs all the same)")
    assert warning.count("'always' (runs all the same)") == 1


@only_asyncio
@only("waiting without lifespan", "detached without lifespan")
async def test_without_lifespan_asyncios_cancellation_names_what_a_thread_goes_on_with(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []
    held = Held(sync=True)
    tasks = BackgroundTasks()

    def answer() -> Response:
        tasks.tasks += [cut_short(log, held, 1)]
        return Response(background=tasks)

    async with served(answering(answer), mode) as wrapped:
        running = asyncio.ensure_future(request(wrapped))
        await held.entered.wait()
        running.cancel()
        # What always runs waits for the thread, as it may depend on it.
        await anyio.wait_all_tasks_blocked()
        assert log == ["failing"]
        held.release()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert held.done
    assert log == ["failing", "always"]
    [warning] = messages(records(WARNING))
    assert warning == (
        "background tasks cut short by CancelledError: 'held' (its thread goes on), "
        "'plain' (not started), 'always' (runs all the same)"
    )


@only_asyncio
@only("waiting without lifespan", "detached without lifespan")
async def test_without_lifespan_what_always_runs_does_though_cancelled_again(
    mode: Mode,
) -> None:
    log: list[str] = []
    held = Held(sync=True)

    def answer() -> Response:
        return Response(background=cut_short(log, held, 1))

    async with served(answering(answer), mode) as wrapped:
        running = asyncio.ensure_future(request(wrapped))
        await held.entered.wait()
        for _ in range(2):
            running.cancel()
            await anyio.wait_all_tasks_blocked()
        with pytest.raises(asyncio.CancelledError):
            await running
        # It has not waited for the thread any more.
        assert log == ["failing", "always"]
        assert not held.done
        held.release()


@only_asyncio
@only("waiting without lifespan", "detached without lifespan")
async def test_without_lifespan_what_a_thread_returns_too_late_is_closed(
    mode: Mode,
) -> None:
    log: list[str] = []
    held = Held(sync=True)
    inner = noting(log, "inner")

    def outer() -> Any:
        held.func()
        return inner()

    watching = Watching(log)
    task = BackgroundTask(postlude.task(name="outer")(outer))

    def answer() -> Response:
        return Response(background=task)

    async with served(answering(answer), mode, observers=[watching]) as wrapped:
        running = asyncio.ensure_future(request(wrapped))
        await held.entered.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        held.release()
        with anyio.fail_after(10):
            while task.state is TaskState.RUNNING:
                await checkpoint()
    assert task.state is TaskState.CANCELLED
    assert watching.count("<") == watching.count(">") == {"outer": 1}
    # That it was never awaited is nothing to be warned of.
    gc.collect()
    assert "inner" not in log


@only("waiting without lifespan", "detached without lifespan")
async def test_without_lifespan_a_cancelled_request_names_its_tasks(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        made.append(add_task(noting(log, "plain")))
        add_task(noting(log, "always", always=True))
        await respond(send)
        await anyio.sleep_forever()

    async with (
        served(app, mode) as wrapped,
        anyio.create_task_group() as group,
    ):
        group.start_soon(request, wrapped)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert log == ["always"]
    assert states(*made) == ["cancelled"]
    [warning] = messages(records())
    assert warning.endswith("'plain' (not started), 'always' (runs all the same)")


@only("waiting without lifespan", "detached without lifespan")
async def test_what_runs_although_it_is_cut_short_is_a_task_like_any_other(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []
    late: list[BackgroundTask] = []
    held = Held()

    async def clean() -> None:
        await checkpoint()
        log.append("clean")
        late.append(add_task(noting(log, "late")))

    def answer() -> Response:
        add_task(held.func)
        add_task(postlude.task(name="clean", always=True)(clean))
        add_task(noting(log, "failing", always=True, error=ValueError()))
        return Response()

    async with (
        served(answering(answer), mode) as wrapped,
        anyio.create_task_group() as group,
    ):
        group.start_soon(request, wrapped)
        await held.entered.wait()
        group.cancel_scope.cancel()
    assert log == ["clean", "failing", "late"]
    assert states(*late) == ["succeeded"]
    [record] = records(ERROR)
    assert record.getMessage() == "background task 'failing' failed"
    assert vars(record)["request_path"] == "/"


# --- when tasks are handed over ------------------------------------------------------


async def is_handed_over(group: BackgroundTasks) -> bool:
    """Calls a group with a failing task: only here and now is that raised."""
    try:
        await group()
    except ValueError:
        assert states(group) == ["failed"]
        return False
    return True


def failing(log: list[str]) -> BackgroundTasks:
    error = ValueError("broken")
    return BackgroundTasks([BackgroundTask(noting(log, "task", error=error))])


@pytest.mark.parametrize("before", ["start", "first chunk", "last chunk"])
async def test_before_the_last_of_the_body_a_group_runs_here_and_now(
    before: str, mode: Mode, records: Records
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for point in "start", "first chunk", "last chunk":
            if point == before:
                assert not await is_handed_over(failing(log))
                log.append("went on")
            more = point == "first chunk"
            if point == "start":
                start = {"type": "http.response.start", "status": 200, "headers": []}
                await send(start)
            else:
                body = {"type": "http.response.body", "body": b"1", "more_body": more}
                await send(body)

    await serve(app, mode)
    assert log == ["task", "went on"]
    # Who called it has been told.
    assert records() == []


async def test_after_the_last_of_the_body_a_group_is_handed_over(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)
        assert await is_handed_over(failing(log))

    await serve(app, mode)
    assert log == ["task"]
    assert len(records(ERROR)) == 1


async def test_a_single_task_that_is_awaited_by_hand_runs_here_and_now(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(ValueError, match="by hand"):
            await BackgroundTask(noting(log, "one", error=ValueError("by hand")))()
        await respond(send)
        task = BackgroundTask(noting(log, "two", error=ValueError("left behind")))
        await task()
        assert (task.state is TaskState.PENDING) is mode.detach

    await serve(app, mode)
    assert log == ["one", "two"]


async def test_in_a_websocket_a_group_runs_here_and_now(mode: Mode) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for kind in "accept", "close":
            assert not await is_handed_over(failing(log))
            await send({"type": f"websocket.{kind}"})
        assert not await is_handed_over(failing(log))

    async with served(app, mode) as wrapped:
        await connect(wrapped)
    assert log == ["task"] * 3


async def test_in_a_task_a_group_runs_here_and_now(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    async def outer() -> None:
        assert not await is_handed_over(failing(log))
        log.append("went on")
        await failing(log)()

    made: list[BackgroundTask] = []

    def answer() -> Response:
        made.append(BackgroundTask(outer))
        return Response(background=made[0])

    await serve(answering(answer), mode)
    assert log == ["task", "went on", "task"]
    assert states(*made) == ["failed"]
    assert len(records()) == 1


async def test_without_a_request_a_group_runs_here_and_now(mode: Mode) -> None:
    log: list[str] = []
    async with served(answering(Response), mode) as wrapped:
        await request(wrapped)
        assert not await is_handed_over(failing(log))
    assert log == ["task"]


async def chunks() -> AsyncIterator[bytes]:
    for chunk in b"one", b"two":
        await checkpoint()
        yield chunk


RESPONSES: dict[str, tuple[Callable[..., Response], dict[str, Any]]] = {
    "plain": (functools.partial(Response, "hello"), {}),
    "head": (functools.partial(Response, "hello"), {"method": "HEAD"}),
    "no content": (functools.partial(Response, status_code=204), {}),
    "stream": (lambda **kwargs: StreamingResponse(chunks(), **kwargs), {}),
    "file": (functools.partial(FileResponse, __file__), {}),
    "head of file": (functools.partial(FileResponse, __file__), {"method": "HEAD"}),
    "pathsend": (
        functools.partial(FileResponse, __file__),
        {"extensions": {"http.response.pathsend": {}}},
    ),
}


@pytest.mark.parametrize("name", RESPONSES)
async def test_the_background_of_each_kind_of_response_is_handed_over(
    name: str, mode: Mode, records: Records
) -> None:
    make, scope = RESPONSES[name]
    log: list[str] = []

    def answer() -> Response:
        add_task(noting(log, "added"))
        return make(background=failing(log))

    def note(message: Message) -> None:
        if is_last(message) or message["type"] == "http.response.pathsend":
            log.append("sent")

    async with served(answering(answer), mode) as wrapped:
        await request(wrapped, on_sent=note, **scope)
    assert log == ["sent", "task", "added"]
    [record] = records()
    assert vars(record)["request_method"] == scope.get("method", "GET")


async def test_after_a_file_that_the_server_sends_a_group_is_handed_over(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": __file__})
        assert await is_handed_over(failing(log))

    await serve(app, mode)
    assert log == ["task"]


# --- where tasks run -----------------------------------------------------------------


async def test_tasks_run_before_or_after_the_application_has_returned(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks = BackgroundTasks([BackgroundTask(noting(log, "background"))])
        add_task(noting(log, "added", sync=True))
        await Response(background=tasks)(scope, receive, send)
        await checkpoint()
        log.append("closed")

    await serve(app, mode)
    if mode.detach:
        assert log == ["closed", "background", "added"]
    else:
        assert log == ["background", "added", "closed"]


async def test_without_a_background_added_tasks_run_when_the_application_has_returned(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        add_task(noting(log, "added"))
        await respond(send)
        await checkpoint()
        log.append("closed")

    async with served(app, mode) as wrapped:
        await request(wrapped)
        if not mode.detach or not mode.lifespan:
            assert log == ["closed", "added"]
    assert log == ["closed", "added"]


@both_kinds
async def test_the_request_waits_for_its_tasks_unless_it_is_detached(
    mode: Mode, sync: bool
) -> None:
    held = Held(sync=sync)
    returned = False

    def answer() -> Response:
        return Response(background=BackgroundTask(held.func))

    async def make() -> None:
        nonlocal returned
        await request(wrapped)
        returned = True

    async with served(answering(answer), mode) as wrapped:
        async with anyio.create_task_group() as group:
            group.start_soon(make)
            await held.entered.wait()
            await anyio.wait_all_tasks_blocked()
            assert returned is (mode.detach and mode.lifespan)
            held.release()
        assert returned
    assert held.done


async def test_the_request_waits_for_tasks_that_its_tasks_add(mode: Mode) -> None:
    log: list[str] = []

    async def first() -> None:
        await checkpoint()
        add_task(noting(log, "second"))

    def answer() -> Response:
        return Response(background=BackgroundTask(first))

    async with served(answering(answer), mode) as wrapped:
        await request(wrapped)
        if not mode.detach or not mode.lifespan:
            assert log == ["second"]
    assert log == ["second"]


@pytest.mark.parametrize("lifespan", [False, True])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_test_client_waits_for_the_tasks_and_sees_no_failure(
    backend: Any, lifespan: bool
) -> None:
    log: list[str] = []

    def endpoint(request: Request) -> Response:
        add_task(noting(log, "added"))
        return Response(background=failing(log))

    app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", endpoint)]))
    client = TestClient(app, backend=backend)
    if lifespan:
        with client:
            assert client.get("/").status_code == 200
            assert log == ["task", "added"]
    else:
        assert client.get("/").status_code == 200
    assert log == ["task", "added"]


def test_the_test_client_drains_what_is_detached_when_it_is_left() -> None:
    log: list[str] = []

    async def endpoint(request: Request) -> Response:
        add_task(noting(log, "added"))
        return Response()

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(BackgroundTasksMiddleware, detach=True)
    with TestClient(app) as client:
        for _ in range(3):
            client.get("/")
    assert log == ["added"] * 3


# --- failures ------------------------------------------------------------------------


class Strange(BaseException):
    pass


def cancelled_future() -> Task:
    async def wait() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    return wait


def kept_cancellation() -> Task:
    """Raises the cancellation of a scope of its own once that is over."""

    async def keep() -> None:
        kept: list[BaseException] = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            except BaseException as exc:
                kept.append(exc)
                raise
        raise kept.pop()

    return keep


def cancels_itself(*, waits: bool) -> Task:
    async def cancel() -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        if waits:
            await anyio.sleep_forever()

    return cancel


def raising(error: BaseException, *, sync: bool) -> Task:
    return noting([], "raising", error=error, sync=sync)


def exits_at_once() -> Task:
    async def exit_() -> None:
        raise GeneratorExit

    return exit_


def returning(call: Callable[[], Awaitable[object]]) -> Task:
    return lambda: call()  # noqa: PLW0108 - a sync callable that returns an awaitable


def returning_task(func: Task) -> BackgroundTask:
    return BackgroundTask(returning(func))


FAILURES: dict[str, Callable[[], Task]] = {
    "error": lambda: raising(ValueError("broken"), sync=False),
    "error in thread": lambda: raising(ValueError("broken"), sync=True),
    "exit": lambda: raising(SystemExit(1), sync=False),
    "exit in thread": lambda: raising(SystemExit(1), sync=True),
    "strange": lambda: raising(Strange(), sync=False),
    "strange in thread": lambda: raising(Strange(), sync=True),
    "group": lambda: raising(BaseExceptionGroup("", [Strange()]), sync=False),
    "generator exit": lambda: raising(GeneratorExit(), sync=False),
    "generator exit at once": exits_at_once,
    "generator exit in thread": lambda: raising(GeneratorExit(), sync=True),
    "stop": lambda: raising(StopIteration(), sync=True),
    "kept cancellation": kept_cancellation,
    "foreign cancellation in thread": lambda: raising(
        asyncio.CancelledError(), sync=True
    ),
    "awaitable": lambda: returning(raising(ValueError("broken"), sync=False)),
    "awaitable exit": lambda: returning(raising(SystemExit(1), sync=False)),
    "bound to fail": lambda: functools.partial(int, "x"),
}
CANCELLATIONS: dict[str, Callable[[], Task]] = {
    "future": cancelled_future,
    "awaitable future": lambda: returning(cancelled_future()),
    "error": lambda: raising(asyncio.CancelledError(), sync=False),
    "itself": lambda: cancels_itself(waits=True),
    "itself through awaitable": lambda: returning(cancels_itself(waits=True)),
}


async def fails_alone(
    func: Task, mode: Mode, records: Records, *, concurrency: int = 1
) -> BackgroundTask:
    """Runs a failing task among others, and returns it."""
    logs: list[list[str]] = []
    made: list[BackgroundTask] = []
    groups: list[BackgroundTasks] = []

    def answer() -> Response:
        log: list[str] = []
        logs.append(log)
        tasks = BackgroundTasks(concurrency=concurrency)
        groups.append(tasks)
        tasks.add_task(noting(log, "before"))
        made.append(tasks.add_task(func))
        tasks.add_task(noting(log, "after", sync=True))
        tasks.add_task(noting(log, "last"))
        add_task(noting(log, "added"))
        return Response("hello", background=tasks)

    async with served(answering(answer), mode) as wrapped:
        sent = await request(wrapped, "/orders", method="POST")
        assert sent[-1]["body"] == b"hello"
        # Neither the application nor later requests are touched.
        await request(wrapped, "/orders", method="POST")
    expected = ["before", "after", "last", "added"]
    for log in logs:
        assert (
            log if concurrency == 1 else sorted(log, key=expected.index)
        ) == expected
    assert states(*made, *groups) == ["failed"] * 4
    logged = {vars(record)["task_id"]: record for record in records()}
    assert len(logged) == len(records()) == 2
    for task, group in zip(made, groups, strict=True):
        record = logged[task.id]
        assert record.levelno == ERROR
        assert record.getMessage() == f"background task {task.name!r} failed"
        assert record.exc_info
        assert record.exc_info[1] is task.exception is group.exception
        extra = {
            "task_name": task.name,
            "task_id": task.id,
            "request_method": "POST",
            "request_path": "/orders",
        }
        assert extra.items() <= vars(record).items()
    return made[0]


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("name", FAILURES)
async def test_a_failing_task_harms_nobody_and_is_logged_once(
    name: str, mode: Mode, concurrency: int, records: Records
) -> None:
    task = await fails_alone(FAILURES[name](), mode, records, concurrency=concurrency)
    assert task.exception
    if name in ("exit", "exit in thread", "awaitable exit"):
        assert isinstance(task.exception, RuntimeError)
        assert isinstance(task.exception.__cause__, SystemExit)
        message = f"background task {task.name!r} raised SystemExit"
        assert str(task.exception) == message


@only_asyncio
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("name", CANCELLATIONS)
@supervised
async def test_a_cancellation_that_nobody_asked_for_is_the_failure_of_its_task(
    name: str, mode: Mode, concurrency: int, records: Records
) -> None:
    func = CANCELLATIONS[name]()
    task = await fails_alone(func, mode, records, concurrency=concurrency)
    assert isinstance(task.exception, RuntimeError)
    assert isinstance(task.exception.__cause__, asyncio.CancelledError)


@only_asyncio
@pytest.mark.parametrize("name", ["future", "awaitable future", "error"])
@only("waiting without lifespan", "detached without lifespan")
async def test_without_lifespan_a_stray_cancellation_is_a_failure_too(
    name: str, mode: Mode, records: Records
) -> None:
    task = await fails_alone(CANCELLATIONS[name](), mode, records)
    assert isinstance(task.exception, RuntimeError)


@only_asyncio
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("then", ["sync", "async"])
@pytest.mark.parametrize("wrap", [BackgroundTask, returning_task])
@supervised
async def test_a_task_that_cancels_itself_and_returns_harms_no_other(
    wrap: Callable[[Task], BackgroundTask], then: str, concurrency: int, mode: Mode
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []

    def answer() -> Response:
        tasks = BackgroundTasks(concurrency=concurrency)
        tasks.tasks.append(wrap(cancels_itself(waits=False)))
        made.append(tasks.add_task(noting(log, "next", sync=then == "sync")))
        made.append(add_task(noting(log, "added")))
        return Response(background=tasks)

    await serve(answering(answer), mode)
    assert log == ["next", "added"]
    assert states(*made) == ["succeeded", "succeeded"]


async def test_each_of_several_failures_is_logged_once(
    mode: Mode, records: Records
) -> None:
    groups: list[BackgroundTasks] = []

    def answer() -> Response:
        inner = BackgroundTasks(concurrency=2)
        inner.add_task(noting([], "one", error=ValueError("one")))
        inner.add_task(noting([], "two", error=ValueError("two"), sync=True))
        stock = starlette.background.BackgroundTasks()
        stock.add_task(noting([], "three", error=ValueError("three")))
        groups.append(BackgroundTasks([inner, stock]))
        add_task(noting([], "four", error=ValueError("four")))
        return Response(background=groups[0])

    await serve(answering(answer), mode)
    told = Counter(vars(record)["task_name"] for record in records(ERROR))
    assert told == {"one": 1, "two": 1, "three": 1, "four": 1}
    assert states(*groups) == ["failed"]
    error = groups[0].exception
    assert isinstance(error, ExceptionGroup)
    assert {str(part) for part in error.exceptions} == {"one", "two", "three"}


@both_kinds
def test_only_ctrl_c_leaves(
    anyio_backend: Backend, mode: Mode, sync: bool, records: Records
) -> None:
    log: list[str] = []

    def answer() -> Response:
        tasks = BackgroundTasks()
        tasks.add_task(noting(log, "task", sync=sync, error=KeyboardInterrupt()))
        tasks.add_task(noting(log, "next", always=True))
        return Response(background=tasks)

    async def main() -> None:
        async with served(answering(answer), mode) as wrapped:
            await request(wrapped)

    run_until_interrupt(anyio_backend, main)
    assert log == ["task"]
    assert not [r for r in records(ERROR) if r.getMessage().endswith("failed")]


# --- which tasks run -----------------------------------------------------------------


class Adding:
    """Adds a plain task, a sync one, and one that is to run whatever happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.tasks: list[BackgroundTask] = []

    def add(self) -> None:
        for func in (
            noting(self.log, "plain"),
            noting(self.log, "sync", sync=True),
            noting(self.log, "always", always=True),
        ):
            self.tasks.append(add_task(func))

    def has_run(self) -> bool:
        assert self.log == ["plain", "sync", "always"]
        assert states(*self.tasks) == ["succeeded"] * 3
        return True

    def has_told(self, why: str, records: Records, method: str = "GET") -> bool:
        assert self.log == ["always"]
        assert states(*self.tasks) == ["cancelled", "cancelled", "succeeded"]
        assert [task.started_at for task in self.tasks[:2]] == [None, None]
        [record] = records(INFO)
        message = f"background tasks not run, as {why}: 'plain', 'sync'"
        assert record.getMessage() == message
        extra = {"request_method": method, "request_path": "/"}
        assert extra.items() <= vars(record).items()
        assert records(ERROR) == []
        return True


@pytest.mark.parametrize("status", [200, 204, 399])
async def test_added_tasks_run_after_a_response_that_is_no_error(
    status: int, mode: Mode, records: Records
) -> None:
    adding = Adding()

    def answer() -> Response:
        adding.add()
        return Response(status_code=status)

    await serve(answering(answer), mode)
    assert adding.has_run()
    assert records() == []


@pytest.mark.parametrize("status", [400, 500])
async def test_after_an_error_response_only_its_own_background_runs(
    status: int, mode: Mode, records: Records
) -> None:
    adding = Adding()
    log: list[str] = []

    def answer() -> Response:
        adding.add()
        task = BackgroundTask(noting(log, "background"))
        return Response(status_code=status, background=task)

    await serve(answering(answer), mode)
    assert log == ["background"]
    assert adding.has_told(f"the response had status {status}", records)


async def test_an_error_counts_as_one_when_it_is_raised(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def endpoint(request: Request) -> Response:
        adding.add()
        raise HTTPException(404)

    app = Starlette(routes=[Route("/", endpoint)])
    async with served(app, mode) as wrapped:
        sent = await request(wrapped)
    assert sent[0]["status"] == 404
    assert adding.has_told("the response had status 404", records)


async def test_without_a_response_only_what_always_runs_does(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        adding.add()
        raise LookupError

    async with served(app, mode) as wrapped:
        with pytest.raises(LookupError):
            await request(wrapped)
    assert adding.has_told("there was no response", records)


async def half_a_response(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"1", "more_body": True})


async def test_after_half_a_response_only_what_always_runs_does(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        adding.add()
        await half_a_response(send)
        raise LookupError

    async with served(app, mode) as wrapped:
        with pytest.raises(LookupError):
            await request(wrapped)
    [record] = records(INFO)
    # That was not what was wrong with it.
    assert "status 200" not in record.getMessage()
    why = record.getMessage().removeprefix("background tasks not run, as ")
    assert adding.has_told(why.partition(":")[0], records)


async def test_when_the_last_send_fails_only_what_always_runs_does(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        adding.add()
        await respond(send)

    def leave(message: Message) -> None:
        if is_last(message):
            raise OSError("the client has gone")

    async with served(app, mode) as wrapped:
        with pytest.raises(OSError, match="gone"):
            await request(wrapped, on_sent=leave)
    assert adding.log == ["always"]
    [record] = records(INFO)
    assert "status 200" not in record.getMessage()


@supervised
async def test_when_a_request_is_cancelled_before_its_end_only_what_always_runs_does(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        adding.add()
        await anyio.sleep_forever()

    async with (
        served(app, mode) as wrapped,
        anyio.create_task_group() as group,
    ):
        group.start_soon(request, wrapped)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert adding.has_told("there was no response", records)


@pytest.mark.parametrize("when", ["in the last send", "later"])
@supervised
async def test_a_request_that_is_cancelled_once_it_was_answered_runs_its_tasks(
    when: str, mode: Mode, records: Records
) -> None:
    adding = Adding()
    scope = anyio.CancelScope()

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        async def passing_on(message: Message) -> None:
            await send(message)
            if when == "in the last send" and is_last(message):
                scope.cancel()
                await checkpoint()

        adding.add()
        await respond(passing_on)
        scope.cancel()
        await checkpoint()

    async with served(app, mode) as wrapped:
        with scope:
            await request(wrapped)
    assert adding.has_run()
    assert records() == []


async def test_a_cancellation_inside_the_last_send_comes_too_late(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def hanging_up(scope: Scope, receive: Receive, send: Send) -> None:
        async def hang(message: Message) -> None:
            await send(message)
            if is_last(message):
                cancelled.cancel()
                await anyio.sleep_forever()

        await wrapped(scope, receive, hang)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        adding.add()
        await respond(send)

    async with served(app, mode) as wrapped:
        with anyio.CancelScope() as cancelled:
            await request(hanging_up)
        assert cancelled.cancelled_caught
    if mode.lifespan:
        assert adding.has_run()
    else:
        assert adding.log == ["always"]
        [record] = records(WARNING)
        assert "'plain' (not started), 'sync' (not started)" in record.getMessage()


async def test_an_exception_after_the_response_changes_nothing(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)
        adding.add()
        raise LookupError

    async with served(app, mode) as wrapped:
        with pytest.raises(LookupError):
            await request(wrapped)
    assert adding.has_run()
    assert records() == []


async def test_when_all_that_was_added_runs_there_is_nothing_to_say(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        add_task(noting(log, "always", always=True))
        await respond(send, 500)

    await serve(app, mode)
    assert log == ["always"]
    assert records() == []


async def test_a_group_that_is_added_but_does_not_run_is_named_task_by_task(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = BackgroundTasks([BackgroundTask(noting(log, "one"))])
        stock = starlette.background.BackgroundTask(noting(log, "two"))
        always = BackgroundTask(noting(log, "always", always=True))
        add_task(BackgroundTasks([inner, stock, always]))
        await respond(send, 500)

    await serve(app, mode)
    assert log == ["always"]
    [message] = messages(records())
    assert message.endswith("status 500: 'one', 'two'")


async def test_the_handle_of_an_added_group_tells_that_it_does_not_run(
    mode: Mode,
) -> None:
    made: list[BackgroundTask] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = BackgroundTasks([BackgroundTask(print)])
        group = BackgroundTasks([inner])
        made.extend([add_task(group), group, inner])
        await respond(send, 500)

    await serve(app, mode)
    assert states(*made) == ["cancelled"] * 3


async def test_tasks_added_in_a_websocket_run_when_it_has_ended(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def endpoint(websocket: WebSocket) -> None:
        adding.add()
        await websocket.accept()
        await websocket.close()
        await checkpoint()
        assert adding.log == []

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    async with served(app, mode) as wrapped:
        await connect(wrapped)
    assert adding.has_run()
    assert records() == []


async def test_tasks_added_in_a_websocket_run_however_it_ends(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        adding.add()
        raise LookupError

    async with served(app, mode) as wrapped:
        with pytest.raises(LookupError):
            await connect(wrapped)
    assert adding.has_run()
    assert records() == []


async def close(websocket: WebSocket) -> None:
    await websocket.close()


async def deny(websocket: WebSocket) -> None:
    await websocket.send_denial_response(Response(status_code=200))


async def say_nothing(websocket: WebSocket) -> None:
    await checkpoint()


@pytest.mark.parametrize("end", [close, deny, say_nothing])
async def test_when_a_websocket_was_not_accepted_only_what_always_runs_does(
    end: Callable[[WebSocket], Awaitable[None]], mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        adding.add()
        await end(WebSocket(scope, receive, send))

    async with served(app, mode) as wrapped:
        await connect(wrapped)
    assert adding.has_told("the WebSocket was not accepted", records, "WEBSOCKET")


async def test_the_background_of_a_denial_runs_here_and_now(mode: Mode) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(status_code=403, background=failing(log))
        with pytest.raises(ValueError, match="broken"):
            await WebSocket(scope, receive, send).send_denial_response(response)

    async with served(app, mode) as wrapped:
        await connect(wrapped)
    assert log == ["task"]


async def test_a_failure_in_a_websocket_is_logged_as_one(
    mode: Mode, records: Records
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        add_task(noting([], "failing", error=ValueError()))

    async with served(app, mode) as wrapped:
        await connect(wrapped)
    [record] = records()
    assert vars(record)["request_method"] == "WEBSOCKET"
    assert vars(record)["request_path"] == "/"


# --- add_task() ----------------------------------------------------------------------


def test_without_a_request_there_is_no_middleware() -> None:
    with pytest.raises(RuntimeError, match="there is no request served by"):
        BackgroundTasksMiddleware.current()


def test_without_a_request_add_task_says_what_it_needs() -> None:
    with pytest.raises(RuntimeError) as caught:
        add_task(print)
    assert str(caught.value) == (
        "add_task() needs a request: wrap the application in "
        "BackgroundTasksMiddleware, and call it while that serves one; anywhere "
        "else postlude.engines.enqueue() hands a task over to its engine"
    )


async def test_a_mistake_is_told_where_it_is_made(mode: Mode) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        func: Any = None
        with pytest.raises(TypeError, match="needs a callable, not None"):
            add_task(func)
        await respond(send)

    await serve(app, mode)


async def test_add_task_works_in_an_endpoint_in_a_worker_thread(mode: Mode) -> None:
    seen: list[str] = []

    def endpoint(request: Request) -> Response:
        variable.set("endpoint")
        for sync in False, True:
            add_task(looking(seen, sync=sync))
        return Response()

    app = Starlette(routes=[Route("/", endpoint)])
    await serve(app, mode)
    assert seen == ["endpoint", "endpoint"]


def looking(seen: list[str], *, sync: bool = False, value: str = "") -> Task:
    """Makes a task that writes down what the variable is, and sets it."""

    def look() -> None:
        seen.append(variable.get())
        variable.set(value)

    async def alook() -> None:
        seen.append(variable.get())
        await checkpoint()
        variable.set(value)

    return look if sync else alook


async def test_add_task_works_in_a_middleware_before_and_after_the_endpoint(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def dispatch(request: Request, call_next: Any) -> Response:
        add_task(noting(log, "before"))
        response: Response = await call_next(request)
        add_task(noting(log, "after", sync=True))
        return response

    async def endpoint(request: Request) -> Response:
        add_task(noting(log, "endpoint"))
        return Response()

    middleware = [Middleware(BaseHTTPMiddleware, dispatch=dispatch)]
    app = Starlette(routes=[Route("/", endpoint)], middleware=middleware)
    await serve(app, mode)
    assert log == ["before", "endpoint", "after"]


async def test_add_task_works_after_the_response(mode: Mode) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = BackgroundTask(noting(log, "background"))
        await Response(background=task)(scope, receive, send)
        add_task(noting(log, "after"))

    async with served(app, mode) as wrapped:
        await request(wrapped)
        if not mode.detach or not mode.lifespan:
            assert log == ["background", "after"]
    assert log == ["background", "after"]


@only("waiting")
async def test_what_is_added_while_the_tasks_run_joins_them(mode: Mode) -> None:
    log: list[str] = []
    held = Held()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = BackgroundTask(held.func)
        with anyio.CancelScope() as waiting:
            scopes.append(waiting)
            await Response(background=task)(scope, receive, send)
        add_task(noting(log, "after"))

    scopes: list[anyio.CancelScope] = []
    async with served(app, mode) as wrapped, anyio.create_task_group() as group:
        group.start_soon(request, wrapped)
        await held.entered.wait()
        scopes[0].cancel()
        await anyio.wait_all_tasks_blocked()
        status = wrapped.status()
        assert (status.running_groups, status.waiting_tasks) == (1, 1)
        held.release()
    assert log == ["after"]


@both_kinds
async def test_in_a_task_add_task_adds_one_after_the_others(
    mode: Mode, sync: bool
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []

    def add() -> None:
        log.append("adding")
        made.append(add_task(noting(log, "from a task")))
        made.append(add_task(noting(log, "sync from a task", sync=True)))

    async def add_async() -> None:
        await checkpoint()
        add()

    def answer() -> Response:
        tasks = BackgroundTasks([BackgroundTask(add if sync else add_async)])
        tasks.add_task(noting(log, "background"))
        add_task(noting(log, "added"))
        return Response(background=tasks)

    await serve(answering(answer), mode)
    assert log == [
        *["adding", "background", "added"],
        *["from a task", "sync from a task"],
    ]
    assert states(*made) == ["succeeded", "succeeded"]


async def test_what_a_task_adds_may_add_more(mode: Mode) -> None:
    log: list[str] = []

    def count(left: int) -> None:
        log.append(str(left))
        if left:
            add_task(count if left % 2 else acount, left - 1)

    async def acount(left: int) -> None:
        await checkpoint()
        count(left)

    def answer() -> Response:
        return Response(background=BackgroundTask(count, 5))

    await serve(answering(answer), mode)
    assert log == ["5", "4", "3", "2", "1", "0"]


async def test_a_tasks_children_add_tasks_to_the_same_request(mode: Mode) -> None:
    log: list[str] = []

    async def child() -> None:
        await checkpoint()
        add_task(noting(log, "child"))

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child)
        await anyio.to_thread.run_sync(add_task, noting(log, "thread"))
        context = contextvars.copy_context()
        add = functools.partial(add_task, noting(log, "raw thread"))
        thread = threading.Thread(target=context.run, args=(add,))
        thread.start()
        thread.join()
        log.append("parent")

    def answer() -> Response:
        return Response(background=BackgroundTask(parent))

    await serve(answering(answer), mode)
    assert log == ["parent", "child", "thread", "raw thread"]


async def test_in_a_concurrent_group_tasks_may_add_more(mode: Mode) -> None:
    log: list[str] = []

    async def add(name: str) -> None:
        await checkpoint()
        add_task(noting(log, name))

    def answer() -> Response:
        tasks = BackgroundTasks(concurrency=2)
        for name in "abc":
            tasks.add_task(add, name)
        return Response(background=tasks)

    await serve(answering(answer), mode)
    assert sorted(log) == ["a", "b", "c"]


@pytest.mark.parametrize("has_tasks", [False, True])
async def test_when_a_request_and_its_tasks_have_ended_none_can_be_added(
    has_tasks: bool, mode: Mode
) -> None:
    ended = anyio.Event()
    told: list[str] = []

    async def linger() -> None:
        await ended.wait()
        with pytest.raises(RuntimeError) as caught:
            add_task(print)
        told.append(str(caught.value))
        # A task by itself is nobody's business.
        await BackgroundTask(told.append, "by hand")()

    def answer() -> Response:
        outside.start_soon(linger)
        return Response(background=BackgroundTask(linger_too) if has_tasks else None)

    async def linger_too() -> None:
        outside.start_soon(linger)

    async with anyio.create_task_group() as outside:
        async with served(answering(answer), mode) as wrapped:
            await request(wrapped)
        ended.set()
    assert len(told) == (4 if has_tasks else 2)
    for message in set(told) - {"by hand"}:
        assert message.startswith("the request has ended")


@supervised
async def test_when_only_the_request_has_ended_tasks_can_be_added(mode: Mode) -> None:
    log: list[str] = []
    held = Held()
    ended = anyio.Event()
    waiting = anyio.CancelScope()

    async def linger() -> None:
        await ended.wait()
        add_task(noting(log, "late"))
        held.release()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        outside.start_soon(linger)
        with waiting:
            held_task = BackgroundTask(held.func)
            await Response(background=held_task)(scope, receive, send)

    async with served(app, mode) as wrapped, anyio.create_task_group() as outside:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped)
            await held.entered.wait()
            waiting.cancel()
        ended.set()
    assert log == ["late"]


async def test_what_is_added_as_the_last_task_ends_runs(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    jobs: list[Any] = []
    lock = _supervisor.lock

    class Late:
        """A lock that another thread has taken a moment before, to add a task."""

        def __enter__(self) -> None:
            lock.acquire()
            if "first" in log and jobs:
                jobs.pop()._tasks.append(BackgroundTask(noting(log, "late")))

        def __exit__(self, *_: object) -> None:
            lock.release()

    def first() -> None:
        log.append("first")
        jobs.append(home.get())

    monkeypatch.setattr(_supervisor, "lock", Late())
    await serve(answering(lambda: Response(background=BackgroundTask(first))), mode)
    assert log == ["first", "late"]


async def test_what_is_added_as_the_request_ends_is_refused(mode: Mode) -> None:
    class Closing(tuple[Any, ...]):
        """Tasks to which one is added a moment before the request ends."""

        __slots__ = ()

        def __add__(self, tasks: Any) -> Any:
            here.is_open = False
            return super().__add__(tasks)

    here: Any = None

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal here
        here = home.get()
        here._added = Closing()
        await respond(send)
        with pytest.raises(RuntimeError, match="the request has ended"):
            add_task(print)

    await serve(app, mode)
    assert here._added == ()


async def test_a_context_that_lives_on_does_not_keep_the_connection(mode: Mode) -> None:
    class Connection:
        async def send(self, message: Message) -> None:
            # As a server does that starts a timer by the last message.
            contexts.append(contextvars.copy_context())

    def keep_context() -> None:
        contexts.append(contextvars.copy_context())

    async def receive() -> Message:
        raise AssertionError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        add_task(keep_context)
        await Response(background=BackgroundTask(keep_context))(scope, receive, send)

    contexts: list[contextvars.Context] = []
    connection = Connection()
    scope: Scope = {"type": "http", "path": "/", "method": "GET", "own": connection}
    async with served(app, mode) as wrapped:
        await wrapped(scope, receive, connection.send)
    assert len(contexts) == 4
    alive = weakref.ref(connection)
    del connection, scope
    gc.collect()
    assert alive() is None


async def test_tasks_run_although_a_scope_lacks_what_is_logged(mode: Mode) -> None:
    log: list[str] = []

    async def send(message: Message) -> None:
        pass

    async def receive() -> Message:
        raise AssertionError

    app = answering(lambda: Response(background=BackgroundTask(noting(log, "task"))))
    async with served(app, mode) as wrapped:
        await wrapped({"type": "http"}, receive, send)
    assert log == ["task"]


async def test_nothing_is_sent_after_the_application_has_returned(mode: Mode) -> None:
    sends: list[Send] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        sends.append(send)
        await respond(send)

    await serve(app, mode)
    with pytest.raises(
        RuntimeError, match=r"http.response.start was sent after the ap"
    ):
        await respond(sends[0])


@only("detached")
async def test_what_is_added_to_a_group_that_waits_runs_after_it(mode: Mode) -> None:
    log: list[str] = []
    event = anyio.Event()
    contexts: list[contextvars.Context] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        contexts.append(contextvars.copy_context())
        group = BackgroundTasks()
        if len(contexts) == 1:
            group.add_task(event.wait)
        else:
            group.add_task(log.append, "first")
            group.add_task(log.append, "second")
        await Response(background=group)(scope, receive, send)

    async with (
        served(app, mode, max_running=1) as wrapped,
        anyio.create_task_group() as requests,
    ):
        for waiting in range(2):
            requests.start_soon(request, wrapped)
            with anyio.fail_after(10):
                while wrapped.status()[:2] != (1, waiting):
                    await checkpoint()
        for name in "third", "fourth":
            contexts[1].run(add_task, log.append, name)
        states = [task.state for task in wrapped.tasks()]
        assert states == ["running", *["pending"] * 4]
        event.set()
    assert log == ["first", "second", "third", "fourth"]


async def test_what_a_thread_adds_runs_or_is_refused(mode: Mode) -> None:
    log: list[str] = []
    added = 0
    threads: list[threading.Thread] = []

    def add() -> None:
        nonlocal added
        for _ in range(300):
            try:
                add_task(log.append, "task")
            except RuntimeError:
                return
            added += 1

    def start() -> None:
        context = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run, args=(add,)))
        threads[0].start()

    await serve(answering(lambda: Response(background=BackgroundTask(start))), mode)
    threads[0].join()
    assert len(log) == added


async def test_add_task_returns_the_handle(mode: Mode) -> None:
    made: list[BackgroundTask] = []

    def answer() -> Response:
        made.append(add_task(print, "", end=""))
        assert states(*made) == ["pending"]
        return Response()

    await serve(answering(answer), mode)
    assert made[0].func is print
    assert states(*made) == ["succeeded"]


# --- one job a request, in order -----------------------------------------------------


@both_kinds
async def test_a_responses_background_comes_before_added_tasks(
    mode: Mode, sync: bool
) -> None:
    log: list[str] = []

    def answer() -> Response:
        add_task(noting(log, "added 1", sync=sync))
        tasks = BackgroundTasks([BackgroundTask(noting(log, "background 1"))])
        tasks.add_task(noting(log, "background 2", sync=sync))
        add_task(noting(log, "added 2"))
        return Response(background=tasks)

    await serve(answering(answer), mode)
    assert log == ["background 1", "background 2", "added 1", "added 2"]


async def test_added_tasks_join_the_first_task_that_a_stock_group_calls(
    mode: Mode,
) -> None:
    log: list[str] = []

    def answer() -> Response:
        add_task(noting(log, "added"))
        tasks = [BackgroundTask(noting(log, name)) for name in ("one", "two")]
        return Response(background=starlette.background.BackgroundTasks(tasks))

    await serve(answering(answer), mode)
    if mode.detach:
        assert log == ["one", "two", "added"]
    else:
        # It does not call the second before the request has waited for the first.
        assert log == ["one", "added", "two"]


async def test_a_request_is_one_job(mode: Mode) -> None:
    log: list[str] = []
    statuses: list[tuple[int, int]] = []

    def look() -> None:
        statuses.append(wrapped.status()[:2])

    def answer() -> Response:
        tasks = BackgroundTasks([BackgroundTask(noting(log, "background"))])
        tasks.tasks.append(BackgroundTasks([BackgroundTask(look)]))
        add_task(look)
        add_task(add_task, look)
        return Response(background=tasks)

    async with served(answering(answer), mode, max_running=1) as wrapped:
        await request(wrapped)
    assert statuses == [(1, 0)] * 3


async def test_tasks_of_several_requests_run_side_by_side(mode: Mode) -> None:
    both = anyio.Event()
    waiting = 0

    async def meet() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 2:
            both.set()
        await both.wait()

    def answer() -> Response:
        return Response(background=BackgroundTask(meet))

    async with served(answering(answer), mode) as wrapped:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(request, wrapped)
                group.start_soon(request, wrapped)
            await both.wait()


@only_asyncio
async def test_tasks_of_several_requests_may_await_the_same_future(mode: Mode) -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    made: list[BackgroundTask] = []

    async def wait() -> None:
        assert await future == "result"

    def answer() -> Response:
        made.append(BackgroundTask(wait))
        return Response(background=made[-1])

    async with (
        served(answering(answer), mode) as wrapped,
        anyio.create_task_group() as group,
    ):
        for _ in range(3):
            group.start_soon(request, wrapped)
        await anyio.wait_all_tasks_blocked()
        future.set_result("result")
    assert [task.exception for task in made] == [None] * 3
    assert states(*made) == ["succeeded"] * 3


# uvloop does not know of it everywhere.
@only_on("asyncio")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio starts none eagerly")
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_tasks_run_where_asyncio_starts_its_tasks_eagerly(
    concurrency: int, mode: Mode, records: Records
) -> None:
    log: list[str] = []
    loop = asyncio.get_running_loop()

    async def at_once() -> None:
        log.append("at once")

    async def sleep() -> None:
        await asyncio.sleep(0.001)
        log.append("sleep")

    def answer(*funcs: Task) -> Callable[[], Response]:
        tasks = BackgroundTasks([*map(BackgroundTask, funcs)], concurrency=concurrency)
        return lambda: Response(background=tasks)

    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
    try:
        await serve(answering(answer(at_once)), mode)
        await serve(answering(answer(sleep, at_once)), mode)
        await serve(answering(answer(noting(log, "sync", sync=True), at_once)), mode)
    finally:
        loop.set_task_factory(None)
    assert Counter(log) == {"at once": 3, "sleep": 1, "sync": 1}
    assert records() == []


# --- context variables ---------------------------------------------------------------


KINDS: dict[str, Callable[[Task, Task], Any]] = {
    "async": lambda func, _: BackgroundTask(func),
    "sync": lambda _, func: BackgroundTask(func),
    "awaitable": lambda func, _: BackgroundTask(returning(func)),
    "concurrent": lambda func, _: BackgroundTasks(
        [BackgroundTask(func)], concurrency=2
    ),
    "concurrent sync": lambda _, func: BackgroundTasks(
        [BackgroundTask(func)], concurrency=2
    ),
    "nested": lambda func, _: BackgroundTasks([BackgroundTask(func)]),
    "own class": lambda func, _: OwnCall(func),
    "own class sync": lambda _, func: OwnCall(func),
}
# These hold no context of their own, and so they run in that of the request.
STOCK_KINDS: dict[str, Callable[[Task, Task], Any]] = {
    "stock": lambda func, _: starlette.background.BackgroundTask(func),
    "stock sync": lambda _, func: starlette.background.BackgroundTask(func),
    "bare": lambda func, _: func,
}


class OwnCall(BackgroundTask):
    async def __call__(self) -> None:
        await super().__call__()


@pytest.mark.parametrize("kind", KINDS)
async def test_tasks_run_in_the_context_that_they_were_added_in(
    kind: str, mode: Mode
) -> None:
    seen: list[str] = []

    def add(tasks: BackgroundTasks) -> None:
        funcs = [looking(seen, value="leaked", sync=sync) for sync in (False, True)]
        tasks.tasks.append(KINDS[kind](*funcs))

    def answer() -> Response:
        tasks = BackgroundTasks()
        for value in "one", "two":
            variable.set(value)
            add(tasks)
            add(tasks)
        variable.set("later")
        return Response(background=tasks)

    async with served(answering(answer), mode) as wrapped:
        await request(wrapped)
        assert variable.get() in ("", "later")
    assert seen == ["one", "one", "two", "two"]


@pytest.mark.parametrize("kind", [*KINDS, *STOCK_KINDS])
async def test_tasks_made_outside_any_request_run_in_its_context(
    kind: str, mode: Mode
) -> None:
    seen: list[str] = []
    make = (KINDS | STOCK_KINDS)[kind]
    funcs = [looking(seen, value="leaked", sync=sync) for sync in (False, True)]
    tasks = BackgroundTasks([make(*funcs), make(*funcs)])
    response = Response(background=tasks)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        variable.set(scope["path"])
        await response(scope, receive, send)
        # Where this has waited, nothing has come back.
        assert variable.get() == scope["path"]

    for path in "/a", "/b":
        async with served(app, mode) as wrapped:
            await request(wrapped, path)
    assert seen == ["/a", "/a", "/b", "/b"]


@supervised
async def test_tasks_that_wait_for_those_of_another_request_keep_their_own_context(
    mode: Mode,
) -> None:
    seen: list[str] = []
    held = Held()
    response = Response(background=BackgroundTask(looking(seen)))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        variable.set(scope["path"])
        if scope["path"] == "/first":
            add_task(held.func)
            await respond(send)
        else:
            await response(scope, receive, send)

    async with (
        served(app, mode, max_running=1) as wrapped,
        anyio.create_task_group() as group,
    ):
        group.start_soon(request, wrapped, "/first")
        await held.entered.wait()
        group.start_soon(request, wrapped, "/second")
        await anyio.wait_all_tasks_blocked()
        held.release()
    assert seen == ["/second"]


async def test_what_a_task_sets_does_not_leak_into_the_request(mode: Mode) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        variable.set("request")
        tasks = BackgroundTasks()
        for sync in False, True:
            tasks.add_task(looking([], value="leaked", sync=sync))
        await Response(background=tasks)(scope, receive, send)
        assert variable.get() == "request"

    await serve(app, mode)


async def test_what_a_task_adds_runs_in_the_tasks_context(mode: Mode) -> None:
    seen: list[str] = []

    def add() -> None:
        variable.set("task")
        add_task(looking(seen))

    def answer() -> Response:
        variable.set("request")
        return Response(background=BackgroundTask(add))

    await serve(answering(answer), mode)
    assert seen == ["task"]


async def test_cancel_scopes_and_task_groups_work_in_tasks(mode: Mode) -> None:
    log: list[str] = []

    async def child() -> None:
        await checkpoint()
        log.append(variable.get())

    async def task() -> None:
        with anyio.move_on_after(0) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        async with anyio.create_task_group() as group:
            group.start_soon(child)
        await anyio.to_thread.run_sync(log.append, "thread")
        log.append("end")

    def answer() -> Response:
        variable.set("request")
        return Response(background=BackgroundTask(task))

    await serve(answering(answer), mode)
    assert log == ["request", "thread", "end"]


# --- all kinds of tasks --------------------------------------------------------------


class Counting(BackgroundTask):
    """A task with a way of its own to run."""

    def __init__(self, log: list[str], func: Task) -> None:
        super().__init__(func)
        self.log = log

    async def __call__(self) -> None:
        self.log.append("begin")
        await super().__call__()
        self.log.append("end")


class CountingGroup(BackgroundTasks):
    def __init__(self, log: list[str], func: Task) -> None:
        super().__init__([BackgroundTask(func)])
        self.log = log

    async def __call__(self) -> None:
        self.log.append("begin")
        await super().__call__()
        self.log.append("end")


class Instead(BackgroundTask):
    """A task whose call is something else altogether."""

    async def __call__(self) -> None:
        await self.func()


class WithoutOurs(BackgroundTask):
    """A task whose constructor does not call ours."""

    def __init__(self, func: Task) -> None:
        self.func, self.args, self.kwargs, self.is_async = func, (), {}, True


class GroupWithoutOurs(BackgroundTasks):
    def __init__(self, func: Task) -> None:
        self.tasks = [BackgroundTask(func)]


class StockWithCall(starlette.background.BackgroundTask):
    async def __call__(self) -> None:
        await self.func(*self.args, **self.kwargs)


class StockGroupWithCall(starlette.background.BackgroundTasks):
    async def __call__(self) -> None:
        for task in self.tasks:
            await task()


def stock_group(func: Task) -> starlette.background.BackgroundTasks:
    tasks = starlette.background.BackgroundTasks()
    tasks.add_task(func)
    return tasks


def in_task(group: BackgroundTasks) -> BackgroundTask:
    return BackgroundTask(group.func)


# How an async function can be made a task.
ITEMS: dict[str, Callable[[Task], Any]] = {
    "task": BackgroundTask,
    "awaitable": returning_task,
    "partial": lambda func: BackgroundTask(functools.partial(func)),
    "group": lambda func: BackgroundTasks([BackgroundTask(func)]),
    "concurrent group": lambda func: BackgroundTasks(
        [BackgroundTask(func)], concurrency=2
    ),
    "group of groups": lambda func: BackgroundTasks(
        [BackgroundTasks(concurrency=3), BackgroundTasks([BackgroundTasks([func])])]
    ),
    "group in task": lambda func: in_task(BackgroundTasks([BackgroundTask(func)])),
    "stock": starlette.background.BackgroundTask,
    "stock group": stock_group,
    "ours in stock group": lambda func: starlette.background.BackgroundTasks(
        [BackgroundTask(func), BackgroundTasks()]
    ),
    "group in stock group": lambda func: starlette.background.BackgroundTasks(
        [BackgroundTasks([func])]
    ),
    "re-added": lambda func: stock_group(BackgroundTasks([func]).func),
    "own call": lambda func: Counting([], func),
    "own call of group": lambda func: CountingGroup([], func),
    "instead": Instead,
    "own constructor": WithoutOurs,
    "own constructor of group": GroupWithoutOurs,
    "stock with call": StockWithCall,
    "stock group with call": lambda func: StockGroupWithCall([BackgroundTask(func)]),
    "bare": lambda func: func,
    "bare partial": functools.partial,
    "bare group": lambda func: functools.partial(BackgroundTasks([func])),
}


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("kind", ITEMS)
@supervised
async def test_each_kind_of_task_runs_once_and_may_fail(
    kind: str, concurrency: int, mode: Mode, records: Records
) -> None:
    log: list[str] = []
    groups: list[BackgroundTasks] = []

    def answer() -> Response:
        tasks = BackgroundTasks(concurrency=concurrency)
        groups.append(tasks)
        tasks.add_task(noting(log, "first", sync=True))
        tasks.tasks.append(ITEMS[kind](noting(log, "second")))
        broken = ValueError("broken")
        tasks.tasks.append(ITEMS[kind](noting(log, "third", error=broken)))
        tasks.add_task(noting(log, "fourth", sync=True))
        return Response(background=tasks)

    await serve(answering(answer), mode)
    expected = ["first", "second", "third", "fourth"]
    assert (log if concurrency == 1 else sorted(log, key=expected.index)) == expected
    [record] = records()
    assert record.levelno == ERROR
    assert record.exc_info
    assert str(record.exc_info[1]) == "broken"
    assert str(groups[0].exception) == "broken"
    assert vars(record)["request_path"] == "/"


@pytest.mark.parametrize("kind", ITEMS)
async def test_each_kind_of_task_can_be_the_background_of_a_response(
    kind: str, mode: Mode
) -> None:
    log: list[str] = []
    watching = Watching([])

    def answer() -> Response:
        add_task(noting(log, "added"))
        return Response(background=ITEMS[kind](noting(log, "background")))

    await serve(answering(answer), mode, observers=[watching])
    assert log == ["background", "added"]
    # What Starlette runs itself is not seen.
    assert watching.count("+") == watching.count(">") == watching.count("<")
    assert watching.count("+")["added"] == 1


@pytest.mark.parametrize("make", [Counting, CountingGroup])
@pytest.mark.parametrize("where", ["response", "group", "our response"])
async def test_a_way_of_its_own_to_run_is_gone_once(
    make: Callable[[list[str], Task], BackgroundTask], where: str, mode: Mode
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []

    def answer() -> Response:
        task = make(log, noting(log, "task"))
        made.append(task)
        if where == "our response":
            return postlude.responses.Response(background=task)
        return Response(
            background=BackgroundTasks([task]) if where == "group" else task
        )

    await serve(answering(answer), mode)
    assert Counter(log) == {"begin": 1, "task": 1, "end": 1}
    assert log[0] == "begin"
    assert states(*made) == ["succeeded"]


@pytest.mark.parametrize("make", [Counting, CountingGroup])
async def test_what_has_its_own_way_to_run_may_fail(
    make: Callable[[list[str], Task], BackgroundTask], mode: Mode, records: Records
) -> None:
    log: list[str] = []

    def answer() -> Response:
        broken = noting(log, "task", error=ValueError("broken"))
        tasks = BackgroundTasks([make(log, broken)])
        tasks.add_task(noting(log, "next"))
        return Response(background=tasks)

    await serve(answering(answer), mode)
    assert log == ["begin", "task", "next"]
    assert len(records(ERROR)) == len(records()) == 1


async def test_a_stock_task_of_a_response_runs_as_starlette_runs_it(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        add_task(noting(log, "added"))
        task = starlette.background.BackgroundTask(
            noting(log, "stock", error=ValueError("stock"))
        )
        try:
            await Response(background=task)(scope, receive, send)
        finally:
            log.append("closed")

    async with served(app, mode) as wrapped:
        with pytest.raises(ValueError, match="stock"):
            await request(wrapped)
    assert log == ["stock", "closed", "added"]
    assert records() == []


async def test_a_group_in_a_stock_list_is_handed_over_when_its_turn_comes(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    def answer() -> Response:
        stock = starlette.background.BackgroundTasks()
        stock.add_task(noting(log, "stock"))
        group = failing(log)
        stock.add_task(group.func, *group.args, **group.kwargs)
        return Response(background=stock)

    await serve(answering(answer), mode)
    assert log == ["stock", "task"]
    assert len(records(ERROR)) == 1


async def test_a_group_with_concurrency_runs_so_many_at_once(mode: Mode) -> None:
    running = most = 0
    changed = anyio.Event()

    async def task() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            changed.set()
        await changed.wait()
        running -= 1

    def answer() -> Response:
        return Response(background=BackgroundTasks([task] * 7, concurrency=3))

    await serve(answering(answer), mode)
    assert most == 3


@both_kinds
async def test_a_running_group_can_be_added_to(mode: Mode, sync: bool) -> None:
    log: list[str] = []

    def answer() -> Response:
        tasks = BackgroundTasks()
        tasks.add_task(tasks.add_task, noting(log, "first", sync=sync))
        concurrent = BackgroundTasks(concurrency=2)
        concurrent.add_task(concurrent.add_task, noting(log, "second", sync=sync))
        return Response(background=BackgroundTasks([tasks, concurrent]))

    await serve(answering(answer), mode)
    assert log == ["first", "second"]


async def test_tasks_take_no_more_threads_than_they_are_allowed(mode: Mode) -> None:
    running = most = 0
    lock = threading.Lock()
    meeting = threading.Barrier(2)

    def task() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        # Two must be there at once, and a third would be seen.
        meeting.wait(10)
        with lock:
            running -= 1

    def answer() -> Response:
        tasks = BackgroundTasks([BackgroundTask(task)] * 4, concurrency=4)
        return Response(background=tasks)

    await serve(answering(answer), mode, threads=2)
    assert most == 2


async def test_consecutive_sync_tasks_share_a_thread(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is.
    monkeypatch.setattr(_tasks, "_TRIP_SECONDS", 60)
    trips = 0
    run_sync = anyio.to_thread.run_sync

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal trips
        trips += 1
        return await run_sync(*args, **kwargs)

    monkeypatch.setattr(anyio.to_thread, "run_sync", counted)
    log: list[str] = []

    def answer() -> Response:
        tasks = BackgroundTasks()
        for _ in range(10):
            tasks.add_task(noting(log, "task", sync=True))
        tasks.add_task(add_task, noting(log, "added", sync=True))
        return Response(background=tasks)

    await serve(answering(answer), mode)
    assert log == [*["task"] * 10, "added"]
    # What is added at the end of the job is in another list than the group's.
    assert trips == 2


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("ours", [False, True], ids=["starlette", "postlude"])
async def test_a_response_object_can_be_used_for_several_requests_at_once(
    ours: bool, concurrency: int, mode: Mode, records: Records
) -> None:
    log: list[str] = []
    arrived = 0
    all_there = anyio.Event()

    async def meet() -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 3:
            all_there.set()
        await all_there.wait()
        add_task(noting(log, "added"))

    module = postlude.responses if ours else starlette.responses
    tasks = BackgroundTasks(concurrency=concurrency)
    response = module.Response("hello", background=tasks)
    tasks.add_task(meet)
    tasks.add_task(noting(log, "sync", sync=True))
    broken = tasks.add_task(noting(log, "broken", error=ValueError()))

    async with (
        served(response, mode) as wrapped,
        anyio.create_task_group() as group,
    ):
        for _ in range(3):
            group.start_soon(request, wrapped)
    assert Counter(log) == {"sync": 3, "broken": 3, "added": 3}
    assert len(tasks.tasks) == 3
    assert states(tasks, broken) == ["failed", "failed"]
    assert len(records(ERROR)) == 3


# --- postlude's responses ------------------------------------------------------------


async def test_tasks_of_our_responses_are_handed_over(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    def answer() -> Response:
        add_task(noting(log, "added"))
        stock = starlette.background.BackgroundTask(noting(log, "stock"))
        response = postlude.responses.PlainTextResponse("hello", background=stock)
        response.add_task(noting(log, "failing", error=ValueError()))
        response.add_task(noting(log, "sync", sync=True))
        return response

    await serve(answering(answer), mode)
    assert log == ["stock", "failing", "sync", "added"]
    assert messages(records()) == ["background task 'failing' failed"]


@supervised
async def test_tasks_of_our_responses_run_if_the_last_send_is_cancelled(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []

    def answer() -> Response:
        add_task(noting(log, "added"))
        response = postlude.responses.Response("hello")
        response.add_task(noting(log, "background"))
        return response

    async def hanging_up(scope: Scope, receive: Receive, send: Send) -> None:
        async def hang(message: Message) -> None:
            await send(message)
            if is_last(message):
                cancelled.cancel()
                await anyio.sleep_forever()

        await wrapped(scope, receive, hang)

    async with served(answering(answer), mode) as wrapped:
        with anyio.CancelScope() as cancelled:
            await request(hanging_up)
        assert cancelled.cancelled_caught
    assert log == ["background", "added"]
    assert records() == []


async def test_when_the_body_fails_our_responses_leave_to_the_job_what_always_runs(
    mode: Mode, records: Records
) -> None:
    log: list[str] = []
    paths: list[str] = []

    async def body() -> AsyncIterator[bytes]:
        await checkpoint()
        yield b"1"
        raise LookupError

    def look() -> None:
        paths.extend(task.path for task in wrapped.tasks())
        add_task(noting(log, "from always"))

    def answer() -> Response:
        add_task(noting(log, "added"))
        response = postlude.responses.StreamingResponse(body())
        response.add_task(noting(log, "plain"))
        response.add_task(noting(log, "always", always=True))
        response.add_task(postlude.task(always=True, name="look")(look))
        return response

    async with served(answering(answer), mode) as wrapped:
        with pytest.raises(LookupError):
            await request(wrapped, "/stream")
    assert log == ["always", "from always"]
    assert paths == ["/stream"]
    assert records(ERROR) == records(WARNING) == []
    told = messages(records(INFO))
    assert told[0] == (
        "background tasks cut short by LookupError: 'plain' (not started), "
        "'always' (runs all the same), 'look' (runs all the same)"
    )
    assert len(told) == 2
    assert told[1].endswith(": 'added'")


async def test_our_responses_inside_tasks_run_their_tasks_there(mode: Mode) -> None:
    log: list[str] = []

    def break_off(message: Message) -> None:
        if is_last(message):
            raise OSError("the client has gone")

    async def inner() -> None:
        response = postlude.responses.Response()
        response.add_task(noting(log, "inner"))
        await request(response)
        response.add_task(noting(log, "always", always=True))
        with pytest.raises(OSError, match="gone"):
            await request(response, on_sent=break_off)
        log.append("went on")

    def answer() -> Response:
        return Response(background=BackgroundTask(inner))

    await serve(answering(answer), mode)
    # What a job gets to run comes after what is there already.
    assert log == ["inner", "went on", "always"]


# --- observers -----------------------------------------------------------------------


class Watching:
    """An observer that writes down what it sees."""

    def __init__(self, log: list[str], name: str = "") -> None:
        self.log = log
        self.name = name
        self.tasks: list[BackgroundTask] = []

    @contextmanager
    def __call__(self, task: BackgroundTask) -> Generator[None]:
        self.tasks.append(task)
        self.log.append(f"{self.name}> {task.name} {task.state}")
        try:
            yield
        except BaseException as exc:
            self.log.append(f"{self.name}! {task.name} {type(exc).__name__}")
            raise
        finally:
            self.log.append(f"{self.name}< {task.name}")

    def accepted(self, task: BackgroundTask) -> None:
        self.tasks.append(task)
        self.log.append(f"{self.name}+ {task.name} {task.state}")

    def count(self, what: str) -> Counter[str]:
        """Counts what was seen of a kind, by the name of the task."""
        prefix = f"{self.name}{what} "
        seen = (e.removeprefix(prefix) for e in self.log if e.startswith(prefix))
        return Counter(entry.split()[0] for entry in seen)


@both_kinds
async def test_observers_are_entered_around_each_task(mode: Mode, sync: bool) -> None:
    log: list[str] = []

    def answer() -> Response:
        add_task(noting(log, "two", sync=sync))
        return Response(background=BackgroundTask(noting(log, "one", sync=sync)))

    outer, inner = Watching(log, "a"), Watching(log, "b")
    await serve(answering(answer), mode, observers=[outer, inner])
    around = [
        [f"a> {n} running", f"b> {n} running", n, f"b< {n}", f"a< {n}"]
        for n in ("one", "two")
    ]
    accepted = [f"{o}+ {n} pending" for n in ("one", "two") for o in "ab"]
    assert log == [*accepted, *around[0], *around[1]]
    assert len(set(outer.tasks)) == 2


@both_kinds
async def test_observers_see_what_a_task_raises(
    mode: Mode, sync: bool, records: Records
) -> None:
    log: list[str] = []

    def answer() -> Response:
        error = ValueError()
        return Response(background=BackgroundTask(raising(error, sync=sync)))

    await serve(answering(answer), mode, observers=[Watching(log)])
    assert log[2:] == ["! raising ValueError", "< raising"]
    assert len(records()) == 1


async def test_observers_are_around_what_a_sync_callable_returns_too(
    mode: Mode,
) -> None:
    log: list[str] = []

    def answer() -> Response:
        func = noting(log, "inner", error=ValueError())
        return Response(
            background=BackgroundTask(postlude.task(name="outer")(returning(func)))
        )

    await serve(answering(answer), mode, observers=[Watching(log)])
    assert log == [
        *["+ outer pending", "> outer running", "inner"],
        *["! outer ValueError", "< outer"],
    ]


@both_kinds
async def test_observers_are_entered_in_the_tasks_context_and_thread(
    mode: Mode, sync: bool
) -> None:
    seen: list[tuple[str, str, bool]] = []

    @contextmanager
    def observe(task: BackgroundTask) -> Generator[None]:
        thread = threading.get_ident()
        before = variable.get()
        token = variable.set(f"{before} observed")
        yield
        variable.reset(token)
        seen.append((before, variable.get(), thread == threading.get_ident()))

    inside: list[tuple[str, bool]] = []
    here = threading.get_ident()

    def look() -> None:
        inside.append((variable.get(), threading.get_ident() == here))

    async def alook() -> None:
        await checkpoint()
        look()

    def answer() -> Response:
        tasks = BackgroundTasks()
        for value in "one", "two":
            variable.set(value)
            tasks.add_task(look if sync else alook)
        return Response(background=tasks)

    await serve(answering(answer), mode, observers=[observe])
    assert inside == [("one observed", not sync), ("two observed", not sync)]
    assert seen == [("one", "one", True), ("two", "two", True)]


@pytest.mark.parametrize("kind", ITEMS)
@supervised
async def test_observers_see_each_kind_of_task_once(kind: str, mode: Mode) -> None:
    log: list[str] = []

    def answer() -> Response:
        func = noting(log, "done")
        return Response(background=BackgroundTasks([ITEMS[kind](func)]))

    watching = Watching(log)
    await serve(answering(answer), mode, observers=[watching])
    accepted, entered = watching.count("+"), watching.count(">")
    assert accepted == entered == watching.count("<")
    assert entered.total() == 1
    # What was accepted is what is entered, whatever stands for it.
    assert len(set(map(id, watching.tasks))) == 1
    assert len({task.id for task in watching.tasks}) == 1


async def test_observers_are_told_of_each_accepted_task_once(mode: Mode) -> None:
    log: list[str] = []
    watching = Watching(log)

    def add_more(tasks: BackgroundTasks) -> None:
        tasks.add_task(noting(log, "grown", sync=True))
        add_task(noting(log, "later"))

    def answer() -> Response:
        tasks = BackgroundTasks()
        tasks.add_task(noting(log, "one"))
        tasks.tasks.append(BackgroundTasks([noting(log, "two")], concurrency=2))
        tasks.tasks.append(starlette.background.BackgroundTask(noting(log, "three")))
        tasks.add_task(add_more, tasks)
        add_task(noting(log, "added"))
        return Response(background=tasks)

    await serve(answering(answer), mode, observers=[watching])
    names = ["one", "two", "three", "grown", "added", "later"]
    accepted = watching.count("+")
    assert {name: accepted[name] for name in names} == dict.fromkeys(names, 1)
    assert watching.count("+") == watching.count(">") == watching.count("<")


async def test_observers_are_told_of_a_task_when_it_is_accepted(mode: Mode) -> None:
    log: list[str] = []
    watching = Watching(log)

    async def adding() -> None:
        add_task(noting(log, "later"))
        # Accepted, not started: a context manager would not see it.
        assert watching.count("+")["later"] == 1

    made: list[BackgroundTask] = []

    def answer() -> Response:
        made.append(BackgroundTask(adding))
        return Response(background=made[0])

    await serve(answering(answer), mode, observers=[watching])
    assert made[0].exception is None


@only("waiting without lifespan", "detached without lifespan")
async def test_observers_are_told_once_of_a_task_that_runs_all_the_same(
    mode: Mode,
) -> None:
    log: list[str] = []
    watching = Watching(log)
    held = Held()

    def answer() -> Response:
        add_task(held.func)
        add_task(noting(log, "always", always=True))
        return Response()

    async with (
        served(answering(answer), mode, observers=[watching]) as wrapped,
        anyio.create_task_group() as group,
    ):
        group.start_soon(request, wrapped)
        await held.entered.wait()
        group.cancel_scope.cancel()
    assert watching.count("+")["always"] == watching.count("<")["always"] == 1


async def test_observers_are_told_of_each_run_of_a_task(mode: Mode) -> None:
    log: list[str] = []
    watching = Watching(log)
    response = Response(background=BackgroundTask(noting(log, "task")))
    async with served(response, mode, observers=[watching]) as wrapped:
        for _ in range(3):
            await request(wrapped)
    assert watching.count("+") == watching.count(">") == {"task": 3}


async def test_observers_are_not_told_of_tasks_that_do_not_run(mode: Mode) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        add_task(noting(log, "task"))
        await respond(send, 500)

    await serve(app, mode, observers=[Watching(log)])
    assert log == []


class Failing:
    """An observer that fails at one point, and does not take part in the rest."""

    def __init__(self, at: str, error: BaseException) -> None:
        self.at = at
        self.error = error

    def _fail(self, at: str) -> None:
        if at == self.at:
            raise self.error

    def __call__(self, task: BackgroundTask) -> Any:
        self._fail("call")
        return None if self.at == "nothing" else self

    def __enter__(self) -> None:
        self._fail("enter")

    def __exit__(self, *_: object) -> None:
        self._fail("exit")

    def accepted(self, task: BackgroundTask) -> None:
        self._fail("accepted")


@pytest.mark.parametrize("error", [LookupError("observer"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("at", ["call", "enter", "exit", "accepted", "nothing"])
@both_kinds
async def test_a_failing_observer_changes_nothing(
    at: str, sync: bool, error: BaseException, mode: Mode, records: Records
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []
    failing = Failing(at, error)
    watching = Watching(log)

    def answer() -> Response:
        tasks = BackgroundTasks()
        made.append(tasks.add_task(noting(log, "one", sync=sync)))
        broken = noting(log, "two", error=ValueError(), sync=sync)
        made.append(tasks.add_task(broken))
        return Response(background=tasks)

    observers = [failing, watching]
    await serve(answering(answer), mode, observers=observers)
    assert states(*made) == ["succeeded", "failed"]
    assert watching.count("<") == {"one": 1, "two": 1}
    told = Counter(messages(records()))
    assert told == {
        "background task 'two' failed": 1,
        f"observer {failing!r} failed for background task 'one'": 1,
        f"observer {failing!r} failed for background task 'two'": 1,
    }
    assert {record.levelno for record in records()} == {ERROR}


@both_kinds
async def test_an_observer_that_raises_what_the_task_has_raised_changes_nothing(
    mode: Mode, sync: bool, records: Records
) -> None:
    class Raising(Failing):
        def __exit__(self, *exc: object) -> None:
            if isinstance(exc[1], ValueError):
                raise exc[1]

    def answer() -> Response:
        return Response(background=BackgroundTask(raising(ValueError(), sync=sync)))

    observers = [Raising("never", LookupError())]
    await serve(answering(answer), mode, observers=observers)
    assert messages(records()) == ["background task 'raising' failed"]


@both_kinds
async def test_an_observer_that_swallows_changes_nothing(
    mode: Mode, sync: bool, records: Records
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []

    @contextmanager
    def swallow(task: BackgroundTask) -> Generator[None]:
        try:
            yield
        except ValueError:
            log.append("swallowed")

    def answer() -> Response:
        tasks = BackgroundTasks()
        made.append(tasks.add_task(raising(ValueError(), sync=sync)))
        made.append(tasks.add_task(noting(log, "next", sync=sync)))
        return Response(background=tasks)

    observers = [Watching(log), swallow]
    await serve(answering(answer), mode, observers=observers)
    assert states(*made) == ["failed", "succeeded"]
    assert log.index("swallowed") < log.index("! raising ValueError")
    assert len(records(ERROR)) == len(records()) == 1


@pytest.mark.parametrize("at", ["exit", "accepted"])
def test_ctrl_c_in_an_observer_leaves(
    at: str, anyio_backend: Backend, mode: Mode
) -> None:
    def answer() -> Response:
        return Response(background=BackgroundTask(noting([], "task")))

    async def main() -> None:
        observers = [Failing(at, KeyboardInterrupt())]
        async with served(answering(answer), mode, observers=observers) as wrapped:
            await request(wrapped)

    run_until_interrupt(anyio_backend, main)


async def test_a_plain_function_that_returns_a_context_manager_is_an_observer(
    mode: Mode,
) -> None:
    log: list[str] = []

    def observe(task: BackgroundTask) -> AbstractContextManager[object]:
        return Watching(log)(task)

    def answer() -> Response:
        return Response(background=BackgroundTask(noting(log, "task")))

    # Any iterable will do.
    async with served(answering(answer), mode, observers=iter([observe])) as wrapped:
        await request(wrapped)
        await request(wrapped)
    assert log == ["> task running", "task", "< task"] * 2


# --- handles -------------------------------------------------------------------------


async def test_handles_tell_where_their_tasks_stand(mode: Mode) -> None:
    seen: list[list[str]] = []
    tasks = BackgroundTasks()

    def look() -> None:
        assert tasks.finished_at is None
        seen.append(states(tasks, *handles))

    async def alook() -> None:
        await checkpoint()
        look()

    handles = [
        tasks.add_task(alook),
        tasks.add_task(raising(ValueError(), sync=False)),
        tasks.add_task(look),
        tasks.add_task(raising(ValueError(), sync=True)),
    ]
    seen.append(states(tasks, *handles))
    await serve(Response(background=tasks), mode)
    seen.append(states(tasks, *handles))
    assert seen == [
        ["pending"] * 5,
        ["running", "running", "pending", "pending", "pending"],
        ["running", "succeeded", "failed", "running", "pending"],
        ["failed", "succeeded", "failed", "succeeded", "failed"],
    ]
    assert isinstance(tasks.exception, ExceptionGroup)
    assert [type(task.exception) for task in handles] == [
        *[type(None), ValueError, type(None), ValueError]
    ]


@both_kinds
async def test_handles_tell_when_their_tasks_ran(mode: Mode, sync: bool) -> None:
    groups: list[BackgroundTasks] = []
    made: list[BackgroundTask] = []
    held = Held(sync=sync)

    def answer() -> Response:
        tasks = BackgroundTasks()
        groups.append(tasks)
        made.append(tasks.add_task(print, end=""))
        made.append(tasks.add_task(held.func))
        made.append(add_task(raising(ValueError(), sync=sync)))
        assert [task.started_at for task in made] == [None] * 3
        return Response(background=tasks)

    async with (
        served(answering(answer), mode) as wrapped,
        anyio.create_task_group() as group,
    ):
        group.start_soon(request, wrapped)
        await held.entered.wait()
        assert made[1].started_at
        assert made[1].finished_at is None
        held.release()
    times = [(task.started_at, task.finished_at) for task in made]
    assert all(
        start and end and earlier <= start <= end
        for (start, end), earlier in zip(
            times, [made[0].started_at, times[0][1], times[1][1]], strict=True
        )
        if earlier
    )
    assert groups[0].started_at == made[0].started_at
    assert groups[0].finished_at == made[1].finished_at


async def test_a_group_that_succeeds_says_so(mode: Mode) -> None:
    groups: list[BackgroundTasks] = []

    def answer() -> Response:
        inner = BackgroundTasks([BackgroundTask(print, end="")], concurrency=2)
        groups.extend([inner, BackgroundTasks([inner]), BackgroundTasks()])
        add_task(groups[2])
        return Response(background=groups[1])

    await serve(answering(answer), mode)
    assert states(*groups) == ["succeeded"] * 3
    assert [group.exception for group in groups] == [None] * 3


@pytest.mark.parametrize("fails", [False, True])
async def test_the_handle_of_an_added_group_tells_how_that_has_ended(
    fails: bool, mode: Mode
) -> None:
    log: list[str] = []
    made: list[BackgroundTask] = []

    def answer() -> Response:
        error = ValueError() if fails else None
        group = BackgroundTasks([BackgroundTask(noting(log, "task", error=error))])
        made.append(add_task(group))
        return Response()

    await serve(answering(answer), mode)
    assert log == ["task"]
    assert states(*made) == ["failed" if fails else "succeeded"]
    assert isinstance(made[0].exception, ValueError) is fails
    assert made[0].started_at


# --- scopes --------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True])
async def test_the_scope_is_left_as_it_was(raises: bool, mode: Mode) -> None:
    scopes: list[tuple[Scope, int]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append((scope, len(scope)))
        if raises:
            raise LookupError
        await respond(send)

    async with served(app, mode) as wrapped:
        if raises:
            with pytest.raises(LookupError):
                await request(wrapped)
        else:
            await request(wrapped)
    [(scope, size)] = scopes
    assert len(scope) == size - 1
    assert "postlude" not in scope


def test_a_request_that_nobody_awaits_any_more_can_be_closed() -> None:
    log: list[str] = []

    @types.coroutine
    def suspend() -> Generator[None]:
        yield

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await suspend()
        finally:
            log.append("closed")

    async def receive() -> Message:
        raise NotImplementedError

    async def send(message: Message) -> None:
        raise NotImplementedError

    scope = {"type": "http", "path": "/"}
    running: Any = BackgroundTasksMiddleware(app)(scope, receive, send)
    # As the garbage collector does: in whatever context there is.
    contextvars.copy_context().run(running.send, None)
    running.close()
    assert log == ["closed"]
    assert scope == {"type": "http", "path": "/"}


async def test_other_scopes_are_passed_on_untouched() -> None:
    calls: list[tuple[Any, ...]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append((scope, dict(scope), receive, send))
        with pytest.raises(RuntimeError, match="needs a request"):
            add_task(print)
        await checkpoint()

    async def receive() -> Message:
        raise NotImplementedError

    async def send(message: Message) -> None:
        raise NotImplementedError

    scope = {"type": "telegraph"}
    await BackgroundTasksMiddleware(app)(scope, receive, send)
    [(passed, content, *rest)] = calls
    assert passed is scope
    assert content == {"type": "telegraph"}
    assert rest == [receive, send]


@pytest.mark.parametrize("detach", [False, True])
async def test_of_two_around_each_other_the_outer_one_does_the_work(
    detach: bool, mode: Mode
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert BackgroundTasksMiddleware.current() is outer
        add_task(noting(log, "added"))
        task = BackgroundTask(noting(log, "background"))
        await Response(background=task)(scope, receive, send)
        await checkpoint()
        log.append("closed")

    inner = BackgroundTasksMiddleware(app, detach=detach, observers=[Watching(log)])
    async with served(inner, mode) as outer:
        await request(outer)
    tasks = ["background", "added"]
    assert log == (["closed", *tasks] if mode.detach else [*tasks, "closed"])


@pytest.mark.parametrize("how", ["option", "add_middleware"])
async def test_it_can_be_installed_as_starlettes_middleware(
    how: str, mode: Mode
) -> None:
    log: list[str] = []

    async def endpoint(request: Request) -> Response:
        add_task(noting(log, "added"))
        return Response(background=failing(log))

    routes = [Route("/", endpoint)]
    if how == "option":
        middleware = [Middleware(BackgroundTasksMiddleware, detach=mode.detach)]
        app = Starlette(routes=routes, middleware=middleware)
    else:
        app = Starlette(routes=routes)
        app.add_middleware(BackgroundTasksMiddleware, detach=mode.detach)
    if mode.lifespan:
        async with alive(app):
            await request(app)
    else:
        await request(app)
    assert log == ["task", "added"]


async def test_inside_server_error_middleware_an_unhandled_error_is_no_response(
    mode: Mode, records: Records
) -> None:
    adding = Adding()

    async def endpoint(request: Request) -> Response:
        adding.add()
        raise LookupError

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(BackgroundTasksMiddleware, detach=mode.detach)

    async def go() -> None:
        with pytest.raises(LookupError):
            await request(app)

    if mode.lifespan:
        async with alive(app):
            await go()
    else:
        await go()
    assert adding.has_told("there was no response", records)


async def test_a_mounted_application_may_have_one_of_its_own(mode: Mode) -> None:
    log: list[str] = []

    async def endpoint(request: Request) -> Response:
        add_task(noting(log, "added"))
        return Response(background=BackgroundTask(noting(log, "background")))

    sub = BackgroundTasksMiddleware(
        Starlette(routes=[Route("/", endpoint)]), detach=mode.detach
    )
    app = Starlette(routes=[Mount("/sub", sub), Route("/", pass_on_to(sub))])
    # Nobody passes it lifespan.
    async with alive(app):
        sent = await request(app, "/sub/")
        assert sent[0]["status"] == 200
        assert log == ["background", "added"]
    async with served(app, mode) as wrapped:
        await request(wrapped, "/sub/")
    assert log == ["background", "added"] * 2


def pass_on_to(app: ASGIApp) -> Any:
    async def endpoint(request: Request) -> Response:
        raise AssertionError

    return endpoint


@pytest.mark.parametrize("has_lifespan", [False, True])
async def test_another_application_that_is_called_in_a_request_minds_its_own_tasks(
    has_lifespan: bool, mode: Mode
) -> None:
    log: list[str] = []

    def answer_inside() -> Response:
        assert BackgroundTasksMiddleware.current() is inside
        add_task(noting(log, "added inside"))
        return Response(background=BackgroundTask(noting(log, "inside")))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        add_task(noting(log, "added"))
        # As a client does that calls an application without a network.
        await request(inside)
        assert BackgroundTasksMiddleware.current() is outside
        assert log == ["inside", "added inside"]
        log.append("called")
        task = BackgroundTask(noting(log, "background"))
        await Response(background=task)(scope, receive, send)

    inner_mode = Mode(detach=False, lifespan=has_lifespan)
    async with (
        served(answering(answer_inside), inner_mode) as inside,
        served(app, mode) as outside,
    ):
        await request(outside)
    assert log == ["inside", "added inside", "called", "background", "added"]


async def test_a_task_may_call_the_application_itself(mode: Mode) -> None:
    log: list[str] = []

    async def call() -> None:
        await request(wrapped, "/inside")
        log.append("called")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        func = call if scope["path"] == "/" else noting(log, "inside")
        await Response(background=BackgroundTask(func))(scope, receive, send)

    async with served(app, mode) as wrapped:
        await request(wrapped)
    assert sorted(log) == ["called", "inside"]


async def test_a_response_of_an_application_without_one_runs_its_tasks_in_its_call(
    mode: Mode,
) -> None:
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inside = answering(lambda: Response(background=failing(log)))
        with pytest.raises(ValueError, match="broken"):
            await request(inside)
        await respond(send)

    await serve(app, mode)
    assert log == ["task"]


# --- properties ----------------------------------------------------------------------


class Leaf(NamedTuple):
    kind: str
    fails: bool
    adds: int


class Branch(NamedTuple):
    kind: str
    concurrency: int
    children: list[Any]


leaves = st.builds(
    Leaf,
    kind=st.sampled_from(["sync", "async", "returns", "stock", "bare", "own call"]),
    fails=st.booleans(),
    adds=st.integers(0, 2),
)


def branches(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Branch]:
    return st.builds(
        Branch,
        kind=st.sampled_from(["group", "stock group"]),
        concurrency=st.integers(1, 3),
        children=st.lists(children, max_size=4),
    )


trees = leaves | branches(leaves | branches(leaves | branches(leaves)))


class Plan:
    """Makes tasks of a plan, and knows what is to come of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failing: list[str] = []
        self.added: list[str] = []
        self.orders: list[list[list[str]]] = []
        self._count = 0

    def _leaf(self, leaf: Leaf, name: str) -> Any:
        if leaf.fails:
            self.failing.append(name)

        def act() -> None:
            self.log.append(name)
            for _ in range(leaf.adds):
                self.added.append(f"{name}+")
                add_task(noting(self.log, f"{name}+", error=ValueError()))
            if leaf.fails:
                raise ValueError(name)

        async def aact() -> None:
            await checkpoint()
            act()

        declared: Task = postlude.task(name=name)(aact)
        returns: Task = postlude.task(name=name)(returning(aact))
        items: dict[str, Callable[[], Any]] = {
            "sync": lambda: BackgroundTask(postlude.task(name=name)(act)),
            "async": lambda: BackgroundTask(declared),
            "returns": lambda: BackgroundTask(returns),
            "stock": lambda: starlette.background.BackgroundTask(declared),
            "bare": lambda: declared,
            "own call": lambda: OwnCall(declared),
        }
        return items[leaf.kind]()

    def make(self, tree: Leaf | Branch) -> tuple[Any, list[str]]:
        """Returns what the tree stands for, and the names of all tasks in it."""
        if isinstance(tree, Leaf):
            self._count += 1
            name = str(self._count)
            return self._leaf(tree, name), [name]
        made = [self.make(child) for child in tree.children]
        items, names = [item for item, _ in made], [names for _, names in made]
        if tree.kind == "stock group" or tree.concurrency == 1:
            self.orders.append(names)
        group: Any
        if tree.kind == "stock group":
            group = starlette.background.BackgroundTasks(items)
        else:
            group = BackgroundTasks(items, concurrency=tree.concurrency)
        return group, [name for part in names for name in part]

    def check_order(self) -> None:
        for order in self.orders:
            turns = [[self.log.index(name) for name in names] for names in order]
            turns = [turn for turn in turns if turn]
            for turn, following in itertools.pairwise(turns):
                assert max(turn) < min(following)


# A fixture would be one for all examples.
@only_on(*BACKENDS)
@pytest.mark.parametrize("name", MODES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(background=st.lists(trees, max_size=4), added=st.lists(leaves, max_size=2))
def test_any_mixture_of_tasks_runs_once_in_order_and_fails_alone(
    name: str,
    anyio_backend: Backend,
    background: list[Leaf | Branch],
    added: list[Leaf],
) -> None:
    plan = Plan()
    names: list[str] = []
    told: list[str] = []

    def answer() -> Response:
        group, in_group = plan.make(Branch("group", 1, background))
        names.extend(in_group)
        orders = [in_group]
        for leaf in added:
            item, in_leaf = plan.make(leaf._replace(kind="async"))
            add_task(item.func)
            names.extend(in_leaf)
            orders.append(in_leaf)
        plan.orders.append(orders)
        return Response(background=group)

    async def main() -> None:
        async with served(answering(answer), MODES[name]) as wrapped:
            await request(wrapped)

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno > INFO:
                told.append(vars(record)["task_name"])

    logger = logging.getLogger("postlude")
    handler = Listening()
    logger.addHandler(handler)
    try:
        run(anyio_backend, main)
    finally:
        logger.removeHandler(handler)
    assert Counter(plan.log) == Counter(names + plan.added)
    assert Counter(told) == Counter(plan.failing + plan.added)
    plan.check_order()
    # What tasks add comes last, in the order added.
    assert plan.log[len(names) :] == plan.added
