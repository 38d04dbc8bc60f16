"""What becomes of tasks on real servers when those are told to stop."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from servers import HERE, Server, command_of, serve, wait_until

DETACHED = {"DETACH": "1"}
in_each_mode = pytest.mark.parametrize(
    "mode", [{}, DETACHED], ids=["attached", "detached"]
)

# How long servers wait for requests in any case: uvicorn for ever, hypercorn for 3 s,
# granian not at all, gunicorn for 30 s.
UVICORN_1_S = "uvicorn --timeout-graceful-shutdown=1"
UVICORN_H11_1_S = "uvicorn h11 --timeout-graceful-shutdown=1"
HYPERCORN_1_S = "hypercorn --graceful-timeout=1"
HYPERCORN_UVLOOP_1_S = "hypercorn uvloop --graceful-timeout=1"
HYPERCORN_TRIO_1_S = "hypercorn trio --graceful-timeout=1"

LOST = re.compile("^ERROR postlude: .* lost.*: (.*)$", re.MULTILINE)
WAITING = "shutdown waits for background tasks"


class Told(NamedTuple):
    """What became of the tasks of one kind.

    Attributes:
        done: The numbers of those that ended.
        lost: The numbers of those that `on_lost` was told of.
        states: Where those stood that the log names.
    """

    done: list[int]
    lost: list[int]
    states: list[str]


def told(server: Server, kind: str) -> Told:
    name, end = ("work", "") if kind == "sync" else ("work_async", " async")
    output = server.output
    done, lost = (
        [int(n) for n in re.findall(rf"^{what} (\d+){end}$", output, re.MULTILINE)]
        for what in ("did", "lost")
    )
    records = LOST.findall(output)
    assert len(records) <= 1, output
    states = re.findall(rf"'served\.{name}' \(([\w ]+)\)", "".join(records))
    return Told(done, lost, states)


def logged(server: Server, text: str, times: int = 1) -> Callable[[], bool]:
    return lambda: server.output.count(text) >= times


def start_tasks(server: Server, number: int = 50) -> None:
    """Has a group of each kind of task started, and waits for their third tasks."""
    for kind in "sync", "async":
        assert httpx2.get(f"{server.url}/many?{kind}&number={number}").text == "many"
    wait_until(lambda: {"did 2", "did 2 async"} <= {*server.output.splitlines()})


def assert_all_done(server: Server, number: int = 50) -> None:
    for kind in "sync", "async":
        assert told(server, kind) == ([*range(number)], [], []), server.output
    # The application's own shutdown comes last, and is waited for as well.
    assert re.findall("^(did|closed)", server.output, re.MULTILINE)[-1] == "closed"


def assert_the_rest_is_named(server: Server, number: int = 50) -> None:
    for kind in "sync", "async":
        done, lost, states = told(server, kind)
        assert {*done} | {*lost} == {*range(number)}, server.output
        assert 3 <= len(done) < number
        assert len(states) == len(lost) == len({*lost})
        assert {*states} <= {"pending", "running", "in a thread"}
        # What a thread is about may end after that has been said.
        assert len(done) + len(lost) - number <= states.count("in a thread")


@in_each_mode
@pytest.mark.parametrize(
    "name",
    [
        "uvicorn",
        UVICORN_H11_1_S,
        "hypercorn",
        HYPERCORN_UVLOOP_1_S,
        HYPERCORN_TRIO_1_S,
        "granian",
        "gunicorn",
        "gunicorn uvicorn",
    ],
)
def test_each_task_ends_before_the_process_does(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode) as server:
        start_tasks(server)
        server.stop(seconds=30)
        assert_all_done(server)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("uvicorn", DETACHED),
        (UVICORN_H11_1_S, {}),
        (UVICORN_H11_1_S, DETACHED),
        (HYPERCORN_1_S, {}),
        (HYPERCORN_1_S, DETACHED),
        (HYPERCORN_TRIO_1_S, {}),
        (HYPERCORN_TRIO_1_S, DETACHED),
        ("granian", {}),
        ("granian", DETACHED),
        ("gunicorn", {}),
        ("gunicorn", DETACHED),
        ("gunicorn uvicorn", DETACHED),
    ],
)
def test_what_there_is_no_time_for_is_named(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode, DRAIN_TIMEOUT="1") as server:
        start_tasks(server)
        signalled = time.monotonic()
        server.stop(seconds=30)
        assert time.monotonic() - signalled < 4
        assert_the_rest_is_named(server)
        assert server.output.rindex("closed") > server.output.rindex("lost")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["uvicorn", "gunicorn uvicorn"])
def test_uvicorn_waits_for_requests_and_so_for_attached_tasks_before_it_drains(
    name: str, by: signal.Signals, tmp_path: Path
) -> None:
    with serve(name, tmp_path, DRAIN_TIMEOUT="0") as server:
        start_tasks(server, 15)
        server.signal_all(by)
        server.process.wait(timeout=20)
        assert_all_done(server, 15)


@in_each_mode
@pytest.mark.parametrize(
    "name",
    [UVICORN_1_S, UVICORN_H11_1_S, HYPERCORN_1_S, "granian", "gunicorn"],
)
def test_a_cancelled_task_has_time_to_tidy_up(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode, DRAIN_TIMEOUT="0") as server:
        assert httpx2.get(f"{server.url}/tidying").text == "tidying"
        wait_until(logged(server, "begins"))
        server.stop()
        assert LOST.findall(server.output) == ["'served.tidy_up' (running)"]
        assert server.output.index("tidied up") < server.output.index("closed")


@in_each_mode
@pytest.mark.parametrize(
    "name", [UVICORN_1_S, HYPERCORN_1_S, HYPERCORN_TRIO_1_S, "granian", "gunicorn"]
)
def test_a_thread_that_holds_the_process_up_is_named(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode, DRAIN_TIMEOUT="0") as server:
        assert httpx2.get(f"{server.url}/held?sync&number=7").text == "held"
        wait_until(logged(server, "holds 7"))
        server.process.send_signal(signal.SIGTERM)
        wait_until(logged(server, "closed"))
        assert LOST.findall(server.output) == ["'served.hold' (in a thread)"]
        if name == UVICORN_1_S:
            # In the end it sends itself the signal that it got, and no thread survives
            # that.
            assert server.process.wait(timeout=10) == -signal.SIGTERM
            return
        assert server.process.poll() is None
        (tmp_path / "release").touch()
        server.process.wait(timeout=10)
        assert "did 7" in server.output


@pytest.mark.parametrize(
    ("name", "mode", "until"),
    [
        # What has been logged when the second one comes.
        ("uvicorn", DETACHED, WAITING),
        ("hypercorn", {}, "did 5"),
        ("hypercorn", DETACHED, WAITING),
        ("hypercorn trio", {}, "did 5"),
        ("hypercorn trio", DETACHED, WAITING),
        ("granian", {}, WAITING),
        ("granian", DETACHED, WAITING),
        ("gunicorn uvicorn", DETACHED, WAITING),
    ],
)
def test_a_second_ctrl_c_changes_nothing_while_tasks_are_waited_for(
    name: str, mode: dict[str, str], until: str, tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode) as server:
        start_tasks(server, 15)
        server.signal_all(signal.SIGINT)
        wait_until(logged(server, until))
        server.signal_all(signal.SIGINT)
        server.process.wait(timeout=20)
        assert_all_done(server, 15)


@pytest.mark.parametrize(
    ("name", "mode", "times"),
    [
        ("uvicorn", {}, 2),
        ("uvicorn h11", {}, 2),
        ("gunicorn", {}, 1),
        ("gunicorn", DETACHED, 1),
    ],
)
def test_what_is_left_is_named_when_ctrl_c_skips_the_shutdown(
    name: str, mode: dict[str, str], times: int, tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode) as server:
        start_tasks(server)
        server.signal_all(signal.SIGINT)
        if times > 1:
            wait_until(logged(server, "CTRL+C to force quit"))
            server.signal_all(signal.SIGINT)
        server.process.wait(timeout=10)
        assert_the_rest_is_named(server)
        assert "closed" not in server.output


@pytest.mark.parametrize(
    "name", ["uvicorn", "hypercorn", "hypercorn trio", "granian", "gunicorn uvicorn"]
)
def test_an_error_at_startup_is_the_same_without_the_middleware(name: str) -> None:
    ends: list[tuple[int, list[str]]] = []
    for app in "served:app", "served:owned":
        command = [part.replace("{port}", "0") for part in command_of(name, app)]
        ended = subprocess.run(
            [sys.executable, "-m", *command],
            env=os.environ | {"BROKEN": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
            timeout=60,
        )
        errors = re.findall(r"\w+(?:Error|Group)\b", ended.stdout)
        ends.append((ended.returncode, errors))
    without, (code, errors) = ends
    assert (code, errors) == without
    assert "LookupError" in errors
    if name == "uvicorn":
        assert code == 3
        assert {*errors} == {"LookupError"}


@in_each_mode
@pytest.mark.parametrize("name", ["uvicorn", "granian", "gunicorn", "gunicorn uvicorn"])
def test_each_worker_process_waits_for_its_tasks(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(f"{name} --workers=2", tmp_path, **mode) as server:
        wait_until(logged(server, "opened", 2))
        for _ in range(8):
            httpx2.get(f"{server.url}/many?number=15")
        wait_until(logged(server, "did 2 async", 8))
        assert server.output.count("did") < 8 * 15
        server.stop(seconds=30)
        assert server.output.count("did") == 8 * 15
        assert server.output.count("closed") == 2
        assert "lost" not in server.output


@in_each_mode
@pytest.mark.parametrize(
    "name",
    [
        "uvicorn --workers=2",
        # With a worker process hypercorn dies of that.
        "hypercorn --workers=0",
        *["granian", "gunicorn", "gunicorn uvicorn"],
    ],
)
def test_workers_may_get_the_signal_beside_their_master(
    name: str, mode: dict[str, str], tmp_path: Path
) -> None:
    with serve(name, tmp_path, **mode) as server:
        start_tasks(server, 10)
        server.signal_all(signal.SIGTERM)
        server.process.wait(timeout=30)
        assert_all_done(server, 10)


@in_each_mode
def test_tasks_end_before_uvicorn_reloads(mode: dict[str, str], tmp_path: Path) -> None:
    source, _ = [
        Path(shutil.copy(HERE / name, tmp_path)) for name in ("served.py", "chores.py")
    ]
    reloading = f"uvicorn --app-dir={tmp_path} --reload --reload-dir={tmp_path}"
    with serve(reloading, tmp_path, **mode) as server:
        start_tasks(server, 15)
        source.touch()
        wait_until(logged(server, "opened", 2))
        before, _, _ = server.output.rpartition("opened")
        assert before.count("did") == 30
        assert before.rindex("closed") > before.rindex("did")
        assert httpx2.get(f"{server.url}/plain").text == "plain"
