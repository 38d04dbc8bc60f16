"""DBOS: what outlives its process, who runs what, and what it takes."""

import base64
import json
import logging
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx2
import pytest
import sqlalchemy
import sqlalchemy.event
import sqlalchemy.exc
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from servers import Server, start, wait_until

from engines.brokers import at, closed_port, url_of
from postlude import task
from postlude.engines import (
    BrokerUnreachable,
    NotSerialisable,
    OutcomeUnknown,
    Receipt,
    Refused,
    enqueue,
    enqueue_sync,
)
from postlude.engines.dbos import DBOSEngine

HERE = Path(__file__).parent
PSYCOPG = "postgresql+psycopg:"


@contextmanager
def database(kind: str, directory: Path) -> Generator[str]:
    """Makes a database that is removed afterwards; returns its URL."""
    url = url_of(kind, directory)
    if kind == "sqlite":
        yield url
        return
    name = f"postlude_{uuid.uuid4().hex}"
    server = sqlalchemy.create_engine(
        url.replace("postgresql:", PSYCOPG),
        isolation_level="AUTOCOMMIT",
    )
    with server.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        try:
            yield url.rpartition("/")[0] + f"/{name}"
        finally:
            drop = f"DROP DATABASE {name} WITH (FORCE)"
            connection.execute(sqlalchemy.text(drop))
    server.dispose()


# --- processes that die --------------------------------------------------------------


@dataclass
class Processes:
    """Processes that share a database.

    Attributes:
        url: The database.
        directory: Where the module is that they serve, what it records, and logs.
    """

    url: str
    directory: Path
    numbers: dict[str, int] = field(default_factory=dict[str, int])

    def start(self, executor: str, **environment: str) -> Any:
        number = self.numbers[executor] = self.numbers.get(executor, 0) + 1
        return start(
            [
                *[sys.executable, "-m", "uvicorn", "durable:app", "--port={port}"],
                f"--app-dir={self.directory}",
            ],
            log=self.directory / f"{executor}-{number}.log",
            environment={
                "URL": self.url,
                "EXECUTOR": executor,
                "RECORD": str(self.directory / "record"),
                **environment,
            },
        )

    def release(self) -> None:
        (self.directory / "release").touch()

    def recorded(self, what: str, *, by: str = "") -> list[str]:
        """Returns the keys of what has begun, ended or pinged so far, sorted."""
        path = self.directory / "record"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line.split() for line in text.splitlines()]
        return sorted(
            key for key, kind, executor, _ in lines if kind == what and by in executor
        )

    def wait_for(self, what: str, count: int, *, by: str = "") -> list[str]:
        wait_until(lambda: len(self.recorded(what, by=by)) >= count, seconds=30)
        return self.recorded(what, by=by)

    def wait_for_ping(self, server: Server, by: str) -> None:
        """Waits until this executor, which may not be the server's, runs a task."""

        def is_there() -> bool:
            hand_over(server, "ping", "ping")
            return bool(self.recorded("pinged", by=by)[pings:])

        pings = len(self.recorded("pinged", by=by))
        wait_until(is_there, seconds=30)


def hand_over(server: Server, name: str, *keys: str) -> list[str]:
    responses = [httpx2.post(f"{server.url}/{name}/{key}", timeout=30) for key in keys]
    assert {response.status_code for response in responses} == {202}
    return [response.json()["id"] for response in responses]


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def processes(kind: str, tmp_path: Path) -> Generator[Processes]:
    shutil.copy(HERE / "durable.py", tmp_path)
    with database(kind, tmp_path) as url:
        yield Processes(url, tmp_path)


def test_a_script_that_hands_over_is_no_worker(processes: Processes) -> None:
    with processes.start("web") as server:
        hand_over(server, "hold", "1")
        processes.wait_for("begun", 1)
        engine = DBOSEngine(processes.url, executor_id="web")
        assert enqueue_sync(declared(engine, name="hold", module="durable"), "2")
        assert processes.wait_for("begun", 2) == ["1", "2"]
        processes.release()
        assert processes.wait_for("ended", 2) == ["1", "2"]
    assert processes.recorded("begun") == ["1", "2"]


only_postgresql = pytest.mark.parametrize("kind", ["postgresql"])

KEYS = ["1", "2", "3", "4", "5"]


def test_what_is_queued_and_in_flight_outlives_kill_9(processes: Processes) -> None:
    with processes.start("web") as server:
        hand_over(server, "hold", *KEYS[:1])
        hand_over(server, "hold_async", *KEYS[1:])
        in_flight = processes.wait_for("begun", 2)
        server.stop(signal.SIGKILL)
    assert processes.recorded("ended") == []
    processes.release()
    with processes.start("web"):
        assert processes.wait_for("ended", 5) == KEYS
    # At least once: what was in flight has run twice, but not the steps of DBOS in it.
    assert processes.recorded("begun") == sorted(KEYS + in_flight)
    assert processes.recorded("weighed") == KEYS[:1]


def test_what_ends_in_time_at_shutdown_does_not_run_again(processes: Processes) -> None:
    with processes.start("web", DRAIN="20") as server:
        hand_over(server, "hold", *KEYS[:1])
        hand_over(server, "hold_async", *KEYS[1:])
        in_flight = processes.wait_for("begun", 2)
        server.process.terminate()
        wait_until(lambda: "Waiting for application shutdown" in server.output)
        processes.release()
        assert server.process.wait(timeout=10) == -signal.SIGTERM
    assert processes.recorded("ended") == in_flight
    with processes.start("web"):
        assert processes.wait_for("ended", 5) == KEYS
    assert processes.recorded("begun") == KEYS


def test_what_does_not_end_in_time_runs_again(processes: Processes) -> None:
    with processes.start("web", DRAIN="0.5") as server:
        hand_over(server, "hold_async", "1")
        processes.wait_for("begun", 1)
        assert server.stop() == -signal.SIGTERM
        assert "Traceback" not in server.output
    assert processes.recorded("ended") == []
    processes.release()
    with processes.start("web"):
        assert processes.wait_for("ended", 1) == ["1"]
    assert processes.recorded("begun") == ["1", "1"]


@only_postgresql
def test_nobody_runs_what_another_process_has_in_flight(processes: Processes) -> None:
    with processes.start("first") as first, processes.start("second") as second:
        hand_over(first, "hold", *KEYS[:4])
        assert processes.wait_for("begun", 4) == KEYS[:4]
        of_first = processes.recorded("begun", by="first")
        assert len(of_first) == 2
        with processes.start("third"):
            # By then it has looked for what it has left unfinished.
            processes.wait_for_ping(first, by="third")
            assert processes.recorded("begun") == KEYS[:4]
        first.stop(signal.SIGKILL)
        # The dead one's are left to it.
        processes.wait_for_ping(second, by="second")
        assert processes.recorded("begun") == KEYS[:4]
        processes.release()
        processes.wait_for("ended", 2, by="second")
        assert processes.recorded("ended") == processes.recorded("begun", by="second")
        with processes.start("first"):
            assert processes.wait_for("ended", 4) == KEYS[:4]
    assert processes.recorded("begun") == sorted(KEYS[:4] + of_first)


@only_postgresql
def test_an_operator_gives_the_tasks_of_a_dead_process_to_another_one(
    processes: Processes,
) -> None:
    with processes.start("first") as first:
        hand_over(first, "hold", *KEYS[:2])
        assert processes.wait_for("begun", 2) == KEYS[:2]
        first.stop(signal.SIGKILL)
    processes.release()
    with processes.start("second") as second:
        processes.wait_for_ping(second, by="second")
        assert processes.recorded("begun") == KEYS[:2]
        # As docs/engines.md says.
        client = DBOSClient(system_database_url=processes.url)
        left = client.list_workflows(status="PENDING", executor_id="first")
        client.resume_workflows(
            [each.workflow_id for each in left], queue_name="postlude"
        )
        client.destroy()
        assert processes.wait_for("ended", 2, by="second") == KEYS[:2]


def test_an_edited_function_runs_what_is_left(processes: Processes) -> None:
    with processes.start("web") as server:
        hand_over(server, "hold", *KEYS[:3])
        processes.wait_for("begun", 2)
        server.stop(signal.SIGKILL)
    module = processes.directory / "durable.py"
    source = module.read_text(encoding="utf-8")
    module.write_text(source.replace('"ended"', '"finished"'), encoding="utf-8")
    processes.release()
    with processes.start("web"):
        assert processes.wait_for("finished", 3) == KEYS[:3]


def listed(url: str, *options: str) -> list[str]:
    """Returns the names that DBOS's own tool lists."""
    command = [sys.executable, "-m", "dbos.cli.cli", "workflow", "list"]
    done = subprocess.run(
        [*command, f"--sys-db-url={url}", *options],
        capture_output=True,
        check=True,
        text=True,
    )
    return [each["name"] for each in json.loads(done.stdout)]


def test_a_function_that_is_no_longer_declared_stays_pending(
    processes: Processes,
) -> None:
    with processes.start("web") as server:
        hand_over(server, "hold", *KEYS[:2])
        processes.wait_for("begun", 2)
        hand_over(server, "gone", "3")
        server.stop(signal.SIGKILL)
    processes.release()
    with processes.start("web", LESS="1") as server:
        processes.wait_for("ended", 2)
        wait_until(lambda: "durable.gone is not a registered workflow" in server.output)
        assert listed(processes.url, "--status=PENDING") == ["durable.gone"]
        server.stop()
    with processes.start("web"):
        assert processes.wait_for("ended", 3) == KEYS[:3]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["sqlite"])
async def test_one_process_runs_the_tasks_of_a_file(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postlude.engines.dbos._WAIT", 0.01)
    with processes.start("web") as server:
        message = "another process runs the tasks of this SQLite file .* is locked"
        with pytest.raises(RuntimeError, match=message):
            await DBOSEngine(processes.url).__aenter__()
        # Others may hand over.
        engine = DBOSEngine(processes.url, worker=False)
        hold = declared(engine, name="hold", module="durable")
        async with engine:
            assert await enqueue(hold, "1") != await enqueue(hold, "1")
        processes.release()
        processes.wait_for("ended", 2, by="web")
        server.stop(signal.SIGKILL)
    # The lock has gone with the process.
    async with DBOSEngine(processes.url) as engine:
        assert engine.functions == {}


EXAMPLE = HERE.parents[1] / "examples" / "durable.py"


@contextmanager
def example(directory: Path, **environment: str) -> Generator[Server]:
    number = len([*directory.glob("*.log")])
    with start(
        [sys.executable, str(EXAMPLE)],
        log=directory / f"{number}.log",
        environment={"TMPDIR": str(directory), **environment},
    ) as server:
        yield server


def test_the_example_ships_the_order_once_it_is_started_again(tmp_path: Path) -> None:
    with example(tmp_path) as server:
        command = r"curl -X POST (\S+); sleep 3; kill -9 (\d+)\n"
        [[url, pid]] = re.findall(command, server.output)
        assert httpx2.post(url).status_code == 202
        wait_until(lambda: f"process {pid} packs order 7\n" in server.output)
        os.kill(int(pid), signal.SIGKILL)
        assert server.process.wait(timeout=10) == -signal.SIGKILL
    with example(tmp_path, SECONDS_TO_PACK="0") as server:
        shipped = f"process {server.process.pid} has shipped order 7\n"
        wait_until(lambda: shipped in server.output)
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.output


# --- in this process -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def forgotten() -> Generator[None]:
    """Leaves nothing behind in DBOS, which there is once in a process."""
    logger = logging.getLogger("dbos")
    before = {*threading.enumerate()}
    yield
    DBOS.destroy(destroy_registry=True)

    def are_gone() -> bool:
        left = [each.name for each in {*threading.enumerate()} - before]
        # AnyIO keeps its own for the next call, and so does Trio.
        return all(name.startswith(("AnyIO", "Trio")) for name in left)

    wait_until(are_gone)
    # DBOS's own writes to what is standard error during this test.
    for handler in [*logger.handlers]:
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tasks.sqlite"


Record = list[Any]


def declared(
    engine: Any, func: Any = None, *, name: str = "resize", module: str = __name__
) -> Any:
    """Declares a function of a test for an engine, as if it were one of a module."""

    def resize(*args: object, **kwargs: object) -> None: ...

    func = func or resize
    func.__qualname__, func.__module__ = name, module
    return task(engine=engine)(func)


async def workflow(receipt: Receipt) -> Any:
    """Returns what DBOS's own tools tell of a task."""
    call: Callable[[str], Any] = DBOS.retrieve_workflow
    return await anyio.to_thread.run_sync(call, receipt.id)


async def wait_for(condition: Callable[[], object]) -> None:
    await anyio.to_thread.run_sync(wait_until, condition)


request_id: ContextVar[str] = ContextVar("request_id", default="")


@contextmanager
def restore(headers: Mapping[str, str]) -> Generator[None]:
    token = request_id.set(headers["request-id"])
    try:
        yield
    finally:
        request_id.reset(token)


COLLIDING = dict.fromkeys(
    [
        *("id", "timeout", "priority", "delay", "retries", "queue", "countdown"),
        *("args", "kwargs", "func", "job_id", "description", "name", "task", "self"),
        *("queue_name", "cls", "options", "headers", "dbos_step_options", "call"),
    ],
    1,
)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.parametrize("step", [{}, {"retries_allowed": True}], ids=["body", "step"])
async def test_a_function_gets_what_it_was_given_on_any_event_loop(
    url: str, step: dict[str, Any]
) -> None:
    ran: Record = []
    engine = DBOSEngine(url, headers=lambda: {"request-id": "7"}, restore=restore)
    loop = threading.get_ident()

    def plain(*args: object, **kwargs: object) -> int:
        ran.append(("plain", args, kwargs, request_id.get()))
        assert threading.get_ident() != loop
        return 17

    async def awaited(*args: object, **kwargs: object) -> int:
        await anyio.lowlevel.checkpoint()
        ran.append(("awaited", args, kwargs, request_id.get()))
        assert threading.get_ident() != loop
        return 17

    funcs = [
        declared(engine.options(**step), func, name=func.__name__)
        for func in (plain, awaited)
    ]
    for _ in range(2):
        ran.clear()
        async with engine, engine:
            receipts = [await enqueue(f, 1, (2, {3: 4}), **COLLIDING) for f in funcs]
            await wait_for(lambda: len(ran) == 2)
            for receipt in receipts:
                assert receipt.engine == "dbos"
                handle = await workflow(receipt)
                assert await anyio.to_thread.run_sync(handle.get_result) == 17
        assert sorted(ran) == [
            ("awaited", (1, (2, {3: 4})), COLLIDING, "7"),
            ("plain", (1, (2, {3: 4})), COLLIDING, "7"),
        ]
    with pytest.raises(RuntimeError, match="'dbos' is not open"):
        await enqueue(funcs[0])


@pytest.mark.anyio
async def test_options_are_those_of_dbos(url: str) -> None:
    tries: Record = []
    ran: Record = []
    engine = DBOSEngine(url, headers=lambda: {"request-id": "7"})

    def flaky() -> None:
        tries.append(None)
        if len(tries) < 3:
            raise OSError("not yet")
        ran.append("flaky")

    retried = {"retries_allowed": True, "max_attempts": 3, "interval_seconds": 0.01}
    again = declared(engine.options(**retried), flaky, name="flaky")
    late = engine.options(delay_seconds=600, priority=3, attributes={"shop": "1"})
    later = declared(late, name="later")
    rare = engine.options(max_recovery_attempts=5).options(deduplication_id="one")
    once = declared(rare, name="once")
    async with engine:
        await enqueue(again)
        receipt = await enqueue(later)
        await enqueue(once)
        with pytest.raises(Refused, match=r"test_dbos.once: DBOSQueueDeduplicatedErr"):
            await enqueue(once)
        await wait_for(lambda: ran == ["flaky"])
        handle = await workflow(receipt)
        status = await anyio.to_thread.run_sync(handle.get_status)
    assert (status.status, status.priority) == ("DELAYED", 3)
    assert status.attributes == {"shop": "1", "request-id": "7"}
    assert status.name == f"{__name__}.later"
    assert status.queue_name == "postlude"


@pytest.mark.parametrize(
    ("native", "message"),
    [
        ({"workflow_id": "1"}, "workflow_id= is not .*: each hand-over is a workflow"),
        ({"workflow_name": "x"}, "the worker finds the function by its own name"),
        ({"serialization_type": "x"}, "give DBOSEngine a config with a serializer"),
        ({"retry": True}, "DBOS has no option 'retry'; it has .*max_attempts, "),
    ],
)
def test_options_that_break_the_hand_over_are_refused(
    url: str, native: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        DBOSEngine(url).options(**native)


def test_options_of_async_functions_are_refused_for_others(url: str) -> None:
    engine = DBOSEngine(url).options(timeout_seconds=5)
    with pytest.raises(TypeError, match="timeout_seconds= is for async functions, not"):
        declared(engine)

    async def resize() -> None: ...

    assert declared(engine, resize) is resize


def shape(url: str = "sqlite:///tasks.sqlite", **options: Any) -> DBOSEngine:
    return DBOSEngine(url, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"url": 5}, TypeError, "url must be a string, not 5"),
        ({"url": "sqlite://"}, ValueError, "url must name a SQLite file or a Postgre"),
        ({"url": "sqlite:///:memory:"}, ValueError, "url must name a SQLite file"),
        ({"url": "mysql://me:secret@host/x"}, ValueError, "'postgresql://localhost/t"),
        ({"url": "tasks.sqlite"}, ValueError, "such as 'sqlite:///tasks.sqlite'"),
        ({"url": "postgresql://host/x"}, TypeError, "executor_id must be given for P"),
        ({"executor_id": 5}, TypeError, "executor_id must be a string, not 5"),
        ({"queue": None}, TypeError, "queue must be a string, not None"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1, .*, not 0"),
        ({"drain_timeout": -1}, ValueError, "drain_timeout must be at least 0"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0"),
        ({"threads": "1"}, TypeError, "threads must be an int, not '1'"),
        ({"restore": 5}, TypeError, "restore must be callable, or None, not 5"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        shape(**options)
    assert "secret" not in str(caught.value)


@pytest.mark.anyio
async def test_what_cannot_be_pickled_is_refused_and_not_logged(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = DBOSEngine(url)
    func = declared(engine)
    async with engine:
        with pytest.raises(NotSerialisable, match="dbos cannot be sent a call of"):
            await enqueue(func, threading.Lock(), "secret")
    assert "secret" not in caplog.text


SECRET = "4711-secret"


@pytest.mark.anyio
async def test_what_the_database_refuses_is_not_logged(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = DBOSEngine(url, headers=lambda: {"token": SECRET})
    once = declared(engine.options(deduplication_id="one", delay_seconds=600))
    async with engine:
        await enqueue(once, SECRET)
        await log_failure_of(once)
    assert "DBOSQueueDeduplicatedError" in caplog.text
    assert "sqlalchemy.exc.IntegrityError" in caplog.text
    assert_no_secret(caplog)


async def log_failure_of(func: Any) -> None:
    with pytest.raises(Refused) as caught:
        await enqueue(func, SECRET)
    logging.getLogger("postlude").error("%r", caught.value, exc_info=caught.value)


def assert_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    sent = pickle.dumps(((SECRET,), {}, {"token": SECRET}))
    for secret in SECRET, base64.b64encode(sent).decode():
        assert secret not in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["postgresql"])
async def test_what_postgresql_refuses_is_not_logged(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with database(kind, tmp_path) as url:
        async with DBOSEngine(url, executor_id="web"):
            pass
        engine = DBOSEngine(
            f"{url}?options=-c%20lock_timeout%3D100",
            worker=False,
            headers=lambda: {"token": SECRET},
        )
        func = declared(engine)
        tables = sqlalchemy.create_engine(url.replace("postgresql:", PSYCOPG))
        with tables.begin() as connection:
            lock = "LOCK TABLE dbos.workflow_input, dbos.workflow_status IN EXCLUSIVE"
            connection.execute(sqlalchemy.text(f"{lock} MODE"))
            async with engine:
                await log_failure_of(func)
        tables.dispose()
    assert "LockNotAvailable" in caplog.text
    assert_no_secret(caplog)


@pytest.mark.anyio
async def test_what_waits_for_a_locked_file_is_not_logged(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with DBOSEngine(url):
        pass
    engine = DBOSEngine(
        url, worker=False, timeout=0.1, headers=lambda: {"token": SECRET}
    )
    func = declared(engine)

    def wait_less(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute("PRAGMA busy_timeout=1")

    logger = logging.getLogger("dbos")
    logger.addHandler(caplog.handler)
    path = url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        async with engine:
            internal: Any = engine._process.client
            sqlalchemy.event.listen(internal._sys_db.engine, "checkout", wait_less)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(OutcomeUnknown):
                await enqueue(func, SECRET)
            await wait_for(lambda: "database is locked" in caplog.text)
            other.execute("ROLLBACK")
            await wait_for(lambda: "after it had been given up" in caplog.text)
    logger.removeHandler(caplog.handler)
    assert_no_secret(caplog)


@pytest.mark.anyio
async def test_another_serializer_of_dbos_is_used_throughout(url: str) -> None:
    ran: Record = []
    engine = DBOSEngine(url, config={"serializer": DBOSPortableJSONSerializer()})
    func = declared(engine, lambda *args, **kwargs: ran.append((args, kwargs)))
    async with engine:
        with pytest.raises(NotSerialisable, match="not portable JSON serializable"):
            await enqueue(func, object())
        await enqueue(func, (1, 2), x=1)
        await wait_for(lambda: ran)
    assert ran == [(([1, 2],), {"x": 1})]


@pytest.mark.anyio
async def test_the_newest_function_of_a_name_runs(url: str) -> None:
    ran: Record = []
    engine = DBOSEngine(url)
    declared(engine, lambda: ran.append("old"))

    async def newer() -> None:
        ran.append("new")

    func = declared(DBOSEngine(url), newer)
    assert declared(engine, newer) is func
    async with engine:
        await enqueue(func)
        await wait_for(lambda: ran)
    assert ran == ["new"]


@pytest.mark.anyio
async def test_a_task_hands_another_one_over_also_while_the_engine_closes(
    url: str,
) -> None:
    ran: Record = []
    closing = threading.Event()
    engine = DBOSEngine(url)
    second = declared(engine, lambda: ran.append("second"), name="second")

    def first() -> None:
        ran.append("first")
        assert closing.wait(10)
        assert enqueue_sync(second).engine == "dbos"
        ran.append("handed over")

    func = declared(engine, first, name="first")
    async with engine:
        await enqueue(func)
        await wait_for(lambda: ran)
        closing.set()
    assert ran == ["first", "handed over"]
    async with engine:
        await wait_for(lambda: "second" in ran)


@pytest.mark.anyio
async def test_a_thread_of_a_task_hands_another_one_over_while_the_engine_closes(
    url: str,
) -> None:
    ran: Record = []
    closing = threading.Event()
    engine = DBOSEngine(url, drain_timeout=20)
    second = declared(engine, lambda: ran.append("second"), name="second")

    def first() -> None:
        ran.append("first")
        assert closing.wait(10)
        with ThreadPoolExecutor(1) as pool:
            ran.append(pool.submit(enqueue_sync, second).result().engine)

    func = declared(engine, first, name="first")
    with anyio.fail_after(15):
        async with engine:
            await enqueue(func)
            await wait_for(lambda: ran)
            closing.set()
    assert ran == ["first", "dbos"]


@pytest.mark.anyio
async def test_an_async_task_opens_the_engine_to_hand_another_one_over(
    url: str,
) -> None:
    ran: Record = []
    engine = DBOSEngine(url)
    second = declared(engine, lambda: ran.append("second"), name="second")

    async def first() -> None:
        async with engine:
            await enqueue(second)

    func = declared(engine, first, name="first")
    async with engine:
        await enqueue(func)
        await wait_for(lambda: ran)
    assert ran == ["second"]


@pytest.mark.anyio
async def test_a_task_that_has_been_given_up_hands_over_and_runs_no_tasks(
    url: str,
) -> None:
    ran: Record = []
    closed = threading.Event()
    engine = DBOSEngine(url, drain_timeout=0)
    second = declared(engine, lambda: ran.append("second"), name="second")

    def func() -> None:
        ran.append("begun")
        assert closed.wait(10)
        ran.append(enqueue_sync(second).engine)

    func = declared(engine, func)
    async with engine:
        await enqueue(func)
        await wait_for(lambda: ran)
    closed.set()
    await wait_for(lambda: len(ran) == 2)
    assert ran == ["begun", "dbos"]


@pytest.mark.anyio
async def test_an_application_may_launch_dbos_itself(url: str) -> None:
    ran: Record = []
    engine = DBOSEngine(url, worker=False, config={"name": "shop"}, queue="big")
    func = declared(engine, lambda: ran.append(DBOS.executor_id))

    def launch() -> None:
        DBOS(
            config={
                "name": "shop",
                "system_database_url": url,
                "executor_id": "me",
                "log_level": "WARNING",
            }
        )
        DBOS.launch()
        DBOS.register_queue("big", polling_interval_sec=0.05)

    await anyio.to_thread.run_sync(launch)
    with pytest.raises(RuntimeError, match="DBOS is in use in this process already"):
        await DBOSEngine(f"{url}2").__aenter__()
    for _ in range(2):
        ran.clear()
        async with engine:
            await enqueue(func)
            await wait_for(lambda: ran)
    assert ran == ["me"]

    def start_workflow() -> None:
        DBOS.start_workflow(engine.native(func), (), {}, {}).get_result()

    await anyio.to_thread.run_sync(start_workflow)
    assert ran == ["me", "me"]
    await anyio.to_thread.run_sync(DBOS.destroy)


@pytest.mark.anyio
async def test_what_a_task_raises_is_kept_and_logged(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise LookupError("no photo")

    engine = DBOSEngine(url)
    func = declared(engine, fail)
    logger = logging.getLogger("dbos")
    logger.addHandler(caplog.handler)
    try:
        async with engine:
            receipt = await enqueue(func)
            handle = await workflow(receipt)
            with pytest.raises(LookupError, match="no photo"):
                await anyio.to_thread.run_sync(handle.get_result)
    finally:
        logger.removeHandler(caplog.handler)
    # No more than what went wrong, as nobody has asked for it.
    assert {record.levelname for record in caplog.records} == {"ERROR"}


@pytest.mark.anyio
async def test_a_database_that_is_out_of_reach_says_so(tmp_path: Path) -> None:
    with closed_port() as port:
        url = at(url_of("postgresql", tmp_path), port)
        engine = DBOSEngine(url, worker=False)
        func = declared(engine)
        async with engine:
            with pytest.raises(BrokerUnreachable, match="dbos is out of reach for"):
                await enqueue(func)
        with pytest.raises(sqlalchemy.exc.OperationalError):
            await DBOSEngine(url, executor_id="web").__aenter__()
    # Nothing of that is left.
    async with DBOSEngine(f"sqlite:///{tmp_path}/tasks.sqlite") as other:
        assert await enqueue(declared(other)) != Receipt("dbos", "")


@pytest.mark.anyio
async def test_tables_are_made_by_a_worker(url: str) -> None:
    engine = DBOSEngine(url, worker=False)
    func = declared(engine)
    async with engine:
        message = "made the tables of sqlite:.*tasks.sqlite yet: start one first"
        with pytest.raises(Refused, match=message):
            await enqueue(func)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["postgresql"])
async def test_tables_are_made_by_a_worker_on_postgresql(
    kind: str, tmp_path: Path
) -> None:
    with database(kind, tmp_path) as url:
        engine = DBOSEngine(url, worker=False)
        func = declared(engine)
        async with engine:
            with pytest.raises(Refused, match="start one first") as caught:
                await enqueue(func)
    # Without the password.
    assert repr(sqlalchemy.make_url(url)) in str(caught.value)


@pytest.mark.anyio
async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    engine = DBOSEngine(f"sqlite:///{tmp_path}/data/tasks.sqlite")
    message = f"cannot write {tmp_path}/data/tasks.sqlite.lock: .* must be there"
    with pytest.raises(RuntimeError, match=message):
        await engine.__aenter__()


@pytest.mark.anyio
async def test_a_level_of_logs_needs_no_name(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(35):
        async with DBOSEngine(url):
            assert logging.getLogger("dbos").level == 35


@pytest.mark.anyio
async def test_a_process_forked_from_that_of_the_engine_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DBOSEngine(url, worker=False)
    async with engine:
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: 0)
            with pytest.raises(RuntimeError, match="open it after the fork"):
                await engine.__aenter__()
