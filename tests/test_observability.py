"""What is logged of tasks, when, and in which context."""

import logging
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from observed import Backend, serve, stop

from postlude import BackgroundTask, add_task, task

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
