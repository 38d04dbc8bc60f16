"""What a task may cost: time limits, limiters, and the threads they leave behind."""

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import starlette.background
from loops import SECONDS, Backend, is_trio, only_asyncio, run, until
from places import Place, has_ended
from servers import wait_until

from postlude import BackgroundTask, BackgroundTasks, _limits, _supervisor, task
from postlude._limits import Call
from postlude._tasks import _left_behind

pytestmark = pytest.mark.anyio

Records = Callable[[str], list[str]]

in_the_middleware = pytest.mark.parametrize(
    "place", [False, True], ids=["attached", "detached"], indirect=True
)
alone = pytest.mark.parametrize("place", [None], ids=["alone"], indirect=True)
each_kind = pytest.mark.parametrize("kind", ["async", "sync", "sync then async"])

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")

# Over soon, but not before a thread has been started.
SHORT = 0.2


class Held:
    """A task that is held until it is told to go on.

    Args:
        kind: `async`, `sync`, or `sync then async` for one that returns an awaitable.
        then: What a sync one does when it goes on.
    """

    def __init__(self, kind: str = "sync", then: Callable[[], Any] = int) -> None:
        self.kind = kind
        self.entered = 0
        self.go_on = threading.Event()
        self.then = then
        self.awaiting = anyio.Event()

    async def wait(self) -> None:
        self.awaiting.set()
        try:
            await until(self.go_on.is_set)
        finally:
            self.entered -= self.kind == "async"

    def hold(self) -> Any:
        self.entered += 1
        if self.kind != "sync":
            return self.wait()
        assert self.go_on.wait(SECONDS)
        return self.then()

    async def hold_async(self) -> None:
        await self.hold()

    def limited(self, **options: Any) -> Callable[[], Any]:
        """Returns a function, with options."""
        func = self.hold_async if self.kind == "async" else self.hold
        return task(name="held", **options)(functools.partial(func))


def group_of(*funcs: Callable[[], Any], concurrency: int = 1) -> BackgroundTasks:
    group = BackgroundTasks(concurrency=concurrency)
    for func in funcs:
        group.add_task(func)
    return group


def states(group: BackgroundTasks) -> list[str]:
    return [one.state for one in group.tasks if isinstance(one, BackgroundTask)]


def limited(func: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    options = options or {"timeout": SECONDS}
    return task(**options)(functools.partial(func, *args))


async def fill(limiter: anyio.CapacityLimiter) -> Callable[[], object]:
    """Takes all that a limiter has to give; returns what gives it back."""
    total, limiter.total_tokens = limiter.total_tokens, 1
    await limiter.acquire_on_behalf_of(fill)

    def release() -> None:
        limiter.total_tokens = total
        limiter.release_on_behalf_of(fill)

    return release


# --- time limits ---------------------------------------------------------------------


@each_kind
async def test_a_task_that_takes_too_long_fails_and_the_next_one_runs(
    kind: str, place: Place, records: Records
) -> None:
    held = Held(kind)
    ran: list[str] = []
    group = group_of(held.limited(timeout=SHORT), lambda: ran.append("next"))
    await place.run(group)
    assert states(group) == ["failed", "succeeded"]
    assert ran == ["next"]
    first: Any = group.tasks[0]
    message = f"timed out after {SHORT} s"
    if kind == "sync":
        message += "; its thread goes on"
    assert isinstance(first.exception, TimeoutError)
    assert str(first.exception) == message
    assert first.exception.__notes__ == ["in background task 'held'"]
    assert (first.finished_at - first.started_at).total_seconds() >= SHORT * 0.9
    assert len(records("ERROR")) == (not place.is_alone)
    held.go_on.set()


async def test_a_time_limit_may_be_over_at_the_first_step(place: Place) -> None:
    async def block() -> None:
        time.sleep(0.02)  # noqa: ASYNC251 - that is the point
        await anyio.sleep(SECONDS)

    for _ in range(3):
        group = group_of(limited(block, timeout=0.01))
        await place.run(group)
        [failed] = group.tasks
        assert isinstance(failed, BackgroundTask)
        assert isinstance(failed.exception, TimeoutError)


@each_kind
async def test_a_task_that_ends_in_time_has_succeeded(kind: str, place: Place) -> None:
    held = Held(kind)
    held.go_on.set()
    group = group_of(held.limited(timeout=SECONDS, limiter=2))
    await place.run(group)
    assert states(group) == ["succeeded"]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_what_a_limited_task_raises_is_its_failure(
    kind: str, place: Place
) -> None:
    error = StopIteration("broken") if kind == "sync" else ValueError("broken")

    def fail() -> None:
        raise error

    async def fail_async() -> None:
        raise error

    group = group_of(limited(fail if kind == "sync" else fail_async))
    await place.run(group)
    [failed] = group.tasks
    assert isinstance(failed, BackgroundTask)
    assert error in (failed.exception, getattr(failed.exception, "__cause__", None))


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_what_exits_in_a_limited_task_has_failed(kind: str, place: Place) -> None:
    async def leave() -> None:
        raise SystemExit

    group = group_of(limited(leave if kind == "async" else exit))
    await place.run(group)
    assert states(group) == ["failed"]


@pytest.mark.parametrize("of", ["its turn", "a thread"])
async def test_the_time_that_a_task_waits_does_not_count(of: str, place: Place) -> None:
    limiter = anyio.CapacityLimiter(1)
    async with place.open(threads=1):
        warm = group_of(int)
        await place.start(warm)
        await until(lambda: has_ended(warm))
        full = limiter if of == "its turn" else place.threads()
        release = await fill(full)
        group = group_of(limited(int, timeout=SHORT, limiter=limiter))
        async with anyio.create_task_group() as children:
            children.start_soon(place.start, group)
            await until(lambda: full.statistics().tasks_waiting)
            # That this is longer than its time is what matters.
            await anyio.sleep(SHORT * 1.5)
            release()
        await until(lambda: states(group) == ["succeeded"])


# --- threads left behind -------------------------------------------------------------


@asynccontextmanager
async def left_behind(
    place: Place, held: Held, *then: Callable[[], Any]
) -> AsyncGenerator[tuple[BackgroundTasks, anyio.CapacityLimiter]]:
    """Leaves the thread of a task behind, and afterwards sees everything given back."""
    limiter = anyio.CapacityLimiter(1)
    options = {"timeout": SHORT, "limiter": limiter}
    async with place.open(drain_timeout=0):
        group = group_of(held.limited(**options), *then)
        await place.start(group)
        await until(lambda: states(group)[0] == "failed")
        try:
            yield group, limiter
        finally:
            held.go_on.set()
        await until(lambda: not limiter.borrowed_tokens)
        assert not place.threads().borrowed_tokens
        assert not place.app._settings.left_behind
        assert not _left_behind


async def test_a_thread_left_behind_keeps_its_places_until_it_ends(
    place: Place,
) -> None:
    held = Held()
    async with left_behind(place, held) as (_, limiter):
        assert limiter.borrowed_tokens == 1
        assert place.threads().borrowed_tokens == 1
        assert place.app.status().threads_left_behind == (not place.is_alone)
        second = group_of(limited(int, limiter=limiter))
        async with anyio.create_task_group() as children:
            children.start_soon(place.start, second)
            await until(lambda: limiter.statistics().tasks_waiting)
            assert place.threads().borrowed_tokens == 1
            held.go_on.set()
        await until(lambda: states(second) == ["succeeded"])
    assert place.app.status().threads_left_behind == 0


async def test_what_a_thread_left_behind_raises_is_logged(
    place: Place, records: Records
) -> None:
    def fail() -> None:
        raise ValueError("broken")

    async with left_behind(place, Held(then=fail)):
        pass
    message = "background task 'held' failed after it had been given up"
    await until(lambda: message in records("WARNING"))


async def test_a_thread_left_behind_may_ask_whether_it_is_to_end(
    place: Place, records: Records
) -> None:
    ended: list[str] = []

    def end() -> None:
        try:
            anyio.from_thread.check_cancelled()
        finally:
            ended.append("end")

    async with left_behind(place, Held(then=end)):
        pass
    assert ended == ["end"]
    assert "given up" not in "".join(records("WARNING"))


async def test_a_coroutine_of_a_thread_left_behind_is_closed(place: Place) -> None:
    # Otherwise Python warns of it.
    async with left_behind(place, Held(then=anyio.sleep_forever)):
        pass


@alone
@only_asyncio
@pytest.mark.parametrize("fails", [False, True])
async def test_what_a_thread_came_to_before_the_event_loop_saw_it_is_told(
    fails: bool, place: Place, records: Records
) -> None:
    def end() -> object:
        if fails:
            raise ValueError("broken")
        return anyio.sleep_forever()

    held = Held(then=end)
    calls: list[Call] = []
    group = group_of(held.limited(timeout=SECONDS))

    async def call(one: Call) -> None:
        calls.append(one)
        await complete(one)

    complete = Call.complete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "complete", call)
        request = asyncio.ensure_future(group())
        await until(lambda: held.entered)
    held.go_on.set()
    wait_until(lambda: calls[0]._outcome)
    request.cancel()
    await asyncio.wait([request])
    assert states(group) == ["cancelled"]
    message = "background task 'held' failed after it had been given up"
    assert (message in records("WARNING")) == fails


@alone
@only_asyncio
async def test_a_thread_that_comes_too_late_does_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Callable[[], object]] = []

    async def delay(func: Callable[[], object]) -> None:
        late.append(func)
        await anyio.sleep_forever()

    monkeypatch.setattr(_limits, "_in_thread", delay)
    held = Held()
    request = asyncio.ensure_future(group_of(held.limited(timeout=SECONDS))())
    await until(lambda: late)
    request.cancel()
    await asyncio.wait([request])
    late[0]()
    assert held.entered == 0


@in_the_middleware
async def test_the_report_of_the_shutdown_names_threads_left_behind(
    place: Place, records: Records
) -> None:
    held = Held()
    async with place.open():
        group = group_of(held.limited(timeout=SHORT))
        await place.start(group)
        await until(lambda: states(group) == ["failed"])
    message = "threads of background tasks that have been given up go on, and may"
    assert records("WARNING") == [f"{message} delay the exit: 'held' (1)"]
    held.go_on.set()
    await until(lambda: not place.app._settings.left_behind)


def test_a_thread_may_end_after_its_event_loop(
    place: Place, anyio_backend: Backend
) -> None:
    held = Held()

    async def main() -> None:
        async with place.open():
            group = group_of(held.limited(timeout=SHORT))
            await place.start(group)
            await until(lambda: states(group) == ["failed"])
        threading.Timer(0.1, held.go_on.set).start()

    run(anyio_backend, main)
    run(anyio_backend, lambda: until(lambda: not place.app._settings.left_behind))
    run(anyio_backend, lambda: until(lambda: not _left_behind))


# --- cancellation --------------------------------------------------------------------

PHASES = {
    "waiting for its turn": "stopped",
    "waiting for a thread": "stopped",
    "in a thread": "its thread goes on",
    "awaiting what it returned": "stopped",
    "async": "stopped",
}


@alone
@pytest.mark.parametrize("by", ["scope", "asyncio"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancellation_ends_a_limited_task_where_it_can(
    phase: str, by: str, place: Place, records: Records
) -> None:
    if by == "asyncio" and is_trio():
        pytest.skip("Trio cancels by scopes")
    kinds = {"async": "async", "awaiting what it returned": "sync then async"}
    held = Held(kinds.get(phase, "sync"))
    limiter = anyio.CapacityLimiter(1)
    full = {"waiting for its turn": limiter, "waiting for a thread": place.threads()}
    release = await fill(full[phase]) if phase in full else int
    group = group_of(held.limited(limiter=limiter, timeout=SECONDS), int)
    scope = anyio.CancelScope()
    natives: list[Any] = []

    async def request() -> None:
        with scope:
            if not is_trio():
                natives.append(asyncio.current_task())
            await group()

    async with anyio.create_task_group() as children:
        children.start_soon(request)
        if phase in full:
            await until(lambda: full[phase].statistics().tasks_waiting)
        elif phase == "in a thread":
            await until(lambda: held.entered)
        else:
            await held.awaiting.wait()
        if by == "scope":
            scope.cancel()
            if phase == "in a thread":
                # It waits for the thread.
                await anyio.wait_all_tasks_blocked()
                assert states(group) == ["running", "pending"]
                held.go_on.set()
        else:
            natives[0].cancel()
    thread_ended = (phase, by) == ("in a thread", "scope")
    assert states(group) == ["succeeded" if thread_ended else "cancelled", "cancelled"]
    name = anyio.get_cancelled_exc_class().__name__
    told = "" if thread_ended else f"'held' ({PHASES[phase]}), "
    assert records("WARNING") == [
        f"background tasks cut short by {name}: {told}'builtins.int' (not started)"
    ]
    goes_on = (phase, by) == ("in a thread", "asyncio")
    assert len(_left_behind) == goes_on
    assert limiter.borrowed_tokens == (goes_on or phase == "waiting for its turn")
    held.go_on.set()
    release()
    await until(lambda: not limiter.borrowed_tokens)
    await until(lambda: not place.threads().borrowed_tokens)
    assert not _left_behind


@alone
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_limited_task_that_always_runs_cannot_be_cancelled_by_a_scope(
    kind: str, place: Place
) -> None:
    held = Held(kind)
    group = group_of(*[held.limited(always=True, limiter=1, timeout=SECONDS)] * 2)
    with anyio.move_on_after(SECONDS) as scope:
        async with anyio.create_task_group() as children:
            children.start_soon(group)
            await until(lambda: held.entered)
            scope.cancel()
            held.go_on.set()
    assert states(group) == ["succeeded", "succeeded"]


@in_the_middleware
async def test_a_limited_task_that_always_runs_does_so_after_an_error(
    place: Place,
) -> None:
    held, ran = Held(), Held()
    held.go_on.set()
    ran.go_on.set()
    group = group_of(held.limited(timeout=1), ran.limited(timeout=1, always=True))
    async with place.open():
        await place.start(group, status=500)
    assert states(group) == ["cancelled", "succeeded"]
    assert (held.entered, ran.entered) == (0, 1)


@in_the_middleware
@each_kind
async def test_the_shutdown_waits_for_limited_tasks(kind: str, place: Place) -> None:
    held = Held(kind)
    group = group_of(held.limited(limiter=1, timeout=SECONDS), int)
    async with anyio.create_task_group() as children, place.open():
        children.start_soon(place.start, group)
        await until(lambda: held.entered)
        threading.Timer(0.1, held.go_on.set).start()
    assert states(group) == ["succeeded", "succeeded"]


@in_the_middleware
@pytest.mark.parametrize(
    ("kind", "where"),
    [("async", "running"), ("sync", "in a thread"), ("sync then async", "running")],
)
async def test_limited_tasks_that_have_no_time_to_end_are_lost(
    kind: str,
    where: str,
    place: Place,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_supervisor, "_CLEANUP_SECONDS", 0.1)
    monkeypatch.setattr(_supervisor, "_PRESSURE_SECONDS", 0.2)
    held = Held(kind)
    group = group_of(held.limited(timeout=SECONDS), int)
    # Trio has no way to leave a thread behind but a time limit.
    timer = threading.Timer(1, held.go_on.set)
    async with anyio.create_task_group() as children, place.open(drain_timeout=0):
        children.start_soon(place.start, group)
        await until(lambda: held.entered)
        if kind != "sync":
            await held.awaiting.wait()
        timer.start()
    expected = f"2 background tasks lost: 'held' ({where}), 'builtins.int' (pending)"
    assert records("ERROR") == [expected]
    assert states(group)[1] == "lost"
    timer.join()
    await until(lambda: not place.app._settings.left_behind)


# --- limiters ------------------------------------------------------------------------


class Busy:
    """Counts how many calls go on at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.all_in = threading.Barrier(2)

    def enter(self) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def work(self) -> None:
        self.enter()
        # As many as may are here at once.
        self.all_in.wait(SECONDS)
        with self.lock:
            self.now -= 1

    async def work_async(self) -> None:
        self.enter()
        await until(lambda: self.most == 2)
        self.now -= 1


@pytest.mark.parametrize("kind", ["work", "work_async"])
async def test_no_more_tasks_of_a_function_run_at_once_than_its_limiter_allows(
    kind: str, place: Place
) -> None:
    busy = Busy()
    work = task(limiter=2)(getattr(busy, kind))
    groups = [
        group_of(work, work, concurrency=2),
        group_of(work, functools.partial(work)),
        group_of(*[work] * 4, concurrency=4),
    ]
    async with place.open(), anyio.create_task_group() as children:
        for group in groups:
            children.start_soon(place.start, group)
        await until(lambda: all(has_ended(group) for group in groups))
    for group in groups:
        assert {*states(group)} == {"succeeded"}
    assert busy.most == 2


def test_each_event_loop_has_a_limiter_of_its_own(anyio_backend: Backend) -> None:
    busy = Busy()
    work = task(limiter=1)(busy.work)
    threads = [
        threading.Thread(target=run, args=[anyio_backend, group_of(work)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert busy.most == 2


def test_a_limiter_that_another_event_loop_uses_is_refused(
    anyio_backend: Backend, place: Place
) -> None:
    work = limited(int, limiter=anyio.CapacityLimiter(1))
    for loop in "first", "second":
        group = group_of(work, int)
        run(anyio_backend, functools.partial(place.run, group))
        [one, next_one] = group.tasks
        assert isinstance(one, BackgroundTask)
        assert isinstance(next_one, BackgroundTask)
        assert next_one.state == "succeeded"
        assert (one.state == "failed") == (loop == "second")
        if loop == "second":
            assert "CapacityLimiter" in str(one.exception)
            assert "give task() an int as limiter" in str(one.exception)


# --- among other tasks ---------------------------------------------------------------


async def test_limited_tasks_keep_their_place_and_take_a_thread_of_their_own(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips: list[object] = []
    run_sync: Any = anyio.to_thread.run_sync

    async def count(func: Any, *args: Any, **options: Any) -> Any:
        trips.append(func)
        return await run_sync(func, *args, **options)

    ran: list[int] = []
    # Three limited ones, each between plain ones or beside another.
    options: dict[int, Any] = {3: {"timeout": 5}, 5: {"limiter": 1}, 6: {"limiter": 1}}
    adds = [functools.partial(ran.append, number) for number in range(9)]
    group = group_of(*[task(**options.get(n, {}))(add) for n, add in enumerate(adds)])
    async with place.open():
        monkeypatch.setattr(anyio.to_thread, "run_sync", count)
        await place.start(group)
        await until(lambda: has_ended(group))
    assert ran == [*range(9)]
    assert len(trips) == 6
    times: list[Any] = [getattr(one, "started_at", None) for one in group.tasks]
    assert times == sorted(times)


@pytest.mark.parametrize("kind", ["sync", "sync then async"])
async def test_a_limited_sync_task_has_its_context_and_can_call_the_event_loop(
    kind: str, place: Place
) -> None:
    seen: list[object] = []

    async def then() -> None:
        seen.append(variable.get())

    def work() -> object:
        seen.append(variable.get())
        seen.append(anyio.from_thread.run_sync(threading.get_ident))
        return then() if kind == "sync then async" else None

    variable.set("added")
    group = group_of(limited(work))
    await place.run(group)
    assert states(group) == ["succeeded"]
    expected = ["added", threading.get_ident(), "added"]
    assert seen == expected[: 2 if kind == "sync" else 3]


class Subclass(BackgroundTask):
    """One that runs in a way of its own."""

    def __init__(self, func: Callable[[], Any]) -> None:
        starlette.background.BackgroundTask.__init__(self, func)
        self.calls = 0

    async def __call__(self) -> None:
        self.calls += 1
        await super().__call__()


async def test_limits_hold_in_a_subclass(place: Place) -> None:
    held = Held("async")
    one = Subclass(held.limited(timeout=SHORT))
    await place.run(BackgroundTasks([one]))
    assert one.calls == 1
    assert isinstance(one.exception, TimeoutError)
