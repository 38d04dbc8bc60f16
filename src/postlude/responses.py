"""Starlette's responses, name for name, each with `add_task()`.

Change `from starlette.responses import ...` to `from postlude.responses import ...`.
The classes are subclasses of Starlette's, so `isinstance` holds.

When a response cannot be sent completely, its tasks do not run, as in Starlette: the
body failed half-way, the file is missing, the requested range is invalid, the request
was cancelled, or the server said by an `OSError` that the client went away (ASGI 2.4).
Those declared `always=True` do run. One `INFO` record on the logger `postlude` names
them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ParamSpec

import starlette.background
import starlette.responses
from starlette.responses import (
    AsyncContentStream,
    Content,
    ContentStream,
    MalformedRangeHeader,
    RangeNotSatisfiable,
    SyncContentStream,
)
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from ._tasks import (
    BackgroundTask,
    BackgroundTasks,
    TaskState,
    cut_short,
    home,
    unstarted,
)

__all__ = [
    "AsyncContentStream",
    "Content",
    "ContentStream",
    "FileResponse",
    "HTMLResponse",
    "JSONResponse",
    "MalformedRangeHeader",
    "PlainTextResponse",
    "RangeNotSatisfiable",
    "RedirectResponse",
    "Response",
    "StreamingResponse",
    "SyncContentStream",
]

P = ParamSpec("P")


class Response(starlette.responses.Response):
    """`starlette.responses.Response` with `add_task()`.

    Example:
        .. code-block:: python

            from starlette.requests import Request

            from postlude.responses import Response


            async def signup(request: Request) -> Response:
                response = Response(status_code=202)
                response.add_task(print, "send the welcome")
                return response

    .. versionadded:: 0.1.0
    """

    background: starlette.background.BackgroundTask | None

    def add_task(
        self, func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> BackgroundTask:
        """Adds a call to run once the response has been sent.

        It runs after the `background` that the response has, if any.

        Args:
            func: What to call, sync or async.
            *args: Positional arguments to call it with.
            **kwargs: Keyword arguments to call it with.

        Returns:
            The task, whose state can be watched.

        Raises:
            TypeError: If `func` is not callable, is a generator function, or cannot be
                called with these arguments.
        """
        return self._as_group().add_task(func, *args, **kwargs)

    def _as_group(self) -> BackgroundTasks:
        """Returns the background as a group, which tells when it is started."""
        background = self.background
        if isinstance(background, BackgroundTasks) and (
            type(background).__call__ is BackgroundTasks.__call__
        ):
            return background
        self.background = group = BackgroundTasks()
        if background is not None:
            # Whatever can be awaited once it is called will do, as in Starlette.
            group.tasks.append(background)
        return group

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response, then runs its tasks."""
        if self.background is not None:
            self._as_group()
        mine: list[starlette.responses.Response] = [self]
        token = unstarted.set(mine)
        cause: BaseException | None = None
        try:
            await super().__call__(scope, receive, send)
        except BaseException as exc:
            cause = exc
            raise
        finally:
            try:  # noqa: SIM105 - suppress() takes longer than what it guards
                unstarted.reset(token)
            except ValueError:
                # A coroutine that nobody awaits any more is closed in another context.
                pass
            background = self.background
            # One of its own kind, put there by the body, does not tell if it has run.
            if mine and background is not None:
                group = self._as_group()
                here = home.get()
                is_taken = here is not None and here.adopt(group)
                if not is_taken and (cause is not None or group is background):
                    group._state = TaskState.CANCELLED
                    await cut_short(group.tasks, cause, logging.INFO, here=here)
            del cause


class HTMLResponse(Response, starlette.responses.HTMLResponse):
    """`starlette.responses.HTMLResponse` with `add_task()`.

    Example:
        .. code-block:: python

            from postlude.responses import HTMLResponse

            response = HTMLResponse("<h1>Hello!</h1>")
            response.add_task(print, "sent")

    .. versionadded:: 0.1.0
    """


class PlainTextResponse(Response, starlette.responses.PlainTextResponse):
    """`starlette.responses.PlainTextResponse` with `add_task()`.

    Example:
        .. code-block:: python

            from postlude.responses import PlainTextResponse

            response = PlainTextResponse("Hello!")
            response.add_task(print, "sent")

    .. versionadded:: 0.1.0
    """


class JSONResponse(Response, starlette.responses.JSONResponse):
    """`starlette.responses.JSONResponse` with `add_task()`.

    Example:
        .. code-block:: python

            from postlude.responses import JSONResponse

            response = JSONResponse({"hello": "world"})
            response.add_task(print, "sent")

    .. versionadded:: 0.1.0
    """


class RedirectResponse(Response, starlette.responses.RedirectResponse):
    """`starlette.responses.RedirectResponse` with `add_task()`.

    Example:
        .. code-block:: python

            from postlude.responses import RedirectResponse

            response = RedirectResponse("/elsewhere")
            response.add_task(print, "sent")

    .. versionadded:: 0.1.0
    """


class StreamingResponse(Response, starlette.responses.StreamingResponse):
    """`starlette.responses.StreamingResponse` with `add_task()`.

    Example:
        .. code-block:: python

            from postlude.responses import StreamingResponse

            response = StreamingResponse(["Hello, ", "world!"])
            response.add_task(print, "sent")

    .. versionadded:: 0.1.0
    """


class FileResponse(Response, starlette.responses.FileResponse):
    """`starlette.responses.FileResponse` with `add_task()`.

    Example:
        .. code-block:: python

            from postlude.responses import FileResponse

            response = FileResponse("report.pdf")
            response.add_task(print, "sent")

    .. versionadded:: 0.1.0
    """
