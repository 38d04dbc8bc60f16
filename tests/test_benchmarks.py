"""The benchmarks run; what they measure is no matter of passing or failing."""

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
    ]
    for label in "async function", "sync function":
        assert f"| A waiting task, {label}, bytes | " in table
    assert "| `import postlude` over `import starlette.background`, ms | " in table
    assert "loads none of FastAPI, Pydantic and OpenTelemetry" in table
