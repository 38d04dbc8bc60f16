"""Where groups of tasks run: here and now, or in the middleware, in either mode."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
from starlette.types import Message, Receive, Scope, Send

from postlude import BackgroundTasks, BackgroundTasksMiddleware, TaskState, add_task
from postlude._tasks import _worker_threads

# Reached by nothing but a failure.
SECONDS = 10


async def until(condition: Callable[[], object]) -> None:
    """Waits for what a thread does, of which the event loop is not told."""
    with anyio.fail_after(SECONDS):
        while not condition():  # noqa: ASYNC110 - a thread sets no event
            await anyio.sleep(0.001)


def has_ended(group: BackgroundTasks) -> bool:
    return group.state not in (TaskState.PENDING, TaskState.RUNNING)


class Place:
    """Runs groups, and tells what there is of threads."""

    def __init__(self, detach: bool | None) -> None:
        self.is_alone = detach is None
        self._detach = detach is True
        self._options: dict[str, Any] = {}
        self.app = self._wrap()

    def _wrap(self) -> BackgroundTasksMiddleware:
        return BackgroundTasksMiddleware(_app, detach=self._detach, **self._options)

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncGenerator[None]:
        """Runs the lifespan of an application; when that ends, it waits for tasks."""
        self._options = options
        self.app = self._wrap()
        up, stopping = anyio.Event(), anyio.Event()
        waits = iter([anyio.lowlevel.checkpoint, stopping.wait])
        kinds = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> Message:
            await next(waits)()
            return {"type": next(kinds)}

        async def send(message: Message) -> None:
            up.set()

        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as children:
                children.start_soon(self.app, {"type": "lifespan"}, receive, send)
                await up.wait()
                yield
                stopping.set()

    async def start(self, group: BackgroundTasks, *, status: int = 200) -> None:
        """Runs a group, at least until the application has returned.

        With the status of an error, it is added by `add_task()`.
        """
        if self.is_alone:
            # What has failed is asked of the tasks.
            with suppress(Exception):
                await group()
            return

        async def send(message: Message) -> None: ...

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "status": status,
            "background": group,
        }
        await self.app(scope, receive, send)

    async def run(self, group: BackgroundTasks) -> None:
        """Runs a group to its end."""
        if self.is_alone:
            await self.start(group)
            return
        async with self.open(**self._options):
            await self.start(group)
            await until(lambda: has_ended(group))

    def threads(self) -> anyio.CapacityLimiter:
        """Returns the limit of threads, once it has been made."""
        if self.is_alone:
            return _worker_threads()
        return self.app._settings.limiter.get()


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for answer in "startup", "shutdown":
            await receive()
            await send({"type": f"lifespan.{answer}.complete"})
        return
    background: BackgroundTasks = scope["background"]
    is_error = scope["status"] >= 400
    if is_error:
        add_task(background)
    await send({"type": "http.response.start", "status": scope["status"]})
    await send({"type": "http.response.body"})
    if not is_error:
        await background()
