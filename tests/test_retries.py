"""A function that stamina or tenacity tries again is a task like any other."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
import stamina
import tenacity

from postlude import BackgroundTasks, TaskState, task
from postlude._options import options_of

pytestmark = pytest.mark.anyio

again: dict[str, Callable[[Any], Any]] = {
    "stamina": stamina.retry(
        on=ConnectionError, attempts=3, wait_initial=0, wait_jitter=0
    ),
    "tenacity": tenacity.retry(
        retry=tenacity.retry_if_exception_type(ConnectionError),
        stop=tenacity.stop_after_attempt(3),
        reraise=True,
    ),
}
each_library = pytest.mark.parametrize("library", again)
both_kinds = pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])


class Service:
    """Fails so many times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked: list[tuple[int, str]] = []

    def ask(self, number: int, to: str) -> None:
        self.asked.append((number, to))
        if len(self.asked) <= self.failures:
            raise ConnectionError(f"failure {len(self.asked)}")


def decorated(service: Service, library: str, *, sync: bool) -> Any:
    @again[library]
    @task(always=True)
    def send_receipt(number: int, to: str) -> None:
        service.ask(number, to)

    @again[library]
    @task(always=True)
    async def send_receipt_async(number: int, to: str) -> None:
        service.ask(number, to)

    return send_receipt if sync else send_receipt_async


@each_library
@both_kinds
@pytest.mark.parametrize("failures", [0, 2, 3])
async def test_a_task_is_tried_until_it_succeeds_or_its_tries_are_over(
    library: str, failures: int, *, sync: bool
) -> None:
    service = Service(failures)
    tasks = BackgroundTasks()
    handle = tasks.add_task(decorated(service, library, sync=sync), 7, to="you")
    name = "send_receipt" if sync else "send_receipt_async"
    assert handle.name == f"{__name__}.decorated.<locals>.{name}"
    assert handle.is_async is not sync
    assert options_of(handle.func).always
    if failures < 3:
        await tasks()
        assert handle.state is TaskState.SUCCEEDED
    else:
        with pytest.raises(ConnectionError, match="failure 3") as raised:
            await tasks()
        assert handle.state is TaskState.FAILED
        assert handle.exception is raised.value
        assert raised.value.__notes__ == [f"in background task {handle.name!r}"]
    assert service.asked == [(7, "you")] * min(failures + 1, 3)


@each_library
async def test_the_time_limit_of_a_task_is_one_for_all_its_tries(
    library: str,
) -> None:
    tries: list[str] = []

    @task(timeout=0.2)
    @again[library]
    async def ask() -> None:
        tries.append("asked")
        if len(tries) == 2:
            await anyio.sleep_forever()
        raise ConnectionError

    tasks = BackgroundTasks()
    handle = tasks.add_task(ask)
    with pytest.raises(TimeoutError):
        await tasks()
    assert len(tries) == 2
    assert handle.state is TaskState.FAILED


@each_library
async def test_a_time_limit_inside_the_function_is_one_for_each_try(
    library: str,
) -> None:
    tries: list[str] = []

    @again[library]
    async def ask() -> None:
        try:
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        except TimeoutError as exc:
            tries.append("timed out")
            raise ConnectionError from exc

    tasks = BackgroundTasks()
    tasks.add_task(ask)
    with pytest.raises(ConnectionError):
        await tasks()
    assert len(tries) == 3
