"""An application in the middleware, for the tests of what watches its tasks."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Literal

import anyio.from_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from postlude import (
    BackgroundTask,
    BackgroundTasksMiddleware,
    TaskState,
    add_task,
    task,
)
from postlude.middleware import Observer

Backend = tuple[Literal["asyncio", "trio"], dict[str, Any]]


def serve(
    app: ASGIApp | Callable[[], Response | None],
    backend: Backend,
    *observers: Observer,
    meanwhile: Callable[[], object] = lambda: None,
    **options: Any,
) -> None:
    """Makes one request; in the end its tasks have ended, or are lost.

    Args:
        app: An application, or what its only endpoint does, and maybe answers.
        backend: The event loop to use.
        *observers: What watches the tasks.
        meanwhile: Called after the request, while the application is up.
        **options: Options of the middleware.
    """
    if not isinstance(app, Starlette):
        app = Starlette(routes=[Route("/", endpoint(app))])
    wrapped = BackgroundTasksMiddleware(app, observers=observers, **options)
    name, settings = backend
    with TestClient(wrapped, backend=name, backend_options=settings) as client:
        assert client.get("/").status_code == 200
        meanwhile()


def endpoint(answer: Any) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return answer() or Response()

    return respond


def stop(backend: Backend, *observers: Observer) -> None:
    """Stops an application that has two tasks left: one runs, one waits for it."""
    started = threading.Event()

    @task(name="running")
    async def run() -> None:
        started.set()
        await anyio.sleep_forever()

    @task(name="pending")
    def never_run() -> None: ...

    def answer() -> None:
        add_task(run)
        add_task(never_run)

    options: dict[str, Any] = {"detach": True, "drain_timeout": 0}
    serve(answer, backend, *observers, meanwhile=lambda: started.wait(10), **options)


def give_up(*observers: Observer) -> BackgroundTask:
    """Cancels a request while a thread is about to return what would be awaited."""
    release = threading.Event()

    async def main() -> BackgroundTask:
        entered = asyncio.Event()

        async def inner() -> None: ...

        @task(name="given up")
        def outer() -> Awaitable[None]:
            anyio.from_thread.run_sync(entered.set)
            release.wait(10)
            return inner()

        async def send(message: object) -> None: ...

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        made = BackgroundTask(outer)
        app = BackgroundTasksMiddleware(Response(background=made), observers=observers)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        running = asyncio.ensure_future(app(scope, receive, send))
        await entered.wait()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        release.set()
        while made.state is TaskState.RUNNING:  # noqa: ASYNC110 - a thread sets it
            await asyncio.sleep(0)
        return made

    return asyncio.run(main())
