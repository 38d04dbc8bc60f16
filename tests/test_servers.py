"""Tasks on real servers: what runs, and what it does to connections and to the rest."""

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from servers import COMMANDS, Server, serve, wait_until

SERVERS = [name for name in COMMANDS if name != "hypercorn uvloop"]

on_each_server = pytest.mark.parametrize("name", SERVERS)
in_each_mode = pytest.mark.parametrize(
    "mode", [{}, {"DETACH": "1"}], ids=["attached", "detached"]
)


def logged(server: Server, text: str, times: int = 1) -> Callable[[], bool]:
    return lambda: server.output.count(text) >= times


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


@pytest.mark.parametrize("name", [name for name in COMMANDS if "gunicorn" not in name])
def test_siblings_of_failing_tasks_run_on_each_server(
    name: str, tmp_path: Path
) -> None:
    with serve(name, tmp_path, app="served:app") as server:
        for _ in range(2):
            assert httpx2.get(f"{server.url}/failing").text == "failing"
        wait_until(logged(server, "did 2", 2))
        assert server.output.count("did 1") == 2
        failed = "2 background tasks failed: 'served.break_down', 'served.leave'"
        wait_until(logged(server, failed, 2))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    "name",
    [
        "uvicorn --timeout-graceful-shutdown=1",
        "uvicorn h11 --timeout-graceful-shutdown=1",
        "hypercorn --graceful-timeout=1",
    ],
)
def test_what_a_server_cuts_off_is_named(name: str, kind: str, tmp_path: Path) -> None:
    with serve(name, tmp_path, app="served:app") as server:
        assert httpx2.get(f"{server.url}/many?{kind}").text == "many"
        wait_until(logged(server, "did 2"))
        server.stop()
        [record] = re.findall(
            "background tasks cut short by CancelledError: .*", server.output
        )
        done = re.findall(r"did \d+", server.output)
        named = re.findall(r"'served\.work\w*' \([\w ]*\)", record)
        # A thread may still end what it was about.
        assert 50 <= len(done) + len(named) <= (51 if kind == "sync" else 50)
        assert 5 < len(done) < 50
        assert record.endswith("'served.clean' (runs all the same)")


@in_each_mode
@on_each_server
def test_a_failing_task_costs_no_request_on_its_connection(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    async def ask_often(*paths: str) -> list[object]:
        answers: list[object] = []
        async with httpx2.AsyncClient(base_url=server.url) as client:
            for path in paths:
                requests = [client.get(path) for _ in range(10)]
                answers += await asyncio.gather(*requests, return_exceptions=True)
        return [getattr(answer, "text", answer) for answer in answers]

    with serve(name, tmp_path, **mode) as server, server.connect() as connection:
        # One that is in flight when the task fails, and one that waits behind it.
        connection.sendall(get("/failing_watched") + get("/watching") + get("/plain"))
        received = read_until(connection, b"plain")
        assert received.count(b"HTTP/1.1 200") == 3
        bodies = re.findall(rb"\r\n\r\n(failing|watching|plain)", received)
        assert bodies == [b"failing", b"watching", b"plain"]
        wait_until(logged(server, "ValueError: broken"))
        # The next one, and a pool of connections.
        connection.sendall(get("/plain"))
        assert b"HTTP/1.1 200" in read_until(connection, b"plain")
        expected = ["failing"] * 10 + ["plain"] * 10
        assert asyncio.run(ask_often("/failing", "/plain")) == expected
        wait_until(logged(server, "did 2", 10))


@in_each_mode
@on_each_server
def test_a_server_and_other_tasks_live_on_after_sys_exit_in_a_task(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode) as server:
        for kind in "sync", "async":
            httpx2.get(f"{server.url}/held?{kind}&number=2")
        wait_until(logged(server, "holds 2", 2))
        assert httpx2.get(f"{server.url}/leaving").text == "leaving"
        wait_until(logged(server, "did 1"))
        for task in "served.leave", "served.leave_async":
            assert f"background task '{task}' raised SystemExit" in server.output
        assert httpx2.get(f"{server.url}/plain").text == "plain"
        assert "did 2" not in server.output
        (tmp_path / "release").touch()
        wait_until(logged(server, "did 2", 2))
        assert server.output.count("opened") == 1
        assert "closed" not in server.output


@in_each_mode
@on_each_server
def test_what_a_response_called_runs_though_its_client_resets_the_connection(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode) as server:
        for number in range(12):
            # What is left of the large one does not fit into the buffers between.
            size = 10_000_000 if number % 2 else 1
            with server.connect() as connection:
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                connection.sendall(get(f"/called?number={number}&size={size}"))
                # Otherwise some servers have not even read the request by then.
                if number >= 4:
                    connection.recv(1)
        server.stop(seconds=30)
        called = {*re.findall(r"called (\d+)", server.output)}
        assert called >= {"4", "6", "8", "10"}
        for kind in "", " async":
            did = re.findall(rf"did (\d+){kind}\n", server.output)
            assert called <= {*did}
            assert len(did) == len({*did})


@in_each_mode
def test_a_task_whose_client_has_left_is_not_cut_off(
    mode: dict[str, str], tmp_path: Path
) -> None:
    # This one cancels requests 3 s after that.
    with serve("gunicorn", tmp_path, **mode) as server:
        with server.connect() as connection:
            connection.sendall(get("/slow"))
            read_until(connection, b"slow")
        wait_until(logged(server, "begins"))
        wait_until(logged(server, "took 6 s"), seconds=20)


@in_each_mode
def test_sync_endpoints_answer_while_all_threads_of_tasks_are_busy(
    mode: dict[str, str], tmp_path: Path
) -> None:
    with serve("uvicorn", tmp_path, **mode) as server, httpx2.Client() as client:
        for number in range(45):
            client.get(f"{server.url}/held?sync&number={number}")
        wait_until(logged(server, "holds", 40))
        for _ in range(5):
            assert client.get(f"{server.url}/plain").text == "plain"
        assert server.output.count("holds") == 40
        (tmp_path / "release").touch()
        wait_until(logged(server, "did", 45))


@in_each_mode
def test_running_tasks_count_as_requests_only_if_attached(
    mode: dict[str, str], tmp_path: Path
) -> None:
    with serve("uvicorn --limit-concurrency=5", tmp_path, **mode) as server:
        for number in range(5):
            assert httpx2.get(f"{server.url}/held?number={number}").text == "held"
            wait_until(logged(server, "holds", number + 1))
        status = 200 if mode else 503
        assert httpx2.get(f"{server.url}/plain").status_code == status
