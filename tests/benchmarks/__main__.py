"""Measures what tasks cost, Starlette's and postlude's, and prints a Markdown table."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
CHART = PAGE.with_suffix(".svg")
TIMES = "\N{MULTIPLICATION SIGN}"
TABLE = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- /measured -->)", re.DOTALL)

PARTS = ["tasks", "footprint", "requests", "engines"]
LOOPS = ["asyncio", "uvloop"] if find_spec("uvloop") else ["asyncio"]
PACKAGES = [
    "postlude",
    "starlette",
    "fastapi",
    "anyio",
    "uvicorn",
    "httptools",
    "uvloop",
    "celery",
    "dbos",
    "dramatiq",
    "huey",
    "rq",
    "taskiq",
]

Results: TypeAlias = dict[str, dict[str, float]]


class Measure(NamedTuple):
    """What is compared, and how many times as fast as Starlette's it has to be."""

    label: str
    least: float | None = None
    aim: float | None = None


SECTIONS: dict[str, dict[str, Measure]] = {
    "Adding a task, in µs": {
        "add async": Measure("async function", 0.75, 1),
        "add sync": Measure("sync function", 0.9, 1.5),
        "add keyword": Measure("async function, keyword argument"),
    },
    "Running tasks that do nothing, in µs": {
        "run 1 async": Measure("1 async", 0.45, 0.9),
        "run 100 async": Measure("100 async", 0.45, 0.9),
        "run 1 sync": Measure("1 sync", 0.85, 1),
        "run 10 sync": Measure("10 sync", 8, 12),
        "run 100 sync": Measure("100 sync", 40, 100),
        "run 10 mixed": Measure("10, sync and async by turns"),
        "observed 10 sync": Measure("10 sync, ours with an observer", 5),
    },
    "Requests a second on uvicorn": {
        "postlude 1-async": Measure("1 async task", 0.95, 1),
        "responses 1-async": Measure("1 async task, postlude.responses"),
        "postlude 1-sync": Measure("1 sync task"),
        "responses 1-sync": Measure("1 sync task, postlude.responses"),
        "postlude 10-sync": Measure("10 sync tasks", 2, 3),
        "responses 10-sync": Measure("10 sync tasks, postlude.responses"),
        "fastapi injected": Measure("1 async task, injected by FastAPI", 0.75, 0.9),
    },
    "The same in BackgroundTasksMiddleware": {
        "middleware 0": Measure("no task", 0.93, 0.97),
        "middleware 1-async": Measure("1 async task", 0.7, 0.9),
        "detached 1-async": Measure("1 async task, detach=True", 0.7, 0.9),
        "middleware 10-sync": Measure("10 sync tasks", 1.8),
        "detached 10-sync": Measure("10 sync tasks, detach=True", 1.8),
    },
}
# How much more than Starlette's it may be.
FOOTPRINT = {
    "bytes async": ("A waiting task, async function", "bytes", 100),
    "bytes sync": ("A waiting task, sync function", "bytes", 100),
    "import": ("`import postlude` over `import starlette.background`", "ms", 15),
}
# How many more microseconds than the engine's own call a hand-over may take.
HAND_OVER = 30


def run(script: str, *args: object, standard_input: str | None = None) -> str:
    return subprocess.run(
        [sys.executable, "-X", "utf8", str(HERE / script), *map(str, args)],
        input=standard_input,
        stdout=subprocess.PIPE,
        check=True,
        encoding="utf-8",
    ).stdout


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:g}{TIMES}"


def cell(measure: Measure, result: dict[str, float] | None) -> str:
    if result is None:
        return ""
    stock, postlude, ratio = (result[key] for key in ("stock", "postlude", "ratio"))
    short = measure.least is not None and ratio < measure.least
    return (
        f"**{number(ratio)}{TIMES}**{' ✗' if short else ''} "
        f"({number(stock)} → {number(postlude)})"
    )


def speed_table(speeds: dict[str, Results]) -> Iterator[str]:
    yield "| Starlette → postlude | at least | aim | " + " | ".join(speeds) + " |"
    yield "|---|--:|--:|" + "---|" * len(speeds)
    for heading, measures in SECTIONS.items():
        if not any(name in result for result in speeds.values() for name in measures):
            continue
        yield f"| **{heading}** | | |" + " |" * len(speeds)
        for name, measure in measures.items():
            cells = [cell(measure, result.get(name)) for result in speeds.values()]
            limits = [times(measure.least), times(measure.aim)]
            yield f"| {' | '.join([measure.label, *limits, *cells])} |"


def footprint_table(results: Results, heavy: list[str]) -> Iterator[str]:
    yield "| | Starlette | postlude | more | at most |"
    yield "|---|--:|--:|--:|--:|"
    for name, (label, unit, most) in FOOTPRINT.items():
        stock, postlude, more = (
            results[name][key] for key in ("stock", "postlude", "difference")
        )
        yield (
            f"| {label}, {unit} | {stock:.0f} | {postlude:.0f} | "
            f"{more:+.1f}{' ✗' if more > most else ''} | {most:+} |"
        )
    loaded = " and ".join(heavy) or "none of FastAPI, Pydantic and OpenTelemetry"
    yield ""
    yield f"`import postlude` loads {loaded}."


def hand_over_table(results: Results, missing: list[str]) -> Iterator[str]:
    yield (
        "| Handing over | own client on a thread, µs | postlude, µs | more, µs | "
        "at most |"
    )
    yield "|---|--:|--:|--:|--:|"
    for name, result in results.items():
        stock, postlude, more = (
            result[key] for key in ("stock", "postlude", "difference")
        )
        yield (
            f"| {name} | {stock:,.0f} | {postlude:,.0f} | "
            f"{more:+.0f}{' ✗' if more > HAND_OVER else ''} | {HAND_OVER:+} |"
        )
    if missing:
        yield ""
        yield f"Not there, and not measured: {', '.join(missing)}."


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (
        match := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    ):
        model = match[1]
    installed = {found.name: found.version for found in metadata.distributions()}
    versions = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()}; "
        f"{', '.join([python, *versions])}; {datetime.now(UTC):%Y-%m-%d}."
    )


def chart(speeds: dict[str, Results]) -> str:
    sections: list[Any] = [
        (
            heading.removesuffix(", in µs"),
            [
                (
                    measure.label,
                    {loop: result[name]["ratio"] for loop, result in speeds.items()},
                )
                for name, measure in measures.items()
            ],
        )
        for heading, measures in SECTIONS.items()
    ]
    return run("chart.py", standard_input=json.dumps(sections))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help=f"what to measure: {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, so that the figures mean less"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"put table and chart into {PAGE.parent.name}/{PAGE.name}",
    )
    options = parser.parse_args()
    parts: list[str] = options.parts or PARTS
    if unknown := {*parts} - {*PARTS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {PARTS}")
    if options.write and (options.quick or {*parts} != {*PARTS}):
        parser.error("--write needs a full run of all parts")

    quick: bool = options.quick
    speeds: dict[str, Results] = {loop: {} for loop in LOOPS}
    for loop, results in speeds.items():
        if "tasks" in parts:
            rounds = (3, 0.001) if quick else (60, 0.015)
            results.update(json.loads(run("task_costs.py", loop, *rounds)))
        if "requests" in parts:
            rounds = (3, 0.1) if quick else (24, 0.25)
            results.update(json.loads(run("load.py", loop, *rounds)))

    lines = [*speed_table(speeds)]
    if "footprint" in parts:
        footprint = json.loads(run("footprint.py", 1 if quick else 20))
        lines += ["", *footprint_table(footprint["results"], footprint["heavy"])]
    if "engines" in parts:
        rounds = (3, 0.001) if quick else (100, 0.02)
        hand_overs = json.loads(run("hand_overs.py", *rounds))
        lines += ["", *hand_over_table(hand_overs["results"], hand_overs["missing"])]
    table = "\n".join([*lines, "", machine(), ""])
    print(table)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(TABLE.sub(lambda _: f"\n{table}\n", page), encoding="utf-8")
        CHART.write_text(chart(speeds), encoding="utf-8")


if __name__ == "__main__":
    main()
