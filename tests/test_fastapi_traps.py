"""Where FastAPI's own tasks are lost or do harm, and what ours do instead."""

import gc
import logging
import re
import sqlite3
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.lowlevel
import httpx2
import pytest
from served_fastapi import OURS, OWN, api_of, log
from servers import serve, wait_until
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from postlude import BackgroundTasksMiddleware


def noted(app: ASGIApp) -> ASGIApp:
    """Writes a line when the response has been sent."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            await send(message)
            if message["type"].endswith(".body") and not message.get("more_body"):
                log.append("sent")

        await app(scope, receive, noting)

    return call


# FastAPI's own; ours without the middleware, and with it in both modes.
APPS: dict[str, ASGIApp] = {
    "own": noted(api_of(OWN)),
    "bare": noted(api_of(OURS)),
    "attached": noted(BackgroundTasksMiddleware(api_of(OURS))),
    "detached": noted(BackgroundTasksMiddleware(api_of(OURS), detach=True)),
}
WRAPPED = {"attached", "detached"}
all_apps = pytest.mark.parametrize("app", APPS)


@pytest.fixture(autouse=True)
def _clean(caplog: pytest.LogCaptureFixture) -> Generator[None]:
    log.clear()
    caplog.set_level(logging.INFO, "postlude")
    yield
    log.clear()


@pytest.fixture(params=["lifespan", "no lifespan", "lifespan on trio"])
def client(request: pytest.FixtureRequest, app: str) -> TestClient:
    """Asks an app, with a lifespan if it is entered."""
    # What an earlier test has dropped is told when it is collected.
    gc.collect()
    kind: str = request.param
    client = TestClient(
        APPS[app],
        raise_server_exceptions=False,
        backend="trio" if kind.endswith("trio") else "asyncio",
    )
    client.headers["lifespan"] = kind
    return client


@contextmanager
def serving(client: TestClient) -> Generator[TestClient]:
    """Lets a client ask; afterwards all tasks have ended."""
    has_lifespan = client.headers["lifespan"] != "no lifespan"
    with client if has_lifespan else nullcontext():
        yield client


def told(caplog: pytest.LogCaptureFixture, number: int) -> list[tuple[str, str]]:
    """Returns what has been logged, of which so much is to be expected."""

    def records() -> list[tuple[str, str]]:
        return [
            (record.levelname, message)
            for record in caplog.records
            if record.name == "postlude"
            and not (message := record.getMessage()).startswith("shutdown waits")
        ]

    def are_there() -> bool:
        if len(records()) < number:
            # A thread may hold an exception for a moment, and a cycle for longer.
            gc.collect()
        return len(records()) >= number

    wait_until(are_there)
    return records()


class Trap(NamedTuple):
    """What a request leads to.

    Attributes:
        status: Of the response.
        own: What FastAPI's own tasks write.
        bare: What ours do without the middleware.
        wrapped: What they do in it; `added` comes from `postlude.add_task()`.
        dropped: Which of them FastAPI has dropped, as a `WARNING` says.
        why: Why some are not run in the middleware, as an `INFO` record says.
        detached: What they write in it with `detach=True` if that is another order.
    """

    status: int
    own: str
    bare: str
    wrapped: str
    dropped: str = ""
    why: str = ""
    detached: str = ""


CALLED, MIXED = "dependency, clean-up", "clean-up, ours, stock"
ALL, ADDED = "dependency, clean-up, endpoint", "added, dependency, clean-up, endpoint"
SHARED = "write_async clean_up"

TRAPS = {
    # A response with a background of its own.
    "/background/ours": Trap(
        200, "response", "response", f"response, {ADDED}", f"{SHARED} write"
    ),
    "/background/stock": Trap(
        200, "response", "response", f"response, {ADDED}", f"{SHARED} write"
    ),
    "/background/empty": Trap(200, "", "", ADDED, f"{SHARED} write"),
    "/background/injected": Trap(200, ALL, ALL, ADDED),
    "/background/nested": Trap(
        200, f"response, {ALL}", f"response, {ALL}", f"response, {ADDED}"
    ),
    "/background/by hand": Trap(200, ALL, ALL, ADDED),
    "/background/re-added": Trap(200, ALL, ALL, ADDED),
    # The request fails.
    "/fails/raised": Trap(404, "", "", "clean-up", SHARED, "status 404"),
    "/fails/broken": Trap(500, "", "", "clean-up", SHARED, "status 500"),
    "/fails/so?number=x": Trap(422, "", "", "clean-up", SHARED, "status 422"),
    "/fails/so": Trap(500, "", "", "clean-up", SHARED, "status 500"),
    "/dependency": Trap(500, "", "", "clean-up", SHARED, "status 500"),
    "/fails/body": Trap(200, "", "", "clean-up", SHARED, "not sent completely"),
    # It does not: whatever FastAPI calls, runs.
    "/fails/handled": Trap(200, "", "", "added, dependency, clean-up", SHARED),
    "/fails/returned": Trap(404, CALLED, CALLED, CALLED, "", "status 404"),
    "/fails/ours": Trap(404, CALLED, CALLED, CALLED, "", "status 404"),
    "/mixed/stock": Trap(200, MIXED, MIXED, MIXED, detached="clean-up, stock, ours"),
    "/mixed/both": Trap(200, MIXED, MIXED, MIXED, detached="stock, clean-up, ours"),
    "/postlude/plain": Trap(200, CALLED, CALLED, f"added, {CALLED}, late", "write"),
    "/postlude/stock": Trap(
        200,
        f"{CALLED}, stock",
        f"{CALLED}, stock",
        f"stock, added, {CALLED}, late",
        "write",
    ),
    "/postlude/response": Trap(
        200,
        "response",
        "response",
        f"response, added, {CALLED}, late",
        f"{SHARED} write",
    ),
    # Tasks added after the `yield` of a dependency.
    "/late": Trap(201, CALLED, CALLED, f"added, {CALLED}, late", "write"),
    "/late?how=empty": Trap(201, "", "", "added, late", "write"),
    # Context variables set in a worker thread.
    "/user/sync": Trap(200, "nobody", "ada", "ada"),
    "/user/dependency": Trap(200, "nobody", "ada", "ada"),
}


@all_apps
@pytest.mark.parametrize("path", TRAPS)
def test_what_a_request_leads_to(
    path: str, app: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    trap = TRAPS[path]
    with serving(client):
        assert client.get(path).status_code == trap.status

    lines = {
        "own": trap.own,
        "bare": trap.bare,
        "attached": trap.wrapped,
        "detached": trap.detached or trap.wrapped,
    }[app]
    sent = [] if path == "/fails/body" else ["sent"]
    assert log == sent + (lines.split(", ") if lines else [])
    level, reason = {
        "own": ("", ""),
        "bare": ("WARNING", trap.dropped),
    }.get(app, ("INFO", trap.why))
    records = told(caplog, number := int(reason != ""))
    assert [level for level, _ in records] == [level] * number
    if app == "bare":
        names = [f"'served_fastapi.{name}'" for name in trap.dropped.split()]
        assert [re.findall("'.*?'", message) for _, message in records] in ([], [names])
    else:
        for _, message in records:
            assert trap.why in message
            assert "'served_fastapi.write'" in message
            assert "clean_up" not in message


@all_apps
def test_a_response_of_ours_that_breaks_off_names_each_task_once(
    app: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(client):
        assert client.get("/fails/our body").status_code == 200
    assert log == ["clean-up"]
    records = told(caplog, 2 if app in WRAPPED else 1)
    assert {level for level, _ in records} == {"INFO"}
    names = re.findall("'.*?'", "".join(message for _, message in records))
    added = ["'served_fastapi.write'"] if app in WRAPPED else []
    assert sorted(names) == sorted(
        [*added, "'served_fastapi.write_async'", "'served_fastapi.clean_up'"]
    )


def cancelled_at_the_end(app: ASGIApp) -> ASGIApp:
    """Cancels requests while they send the last of the response."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as cancel_scope:

            async def cancel(message: Message) -> None:
                await send(message)
                if message["type"] == "http.response.body":
                    cancel_scope.cancel()
                    await anyio.lowlevel.checkpoint()

            await app(scope, receive, cancel)

    return call


@all_apps
@pytest.mark.parametrize("path", ["/fails/handled", "/late", "/postlude/plain"])
def test_no_cancellation_of_the_request_loses_them(path: str, app: str) -> None:
    with TestClient(cancelled_at_the_end(APPS[app])) as client:
        assert client.get(path).is_success
    if app in WRAPPED:
        assert log == ["added", "dependency", "clean-up"]
    else:
        # What is declared `always=True` runs if the response is ours.
        assert log == ["clean-up"] * (path == "/postlude/plain")


@all_apps
@pytest.mark.parametrize("what", ["accepted", "refused"])
def test_tasks_run_when_a_websocket_ends(
    what: str, app: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    expected, level = ["closed"], {"bare": "WARNING"}.get(app)
    if app in WRAPPED and what == "accepted":
        expected += ["added", "dependency", "clean-up"]
    elif app in WRAPPED:
        expected, level = ["closed", "clean-up"], "INFO"
    if what == "accepted":
        with serving(client), client.websocket_connect("/socket/accepted") as socket:
            assert socket.receive()["type"] == "websocket.close"
            # The client cancels the endpoint when it leaves.
            wait_until(lambda: len(log) >= len(expected))
    else:
        # It leaves at once, which tasks survive that belong to the application.
        with client, pytest.raises(WebSocketDisconnect):
            client.websocket_connect("/socket/refused").__enter__()
    assert log == expected
    number = int(level is not None)
    assert [told_at for told_at, _ in told(caplog, number)] == [level] * number


@all_apps
def test_a_failing_task_leaves_transactions_alone(
    app: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(client):
        assert client.get("/failing").status_code == 200
    assert (
        log
        == {
            "own": ["sent", "rolled back"],
            "bare": ["sent", "after", "rolled back"],
            "attached": ["sent", "after", "committed"],
            "detached": ["sent", "committed", "after"],
        }[app]
    )
    failed = [("ERROR", "background task 'served_fastapi.fail' failed")]
    expected = failed if app in WRAPPED else []
    assert told(caplog, len(expected)) == expected


@all_apps
def test_one_of_fastapis_tasks_that_fails_stops_only_its_own(
    app: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(client):
        client.get("/mixed/failing")
    assert log == (["sent", "ours"] if app in WRAPPED else ["sent"])
    dropped = ["WARNING"] if app == "bare" else []
    assert [level for level, _ in told(caplog, len(dropped))] == dropped


@all_apps
@pytest.mark.parametrize(
    ("method", "path", "line", "error"),
    [
        ("POST", "/upload", "3 bytes", ValueError),
        ("GET", "/session", "(1,)", sqlite3.ProgrammingError),
    ],
    ids=["upload", "session"],
)
def test_what_the_request_has_opened_is_closed_only_if_tasks_are_detached(
    *,
    method: str,
    path: str,
    line: str,
    error: type[Exception],
    app: str,
    client: TestClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = {"file": b"abc"} if method == "POST" else None
    with serving(client):
        assert client.request(method, path, files=files).status_code == 200
    if app != "detached":
        assert log == ["sent", line]
    else:
        assert log == ["sent"]
        [record] = [record for record in caplog.records if record.name == "postlude"]
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], error)


# --- on a server ---------------------------------------------------------------------


@pytest.mark.parametrize(("app", "lives"), [("own", False), ("attached", True)])
def test_the_connection_outlives_a_failing_task(
    app: str, lives: bool, tmp_path: Path
) -> None:
    with (
        serve("uvicorn", tmp_path, app=f"served_fastapi:{app}") as server,
        server.connect() as connection,
    ):
        connection.sendall(b"GET /failing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while not received.endswith(b"null"):
            received += connection.recv(4096)
        if lives:
            connection.sendall(b"GET /elsewhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        else:
            assert connection.recv(4096) == b""


@pytest.mark.parametrize(
    ("app", "timeout", "served"),
    [("own", 0.3, 5), ("attached", 0.3, 5), ("detached", 20, 30)],
)
def test_detached_tasks_hold_no_connection_of_the_pool(
    app: str, timeout: float, served: int, tmp_path: Path
) -> None:
    environment = {"POOL_TIMEOUT": str(timeout)}
    with (
        serve(
            "uvicorn", tmp_path, app=f"served_fastapi:{app}", **environment
        ) as server,
        ThreadPoolExecutor(30) as clients,
    ):

        def ask(_: int) -> int:
            return httpx2.get(f"{server.url}/hold", timeout=30).status_code

        statuses = [*clients.map(ask, range(30))]
        (tmp_path / "release").touch()
    assert statuses.count(200) == served
    assert statuses.count(503) == 30 - served
