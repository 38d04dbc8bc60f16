"""Tasks on real servers: what runs, and what is told of the rest when they stop."""

import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from servers import Server, start, wait_until

HERE = Path(__file__).parent

UVICORN = ["uvicorn", "served:app", "--port={port}", f"--app-dir={HERE}"]
HYPERCORN = ["hypercorn", f"{HERE / 'served'}:app", "--bind=127.0.0.1:{port}"]
GRANIAN = [
    *["granian", "served:app", "--interface=asgi", f"--working-dir={HERE}"],
    *["--host=127.0.0.1", "--port={port}"],
]

SERVERS = {
    "uvicorn": UVICORN,
    "uvicorn h11": [*UVICORN, "--http=h11", "--loop=asyncio"],
    "hypercorn": HYPERCORN,
    "hypercorn uvloop": [*HYPERCORN, "--worker-class=uvloop"],
    "hypercorn trio": [*HYPERCORN, "--worker-class=trio"],
    "granian": GRANIAN,
}
GRACE = {
    "uvicorn": "--timeout-graceful-shutdown=1",
    "hypercorn": "--graceful-timeout=1",
}


@contextmanager
def serving(command: list[str], directory: Path) -> Generator[Server]:
    with start([sys.executable, "-m", *command], log=directory / "log") as server:
        yield server


def logged(server: Server, text: str) -> Callable[[], bool]:
    return lambda: text in server.output


@pytest.mark.parametrize("name", SERVERS)
def test_siblings_of_failing_tasks_run_on_each_server(
    name: str, tmp_path: Path
) -> None:
    with serving(SERVERS[name], tmp_path) as server:
        for _ in range(2):
            assert httpx2.get(f"{server.url}/failing").text == "failing"
        wait_until(lambda: server.output.count("did 2") == 2)
        assert server.output.count("did 1") == 2
        failed = "2 background tasks failed: 'served.break_down', 'served.leave'"
        wait_until(lambda: server.output.count(failed) == 2)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", ["uvicorn", "uvicorn h11", "hypercorn"])
def test_what_a_server_cuts_off_is_named(name: str, kind: str, tmp_path: Path) -> None:
    command = [*SERVERS[name], GRACE[name.removesuffix(" h11")]]
    with serving(command, tmp_path) as server:
        assert httpx2.get(f"{server.url}/many?{kind}").text == "many"
        wait_until(logged(server, "did 2"))
        server.stop()
        [record] = re.findall(
            "background tasks cut short by CancelledError: .*", server.output
        )
        done = re.findall(r"did \d+", server.output)
        named = re.findall(r"'served\.work\w*' \([\w ]*\)", record)
        # A thread may still end what it was about.
        assert 50 <= len(done) + len(named) <= (51 if kind == "sync" else 50)
        assert 5 < len(done) < 50
        assert record.endswith("'served.clean' (runs all the same)")
