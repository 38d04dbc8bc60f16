"""What is logged of tasks, and what the page on observability shows, at work."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import structlog
from observed import Backend, serve, stop
from sybil import Sybil
from sybil.parsers import myst

from postlude import BackgroundTask, add_task, task

DOCS = Path(__file__).parents[1] / "docs"
PAGE = Sybil([myst.PythonCodeBlockParser()]).parse(DOCS / "observability.md")

variable: ContextVar[str] = ContextVar("variable", default="")
each_kind = pytest.mark.parametrize("kind", ["sync", "async", "returned"])


def doing(kind: str, do: Callable[[], object]) -> Callable[[], Any]:
    """Makes a task of a kind that does something."""

    def work() -> None:
        do()

    async def work_async() -> None:
        do()

    def work_later() -> Any:
        return work_async()

    kinds = {"sync": work, "async": work_async, "returned": work_later}
    return task(name="work")(kinds[kind])


def adding(*functions: Callable[[], object]) -> Callable[[], None]:
    """Makes an endpoint that adds tasks, in a context of its own."""

    def add() -> None:
        variable.set("request")
        structlog.contextvars.bind_contextvars(request_id="7")
        for func in functions:
            add_task(func)

    return add


def fail() -> None:
    raise LookupError("nobody")


class Seen(logging.Handler):
    """What was logged, and what a context variable was at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.variables: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith("shutdown "):
            self.records.append(record)
            self.variables.append(variable.get())

    def messages(self) -> list[str]:
        """Returns what was said, each time taken as 0."""
        texts = (f"{r.levelname} {r.getMessage()}" for r in self.records)
        return [re.sub(r"\d+\.\d{3} s$", "0 s", text) for text in texts]


@contextmanager
def handled(handler: logging.Handler, level: int) -> Generator[None]:
    logger = logging.getLogger("postlude")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Generator[Seen]:
    """Sees all records, unless a level is given as a parameter."""
    handler = Seen()
    with handled(handler, getattr(request, "param", logging.DEBUG)):
        yield handler


# --- the log -------------------------------------------------------------------------


@each_kind
def test_the_start_and_the_end_of_each_task_are_logged_at_debug(
    kind: str, anyio_backend: Backend, seen: Seen
) -> None:
    made: list[BackgroundTask] = []

    def answer() -> None:
        made.append(add_task(doing(kind, list)))

    serve(answer, anyio_backend)
    assert seen.messages() == [
        "DEBUG background task 'work' started",
        "DEBUG background task 'work' ended after 0 s",
    ]
    for record in seen.records:
        assert (
            vars(record).items()
            >= {
                "task_name": "work",
                "task_id": made[0].id,
                "request_method": "GET",
                "request_path": "/",
            }.items()
        )


@each_kind
def test_a_failure_is_logged_once_and_its_end_at_debug(
    kind: str, anyio_backend: Backend, seen: Seen
) -> None:
    serve(adding(doing(kind, fail)), anyio_backend)
    assert seen.messages() == [
        "DEBUG background task 'work' started",
        "DEBUG background task 'work' raised LookupError after 0 s",
        "ERROR background task 'work' failed",
    ]


def test_the_end_of_a_task_that_is_stopped_is_logged_at_debug(
    anyio_backend: Backend, seen: Seen
) -> None:
    stop(anyio_backend)
    assert [re.sub(r"\w*Cancelled\w*", "...", text) for text in seen.messages()] == [
        "DEBUG background task 'running' started",
        "DEBUG background task 'running' raised ... after 0 s",
        "ERROR 2 background tasks lost: 'running' (running), 'pending' (pending)",
    ]


@pytest.mark.parametrize("seen", [logging.INFO], indirect=True)
def test_above_debug_neither_start_nor_end_is_logged(
    anyio_backend: Backend, seen: Seen
) -> None:
    serve(adding(doing("sync", list), doing("async", list)), anyio_backend)
    assert seen.messages() == []


@each_kind
def test_records_are_logged_in_the_context_of_the_task_and_its_observers(
    kind: str, anyio_backend: Backend, seen: Seen
) -> None:
    @contextmanager
    def observer(task: BackgroundTask) -> Generator[None]:
        variable.set(f"{variable.get()}, observer")
        yield

    def set_and_fail() -> None:
        variable.set(f"{variable.get()}, task")
        fail()

    serve(adding(doing(kind, set_and_fail)), anyio_backend, observer)
    inside = ["request, observer, task"] * 2
    assert seen.variables == ["request, observer", *inside]


def test_to_import_postlude_imports_nothing_that_observes() -> None:
    names = "opentelemetry", "prometheus_client", "sentry_sdk", "structlog"
    code = f"import sys, postlude; print({{*{names}}} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True).strip() == "set()"


# --- what the page shows -------------------------------------------------------------


def evaluated_page() -> dict[str, Any]:
    """Returns what the blocks of the page define, but for what they set up for all."""
    logger = logging.getLogger("postlude")
    level, handlers = logger.level, [*logger.handlers]
    for example in PAGE.examples():
        if "Metrics()" not in example.parsed:
            example.evaluate()
    logger.setLevel(level)
    logger.handlers[:] = handlers
    return PAGE.namespace


page = pytest.fixture(evaluated_page)


@each_kind
def test_structlog_shows_the_variables_of_request_and_task(
    kind: str, anyio_backend: Backend, page: dict[str, Any]
) -> None:
    handler: logging.StreamHandler[io.StringIO] = page["handler"]
    handler.setStream(io.StringIO())
    with handled(handler, logging.INFO):
        serve(adding(doing(kind, fail)), anyio_backend, page["bound"])
    [line] = handler.stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["exception"].splitlines()[-2:] == [
        "LookupError: nobody",
        "in background task 'work'",
    ]
    expected = {
        "event": "background task 'work' failed",
        "level": "error",
        "task": "work",
        "request_id": "7",
        "request_path": "/",
    }
    assert record.items() >= expected.items()


def test_the_observer_of_ones_own_tells_of_slow_and_lost_tasks(
    anyio_backend: Backend, page: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(adding(doing("sync", list)), anyio_backend, page["Slow"](60))
    assert capsys.readouterr().out == ""
    stop(anyio_backend, page["Slow"](-1))
    waited, took, *lost = capsys.readouterr().out.splitlines()
    assert waited == "running has waited for 0.0 s"
    assert re.fullmatch(r"running has taken \d+\.\d s", took)
    assert lost == ["running is lost", "pending is lost"]


def test_sentry_is_sent_each_failure_once_in_a_transaction_of_the_task() -> None:
    script = Path(__file__).with_name("with_sentry.py")
    printed = subprocess.check_output([sys.executable, script], text=True)
    events = [json.loads(line) for line in printed.splitlines()]
    failures = [event for event in events if event.get("level") == "error"]
    transactions = [
        event
        for event in events
        if event.get("type") == "transaction" and event["transaction"] == "work"
    ]
    assert len(transactions) == len(failures) == 2
    for transaction, failure in zip(transactions, failures, strict=True):
        traces = [event["contexts"]["trace"] for event in (transaction, failure)]
        assert traces[0]["trace_id"] == traces[1]["trace_id"]
        assert failure["exception"]["values"][-1]["type"] == "LookupError"
        assert failure["tags"].items() >= {"order": "7"}.items()
        assert failure["request"]["url"] == "http://testserver/"
