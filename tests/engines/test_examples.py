"""The examples that need a worker, each with its own, as their docstrings say."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from servers import start, wait_until

from engines.brokers import stoppable

EXAMPLES = Path(__file__).parents[2] / "examples"


def commands(name: str) -> list[list[str]]:
    """Returns what the docstring of an example says is to be run."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    lines = re.findall(r"(?m)^\w+ .*\b(?:\w+_app)\b.*$", docstring)
    return [[sys.executable, "-m", *shlex.split(line)] for line in lines]


@contextmanager
def worker(command: list[str], log: Path, **environment: str) -> Generator[Path]:
    """Runs a worker; returns what its output is written to."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            cwd=EXAMPLES,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield log
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_celery_makes_thumbnails_and_tells_followers(tmp_path: Path) -> None:
    app, work = commands("celery_app")
    with (
        stoppable("redis", tmp_path) as (redis, _),
        worker(work, tmp_path / "worker", REDIS_URL=redis) as log,
        start(
            [*app, "--port={port}", f"--app-dir={EXAMPLES}"],
            log=tmp_path / "app",
            environment={"REDIS_URL": redis},
        ) as server,
    ):
        response = httpx2.post(f"{server.url}/photos/cat")
        assert response.status_code == 202
        url = server.url + response.json()["result"]
        wait_until(lambda: httpx2.get(url).json()["state"] == "SUCCESS", seconds=30)
        made, _, process = httpx2.get(url).json()["result"].rpartition(" ")
        assert made == "cat, 64 wide, made by process"
        assert int(process) != server.process.pid
        wait_until(lambda: "told all followers of cat" in log.read_text())
        assert server.stop() == -signal.SIGTERM
        assert "Traceback" not in server.output + log.read_text()


def test_rq_makes_thumbnails(tmp_path: Path) -> None:
    app, [python, module, _, *work] = commands("rq_app")
    with (
        stoppable("redis", tmp_path) as (redis, _),
        start(
            [*app, "--port={port}", f"--app-dir={EXAMPLES}"],
            log=tmp_path / "app",
            environment={"REDIS_URL": redis},
        ) as server,
    ):
        response = httpx2.post(f"{server.url}/photos/cat")
        assert response.status_code == 202
        url = server.url + response.json()["job"]
        assert httpx2.get(url).json() == {"status": "queued"}
        rq = [python, module, "rq.cli", *work]
        with worker(rq, tmp_path / "worker", REDIS_URL=redis) as log:
            wait_until(lambda: httpx2.get(url).json() == {"status": "finished"})
            made = re.compile(r"(?m)^process (\d+) made cat, (64|1024) wide$")
            wait_until(lambda: len(made.findall(log.read_text())) == 2)
            processes = {int(process) for process, _ in made.findall(log.read_text())}
        # Each job has had one of its own.
        assert len(processes - {server.process.pid}) == 2
        assert httpx2.get(f"{server.url}/unknown").status_code == 404
        assert server.stop() == -signal.SIGTERM
        assert "Traceback" not in server.output + log.read_text()
