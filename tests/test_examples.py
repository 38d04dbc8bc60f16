"""Each example, as a process that serves real clients."""

import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import Server, start, wait_until
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

from postlude.middleware import Status

ALL = sorted(Path(__file__).parents[1].glob("examples/*.py"))
# The others need a worker: they are run where the tests of the engines are.
EXAMPLES = [path for path in ALL if "from postlude.engines." not in path.read_text()]
each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
one_of_all = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def example(name: str) -> Path:
    [path] = [path for path in EXAMPLES if path.stem == name]
    return path


@contextmanager
def serving(
    name: str, directory: Path, *, fails: bool = False, **environment: str
) -> Generator[Server]:
    """Runs an example; afterwards its log must hold a traceback just if it fails."""
    with start(
        [sys.executable, str(example(name))],
        log=directory / "log",
        environment={"TMPDIR": str(directory), **environment},
    ) as server:
        yield server
        assert server.stop(signal.SIGTERM) == -signal.SIGTERM
        assert ("Traceback" in server.output) == fails, server.output


@one_of_all
def test_an_example_has_fewer_than_60_lines(path: Path) -> None:
    # One shows five things, as they are in a FastAPI app.
    most = 90 if path.stem == "fastapi_app" else 60
    assert len(path.read_text(encoding="utf-8").splitlines()) < most


@one_of_all
def test_an_example_is_in_the_documentation(path: Path) -> None:
    page = path.parents[1] / "docs" / "examples.md"
    assert f"../examples/{path.name}\n" in page.read_text(encoding="utf-8")


def ask(command: str) -> httpx2.Response:
    """Sends the request that curl would send."""
    _, *options, url = shlex.split(command)
    method = "POST" if {"-X", "-F", "--data-binary"} & {*options} else "GET"
    [name, file] = next((o.split("@") for o in options if "@" in o), ["", ""])
    content = Path(file).read_bytes() if file else b""
    if name:
        files = {name.removesuffix("="): content}
        return httpx2.request(method, url, files=files)
    return httpx2.request(method, url, content=content)


@each_example
def test_an_example_says_what_to_try_and_stops_at_ctrl_c(
    path: Path, tmp_path: Path
) -> None:
    with start(
        [sys.executable, str(path)],
        log=tmp_path / "log",
        environment={"TMPDIR": str(tmp_path)},
    ) as server:
        commands = re.findall(r"\bcurl [^;\n]*", server.output)
        assert commands
        for command in commands:
            response = ask(command)
            if command.endswith("/NAME"):
                assert (response.status_code, response.text) == (404, ""), command
            else:
                assert response.status_code < 400, command
        assert server.stop(signal.SIGINT) == 0
        assert "KeyboardInterrupt" not in server.output


def test_an_order_is_followed_up_after_the_response(tmp_path: Path) -> None:
    notifications = tmp_path / "notifications.log"
    with serving("starlette_app", tmp_path) as server:
        response = httpx2.post(f"{server.url}/orders/Paris")
        assert (response.status_code, response.text) == (202, "Thank you!\n")
        wait_until(notifications.exists)
    assert notifications.read_text() == "pack the order for Paris\n"


def test_the_warehouse_hears_of_an_order_that_no_courier_takes(tmp_path: Path) -> None:
    notifications = tmp_path / "notifications.log"
    with serving("starlette_app", tmp_path, fails=True) as server:
        assert httpx2.post(f"{server.url}/orders/Atlantis").status_code == 202
        wait_until(notifications.exists)
    assert notifications.read_text() == "pack the order for Atlantis\n"
    assert "LookupError: no courier goes to Atlantis\n" in server.output
    assert "in background task '__main__.book_courier'\n" in server.output


def uploads(directory: Path) -> list[Path]:
    return [*directory.glob("upload-*")]


@pytest.mark.parametrize(
    ("content", "result"),
    [
        pytest.param(b"1\n2\n3\n", {"state": "succeeded", "lines": 3}, id="text"),
        pytest.param(b"\xff" * 100, {"state": "failed", "lines": None}, id="binary"),
    ],
)
def test_an_upload_is_accepted_then_processed_then_removed(
    tmp_path: Path, content: bytes, result: dict[str, object]
) -> None:
    fails = result["state"] == "failed"
    with serving("upload", tmp_path, fails=fails) as server:
        response = httpx2.post(f"{server.url}/uploads", content=content)
        assert response.status_code == 202
        assert httpx2.get(f"{server.url}/results/another").status_code == 404
        url = server.url + response.json()["result"]
        wait_until(lambda: httpx2.get(url).json()["state"] in ("succeeded", "failed"))
        assert httpx2.get(url).json() == result
        wait_until(lambda: not uploads(tmp_path))
    assert ("UnicodeDecodeError" in server.output) == fails


@pytest.mark.parametrize("rest", [b"", b"the rest\n"], ids=["during", "after"])
def test_nothing_stays_of_an_upload_whose_client_leaves(
    tmp_path: Path, rest: bytes
) -> None:
    with serving("upload", tmp_path) as server:
        with server.connect() as client:
            client.sendall(
                b"POST /uploads HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 19\r\n\r\nthe start\n"
            )
            wait_until(lambda: uploads(tmp_path))
            client.sendall(rest)
        wait_until(lambda: not uploads(tmp_path))


HEAD = (
    b"HTTP/1.1 203 Fine\r\nContent-Type: text/x-tick\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


async def refused(name: str, method: str, path: str, **state: object) -> dict[str, Any]:
    """Runs an example on a server that raises when it is to send to nobody.

    None of those that the other tests use does, but ASGI servers may.
    """
    module = runpy.run_path(str(example(name)))
    app: Starlette = module["app"]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [],
        "state": state,
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"1\n2\n"}

    async def send(message: object) -> None:
        raise OSError("the client has left")

    with pytest.raises((OSError, ClientDisconnect)):
        await app(scope, receive, send)
    return module


@pytest.mark.anyio
async def test_an_upload_is_removed_if_it_could_not_be_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = await refused("upload", "POST", "/uploads")
    [job] = module["jobs"].values()
    assert job.state == "cancelled"
    assert not uploads(tmp_path)


class Upstream:
    """What the proxy asks, played by the test itself."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"

    @contextmanager
    def asked(self) -> Generator[socket.socket]:
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(10)
            assert connection.recv(4096).startswith(b"GET / HTTP/1.1\r\n")
            yield connection


@pytest.fixture
def upstream() -> Generator[Upstream]:
    upstream = Upstream()
    with upstream.listener:
        yield upstream


@contextmanager
def asking(server: Server) -> Generator[socket.socket]:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        yield client


def read_until(client: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        received += client.recv(4096) or pytest.fail(f"only {received!r} came")
    return received


def test_the_proxy_passes_on_its_own_upstream(tmp_path: Path) -> None:
    with serving("proxy", tmp_path) as server:
        response = httpx2.get(server.url)
        assert response.text.split() == ["0", "1", "2", "3", "4"]
        assert response.headers["content-type"] == "text/plain; charset=utf-8"


def test_the_proxy_passes_on_each_chunk_as_it_comes(
    tmp_path: Path, upstream: Upstream
) -> None:
    with (
        serving("proxy", tmp_path, UPSTREAM=upstream.url) as server,
        asking(server) as client,
        upstream.asked() as connection,
    ):
        connection.sendall(HEAD + b"5\r\nfirst\r\n")
        head = read_until(client, b"5\r\nfirst\r\n")
        assert head.startswith(b"HTTP/1.1 203 ")
        assert b"\r\ncontent-type: text/x-tick\r\n" in head
        connection.sendall(b"6\r\nsecond\r\n0\r\n\r\n")
        read_until(client, b"6\r\nsecond\r\n0\r\n\r\n")


def test_the_upstream_is_closed_when_the_client_leaves_in_mid_stream(
    tmp_path: Path, upstream: Upstream
) -> None:
    with (
        serving("proxy", tmp_path, UPSTREAM=upstream.url) as server,
        asking(server) as client,
        upstream.asked() as connection,
    ):
        connection.sendall(HEAD + b"5\r\nfirst\r\n")
        read_until(client, b"5\r\nfirst\r\n")
        client.close()
        assert connection.recv(1) == b""


def test_the_upstream_is_closed_when_its_body_breaks(
    tmp_path: Path, upstream: Upstream
) -> None:
    with (
        serving("proxy", tmp_path, fails=True, UPSTREAM=upstream.url) as server,
        asking(server) as client,
        upstream.asked() as connection,
    ):
        connection.sendall(HEAD + b"5\r\nfirst\r\nno chunk\r\n")
        assert connection.recv(1) == b""
        read_until(client, b"5\r\nfirst\r\n")
        assert client.recv(1) == b""
    assert "RemoteProtocolError" in server.output


def test_the_proxy_says_so_if_there_is_no_upstream(
    tmp_path: Path, upstream: Upstream
) -> None:
    upstream.listener.close()
    with serving("proxy", tmp_path, UPSTREAM=upstream.url) as server:
        assert httpx2.get(server.url).status_code == 502


def test_each_kind_of_response_is_followed_by_its_task(tmp_path: Path) -> None:
    with serving("any_response", tmp_path) as server:
        bodies = {
            "/": "<h1>Welcome!</h1>\n",
            "/old": "",
            "/countdown": "3\n2\n1\n",
            "/source": example("any_response").read_text(encoding="utf-8"),
        }
        for page, body in bodies.items():
            assert httpx2.get(server.url + page).text == body
        expected = {"home": 1, "old home": 1, "countdown": 1, "source": 1}
        wait_until(lambda: httpx2.get(f"{server.url}/visits").json() == expected)


@pytest.mark.anyio
async def test_the_upstream_is_closed_if_nothing_of_it_could_be_sent() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"never read"

    reply = httpx2.Response(200, content=chunks())
    transport = httpx2.MockTransport(lambda request: reply)
    async with httpx2.AsyncClient(transport=transport) as client:
        await refused("proxy", "GET", "/", client=client)
        assert reply.is_closed


# --- in the middleware ---------------------------------------------------------------

PACKED, SENT = "packed order {0}", "sent the receipt of order {0}"
THUMBNAIL = "made the thumbnail of {0}"

# What follows each request, in this order.
FOLLOWED = {
    "bare_asgi": {"/orders/{0}": [PACKED, SENT], "/photos/{0}": [THUMBNAIL]},
    "django_app": {"/orders/{0}": [PACKED, SENT], "/photos/{0}": [THUMBNAIL]},
    "fastapi_plain": {
        "/users/{0}": ["POST /users/{0}", "welcomed {0}"],
        "/users/{0}/photo": ["POST /users/{0}/photo", THUMBNAIL],
    },
    "litestar_app": {"/orders/{0}": [SENT, PACKED], "/photos/{0}": [THUMBNAIL]},
    "quart_app": {"/orders/{0}": [PACKED, SENT], "/photos/{0}": [THUMBNAIL]},
    "starlette_middleware": {"/orders/{0}": [SENT, PACKED]},
}
CLOSED = {"quart_app": ["closed"], "starlette_middleware": ["closed"]}


def written(directory: Path) -> list[str]:
    """Returns the lines that the tasks of an example have written."""
    texts = [path.read_text(encoding="utf-8") for path in directory.glob("*.log")]
    return "".join(texts).splitlines()


@pytest.mark.parametrize("name", FOLLOWED)
def test_requests_are_followed_up_in_order(name: str, tmp_path: Path) -> None:
    expected: list[str] = []

    def are_done() -> bool:
        return len(written(tmp_path)) == len(expected)

    with serving(name, tmp_path) as server:
        for path, lines in FOLLOWED[name].items():
            response = httpx2.post(server.url + path.format(7))
            assert response.status_code in (201, 202)
            expected += [line.format(7) for line in lines]
            wait_until(are_done)
        assert httpx2.get(f"{server.url}/elsewhere").status_code == 404
    assert written(tmp_path) == expected + CLOSED.get(name, [])


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_accepted_is_done_before_the_process_ends(
    name: str, tmp_path: Path
) -> None:
    groups: list[list[str]] = []
    with serving(name, tmp_path) as server, httpx2.Client() as client:
        for number in range(10):
            for path, lines in FOLLOWED[name].items():
                response = client.post(server.url + path.format(number))
                assert response.status_code in (201, 202)
                groups.append([line.format(number) for line in lines])
    lines = written(tmp_path)
    for closed in CLOSED.get(name, []):
        assert lines.pop() == closed
    assert sorted(lines) == sorted(line for group in groups for line in group)
    for group in groups:
        assert group == [line for line in lines if line in group]


def test_the_health_endpoint_lists_what_is_running_and_waiting(tmp_path: Path) -> None:
    with serving("healthz", tmp_path) as server:

        def upload() -> dict[str, Any]:
            assert httpx2.post(f"{server.url}/photos/cat").status_code == 202
            report: dict[str, Any] = httpx2.get(f"{server.url}/healthz").json()
            return report if report["waiting_tasks"] else {}

        # Again, should the machine have been so slow that nothing is left to be seen.
        report = wait_until(upload)
        tasks = report["tasks"]
        assert tasks
        assert report["running_groups"] >= 1
        assert report["waiting_groups"] == 0
        assert {task["state"] for task in tasks} <= {"running", "pending"}
        for task in tasks:
            assert task["name"] == "__main__.make_thumbnail"
            assert (task["method"], task["path"]) == ("POST", "/photos/cat")
            assert 0 <= task["age"] < 60
        assert len({task["id"] for task in tasks}) == len(tasks)
        idle: dict[str, object] = {**Status(0, 0, 0, 0)._asdict(), "tasks": []}
        wait_until(lambda: httpx2.get(f"{server.url}/healthz").json() == idle)


def test_the_metrics_tell_how_tasks_have_ended(tmp_path: Path) -> None:
    ended = [
        'postlude_tasks_finished_total{outcome="succeeded",task="send_receipt"} 2.0',
        'postlude_tasks_finished_total{outcome="succeeded",task="book_courier"} 1.0',
        'postlude_tasks_finished_total{outcome="failed",task="book_courier"} 1.0',
    ]
    with serving("metrics", tmp_path, fails=True) as server:
        for number in 6, 7:
            assert httpx2.post(f"{server.url}/orders/{number}").status_code == 202

        def have_ended() -> bool:
            metrics = httpx2.get(f"{server.url}/metrics").text.splitlines()
            return {*ended} <= {*metrics}

        wait_until(have_ended)
    assert "LookupError: no courier for order 6\n" in server.output


def test_the_spans_of_tasks_are_linked_from_one_to_the_next(tmp_path: Path) -> None:
    with serving("tracing", tmp_path, fails=True) as server:
        assert httpx2.post(f"{server.url}/orders/7").status_code == 202
        wait_until(lambda: '"name": "archive"' in server.output)
        # What is printed of a span is printed in one piece.
        objects = re.findall(r"^\{\n.*?^\}$", server.output, re.DOTALL | re.MULTILINE)
    spans = {span["name"]: span for span in map(json.loads, objects)}

    def links(name: str) -> list[str]:
        return [link["context"]["span_id"] for link in spans[name]["links"]]

    def span_id(name: str) -> str:
        found: str = spans[name]["context"]["span_id"]
        return found

    assert links("send_receipt") == [span_id("POST /orders")]
    assert links("archive") == [span_id("send_receipt")]
    assert spans["smtp"]["parent_id"] == span_id("send_receipt")
    assert spans["send_receipt"]["parent_id"] is None
    status = spans["archive"]["status"]
    assert status["status_code"] == "ERROR"
    assert status["description"] == "OSError: the archive is full"


def test_what_fails_is_tried_again_by_whichever_library(tmp_path: Path) -> None:
    with serving("retries", tmp_path) as server:
        assert httpx2.post(f"{server.url}/orders/7").status_code == 202
        # The tasks are drained when the server stops.
    assert re.findall(r"(?m)^(\w+) .*order 7 at try 3$", server.output) == [
        "sent",
        "packed",
        "booked",
        "printed",
    ]


# --- FastAPI -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "query", "message", "lines"),
    [
        (
            "fastapi_notification",
            "",
            "Notification sent in the background",
            ["notification for ada@example.org: some notification"],
        ),
        (
            "fastapi_dependency",
            "?q=postlude",
            "Message sent",
            ["found query: postlude", "message to ada@example.org"],
        ),
    ],
)
def test_the_tutorial_of_fastapi_works(
    name: str, query: str, message: str, lines: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    with serving(name, tmp_path) as server:
        path = f"/send-notification/ada@example.org{query}"
        response = httpx2.post(server.url + path)
        assert (response.status_code, response.json()) == (200, {"message": message})
        wait_until(lambda: log.exists() and log.read_text().splitlines() == lines)


def test_a_sign_up_is_committed_welcomed_cached_and_audited(tmp_path: Path) -> None:
    smtp = [sys.executable, "-m", "aiosmtpd", "--nosetuid", "--listen"]
    with (
        start([*smtp, "127.0.0.1:{port}"], log=tmp_path / "mail") as mail,
        serving("fastapi_app", tmp_path, SMTP_PORT=str(mail.port)) as server,
    ):

        def cached(name: str) -> object:
            return httpx2.get(f"{server.url}/cache").json().get(name)

        for name in "eve", "ada":
            assert httpx2.post(f"{server.url}/users/{name}").status_code == 201
        assert httpx2.post(f"{server.url}/users/ada").status_code == 409
        assert httpx2.post(f"{server.url}/uploads/app").status_code == 422
        files = {"file": b"1\n2\n3\n"}
        response = httpx2.post(f"{server.url}/uploads/app", files=files)
        assert response.status_code == 202
        wait_until(lambda: cached("app") == 3)
        wait_until(lambda: cached("users") == ["ada", "eve"])
        wait_until(lambda: mail.output.count("Welcome, ada!") == 1)
    assert mail.output.count("Welcome, eve!") == 1
    audited = [line for line in written(tmp_path) if not line.startswith("GET")]
    assert sorted(audited) == [
        *["POST /uploads/app"] * 2,
        *["POST /users/ada"] * 2,
        "POST /users/eve",
    ]


def test_a_task_that_takes_too_long_fails_and_leaves_its_thread(tmp_path: Path) -> None:
    with serving("limits", tmp_path, fails=True) as server:

        def status() -> dict[str, int]:
            report: dict[str, int] = httpx2.get(f"{server.url}/status").json()
            return report

        for city in ["Atlantis", *["Paris"] * 5]:
            assert httpx2.post(f"{server.url}/orders/{city}").status_code == 202
        wait_until(lambda: status()["threads_left_behind"])
        wait_until(lambda: not status()["threads_left_behind"])
        # Then it is the turn of what has waited for the thread's place.
        wait_until(lambda: not status()["running_groups"])
        report = status()
        assert (report["now"], report["most"]) == (0, 2)
        for name in "call_courier", "print_label":
            assert f"in background task '__main__.{name}'\n" in server.output
        assert server.output.count("printed the label for Paris") == 5
        assert "a courier goes to Atlantis" not in server.output
        assert "printed the label for Atlantis" in server.output


def test_cpu_bound_work_is_done_in_another_process(tmp_path: Path) -> None:
    with serving("cpu_bound", tmp_path) as server:
        url = f"{server.url}/primes/1000"
        assert httpx2.get(url).json()["state"] is None
        assert httpx2.post(url).status_code == 202
        wait_until(lambda: httpx2.get(url).json()["state"] == "succeeded")
        report = httpx2.get(url).json()
        assert report["primes"].startswith("168 (by process ")
        assert str(report["server"]) not in report["primes"]


def upload(server: Server) -> dict[str, str]:
    response = httpx2.post(f"{server.url}/photos/cat")
    assert response.status_code == 202
    receipt: dict[str, str] = response.json()
    return receipt


def are_made(log: Path, process: int) -> bool:
    made = [f"process {process} made cat, {width} wide" for width in (64, 1024)]
    return {*made} <= {*log.read_text(encoding="utf-8").splitlines()}


def test_without_the_setting_a_function_runs_in_the_server(tmp_path: Path) -> None:
    with serving("engine_switch", tmp_path) as server:
        assert upload(server)["engine"] == "here"
        wait_until(lambda: are_made(server.log, server.process.pid))


def test_one_setting_moves_a_function_to_the_worker(tmp_path: Path) -> None:
    def waiting() -> list[Path]:
        return sorted(tmp_path.glob("*.call"))

    with serving("engine_switch", tmp_path, ENGINE="spool") as server:
        receipt = upload(server)
        wait_until(lambda: len(waiting()) == 2)
    assert receipt == {"engine": "spool", "id": waiting()[0].stem}
    log = tmp_path / "worker.log"
    directory = str(example("engine_switch").parent)
    code = f"import sys; sys.path.insert(0, {directory!r})\n"
    code += "import engine_switch; engine_switch.work()"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"ENGINE": "spool", "TMPDIR": str(tmp_path)},
            stdout=output,
        ) as worker,
    ):
        try:
            wait_until(lambda: are_made(log, worker.pid) and not waiting())
        finally:
            worker.kill()
