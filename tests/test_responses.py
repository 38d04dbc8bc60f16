"""Starlette's responses with `add_task()`, beside Starlette's own."""

import ast
import asyncio
import contextvars
import functools
import inspect
import logging
import re
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import pytest
import starlette.background
import starlette.responses
import trio
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Message
from starlette.websockets import WebSocket

import postlude
import postlude.responses
from postlude import BackgroundTask, BackgroundTasks, TaskState
from postlude.responses import FileResponse, Response, StreamingResponse

pytestmark = pytest.mark.anyio

Told = Callable[[], list[str]]
Cancelled = Callable[["Server", Response], Awaitable[None]]

STOCK = SimpleNamespace(**vars(starlette.responses) | vars(starlette.background))
OURS = SimpleNamespace(**vars(postlude.responses) | vars(postlude))
NOT_RUN = "INFO background tasks cut short: "
ALWAYS_RUN = "'always' (runs all the same), 'list.append' (runs all the same)"


class Server:
    """What a server is to a response: it records what is sent, and may break it off.

    The log has `start`, `part` for a piece of the body, `end` for the last one, and
    what the tasks write into it.
    """

    def __init__(
        self,
        *,
        spec: str = "2.4",
        ranges: str = "",
        hangs: str = "",
        breaks: dict[str, type[BaseException]] | None = None,
        **scope: Any,
    ) -> None:
        self.scope = {
            "type": "http",
            "method": "GET",
            "headers": [(b"range", ranges.encode())] if ranges else [],
            "asgi": {"version": "3.0", "spec_version": spec},
            **scope,
        }
        self.messages: list[Message] = []
        self.log: list[str] = []
        self.raised: BaseException | None = None
        self.disconnected, self.hung, self.resumed = (anyio.Event() for _ in range(3))
        self._hangs = hangs
        self._breaks = breaks or {}

    async def answer(self, response: starlette.responses.Response) -> None:
        try:
            await response(self.scope, self.receive, self._send)
        except BaseException as exc:
            self.raised = exc
            raise

    async def hang(self) -> None:
        self.hung.set()
        await self.resumed.wait()

    async def receive(self) -> Message:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await checkpoint()
        self.messages.append(message)
        if message["type"].endswith("start"):
            event = "start"
        else:
            event = "part" if message.get("more_body") else "end"
        self.log.append(event)
        if event in self._breaks:
            raise self._breaks[event]
        if event == self._hangs:
            await self.hang()


class Body:
    """An async body, from the start each time; an exception in it is raised."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._rest = iter(self._chunks)
        return self

    async def __anext__(self) -> bytes:
        await checkpoint()
        chunk = next(self._rest, StopAsyncIteration())
        if isinstance(chunk, bytes):
            return chunk
        raise chunk


class FailingBody:
    def __iter__(self) -> Iterator[bytes]:
        yield b"1"
        raise KeyError


CONTENT: dict[str, Any] = {
    "Response": b"hello",
    "HTMLResponse": "<p>hello",
    "PlainTextResponse": "hellö",
    "JSONResponse": {"hellö": [1, None]},
    "RedirectResponse": "/hello world",
    "StreamingResponse": Body(b"hel", b"lo"),
    "FileResponse": __file__,
}
drop_in = pytest.mark.parametrize(
    "library", [STOCK, OURS], ids=["starlette", "postlude"]
)
every_class = pytest.mark.parametrize("name", CONTENT)


def make(library: Any, name: str, **kwargs: Any) -> Any:
    return getattr(library, name)(CONTENT[name], **kwargs)


def note(
    log: list[str], name: str, *, always: bool = False
) -> Callable[[], Awaitable[None]]:
    """Makes a task that writes its name once it has been awaited to its end."""

    @postlude.task(name=name, always=always)
    async def call() -> None:
        await checkpoint()
        log.append(name)

    return call


def mixed(log: list[str]) -> BackgroundTasks:
    """Makes a group of two that always run, one of them sync, around one that may."""
    tasks = BackgroundTasks([BackgroundTask(note(log, "always", always=True))])
    tasks.add_task(note(log, "plain"))
    tasks.add_task(
        postlude.task(always=True)(functools.partial(log.append, "always sync"))
    )
    return tasks


def backgrounds(log: list[str]) -> dict[str, Any]:
    call = note(log, "first")
    stock = starlette.background.BackgroundTask(call)
    return {
        "none": None,
        "task": BackgroundTask(call),
        "group": BackgroundTasks([BackgroundTask(call)]),
        "stock task": stock,
        "stock group": starlette.background.BackgroundTasks([stock]),
        "async callable": call,
    }


def tasks_in(log: list[str]) -> list[str]:
    return [entry for entry in log if entry not in ("start", "part", "end")]


def raising(error: type[Exception] | None) -> Any:
    return pytest.raises(error) if error else nullcontext()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """Returns what postlude has logged by then, but not what was to blame."""
    caplog.set_level(logging.INFO, logger="postlude")
    return lambda: [
        re.sub(" by [^:]*:", ":", f"{record.levelname} {record.getMessage()}")
        for record in caplog.records
        if record.name == "postlude"
    ]


@pytest.fixture(params=["anyio", "native"])
def cancelled(request: pytest.FixtureRequest, anyio_backend_name: str) -> Cancelled:
    """Cancels a request from outside while the server, or a task, hangs."""

    native = request.param == "native"
    open_group: Any = trio.open_nursery if native else anyio.create_task_group

    async def cancel(server: Server, response: Response) -> None:
        with anyio.fail_after(5):
            if native and anyio_backend_name == "asyncio":
                task = asyncio.ensure_future(server.answer(response))
                await server.hung.wait()
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            else:
                async with open_group() as group:
                    group.start_soon(server.answer, response)
                    await server.hung.wait()
                    group.cancel_scope.cancel()
        assert type(server.raised) is anyio.get_cancelled_exc_class()

    return cancel


# --- the mirror ----------------------------------------------------------------------


def test_every_public_name_that_starlettes_module_defines_is_there() -> None:
    defined: set[str] = set()
    for node in ast.parse(inspect.getsource(starlette.responses)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {ast.unparse(target) for target in node.targets}
    public = {name for name in defined if not name.startswith("_")}
    assert public == set(postlude.responses.__all__)
    assert public.issuperset(CONTENT)
    for name in public - set(CONTENT):
        assert getattr(OURS, name) is getattr(STOCK, name)


@every_class
def test_a_class_is_starlettes_too_and_stands_where_it_stands_there(name: str) -> None:
    ours, stock = getattr(OURS, name), getattr(STOCK, name)
    assert ours is not stock
    assert issubclass(ours, stock)
    assert inspect.signature(ours) == inspect.signature(stock)
    for other in CONTENT:
        relation = issubclass(stock, getattr(STOCK, other))
        assert issubclass(ours, getattr(OURS, other)) is relation


SCENES: dict[str, dict[str, Any]] = {
    "200": {},
    "204": {"status": 204},
    "304": {"status": 304},
    "HEAD of 304": {"status": 304, "method": "HEAD"},
    "HEAD": {"method": "HEAD"},
    "spec 2.3": {"spec": "2.3"},
    "pathsend": {"extensions": {"http.response.pathsend": {}}},
    "range": {"ranges": "bytes=2-5"},
    "ranges": {"ranges": "bytes=0-1,4-5"},
    "HEAD of ranges": {"ranges": "bytes=0-1,4-5", "method": "HEAD"},
    "websocket": {"type": "websocket", "status": 403},
}


@pytest.mark.parametrize(
    ("name", "scene"),
    [
        (name, scene)
        for name in CONTENT
        for scene in SCENES
        # Some scenes are for files alone; older Starlettes deny no WebSocket with one.
        if (name == "FileResponse" or "range" not in scene)
        and (name, scene) != ("FileResponse", "websocket")
    ],
)
async def test_the_messages_are_starlettes_and_then_the_background_runs(
    name: str, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starlette.responses, "token_hex", "boundary".ljust)
    scope = dict(SCENES[scene])
    status = scope.pop("status", 200)
    sent: list[list[Message]] = []
    for library in (STOCK, OURS):
        server = Server(**scope)
        task = library.BackgroundTask(note(server.log, "task"))
        response = make(
            library, name, status_code=status, headers={"X-A": "ü"}, background=task
        )
        response.set_cookie("visits", "1", max_age=60, httponly=True)
        assert response.background is task
        await server.answer(response)
        assert server.log[-2:] == ["end", "task"]
        assert tasks_in(server.log) == ["task"]
        sent.append(server.messages)
    assert sent[0] == sent[1]
    assert sent[1][0]["status"] == (206 if "range" in scene else status)


@drop_in
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_stream_may_be_sync_or_async(
    library: Any, spec: str, kind: str
) -> None:
    server = Server(spec=spec)
    content: Any = Body(b"1", b"2") if kind == "async" else iter([b"1", b"2"])
    task = library.BackgroundTask(note(server.log, "task"))
    await server.answer(library.StreamingResponse(content, background=task))
    assert server.log == ["start", "part", "part", "end", "task"]


@drop_in
@pytest.mark.parametrize("name", ["StreamingResponse", "FileResponse"])
async def test_before_spec_2_4_tasks_run_though_the_client_has_left(
    library: Any, name: str
) -> None:
    server = Server(spec="2.3", hangs="part" if name == "StreamingResponse" else "end")
    task = library.BackgroundTask(note(server.log, "task"))
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(server.answer, make(library, name, background=task))
            await server.hung.wait()
            server.disconnected.set()
            await anyio.wait_all_tasks_blocked()
            # Older Starlettes send a file to its end all the same.
            server.resumed.set()
    assert tasks_in(server.log) == ["task"]


@drop_in
async def test_what_a_task_raises_leaves_as_it_is(library: Any, told: Told) -> None:
    error = KeyError("task")

    async def fail() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        await Server().answer(library.Response(background=library.BackgroundTask(fail)))
    assert raised.value is error
    assert told() == []


# --- add_task() ----------------------------------------------------------------------


@every_class
async def test_an_added_task_is_returned_and_runs_after_the_last_message(
    name: str,
) -> None:
    server = Server()
    response = make(OURS, name)
    task = response.add_task(note(server.log, "task"))
    assert type(task) is BackgroundTask
    assert task.state == "pending"
    await server.answer(response)
    assert server.log[-2:] == ["end", "task"]
    assert tasks_in(server.log) == ["task"]
    assert task.state == "succeeded"


@pytest.mark.parametrize("kind", backgrounds([]))
async def test_added_tasks_run_after_the_background_in_the_order_added(
    kind: str,
) -> None:
    server = Server()
    background = backgrounds(server.log)[kind]
    response = Response(background=background)
    assert response.background is background
    response.add_task(note(server.log, "second"))
    response.add_task(server.log.append, "third")
    assert (response.background is background) is (kind == "group")
    await server.answer(response)
    first = [] if kind == "none" else ["first"]
    assert server.log == ["start", "end", *first, "second", "third"]


@pytest.mark.parametrize("kind", ["none", "task", "group", "stock task"])
async def test_a_body_may_add_tasks(kind: str, told: Told) -> None:
    server = Server()

    async def body() -> AsyncIterator[bytes]:
        response.add_task(note(server.log, "second"))
        yield b""

    response = StreamingResponse(body(), background=backgrounds(server.log)[kind])
    await server.answer(response)
    assert tasks_in(server.log) == ["first", "second"][kind == "none" :]
    assert told() == []


@pytest.mark.parametrize("kind", ["none", "task", "group", "stock task"])
async def test_what_a_body_has_added_counts_when_it_breaks_off(
    kind: str, told: Told
) -> None:
    server = Server(breaks={"part": OSError})

    class Adding(Body):
        async def __anext__(self) -> bytes:
            response.add_task(note(server.log, "always", always=True))
            response.add_task(note(server.log, "last"))
            return b""

    response = StreamingResponse(Adding(), background=backgrounds(server.log)[kind])
    with pytest.raises(ClientDisconnect):
        await server.answer(response)
    assert tasks_in(server.log) == ["always"]
    named = ["'first' (not started)", "'last' (not started)"][kind == "none" :]
    named.append("'always' (runs all the same)")
    assert told() == [NOT_RUN + ", ".join(named)]


@pytest.mark.parametrize(
    ("func", "message"),
    [
        ("no function", "needs a callable, not 'no function'"),
        (FailingBody.__iter__, "is a generator function"),
        (make, "cannot be called with these arguments"),
    ],
    ids=["not callable", "generator", "arguments"],
)
def test_a_mistake_in_add_task_is_told_at_once(func: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Response().add_task(func)


# --- not sent whole ------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    content: Any
    server: dict[str, Any]
    error: type[Exception] | None = OSError

    def response(self, library: Any, background: object) -> Any:
        response = getattr(library, self.name)(self.content, background=background)
        response.chunk_size = 1000
        return response


FAILING = Body(b"1", KeyError())
LEFT = {"breaks": {"part": OSError}}
CASES = {
    "refused": Case("Response", b"", {"breaks": {"start": OSError}}),
    "refused at the end": Case("JSONResponse", {}, {"breaks": {"end": OSError}}),
    "left": Case("StreamingResponse", Body(b"1", b"2"), LEFT, ClientDisconnect),
    "left a file": Case("FileResponse", __file__, LEFT),
    "async": Case("StreamingResponse", FAILING, {}, KeyError),
    "async 2.3": Case("StreamingResponse", FAILING, {"spec": "2.3"}, KeyError),
    "sync": Case("StreamingResponse", FailingBody(), {}, KeyError),
    "sync 2.3": Case("StreamingResponse", FailingBody(), {"spec": "2.3"}, KeyError),
    "denial": Case("StreamingResponse", FAILING, {"type": "websocket"}, KeyError),
    "no file": Case("FileResponse", "/missing", {}, RuntimeError),
    "directory": Case("FileResponse", "/", {}, RuntimeError),
    **{
        ranges: Case("FileResponse", __file__, {"ranges": ranges}, None)
        for ranges in ["bytes=9999999-", "bytes=", "apples=1-2"]
    },
}
not_sent_whole = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@drop_in
@not_sent_whole
async def test_plain_tasks_do_not_run_after_what_was_not_sent_whole(
    library: Any, case: Case
) -> None:
    server = Server(**case.server)
    task = library.BackgroundTask(note(server.log, "task"))
    with raising(case.error):
        await server.answer(case.response(library, task))
    assert tasks_in(server.log) == []


@not_sent_whole
async def test_tasks_declared_always_run_all_the_same_and_the_others_are_named(
    case: Case, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(**case.server)
    response = case.response(OURS, mixed(server.log))
    last = response.add_task(note(server.log, "last"))
    with raising(case.error):
        await server.answer(response)
    assert tasks_in(server.log) == ["always", "always sync"]
    named = f"'plain' (not started), 'last' (not started), {ALWAYS_RUN}"
    assert told() == [NOT_RUN + named]
    by = "another response" if case.error is None else case.error.__name__
    assert f"cut short by {by}: " in caplog.text
    assert last.state is TaskState.CANCELLED


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_failures_of_always_tasks_are_logged_and_replace_nothing(
    spec: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(spec=spec)

    @postlude.task(name="failing", always=True)
    async def fail(error: Exception) -> None:
        raise error

    error, *failures = KeyError("body"), ValueError("one"), ValueError("two")
    response = StreamingResponse(Body(b"1", error))
    tasks = [response.add_task(fail, failure) for failure in failures]
    response.add_task(note(server.log, "always", always=True))
    with pytest.raises(KeyError) as raised:
        await server.answer(response)
    assert raised.value is error
    assert (error.args, error.__cause__) == (("body",), None)
    assert not hasattr(error, "__notes__")
    assert tasks_in(server.log) == ["always"]
    assert [task.exception for task in tasks] == failures
    records = [record for record in caplog.records if record.name == "postlude"]
    assert [record.levelname for record in records] == ["ERROR", "ERROR"]
    assert [record.exc_info and record.exc_info[1] for record in records] == failures


@pytest.mark.parametrize("name", ["Response", "StreamingResponse"])
async def test_after_ctrl_c_nothing_is_run(name: str, told: Told) -> None:
    server = Server(breaks={"end": KeyboardInterrupt})
    with pytest.raises(KeyboardInterrupt):
        await server.answer(make(OURS, name, background=mixed(server.log)))
    assert tasks_in(server.log) == []
    (record,) = told()
    assert record.startswith(f"{NOT_RUN}'always' (not started), 'plain' (not started)")


@types.coroutine
def pause() -> Generator[None, None, None]:
    yield


def test_closing_a_request_on_its_way_runs_nothing(told: Told) -> None:
    server = Server()

    async def send(message: Message) -> None:
        await pause()

    response = Response(background=mixed(server.log))
    call: Any = response(server.scope, server.receive, send)
    call.send(None)
    contextvars.copy_context().run(call.close)
    assert server.log == []
    (record,) = told()
    assert record.startswith(NOT_RUN)


@pytest.mark.parametrize(
    ("name", "spec", "where"),
    [
        ("Response", "2.4", "start"),
        ("Response", "2.4", "end"),
        ("StreamingResponse", "2.3", "part"),
        ("StreamingResponse", "2.3", "end"),
        ("StreamingResponse", "2.4", "part"),
        ("StreamingResponse", "2.4", "end"),
        ("FileResponse", "2.3", "end"),
        ("FileResponse", "2.4", "end"),
    ],
)
async def test_always_tasks_run_once_when_the_request_is_cancelled(
    name: str, spec: str, where: str, cancelled: Cancelled, told: Told
) -> None:
    server = Server(spec=spec, hangs=where)
    await cancelled(server, make(OURS, name, background=mixed(server.log)))
    assert tasks_in(server.log) == ["always", "always sync"]
    assert told() == [f"{NOT_RUN}'plain' (not started), {ALWAYS_RUN}"]


@pytest.mark.parametrize("name", ["Response", "StreamingResponse"])
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_always_tasks_run_once_when_the_tasks_are_cancelled(
    name: str, spec: str, cancelled: Cancelled, told: Told
) -> None:
    server = Server(spec=spec)
    response = make(OURS, name)
    response.add_task(note(server.log, "before", always=True))
    response.add_task(postlude.task(name="hanging")(functools.partial(server.hang)))
    response.background.tasks.append(mixed(server.log))
    await cancelled(server, response)
    assert tasks_in(server.log) == ["before", "always", "always sync"]
    (record,) = told()
    assert record == (
        "WARNING background tasks cut short: "
        f"'hanging' (stopped), 'plain' (not started), {ALWAYS_RUN}"
    )


async def test_always_tasks_run_though_the_last_send_returns_cancelled() -> None:
    server = Server()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            scope.cancel()

    with anyio.CancelScope() as scope:
        response = Response(background=mixed(server.log))
        await response(server.scope, server.receive, send)
    assert server.log == ["always", "always sync"]


# --- one response, several requests --------------------------------------------------


@drop_in
async def test_a_response_sent_again_runs_its_tasks_again(library: Any) -> None:
    log: list[str] = []
    response = library.Response(background=library.BackgroundTask(note(log, "task")))
    for times in (1, 2):
        await Server().answer(response)
        assert log == ["task"] * times


@drop_in
async def test_a_response_sent_twice_at_once_runs_its_tasks_twice(library: Any) -> None:
    log: list[str] = []
    tasks = library.BackgroundTasks([library.BackgroundTask(note(log, "task"))])
    response = library.Response(background=tasks)
    servers = [Server(hangs="end"), Server(hangs="end")]
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for server in servers:
                group.start_soon(server.answer, response)
                await server.hung.wait()
            assert log == []
            for server in servers:
                server.resumed.set()
    assert log == ["task", "task"]


async def test_of_two_requests_at_once_the_broken_one_runs_only_always_tasks(
    cancelled: Cancelled, told: Told
) -> None:
    log: list[str] = []
    response = Response(background=mixed(log))
    broken, fine = Server(hangs="end"), Server(hangs="end")
    async with anyio.create_task_group() as group:
        group.start_soon(fine.answer, response)
        await fine.hung.wait()
        await cancelled(broken, response)
        assert log == ["always", "always sync"]
        fine.resumed.set()
    assert log == ["always", "always sync", "always", "plain", "always sync"]
    assert told() == [f"{NOT_RUN}'plain' (not started), {ALWAYS_RUN}"]


@pytest.mark.parametrize("error", [None, KeyError])
async def test_what_a_body_runs_by_hand_is_not_taken_for_the_background(
    error: type[Exception] | None, told: Told
) -> None:
    server = Server()

    async def body() -> AsyncIterator[bytes]:
        yield b""
        await BackgroundTask(note(server.log, "by hand"))()
        other = BackgroundTask(note(server.log, "other"))
        await Server().answer(Response(background=other))
        if error is not None:
            raise error

    with raising(error):
        await server.answer(StreamingResponse(body(), background=mixed(server.log)))
    run = ["always", "always sync"] if error else ["always", "plain", "always sync"]
    assert tasks_in(server.log) == ["by hand", "other", *run]
    assert told() == [f"{NOT_RUN}'plain' (not started), {ALWAYS_RUN}"] * (
        error is not None
    )


# --- backgrounds that run in a way of their own --------------------------------------


def own(library: Any, kind: str, log: list[str], calls_super: bool) -> Any:
    """Makes a task, or a group of one, of a class with a call of its own."""
    parent = getattr(library, kind)

    async def call(self: Any) -> None:
        log.append("own")
        if calls_super:
            await parent.__call__(self)

    task = note(log, "task", always=True)
    first: Any = task if kind == "BackgroundTask" else [library.BackgroundTask(task)]
    return type("Own", (parent,), {"__call__": call})(first)


@drop_in
@pytest.mark.parametrize("kind", ["BackgroundTask", "BackgroundTasks"])
@pytest.mark.parametrize("calls_super", [True, False])
async def test_a_subclass_with_a_call_of_its_own_is_called_as_by_starlette(
    library: Any, kind: str, calls_super: bool
) -> None:
    server = Server()
    background = own(library, kind, server.log, calls_super)
    await server.answer(library.Response(background=background))
    assert tasks_in(server.log) == (["own", "task"] if calls_super else ["own"])


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("BackgroundTask", ["own", "task"]), ("BackgroundTasks", ["task"])],
)
async def test_what_such_a_subclass_declares_always_runs(
    kind: str, runs: list[str]
) -> None:
    server = Server(breaks={"end": OSError})
    background = own(OURS, kind, server.log, calls_super=True)
    with raising(OSError):
        await server.answer(Response(background=background))
    assert tasks_in(server.log) == runs


async def test_a_subclass_that_keeps_the_call_is_as_good_as_its_parent() -> None:
    class Named(BackgroundTask): ...

    server = Server(breaks={"end": OSError})
    with raising(OSError):
        task = Named(note(server.log, "task", always=True))
        await server.answer(Response(background=task))
    assert tasks_in(server.log) == ["task"]


async def test_a_subclass_with_a_constructor_of_its_own_replaces_no_error() -> None:
    class Own(BackgroundTask):
        def __init__(self) -> None: ...

        async def __call__(self) -> None: ...

    server = Server(breaks={"end": OSError})
    task = Own()
    assert (task.state, task.started_at, task.finished_at) == ("pending", None, None)
    with raising(OSError):
        await server.answer(Response(background=BackgroundTasks([task])))
    assert task.state == "cancelled"


@pytest.mark.parametrize("kind", ["stock task", "stock group", "async callable"])
async def test_a_stock_background_that_is_not_run_is_named(
    kind: str, told: Told
) -> None:
    server = Server(breaks={"end": OSError})
    with raising(OSError):
        await server.answer(Response(background=backgrounds(server.log)[kind]))
    assert tasks_in(server.log) == []
    [record] = told()
    assert record.startswith(NOT_RUN)


async def test_a_task_that_runs_may_add_another_to_its_response() -> None:
    server = Server()
    response = Response()

    async def more() -> None:
        response.add_task(note(server.log, "more"))

    response.background = BackgroundTask(more)
    await server.answer(response)
    assert tasks_in(server.log) == ["more"]


@pytest.mark.parametrize("error", [None, OSError])
@pytest.mark.parametrize("kind", ["task", "stock task", "stock group", "own group"])
async def test_a_body_may_replace_the_background(
    kind: str, error: type[Exception] | None
) -> None:
    server = Server(breaks={"end": OSError} if error else {}, spec="2.3")
    func = note(server.log, "task", always=True)
    background: Any = {
        "task": BackgroundTask(func),
        "stock task": STOCK.BackgroundTask(func),
        "stock group": STOCK.BackgroundTasks([STOCK.BackgroundTask(func)]),
        "own group": own(OURS, "BackgroundTasks", [], calls_super=False),
    }[kind]

    async def body() -> AsyncIterator[bytes]:
        response.background = background
        yield b""

    response = StreamingResponse(body())
    with raising(error):
        await server.answer(response)
    assert tasks_in(server.log) == ([] if kind == "own group" else ["task"])


async def test_a_group_that_is_not_run_is_cancelled_like_its_tasks() -> None:
    server = Server(breaks={"end": OSError})
    group = BackgroundTasks([BackgroundTask(note(server.log, "task"))])
    with raising(OSError):
        await server.answer(Response(background=group))
    assert (group.state, group.finished_at) == ("cancelled", None)


# --- end to end ----------------------------------------------------------------------


@pytest.fixture
def client(anyio_backend: tuple[Any, dict[str, Any]]) -> Callable[..., Any]:
    backend, options = anyio_backend
    return lambda *routes: TestClient(
        Starlette(routes=routes), backend=backend, backend_options=options
    )


@drop_in
@every_class
def test_a_client_has_its_response_and_the_tasks_run(
    library: Any, name: str, client: Callable[..., Any]
) -> None:
    log: list[str] = []

    async def endpoint(request: Request) -> starlette.responses.Response:
        tasks = library.BackgroundTasks()
        tasks.add_task(note(log, request.url.path))
        tasks.add_task(log.append, "sync")
        response: starlette.responses.Response = make(library, name, background=tasks)
        return response

    answer = client(Route("/", endpoint)).get("/", follow_redirects=False)
    assert answer.status_code == (307 if name == "RedirectResponse" else 200)
    assert log == ["/", "sync"]


def test_a_denied_websocket_has_its_response_and_the_task_runs(
    client: Callable[..., Any],
) -> None:
    log: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        response = Response("denied", status_code=403)
        response.add_task(log.append, "task")
        await websocket.send_denial_response(response)

    session = client(WebSocketRoute("/", endpoint)).websocket_connect("/")
    with pytest.raises(WebSocketDenialResponse) as denial, session:
        pass
    assert (denial.value.status_code, denial.value.content) == (403, b"denied")
    assert log == ["task"]


def test_a_file_may_be_removed_once_its_range_has_been_sent(
    tmp_path: Path, client: Callable[..., Any]
) -> None:
    path = tmp_path / "report.txt"
    path.write_text("0123456789", encoding="ascii")

    def endpoint(request: Request) -> Response:
        response = FileResponse(path, filename="report.txt")
        response.add_task(path.unlink)
        return response

    answer = client(Route("/", endpoint)).get("/", headers={"range": "bytes=2-4"})
    assert answer.content == b"234"
    assert not path.exists()
