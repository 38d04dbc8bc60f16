"""Tasks in processes of their own, what ends those, and what they leave behind."""

import asyncio
import functools
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import anyio
import chores
import httpx2
import pytest
from loops import SECONDS, until
from places import Place
from servers import serve, wait_until

from postlude import (
    BackgroundTask,
    BackgroundTasks,
    _limits,
    _processes,
    _worker,
    task,
)
from postlude._processes import Worker

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="signals and groups of processes"
)

Records = Callable[[str], list[str]]

alone = pytest.mark.parametrize("place", [None], ids=["alone"], indirect=True)
supervised = pytest.mark.parametrize("place", [False], ids=["attached"], indirect=True)
on_one = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.fixture(autouse=True)
def no_workers() -> Generator[None]:
    """Leaves no process to the next test."""
    yield
    Worker.dismiss_idle()


def in_process(func: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return task(process=True, **options)(functools.partial(func, *args))


def group_of(*funcs: Callable[[], Any], concurrency: int = 1) -> BackgroundTasks:
    group = BackgroundTasks(concurrency=concurrency)
    for func in funcs:
        group.add_task(func)
    return group


def failures(group: BackgroundTasks) -> list[Any]:
    return [getattr(one, "exception", None) for one in group.tasks]


def exists(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether there is such a process that is none: nobody may wait for orphans."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return sys.platform != "linux" and exists(pid)
    return "State:\tZ" not in status


def text_in(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def pid_in(path: Path) -> int:
    return int(text_in(path))


# --- what concerns one task alone ----------------------------------------------------

# The call, and what it fails with.
ENDS: dict[str, tuple[tuple[Any, ...], type[Exception] | None, str | None]] = {
    "os._exit": ((os._exit, 3), RuntimeError, "its process ended with exit code 3"),
    "SIGKILL": (
        (chores.kill, signal.SIGKILL),
        RuntimeError,
        "its process ended with exit code -9",
    ),
    "sys.exit": (
        (sys.exit, "reason"),
        RuntimeError,
        "its process raised SystemExit: reason",
    ),
    "exception": ((chores.throw, ValueError, "wrong"), ValueError, "wrong"),
    "BaseException": (
        (chores.throw, chores.Fatal, "wrong"),
        RuntimeError,
        "its process raised Fatal: wrong",
    ),
    "two arguments": (
        (chores.throw, chores.TwoArguments, 1, "text"),
        RuntimeError,
        "its process raised TwoArguments: text",
    ),
    "unpicklable": (
        (chores.throw, chores.Unpicklable),
        RuntimeError,
        "its process raised Unpicklable: it has a lock",
    ),
    "unprintable": ((chores.throw, chores.Unprintable), chores.Unprintable, None),
    "death by an argument": (
        (print, chores.Remade(os._exit, 6)),
        RuntimeError,
        "its process ended with exit code 6",
    ),
    "failure by an argument": (
        (print, chores.Remade(chores.throw, ValueError, "wrong")),
        ValueError,
        "wrong",
    ),
    "awaitable": (
        (chores.return_awaitable,),
        TypeError,
        "it returned something to be awaited, which no process does",
    ),
    "fork": ((chores.leave_fork,), RuntimeError, "its process ended with exit code 4"),
    "fork that is ended": ((chores.fork_and_terminate,), None, None),
    "SIGINT": ((chores.kill, signal.SIGINT), None, None),
    "SIGTERM": ((chores.kill, signal.SIGTERM), None, None),
    "unpicklable result": ((chores.return_lambda,), None, None),
    "prints": ((chores.flood,), None, None),
}


@pytest.mark.anyio
async def test_what_happens_to_a_process_concerns_its_task_alone(
    place: Place, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    calls = [call for call, _, _ in ENDS.values()]
    group = group_of(*[in_process(*call) for call in calls])
    for _ in ENDS:
        group.add_task(in_process(chores.write, str(written), "next"))
    # A fork that kept the process's pipe would hold everything up for longer.
    with anyio.fail_after(25):
        await place.run(group)
    for failure, (name, (_, kind, text)) in zip(
        failures(group), ENDS.items(), strict=False
    ):
        assert type(failure) is (type(None) if kind is None else kind), name
        assert text is None or str(failure) == text
        if kind is not None and "ended" not in str(text):
            notes = "".join(getattr(failure, "__notes__", ()))
            assert "in its process:\nTraceback" in notes
            assert "in background task " in notes
    assert failures(group)[len(ENDS) :] == [None] * len(ENDS)
    assert written.read_text(encoding="utf-8") == "next"


@alone
@pytest.mark.anyio
async def test_what_a_call_leaves_in_its_process_does_not_harm_the_next(
    place: Place, tmp_path: Path
) -> None:
    group = group_of(in_process(chores.die_later))
    await place.run(group)
    [worker] = Worker._idle
    # It dies when nobody looks.
    worker.process.wait()
    worker.process.returncode = None
    group = group_of(in_process(chores.write, str(tmp_path / "written")))
    await place.run(group)
    assert failures(group) == [None]
    assert worker not in Worker._idle


# --- what is called, and with what ---------------------------------------------------


@alone
@on_one
@pytest.mark.anyio
async def test_each_kind_of_callable_goes_to_a_process(
    place: Place, tmp_path: Path
) -> None:
    paths = [str(tmp_path / str(number)) for number in range(8)]
    chore = chores.Chores(paths[0])
    partial = functools.partial(task(timeout=SECONDS)(functools.partial(chores.write)))
    group = BackgroundTasks()
    declare = task(process=True)
    group.add_task(declare(chore))
    group.add_task(declare(chores.Chores(paths[1]).method), "method")
    group.add_task(declare(chores.Chores.class_method), paths[2])
    group.add_task(declare(functools.partial(chores.Chores.static, paths[3])))
    group.add_task(declare(functools.partial(partial, paths[4])), "partial")
    declared = chores.Declared()
    group.add_task(declared, paths[5])
    group.add_task(declared.method, paths[6])
    group.add_task(declare(os.mkdir), paths[7])
    await place.run(group)
    assert failures(group) == [None] * 8
    texts = ["called", "method", "Chores", "static", "partial", "itself", "its method"]
    assert [text_in(Path(path)) for path in paths[:7]] == texts


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "what"),
    [
        (lambda: None, [], {}, "the function cannot"),
        (print, [1, threading.Lock()], {}, "argument 2 cannot"),
        (print, [], {"end": threading.Lock()}, "argument 'end' cannot"),
        (functools.partial(print, threading.Lock()), [], {}, "the function cannot"),
    ],
    ids=["function", "argument", "named argument", "partial"],
)
def test_what_cannot_be_pickled_is_refused_when_it_is_added(
    func: Any, args: list[Any], kwargs: dict[str, Any], what: str
) -> None:
    declared: Any = task(process=True, name="name")(functools.partial(func))
    with pytest.raises(TypeError, match=f"name has process=True, and {what} be pic"):
        BackgroundTasks().add_task(declared, *args, **kwargs)


def test_what_cannot_be_pickled_only_as_a_whole_is_refused_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dumps(value: object) -> bytes:
        if type(value) is tuple:
            raise RecursionError("too deep")
        return b""

    monkeypatch.setattr(pickle, "dumps", dumps)
    with pytest.raises(TypeError, match="name cannot be pickled: too deep"):
        _processes.pickle_call(print, (), {}, "name")


@alone
@pytest.mark.anyio
async def test_arguments_are_those_of_the_moment_of_adding(
    place: Place, tmp_path: Path
) -> None:
    texts = ["then"]
    path = tmp_path / "written"
    group = BackgroundTasks()
    group.add_task(
        task(process=True)(functools.partial(chores.write)), str(path), texts
    )
    texts.append("now")
    await place.run(group)
    assert text_in(path) == "['then']"


@alone
@on_one
@pytest.mark.anyio
async def test_a_task_that_no_constructor_has_seen_is_pickled_in_the_end(
    place: Place, tmp_path: Path
) -> None:
    path = str(tmp_path / "written")

    class Bare(BackgroundTask):
        def __init__(self, func: Callable[..., Any], *args: Any) -> None:
            self.func, self.args, self.kwargs = func, args, {}
            self.is_async = False

    tasks = [Bare(in_process(chores.write, path)), Bare(in_process(lambda: None))]
    group = BackgroundTasks(tasks)
    await place.run(group)
    assert tasks[0].exception is None
    assert "the function cannot be pickled" in str(tasks[1].exception)


# --- time limits, cancellation -------------------------------------------------------


@pytest.mark.anyio
async def test_a_process_that_takes_too_long_is_killed_with_what_it_has_started(
    place: Place, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    chore = in_process(chores.hold_child, str(path), timeout=1)
    group = group_of(chore, in_process(chores.write, str(tmp_path / "written")))
    await place.run(group)
    [failure, nothing] = failures(group)
    assert isinstance(failure, TimeoutError)
    assert str(failure) == "timed out after 1 s"
    assert nothing is None
    await until(lambda: not is_running(pid_in(path)))


@alone
@on_one
@pytest.mark.anyio
async def test_the_start_of_a_process_does_not_count(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Worker.__init__

    def start_slowly(self: Worker) -> None:
        start(self)
        time.sleep(0.6)

    monkeypatch.setattr(Worker, "__init__", start_slowly)
    group = group_of(in_process(int, timeout=0.5))
    await place.run(group)
    assert failures(group) == [None]


@alone
@pytest.mark.anyio
async def test_a_process_is_killed_when_its_task_is_cancelled(
    place: Place, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    group = group_of(in_process(chores.burn, str(path)))
    async with anyio.create_task_group() as children:
        children.start_soon(group)
        await until(path.exists)
        children.cancel_scope.cancel()
    await until(lambda: not exists(pid_in(path)))
    assert not Worker._idle


@supervised
@pytest.mark.anyio
async def test_a_process_that_has_no_time_to_end_is_lost_and_killed(
    place: Place, tmp_path: Path, records: Records
) -> None:
    path = tmp_path / "pid"
    group = group_of(in_process(chores.hold, str(path), name="hold"))
    async with anyio.create_task_group() as children, place.open(drain_timeout=0):
        children.start_soon(place.start, group)
        await until(path.exists)
    assert records("ERROR") == ["1 background tasks lost: 'hold' (running)"]
    await until(lambda: not exists(pid_in(path)))


@on_one
@pytest.mark.anyio
@pytest.mark.parametrize("phase", ["_take_worker", "_run"])
async def test_a_process_that_was_not_told_to_begin_in_time_serves_others(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Callable[[], Any]] = []
    in_thread = _limits._in_thread

    async def delay(func: Callable[[], Any]) -> Any:
        if func.__name__ == phase:
            late.append(func)
            await anyio.sleep_forever()
        return await in_thread(func)

    monkeypatch.setattr(_limits, "_in_thread", delay)
    request = asyncio.ensure_future(group_of(in_process(os._exit, 1))())
    await until(lambda: late)
    # A scope does not end the start of a process.
    request.cancel()
    await asyncio.wait([request])
    assert await in_thread(late[0]) is None
    monkeypatch.undo()
    [worker] = Worker._idle
    await group_of(in_process(int))()
    assert [worker] == Worker._idle


# --- idle processes ------------------------------------------------------------------


@alone
@on_one
@pytest.mark.anyio
async def test_processes_are_used_again_and_dismissed_when_they_have_been_idle(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [in_process(time.sleep, 0.2)] * 2
    await place.run(group_of(*work, concurrency=2))
    first, second = Worker._idle
    await place.run(group_of(*work))
    assert [first, second] == Worker._idle
    monkeypatch.setattr(_processes, "_IDLE_SECONDS", -1)
    await place.run(group_of(*work[:1]))
    assert [second] == Worker._idle
    assert not exists(first.process.pid)
    Worker.dismiss_idle()
    assert not exists(second.process.pid)


def test_a_fork_of_the_server_leaves_its_processes_alone() -> None:
    worker, _ = Worker.take(pickle.dumps((int, (), {})))
    worker.run()
    worker.give_back()
    if (pid := os.fork()) == 0:
        os._exit(len(Worker._idle))
    assert os.waitpid(pid, 0)[1] == 0
    assert Worker.take(pickle.dumps((int, (), {})))[0] is worker
    worker.dismiss()


def test_a_process_that_does_not_end_by_itself_is_killed() -> None:
    worker, _ = Worker.take(pickle.dumps((os.closerange, (3, 100), {})))
    assert str(worker.run()).startswith("its process ended with exit code ")
    assert not exists(worker.process.pid)


# --- the worker's own side -----------------------------------------------------------


def test_a_worker_answers_until_there_is_nothing_to_be_read() -> None:
    calls: dict[tuple[Any, ...], str | None] = {
        (chores.return_lambda,): None,
        (chores.throw, ValueError, "wrong"): "ValueError: wrong",
        (chores.throw, chores.TwoArguments, 1, "wrong"): "TwoArguments: wrong",
        (chores.throw, chores.Unprintable): "Unprintable",
        (chores.throw, chores.Altered): "Altered: it is another",
        (chores.return_awaitable,): "TypeError: it returned something to be awaited, "
        "which no process does",
    }
    requests: list[object] = [_processes._preparation(with_main=False)]
    for func, *args in calls:
        requests += [pickle.dumps((func, tuple(args), {})), None]
    # Not as a script, which would not be measured.
    ended = subprocess.run(
        [sys.executable, "-c", "from postlude import _worker; _worker.main()"],
        input=b"".join(map(pickle.dumps, requests)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    replies = io.BytesIO(ended.stdout)
    answers = [pickle.load(replies) for _ in requests]
    assert answers[:2] == [None, None]
    assert [answer and answer[1] for answer in answers[2::2]] == [*calls.values()]
    travelled = [answer is not None and answer[0] is not None for answer in answers]
    assert travelled[2::2] == [False, True, False, True, False, True]
    assert replies.read() == b""


def test_what_is_busy_ends_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda *args: killed.append(args))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    receiver, sender = os.pipe()
    os.close(sender)
    _worker.end_with_server(receiver)
    assert killed == [(0, signal.SIGKILL)]
    os.close(receiver)


def test_a_fork_of_a_worker_has_nothing_of_it() -> None:
    def wake(number: int, frame: object) -> None:
        woken.append(number)

    woken: list[int] = []
    before = signal.signal(signal.SIGTERM, _worker.ignore)
    receiver, sender = os.pipe()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _worker.SIGNALS)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        _worker.release([receiver], {signal.SIGTERM: wake})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert woken == [signal.SIGTERM]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(receiver)
    os.close(sender)


SCRIPT = """
import os, sys, time
import anyio
from postlude import BackgroundTasks, task

@task(process=True)
def work(path):
    with open(path, "a") as file:
        file.write(f"{__name__} {os.getpid() != int(sys.argv[1] or os.getpid())}\\n")

async def main():
    sys.argv[1] = str(os.getpid())
    tasks = BackgroundTasks()
    for _ in range(2):
        tasks.add_task(work, sys.argv[2])
    await tasks()

if __name__ == "__main__":
    anyio.run(main)
"""


GUARD = 'if __name__ == "__main__":'


def test_a_function_of_the_program_itself_runs_in_a_process(tmp_path: Path) -> None:
    script, written = tmp_path / "script.py", tmp_path / "written"
    script.write_text(SCRIPT, encoding="utf-8")
    subprocess.run([sys.executable, script, "", written], check=True, timeout=60)
    assert written.read_text(encoding="utf-8") == "__mp_main__ True\n" * 2


def test_a_program_that_does_not_guard_itself_is_told_so(tmp_path: Path) -> None:
    script, written = tmp_path / "script.py", tmp_path / "written"
    script.write_text(SCRIPT.replace(GUARD, "if True:"), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, script, "", written], stderr=subprocess.PIPE, check=False
    )
    assert ended.returncode == 1
    assert b"if __name__ == '__main__':" in ended.stderr
    assert not written.exists()


# --- on a server ---------------------------------------------------------------------


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_stops_waits_for_a_busy_process(
    by: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "path"
    with serve("uvicorn", tmp_path, DETACH="1") as server:
        url = f"{server.url}/process?chore=hold_until&path={path}"
        assert httpx2.get(url).text == "process"
        wait_until(path.exists)
        worker = pid_in(path)
        # A terminal tells the group of the server, systemd all that it has started.
        server.signal_all(by)
        if by is signal.SIGTERM:
            os.kill(worker, by)
        waiting = (
            "shutdown waits for background tasks, up to 20.0 s: 'chores.hold_until'"
        )
        wait_until(lambda: waiting in server.output)
        assert server.process.poll() is None
        (tmp_path / "release").touch()
        server.process.wait(SECONDS)
        assert text_in(path) == "released"
        assert "lost" not in server.output
        assert "Traceback" not in server.output
        wait_until(lambda: not is_running(worker))


@pytest.mark.parametrize("chore", ["burn", "write_pid"], ids=["busy", "idle"])
def test_no_process_survives_a_server_that_is_killed(
    chore: str, tmp_path: Path
) -> None:
    path = tmp_path / "path"
    with serve("uvicorn", tmp_path) as server:
        with server.connect() as client:
            get = f"GET /process?chore={chore}&path={path} HTTP/1.1\r\nHost: a\r\n\r\n"
            client.sendall(get.encode())
            wait_until(path.exists)
        server.stop(signal.SIGKILL)
        wait_until(lambda: not is_running(pid_in(path)))
