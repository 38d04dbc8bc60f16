"""The middleware that makes tasks belong to the application, in any ASGI framework."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic
from typing import Any, NamedTuple, NoReturn, ParamSpec

import anyio.lowlevel
from starlette.background import BackgroundTask as StockTask
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._supervisor import (
    NOTHING,
    Job,
    Observer,
    Settings,
    Supervisor,
    describe,
    give_up,
    has_ended,
    lock,
    plain,
)
from ._tasks import BackgroundTask, BackgroundTasks, TaskState, _group, home

__all__ = [
    "BackgroundTasksMiddleware",
    "Observer",
    "OutstandingTask",
    "Status",
    "add_task",
]

P = ParamSpec("P")

# The key of a scope by which a middleware sees that another one is around it.
_KEY = "postlude"
_numbers = itertools.count(1)
# The lowest status of an error.
_ERRORS = 400
# A test that keeps tasks from running puts another class in its place.
job_class: Callable[
    [list[StockTask], dict[str, str], Settings, Supervisor | None], Job
] = Job


def add_task(
    func: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
) -> BackgroundTask:
    """Adds a call to run after the response to the current request.

    It needs `BackgroundTasksMiddleware`, and works wherever a request is handled: in
    an endpoint, sync or async, a dependency, another middleware, in any framework. In
    a task it adds another one, which runs after those of the same request; in a
    WebSocket, one that runs when the connection has ended.

    The task runs if the response was sent with a status below 400, or the WebSocket
    had been accepted. If not, one `INFO` record names it, and it does not run unless
    it is declared `always=True`.

    Example:
        .. code-block:: python

            from starlette.applications import Starlette
            from starlette.requests import Request
            from starlette.responses import PlainTextResponse
            from starlette.routing import Route

            from postlude import BackgroundTasksMiddleware, add_task


            async def homepage(request: Request) -> PlainTextResponse:
                add_task(print, "somebody came", flush=True)
                return PlainTextResponse("Welcome!")


            app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", homepage)]))

    Args:
        func: What to call, sync or async.
        *args: Positional arguments to call it with.
        **kwargs: Keyword arguments to call it with.

    Returns:
        The task, whose state can be watched.

    Raises:
        RuntimeError: If there is no request, or it has ended with all its tasks.
        TypeError: If `func` is not callable, is a generator function, or cannot be
            called with these arguments.

    .. versionadded:: 0.1.0
    """
    here = home.get()
    if here is None:
        raise RuntimeError(
            "add_task() needs a request: wrap the application in "
            "BackgroundTasksMiddleware, and call it while that serves one; anywhere "
            "else postlude.engines.enqueue() hands a task over to its engine"
        )
    task = BackgroundTask(func, *args, **kwargs)
    here.add(task)
    return task


class OutstandingTask(NamedTuple):
    """A task that is waiting or running, as `BackgroundTasksMiddleware` lists it.

    Example:
        .. code-block:: python

            from postlude import TaskState
            from postlude.middleware import OutstandingTask

            task = OutstandingTask(
                name="shop.send_receipt",
                id="0b9c2b9e-7d2c-4ee1-8a6c-3f1f8f0b9a55",
                state=TaskState.RUNNING,
                age=1.5,
                method="POST",
                path="/orders",
            )
            assert task._asdict()["path"] == "/orders"

    .. versionadded:: 0.1.0
    """

    name: str
    """What logs call it."""
    id: str
    """Its `BackgroundTask.id`."""
    state: TaskState
    """`TaskState.PENDING` or `TaskState.RUNNING`."""
    age: float
    """How long ago its request handed it over, in seconds."""
    method: str
    """The method of its request, or `WEBSOCKET`."""
    path: str
    """The path of its request."""


class Status(NamedTuple):
    """How much there is to do, as `BackgroundTasksMiddleware` tells it.

    Example:
        .. code-block:: python

            from postlude.middleware import Status

            status = Status(1, 0, 1, 4)
            assert status._asdict()["waiting_tasks"] == 4

    The tasks of one request are one group.

    .. versionadded:: 0.1.0
    """

    running_groups: int
    """How many groups are running."""
    waiting_groups: int
    """How many wait for those, as `max_running` groups are running."""
    running_tasks: int
    """How many tasks are running."""
    waiting_tasks: int
    """How many tasks have not been started, in groups of either kind."""
    threads_left_behind: int = 0
    """How many threads go on with tasks that have failed, as they took too long."""


class BackgroundTasksMiddleware:
    """Makes background tasks belong to the application instead of the request.

    Wrap the whole application: any ASGI 3 application, whether it supports `lifespan`
    or not. Then nothing that happens to a request touches its tasks, and no task can
    harm a request. Failures are logged, at most `max_running` groups run at once, and
    when the server stops, tasks have `drain_timeout` seconds to end before the
    application's own shutdown. What does not is named in one `ERROR` record.

    It takes over the tasks of postlude, whatever response they are attached to;
    Starlette's own only on `postlude.responses`, or in a group of postlude's.

    Example:
        .. code-block:: python

            from starlette.applications import Starlette
            from starlette.requests import Request
            from starlette.responses import PlainTextResponse
            from starlette.routing import Route

            from postlude import BackgroundTask, BackgroundTasksMiddleware


            async def homepage(request: Request) -> PlainTextResponse:
                task = BackgroundTask(print, "somebody came", flush=True)
                return PlainTextResponse("Welcome!", background=task)


            app = BackgroundTasksMiddleware(Starlette(routes=[Route("/", homepage)]))

    Args:
        app: The application to wrap.
        detach: When tasks run. `False`: where Starlette runs them, and the request
            waits for them, so that what it has opened stays open. `True`: once the
            whole application has returned, without the request, so that it must not
            leave them anything that is closed by then.
        drain_timeout: How long tasks have to end when the server stops, in seconds;
            `None` for no limit.
        max_running: How many groups, which are the tasks of one request each, may run
            at once; further ones wait in order. `None` for no limit.
        threads: How many threads tasks may hold at once; `None` for no limit.
        observers: Each is called with a task and returns a context manager that is
            entered around it, in the task's thread and context. It may also have
            methods `accepted(task)` and `lost(task)`. What it raises is logged.
        on_lost: Called with the list of tasks that were lost when the server stopped,
            on the event loop, sync or async; again for those added after that. It has
            to end by itself, as the shutdown waits for it. What it raises is logged.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is too small.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[Any]],
        *,
        detach: bool = False,
        drain_timeout: float | None = 20,
        max_running: int | None = 1000,
        threads: int | None = 40,
        observers: Iterable[Observer] = (),
        on_lost: Callable[[list[BackgroundTask]], object] | None = None,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {app!r}")
        if not isinstance(detach, bool):
            raise TypeError(f"detach must be True or False, not {detach!r}")
        if not isinstance(observers, Iterable):
            raise TypeError(f"observers must be a list of callables, not {observers!r}")
        observers = tuple(observers)
        for observer in observers:
            if not callable(observer):
                raise TypeError(
                    "an observer must be callable with a task and return a context "
                    f"manager; {observer!r} is not"
                )
        if on_lost is not None and not callable(on_lost):
            raise TypeError(
                f"on_lost must be callable with a list of tasks, not {on_lost!r}"
            )
        self.app: ASGIApp = app
        self._detach = detach
        self._settings = Settings(
            drain_timeout=_limit("drain_timeout", drain_timeout, 0),
            max_running=_limit("max_running", max_running, 1),
            threads=_limit("threads", threads, 1),
            observers=observers,
            accepting=tuple(
                observer
                for observer in observers
                if callable(getattr(observer, "accepted", None))
            ),
            on_lost=on_lost,
            # Older versions of AnyIO know these by their names.
            limiter=anyio.lowlevel.RunVar(f"postlude_threads_{next(_numbers)}"),
            unsupervised=set(),
            left_behind=set(),
        )
        # Usually one; one for each event loop that has run the lifespan.
        self._supervisors: list[Supervisor] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the lifespan, and runs the tasks that belong to it."""
        kind = scope["type"]
        if _KEY in scope or kind not in ("http", "websocket", "lifespan"):
            # A middleware around this one does the work.
            await self.app(scope, receive, send)
            return
        scope[_KEY] = self
        if kind == "lifespan":
            try:
                await self._live(scope, receive, send)
            finally:
                scope.pop(_KEY, None)
            return
        request = _Request(self, scope, send)
        token = home.set(request)
        try:
            await self.app(scope, receive, request.send)
        except BaseException as exc:
            if (job := request.close()) is not None:
                await job.leave(exc)
            raise
        else:
            job = request.close()
            if job is not None and not (self._detach and job.is_supervised):
                await job.complete()
        finally:
            scope.pop(_KEY, None)
            request.let_go()
            try:  # noqa: SIM105 - suppress() takes longer than what it guards
                home.reset(token)
            except ValueError:
                # A coroutine that nobody awaits is closed in another context.
                pass

    @staticmethod
    def current() -> BackgroundTasksMiddleware:
        """Returns the middleware that serves the current request.

        Frameworks that build the middleware themselves hide it, as
        `app.add_middleware()` does.

        Raises:
            RuntimeError: If there is no request.
        """
        here = home.get()
        if not isinstance(here, _Request):
            raise RuntimeError(  # noqa: TRY004 - it is the place that is wrong
                "there is no request served by BackgroundTasksMiddleware: wrap the "
                "application in it"
            )
        return here.middleware

    def status(self) -> Status:
        """Tells how many groups and tasks are running and waiting."""
        groups = [supervisor.groups() for supervisor in self._supervisors.copy()]
        counts = [job.count() for job in self._jobs()]
        return Status(
            sum(running for running, _ in groups) + len(self._settings.unsupervised),
            sum(waiting for _, waiting in groups),
            sum(running for running, _ in counts),
            sum(waiting for _, waiting in counts),
            len(self._settings.left_behind),
        )

    def tasks(self) -> list[OutstandingTask]:
        """Lists the tasks that are running or waiting, request by request."""
        now = monotonic()
        return [
            OutstandingTask(
                task.name,
                task.id,
                TaskState.PENDING if where == "pending" else TaskState.RUNNING,
                now - job.since,
                *job.request.values(),
            )
            for job in self._jobs()
            for task, where in job.outstanding()
        ]

    def _jobs(self) -> list[Job]:
        jobs = [*self._settings.unsupervised.copy()]
        for supervisor in self._supervisors.copy():
            jobs += supervisor.jobs()
        return jobs

    def _supervisor(self) -> Supervisor | None:
        """Returns the one of the running event loop."""
        for supervisor in self._supervisors:
            if supervisor.is_here():
                return supervisor
        return None

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the lifespan, also for an application that refuses to.

        See https://asgi.readthedocs.io/en/latest/specs/lifespan.html.
        """
        supervisor = Supervisor(self._settings)
        left: BaseException | None = None
        async with supervisor:
            lifespan = _Lifespan(self._supervisors, supervisor, receive, send)
            # What it raises is kept from the supervisor's task group.
            try:
                await lifespan.run(self.app, scope)
            except BaseException as exc:
                left = exc
            finally:
                lifespan.close()
        try:
            if left is not None:
                raise left
        finally:
            del left


class _Lifespan:
    """The lifespan of an application, which may refuse to have one."""

    def __init__(
        self,
        supervisors: list[Supervisor],
        supervisor: Supervisor,
        receive: Receive,
        send: Send,
    ) -> None:
        self._supervisors = supervisors
        self._supervisor = supervisor
        self._receive = receive
        self._send = send
        self._has_received = False
        self._is_refused = False
        # What the application has answered last, and what the server has to say yet.
        self._answer = ""
        self._shutdown: Message | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Runs it, and in the end stops all tasks that are left."""
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            # Not even to begin is how an application refuses.
            if self._has_received and not self._is_refused:
                await self._end()
                raise
        if self._answer:
            await self._end()
        else:
            await self._stand_in()

    async def receive(self) -> Message:
        """Holds the server's shutdown back until the tasks have ended."""
        self._has_received = True
        message = self._shutdown or await self._receive()
        if message["type"] == "lifespan.shutdown":
            # Should the application give up the waiting, it may ask once more.
            self._shutdown = message
            await self._supervisor.drain()
        return message

    async def send(self, message: Message) -> None:
        """Passes on what the application answers."""
        kind = message["type"]
        if not kind.startswith("lifespan."):
            self._is_refused = True
            raise RuntimeError(f"{kind!r} is no answer to a lifespan message")
        self._answer = kind
        if kind == "lifespan.startup.complete":
            self._supervisors.append(self._supervisor)
        await self._send(message)

    async def _stand_in(self) -> None:
        """Answers the server in place of the application."""
        if not self._has_received:
            await self.receive()
        await self.send({"type": "lifespan.startup.complete"})
        await self.receive()
        await self.send({"type": "lifespan.shutdown.complete"})

    async def _end(self) -> None:
        """Stops the tasks if the server has not said that it stops."""
        if self._supervisor in self._supervisors:
            await self._supervisor.drain()

    def close(self) -> None:
        """Lets later requests run their tasks themselves."""
        if self._supervisor in self._supervisors:
            self._supervisors.remove(self._supervisor)


class _Request:
    """A request on its way through the application, and the home of what it adds."""

    __slots__ = (
        "_accepted",
        "_added",
        "_called",
        "_handed_over",
        "_job",
        "_scope",
        "_send",
        "_sent",
        "_status",
        "is_open",
        "middleware",
    )

    def __init__(
        self, middleware: BackgroundTasksMiddleware, scope: Scope, send: Send
    ) -> None:
        self.middleware = middleware
        self._scope = scope
        self._send = send
        self.is_open = True
        self._status = 0
        self._sent = self._accepted = False
        # A group among them is to be called as well, by a framework that may drop it.
        self._added: tuple[StockTask, ...] = ()
        self._called: tuple[StockTask, ...] = ()
        self._handed_over: tuple[StockTask, ...] = ()
        self._job: Job | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Passes on what the application sends, and sees how far that is."""
        kind = message["type"]
        if kind == "http.response.body":
            if not message.get("more_body", False):
                return self._send_last(message)
        elif kind == "http.response.start":
            self._status = message["status"]
        elif kind == "websocket.accept":
            self._accepted = True
        elif kind == "http.response.pathsend":
            return self._send_last(message)
        return self._send(message)

    async def _send_last(self, message: Message) -> None:
        # Cancelled from now on, the server has all of it.
        self._sent = True
        try:
            await self._send(message)
        except Exception:
            self._sent = False
            raise

    def take(self, task: BackgroundTask) -> Awaitable[object] | None:
        """Takes over a task once the response has been sent."""
        if not self._sent or not self.is_open:
            return None
        tasks: list[StockTask] = [
            task if type(task) is BackgroundTasks else plain(task)
        ]
        if self._added or self._called:
            self._sort(tasks)
        if self.middleware._detach:
            self._handed_over += tuple(tasks)
            return NOTHING
        if self._added:
            tasks += self._chosen()
        if tasks and (job := self._give(tasks)).is_open:
            return job.complete()
        return NOTHING

    def adopt(self, task: BackgroundTask) -> bool:
        """Takes over a task if the response has been sent, and lets nobody wait."""
        if not self._sent or not self.is_open:
            return False
        tasks: list[StockTask] = [task]
        self._sort(tasks)
        self._handed_over += tuple(tasks)
        return True

    def add(self, task: StockTask) -> None:
        """Runs a task when the response has been sent; from any thread.

        Raises:
            RuntimeError: If the request and its tasks have ended.
        """
        with lock:
            if self.is_open:
                self._added += (task,)
                # A request is closed without the lock: it may have been meanwhile.
                if self.is_open:
                    return
                self._added = self._added[:-1]
        if self._job is None or not self._job.extend([task]):
            raise has_ended()

    def close(self) -> Job | None:
        """Ends the request; returns the job if there are tasks that are left."""
        self.is_open = False
        if not self._added and not self._handed_over:
            return None
        tasks = [*self._handed_over, *self._chosen()]
        # The contexts of the tasks hold the request, which is not to hold them.
        self._handed_over = ()
        return self._give(tasks) if tasks else None

    def let_go(self) -> None:
        """Keeps alive no more than it must, as contexts that live on hold the request.

        The timers of a server's connections have some of these.
        """
        self._scope, self._send = _NO_SCOPE, _refuse
        if self._job is not None and not self._job.is_open:
            self._job = None

    def _sort(self, tasks: list[StockTask]) -> None:
        """Takes the groups out of what is called whose turn comes after the rest.

        These are to run however the request turns out, as whatever is called.
        """
        if tasks[0] in self._called and tasks[0] not in self._added:
            # It has been given to the job already.
            tasks.clear()
        for added in self._added:
            if isinstance(added, BackgroundTasks) and _take_out(added, tasks):
                self._called += (added,)

    def _chosen(self) -> list[StockTask]:
        """Returns the added tasks that are to run as the request has turned out."""
        if not self._added:
            return []
        with lock:
            added, self._added = [*self._added], ()
        groups = [task for task in added if isinstance(task, BackgroundTasks)]
        if not groups:
            return self._allowed(added)
        called: list[StockTask] = []
        added = [task for task in added if task not in groups]
        for group in groups:
            if not group.tasks:
                # What is added from now on has to go elsewhere.
                group._state = TaskState.SUCCEEDED
            elif group.state is TaskState.PENDING:
                # If not, it was called before the end of the body, or is given up.
                (called if group in self._called else added).append(group)
                self._called += (group,)
        return self._allowed(added) + called

    def _allowed(self, added: list[StockTask]) -> list[StockTask]:
        """Returns those of the tasks that may run, and names the others."""
        if self._accepted or (self._sent and self._status < _ERRORS):
            return added
        if self._scope["type"] == "websocket":
            why = "the WebSocket was not accepted"
        elif self._status >= _ERRORS:
            why = f"the response had status {self._status}"
        elif self._status:
            why = "the response was not sent completely"
        else:
            why = "there was no response"
        return give_up(added, why, self._scope)

    def _give(self, tasks: list[StockTask]) -> Job:
        """Adds tasks to the request's job, or makes that of them."""
        job = self._job
        if job is not None and job.extend(tasks):
            return job
        middleware = self.middleware
        supervisor = middleware._supervisor()
        about = describe(self._scope)
        self._job = job = job_class(tasks, about, middleware._settings, supervisor)
        if supervisor is not None and job._supervisor is not None:
            supervisor.accept(job, at_once=not middleware._detach)
        return job


# What a request has when it has ended.
_NO_SCOPE: Scope = {}


async def _refuse(message: Message) -> NoReturn:
    raise RuntimeError(
        f"{message['type']} was sent after the application had returned: await what "
        "sends it before that"
    )


def _take_out(group: BackgroundTasks, tasks: list[StockTask]) -> bool:
    """Takes a group out of a list, and out of the groups in there, if it is there."""
    found = False
    for task in tasks.copy():
        held = _group(task)
        if held is group:
            tasks.remove(task)
        elif held is None or not _take_out(group, held.tasks):
            continue
        elif not held.tasks:
            tasks.remove(task)
        found = True
    return found


def _limit(name: str, value: Any, least: int) -> float:
    """Checks a limit, which is a duration if it may be 0, and a number if not."""
    if value is None:
        return math.inf
    kinds, kind = ((int, float), "seconds") if least == 0 else (int, "an int")
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} must be {kind}, or None for no limit, not {value!r}")
    if not value >= least:
        raise ValueError(
            f"{name} must be at least {least}, or None for no limit, not {value!r}"
        )
    return value
