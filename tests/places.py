"""The lifespan of an application, and where groups of tasks run in it or without."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from loops import SECONDS, until
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from postlude import BackgroundTasks, BackgroundTasksMiddleware, TaskState, add_task
from postlude._tasks import _worker_threads


@asynccontextmanager
async def alive(app: ASGIApp) -> AsyncGenerator[anyio.Event]:
    """Runs the lifespan of an application; it ends when all its tasks have.

    To set the event shuts it down before that.
    """
    started, stopping = anyio.Event(), anyio.Event()

    async def receive() -> Message:
        if not started.is_set():
            return {"type": "lifespan.startup"}
        await stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Message) -> None:
        assert message["type"].endswith(".complete"), message
        started.set()

    async def live() -> None:
        await app({"type": "lifespan", "state": {}}, receive, send)

    async with anyio.create_task_group() as group:
        group.start_soon(live)
        with anyio.fail_after(SECONDS):
            await started.wait()
        yield stopping
        stopping.set()


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
        with anyio.fail_after(SECONDS):
            async with alive(self.app):
                yield

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
