"""DBOS, on SQLite and PostgreSQL; the worker is a process of the same module."""

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import sqlalchemy
from dbos import DBOS, DBOSClient
from servers import wait_until

from engines.brokers import SERVERS
from postlude.engines import Receipt
from postlude.engines.dbos import DBOSEngine

BROKERS = ("sqlite", "postgresql")
IS_ASYNC = True
OPTIONS = {"retries_allowed": True, "max_attempts": 2, "priority": 1}
# It resumes what it has left unfinished, as it has the same executor_id.
AFTER_KILL = "again"
READY = "worker is ready"

_made: list[tuple[DBOSEngine, str]] = []


def database(url: str, queue: str) -> tuple[str, str]:
    """Returns a database that only this queue has, and its schema."""
    if url.startswith("sqlite"):
        # Only one worker runs the tasks of a file.
        return f"{url.rpartition('/')[0]}/{queue}.sqlite", "dbos"
    return url, queue.replace("-", "_")


def make(
    url: str, queue: str, directory: Path, **options: Any
) -> tuple[DBOSEngine, None]:
    url, schema = database(url, queue)
    is_worker = "POSTLUDE_WORKER" in os.environ
    if not is_worker:
        # Some tests hand over to a worker that has never been there.
        server = url if url.startswith("sqlite") else SERVERS["postgresql"]
        DBOS.migrate(server, schema=schema)
    engine = DBOSEngine(
        url,
        executor_id="worker" if is_worker else None,
        worker=is_worker,
        queue=queue,
        config={"dbos_system_schema": schema},
        **options,
    )
    _made.append((engine, queue))
    return engine, None


def command() -> list[str]:
    return [sys.executable, "-m", "engines.on_dbos"]


async def work(engine: DBOSEngine) -> None:
    async with engine:
        sys.stdout.write(f"{READY}\n")
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                break


@contextmanager
def client(engine: DBOSEngine) -> Generator[DBOSClient]:
    process = engine._process
    url = process._database.render_as_string(hide_password=False)
    schema = process.config["dbos_system_schema"]
    client = DBOSClient(system_database_url=url, dbos_system_schema=schema)
    try:
        yield client
    finally:
        client.destroy()


def send(native: Any, *args: object) -> None:
    """Sends a task by the engine's own means."""
    [(engine, queue)] = [each for each in _made if native in each[0]._tasks.values()]
    name = f"{native.__module__}.{native.__qualname__}"
    with client(engine) as dbos:
        dbos.enqueue({"workflow_name": name, "queue_name": queue}, args, {}, {})


def failure(declared: Any, receipt: Receipt) -> str:
    """Returns what the engine's own tools tell of a task that has failed."""
    with client(declared.engine) as dbos:
        handle: Any = dbos.retrieve_workflow(receipt.id)
        wait_until(lambda: handle.get_status().status == "ERROR")
        return repr(handle.get_status().error)


def is_unknown(declared: Any, receipt: Receipt, log: Callable[[], str]) -> bool:
    """Whether one sees what has become of a task that the worker does not know."""
    with client(declared.engine) as dbos:
        handle: Any = dbos.retrieve_workflow(receipt.id)
        is_pending = handle.get_status().status == "PENDING"
    return is_pending and "unknown is not a registered workflow function" in log()


def close(declared: Any) -> None:
    """Closes what is the user's own."""


def clean(url: str, queue: str) -> None:
    """Removes from the broker what the tests have made."""
    if url.startswith("sqlite"):
        return
    server = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(server)
    _, schema = database(url, queue)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


if __name__ == "__main__":
    from engines.declared import engine

    anyio.run(work, engine)
