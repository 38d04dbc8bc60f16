"""Shows, measured on a real server, what a failing task and a deploy do to others.

`python tests/demo.py` runs examples/starlette_app.py on uvicorn three times: with the
one import of `BackgroundTasks` changed to Starlette's, as it is, and wrapped in
`BackgroundTasksMiddleware` with its defaults. Each gets the same requests. It prints
what happened when, and fails if that is not what it claims.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import httpx2
import uvicorn
from servers import Server, start, wait_until
from starlette.requests import Request
from starlette.responses import Response

from postlude import BackgroundTasksMiddleware

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "starlette_app.py"
TASKS = "update_stock", "book_courier", "notify_warehouse", "send_receipt"
STOCK, OURS = "starlette.background", "postlude"
VARIANTS = STOCK, OURS, f"{OURS}+middleware"
SUBJECT = "An order is answered, then four tasks run. The second one fails."
PARCELS, SIGNAL_AFTER = 50, 3
DEPLOY = (
    f"A deploy. SIGTERM comes when {SIGNAL_AFTER} of {PARCELS} tasks of 0.1 s have run."
)
PACKED = "packed a parcel\n"
TRACEBACK = "Traceback (most recent call last):"

Noted: TypeAlias = tuple[str, float, float, str | None]


@dataclass(frozen=True)
class Variant:
    """What is served: a module, and `+middleware` if that is around the app."""

    spec: str

    @property
    def module(self) -> str:
        """Returns where `BackgroundTasks` is imported from."""
        return self.spec.partition("+")[0]

    @property
    def is_wrapped(self) -> bool:
        """Whether the middleware is around the app."""
        return self.spec.endswith("+middleware")

    @property
    def title(self) -> str:
        """Returns the name of the library, and of the middleware."""
        library = self.module.partition(".")[0]
        title = {"starlette": "Starlette"}.get(library, library)
        return f"{title} + middleware" if self.is_wrapped else title

    @property
    def line(self) -> str:
        """Returns the line of the app that makes the difference."""
        if self.is_wrapped:
            return "app = BackgroundTasksMiddleware(app)"
        return f"from {self.module} import BackgroundTasks"


@dataclass(frozen=True)
class Span:
    """One run of a task, in milliseconds since its request was sent."""

    started: float
    finished: float
    error: str | None


@dataclass(frozen=True)
class Run:
    """What was measured as orders were placed.

    Attributes:
        variant: What was served.
        origin: The module that its `BackgroundTasks` is defined in.
        left: When the app was done with the response, in milliseconds.
        answered: When the client had the response, in milliseconds.
        spans: What ran after the response, by task, in order.
        healthy: The tasks that ran after an order of which none failed.
        connection_kept: Whether the next request went through the same connection.
        log: What the server logged.
        notifications: What the app wrote to its file.
    """

    variant: Variant
    origin: str
    left: float
    answered: float
    spans: dict[str, Span]
    healthy: list[str]
    connection_kept: bool
    log: str
    notifications: str

    @property
    def tally(self) -> str:
        """Returns how many of the tasks ran."""
        return f"{len(self.spans)} of {len(TASKS)} tasks ran"

    @property
    def error(self) -> list[str]:
        """Returns the error as the server logged it, save for the frames."""
        # Loggers other than the server's own may put nothing before their message.
        lines = [line for line in self.log.splitlines() if line]
        at = lines.index(TRACEBACK)
        rest = takewhile(lambda line: not line.startswith("INFO:"), lines[at + 1 :])
        told = [line for line in rest if not line.startswith(" ")]
        return [lines[at - 1], "...", *told]


@dataclass(frozen=True)
class Deploy:
    """How many tasks ran, and of how many others the log tells, as the server ended.

    That took so many seconds.
    """

    variant: Variant
    ran: int
    named: int
    seconds: float

    @property
    def tally(self) -> str:
        """Returns how many of the tasks ran."""
        return f"{self.ran} of {PARCELS} ran"

    @property
    def loss(self) -> str:
        """Returns how many did not, and of how many of those the log tells."""
        lost = PARCELS - self.ran
        return f"{lost} lost, {self.named} of them in the log" if lost else ""


async def pack_parcel() -> None:
    """Takes its time, and says when it is done."""
    await anyio.sleep(0.1)
    sys.stdout.write(PACKED)


def serve(variant: Variant, notes: Path, grace: int) -> None:
    """Serves the example, noting for each order in a file of its own what ran when."""
    source = EXAMPLE.read_text(encoding="utf-8")
    source = source.replace(f"from {OURS} import", f"from {variant.module} import")
    example: dict[str, Any] = {"__name__": EXAMPLE.stem}
    exec(compile(source, EXAMPLE, "exec"), example)
    noted: list[Noted] = []
    for task in TASKS:
        example[task] = timed(example[task], noted)
    origin = example["BackgroundTasks"].__module__

    async def parcels(request: Request) -> Response:
        tasks = example["BackgroundTasks"]()
        for _ in range(PARCELS):
            tasks.add_task(pack_parcel)
        return Response(status_code=202, background=tasks)

    app = example["app"]
    app.add_route("/parcels", parcels, methods=["POST"])
    if variant.is_wrapped:
        app = BackgroundTasksMiddleware(app)

    async def observed(scope: Any, receive: Any, send: Any) -> None:
        left = math.inf

        async def observed_send(message: Any) -> None:
            nonlocal left
            await send(message)
            left = time.time()

        try:
            await app(scope, receive, observed_send)
        finally:
            if scope["type"] == "http":
                note = notes / f"{Path(scope['path']).name}.part"
                note.write_text(json.dumps([origin, left, noted]), encoding="utf-8")
                note.rename(note.with_suffix(".json"))
                noted.clear()

    port = int(os.environ["PORT"])
    uvicorn.run(observed, port=port, timeout_graceful_shutdown=grace)


def timed(func: Callable[..., Any], noted: list[Noted]) -> Callable[..., Any]:
    """Wraps a task, sync or async, so that it notes when it ran and how it failed."""

    @contextmanager
    def noting() -> Generator[None]:
        started, error = time.time(), None
        try:
            yield
        except Exception as exc:
            error = type(exc).__name__
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


@contextmanager
def serving(variant: Variant, grace: int) -> Generator[tuple[Server, Path]]:
    """Serves a variant in a process and a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, f"--grace={grace}"]
        with start(
            [*command, "--serve", variant.spec, directory],
            log=Path(directory, "log"),
            environment={"TMPDIR": directory},
        ) as server:
            yield server, Path(directory)


def place_orders(variant: Variant, grace: int) -> Run:
    """Places three orders, of which the second has a task that fails."""
    with (
        serving(variant, grace) as (server, notes),
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
            variant=variant,
            origin=origin,
            left=(left - sent) * 1000,
            answered=(answered - sent) * 1000,
            spans={
                task: Span((began - sent) * 1000, (ended - sent) * 1000, error)
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


def deploy(variant: Variant, grace: int) -> Deploy:
    """Stops the server while it has tasks to run."""
    with serving(variant, grace) as (server, _):
        httpx2.post(f"{server.url}/parcels").raise_for_status()
        wait_until(lambda: server.output.count(PACKED) >= SIGNAL_AFTER)
        signalled = time.monotonic()
        server.stop()
        seconds, log = time.monotonic() - signalled, server.output
    # Stock tasks have at best the traceback of the one that was cancelled.
    named = log.count("'__main__.pack_parcel' (") or log.count("in pack_parcel\n")
    return Deploy(variant, log.count(PACKED), named, seconds)


def require(holds: bool, claim: str) -> None:
    """Ends the demo with a message if something it claims does not hold."""
    if not holds:
        raise SystemExit(f"demo: it is not true that {claim}")


def check(stock: Run, ours: Run, wrapped: Run) -> None:
    """Checks each claim that the timeline makes."""
    _, failing, telling, _ = TASKS
    expected = (stock, TASKS[:2], False), (ours, TASKS, False), (wrapped, TASKS, True)
    for run, ran, kept in expected:
        where = f"with {run.variant.line!r}"
        failed = [task for task, span in run.spans.items() if span.error]
        starts = [span.started for span in run.spans.values()]
        told = "pack the order for Atlantis\n" in run.notifications
        own = run.origin.startswith(run.variant.module)
        require(own, f"the tasks are its own {where}")
        require(run.healthy == [*TASKS], f"all tasks run if none fails {where}")
        for task in TASKS:
            does = "runs" if task in ran else "never starts"
            require((task in run.spans) == (task in ran), f"{task} {does} {where}")
        require([*run.spans] == [*ran], f"tasks run in order {where}")
        require(failed == [failing], f"just {failing} fails {where}")
        require(told == (telling in ran), f"{telling} does what it says {where}")
        require(run.left <= min(starts), f"tasks follow the response {where}")
        require(run.log.count(TRACEBACK) == 1, f"the log tells the error once {where}")
        is_kept, stays = ("kept", "stays in") if kept else ("closed", "leaves")
        require(run.connection_kept == kept, f"the connection is {is_kept} {where}")
        # What the server logs of itself has this prefix.
        raised = "ERROR: " in run.log
        require(raised != kept, f"the error {stays} the app {where}")


def check_deploys(stock: Deploy, ours: Deploy, wrapped: Deploy) -> None:
    """Checks each claim about the deploys."""
    for each in stock, ours:
        where = f"with {each.variant.line!r}"
        require(each.ran < PARCELS, f"a deploy loses tasks {where}")
    require(stock.named <= 1, f"the log conceals most with {stock.variant.line!r}")
    every = ours.ran + ours.named == PARCELS
    require(every, f"the log names all of them with {ours.variant.line!r}")
    kept = wrapped.ran == PARCELS
    require(kept, f"a deploy loses nothing with {wrapped.variant.line!r}")


def bars(run: Run, whole: Run) -> Iterator[tuple[str, float, float, str, str]]:
    """Yields when each task ran, or would have as in another run, how, and a note."""
    ended = 0.0
    for task in TASKS:
        if span := run.spans.get(task):
            began, ended = span.started, span.finished
            note = f"{ended - began:.0f} ms"
            if span.error:
                yield task, began, ended, "failed", f"{span.error} after {note}"
            else:
                yield task, began, ended, "ran", note
        else:
            missed = whole.spans[task]
            began, ended = ended, ended + missed.finished - missed.started
            yield task, began, ended, "missed", "never started"


def end_of_axis(runs: Sequence[Run]) -> int:
    """Returns where the time axis that the runs share ends, in milliseconds."""
    latest = max(ended for run in runs for _, _, ended, _, _ in bars(run, runs[-1]))
    return math.ceil(latest / 50) * 50


def terminal(
    runs: Sequence[Run], deploys: Sequence[Deploy], option: str
) -> Iterator[str]:
    """Yields the lines that show everything in a terminal of 80 columns."""
    end = end_of_axis(runs)
    versions = [f"{name} {metadata.version(name)}" for name in ("starlette", "uvicorn")]
    yield SUBJECT
    yield f"({' on '.join(versions)})"
    for run in runs:
        yield ""
        yield from lane(run, runs[-1], end)
    yield ""
    yield DEPLOY
    yield f"(uvicorn {option})"
    yield ""
    for each in deploys:
        rest = each.loss or f"the server ended after {each.seconds:.1f} s"
        yield f"  {each.variant.title:<23}{each.tally}, {rest}"


def lane(run: Run, whole: Run, end: int) -> Iterator[str]:
    """Yields the lines of one run, on a time axis of so many milliseconds."""

    def column(at: float) -> int:
        return round(at / end * 46)

    def row(label: str, at: float, what: str) -> str:
        return f"  {label:<18}{' ' * column(at)}{what}"

    yield f"{run.variant.title + ':':<25}{run.variant.line}"
    yield ""
    ticks = [
        f"{tick:<{column(tick + 50) - column(tick)}}" for tick in range(0, end, 50)
    ]
    yield row("", 0, f"{''.join(ticks)}{end} ms")
    yield row("response", run.answered, f"▼ at the client after {run.answered:.1f} ms")
    for task, began, ended, kind, note in bars(run, whole):
        width = max(column(ended) - column(began), 1)
        mark = {"ran": "█", "failed": "░", "missed": "·"}[kind]
        yield row(task, began, f"{mark * width} {note}")
    yield ""
    if run.connection_kept:
        next_order = "The next order came on the same connection."
    else:
        next_order = "The server closed the connection."
    yield f"  {run.tally}. {next_order} The log:"
    yield from (f"    {line}" for line in run.error)


# The card has a background of its own, since a page may be dark where the system is
# light, and the other way round.
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
       fill: #1f2328; paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
.title { font-size: 14px; font-weight: 600 }
.tally { font-weight: 600 }
.code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.muted { fill: #59636e }
.bad { fill: #cf222e; font-weight: 600 }
.card { fill: #ffffff; stroke: #d1d9e0 }
.grid { stroke: #d1d9e0 }
.ran { fill: #2da44e }
.failed { fill: #cf222e }
.missed { fill: none; stroke: #818b98; stroke-width: 1.5; stroke-dasharray: 4 3 }
path.mark { stroke: #0969da; stroke-width: 2 }
text.mark { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; stroke: #0d1117 }
  .muted { fill: #9198a1 }
  .bad { fill: #ff7b72 }
  .card { fill: #0d1117; stroke: #3d444d }
  .grid { stroke: #30363d }
  .ran { fill: #2ea043 }
  .failed { fill: #f85149 }
  path.mark { stroke: #4493f7 }
  text.mark { fill: #4493f7 }
}
"""
LEFT, RIGHT, ROW = 184, 586, 22


def svg(runs: Sequence[Run], deploys: Sequence[Deploy], option: str) -> str:
    """Returns an image of everything, 720 pixels wide, for light and dark pages."""
    end = end_of_axis(runs)
    shapes = [text(24, 34, SUBJECT, "muted")]
    y = 34
    for run in runs:
        y += 32
        shapes += drawn_run(run, runs[-1], end, y)
        y += 7 + ROW * (len(TASKS) + 1)
    y += 24
    for tick in range(0, end + 1, 50):
        label = f"{tick} ms" if tick == end else f"{tick}"
        shapes.append(text(x(tick / end), y, label, "muted", "middle"))
    y += 40
    shapes.append(text(24, y, DEPLOY, "muted"))
    shapes.append(text(696, y, option, "code", "end"))
    shapes += drawn_deploys(deploys, y)
    y += 32 + ROW * (len(deploys) + 1)
    told = [f"{run.variant.title}: {run.tally}." for run in runs]
    told += [DEPLOY, *(f"{each.variant.title}: {each.tally}." for each in deploys)]
    size = f'viewBox="0 0 720 {y}" width="720" height="{y}"'
    label = f'role="img" aria-label="{escape(" ".join([SUBJECT, *told]))}"'
    card = f'<rect x=".5" y=".5" width="719" height="{y - 1}" rx="8" class="card"/>'
    top = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>'
    return "\n".join([top, f"<style>{STYLE}</style>", card, *shapes, "</svg>", ""])


def drawn_run(run: Run, whole: Run, end: int, y: int) -> Iterator[str]:
    """Yields the shapes of one run, from the baseline of its title on."""
    yield text(24, y, run.variant.title, "title")
    yield text(222, y, run.variant.line, "code")
    yield text(696, y, run.tally, "tally", "end")
    for tick in range(0, end + 1, 50):
        yield line(tick / end, y + 11, len(TASKS) + 1, "grid")
    yield line(run.answered / end, y + 11, len(TASKS) + 1, "mark")
    y += 5 + ROW
    yield text(24, y, "response", "code")
    note = f"at the client after {run.answered:.1f} ms"
    yield text(x(run.answered / end) + 8, y, note, "mark")
    kept, style = ("kept", "muted") if run.connection_kept else ("closed", "bad")
    yield text(696, y, f"connection {kept}", style, "end")
    for task, began, ended, kind, note in bars(run, whole):
        y += ROW
        yield text(24, y, task, "code")
        yield bar(began / end, ended / end, y, kind)
        yield text(x(ended / end) + 8, y, note, "muted" if kind == "ran" else "bad")


def drawn_deploys(deploys: Sequence[Deploy], y: int) -> Iterator[str]:
    """Yields the shapes of the deploys, in which all tasks are equally wide."""
    signalled = SIGNAL_AFTER / PARCELS
    yield line(signalled, y + 11, len(deploys) + 1, "mark")
    y += 5 + ROW
    yield text(x(signalled) + 8, y, "SIGTERM", "mark")
    for each in deploys:
        y += ROW
        ran = each.ran / PARCELS
        yield text(24, y, each.variant.title, "")
        yield bar(0, ran, y, "ran")
        if each.loss:
            yield bar(ran, 1, y, "missed")
            yield text(x(ran) + 8, y, each.loss, "bad")
        yield text(696, y, each.tally, "tally", "end")


def x(share: float) -> float:
    """Returns where a share of the axis is reached."""
    return round(LEFT + share * (RIGHT - LEFT), 1)


def text(at: float, y: int, content: str, style: str, anchor: str = "start") -> str:
    """Returns a line of text."""
    place = f'x="{at}" y="{y}" class="{style}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(content)}</text>"


def line(share: float, top: int, rows: int, style: str) -> str:
    """Returns a vertical line, so many rows high."""
    return f'<path d="M{x(share)} {top}V{top + ROW * rows}" class="{style}"/>'


def bar(began: float, ended: float, y: int, style: str) -> str:
    """Returns a bar on the baseline of a text."""
    width = max(round(x(ended) - x(began), 1), 2)
    place = f'x="{x(began)}" y="{y - 12}" width="{width}" height="16" rx="3"'
    return f'<rect {place} class="{style}"/>'


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--svg", type=Path, help="where to write it as an image")
    parser.add_argument(
        "--variants",
        nargs=3,
        type=Variant,
        default=[*map(Variant, VARIANTS)],
        help="where to import BackgroundTasks from, instead of "
        f"{' '.join(VARIANTS)}, with +middleware if that is to be around the app",
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=1,
        help="how long the server waits for requests when it stops, in seconds",
    )
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        spec, notes = options.serve
        serve(Variant(spec), Path(notes), options.grace)
        return
    runs = [place_orders(variant, options.grace) for variant in options.variants]
    check(*runs)
    # These mostly wait, so they may do that at the same time.
    with ThreadPoolExecutor() as pool:
        waiting = functools.partial(deploy, grace=options.grace)
        deploys = [*pool.map(waiting, options.variants)]
    check_deploys(*deploys)
    option = f"--timeout-graceful-shutdown {options.grace}"
    print(*terminal(runs, deploys, option), sep="\n")
    if options.svg:
        options.svg.write_text(svg(runs, deploys, option), encoding="utf-8")


if __name__ == "__main__":
    main()
