"""Shows, measured on a real server, what one failing task does to those after it.

`python tests/demo.py` runs examples/starlette_app.py on uvicorn twice: as it is, and
with the one import of `BackgroundTasks` changed to Starlette's. Both get the same
requests. It prints what happened when, and fails if that is not what it claims.
"""

import argparse
import functools
import inspect
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import httpx2
import uvicorn
from servers import start, wait_until

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "starlette_app.py"
TASKS = "update_stock", "book_courier", "notify_warehouse", "send_receipt"
STOCK, OURS = "starlette.background", "postlude"
SUBJECT = "An order is answered, then four tasks run. The second one fails."

Noted: TypeAlias = tuple[str, float, float, str | None]


@dataclass(frozen=True)
class Span:
    """One run of a task, in milliseconds since its request was sent."""

    task: str
    started: float
    finished: float
    error: str | None


@dataclass(frozen=True)
class Run:
    """What was measured with the `BackgroundTasks` of one module.

    Attributes:
        module: The module they were imported from.
        origin: The module that this class is defined in.
        left: When the app was done with the response, in milliseconds.
        answered: When the client had the response, in milliseconds.
        spans: What ran after the response, by task, in order.
        healthy: The tasks that ran after an order of which none failed.
        connection_kept: Whether the next request went through the same connection.
        log: What the server logged.
        notifications: What the app wrote to its file.
    """

    module: str
    origin: str
    left: float
    answered: float
    spans: dict[str, Span]
    healthy: list[str]
    connection_kept: bool
    log: str
    notifications: str

    @property
    def title(self) -> str:
        """Returns the name of the library."""
        library = self.module.partition(".")[0]
        return {"starlette": "Starlette"}.get(library, library)

    @property
    def line(self) -> str:
        """Returns the line of the app in which the runs differ."""
        return f"from {self.module} import BackgroundTasks"

    @property
    def tally(self) -> str:
        """Returns how many of the tasks ran."""
        return f"{len(self.spans)} of {len(TASKS)} tasks ran"

    @property
    def error(self) -> list[str]:
        """Returns the error as the server logged it, save for the frames between."""
        lines = self.log.replace(f"{ROOT}{os.sep}", "").splitlines()
        errors = [n for n, line in enumerate(lines) if line.startswith("ERROR:")]
        if not errors:
            return []
        begin = errors[0]
        rest = takewhile(lambda line: not line.startswith("INFO:"), lines[begin + 1 :])
        traceback = [line for line in rest if line]
        frames = [n for n, line in enumerate(traceback) if line.startswith("  File ")]
        return [lines[begin], traceback[0], "  ...", *traceback[frames[-1] :]]


def serve(module: str, notes: Path) -> None:
    """Serves the example, noting for each order in a file of its own what ran when."""
    source = EXAMPLE.read_text(encoding="utf-8")
    source = source.replace(f"from {OURS} import", f"from {module} import")
    example: dict[str, Any] = {"__name__": EXAMPLE.stem}
    exec(compile(source, EXAMPLE, "exec"), example)
    noted: list[Noted] = []
    for task in TASKS:
        example[task] = timed(example[task], noted)
    origin = example["BackgroundTasks"].__module__

    async def observed(scope: Any, receive: Any, send: Any) -> None:
        left = math.inf

        async def observed_send(message: Any) -> None:
            nonlocal left
            await send(message)
            left = time.time()

        try:
            await example["app"](scope, receive, observed_send)
        finally:
            if scope["type"] == "http":
                note = notes / f"{Path(scope['path']).name}.part"
                note.write_text(json.dumps([origin, left, noted]), encoding="utf-8")
                note.rename(note.with_suffix(".json"))
                noted.clear()

    uvicorn.run(observed, port=int(os.environ["PORT"]))


def timed(func: Callable[..., Any], noted: list[Noted]) -> Callable[..., Any]:
    """Wraps a task, sync or async, so that it notes when it ran and how it failed."""

    @contextmanager
    def noting() -> Generator[None]:
        started, error = time.time(), None
        try:
            yield
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            noted.append((func.__name__, started, time.time(), error))

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def run_async(*args: Any, **kwargs: Any) -> None:
            with noting():
                await func(*args, **kwargs)

        return run_async

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> None:
        with noting():
            func(*args, **kwargs)

    return run


def measure(module: str) -> Run:
    """Serves the example with the tasks of a module, and sends three orders."""
    with tempfile.TemporaryDirectory() as directory:
        notes = Path(directory)
        with (
            start(
                [sys.executable, __file__, "--serve", module, directory],
                log=notes / "log",
                environment={"TMPDIR": directory},
            ) as server,
            httpx2.Client(base_url=server.url) as client,
        ):
            # The first order also spares the second what happens only once a process.
            order(client, "Paris")
            _, _, healthy = read(notes / "Paris.json")
            sent = time.time()
            connection = order(client, "Atlantis")
            answered = time.time()
            origin, left, noted = read(notes / "Atlantis.json")
            try:
                connection_kept = order(client, "Rome") == connection
            except httpx2.TransportError:
                connection_kept = False
            # This waits for tasks: what has not started by then never will.
            server.stop()
        return Run(
            module=module,
            origin=origin,
            left=(left - sent) * 1000,
            answered=(answered - sent) * 1000,
            spans={
                task: Span(task, (began - sent) * 1000, (ended - sent) * 1000, error)
                for task, began, ended, error in noted
            },
            healthy=[task for task, _, _, error in healthy if error is None],
            connection_kept=connection_kept,
            log=server.output,
            notifications=(notes / "notifications.log").read_text(encoding="utf-8"),
        )


def order(client: httpx2.Client, city: str) -> object:
    """Places an order; returns the client's end of the connection it went through."""
    response = client.post(f"/orders/{city}")
    require(response.status_code == 202, "every order is answered with 202")
    return response.extensions["network_stream"].get_extra_info("client_addr")


def read(note: Path) -> tuple[str, float, list[Noted]]:
    """Waits until the app is done with an order; returns what was noted of it."""
    wait_until(note.exists)
    origin, left, noted = json.loads(note.read_text(encoding="utf-8"))
    return origin, left, noted


def require(holds: bool, claim: str) -> None:
    """Ends the demo with a message if something it claims does not hold."""
    if not holds:
        raise SystemExit(f"demo: it is not true that {claim}")


def check(stock: Run, ours: Run) -> None:
    """Checks each claim that the timeline makes."""
    first, failing, *later = TASKS
    for run in stock, ours:
        where = f"with {run.line!r}"
        failed = [span.task for span in run.spans.values() if span.error]
        starts = [span.started for span in run.spans.values()]
        require(run.origin.startswith(run.module), f"the tasks are its own {where}")
        require(run.healthy == [*TASKS], f"all tasks run if none fails {where}")
        require([*run.spans][:2] == [first, failing], f"two tasks run first {where}")
        require(failed == [failing], f"just {failing} fails {where}")
        require(run.left <= min(starts), f"tasks follow the response {where}")
        require(bool(run.error), f"the log of the server tells the error {where}")
    told = "pack the order for Atlantis\n"
    for task in later:
        require(task not in stock.spans, f"{task} never starts with {stock.line!r}")
        require(task in ours.spans, f"{task} runs with {ours.line!r}")
    require([*ours.spans] == [*TASKS], f"tasks run in order with {ours.line!r}")
    require(told not in stock.notifications, "stock tasks tell the warehouse nothing")
    require(told in ours.notifications, "the warehouse is told of the order")


def end_of_axis(runs: Sequence[Run]) -> int:
    """Returns where the time axis that the runs share ends, in milliseconds."""
    latest = max(span.finished for run in runs for span in run.spans.values())
    return math.ceil(latest / 50) * 50


def terminal(stock: Run, ours: Run) -> Iterator[str]:
    """Yields the lines that show both runs in a terminal."""
    end = end_of_axis([stock, ours])
    versions = [f"{name} {metadata.version(name)}" for name in ("starlette", "uvicorn")]
    yield SUBJECT
    yield f"({' on '.join(versions)})"
    yield ""
    yield from lane(ours, end)
    yield ""
    yield "  In the log of the server:"
    yield ""
    yield from (f"    {line}" for line in ours.error)
    yield ""
    yield "The same app and request, with that line changed:"
    yield ""
    yield from lane(stock, end)


def lane(run: Run, end: int) -> Iterator[str]:
    """Yields the lines of one run, on a time axis of so many milliseconds."""

    def column(at: float) -> int:
        return round(at / end * 60)

    def row(label: str, at: float, what: str) -> str:
        return f"  {label:<18}{' ' * column(at)}{what}"

    yield f"{run.title + ':':<20}{run.line}"
    yield ""
    ticks = [
        f"{tick:<{column(tick + 50) - column(tick)}}" for tick in range(0, end, 50)
    ]
    yield row("", 0, f"{''.join(ticks)}{end} ms")
    yield row("response", run.answered, f"▼ at the client after {run.answered:.1f} ms")
    idle = 0.0
    for task in TASKS:
        if span := run.spans.get(task):
            idle = span.finished
            width = max(column(span.finished) - column(span.started), 1)
            took = f"{span.finished - span.started:.0f} ms"
            mark, note = ("░", f"FAILED after {took}") if span.error else ("█", took)
            yield row(task, span.started, f"{mark * width} {note}")
        else:
            yield row(task, idle, "never started")
    yield ""
    if run.connection_kept:
        next_order = "The next order came through the same connection."
    else:
        next_order = "The server closed the connection before the next order."
    yield f"  {run.tally}. {next_order}"


# The card has a background of its own, since a page may be dark where the system is
# light, and the other way round.
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
       fill: #1f2328; paint-order: stroke; stroke: #ffffff; stroke-width: 4px }
.title { font-size: 16px; font-weight: 600 }
.tally { font-weight: 600 }
.code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.muted { fill: #59636e }
.bad { fill: #cf222e; font-weight: 600 }
.card { fill: #ffffff; stroke: #d1d9e0 }
.grid { stroke: #d1d9e0 }
.ran { fill: #2da44e }
.failed { fill: #cf222e }
.missed { fill: none; stroke: #818b98; stroke-width: 1.5; stroke-dasharray: 4 3 }
path.answer { stroke: #0969da; stroke-width: 2 }
text.answer { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; stroke: #0d1117 }
  .muted { fill: #9198a1 }
  .bad { fill: #ff7b72 }
  .card { fill: #0d1117; stroke: #3d444d }
  .grid { stroke: #30363d }
  .ran { fill: #2ea043 }
  .failed { fill: #f85149 }
  path.answer { stroke: #4493f7 }
  text.answer { fill: #4493f7 }
}
"""


def svg(stock: Run, ours: Run) -> str:
    """Returns an image of both runs, 720 pixels wide, for light and dark pages."""
    end = end_of_axis([stock, ours])
    left, right, row = 164, 590, 24
    shapes: list[str] = []

    def x(at: float) -> float:
        return round(left + at / end * (right - left), 1)

    def text(
        at: float, y: int, content: str, style: str, anchor: str = "start"
    ) -> None:
        shapes.append(
            f'<text x="{at}" y="{y}" class="{style}" text-anchor="{anchor}">'
            f"{escape(content)}</text>"
        )

    def line(at: float, top: int, style: str) -> None:
        bottom = top + row * (len(TASKS) + 1)
        shapes.append(f'<path d="M{x(at)} {top}V{bottom}" class="{style}"/>')

    def bar(began: float, ended: float, y: int, style: str, note: str) -> None:
        width = max(round(x(ended) - x(began), 1), 2)
        shapes.append(
            f'<rect x="{x(began)}" y="{y - 12}" width="{width}" height="16" rx="3" '
            f'class="{style}"/>'
        )
        text(x(ended) + 8, y, note, "muted" if style == "ran" else "bad")

    text(24, 34, SUBJECT, "muted")
    y = 44
    for run in stock, ours:
        y += 24
        text(24, y, run.title, "title")
        text(left, y, run.line, "code")
        text(696, y, run.tally, "tally", "end")
        y += 14
        for tick in range(0, end + 1, 50):
            line(tick, y, "grid")
        line(run.answered, y, "answer")
        y += 16
        text(24, y, "response", "code")
        note = f"at the client after {run.answered:.1f} ms"
        text(x(run.answered) + 8, y, note, "answer")
        idle = 0.0
        for task in TASKS:
            y += row
            text(24, y, task, "code")
            if span := run.spans.get(task):
                idle = span.finished
                note = span.error or f"{span.finished - span.started:.0f} ms"
                style = "failed" if span.error else "ran"
                bar(span.started, span.finished, y, style, note)
            else:
                missed = ours.spans[task]
                began, idle = idle, idle + missed.finished - missed.started
                bar(began, idle, y, "missed", "never started")
        y += 24
        for tick in range(0, end, 50):
            text(x(tick), y, f"{tick}", "muted", "middle")
        text(x(end), y, f"{end} ms", "muted", "middle")
        y += 8
    y += 8
    summary = f"{SUBJECT} {stock.title}: {stock.tally}. {ours.title}: {ours.tally}."
    size = f'viewBox="0 0 720 {y}" width="720" height="{y}"'
    label = f'role="img" aria-label="{escape(summary)}"'
    card = f'<rect x=".5" y=".5" width="719" height="{y - 1}" rx="8" class="card"/>'
    top = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>'
    return "\n".join([top, f"<style>{STYLE}</style>", card, *shapes, "</svg>", ""])


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument(
        "--svg", type=Path, help="where to write the timeline as an image"
    )
    parser.add_argument(
        "--modules",
        nargs=2,
        default=[STOCK, OURS],
        metavar=("STOCK", "OURS"),
        help="where to import BackgroundTasks from, instead of %(default)s",
    )
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        module, notes = options.serve
        serve(module, Path(notes))
        return
    stock, ours = map(measure, options.modules)
    check(stock, ours)
    print(*terminal(stock, ours), sep="\n")
    if options.svg:
        options.svg.write_text(svg(stock, ours), encoding="utf-8")


if __name__ == "__main__":
    main()
