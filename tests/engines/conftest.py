"""The engines, their brokers and their workers.

Each engine has a module `on_<library>.py` beside this one, with these names:

- `BROKERS`: `redis`, `rabbitmq`, `postgresql` or `sqlite`, those it is tested on
- `IS_ASYNC`: whether it runs async functions
- `OPTIONS`: what is given to `engine.options()`, to see that it does no harm
- `AFTER_KILL`: whether a task whose worker was killed is `lost`, or runs `again`
- `AT_LEAST_ONCE`: options by which it runs again, if there are any
- `READY`: what the worker prints when it is ready
- `make(url, queue, directory, **options)`: returns the engine, and what its own
  commands are told of, which is `engines.declared:app` then
- `command()`: returns what starts a worker, which finds its settings in the
  environment, as `declared.py` does
- `send(native, *args)`: sends a task by the engine's own means
- `failure(declared, receipt)`: waits for what the engine's own tools tell of a task
  that has failed
- `is_unknown(declared, receipt, log)`: whether one sees what has become of a task that
  the worker does not know; `log()` is what it has printed
- `close(declared)`: closes what is the user's own
- `clean(url, queue)`: removes from the broker what has been made there
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from servers import wait_until

from engines.brokers import REQUIRED, url_of

HERE = Path(__file__).parent

collect_ignore: list[str] = []


def found() -> Generator[tuple[Any, str]]:
    """Finds the engines that are installed, and their brokers."""
    for path in sorted(HERE.glob("on_*.py")):
        library = path.stem.removeprefix("on_")
        try:
            on = importlib.import_module(f"engines.{path.stem}")
        except ModuleNotFoundError as exc:
            if REQUIRED or "postlude" in str(exc):
                raise
            collect_ignore.extend([f"test_{library}.py", "test_docs.py"])
            collect_ignore.append("test_examples.py")
            continue
        for broker in on.BROKERS:
            yield on, broker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what the tests have measured."""
    lines = {
        f"{name}: {value}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
    }
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(sorted(lines)))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Worker:
    """A worker's process.

    Attributes:
        process: The process, the leader of its group.
        log: The file that its standard output and error go to.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self, *others: int) -> None:
        """Kills all its processes, and others that may not be of its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=10)


@dataclass
class Setup:
    """An engine on a broker, in this process and in that of a worker.

    Attributes:
        on: The module that tells what there is to know of the engine.
        broker: What kind of broker it is.
        url: Where that is.
        directory: Where the record and logs are.
        more: More variables to set, for the module of the engine.
        queue: A name that nobody else uses on this broker.
        declared: The functions, as this process knows them.
    """

    on: Any
    broker: str
    url: str
    directory: Path
    more: dict[str, str] = field(default_factory=dict[str, str])
    queue: str = field(default_factory=lambda: f"postlude-{uuid.uuid4().hex}")
    loaded: list[Any] = field(default_factory=list[Any])

    @property
    def library(self) -> str:
        return str(self.on.__name__.rpartition("on_")[2])

    @property
    def declared(self) -> Any:
        return self.loaded[0]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "POSTLUDE_ENGINE": self.library,
            "POSTLUDE_BROKER": self.url,
            "POSTLUDE_QUEUE": self.queue,
            "POSTLUDE_RECORD": str(self.directory / "record"),
            # As this process has it, wherever the other one is started.
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            **self.more,
        }

    def load(self, **environment: str) -> Any:
        """Imports the module anew, with these variables set."""
        sys.modules.pop("engines.declared", None)
        with patch.dict(os.environ, self.environment | environment):
            self.loaded.append(importlib.import_module("engines.declared"))
        return self.loaded[-1]

    def records(self, key: str) -> list[dict[str, Any]]:
        """Returns what has been recorded under a key so far."""
        path = self.directory / "record"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # The last line may be half written.
        lines = text.split("\n")[:-1]
        return [entry for line in lines if (entry := json.loads(line))["key"] == key]

    @contextmanager
    def worker(self, name: str = "worker", **environment: str) -> Generator[Worker]:
        """Runs a worker, and waits until it is ready."""
        inherited = {
            key: os.environ[key] for key in os.environ if not key.startswith("COVERAGE")
        }
        log = self.directory / f"{name}.log"
        with (
            log.open("wb") as output,
            subprocess.Popen(
                self.on.command(),
                env=inherited
                | self.environment
                | {"POSTLUDE_WORKER": "1", "PYTHONUNBUFFERED": "1"}
                | environment,
                cwd=self.directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            worker = Worker(process, log)

            def is_ready() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"no worker:\n{worker.output()}")
                return self.on.READY in worker.output()

            try:
                wait_until(is_ready, seconds=60)
                yield worker
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
            finally:
                worker.kill()


def ids(pair: tuple[Any, str]) -> str:
    return f"{pair[0].__name__.rpartition('on_')[2]}-{pair[1]}"


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(pair, id=ids(pair), marks=pytest.mark.xdist_group(ids(pair)))
        for pair in found()
    ],
)
def setup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Setup]:
    """Each engine on each of its brokers; what has been sent is removed afterwards."""
    on, broker = request.param
    directory = tmp_path_factory.mktemp(ids((on, broker)))
    setup = Setup(on, broker, url_of(broker, directory), directory)
    setup.load()
    yield setup
    for module in setup.loaded:
        on.close(module)
    on.clean(setup.url, setup.queue)


@pytest.fixture(scope="session")
def worker(setup: Setup) -> Generator[Worker]:
    """The worker that runs what the tests hand over."""
    with setup.worker() as worker:
        yield worker


@pytest.fixture
def measured(setup: Setup, record_property: Callable[..., None]) -> Callable[..., None]:
    """Has something printed in the end."""

    def tell(what: str, value: str) -> None:
        record_property(f"{setup.library} on {setup.broker}, {what}", value)

    return tell


@pytest.fixture
def key() -> str:
    """A name that only this test's records have."""
    return uuid.uuid4().hex


@pytest.fixture
def recorded(setup: Setup, key: str) -> Callable[..., list[dict[str, Any]]]:
    """Returns the records of this test once there are so many."""

    def wait(count: int = 1, *, seconds: float = 30) -> list[dict[str, Any]]:
        def are_there() -> bool:
            return len(setup.records(key)) >= count

        wait_until(are_there, seconds=seconds)
        return setup.records(key)

    return wait
