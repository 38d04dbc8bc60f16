"""`BackgroundTasks` as FastAPI injects them, and responses to return.

Change `from fastapi import BackgroundTasks` to
`from postlude.fastapi import BackgroundTasks`. The parameter is then a
`postlude.BackgroundTasks`: one a request, shared by the path operation, its
dependencies and theirs. FastAPI calls it as it calls its own; in
`BackgroundTasksMiddleware` it also runs where FastAPI would drop it.

Example:
    .. code-block:: python

        from fastapi import FastAPI

        from postlude import BackgroundTasksMiddleware
        from postlude.fastapi import BackgroundTasks

        api = FastAPI()


        @api.post("/users/{name}")
        async def signup(name: str, tasks: BackgroundTasks) -> dict[str, str]:
            tasks.add_task(print, "welcome,", name)
            return {"name": name}


        app = BackgroundTasksMiddleware(api)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeAlias

import fastapi
from typing_extensions import override

import postlude

from ._tasks import (
    _PENDING,
    _RUNNING,
    BackgroundTask,
    TaskState,
    _give_up,
    _name,
    home,
    logger,
)
from .middleware import _Request
from .responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

__all__ = [
    "BackgroundTask",
    "BackgroundTasks",
    "FileResponse",
    "HTMLResponse",
    "JSONResponse",
    "PlainTextResponse",
    "RedirectResponse",
    "Response",
    "StreamingResponse",
]

P = ParamSpec("P")


class _Injected(postlude.BackgroundTasks):
    """A group that FastAPI calls, or forgets."""

    @override
    def add_task(
        self, func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> BackgroundTask:
        task = BackgroundTask(func, *args, **kwargs)
        if self._state is _PENDING or self._state is _RUNNING:
            self.tasks.append(task)
        # Else it comes from behind the `yield` of a dependency.
        elif (here := home.get()) is not None:
            here.add(task)
        else:
            task._state = TaskState.CANCELLED
            logger.warning(
                "background task %r is not run, as FastAPI has called those of its "
                "request already: wrap the application in BackgroundTasksMiddleware",
                task.name,
            )
        return task

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        # Nothing else tells that FastAPI has dropped it. When Python exits, what else
        # is needed may be gone.
        if self._state is not _PENDING or is_exiting():
            return
        if names := ", ".join(repr(_name(task)) for task in _give_up(self.tasks)):
            logger.warning(
                "background tasks dropped by FastAPI, as the request failed, was a "
                "WebSocket, or had a response with a background of its own: %s",
                names,
            )


async def _inject(
    background_tasks: fastapi.BackgroundTasks,
) -> postlude.BackgroundTasks:
    """Returns the group of the request; FastAPI has one list of its own for each."""
    tasks = background_tasks.tasks
    for task in tasks:
        if type(task) is _Injected:
            return task
    group = _Injected()
    tasks.append(group)
    here = home.get()
    if isinstance(here, _Request):
        here.add(group)
    return group


BackgroundTasks: TypeAlias = Annotated[
    postlude.BackgroundTasks, fastapi.Depends(_inject)
]
"""What to annotate a parameter with, as with `fastapi.BackgroundTasks`.

.. versionadded:: 0.1.0
"""
