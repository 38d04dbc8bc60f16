"""Measures the memory of waiting tasks, and how long the imports take.

Arguments: how many rounds of imports. Prints JSON: per measure, the medians of the
bytes or milliseconds and of their differences.
"""

import asyncio
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from statistics import median

import starlette.background

import postlude

TASKS = 10_000
IMPORT = """
import sys
from time import perf_counter
began = perf_counter()
import {}
print((perf_counter() - began) * 1e3)
print(*{{"fastapi", "pydantic", "opentelemetry"}} & {{*sys.modules}})
"""


async def do_nothing() -> None: ...


def do_nothing_sync() -> None: ...


async def bytes_per_task(
    group: starlette.background.BackgroundTasks | postlude.BackgroundTasks,
    func: Callable[[], object],
) -> float:
    # What tasks note when they run enlarges those made later.
    for _ in range(100):
        group.add_task(func)
    await group()
    group.tasks.clear()

    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(TASKS):
        group.add_task(func)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / TASKS


def import_milliseconds(module: str) -> tuple[float, list[str]]:
    output = subprocess.check_output(
        [sys.executable, "-c", IMPORT.format(module)], text=True
    )
    milliseconds, *heavy = output.split()
    return float(milliseconds), heavy


async def main(rounds: int) -> None:
    results: dict[str, dict[str, float]] = {}
    for name, func in ("async", do_nothing), ("sync", do_nothing_sync):
        stock = await bytes_per_task(starlette.background.BackgroundTasks(), func)
        ours = await bytes_per_task(postlude.BackgroundTasks(), func)
        results[f"bytes {name}"] = {
            "stock": stock,
            "postlude": ours,
            "difference": ours - stock,
        }

    pairs: list[tuple[float, float]] = []
    heavy: list[str] = []
    for _ in range(rounds + 1):
        stock, _ = import_milliseconds("starlette.background")
        ours, heavy = import_milliseconds("postlude")
        pairs.append((stock, ours))
    del pairs[0]  # warms the disk's cache
    results["import"] = {
        "stock": median(stock for stock, _ in pairs),
        "postlude": median(ours for _, ours in pairs),
        "difference": median(ours - stock for stock, ours in pairs),
    }
    print(json.dumps({"results": results, "heavy": sorted(heavy)}))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
