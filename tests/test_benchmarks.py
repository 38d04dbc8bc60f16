"""The benchmarks run; what they measure is no matter of passing or failing."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_a_quick_benchmark_prints_a_row_for_each_measure() -> None:
    table = subprocess.run(
        [sys.executable, BENCHMARKS, "--quick", "tasks", "footprint"],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    ).stdout

    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    speeds = {
        cells[1]: cells[4] for cells in rows if len(cells) > 5 and "→" in cells[4]
    }
    assert [*speeds] == [
        "async function",
        "sync function",
        "async function, keyword argument",
        "1 async",
        "100 async",
        "1 sync",
        "10 sync",
        "100 sync",
        "10, sync and async by turns",
        "10 sync, ours with an observer",
    ]
    for label in "async function", "sync function":
        assert f"| A waiting task, {label}, bytes | " in table
    assert "| `import postlude` over `import starlette.background`, ms | " in table
    assert "loads none of FastAPI, Pydantic and OpenTelemetry" in table


def test_each_engine_is_measured_or_said_to_be_missing() -> None:
    table = subprocess.run(
        [sys.executable, BENCHMARKS, "--quick", "engines"],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    ).stdout

    assert "| `from_callable`, which does nothing | " in table
    for name in "Celery", "DBOS", "Dramatiq", "Huey", "RQ", "Taskiq":
        measured = [line for line in table.splitlines() if f"| {name} on " in line]
        _, _, missing = table.partition("Not there, and not measured: ")
        assert measured or name in missing


def test_the_load_is_measured_for_each_row_of_requests() -> None:
    printed = subprocess.run(
        [sys.executable, BENCHMARKS / "load.py", "asyncio", "1", "0.01"],
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout

    assert [*json.loads(printed)] == [
        "middleware 0",
        "postlude 1-async",
        "responses 1-async",
        "middleware 1-async",
        "detached 1-async",
        "postlude 1-sync",
        "responses 1-sync",
        "postlude 10-sync",
        "responses 10-sync",
        "middleware 10-sync",
        "detached 10-sync",
        "fastapi injected",
    ]


def test_a_short_soak_tells_that_all_tasks_have_run_in_both_modes() -> None:
    # So few requests say nothing of the memory, for which it may fail.
    printed = subprocess.run(
        [sys.executable, BENCHMARKS / "soak.py", "--requests=600", "--loop=asyncio"],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    ).stdout

    for mode in "detach=False", "detach=True":
        assert f"asyncio, {mode}: 600 requests, " in printed
    assert printed.count("✓ 3,000 of 3,000 tasks ran exactly once\n") == 2
    assert printed.count("✓ 600 of 600 failures were logged\n") == 2
    assert printed.count("✓ no other error was logged\n") == 2
