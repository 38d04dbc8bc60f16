"""The application's lifespan: who owns tasks, what drains them, how losses are told."""

import asyncio
import contextvars
import functools
import gc
import itertools
import logging
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import starlette.background
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from loops import (
    SECONDS,
    Backend,
    Held,
    is_trio,
    only_asyncio,
    only_on,
    run,
    run_until_interrupt,
    until,
)
from servers import wait_until
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import postlude
from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    TaskState,
    _supervisor,
    add_task,
)

pytestmark = pytest.mark.anyio

both_modes = pytest.mark.parametrize(
    "detach", [False, True], ids=["attached", "detached"]
)

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")

Endpoint = Callable[[], Awaitable[Any]]

STARTED = "lifespan.startup.complete"
ENDED = "lifespan.shutdown.complete"


# --- a server, an application, tasks -------------------------------------------------


async def live(scope: Scope, receive: Receive, send: Send) -> None:
    """A lifespan as it is written by hand."""
    assert (await receive())["type"] == "lifespan.startup"
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    await send({"type": "lifespan.shutdown.complete"})


def closing_slowly(closing: anyio.Event, closed: anyio.Event) -> ASGIApp:
    """Makes a lifespan whose shutdown sets the one event and waits for the other."""

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        closing.set()
        await closed.wait()
        await send({"type": "lifespan.shutdown.complete"})

    return lifespan


async def respond(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends a response and then runs its background, as Starlette does."""
    await scope["endpoint"]()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})
    if scope["background"] is not None:
        await scope["background"]()


def wrap(lifespan: ASGIApp = live, **options: Any) -> BackgroundTasksMiddleware:
    """Wraps an application that has this lifespan."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        serve = lifespan if scope["type"] == "lifespan" else respond
        await serve(scope, receive, send)

    return BackgroundTasksMiddleware(app, **options)


class Server:
    """Does to an application what a server does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # What the lifespan has sent; tasks write to it too.
        self.log: list[str] = []
        self.up = anyio.Event()
        self.stopping = anyio.Event()
        self.down = anyio.Event()
        self._asked = False
        self.requests: anyio.abc.TaskGroup

    async def live(self) -> None:
        """Runs the lifespan, and shuts it down when `stopping` is set."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        try:
            await self.app(scope, self._receive, self._send)
        finally:
            self.down.set()

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        await self.stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        self.log.append(message["type"])
        if message["type"] == "lifespan.startup.complete":
            self.up.set()

    async def call(
        self,
        background: Callable[[], Awaitable[Any]] | None = None,
        *,
        endpoint: Endpoint = anyio.lowlevel.checkpoint,
        path: str = "/",
        responded: Callable[[], object] = lambda: None,
    ) -> None:
        """Makes a request, and returns at its end."""

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                responded()

        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [],
            "background": background,
            "endpoint": endpoint,
        }
        await self.app(scope, receive, send)

    async def request(
        self, background: Callable[[], Awaitable[Any]] | None = None, **options: Any
    ) -> None:
        """Makes a request, and returns when it has been responded to.

        By then its tasks have been handed over, as nothing is awaited in between.
        """
        responded = anyio.Event()
        call = functools.partial(self.call, responded=responded.set, **options)
        self.requests.start_soon(call, background)
        await responded.wait()

    def stop(self) -> None:
        self.stopping.set()


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncGenerator[Server]:
    """Serves an application, and in the end shuts it down and waits for all of it."""
    server = Server(app)
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as server.requests:
            server.requests.start_soon(server.live)
            await server.up.wait()
            yield server
            server.stop()


def named(name: str, func: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return postlude.task(name=name)(functools.partial(func, *args))


def tasks(*funcs: Callable[[], Any], concurrency: int = 1) -> BackgroundTasks:
    """Makes a group of what are groups, tasks, or functions."""
    group = BackgroundTasks(concurrency=concurrency)
    for func in funcs:
        if isinstance(func, starlette.background.BackgroundTask):
            group.tasks.append(func)
        else:
            group.add_task(func)
    return group


def states(group: BackgroundTasks) -> list[str]:
    return [task.state for task in group.tasks if isinstance(task, BackgroundTask)]


def returning(func: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a sync task of an async one: it returns what is to be awaited."""
    return functools.partial(lambda call: call(), func)


async def forever() -> None:
    await anyio.sleep_forever()


def fail(error: BaseException) -> None:
    raise error


def reported(message: str) -> dict[str, str]:
    """Returns the names that a report has, each with where the task was."""
    head, _, tail = message.partition(": ")
    found = re.findall(r"'(.+?)' \((.+?)\)", tail)
    assert head == f"{len(found)} background tasks lost"
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture
def report(records: Callable[[str], list[str]]) -> Callable[[], dict[str, str]]:
    """Returns what was lost, of which there has to be one record at most."""

    def lost() -> dict[str, str]:
        found = [record for record in records("ERROR") if " lost" in record]
        assert len(found) <= 1
        return reported(found[0]) if found else {}

    return lost


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the time that tasks have to clean up if it needs all of it."""
    monkeypatch.setattr(_supervisor, "_CLEANUP_SECONDS", 0.1)
    monkeypatch.setattr(_supervisor, "_PRESSURE_SECONDS", 0.2)


# --- the drain -----------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_shutdown_waits_until_tasks_have_ended(
    kind: str, detach: bool, records: Callable[[str], list[str]]
) -> None:
    held = Held()
    event = anyio.Event()
    first = event.wait if kind == "async" else held
    async with serving(wrap(detach=detach)) as server:
        group = tasks(first, lambda: server.log.append("second"))
        await server.request(group)
        if kind == "sync":
            await held.entered.wait()
        server.stop()
        await anyio.wait_all_tasks_blocked()
        assert server.log == [STARTED]
        assert states(group) == ["running", "pending"]
        event.set()
        held.go_on.set()
    assert server.log == [STARTED, "second", ENDED]
    assert states(group) == ["succeeded", "succeeded"]
    assert records("ERROR") == records("WARNING") == []


@both_modes
async def test_shutdown_without_tasks_says_nothing(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    async with serving(wrap(detach=detach)) as server:
        await server.call(tasks(lambda: server.log.append("task")))
        await until(lambda: len(server.log) == 2)
        await until(lambda: server.app.status()[:4] == (0, 0, 0, 0))  # type: ignore[attr-defined]
    assert server.log == [STARTED, "task", ENDED]
    assert [*map(records, ["INFO", "WARNING", "ERROR"])] == [[], [], []]


@both_modes
@pytest.mark.parametrize("max_running", [1, None])
async def test_groups_that_arrive_during_the_drain_join_it(
    detach: bool, max_running: int | None, records: Callable[[str], list[str]]
) -> None:
    first, second = anyio.Event(), anyio.Event()
    async with serving(wrap(detach=detach, max_running=max_running)) as server:
        await server.request(tasks(first.wait))
        server.stop()
        await anyio.wait_all_tasks_blocked()
        await server.request(tasks(second.wait, lambda: server.log.append("second")))
        first.set()
        await anyio.wait_all_tasks_blocked()
        assert server.log == [STARTED]
        second.set()
    assert server.log == [STARTED, "second", ENDED]
    assert records("ERROR") == []


@both_modes
async def test_a_task_may_add_others_during_the_drain(detach: bool) -> None:
    event = anyio.Event()
    async with serving(wrap(detach=detach)) as server:

        async def first() -> None:
            await event.wait()
            add_task(second)

        def second() -> None:
            add_task(server.log.append, "third")
            server.log.append("second")

        await server.request(tasks(first))
        server.stop()
        await anyio.wait_all_tasks_blocked()
        event.set()
    assert server.log == [STARTED, "second", "third", ENDED]


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_groups_that_arrive_after_the_drain_are_lost_and_reported_each_time(
    kind: str, detach: bool, records: Callable[[str], list[str]]
) -> None:
    closing, closed = anyio.Event(), anyio.Event()
    given: list[str] = []
    told: list[str] = []

    async def on_lost(lost: list[BackgroundTask]) -> None:
        await anyio.lowlevel.checkpoint()
        given.extend(task.name for task in lost)

    app = wrap(
        closing_slowly(closing, closed),
        detach=detach,
        on_lost=on_lost,
        observers=[Listening(told)],
    )
    async with serving(app) as server:
        server.stop()
        await closing.wait()
        late = [
            named(f"late {n}", forever if kind == "async" else print) for n in (1, 2)
        ]
        groups = [tasks(func, named("next", print)) for func in late]
        for group in groups:
            # The request does not wait for what does not run.
            await server.call(group)
            assert states(group) == ["lost", "lost"]
            assert group.state is TaskState.LOST
        await until(lambda: len(given) == 4)
        closed.set()
    assert [*map(reported, records("ERROR"))] == [
        {"late 1": "pending", "next": "pending"},
        {"late 2": "pending", "next": "pending"},
    ]
    assert given == ["late 1", "next", "late 2", "next"]
    assert [entry for entry in told if "lost" in entry] == [
        f"lost {name}" for name in given
    ]
    assert server.log == [STARTED, ENDED]


@both_modes
async def test_groups_that_arrive_while_others_clean_up_are_lost_and_none_is_told_twice(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    given: list[str] = []
    stuck, loose = anyio.Event(), anyio.Event()

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                stuck.set()
                await loose.wait()

    def on_lost(lost: list[BackgroundTask]) -> None:
        given.extend(task.name for task in lost)

    app = wrap(detach=detach, drain_timeout=0, max_running=2, on_lost=on_lost)
    async with serving(app) as server:
        await server.request(tasks(named("quick", forever), named("next", forever)))
        await server.request(tasks(named("slow", work)))
        await server.request(tasks(named("waiting", forever)))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await stuck.wait()
        await anyio.wait_all_tasks_blocked()
        await server.call(tasks(named("late", forever)))
        loose.set()
        await server.down.wait()
    lost = [name for record in records("ERROR") for name in reported(record)]
    assert sorted(lost) == ["late", "next", "quick", "slow", "waiting"]
    assert sorted(given) == sorted(lost)


@both_modes
@pytest.mark.parametrize("drain_timeout", [0, 0.01])
async def test_what_has_not_ended_in_time_is_lost(
    detach: bool, drain_timeout: float, report: Callable[[], dict[str, str]]
) -> None:
    app = wrap(detach=detach, drain_timeout=drain_timeout, max_running=2)
    async with serving(app) as server:
        done = tasks(named("done", server.log.append, "done"))
        await server.request(done)
        await until(lambda: server.log == [STARTED, "done"])
        running = tasks(named("running", forever), named("next", forever))
        both = tasks(*(named(f"both {n}", forever) for n in (1, 2, 3)), concurrency=2)
        waiting = tasks(named("waiting", print))
        for group in running, both, waiting:
            await server.request(group)
        await until(lambda: states(both) == ["running", "running", "pending"])
        server.stop()
        await server.down.wait()
    assert report() == {
        "running": "running",
        "next": "pending",
        "both 1": "running",
        "both 2": "running",
        "both 3": "pending",
        "waiting": "pending",
    }
    assert server.log == [STARTED, "done", ENDED]
    assert states(done) == ["succeeded"]
    for group in running, both, waiting:
        assert {group.state, *states(group)} == {"lost"}
    assert all(task.exception is None for task in running.tasks)  # type: ignore[attr-defined]


@both_modes
async def test_without_a_timeout_shutdown_waits_for_ever(
    detach: bool,
    records: Callable[[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_supervisor, "_PROGRESS_SECONDS", 0.01)
    event = anyio.Event()
    async with serving(wrap(detach=detach, drain_timeout=None)) as server:
        group = tasks(event.wait)
        await server.request(group)
        server.stop()
        await until(lambda: len(records("WARNING")) > 2)
        assert server.log == [STARTED]
        assert not any("up to" in record for record in records("WARNING"))
        event.set()
    assert states(group) == ["succeeded"]
    assert records("ERROR") == []


@both_modes
async def test_the_drain_says_what_it_waits_for(
    detach: bool,
    records: Callable[[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_supervisor, "_PROGRESS_SECONDS", 0.01)
    event, last = anyio.Event(), anyio.Event()
    async with serving(wrap(detach=detach, max_running=2)) as server:
        mail, index = named("mail", event.wait), named("index", last.wait)
        for _ in range(3):
            await server.request(tasks(mail, mail))
        await server.request(tasks(index))
        server.stop()
        await until(lambda: len(records("WARNING")) > 1)
        assert records("WARNING")[0].endswith(": 'mail' (6), 'index' (1)")
        event.set()
        waits = "shutdown still waits for background tasks, up to 20 s: 'index' (1)"
        await until(lambda: waits in records("WARNING"))
        last.set()
    [info] = records("INFO")
    assert info == (
        "shutdown waits for background tasks, up to 20 s: 'mail' (6), 'index' (1)"
    )
    assert records("ERROR") == []


async def test_progress_is_not_told_when_the_time_is_up(
    records: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_supervisor, "_PROGRESS_SECONDS", 0.02)
    async with serving(wrap(drain_timeout=0.01)) as server:
        await server.request(tasks(forever))
        server.stop()
        await server.down.wait()
    assert records("WARNING") == []
    assert len(records("INFO")) == len(records("ERROR")) == 1


@both_modes
async def test_tasks_that_failed_before_the_drain_are_not_lost(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        group = tasks(
            named("one", fail, ValueError()),
            named("two", fail, SystemExit()),
            named("three", forever),
        )
        await server.request(group)
        await until(lambda: states(group) == ["failed", "failed", "running"])
        server.stop()
        await server.down.wait()
    assert states(group) == ["failed", "failed", "lost"]
    first, second, lost = records("ERROR")
    assert (first, second) == (
        "background task 'one' failed",
        "background task 'two' failed",
    )
    assert reported(lost) == {"three": "running"}


# --- who is told of what is lost -----------------------------------------------------


class Listening:
    """An observer with all the methods there are."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        self.tasks: list[BackgroundTask] = []

    @contextmanager
    def __call__(self, task: BackgroundTask) -> Generator[None]:
        self.told.append(f"enter {task.name}")
        try:
            yield
        finally:
            self.told.append(f"exit {task.name}")

    def accepted(self, task: BackgroundTask) -> None:
        self.told.append(f"accepted {task.name}")

    def lost(self, task: BackgroundTask) -> None:
        self.told.append(f"lost {task.name}")
        self.tasks.append(task)


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_on_lost_is_given_exactly_the_lost_tasks(kind: str, detach: bool) -> None:
    given: list[BackgroundTask] = []
    order: list[str] = []

    def on_lost(lost: list[BackgroundTask]) -> None:
        given.extend(lost)
        order.extend([*server.log, "told"])

    async def aon_lost(lost: list[BackgroundTask]) -> None:
        await anyio.sleep(0.01)
        on_lost(lost)

    app = wrap(
        detach=detach, drain_timeout=0, on_lost=on_lost if kind == "sync" else aon_lost
    )
    async with serving(app) as server:
        group = tasks(lambda: None, forever, print)
        nested = tasks(tasks(forever), tasks(tasks(print), concurrency=2))
        await server.request(group)
        await server.request(nested)
        await until(lambda: states(group)[:2] == ["succeeded", "running"])
        server.stop()
        await server.down.wait()
    singles = [*group.tasks[1:], nested.tasks[0].tasks[0]]  # type: ignore[attr-defined]
    singles += nested.tasks[1].tasks[0].tasks  # type: ignore[attr-defined]
    assert len(given) == 4
    assert {*map(id, given)} == {*map(id, singles)}
    assert all(task.state is TaskState.LOST for task in given)
    # Before the application's own shutdown.
    assert order == [STARTED, "told"]


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3)])
async def test_an_on_lost_that_raises_is_logged(
    error: BaseException, kind: str, detach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def afail(lost: list[BackgroundTask]) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    def fail(lost: list[BackgroundTask]) -> None:
        raise error

    app = wrap(
        detach=detach, drain_timeout=0, on_lost=fail if kind == "sync" else afail
    )
    async with serving(app) as server:
        await server.request(tasks(forever))
        server.stop()
        await server.down.wait()
    lost, failed = [r for r in caplog.records if r.name == "postlude"]
    assert " lost" in lost.getMessage()
    assert failed.getMessage() == "on_lost failed"
    assert failed.exc_info is not None
    assert failed.exc_info[1] is error
    assert server.log == [STARTED, ENDED]


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_interrupt_in_on_lost_leaves(
    anyio_backend: Backend, kind: str, detach: bool, records: Callable[[str], list[str]]
) -> None:
    def on_lost(lost: list[BackgroundTask]) -> Any:
        return interrupt() if kind == "async" else fail(KeyboardInterrupt())

    async def interrupt() -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyboardInterrupt

    app = wrap(detach=detach, drain_timeout=0, on_lost=on_lost)

    async def main() -> None:
        async with serving(app) as server:
            await server.request(tasks(named("lost", forever)))
            server.stop()
            await server.down.wait()

    run_until_interrupt(anyio_backend, main)
    [lost] = records("ERROR")
    assert [*reported(lost)] == ["lost"]


@only_asyncio
@both_modes
async def test_an_on_lost_that_the_server_cancels_is_not_said_to_have_failed(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    entered = anyio.Event()

    async def on_lost(lost: list[BackgroundTask]) -> None:
        entered.set()
        await anyio.sleep_forever()

    server = Server(wrap(detach=detach, drain_timeout=0, on_lost=on_lost))
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as server.requests:
            living = asyncio.create_task(server.live())
            await server.up.wait()
            await server.request(tasks(named("lost", forever)))
            server.stop()
            await entered.wait()
            living.cancel()
            with pytest.raises(asyncio.CancelledError):
                await living
    [lost] = records("ERROR")
    assert [*reported(lost)] == ["lost"]


async def test_on_lost_is_not_called_when_nothing_is_lost() -> None:
    given: list[list[BackgroundTask]] = []
    async with serving(wrap(on_lost=given.append)) as server:
        await server.call(tasks(lambda: server.log.append("task")))
    assert server.log == [STARTED, "task", ENDED]
    assert given == []


@both_modes
async def test_observers_are_told_of_each_lost_task_once(detach: bool) -> None:
    told: list[str] = []
    listening = Listening(told)
    app = wrap(detach=detach, drain_timeout=0, max_running=1, observers=[listening])
    async with serving(app) as server:
        group = tasks(named("a", forever), named("b", forever))
        waiting = tasks(named("c", forever))
        await server.request(group)
        await server.request(waiting)
        await until(lambda: "enter a" in told)
        server.stop()
        await server.down.wait()
    assert Counter(told) == Counter(
        [f"accepted {name}" for name in "abc"]
        + [f"lost {name}" for name in "abc"]
        + ["enter a", "exit a"]
    )
    assert listening.tasks == [*group.tasks, *waiting.tasks]


@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_observers_are_told_of_what_a_task_adds_as_well(
    concurrency: int, detach: bool
) -> None:
    told: list[str] = []

    async def add() -> None:
        add_task(named("b", forever))
        inner.add_task(named("c", forever))
        await anyio.sleep_forever()

    app = wrap(detach=detach, drain_timeout=0, observers=[Listening(told)])
    async with serving(app) as server:
        inner = tasks(named("a", add), named("d", forever), concurrency=concurrency)
        await server.request(inner)
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    counts = Counter(told)
    for name in "abcd":
        assert counts[f"accepted {name}"] == counts[f"lost {name}"] == 1


@both_modes
async def test_an_observer_that_raises_at_a_loss_is_logged(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    told: list[str] = []

    class Breaking(Listening):
        def lost(self, task: BackgroundTask) -> None:
            raise SystemExit if task.name == "a" else ValueError

    observers = [Breaking([]), Listening(told)]
    app = wrap(detach=detach, drain_timeout=0, observers=observers)
    async with serving(app) as server:
        await server.request(tasks(named("a", forever), named("b", forever)))
        await until(lambda: "enter a" in told)
        server.stop()
        await server.down.wait()
    assert [entry for entry in told if "lost" in entry] == ["lost a", "lost b"]
    lost, *failed = records("ERROR")
    assert reported(lost) == {"a": "running", "b": "pending"}
    assert len(failed) == 2
    assert all(record.startswith("observer ") for record in failed)
    assert server.log == [STARTED, ENDED]


@both_modes
async def test_tasks_that_are_none_of_ours_are_told_of_once_and_as_one(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    class Knowing(Listening):
        def accepted(self, task: BackgroundTask) -> None:
            self.told.append(f"accepted {task.name} {task.id}")

        def lost(self, task: BackgroundTask) -> None:
            self.told.append(f"lost {task.name} {task.id}")

    stock = starlette.background.BackgroundTask
    told: list[str] = []
    app = wrap(detach=detach, drain_timeout=0, observers=[Knowing(told)])
    async with serving(app) as server:
        names = "abcdef"
        group = tasks(*(stock(named(name, forever)) for name in names))
        await server.request(group)
        await until(lambda: "enter a" in told)
        listed = {task.name: task.id for task in app.tasks()}
        assert [*listed] == [*names]
        server.stop()
        await server.down.wait()
    assert [*report()] == [*names]
    assert Counter(told) == Counter(
        [f"accepted {name} {listed[name]}" for name in names]
        + [f"lost {name} {listed[name]}" for name in names]
        + ["enter a", "exit a"]
    )


# --- cancellation --------------------------------------------------------------------


def cleaning(log: list[str], name: str, seconds: float = 0.02) -> Callable[[], Any]:
    """Makes a task that cleans up, with no shield around that."""

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(seconds)
            await anyio.lowlevel.checkpoint()
            log.append(name)

    return named(name, work)


def nest(kind: str, log: list[str]) -> BackgroundTasks:
    """Makes groups of tasks that clean up for different times."""
    a, b, c, d = (cleaning(log, name, 0.02 * n) for n, name in enumerate("abcd"))
    stock = starlette.background
    kinds: dict[str, Callable[[], BackgroundTasks]] = {
        "in order": lambda: tasks(d),
        "at once": lambda: tasks(a, b, c, d, concurrency=4),
        "group in a group": lambda: tasks(tasks(tasks(d))),
        "groups at once": lambda: tasks(tasks(a), tasks(tasks(d)), concurrency=2),
        "at once twice": lambda: tasks(
            tasks(a, b, concurrency=2), tasks(c, d, concurrency=2), concurrency=2
        ),
        "at once in order": lambda: tasks(tasks(a, d, concurrency=2)),
        "group of a task": lambda: tasks(
            BackgroundTask(tasks(a)), BackgroundTask(tasks(d)), concurrency=2
        ),
        "stock tasks at once": lambda: tasks(
            stock.BackgroundTask(a), stock.BackgroundTask(d), concurrency=2
        ),
        "stock groups at once": lambda: tasks(
            stock.BackgroundTasks([stock.BackgroundTask(a)]),
            stock.BackgroundTasks([stock.BackgroundTask(d)]),
            concurrency=2,
        ),
        "returned": lambda: tasks(named("d", returning(d))),
        "returned at once": lambda: tasks(
            named("a", returning(a)), named("d", returning(d)), concurrency=2
        ),
    }
    return kinds[kind]()


NESTS = {
    "in order": "d",
    "at once": "abcd",
    "group in a group": "d",
    "groups at once": "ad",
    "at once twice": "abcd",
    "at once in order": "ad",
    "group of a task": "ad",
    "stock tasks at once": "ad",
    "stock groups at once": "ad",
    "returned": "d",
    "returned at once": "ad",
}


@only_asyncio
@both_modes
@pytest.mark.parametrize("kind", NESTS)
async def test_on_asyncio_a_task_cleans_up_without_a_shield(
    kind: str, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    app = wrap(detach=detach, drain_timeout=0)
    async with serving(app) as server:
        group = nest(kind, server.log)
        await server.request(group)
        await until(lambda: app.status().running_tasks == len(NESTS[kind]))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert server.log == [STARTED, *NESTS[kind], ENDED]
    assert report() == dict.fromkeys(NESTS[kind], "running")
    assert group.state is TaskState.LOST


@both_modes
async def test_a_task_cleans_up_in_a_shield(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
            server.log.append("cleaned")

    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        await server.request(tasks(named("work", work), print))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert server.log == [STARTED, "cleaned", ENDED]
    assert report() == {"work": "running", "builtins.print": "pending"}


@both_modes
async def test_a_task_that_fails_while_it_cleans_up_has_failed(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("broken")

    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        group = tasks(named("work", work), named("next", print))
        await server.request(group)
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    failed, lost = records("ERROR")
    assert failed == "background task 'work' failed"
    assert reported(lost) == {"next": "pending"}
    assert states(group) == ["failed", "lost"]
    assert server.log == [STARTED, ENDED]


@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_task_that_ends_when_it_is_cancelled_has_succeeded(
    concurrency: int, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    async def work() -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()

    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        jobs = [named("work", work), named("next", work), named("last", print)]
        group = tasks(*jobs, concurrency=concurrency)
        await server.request(group)
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    expected = ["succeeded"] * concurrency + ["lost"] * (3 - concurrency)
    assert states(group) == expected
    assert len(report()) == 3 - concurrency
    assert group.state is TaskState.LOST


@only_asyncio
@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.usefixtures("impatient")
async def test_a_task_that_swallows_a_cancellation_is_cancelled_again(
    concurrency: int, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    async def work() -> None:
        with suppress(asyncio.CancelledError):
            await anyio.sleep_forever()
        server.log.append("swallowed")
        await anyio.sleep_forever()

    others = asyncio.all_tasks()
    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        group = tasks(named("work", work), concurrency=concurrency)
        await server.request(group)
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert server.log == [STARTED, "swallowed", ENDED]
    assert report() == {"work": "running"}
    assert states(group) == ["lost"]
    assert asyncio.all_tasks() == others


@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.usefixtures("impatient")
async def test_a_task_that_swallows_every_cancellation_does_not_hold_shutdown_up(
    concurrency: int, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    ending = False

    async def work() -> None:
        while not ending:
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep(0.01)

    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        names = [f"work {n}" for n in range(concurrency)]
        group = tasks(
            *(named(name, work) for name in names),
            named("next", server.log.append, "never"),
            concurrency=concurrency,
        )
        expected = dict.fromkeys(names, "running") | {"next": "pending"}
        await server.request(group)
        await until(lambda: states(group)[0] == "running")
        server.stop()
        try:
            await until(lambda: ENDED in server.log)
            assert report() == expected
            assert {*states(group)} == {"lost"}
        finally:
            ending = True
        await server.down.wait()
    assert server.log == [STARTED, ENDED]


@both_modes
@pytest.mark.usefixtures("impatient")
async def test_a_task_that_ends_after_it_was_named_is_not_named_again(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    closing, closed = anyio.Event(), anyio.Event()
    ending = False

    async def work() -> None:
        while not ending:
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep(0.01)
        server.log.append("ended")
        if not is_trio():
            raise asyncio.CancelledError
        await anyio.lowlevel.checkpoint()

    app = wrap(closing_slowly(closing, closed), detach=detach, drain_timeout=0)
    async with serving(app) as server:
        await server.request(tasks(named("stubborn", work), named("next", print)))
        await until(lambda: app.status().running_tasks)
        server.stop()
        await closing.wait()
        ending = True
        await until(lambda: app.status().running_groups == 0)
        await server.call(tasks(named("late", print)))
        closed.set()
    assert server.log == [STARTED, "ended", ENDED]
    assert [*map(reported, records("ERROR"))] == [
        {"stubborn": "running", "next": "pending"},
        {"late": "pending"},
    ]


@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_tasks_that_were_not_started_are_not_started_by_the_end_of_others(
    concurrency: int, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    async def work() -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        inner.add_task(never["inner"])
        add_task(never["last"])

    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        never = {
            name: named(name, server.log.append, name)
            for name in ("inner", "next", "last")
        }
        inner = tasks(work, concurrency=concurrency)
        await server.request(tasks(inner, tasks(never["next"])))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert server.log == [STARTED, ENDED]
    assert report() == dict.fromkeys(never, "pending")
    assert inner.state is TaskState.LOST


@both_modes
async def test_a_deadline_of_the_task_goes_on_while_it_is_stopped(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    async def work() -> None:
        with anyio.move_on_after(SECONDS):
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                group.start_soon(anyio.sleep_forever)
        server.log.append("never")

    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        await server.request(tasks(named("work", work)))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert server.log == [STARTED, ENDED]
    assert report() == {"work": "running"}


@only_asyncio
@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("then", ["ends", "yields", "waits"])
async def test_a_task_that_cancels_itself_at_once_does_not_cancel_the_next(
    then: str, concurrency: int, detach: bool, records: Callable[[str], list[str]]
) -> None:
    async def end_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if then == "yields":
            await asyncio.sleep(0)
        elif then == "waits":
            await asyncio.sleep(SECONDS)

    async def work() -> None:
        await asyncio.sleep(0.001)
        server.log.append("work")

    async with serving(wrap(detach=detach)) as server:
        # Without a task before it, and after one.
        group = tasks(end_itself, work, end_itself, work, concurrency=concurrency)
        await server.request(group)
    ended = "succeeded" if then == "ends" else "failed"
    assert states(group) == [ended, "succeeded"] * 2
    assert server.log == [STARTED, "work", "work", ENDED]
    assert len(records("ERROR")) == (0 if then == "ends" else 2)


@only_on("trio")
@both_modes
async def test_a_scope_that_is_cancelled_in_a_task_is_that_tasks_own(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    async def work() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()

    async with serving(wrap(detach=detach)) as server:
        group = tasks(work, lambda: server.log.append("last"))
        await server.request(group)
    assert server.log == [STARTED, "last", ENDED]
    assert states(group) == ["succeeded", "succeeded"]
    assert records("ERROR") == []


@only_asyncio
@both_modes
async def test_what_asyncio_has_for_tasks_works_from_the_first_step_on(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append(
            (asyncio.current_task(), anyio.get_current_task().id, variable.get())
        )

    async def child() -> None:
        await asyncio.sleep(0)

    async def look_around() -> None:
        variable.set("task")
        look()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(SECONDS)
        look()
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
        with anyio.move_on_after(0.001):
            await anyio.sleep(SECONDS)
        look()
        async with anyio.create_task_group() as children:
            children.start_soon(child)
        await asyncio.gather(child(), child())
        look()

    async def time_out() -> None:
        async with asyncio.timeout(0):
            await asyncio.sleep(SECONDS)

    async with serving(wrap(detach=detach)) as server:
        group = tasks(look_around, named("time_out", time_out), look_around)
        await server.request(group)
        await until(lambda: len(seen) == 8)
    assert len({*seen[:4]}) == len({*seen[4:]}) == 1
    assert seen[0][1:] == (id(seen[0][0]), "task")
    assert seen[0][0] is seen[4][0]
    assert seen[0][0] is not asyncio.current_task()
    assert states(group) == ["succeeded", "failed", "succeeded"]
    assert records("ERROR") == ["background task 'time_out' failed"]


@only_asyncio
@both_modes
@pytest.mark.parametrize("first", [True, False])
async def test_a_request_goes_on_as_itself_when_its_tasks_have_begun(
    first: bool, detach: bool
) -> None:
    seen: list[Any] = []
    event = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await live(scope, receive, send)
            return
        variable.set("request")
        with anyio.CancelScope() as scope_of_request:
            seen.append(asyncio.current_task())
            group = tasks(wait if first else forget, wait)
            await respond(
                {**scope, "background": group, "endpoint": forget}, receive, send
            )
            seen.append(asyncio.current_task())
        assert not scope_of_request.cancel_called
        seen.append(variable.get())

    async def wait() -> None:
        variable.set("task")
        await event.wait()

    async with serving(BackgroundTasksMiddleware(app, detach=detach)) as server:
        await server.request()
        await anyio.wait_all_tasks_blocked()
        event.set()
        await until(lambda: len(seen) == 3)
    assert seen[0] is seen[1]
    assert seen[2] == "request"


# --- threads -------------------------------------------------------------------------


@both_modes
async def test_a_thread_that_ends_in_time_has_not_lost_its_task(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    async with serving(wrap(detach=detach, drain_timeout=0)) as server:
        held = Held(then=lambda: server.log.append("held"))
        group = tasks(named("held", held), named("next", server.log.append, "never"))
        await server.request(group)
        await held.entered.wait()
        server.stop()
        await until(lambda: records("INFO"))
        held.go_on.set()
        await server.down.wait()
    assert server.log == [STARTED, "held", ENDED]
    [lost] = records("ERROR")
    assert reported(lost) == {"next": "pending"}
    assert states(group) == ["succeeded", "lost"]
    assert group.state is TaskState.LOST


@both_modes
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.usefixtures("impatient")
async def test_a_thread_that_does_not_end_is_named_and_left_behind(
    concurrency: int,
    fails: bool,
    detach: bool,
    records: Callable[[str], list[str]],
    report: Callable[[], dict[str, str]],
) -> None:
    app = wrap(detach=detach, drain_timeout=0)
    async with serving(app) as server:
        ended = threading.Event()

        def end() -> None:
            ended.set()
            if fails:
                raise ValueError("late")

        held = Held(then=end)
        group = tasks(
            tasks(
                named("held", held),
                concurrency=concurrency,
            ),
            named("next", server.log.append, "never"),
        )
        [inner] = group.tasks[:1]
        assert isinstance(inner, BackgroundTasks)
        await server.request(group)
        await held.entered.wait()
        server.stop()
        await until(lambda: ENDED in server.log)
        assert report() == {"held": "in a thread", "next": "pending"}
        assert [*states(inner), *states(group)] == ["lost"] * 3
        assert not ended.is_set()
        held.go_on.set()
        await until(ended.is_set)
        if fails:
            # What the thread has to say for itself is told, late as it is.
            await until(lambda: len(records("ERROR")) == 2)
        await server.down.wait()
    assert server.log == [STARTED, ENDED]


@only_asyncio
@both_modes
@pytest.mark.usefixtures("impatient")
async def test_what_a_thread_returns_when_it_has_been_left_behind_is_given_up(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    told: list[str] = []
    held = Held(then=forever)
    app = wrap(detach=detach, drain_timeout=0, observers=[Listening(told)])
    async with serving(app) as server:
        group = tasks(named("held", held))
        await server.request(group)
        await held.entered.wait()
        server.stop()
        await server.down.wait()
        held.go_on.set()
        await until(lambda: records("WARNING"))
    assert states(group) == ["lost"]
    assert reported(records("ERROR")[0]) == {"held": "in a thread"}
    await until(lambda: "exit held" in told)
    # A coroutine that nobody has closed would show now.
    gc.collect()


@both_modes
@pytest.mark.usefixtures("impatient")
async def test_tasks_that_wait_for_a_thread_are_pending(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    app = wrap(detach=detach, drain_timeout=0, threads=1)
    async with serving(app) as server:
        held = Held()
        await server.request(tasks(named("held", held)))
        await held.entered.wait()
        group = tasks(
            named("second", server.log.append, "never"),
            named("third", server.log.append, "never"),
        )
        await server.request(group)
        await anyio.wait_all_tasks_blocked()
        assert [task.state for task in app.tasks()].count(TaskState.PENDING) == 2
        server.stop()
        await until(lambda: ENDED in server.log)
        assert report() == {
            "held": "in a thread",
            "second": "pending",
            "third": "pending",
        }
        assert states(group) == ["lost", "lost"]
        held.go_on.set()
    assert server.log == [STARTED, ENDED]


@both_modes
async def test_what_a_sync_task_has_returned_is_running_and_not_in_a_thread(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    app = wrap(detach=detach, drain_timeout=0)
    async with serving(app) as server:
        await server.request(tasks(named("returns", returning(forever)), print))
        await until(lambda: app.status().running_tasks)
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert report() == {"returns": "running", "builtins.print": "pending"}


@only_asyncio
@both_modes
async def test_what_a_thread_returns_while_it_is_stopped_cleans_up_too(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    app = wrap(detach=detach, drain_timeout=0)
    async with serving(app) as server:
        held = Held(then=cleaning(server.log, "cleaned", 0.2))
        await server.request(tasks(tasks(named("held", held))))
        await held.entered.wait()
        server.stop()
        await until(lambda: app.status().running_groups == 1)
        await anyio.wait_all_tasks_blocked()
        held.go_on.set()
        await server.down.wait()
    assert server.log == [STARTED, "cleaned", ENDED]
    assert report() == {"held": "running"}


async def test_tasks_have_threads_of_their_own() -> None:
    seen: list[tuple[float, int, int]] = []
    app = wrap(threads=3)

    def look() -> None:
        limiter = app._settings.limiter.get()
        default = anyio.to_thread.current_default_thread_limiter()
        seen.append(
            (limiter.total_tokens, limiter.borrowed_tokens, default.borrowed_tokens)
        )

    async with serving(app) as server:
        await server.request(tasks(lambda: anyio.from_thread.run_sync(look)))
    assert seen == [(3, 1, 0)]


@both_modes
async def test_no_more_threads_than_allowed_are_used(detach: bool) -> None:
    running = most = 0
    lock = threading.Lock()
    held = [Held() for _ in range(5)]
    app = wrap(detach=detach, threads=2)

    def work(held: Held) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        held()
        with lock:
            running -= 1

    async with serving(app) as server:
        for each in held:
            await server.request(tasks(functools.partial(work, each)))
        await held[0].entered.wait()
        await held[1].entered.wait()
        await anyio.wait_all_tasks_blocked()
        assert app.status()[:4] == (5, 0, 2, 3)
        # Those of others are free meanwhile.
        await anyio.to_thread.run_sync(server.log.append, "thread")
        for each in held:
            each.go_on.set()
    assert most == 2
    assert server.log == [STARTED, "thread", ENDED]


async def test_any_number_of_threads_may_be_allowed() -> None:
    held = [Held() for _ in range(50)]
    async with serving(wrap(threads=None)) as server:
        for each in held:
            await server.request(tasks(each))
        for each in held:
            await each.entered.wait()
        for each in held:
            each.go_on.set()


def test_each_event_loop_has_threads_of_its_own(anyio_backend: Backend) -> None:
    app = wrap(threads=1)
    limiters: list[anyio.CapacityLimiter] = []

    async def main() -> None:
        async with serving(app) as server:
            await server.call(tasks(functools.partial(print, end="")))
            limiters.append(app._settings.limiter.get())

    run(anyio_backend, main)
    run(anyio_backend, main)
    assert limiters[0] is not limiters[1]


# --- the application's own lifespan --------------------------------------------------


def failing_at(moment: str, error: BaseException) -> ASGIApp:
    """Makes a lifespan that raises at some moment."""

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if moment == "start-up":
            raise error
        if moment == "start-up, as said":
            await send({"type": "lifespan.startup.failed", "message": "broken"})
            raise error
        await send({"type": "lifespan.startup.complete"})
        if moment == "service":
            raise error
        await receive()
        if moment == "shutdown":
            raise error
        await send({"type": "lifespan.shutdown.failed", "message": "broken"})
        raise error

    return lifespan


@both_modes
@pytest.mark.parametrize(
    ("moment", "sent"),
    [
        ("start-up", []),
        ("start-up, as said", ["lifespan.startup.failed"]),
        ("service", [STARTED]),
        ("shutdown", [STARTED]),
        ("shutdown, as said", [STARTED, "lifespan.shutdown.failed"]),
    ],
)
@pytest.mark.parametrize(
    "error", [ValueError("broken"), SystemExit(3), ExceptionGroup("", [OSError()])]
)
async def test_what_the_lifespan_raises_reaches_the_server_as_itself(
    error: BaseException, moment: str, sent: list[str], detach: bool
) -> None:
    app = wrap(failing_at(moment, error), detach=detach)
    server = Server(app)
    server.stop()
    with pytest.raises(type(error)) as caught:
        await server.live()
    assert caught.value is error
    assert error.__context__ is None
    assert getattr(error, "__notes__", []) == []
    assert server.log == sent
    # What comes later has no lifespan.
    log: list[str] = []
    await server.call(tasks(lambda: log.append("task")))
    assert log == ["task"]


@both_modes
async def test_tasks_end_before_an_error_at_shutdown_leaves(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    app = wrap(failing_at("shutdown", ValueError("broken")), detach=detach)
    event = anyio.Event()
    group = tasks(event.wait)

    async def release() -> None:
        await until(lambda: records("INFO"))
        event.set()

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="broken")):
        async with serving(app) as server:
            await server.request(group)
            server.stop()
            await release()
    assert states(group) == ["succeeded"]


@both_modes
@pytest.mark.parametrize("moment", ["start-up", "shutdown"])
async def test_what_starlettes_lifespan_raises_reaches_the_server_as_itself(
    moment: str, detach: bool
) -> None:
    error = ValueError(moment)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        if moment == "start-up":
            raise error
        yield
        raise error

    starlette = Starlette(lifespan=lifespan)
    server = Server(BackgroundTasksMiddleware(starlette, detach=detach))
    server.stop()
    with pytest.raises(ValueError, match=moment) as caught:
        await server.live()
    assert caught.value is error
    assert server.log[-1].endswith(".failed")


@both_modes
@pytest.mark.parametrize("drain_timeout", [20, 0])
async def test_what_starlettes_lifespan_closes_is_closed_after_the_tasks(
    drain_timeout: float, detach: bool, records: Callable[[str], list[str]]
) -> None:
    log: list[str] = []
    event = anyio.Event()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            yield
            await anyio.sleep(0.01)
            log.append(f"closed after {len(records('ERROR'))} reports")
            group.cancel_scope.cancel()

    starlette = Starlette(lifespan=lifespan)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        serve = starlette if scope["type"] == "lifespan" else respond
        await serve(scope, receive, send)

    async def work() -> None:
        await event.wait()
        log.append("task")

    middleware = BackgroundTasksMiddleware(
        app, detach=detach, drain_timeout=drain_timeout
    )
    async with serving(middleware) as server:
        await server.request(tasks(work))
        server.stop()
        await until(lambda: records("INFO"))
        if drain_timeout:
            event.set()
        await server.down.wait()
    expected = ["task", "closed after 0 reports"]
    assert log == (expected if drain_timeout else ["closed after 1 reports"])
    assert server.log == [STARTED, ENDED]


async def refuse_by_http(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def refuse_by_http_and_keep_quiet(
    scope: Scope, receive: Receive, send: Send
) -> None:
    with suppress(RuntimeError):
        await refuse_by_http(scope, receive, send)


async def refuse_by_http_later(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await refuse_by_http(scope, receive, send)


async def refuse_by_assertion(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"


async def refuse_by_type(scope: Scope, receive: Receive, send: Send) -> None:
    raise TypeError(f"no {scope['type']!r}")


async def refuse_by_key(scope: Scope, receive: Receive, send: Send) -> None:
    scope["path"]


async def refuse_by_group(scope: Scope, receive: Receive, send: Send) -> None:
    async with anyio.create_task_group():
        raise ValueError


async def refuse_silently(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def refuse_silently_later(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


refusals = pytest.mark.parametrize(
    "lifespan",
    [
        refuse_by_http,
        refuse_by_http_and_keep_quiet,
        refuse_by_http_later,
        refuse_by_assertion,
        refuse_by_type,
        refuse_by_key,
        refuse_by_group,
        refuse_silently,
        refuse_silently_later,
    ],
)


@both_modes
@refusals
async def test_an_application_may_refuse_to_have_a_lifespan(
    lifespan: ASGIApp, detach: bool
) -> None:
    event = anyio.Event()
    async with serving(wrap(lifespan, detach=detach)) as server:

        async def work() -> None:
            await event.wait()
            server.log.append("task")

        group = tasks(work)
        await server.request(group)
        server.stop()
        await anyio.wait_all_tasks_blocked()
        assert server.log == [STARTED]
        event.set()
    assert server.log == [STARTED, "task", ENDED]
    assert states(group) == ["succeeded"]


@both_modes
async def test_tasks_of_an_application_without_lifespan_may_be_lost(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    app = wrap(refuse_by_type, detach=detach, drain_timeout=0)
    async with serving(app) as server:
        await server.request(tasks(named("lost", forever)))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert report() == {"lost": "running"}
    assert server.log == [STARTED, ENDED]


@both_modes
@pytest.mark.parametrize("fails", [False, True])
async def test_a_lifespan_that_ends_early_takes_the_tasks_with_it(
    fails: bool, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    leave = anyio.Event()
    error = ValueError("broken")

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await leave.wait()
        if fails:
            raise error

    app = wrap(lifespan, detach=detach, drain_timeout=1)
    server = Server(app)
    event = anyio.Event()
    done = tasks(named("done", event.wait))
    left = tasks(named("left", forever))
    caught: list[BaseException] = []

    async def live() -> None:
        try:
            await server.live()
        except ValueError as exc:
            caught.append(exc)

    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as server.requests:
            server.requests.start_soon(live)
            await server.up.wait()
            for group in done, left:
                await server.request(group)
            await anyio.wait_all_tasks_blocked()
            leave.set()
            event.set()
            await server.down.wait()
            assert caught == [error] * fails
            assert report() == {"left": "running"}
            assert (states(done), states(left)) == (["succeeded"], ["lost"])
            # What comes later has no lifespan: its request runs it.
            later = tasks(named("later", server.log.append, "later"))
            await server.call(later)
            assert server.log == [STARTED, "later"]
    assert app._supervisors == []


@both_modes
async def test_an_application_that_gives_up_waiting_may_ask_again(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    gave_up = 0

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal gave_up
        await receive()
        await send({"type": "lifespan.startup.complete"})
        while True:
            with anyio.move_on_after(0.01):
                message = await receive()
                break
            gave_up += 1
        assert message["type"] == "lifespan.shutdown"
        await send({"type": "lifespan.shutdown.complete"})

    event = anyio.Event()
    async with serving(wrap(lifespan, detach=detach)) as server:
        group = tasks(event.wait)
        await server.request(group)
        await until(lambda: gave_up > 2)
        server.stop()
        await until(lambda: records("INFO"))
        before = gave_up
        await until(lambda: gave_up > before + 2)
        event.set()
    assert server.log == [STARTED, ENDED]
    assert states(group) == ["succeeded"]
    # The drain has gone on: it has not begun again.
    assert len(records("INFO")) == 1


@only_asyncio
@both_modes
@pytest.mark.parametrize("drain_timeout", [20, 0.2])
async def test_an_application_may_ask_for_the_next_message_in_tasks_of_its_own(
    drain_timeout: float, detach: bool, records: Callable[[str], list[str]]
) -> None:
    gave_up = 0

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal gave_up
        await asyncio.wait_for(receive(), SECONDS)
        await send({"type": "lifespan.startup.complete"})
        while True:
            try:
                await asyncio.wait_for(receive(), 0.03)
            except TimeoutError:
                gave_up += 1
            else:
                break
        await send({"type": "lifespan.shutdown.complete"})

    event = anyio.Event()
    app = wrap(lifespan, detach=detach, drain_timeout=drain_timeout)
    async with serving(app) as server:
        group = tasks(named("work", event.wait))
        await server.request(group)
        server.stop()
        await until(lambda: records("INFO"))
        before = gave_up
        await until(lambda: gave_up > before + 1)
        if drain_timeout == 20:
            event.set()
    assert server.log == [STARTED, ENDED]
    assert states(group) == ["succeeded" if drain_timeout == 20 else "lost"]
    assert len(records("ERROR")) == (0 if drain_timeout == 20 else 1)


@only_asyncio
@both_modes
@pytest.mark.usefixtures("impatient")
async def test_losses_are_told_though_the_application_gives_up_waiting_for_cleanups(
    detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    given: list[str] = []

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(receive(), 0.03)
                break
        await send({"type": "lifespan.shutdown.complete"})

    def on_lost(lost: list[BackgroundTask]) -> None:
        given.extend(task.name for task in lost)

    app = wrap(lifespan, detach=detach, drain_timeout=0, on_lost=on_lost)
    async with serving(app) as server:
        await server.request(tasks(cleaning(server.log, "slow", 0.09)))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await server.down.wait()
    assert report() == {"slow": "running"}
    assert given == ["slow"]


@both_modes
async def test_a_lifespan_may_be_run_again(detach: bool) -> None:
    app = wrap(detach=detach)
    for _ in range(3):
        event = anyio.Event()
        async with serving(app) as server:
            group = tasks(event.wait)
            await server.request(group)
            server.stop()
            await anyio.wait_all_tasks_blocked()
            assert app.status()[:4] == (1, 0, 1, 0)
            event.set()
        assert states(group) == ["succeeded"]
        assert server.log == [STARTED, ENDED]
        assert app._supervisors == []
        await server.call(tasks(functools.partial(server.log.append, "later")))
        assert server.log[-1] == "later"


def test_a_lifespan_may_be_run_again_in_another_event_loop(
    anyio_backend: Backend,
) -> None:
    app = wrap(detach=True)
    logs: list[list[str]] = []

    async def main() -> None:
        async with serving(app) as server:
            await server.request(tasks(lambda: server.log.append("task")))
            logs.append(server.log)

    for backend in anyio_backend, ("trio", {}), ("asyncio", {}), anyio_backend:
        run(backend, main)
    assert logs == [[STARTED, "task", ENDED]] * 4


@both_modes
async def test_two_lifespans_at_once_share_the_work(detach: bool) -> None:
    app = wrap(detach=detach)
    event = anyio.Event()
    async with serving(app) as first:
        async with serving(app) as second:
            group = tasks(event.wait)
            await second.request(group)
            first.stop()
            await until(lambda: app.status().running_groups)
            event.set()
            await first.down.wait()
            await second.request(tasks(lambda: second.log.append("task")))
        assert second.log == [STARTED, "task", ENDED]
    assert first.log == [STARTED, ENDED]
    assert states(group) == ["succeeded"]


@both_modes
@pytest.mark.parametrize("other", [("asyncio", {}), ("trio", {})], ids=lambda b: b[0])
def test_two_event_loops_may_share_one_middleware(
    anyio_backend: Backend, other: Backend, detach: bool
) -> None:
    app = wrap(detach=detach, max_running=1, drain_timeout=SECONDS)
    barrier = threading.Barrier(2, timeout=SECONDS)
    seen: list[tuple[int, int, int, int]] = []
    ran: dict[int, set[int]] = {}

    async def main(loop: int) -> None:
        ran[loop] = set()
        event = anyio.Event()

        async def work() -> None:
            ran[loop].add(threading.get_ident())
            await event.wait()

        async with serving(app) as server:
            await anyio.to_thread.run_sync(barrier.wait)
            groups = [tasks(work), tasks(work)]
            for group in groups:
                await server.request(group)
            await until(lambda: groups[0].tasks[0].state == "running")  # type: ignore[attr-defined]
            await anyio.to_thread.run_sync(barrier.wait)
            # Each loop has one running and one waiting: the limit is a loop's.
            seen.append(app.status()[:4])
            await anyio.to_thread.run_sync(barrier.wait)
            server.stop()
            event.set()
        assert server.log == [STARTED, ENDED]
        assert [*map(states, groups)] == [["succeeded"], ["succeeded"]]
        assert ran[loop] == {threading.get_ident()}

    errors: list[BaseException] = []

    def thread() -> None:
        try:
            run(other, functools.partial(main, 1))
        except BaseException as exc:
            errors.append(exc)
            barrier.abort()

    worker = threading.Thread(target=thread)
    worker.start()
    try:
        run(anyio_backend, functools.partial(main, 0))
    except BaseException:
        barrier.abort()
        raise
    finally:
        worker.join()
    assert errors == []
    assert seen == [(2, 2, 2, 2)] * 2
    assert ran[0].isdisjoint(ran[1])


@both_modes
@pytest.mark.parametrize("other", [("asyncio", {}), ("trio", {})], ids=lambda b: b[0])
async def test_a_request_on_another_event_loop_runs_its_tasks_itself(
    other: Backend, detach: bool
) -> None:
    app = wrap(detach=detach)
    seen: list[Any] = []
    async with serving(app) as server:

        async def work() -> None:
            await anyio.lowlevel.checkpoint()
            seen.append((threading.get_ident(), app.status()[:4]))

        async def main() -> None:
            group = tasks(work, functools.partial(print, end=""), concurrency=1)
            await server.call(group)
            seen.append([*states(group), threading.get_ident()])

        await anyio.to_thread.run_sync(run, other, main)
        thread = seen[1][-1]
        assert thread != threading.get_ident()
        assert seen == [
            (thread, (1, 0, 1, 1)),
            ["succeeded", "succeeded", thread],
        ]
    assert server.log == [STARTED, ENDED]


@both_modes
async def test_without_a_lifespan_a_request_runs_its_tasks_itself(
    detach: bool, records: Callable[[str], list[str]]
) -> None:
    app = wrap(detach=detach)
    log: list[str] = []

    async def work() -> None:
        [task, *_] = app.tasks()
        log.append(f"{task.name} {task.state} {task.method} {task.path}")

    group = tasks(
        named("work", work),
        named("fails", fail, ValueError()),
        named("last", log.append, "last"),
    )
    await Server(app).call(group, path="/here")
    assert log == ["work running POST /here", "last"]
    assert states(group) == ["succeeded", "failed", "succeeded"]
    assert records("ERROR") == ["background task 'fails' failed"]
    assert app.status()[:4] == (0, 0, 0, 0)


# --- a server that cancels -----------------------------------------------------------


@both_modes
@pytest.mark.parametrize("moment", ["service", "drain", "shutdown"])
async def test_a_lifespan_whose_scope_is_cancelled_reports(
    moment: str, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    closing = anyio.Event()
    given: list[str] = []
    told: list[str] = []

    async def on_lost(lost: list[BackgroundTask]) -> None:
        await anyio.lowlevel.checkpoint()
        given.extend(task.name for task in lost)

    app = wrap(
        closing_slowly(closing, anyio.Event()),
        detach=detach,
        on_lost=on_lost,
        max_running=2,
        drain_timeout=0 if moment == "shutdown" else SECONDS,
        observers=[Listening(told)],
    )
    server = Server(app)
    cancelled: list[bool] = []

    async def live() -> None:
        with scope:
            await server.live()
        cancelled.append(scope.cancelled_caught)

    scope = anyio.CancelScope()
    groups = [
        tasks(named("running", forever), named("pending", forever)),
        tasks(named("returned", returning(forever))),
        tasks(named("waiting", forever)),
    ]
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as server.requests:
            server.requests.start_soon(live)
            await server.up.wait()
            for group in groups:
                await server.request(group)
            await until(lambda: states(groups[1]) == ["running"])
            await anyio.wait_all_tasks_blocked()
            if moment != "service":
                server.stop()
                await anyio.wait_all_tasks_blocked()
            if moment == "shutdown":
                await closing.wait()
            scope.cancel()
            await server.down.wait()
    assert cancelled == [True]
    assert report() == {
        "running": "running",
        "pending": "pending",
        "returned": "running",
        "waiting": "pending",
    }
    assert sorted(given) == sorted(report())
    assert sorted(t for t in told if "lost" in t) == [
        f"lost {name}" for name in sorted(report())
    ]
    for group in groups:
        assert {group.state, *states(group)} == {"lost"}
    assert server.log == [STARTED]
    assert app._supervisors == []


@only_asyncio
@both_modes
@pytest.mark.parametrize("moment", ["service", "drain", "cleanup", "shutdown"])
async def test_a_lifespan_that_asyncio_cancels_reports(
    moment: str, detach: bool, report: Callable[[], dict[str, str]]
) -> None:
    closing = anyio.Event()
    given: list[str] = []

    async def on_lost(lost: list[BackgroundTask]) -> None:
        await anyio.lowlevel.checkpoint()
        given.extend(task.name for task in lost)

    app = wrap(
        closing_slowly(closing, anyio.Event()),
        detach=detach,
        on_lost=on_lost,
        max_running=2,
        drain_timeout=0 if moment in ("cleanup", "shutdown") else SECONDS,
    )
    server = Server(app)
    stuck, loose = anyio.Event(), anyio.Event()

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            stuck.set()
            await loose.wait()
            server.log.append("cleaned")

    groups = [
        tasks(named("running", work), named("pending", forever)),
        tasks(named("returned", returning(forever))),
        tasks(named("waiting", forever)),
    ]
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as server.requests:
            living = asyncio.create_task(server.live())
            await server.up.wait()
            for group in groups:
                await server.request(group)
            await until(lambda: states(groups[1]) == ["running"])
            await anyio.wait_all_tasks_blocked()
            if moment != "service":
                server.stop()
                await anyio.wait_all_tasks_blocked()
            if moment == "cleanup":
                await stuck.wait()
            if moment == "shutdown":
                loose.set()
                await closing.wait()
            living.cancel()
            await asyncio.wait([living], timeout=0)
            loose.set()
            with pytest.raises(asyncio.CancelledError):
                await living
            await until(lambda: "cleaned" in server.log)
    assert report() == {
        "running": "running",
        "pending": "pending",
        "returned": "running",
        "waiting": "pending",
    }
    assert sorted(given) == sorted(report())
    for group in groups:
        assert {group.state, *states(group)} == {"lost"}
    assert server.log == [STARTED, "cleaned"]
    assert app._supervisors == []


@both_modes
async def test_what_a_cancelled_lifespan_raises_leaves(detach: bool) -> None:
    error = ValueError("the pool broke")

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            raise error

    server = Server(wrap(lifespan, detach=detach))
    caught: list[BaseException] = []

    async def live() -> None:
        try:
            await server.live()
        except BaseException as exc:
            caught.append(exc)
            if exc is not error:
                raise

    async with anyio.create_task_group() as group:
        group.start_soon(live)
        await server.up.wait()
        group.cancel_scope.cancel()
    assert caught == [error]


@both_modes
@pytest.mark.parametrize("steps", [0, 1, 2, 3, None])
@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_an_event_loop_that_ends_reports(
    use_uvloop: bool,
    steps: int | None,
    detach: bool,
    report: Callable[[], dict[str, str]],
) -> None:
    given: list[str] = []

    async def on_lost(lost: list[BackgroundTask]) -> None:
        await anyio.lowlevel.checkpoint()
        given.extend(task.name for task in lost)

    app = wrap(detach=detach, max_running=3, on_lost=on_lost)
    server = Server(app)
    never: list[str] = []
    groups = [
        tasks(cleaning(server.log, "running"), named("pending", forever)),
        tasks(
            cleaning(server.log, "one"),
            cleaning(server.log, "two"),
            named("three", forever),
            concurrency=2,
        ),
        tasks(named("stray", returning(forever))),
        tasks(named("waiting", never.append, "waiting")),
    ]
    requests: list[asyncio.Task[None]] = []

    async def main() -> None:
        requests.append(asyncio.create_task(server.live()))
        await server.up.wait()
        for group in groups:
            responded = asyncio.Event()
            call = server.call(group, responded=responded.set)
            requests.append(asyncio.create_task(call))
            await responded.wait()
        for _ in range(steps or 0):
            await anyio.lowlevel.checkpoint()
        if steps is None:
            await until(lambda: app.status().running_tasks == 4)
            await anyio.wait_all_tasks_blocked()
        # The runner cancels everything that is left, the requests and the jobs too.

    anyio.run(main, backend_options={"debug": True, "use_uvloop": use_uvloop})
    names = ["running", "pending", "one", "two", "three", "stray", "waiting"]
    assert sorted(report()) == sorted(names)
    assert sorted(given) == sorted(names)
    for group in groups:
        assert {group.state, *states(group)} == {"lost"}
    assert requests[0].cancelled()
    assert all(request.done() for request in requests)
    assert never == []
    if steps is None:
        # The runner has cancelled it, and once is enough. (What runs at once is in a
        # task group of anyio's, which goes on cancelling.)
        assert "running" in server.log
        assert report() == {
            "running": "running",
            "pending": "pending",
            "one": "running",
            "two": "running",
            "three": "pending",
            "stray": "running",
            "waiting": "pending",
        }


# So anyio says of the children of a task group that asyncio cancels before they begin.
never_awaited = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@never_awaited
@both_modes
@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_an_event_loop_may_end_at_any_step_of_a_group(
    use_uvloop: bool,
    concurrency: int,
    steps: int,
    detach: bool,
    report: Callable[[], dict[str, str]],
) -> None:
    server = Server(wrap(detach=detach))
    sleeps = [named("a", anyio.sleep, 60), named("b", asyncio.sleep, 60)]
    group = tasks(*sleeps, named("c", forever), concurrency=concurrency)
    calls: list[asyncio.Task[None]] = []

    async def main() -> None:
        calls.append(asyncio.create_task(server.live()))
        await server.up.wait()
        responded = asyncio.Event()
        call = server.call(tasks(group, named("d", forever)), responded=responded.set)
        calls.append(asyncio.create_task(call))
        await responded.wait()
        for _ in range(steps):
            await asyncio.sleep(0)

    run(("asyncio", {"use_uvloop": use_uvloop}), main)
    gc.collect()
    assert sorted(report()) == ["a", "b", "c", "d"]
    assert states(group) == ["lost"] * 3
    assert all(call.done() for call in calls)


@both_modes
@pytest.mark.parametrize("first", ["ends", "yields", "waits", "has waited", "breaks"])
@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_an_event_loop_may_end_when_a_task_has_just_begun(
    use_uvloop: bool,
    first: str,
    detach: bool,
    records: Callable[[str], list[str]],
) -> None:
    server = Server(wrap(detach=detach))
    calls: list[asyncio.Task[None]] = []
    event = asyncio.Event()

    async def work() -> None:
        if first == "breaks":
            raise ValueError
        if first == "yields":
            await asyncio.sleep(0)
            await asyncio.sleep(60)
        if first != "ends":
            await event.wait()
            await asyncio.sleep(60)

    group = tasks(named("work", work))

    async def main() -> None:
        calls.append(asyncio.create_task(server.live()))
        await server.up.wait()
        responded = asyncio.Event()
        call = server.call(group, responded=responded.set)
        calls.append(asyncio.create_task(call))
        await responded.wait()
        if first == "has waited":
            event.set()

    run(("asyncio", {"use_uvloop": use_uvloop}), main)
    assert all(call.done() for call in calls)
    [state] = states(group)
    if first == "breaks" and state == "failed":
        assert records("ERROR") == ["background task 'work' failed"]
    elif first == "ends" and state == "succeeded":
        assert records("ERROR") == []
    else:
        # It may not have come that far.
        assert state == "lost"
        [lost] = records("ERROR")
        assert [*reported(lost)] == ["work"]


@only_asyncio
async def test_a_job_that_is_cancelled_before_its_first_step_is_not_forgotten(
    records: Callable[[str], list[str]],
) -> None:
    app = wrap(detach=True, max_running=1)
    async with serving(app) as server:
        # What begins in a thread has a task of asyncio's before its first step.
        held = Held()
        first, second = tasks(named("first", held)), tasks(named("second", forever))
        before = asyncio.all_tasks()
        await server.call(first)
        [job] = app._supervisors[0].jobs()
        assert job.native is not None
        assert job.native not in before
        job.native.cancel()
        await server.call(second)
        await until(job.native.done)
        server.stop()
        await until(lambda: states(second) == ["running"])
        for job in app._supervisors[0].jobs():
            job.stop()
    assert server.log == [STARTED, ENDED]
    names = {name for record in records("ERROR") for name in reported(record)}
    assert names == {"first", "second"}


# --- what ends everything ------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("kind", ["sync", "async", "at once", "returned", "observer"])
def test_an_interrupt_leaves_and_the_rest_is_reported(
    anyio_backend: Backend,
    kind: str,
    detach: bool,
    records: Callable[[str], list[str]],
) -> None:
    async def interrupt() -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyboardInterrupt

    async def interrupt_at_once() -> None:
        raise KeyboardInterrupt

    kinds: dict[str, Callable[[], Any]] = {
        "sync": lambda: fail(KeyboardInterrupt()),
        "async": interrupt,
        "at once": interrupt_at_once,
        "returned": returning(interrupt),
        "observer": forget,
    }
    given: list[str] = []

    @contextmanager
    def observer(task: BackgroundTask) -> Generator[None]:
        if kind == "observer" and task.name == "interrupt":
            raise KeyboardInterrupt
        yield

    def on_lost(lost: list[BackgroundTask]) -> None:
        given.extend(task.name for task in lost)

    app = wrap(detach=detach, on_lost=on_lost, observers=[observer])
    server = Server(app)

    async def main() -> None:
        async with anyio.create_task_group() as server.requests:
            server.requests.start_soon(server.live)
            await server.up.wait()
            await server.request(tasks(named("other", forever)))
            await server.request(
                tasks(named("interrupt", kinds[kind]), named("next", forever))
            )
            await anyio.sleep_forever()

    run_until_interrupt(anyio_backend, main)
    names = {name for record in records("ERROR") for name in reported(record)}
    assert names == {"other", "interrupt", "next"}
    assert sorted(given) == sorted(names)


# --- limits --------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_no_more_groups_run_at_once_than_allowed(
    limit: int, detach: bool
) -> None:
    app = wrap(detach=detach, max_running=limit)
    running = most = 0
    turns = [anyio.Event() for _ in range(6)]
    started: list[int] = []

    async def work(turn: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        started.append(turn)
        await turns[turn].wait()
        running -= 1

    def has_started(due: int) -> bool:
        return len(started) >= due

    async with serving(app) as server:
        for turn in range(6):
            await server.request(tasks(functools.partial(work, turn), forget))
        await anyio.wait_all_tasks_blocked()
        assert app.status()[:4] == (limit, 6 - limit, limit, 12 - limit)
        # The one that ends first is not the one that was started first.
        for turn in reversed(range(limit)):
            turns[turn].set()
            due = min(6, 2 * limit - turn)
            await until(functools.partial(has_started, due))
            assert app.status().running_groups <= limit
        for event in turns:
            event.set()
            # Trio starts in any order what is started at the same time.
            await anyio.wait_all_tasks_blocked()
    assert started == [*range(6)]
    assert most == limit


async def forget() -> None:
    await anyio.lowlevel.checkpoint()


@both_modes
@pytest.mark.parametrize(
    "end",
    ["succeeds", "fails", "exits", "fails in a thread", "is cancelled", "runs nothing"],
)
async def test_the_end_of_a_group_starts_the_next(end: str, detach: bool) -> None:
    async def is_cancelled() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()

    ends: dict[str, Callable[[], Any]] = {
        "succeeds": forget,
        "fails": lambda: afail(ValueError()),
        "exits": lambda: afail(SystemExit()),
        "fails in a thread": lambda: fail(ValueError()),
        "is cancelled": is_cancelled,
        "runs nothing": BackgroundTasks(),
    }
    event = anyio.Event()
    app = wrap(detach=detach, max_running=1)
    async with serving(app) as server:
        await server.request(tasks(event.wait))
        await server.request(tasks(ends[end]))
        await server.request(tasks(lambda: server.log.append("last")))
        assert app.status().waiting_groups == 2
        event.set()
        await until(lambda: "last" in server.log)
        await until(lambda: app.status()[:4] == (0, 0, 0, 0))


async def afail(error: BaseException) -> None:
    await anyio.lowlevel.checkpoint()
    raise error


@both_modes
async def test_any_number_of_groups_may_be_allowed(detach: bool) -> None:
    event = anyio.Event()
    app = wrap(detach=detach, max_running=None)
    async with serving(app) as server:
        for _ in range(101):
            await server.request(tasks(event.wait))
        status = app.status()
        assert (status.running_groups, status.waiting_groups) == (101, 0)
        event.set()


@both_modes
async def test_waiting_groups_run_in_the_drain_in_order(detach: bool) -> None:
    event = anyio.Event()
    app = wrap(detach=detach, max_running=1)
    async with serving(app) as server:
        await server.request(tasks(event.wait))
        for name in "abc":
            await server.request(tasks(functools.partial(server.log.append, name)))
        server.stop()
        await anyio.wait_all_tasks_blocked()
        event.set()
    assert server.log == [STARTED, "a", "b", "c", ENDED]


# --- introspection -------------------------------------------------------------------


@both_modes
async def test_outstanding_tasks_are_listed(detach: bool) -> None:
    app = wrap(detach=detach, max_running=2)
    first, second = anyio.Event(), anyio.Event()
    async with serving(app) as server:
        assert app.status()[:4] == (0, 0, 0, 0)
        assert app.tasks() == []
        before = time.monotonic()
        group = tasks(
            named("a", first.wait), named("b", second.wait), named("c", forget)
        )
        await server.request(group, path="/first")
        both = tasks(
            *(named(name, second.wait) for name in "def"), forget, concurrency=2
        )
        await server.request(tasks(both), path="/second")
        await server.request(tasks(named("g", forget)), path="/third")
        await anyio.wait_all_tasks_blocked()
        assert app.status()[:4] == (2, 1, 3, 5)
        listed = {task.name: task for task in app.tasks()}
        assert len(listed) == 8
        assert {name: (task.path, task.state) for name, task in listed.items()} == {
            "a": ("/first", TaskState.RUNNING),
            "b": ("/first", TaskState.PENDING),
            "c": ("/first", TaskState.PENDING),
            "d": ("/second", TaskState.RUNNING),
            "e": ("/second", TaskState.RUNNING),
            "f": ("/second", TaskState.PENDING),
            f"{__name__}.forget": ("/second", TaskState.PENDING),
            "g": ("/third", TaskState.PENDING),
        }
        assert {task.method for task in listed.values()} == {"POST"}
        handles = [task for task in group.tasks if isinstance(task, BackgroundTask)]
        assert [listed[name].id for name in "abc"] == [task.id for task in handles]
        assert all(
            0 <= task.age <= time.monotonic() - before for task in listed.values()
        )
        # The time that passes shows, and what has ended does not.
        await anyio.sleep(0.01)
        first.set()
        await until(lambda: handles[1].state is TaskState.RUNNING)
        again = {task.name: task for task in app.tasks()}
        assert again["b"].age > listed["b"].age
        assert again["b"] == listed["b"]._replace(
            state=TaskState.RUNNING, age=again["b"].age
        )
        assert "a" not in again
        second.set()
        await until(lambda: app.status()[:4] == (0, 0, 0, 0))
        assert app.tasks() == []


@both_modes
async def test_a_task_sees_itself_running(detach: bool) -> None:
    app = wrap(detach=detach)
    seen: list[Any] = []

    async def look() -> None:
        seen.append([(task.name, task.state) for task in app.tasks()])

    def look_from_thread() -> None:
        seen.append([(task.name, task.state) for task in app.tasks()])
        seen.append(app.status()[:4])

    async with serving(app) as server:
        await server.request(
            tasks(
                named("one", look), named("two", look_from_thread), named("three", look)
            )
        )
    assert seen == [
        [("one", "running"), ("two", "pending"), ("three", "pending")],
        [("two", "running"), ("three", "pending")],
        (1, 0, 1, 1),
        [("three", "running")],
    ]


@both_modes
async def test_tasks_are_listed_while_the_application_stops(detach: bool) -> None:
    closing, closed = anyio.Event(), anyio.Event()

    app = wrap(closing_slowly(closing, closed), detach=detach, drain_timeout=0)
    cleaning = anyio.Event()
    clean = anyio.Event()

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                cleaning.set()
                await clean.wait()

    async with serving(app) as server:
        await server.request(tasks(named("work", work), named("next", forget)))
        await anyio.wait_all_tasks_blocked()
        server.stop()
        await cleaning.wait()
        assert [(task.name, task.state) for task in app.tasks()] == [
            ("work", "running"),
            ("next", "pending"),
        ]
        clean.set()
        await closing.wait()
        assert app.status()[:4] == (0, 0, 0, 0)
        assert app.tasks() == []
        closed.set()


@both_modes
async def test_any_thread_may_look_at_any_time(detach: bool) -> None:
    app = wrap(detach=detach, max_running=3)
    stop = False
    looks = 0

    def watch() -> None:
        nonlocal looks
        while not stop:
            status = app.status()
            assert status.running_groups <= 3
            assert all(task.state in ("pending", "running") for task in app.tasks())
            looks += 1
            time.sleep(0.0001)

    def grow(group: BackgroundTasks) -> None:
        group.add_task(forget)
        add_task(forget)

    def mixture() -> BackgroundTasks:
        inner = tasks(forget, forget, concurrency=2)
        group = tasks(forget, lambda: None, returning(forget), inner)
        group.tasks.append(starlette.background.BackgroundTask(forget))
        group.add_task(grow, inner)
        group.add_task(grow, group)
        return group

    async with serving(app) as server:

        async def flood() -> None:
            nonlocal stop
            try:
                for _ in range(50):
                    await server.request(mixture())
                    await anyio.lowlevel.checkpoint()
                await until(lambda: app.status()[:4] == (0, 0, 0, 0))
            finally:
                stop = True

        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(anyio.to_thread.run_sync, watch)
            group.start_soon(flood)
    assert looks > 10


# --- what is left --------------------------------------------------------------------


class Precious:
    """What a task is given, and what nobody is to hold any longer than that."""


@both_modes
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("kind", ["sync", "async", "returns", "fails", "stock"])
async def test_a_job_that_has_ended_leaves_nothing(
    kind: str, concurrency: int, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what is logged, and with it what has raised.
    monkeypatch.setattr(logging.getLogger("postlude"), "disabled", True)
    told: list[str] = []
    app = wrap(detach=detach, observers=[Listening(told)])

    async def work(precious: Precious) -> None:
        await anyio.lowlevel.checkpoint()

    async def broken(precious: Precious) -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError(precious)

    def make() -> tuple[BackgroundTasks, weakref.ref[Precious]]:
        precious = Precious()
        group = BackgroundTasks(concurrency=concurrency)
        if kind == "sync":
            group.add_task(lambda precious: None, precious)
        elif kind == "async":
            group.add_task(work, precious)
        elif kind == "returns":
            group.add_task(lambda call, value: call(value), work, precious)
        elif kind == "fails":
            group.add_task(broken, precious)
        else:
            stock = starlette.background
            inner = stock.BackgroundTasks([stock.BackgroundTask(work, precious)])
            group.tasks += [stock.BackgroundTask(work, precious), inner]
        return group, weakref.ref(precious)

    async with serving(app) as server:
        groups = [make() for _ in range(3)]
        held = [ref for _, ref in groups]
        while groups:
            await server.call(groups.pop()[0])
        assert all(ref() for ref in held) or told
        await until(lambda: app.status()[:4] == (0, 0, 0, 0))
        # What was done last goes with the next steps of event loop and thread.
        await until(lambda: gc.collect() >= 0 and not any(ref() for ref in held))


@both_modes
async def test_what_is_lost_leaves_nothing_when_the_application_has_ended(
    detach: bool,
) -> None:
    app = wrap(detach=detach, drain_timeout=0, max_running=1)

    async def work(precious: Precious) -> None:
        # asyncio keeps a cancelled timer, which this is not.
        await anyio.Event().wait()

    def make() -> tuple[BackgroundTasks, weakref.ref[Precious]]:
        precious = Precious()
        group = BackgroundTasks()
        group.add_task(work, precious)
        group.add_task(print, precious)
        return group, weakref.ref(precious)

    groups = [make() for _ in range(2)]
    held = [ref for _, ref in groups]
    async with serving(app) as server:
        while groups:
            await server.request(groups.pop()[0])
        await until(lambda: app.status().running_tasks)
        server.stop()
        await server.down.wait()
    del server
    await until(lambda: gc.collect() >= 0 and not any(ref() for ref in held))


# --- properties ----------------------------------------------------------------------


class Units:
    """Makes the tasks of a plan, and books what becomes of each."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.ended: list[str] = []
        self.stuck: set[str] = set()
        self.handles: dict[str, BackgroundTask] = {}
        self._numbers = itertools.count()

    def group(self, plan: tuple[int, list[Any]]) -> BackgroundTasks:
        concurrency, items = plan
        group = BackgroundTasks(concurrency=max(concurrency, 1))
        for item in items:
            if isinstance(item, tuple):
                made: Any = self.group(item)
            elif item == "stock":
                made = starlette.background.BackgroundTask(self.unit(item, group))
            else:
                made = BackgroundTask(self.unit(item, group))
                self.handles[made.name] = made
            if not concurrency:
                made = starlette.background.BackgroundTasks([made])
            group.tasks.append(made)
        return group

    def unit(self, kind: str, group: BackgroundTasks) -> Callable[[], Any]:
        # Threads make some as well.
        name = f"{kind} {next(self._numbers)}"
        self.made.append(name)
        func = getattr(self, kind)
        args = (
            (name, group) if kind in ("adds", "adds_in_a_thread", "grows") else (name,)
        )
        return named(name, func, *args)

    async def quick(self, name: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.ended.append(name)

    async def slow(self, name: str) -> None:
        await anyio.sleep(0.005)
        self.ended.append(name)

    stock = slow

    async def nests(self, name: str) -> None:
        async with anyio.create_task_group() as children:
            children.start_soon(anyio.sleep, 0.004)
            children.start_soon(anyio.sleep, 0.006)
        self.ended.append(name)

    async def cleans(self, name: str) -> None:
        try:
            await anyio.sleep(0.01)
        except anyio.get_cancelled_exc_class():
            self.stuck.add(name)
            # Trio asks for the shield.
            with anyio.CancelScope(shield=is_trio()):
                await anyio.sleep(0.003)
            self.stuck.remove(name)
            raise
        self.ended.append(name)

    async def swallows(self, name: str) -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep(0.01)
        self.ended.append(name)

    async def fails_late(self, name: str) -> None:
        try:
            await anyio.sleep(0.01)
        finally:
            self.ended.append(name)
            raise ValueError(name)

    async def exits(self, name: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.ended.append(name)
        raise SystemExit

    def sync(self, name: str) -> None:
        self.ended.append(name)

    def works(self, name: str) -> None:
        time.sleep(0.003)
        self.ended.append(name)

    def breaks(self, name: str) -> None:
        self.ended.append(name)
        raise ValueError(name)

    def returns(self, name: str) -> Awaitable[None]:
        return self.slow(name)

    def returns_what_cleans(self, name: str) -> Awaitable[None]:
        return self.cleans(name)

    async def adds(self, name: str, group: BackgroundTasks) -> None:
        await anyio.lowlevel.checkpoint()
        self.adds_in_a_thread(name, group)

    def adds_in_a_thread(self, name: str, group: BackgroundTasks) -> None:
        add_task(self.unit("sync", group))
        add_task(self.unit("quick", group))
        self.ended.append(name)

    def grows(self, name: str, group: BackgroundTasks) -> None:
        group.add_task(self.unit("quick", group))
        group.add_task(self.unit("sync", group))
        self.ended.append(name)


KINDS = [
    *["quick", "slow", "stock", "nests", "cleans", "swallows", "fails_late", "exits"],
    *["sync", "works", "breaks", "returns", "returns_what_cleans"],
    *["adds", "adds_in_a_thread", "grows"],
]


def any_requests(kinds: list[str]) -> st.SearchStrategy[list[tuple[Any, int]]]:
    """Draws groups, each with the milliseconds that pass after it.

    A group is how many of its tasks may run at once, or 0 if they are in groups of
    Starlette's, and these tasks.
    """
    concurrency = st.sampled_from([1, 2, 3, 0])
    kind = st.sampled_from(kinds)
    group = st.recursive(
        st.tuples(concurrency, st.lists(kind)),
        lambda group: st.tuples(
            concurrency, st.lists(st.one_of(kind, group), max_size=4)
        ),
        max_leaves=4,
    )
    pause = st.integers(0, 3)
    return st.lists(st.tuples(group, pause), min_size=1, max_size=6)


class Book(logging.Handler):
    """Keeps what is told of tasks, on each way that there is to tell of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[str] = []
        self.in_threads: list[str] = []
        self.given: list[str] = []
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if " lost: " in record.getMessage():
            lost = reported(record.getMessage())
            self.lost += lost
            self.in_threads += [name for name in lost if "thread" in lost[name]]

    async def on_lost(self, lost: list[BackgroundTask]) -> None:
        await anyio.lowlevel.checkpoint()
        self.given += [task.name for task in lost]

    def wrap(self, **options: Any) -> BackgroundTasksMiddleware:
        observers = [Listening(self.told)]
        return wrap(on_lost=self.on_lost, observers=observers, **options)

    @contextmanager
    def open(self) -> Generator[None]:
        logger = logging.getLogger("postlude")
        logger.addHandler(self)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = True
            logger.removeHandler(self)

    def check(self, units: Units) -> None:
        """Checks that what was added has either ended or been named, once."""
        # What a thread is about may end after all.
        ended = [name for name in units.ended if name not in self.in_threads]
        assert len({*self.lost}) == len(self.lost)
        assert {*self.lost}.isdisjoint(ended)
        assert sorted(ended + self.lost) == sorted(units.made)
        assert sorted(self.given) == sorted(self.lost)
        for name in {*units.handles} - {*self.in_threads}:
            task = units.handles[name]
            assert (task.state is TaskState.LOST) == (name in self.lost)
            assert (task.state in ("succeeded", "failed")) == (name in ended)
        counts = self.count()
        assert counts["accepted"] == len(units.made)
        assert counts["lost"] == len(self.lost)
        # A thread that was left behind comes to that later.
        wait_until(lambda: self.count()["enter"] == self.count()["exit"])

    def count(self) -> Counter[str]:
        return Counter(entry.partition(" ")[0] for entry in self.told.copy())


# What fails depends on the time that things take: a smaller example would tell nothing.
any_time = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)


@pytest.mark.parametrize(
    "backend",
    [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})],
    ids=["asyncio", "uvloop", "trio"],
)
@any_time
@given(
    requests=any_requests(KINDS),
    stop_at=st.integers(0, 6),
    detach=st.booleans(),
    max_running=st.sampled_from([1, 2, 3, None]),
    threads=st.sampled_from([1, 2, None]),
    drain_timeout=st.sampled_from([0, 0.004, 0.01, None]),
    cancels=st.sampled_from(["", "scope", "native"]),
)
def test_what_was_added_has_either_ended_or_been_named(
    backend: Backend,
    *,
    requests: list[tuple[Any, int]],
    stop_at: int,
    detach: bool,
    max_running: int | None,
    threads: int | None,
    drain_timeout: float | None,
    cancels: str,
) -> None:
    book, units = Book(), Units()
    app = book.wrap(
        detach=detach,
        max_running=max_running,
        threads=threads,
        drain_timeout=drain_timeout,
    )

    async def main() -> None:
        server = Server(app)
        scope = anyio.CancelScope()
        living: list[Any] = []

        async def live() -> None:
            if not is_trio():
                living.append(asyncio.current_task())
            with scope, suppress(asyncio.CancelledError):
                await server.live()

        def stop() -> None:
            if cancels == "scope" or (cancels and is_trio()):
                scope.cancel()
            elif cancels:
                living[0].cancel()
            else:
                server.stop()

        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as server.requests:
                server.requests.start_soon(live)
                await server.up.wait()
                for index, (plan, pause) in enumerate(requests):
                    if index == stop_at:
                        stop()
                    await server.request(units.group(plan))
                    if index < stop_at:
                        assert app.status().running_groups <= (max_running or 6)
                    await anyio.sleep(pause / 1000)
                if stop_at >= len(requests):
                    stop()
        assert app.status()[:4] == (0, 0, 0, 0)
        assert app._supervisors == []

    with book.open():
        run(backend, main)
    book.check(units)
    assert book.in_threads == []
    assert units.stuck == set()


@never_awaited
@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
@any_time
@given(
    # A thread that is left behind cannot add any more.
    requests=any_requests([*{*KINDS} - {"adds_in_a_thread", "grows"}]),
    detach=st.booleans(),
    max_running=st.sampled_from([1, 2, 3, None]),
    threads=st.sampled_from([1, 2, None]),
)
def test_what_an_event_loop_has_not_come_to_is_named(
    use_uvloop: bool,
    requests: list[tuple[Any, int]],
    detach: bool,
    max_running: int | None,
    threads: int | None,
) -> None:
    book, units = Book(), Units()
    app = book.wrap(detach=detach, max_running=max_running, threads=threads)
    calls: set[asyncio.Task[None]] = set()

    async def main() -> None:
        server = Server(app)
        calls.add(asyncio.create_task(server.live()))
        await server.up.wait()
        for plan, pause in requests:
            responded = asyncio.Event()
            call = server.call(units.group(plan), responded=responded.set)
            calls.add(asyncio.create_task(call))
            await responded.wait()
            await asyncio.sleep(pause / 1000)
        # The runner cancels everything that is left, at once.

    with book.open():
        run(("asyncio", {"use_uvloop": use_uvloop}), main)
    gc.collect()
    assert all(call.done() for call in calls)
    book.check(units)
