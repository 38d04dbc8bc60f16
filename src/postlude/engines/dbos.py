"""Handing tasks over to DBOS, which keeps them in SQLite or PostgreSQL.

Needs `dbos`: `pip install 'postlude[dbos]'`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import pickle
import sqlite3
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import (
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from threading import Lock
from typing import Any, NamedTuple, Self, cast

import anyio
import anyio.to_thread
from dbos import DBOS, DBOSClient, DBOSConfig, EnqueueOptions, StepOptions
from sqlalchemy import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    OperationalError,
    StatementError,
)
from starlette.background import BackgroundTask as StockTask

from postlude.middleware import _limit

from ._adapter import Adapter, Headers, Restore, is_plain
from ._client import Refused

__all__ = ["DBOSEngine"]

# How often a worker looks for tasks, in seconds.
_POLL = 0.2
# How long a process waits for the one before it to leave its SQLite file, in seconds.
_WAIT = 5
# How long a hand-over may take to connect to PostgreSQL, in seconds.
_CONNECT = 5

# What PostgreSQL calls its errors of a table that is not there, and, as they begin,
# those of a connection, of a server that stops, and of one that has too many of them.
_NO_TABLE = "42P01"
_NO_CONNECTION = ("08", "57P", "533")

_OF_A_STEP = StepOptions.__optional_keys__ - {"name"}
_OF_ASYNC = {"preemptible", "timeout_seconds"}
# What would break what is handed over.
_REFUSED = {
    "class_name": "a method gets its object among its arguments",
    "instance_name": "a method gets its object among its arguments",
    "name": "the worker finds the function by its own name",
    "serialization_type": "arguments are serialised when the task is added: give "
    "DBOSEngine a config with a serializer",
    "workflow_id": "each hand-over is a workflow of its own: use deduplication_id, or "
    "DBOS.start_workflow(engine.native(func), args, kwargs, {})",
    "workflow_id_reuse_policy": "each hand-over is a workflow of its own",
    "workflow_name": "the worker finds the function by its own name",
}
_OF_A_CALL = EnqueueOptions.__required_keys__ | EnqueueOptions.__optional_keys__
_KNOWN = {"max_recovery_attempts", *_OF_A_CALL, *_OF_A_STEP} - {*_REFUSED}


class _Call(NamedTuple):
    """A call whose arguments are serialised, unless they need not be."""

    name: str
    call: tuple[tuple[Any, ...], dict[str, Any], dict[str, str]] | None
    body: Any
    headers: dict[str, str]


class DBOSEngine(Adapter):
    """Keeps tasks in a database, from where this process or another one runs them.

    Nothing else is needed: with SQLite the application is its own worker, and what it
    has not finished when it dies runs when it starts again. On PostgreSQL several
    processes share the tasks.

    Each function is a DBOS workflow under its dotted name. Plain ones run in threads,
    async ones in an event loop of DBOS, so that neither holds up the application's.

    Example:
        .. code-block:: python

            import anyio

            from postlude import task
            from postlude.engines import enqueue
            from postlude.engines.dbos import DBOSEngine

            engine = DBOSEngine("sqlite:///tasks.sqlite")


            @task(engine=engine.options(retries_allowed=True, max_attempts=5))
            def resize(photo: int) -> None: ...


            async def main() -> None:
                async with engine:
                    await enqueue(resize, 42)


            anyio.run(main)

    Args:
        url: The database, as SQLAlchemy spells it: `sqlite:///tasks.sqlite`, or
            `postgresql://user:password@host/name`.
        executor_id: What DBOS knows this process by; PostgreSQL needs it. It must stay
            the same when the process starts again, as that resumes what the process
            left unfinished, and no other live process may have it.
        worker: Whether this process runs tasks, too. If not, it hands them over to
            processes that do, or to a DBOS application that you launch yourself.
        queue: The DBOS queue for the tasks; a worker makes it.
        concurrency: How many tasks a process runs at once; `None` for no limit. It
            belongs to the queue: the worker that starts last decides for all of them.
        drain_timeout: How long tasks have to end when the engine closes, in seconds;
            `None` for no limit. Those that do not end run again when the process
            starts again.
        config: What else DBOS is to know, such as `name` if applications share a
            database, or `serializer`. The application's version is pinned to `1`, so
            that edited code runs what is left.
        timeout: How long a hand-over may take, in seconds; `None` for no limit.
        threads: How many threads blocking ones may hold at once, also those given up.
        headers: Called when a task is added, in its context. Returns what is to travel
            beside the arguments, such as a trace context or a request id. The workflow
            has it among its attributes.
        restore: Called in the worker with these headers. Returns a context manager that
            is entered around the function.

    Raises:
        TypeError: If an argument is of the wrong type, or `executor_id` is missing.
        ValueError: If a number is too small, or `url` names no such database.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        url: str,
        *,
        executor_id: str | None = None,
        worker: bool = True,
        queue: str = "postlude",
        concurrency: int | None = 40,
        drain_timeout: float | None = 5,
        config: DBOSConfig | None = None,
        timeout: float | None = 2,
        threads: int = 10,
        headers: Headers | None = None,
        restore: Restore | None = None,
    ) -> None:
        database = _database(url)
        for option, value in {"executor_id": executor_id, "queue": queue}.items():
            if not isinstance(value, str) and (value, option) != (None, "executor_id"):
                raise TypeError(f"{option} must be a string, not {value!r}")
        is_sqlite = _is_sqlite(database)
        if worker and executor_id is None and not is_sqlite:
            raise TypeError(
                "executor_id must be given for PostgreSQL: a name that this process "
                "keeps when it starts again, and that no other one has"
            )
        super().__init__(
            "dbos",
            timeout=timeout,
            threads=threads,
            headers=headers,
            restore=restore,
            # SQLite's are about its file, which nothing is between.
            unreachable=() if is_sqlite else (OperationalError, InterfaceError),
        )
        self._options = {"queue_name": queue}
        settings: dict[str, Any] = {"name": "postlude", **(config or {})}
        if worker:
            settings.setdefault("application_version", "1")
        self._serializer = settings.get("serializer") or _Pickle
        self._process = _Process(
            database,
            settings | {"executor_id": executor_id or "local"},
            worker=worker,
            queue=queue,
            concurrency=_limit("concurrency", concurrency, 1),
            drain_timeout=_limit("drain_timeout", drain_timeout, 0),
            connections=threads,
        )

    def options(self, **native: Any) -> Self:
        """Returns the same engine, with options for what is declared with it.

        Args:
            **native: What DBOS takes as options of an enqueued workflow (`queue_name`,
                `priority`, `delay_seconds`, `workflow_timeout`, `deduplication_id` and
                others), of a step (`retries_allowed`, `max_attempts`,
                `interval_seconds` and others), or as `max_recovery_attempts`. With an
                option of a step the function is one step of its workflow.

        Raises:
            TypeError: If DBOS has no such option, or it would break the hand-over.
        """
        for option in native:
            if option in _REFUSED:
                raise TypeError(f"{option}= is not for postlude: {_REFUSED[option]}")
            if option not in _KNOWN:
                known = ", ".join(sorted(_KNOWN))
                raise TypeError(f"DBOS has no option {option!r}; it has {known}")
        return self._with(native)

    def native(self, func: Callable[..., Any]) -> Any:
        """Returns the DBOS workflow of a function.

        It takes the function's positional arguments, keywords and headers:
        `DBOS.start_workflow(engine.native(func), (42,), {"width": 64}, {})`.

        Raises:
            LookupError: If the function is not declared for this engine.
        """
        return self._task(func)

    def register(self, func: Callable[..., Any], name: str) -> None:
        """Makes a DBOS workflow of a function, instead of an earlier one of that name.

        Raises:
            TypeError: If it is not async, and has an option that is for async ones.
        """
        native = self._options
        step = cast("StepOptions", {k: native[k] for k in native if k in _OF_A_STEP})
        is_async = StockTask(func).is_async
        wrong = sorted(_OF_ASYNC & step.keys())
        if wrong and not is_async:
            raise TypeError(f"{wrong[0]}= is for async functions, not for {name}")
        if step:
            step["name"] = name
        super().register(func, name)

        # Nothing of DBOS's own is copied, should the function be a step of it.
        @functools.wraps(func, updated=())
        def run(args: Any, kwargs: Any, headers: Any) -> Any:
            call = functools.partial(func, *args, **kwargs)
            with self._process.working(), self._restored(headers):
                return DBOS.run_step(step, call) if step else call()

        @functools.wraps(func, updated=())
        async def run_async(args: Any, kwargs: Any, headers: Any) -> Any:
            call = functools.partial(func, *args, **kwargs)
            with self._process.working(), self._restored(headers):
                return await (DBOS.run_step_async(step, call) if step else call())

        options = {k: native[k] for k in native if k == "max_recovery_attempts"}
        workflow = DBOS.workflow(name=name, **options)
        self._tasks[name] = workflow(run_async if is_async else run)

    def prepare(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: Mapping[str, str],
    ) -> _Call:
        """Serialises a call as DBOS will: by default, pickles it.

        Raises:
            NotSerialisable: If that fails.
            RuntimeError: If the engine is not open.
        """
        call = (args, dict(kwargs), dict(headers))
        if self._serializer is _Pickle and is_plain(args, kwargs):
            self._client.check_open()
            return _Call(name, call, None, call[2])
        body = self._serialised(name, lambda: self._serializer.serialize(call))
        return _Call(name, None, body, call[2])

    def _send(self, message: _Call) -> str:
        native, process = self._options, self._process
        options: Any = {k: native[k] for k in native if k in _OF_A_CALL}
        options["workflow_name"] = message.name
        options.setdefault("app_version", process.config.get("application_version"))
        if message.headers:
            options["attributes"] = options.get("attributes", {}) | message.headers
        call = message.call or self._serializer.deserialize(message.body)
        try:
            return process.client.enqueue(options, *call).get_workflow_id()
        except Exception as exc:
            _hide_arguments(exc)
            self._process.check(message.name, exc)
            raise

    @asynccontextmanager
    async def submitting(self) -> AsyncGenerator[Self]:
        """Opens the engine to hand over only, as `enqueue_sync()` does in a script.

        No tasks are run, which those of a live process would be: again.
        """
        await anyio.to_thread.run_sync(self._process.connection.open)
        await super().__aenter__()
        try:
            yield self
        finally:
            await super().__aexit__()
            await _close(self._process.connection)

    async def __aenter__(self) -> Self:
        await anyio.to_thread.run_sync(self._process.for_lifespan().open)
        return await super().__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        await _close(self._process.for_lifespan())


class _Pickle:
    """What DBOS does with arguments, but it would write those that fail into a log."""

    serialize = staticmethod(pickle.dumps)
    deserialize = staticmethod(pickle.loads)


async def _close(shared: _Shared) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(shared.close)


def _hide_arguments(exc: BaseException | None) -> None:
    """Keeps what a task was given out of what is told of an error, and out of logs."""
    while exc is not None:
        if isinstance(exc, StatementError):
            exc.hide_parameters = True
        exc = exc.__cause__ or exc.__context__


class _Shared:
    """What is open once in a process, however often and in which loops it is opened.

    Args:
        start: Starts it. What it puts on the stack is called in the end.
    """

    def __init__(self, start: Callable[[ExitStack], None]) -> None:
        self._start = start
        self._lock = Lock()
        self._opened = 0
        self._open = ExitStack()
        self._pid = 0

    def open(self) -> None:
        """Starts it, unless it has been started.

        Raises:
            RuntimeError: If it has been started in the process that this one was
                forked from, whose connections it would share.
        """
        if self._opened and self._pid != os.getpid():
            raise RuntimeError(
                "the engine 'dbos' is open in the process that this one was forked "
                "from: open it after the fork, or hand over there"
            )
        with self._lock:
            if not self._opened:
                with ExitStack() as stack:
                    self._start(stack)
                    self._open = stack.pop_all()
                self._pid = os.getpid()
            self._opened += 1

    def close(self) -> None:
        """Ends it, once this is called as often as `open`."""
        with self._lock:
            try:
                if self._opened == 1:
                    self._open.close()
            finally:
                self._opened -= 1


class _Process:
    """What the engine has open in this process; in all its event loops, the same.

    Args:
        database: The database.
        config: What DBOS is told.
        worker: Whether tasks run here.
        queue: The queue that they are taken from.
        concurrency: How many run at once.
        drain_timeout: How long they have to end.
        connections: How many hand-overs there may be at once.
    """

    def __init__(
        self,
        database: URL,
        config: dict[str, Any],
        *,
        worker: bool,
        queue: str,
        concurrency: float,
        drain_timeout: float,
        connections: int,
    ) -> None:
        self.config = config
        self._database = database
        self._worker = worker
        self._queue = queue
        self._concurrency = concurrency
        self._drain_timeout = drain_timeout
        self._connections = connections
        self._running: list[None] = []
        self.connection = _Shared(self._connect)
        self._tasks = _Shared(self._work)

    def for_lifespan(self) -> _Shared:
        """Returns what `async with engine:` opens: here, or in a task that runs here.

        Tasks hand over by the connection alone, as the closing is to wait for them.
        """
        if self._worker and DBOS.workflow_id is None:
            return self._tasks
        return self.connection

    def check(self, task: str, exc: Exception) -> None:
        """Tells what is no lost connection, and what there is to do.

        Raises:
            Refused: If the database has answered, or has no tables.
        """
        cause = getattr(exc, "orig", None)
        code = getattr(cause, "sqlstate", None)
        if code == _NO_TABLE or "no such table" in str(cause):
            raise Refused(
                f"dbos did not take {task}: no worker has made the tables of "
                f"{self._database!r} yet: start one first"
            ) from exc
        if code and not code.startswith(_NO_CONNECTION):
            raise Refused(f"dbos did not take {task}: {cause}") from exc

    @contextmanager
    def working(self) -> Generator[None]:
        """Tells that a task is running meanwhile."""
        self._running.append(None)
        try:
            yield
        finally:
            self._running.pop()

    def _connect(self, stack: ExitStack) -> None:
        database = self._database
        self.client = DBOSClient(
            system_database_url=_text(_with_time_limit(database)),
            dbos_system_schema=self.config.get("dbos_system_schema") or "dbos",
            application_name=self.config["name"],
            system_database_pool_size=self._connections,
            lazy=True,
            # Otherwise it would go on for as long as there is no connection.
            retry_connection_errors=False,
            **{k: v for k, v in self.config.items() if k == "serializer" and v},
        )
        stack.callback(self.client.destroy)
        internal: Any = self.client
        # DBOS itself logs what has to wait for a locked SQLite file.
        with suppress(AttributeError):
            internal._sys_db.engine.hide_parameters = True

    def _work(self, stack: ExitStack) -> None:
        class Ours(DBOS):
            """Tells what is made here from what DBOS returns if it exists already."""

        self.connection.open()
        stack.callback(self.connection.close)
        if _is_sqlite(self._database):
            stack.enter_context(_alone(f"{self._database.database}.lock"))
        level = logging.getLogger("dbos").getEffectiveLevel()
        url = {"system_database_url": _text(self._database)}
        config: Any = {"log_level": level, **self.config, **url}
        # Its errors would tell what tasks were given, and so would logs.
        of_user: dict[str, Any] = config.get("db_engine_kwargs") or {}
        config["db_engine_kwargs"] = {"hide_parameters": True, **of_user}
        made: object = Ours(config=config)
        if type(made) is not Ours:
            raise RuntimeError(
                "DBOS is in use in this process already, and can be only once: with "
                "worker=False the engine leaves the tasks to it"
            )
        stack.callback(self._destroy)
        DBOS.launch()
        limit = self._concurrency
        DBOS.register_queue(
            self._queue,
            worker_concurrency=None if limit == math.inf else int(limit),
            polling_interval_sec=_POLL,
            on_conflict="always_update",
        )

    def _destroy(self) -> None:
        """Lets tasks end; DBOS would wait a second even if there are none."""
        limit = self._drain_timeout if self._running else 0
        seconds = sys.maxsize if limit == math.inf else math.ceil(limit)
        DBOS.destroy(workflow_completion_timeout_sec=seconds)


@contextmanager
def _alone(path: str) -> Generator[None]:
    """Keeps other processes from running tasks of the same SQLite file meanwhile.

    They would run those again that are running here, as if these were left over.
    """
    with ExitStack() as stack:
        try:
            # SQLite locks files on each system, and lets go when the process dies.
            lock = sqlite3.connect(
                path, timeout=_WAIT, isolation_level=None, check_same_thread=False
            )
            stack.enter_context(closing(lock))
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise RuntimeError(
                    f"cannot write {path}: {exc}: its directory must be there, and "
                    "this process allowed to write in it"
                ) from exc
            raise RuntimeError(
                f"another process runs the tasks of this SQLite file ({path}: {exc}): "
                "start one only, or hand over from here with worker=False, or use "
                "PostgreSQL"
            ) from exc
        yield


def _database(url: Any) -> URL:
    if not isinstance(url, str):
        raise TypeError(f"url must be a string, not {url!r}")
    with suppress(ArgumentError):
        database = make_url(url)
        kind = database.get_backend_name()
        if kind.startswith("postgres") and database.database:
            return database
        if kind == "sqlite" and database.database not in (None, "", ":memory:"):
            return database
    # It may hold a password.
    raise ValueError(
        "url must name a SQLite file or a PostgreSQL database, such as "
        "'sqlite:///tasks.sqlite' or 'postgresql://localhost/tasks'"
    )


def _is_sqlite(database: URL) -> bool:
    return database.get_backend_name() == "sqlite"


def _with_time_limit(database: URL) -> URL:
    """Returns how to connect for a hand-over, which nobody awaits for long."""
    if _is_sqlite(database) or "connect_timeout" in database.query:
        return database
    return database.update_query_dict({"connect_timeout": str(_CONNECT)})


def _text(database: URL) -> str:
    return database.render_as_string(hide_password=False)
