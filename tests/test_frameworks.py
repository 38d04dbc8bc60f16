"""The middleware in each framework, on real servers in threads of this process."""

import http.client
import logging
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import anyio
import anyio.lowlevel
import django.conf
import django.core.asgi
import django.http
import django.urls
import fastapi
import httpx2
import hypercorn.config
import hypercorn.trio
import litestar
import litestar.middleware
import litestar.params
import pytest
import quart
import starlette.middleware
import trio
import uvicorn
from servers import wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    add_task,
    task,
)

# --- what all the apps do ------------------------------------------------------------

log: list[str] = []
user: ContextVar[str] = ContextVar("user", default="nobody")
# Something waits until the test sets the second event; it has set the first one.
held_up, held = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def _clean() -> None:
    log.clear()
    held_up.clear()
    held.clear()


def write(line: str) -> None:
    log.append(f"{line} for {user.get()}")


async def write_async(line: str) -> None:
    await anyio.lowlevel.checkpoint()
    write(line)


@task(always=True)
async def clean_up() -> None:
    log.append("clean-up")


def hold() -> None:
    """Does not end before the test says so, or has failed."""
    held_up.set()
    held.wait(20)
    log.append("held")


def fail() -> NoReturn:
    raise RuntimeError("a broken task")


TASKS = ["sync for ada", "async for ada", "clean-up"]
NOT_RUN = "'test_frameworks.write', 'test_frameworks.write_async'"


class Missing(Exception):
    """What each app answers with 404."""


def act(what: str) -> str:
    """Adds tasks, as every endpoint does."""
    user.set("ada")
    if what == "hold":
        add_task(hold)
    if what == "fail":
        add_task(fail)
    add_task(write, "sync")
    add_task(write_async, "async")
    add_task(clean_up)
    user.set("ada, too")
    if what == "error":
        raise ValueError("a broken endpoint")
    if what == "missing":
        raise Missing
    return "done"


async def act_async(what: str) -> str:
    """Adds tasks, and lingers if that is asked for."""
    said = act(what)
    if what == "linger":
        held_up.set()
        await anyio.to_thread.run_sync(held.wait, 20, abandon_on_cancel=True)
    return said


def background(what: str) -> Any:
    """Returns what a response takes as its background."""
    return BackgroundTask(write, "background") if what == "background" else None


@asynccontextmanager
async def lifespan(app: object) -> AsyncGenerator[None]:
    yield
    await anyio.lowlevel.checkpoint()
    log.append("closed")


# --- the apps ------------------------------------------------------------------------

# Each has /sync/{what} and /async/{what}; those that have WebSockets, /socket/{what}.


async def respond(request: Request) -> Response:
    what = request.path_params["what"]
    return PlainTextResponse(await act_async(what), background=background(what))


def respond_sync(request: Request) -> Response:
    what = request.path_params["what"]
    return PlainTextResponse(act(what), background=background(what))


async def say_missing(request: Request, exc: Exception) -> Response:
    return PlainTextResponse("missing", status_code=404)


async def converse(websocket: WebSocket) -> None:
    what = websocket.path_params["what"]
    if what == "reject":
        act(what)
        await websocket.close()
        return
    await websocket.accept()
    await websocket.send_text(act(what))
    async for _ in websocket.iter_text():
        pass


ROUTES = [
    Route("/sync/{what}", respond_sync),
    Route("/async/{what}", respond),
    WebSocketRoute("/socket/{what}", converse),
]


def starlette_app(middleware: Sequence[starlette.middleware.Middleware] = ()) -> Any:
    return Starlette(
        routes=ROUTES,
        middleware=middleware,
        exception_handlers={Missing: say_missing},
        lifespan=lifespan,
    )


def fastapi_app() -> Any:
    app = fastapi.FastAPI(lifespan=lifespan, exception_handlers={Missing: say_missing})

    @app.get("/sync/{what}")
    def respond_sync(what: str) -> fastapi.Response:
        return fastapi.Response(act(what), background=background(what))

    @app.get("/async/{what}")
    async def respond(what: str) -> fastapi.Response:
        return fastapi.Response(await act_async(what), background=background(what))

    app.add_api_websocket_route("/socket/{what}", converse)
    return app


Parameter: TypeAlias = litestar.params.FromPath[str]


def litestar_app(middleware: Sequence[Any] = ()) -> Any:
    @litestar.get("/sync/{what:str}", sync_to_thread=True)
    def respond_sync(what: Parameter) -> litestar.Response[str]:
        return litestar.Response(act(what), background=background(what))

    @litestar.get("/async/{what:str}")
    async def respond(what: Parameter) -> litestar.Response[str]:
        return litestar.Response(await act_async(what), background=background(what))

    @litestar.websocket("/socket/{what:str}")
    async def converse(
        socket: litestar.WebSocket[Any, Any, Any], what: Parameter
    ) -> None:
        if what == "reject":
            act(what)
            await socket.close()
            return
        await socket.accept()
        await socket.send_text(act(what))
        async for _ in socket.iter_data("text"):
            pass

    def say_missing(request: object, exc: Exception) -> litestar.Response[str]:
        return litestar.Response("missing", status_code=404)

    return litestar.Litestar(
        [respond_sync, respond, converse],
        middleware=middleware,
        exception_handlers={Missing: say_missing},
        lifespan=[lifespan],
        logging_config=None,  # it would take the handlers of pytest away
    )


def quart_app() -> Any:
    app = quart.Quart(__name__)

    @app.get("/sync/<what>")
    def respond_sync(what: str) -> str:
        return act(what)

    @app.get("/async/<what>")
    async def respond(what: str) -> str:
        return await act_async(what)

    @app.websocket("/socket/<what>")
    async def converse(what: str) -> None:
        if what == "reject":
            act(what)
            await quart.websocket.close(1000)
            return
        await quart.websocket.accept()
        await quart.websocket.send(act(what))
        while True:
            await quart.websocket.receive()

    @app.errorhandler(Missing)
    async def say_missing(exc: Exception) -> tuple[str, int]:
        return "missing", 404

    @app.while_serving
    async def live() -> AsyncGenerator[None]:
        async with lifespan(app):
            yield

    return app


def view_sync(request: Any, what: str) -> Any:
    try:
        return django.http.HttpResponse(act(what).encode())
    except Missing:
        raise django.http.Http404 from None


async def view(request: Any, what: str) -> Any:
    try:
        return django.http.HttpResponse((await act_async(what)).encode())
    except Missing:
        raise django.http.Http404 from None


urlpatterns = [
    django.urls.path("sync/<what>", view_sync),
    django.urls.path("async/<what>", view),
]


def django_app() -> Any:
    if not django.conf.settings.configured:
        django.conf.settings.configure(
            ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=__name__, LOGGING_CONFIG=None
        )
    return django.core.asgi.get_asgi_application()


def bare_app() -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        _, kind, what = scope["path"].split("/")
        if kind == "socket":
            await bare_socket(what, receive, send)
            return
        status = 200
        try:
            if kind == "sync":
                body = await anyio.to_thread.run_sync(act, what)
            else:
                body = await act_async(what)
        except Missing:
            status, body = 404, "missing"
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body.encode()})

    return app


async def bare_socket(what: str, receive: Receive, send: Send) -> None:
    await receive()
    if what == "reject":
        act(what)
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": act(what)})
    while (await receive())["type"] != "websocket.disconnect":
        pass


APPS: dict[str, Callable[[], Any]] = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
    "quart": quart_app,
    "django": django_app,
    "bare": bare_app,
}
WITH_LIFESPAN = {"starlette", "fastapi", "litestar", "quart"}
WITH_BACKGROUND = ["starlette", "fastapi", "litestar"]
WITH_SOCKETS = ["starlette", "fastapi", "litestar", "quart", "bare"]
WITH_TRIO = ["starlette", "fastapi", "litestar", "bare"]

# --- the servers ---------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """An app that is being served.

    Attributes:
        port: Where, on 127.0.0.1.
        stop: Tells the server to stop, as a signal would.
        thread: What it runs in.
    """

    port: int
    stop: Callable[[], None]
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> httpx2.Response:
        # To load certificates would take longer than all the rest.
        return httpx2.get(self.url + path, timeout=20, verify=False)

    def join(self) -> None:
        self.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


def uvicorn_thread(
    app: ASGIApp, listener: socket.socket
) -> tuple[Callable[[], None], Callable[[], None]]:
    config = uvicorn.Config(
        app,
        log_config=None,
        ws="wsproto",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=0,  # requests are cancelled at once
    )
    server = uvicorn.Server(config)

    def run() -> None:
        server.run(sockets=[listener])

    def stop() -> None:
        server.should_exit = True

    return run, stop


def hypercorn_trio_thread(
    app: ASGIApp, listener: socket.socket
) -> tuple[Callable[[], None], Callable[[], None]]:
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.keep_alive_timeout = 60
    config.graceful_timeout = 0.1
    stopped = threading.Event()

    async def wait() -> None:
        await trio.to_thread.run_sync(stopped.wait)

    async def main() -> None:
        served: Any = app
        await hypercorn.trio.serve(served, config, shutdown_trigger=wait)

    return lambda: trio.run(main), stopped.set


SERVERS = {"uvicorn": uvicorn_thread, "hypercorn trio": hypercorn_trio_thread}


@contextmanager
def serving(app: ASGIApp, server: str = "uvicorn") -> Generator[Served]:
    """Serves an app until the block is left, when everything has to end."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    run, stop = SERVERS[server](app, listener)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    served = Served(port, stop, thread)
    try:
        yield served
    finally:
        held.set()
        served.join()


def noted(line: str, app: ASGIApp) -> ASGIApp:
    """Writes a line when the app has returned, or raised."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        finally:
            if scope["type"] != "lifespan":
                log.append(line)

    return call


def wrapped(app: ASGIApp, *, detach: bool) -> ASGIApp:
    middleware = BackgroundTasksMiddleware(noted("returned", app), detach=detach)
    return noted("ended", middleware)


def expected(tasks: list[str], *, detach: bool, handed_over: bool = False) -> list[str]:
    """Returns what is logged of a request."""
    if detach:
        return ["returned", "ended", *tasks]
    # A response runs its background itself.
    return (
        [*tasks, "returned", "ended"] if handed_over else ["returned", *tasks, "ended"]
    )


def wait_for(lines: list[str]) -> None:
    """Waits until these lines, and no others, have been logged since last time."""
    try:
        wait_until(lambda: len(log) >= len(lines))
    finally:
        assert log == lines
    log.clear()


def messages(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "postlude" and record.levelname == level
    ]


def raised(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns what exceptions have reached uvicorn."""
    infos = [each.exc_info for each in caplog.records if each.name == "uvicorn.error"]
    return [str(info[1]) for info in infos if info]


both_modes = pytest.mark.parametrize("detach", [False, True], ids=["wait", "detach"])
each_app = pytest.mark.parametrize(
    ("name", "server"),
    [
        *[pytest.param(name, "uvicorn", id=name) for name in APPS],
        *[
            pytest.param(name, "hypercorn trio", id=f"{name}-trio")
            for name in WITH_TRIO
        ],
    ],
)

# --- wrapped from outside ------------------------------------------------------------


@both_modes
@each_app
def test_tasks_run_in_their_mode_and_in_the_context_that_added_them(
    name: str, server: str, detach: bool
) -> None:
    with serving(wrapped(APPS[name](), detach=detach), server) as served:
        for kind in "sync", "async":
            response = served.get(f"/{kind}/ok")
            assert (response.status_code, response.text) == (200, "done")
            wait_for(expected(TASKS, detach=detach))


@both_modes
@pytest.mark.parametrize("name", WITH_BACKGROUND)
def test_the_background_of_a_response_runs_first(name: str, detach: bool) -> None:
    tasks = ["background for ada, too", *TASKS]
    with serving(wrapped(APPS[name](), detach=detach)) as served:
        for kind in "sync", "async":
            assert served.get(f"/{kind}/background").status_code == 200
            wait_for(expected(tasks, detach=detach, handed_over=True))


@both_modes
@each_app
@pytest.mark.parametrize("what", ["missing", "error"])
def test_what_is_not_run_after_an_error_is_named(
    *,
    name: str,
    server: str,
    what: str,
    detach: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    status = 404 if what == "missing" else 500
    with serving(wrapped(APPS[name](), detach=detach), server) as served:
        for kind in "sync", "async":
            assert served.get(f"/{kind}/{what}").status_code == status
            wait_until(lambda: "clean-up" in log and "ended" in log)
            assert {*log} == {"returned", "clean-up", "ended"}
            log.clear()
    why = f"the response had status {status}"
    if name == "bare" and what == "error":
        # The server sends this response.
        why = "there was no response"
    info = f"background tasks not run, as {why}: {NOT_RUN}"
    assert messages(caplog, "INFO") == [info, info]


@both_modes
@each_app
def test_a_failing_task_harms_neither_the_others_nor_the_connection(
    name: str, server: str, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(wrapped(APPS[name](), detach=detach), server) as served:
        client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        with closing(client):
            client.connect()
            connection = client.sock
            for _ in range(2):
                client.request("GET", "/async/fail")
                assert client.getresponse().read() == b"done"
                wait_for(expected(TASKS, detach=detach))
                assert client.sock is connection
    failed = "background task 'test_frameworks.fail' failed"
    assert messages(caplog, "ERROR") == [failed, failed]


@contextmanager
def stopping(served: Served, caplog: pytest.LogCaptureFixture) -> Generator[None]:
    """Stops a server while it has a task that does not end before the block."""
    served.stop()
    wait_until(lambda: "shutdown waits for background tasks" in caplog.text)
    assert "held" not in log
    yield
    held.set()
    served.join()


@both_modes
@each_app
def test_a_stopping_server_waits_for_tasks_and_then_closes_the_app(
    name: str, server: str, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    app = BackgroundTasksMiddleware(APPS[name](), detach=detach)
    with serving(app, server) as served:
        assert served.get("/async/hold").text == "done"
        wait_until(held_up.is_set)
        with stopping(served, caplog):
            assert [each.path for each in app.tasks()] == ["/async/hold"] * 4
        assert log == ["held", *TASKS, *["closed"] * (name in WITH_LIFESPAN)]


@both_modes
@pytest.mark.parametrize("name", APPS)
def test_only_some_frameworks_give_up_a_request_whose_client_leaves(
    name: str, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    app = BackgroundTasksMiddleware(APPS[name](), detach=detach)
    with serving(app) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(b"GET /async/linger HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            wait_until(held_up.is_set)
        if name in ("quart", "django"):
            # They cancel the view.
            wait_for(["clean-up"])
            info = f"background tasks not run, as there was no response: {NOT_RUN}"
            assert messages(caplog, "INFO") == [info]
        else:
            held.set()
            wait_for(TASKS)
            assert messages(caplog, "INFO") == []


# --- WebSockets ----------------------------------------------------------------------


@contextmanager
def conversing(served: Served, what: str) -> Generator[bytes]:
    """Opens a WebSocket; yields what the server says, or `b""` if it refuses."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(
            f"GET /socket/{what} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        received = client.makefile("rb")
        is_accepted = received.readline().startswith(b"HTTP/1.1 101 ")
        while received.readline().strip():
            pass
        frame = received.read(2) if is_accepted else b""
        yield received.read(frame[1]) if frame else b""
        # The end, as a client has to mask it.
        client.sendall(b"\x88\x80\0\0\0\0")


@both_modes
@pytest.mark.parametrize("name", WITH_SOCKETS)
def test_tasks_of_a_websocket_run_when_the_connection_has_ended(
    name: str, detach: bool
) -> None:
    with serving(wrapped(APPS[name](), detach=detach)) as served:
        with conversing(served, "ok") as said:
            assert said == b"done"
            assert log == []
        wait_for(expected(TASKS, detach=detach))


@both_modes
@pytest.mark.parametrize("name", WITH_SOCKETS)
def test_tasks_of_a_websocket_that_fails_once_accepted_run(
    name: str, detach: bool
) -> None:
    with serving(wrapped(APPS[name](), detach=detach)) as served:
        with conversing(served, "error") as said:
            wait_until(lambda: "clean-up" in log and "ended" in log)
            assert said != b"done"
        assert [line for line in log if line in TASKS] == TASKS


@both_modes
@pytest.mark.parametrize("name", WITH_SOCKETS)
def test_tasks_of_a_websocket_that_is_not_accepted_do_not_run(
    name: str, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    with serving(wrapped(APPS[name](), detach=detach)) as served:
        with conversing(served, "reject") as said:
            assert said == b""
        wait_for(expected(["clean-up"], detach=detach))
    [info] = messages(caplog, "INFO")
    why = "the WebSocket was not accepted"
    assert info == f"background tasks not run, as {why}: {NOT_RUN}"


# --- installed in other places -------------------------------------------------------


def installed(place: str, *, detach: bool) -> Any:
    """Returns an app that has the middleware somewhere."""
    here = starlette.middleware.Middleware(BackgroundTasksMiddleware, detach=detach)
    if place == "Middleware":
        return starlette_app([here])
    if place == "asgi_app":
        app = quart_app()
        app.asgi_app = BackgroundTasksMiddleware(app.asgi_app, detach=detach)
    elif place == "fastapi.add_middleware":
        app = fastapi_app()
        app.add_middleware(BackgroundTasksMiddleware, detach=detach)
    else:
        app = starlette_app()
        app.add_middleware(BackgroundTasksMiddleware, detach=detach)
    return app


@both_modes
@pytest.mark.parametrize(
    "place", ["add_middleware", "Middleware", "fastapi.add_middleware", "asgi_app"]
)
def test_it_may_be_installed_inside_of_an_app_that_passes_lifespan_on(
    place: str, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    with serving(noted("ended", installed(place, detach=detach))) as served:
        assert served.get("/async/ok").text == "done"
        wait_for(["ended", *TASKS] if detach else [*TASKS, "ended"])
        assert served.get("/sync/hold").text == "done"
        if detach:
            wait_for(["ended"])
        with stopping(served, caplog):
            pass
        tasks = [line for line in log if line != "ended"]
        assert tasks == ["held", *TASKS, "closed"]


@both_modes
def test_installed_twice_the_outer_one_does_the_work(detach: bool) -> None:
    inner: list[BackgroundTasksMiddleware] = []

    def make(app: ASGIApp) -> ASGIApp:
        inner.append(BackgroundTasksMiddleware(app, detach=not detach))
        return inner[0]

    app = starlette_app([starlette.middleware.Middleware(make)])
    outer = BackgroundTasksMiddleware(noted("returned", app), detach=detach)
    with serving(noted("ended", outer)) as served:
        assert served.get("/async/background").text == "done"
        tasks = ["background for ada, too", *TASKS]
        wait_for(expected(tasks, detach=detach, handed_over=True))
        assert served.get("/async/hold").text == "done"
        wait_until(held_up.is_set)
        assert len(outer.tasks()) == 4
        assert inner[0].tasks() == []
        held.set()


def mounted(*, detach: bool) -> ASGIApp:
    return Starlette(routes=[Mount("/", wrapped(starlette_app(), detach=detach))])


def in_litestar(*, detach: bool) -> ASGIApp:
    # Each handler has a stack of middlewares of its own.
    make: Any = wrapped
    here = litestar.middleware.DefineMiddleware(make, detach=detach)
    app: ASGIApp = litestar_app([here])
    return app


never_told = pytest.mark.parametrize("place", [mounted, in_litestar])


@both_modes
@never_told
def test_where_lifespan_does_not_come_tasks_run_within_the_request(
    place: Callable[..., ASGIApp], detach: bool
) -> None:
    with serving(place(detach=detach)) as served:
        for kind in "sync", "async":
            assert served.get(f"/{kind}/ok").text == "done"
            wait_for(["returned", *TASKS, "ended"])
            assert served.get(f"/{kind}/background").text == "done"
            tasks = ["background for ada, too", *TASKS]
            wait_for(
                ["returned", *tasks, "ended"]
                if detach
                else [*tasks, "returned", "ended"]
            )


@both_modes
@never_told
def test_where_lifespan_does_not_come_failures_are_contained(
    place: Callable[..., ASGIApp], detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(place(detach=detach)) as served:
        assert served.get("/async/fail").text == "done"
        wait_for(["returned", *TASKS, "ended"])
    failed = "background task 'test_frameworks.fail' failed"
    assert messages(caplog, "ERROR") == [failed]
    assert raised(caplog) == []


@both_modes
def test_a_middleware_around_the_mount_does_the_work(detach: bool) -> None:
    app = BackgroundTasksMiddleware(mounted(detach=not detach), detach=detach)
    with serving(noted("outermost", app)) as served:
        assert served.get("/async/ok").text == "done"
        inner = ["returned", "ended"]
        end = ["outermost"]
        wait_for([*inner, *end, *TASKS] if detach else [*inner, *TASKS, *end])


# --- Starlette's own error responses -------------------------------------------------


async def handle(request: Request, exc: Exception) -> Response:
    """Answers whatever the endpoint raised."""
    try:
        add_task(write, "handler")
    except RuntimeError as error:
        log.append(str(error))
    tasks = BackgroundTasks()
    tasks.add_task(write, "background")
    tasks.add_task(fail)
    return PlainTextResponse("sorry", status_code=500, background=tasks)


def failing_app() -> Starlette:
    return Starlette(routes=ROUTES, exception_handlers={Exception: handle})


@both_modes
def test_from_outside_an_error_handler_is_part_of_the_request(
    detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    with serving(wrapped(failing_app(), detach=detach)) as served:
        response = served.get("/async/error")
        assert (response.status_code, response.text) == (500, "sorry")
        wait_until(lambda: "clean-up" in log and "ended" in log)
    assert [line for line in log if line not in ("returned", "ended")] == [
        "background for ada, too",
        "clean-up",
    ]
    [info] = messages(caplog, "INFO")
    assert info == (
        "background tasks not run, as the response had status 500: "
        f"{NOT_RUN}, 'test_frameworks.write'"
    )
    failed = "background task 'test_frameworks.fail' failed"
    assert messages(caplog, "ERROR") == [failed]
    assert raised(caplog) == ["a broken endpoint"]


@both_modes
def test_added_by_starlette_it_is_not_around_the_handler_of_all_exceptions(
    detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "postlude")
    app = failing_app()
    app.add_middleware(BackgroundTasksMiddleware, detach=detach)
    with serving(app) as served:
        response = served.get("/async/error")
        assert (response.status_code, response.text) == (500, "sorry")
        wait_until(lambda: len(log) == 3)
    refused, *tasks = sorted(log)
    assert refused.startswith("add_task() needs a request: ")
    assert tasks == ["background for ada, too", "clean-up"]
    [info] = messages(caplog, "INFO")
    assert info == f"background tasks not run, as there was no response: {NOT_RUN}"
    # The task took the place of the endpoint's error.
    assert messages(caplog, "ERROR") == []
    assert raised(caplog) == ["a broken task"]


# --- FastAPI's dependencies ----------------------------------------------------------


async def session() -> AsyncGenerator[None]:
    log.append("began")
    yield
    await anyio.lowlevel.checkpoint()
    log.append("committed")


def depending_app() -> fastapi.FastAPI:
    app = fastapi.FastAPI(dependencies=[fastapi.Depends(session)])
    app.add_api_route("/sync/{what}", respond_sync)
    app.add_api_route("/async/{what}", respond)
    return app


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_only_the_background_of_a_response_that_waits_finds_dependencies_open(
    kind: str, detach: bool
) -> None:
    with serving(wrapped(depending_app(), detach=detach)) as served:
        assert served.get(f"/{kind}/ok").text == "done"
        wait_for(["began", "committed", *expected(TASKS, detach=detach)])
        assert served.get(f"/{kind}/background").text == "done"
        tasks = ["background for ada, too", *TASKS]
        if detach:
            wait_for(["began", "committed", *expected(tasks, detach=True)])
        else:
            wait_for(["began", *tasks, "committed", "returned", "ended"])
