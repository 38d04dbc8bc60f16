"""The spans of tasks: what they tell, what they are linked to, and beside which."""

import functools
import logging
import queue
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import starlette.background
from fastapi import FastAPI
from observed import Backend, endpoint, give_up, serve, stop
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.starlette import StarletteInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from postlude import BackgroundTask, BackgroundTasks, add_task, task
from postlude.opentelemetry import Tracing

SECRET = "4111 1111 1111 1111"


class Spans:
    """An observer whose spans are kept, and a tracer that its spans are beside."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("tests")
        self.tracing = Tracing(tracer_provider=self.provider)

    def all(self) -> list[ReadableSpan]:
        return [*self._exporter.get_finished_spans()]

    def named(self, name: str) -> ReadableSpan:
        [span] = [span for span in self.all() if span.name == name]
        return span

    def of_tasks(self) -> list[ReadableSpan]:
        scopes = ((span.instrumentation_scope, span) for span in self.all())
        return [span for scope, span in scopes if scope and scope.name == "postlude"]


@pytest.fixture
def spans(caplog: pytest.LogCaptureFixture) -> Generator[Spans]:
    yield Spans()
    # OpenTelemetry logs what it is not content with.
    assert not [r for r in caplog.records if r.name.startswith("opentelemetry")]


def ids(span: ReadableSpan) -> tuple[int, int]:
    found = span.get_span_context()
    assert found is not None
    return found.trace_id, found.span_id


def links(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def pay(card: str) -> None: ...


async def pay_async(card: str) -> None: ...


def doing(kind: str, do: Callable[[], object]) -> Callable[[str], Any]:
    """Makes a task of a kind that does something."""

    def charge(card: str) -> None:
        do()

    async def charge_async(card: str) -> None:
        do()

    def charge_later(card: str) -> Any:
        return charge_async(card)

    kinds = {"sync": charge, "async": charge_async, "returned": charge_later}
    return task(name="charge")(kinds[kind])


def raising(kind: str, error: BaseException) -> Callable[[str], Any]:
    def fail() -> None:
        raise error

    return doing(kind, fail)


def adding(func: Callable[[str], Any]) -> Callable[[], None]:
    """Makes an endpoint that adds a task."""

    def add() -> None:
        add_task(func, SECRET)

    return add


each_kind = pytest.mark.parametrize("kind", ["sync", "async", "returned"])


@each_kind
def test_a_task_has_a_span_of_its_own_linked_to_that_of_its_request(
    kind: str, anyio_backend: Backend, spans: Spans
) -> None:
    made: list[BackgroundTask] = []

    def answer() -> None:
        with spans.tracer.start_as_current_span("request"):
            made.append(add_task(doing(kind, list), SECRET))

    serve(answer, anyio_backend, spans.tracing)
    span = spans.named("charge")
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is None
    assert links(span) == [ids(spans.named("request"))]
    assert ids(span)[0] != ids(spans.named("request"))[0]
    assert span.attributes == {
        "code.function.name": f"{__name__}.{made[0].func.__qualname__}",
        "postlude.task.id": made[0].id,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert not span.events
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("concurrency", [1, 2])
def test_each_task_of_a_group_is_linked_to_the_span_it_was_added_in(
    concurrency: int, anyio_backend: Backend, spans: Spans
) -> None:
    def answer() -> Response:
        tasks = BackgroundTasks(concurrency=concurrency)
        # The first two share a trip to a thread.
        for number, func in enumerate([pay, pay, pay_async, pay]):
            with spans.tracer.start_as_current_span(f"step {number}"):
                once: Any = functools.partial(func, SECRET)
                tasks.add_task(task(name=f"{number}")(once))
        return Response(background=tasks)

    serve(answer, anyio_backend, spans.tracing)
    for number in range(4):
        assert links(spans.named(f"{number}")) == [ids(spans.named(f"step {number}"))]


def test_stock_tasks_and_those_in_nested_groups_have_spans_too(
    anyio_backend: Backend, spans: Spans
) -> None:
    def answer() -> Response:
        stock = starlette.background.BackgroundTask(pay, SECRET)
        inner = BackgroundTasks([BackgroundTask(pay_async, SECRET)])
        return Response(background=BackgroundTasks([stock, inner]))

    serve(answer, anyio_backend, spans.tracing)
    names = [span.name for span in spans.of_tasks()]
    assert names == [f"{__name__}.pay", f"{__name__}.pay_async"]


@each_kind
def test_what_a_task_does_is_in_its_span_and_what_it_adds_linked_to_that(
    kind: str, anyio_backend: Backend, spans: Spans
) -> None:
    def work() -> None:
        with spans.tracer.start_as_current_span("query"):
            add_task(functools.partial(pay, SECRET))

    serve(adding(doing(kind, work)), anyio_backend, spans.tracing)
    outer, query = spans.named("charge"), spans.named("query")
    assert query.parent is not None
    assert (query.parent.trace_id, query.parent.span_id) == ids(outer)
    assert not outer.links
    assert links(spans.named(f"{__name__}.pay")) == [ids(query)]


@each_kind
@pytest.mark.parametrize(
    ("error", "name", "description"),
    [
        (ValueError("no money"), "ValueError", "ValueError: no money"),
        (queue.Empty("no card"), "_queue.Empty", "Empty: no card"),
        (SystemExit(3), "SystemExit", "SystemExit: 3"),
    ],
    ids=["ValueError", "Empty", "SystemExit"],
)
def test_an_error_is_recorded(  # noqa: PLR0917 - three of them are fixtures
    kind: str,
    error: BaseException,
    name: str,
    description: str,
    anyio_backend: Backend,
    spans: Spans,
) -> None:
    serve(adding(raising(kind, error)), anyio_backend, spans.tracing)
    span = spans.named("charge")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == description
    [event] = span.events
    assert event.name == "exception"
    assert (span.attributes or {})["error.type"] == name
    assert (event.attributes or {})["exception.type"] == name


def test_a_task_that_is_stopped_is_marked_and_one_that_never_ran_has_no_span(
    anyio_backend: Backend, spans: Spans
) -> None:
    stop(anyio_backend, spans.tracing)
    [span] = spans.of_tasks()
    assert span.name == "running"
    assert span.status.status_code is StatusCode.ERROR
    assert "Cancelled" in str((span.attributes or {})["error.type"])


def test_a_task_whose_result_is_not_awaited_any_more_is_marked(spans: Spans) -> None:
    give_up(spans.tracing)
    span = spans.named("given up")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "cancelled"


@each_kind
def test_the_record_of_a_failure_belongs_to_the_span(
    kind: str, anyio_backend: Backend, spans: Spans
) -> None:
    current: list[int] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            current.append(trace.get_current_span().get_span_context().span_id)

    handler = Handler(logging.ERROR)
    answer = adding(raising(kind, ValueError()))
    logging.getLogger("postlude").addHandler(handler)
    try:
        serve(answer, anyio_backend, spans.tracing)
    finally:
        logging.getLogger("postlude").removeHandler(handler)
    assert current == [ids(spans.named("charge"))[1]]


@each_kind
def test_the_baggage_of_the_request_is_the_tasks_as_well(
    kind: str, anyio_backend: Backend, spans: Spans
) -> None:
    seen: list[object] = []
    func = doing(kind, lambda: seen.append(baggage.get_baggage("user")))

    def answer() -> None:
        context.attach(baggage.set_baggage("user", "ada"))
        add_task(func, SECRET)

    serve(answer, anyio_backend, spans.tracing)
    assert seen == ["ada"]


# --- beside others who make spans ----------------------------------------------------


def buy() -> Response:
    add_task(pay, SECRET)
    tasks = BackgroundTasks([starlette.background.BackgroundTask(print)])
    tasks.add_task(pay_async, SECRET)
    return Response(background=tasks)


@contextmanager
def starlette_instrumented(spans: Spans) -> Generator[Starlette]:
    app = Starlette(routes=[Route("/", endpoint(buy))])
    StarletteInstrumentor.instrument_app(app, tracer_provider=spans.provider)
    yield app
    StarletteInstrumentor.uninstrument_app(app)


@contextmanager
def fastapi_instrumented(spans: Spans) -> Generator[Starlette]:
    app = FastAPI()
    app.get("/")(buy)
    # It patches what is Starlette's, for all applications.
    FastAPIInstrumentor.instrument_app(app, tracer_provider=spans.provider)
    yield app
    FastAPIInstrumentor.uninstrument_app(app)


@contextmanager
def fastapi_itself(spans: Spans) -> Generator[Starlette]:
    app = FastAPI(telemetry={"tracer_provider": spans.provider})
    app.get("/")(buy)
    yield app


@pytest.mark.parametrize(
    "instrumented",
    [
        starlette_instrumented,
        fastapi_instrumented,
        pytest.param(
            fastapi_itself,
            marks=pytest.mark.skipif(
                find_spec("fastapi.telemetry") is None,
                reason="older versions of FastAPI make no spans",
            ),
        ),
    ],
    ids=lambda instrumented: instrumented.__name__,
)
@pytest.mark.parametrize("detach", [False, True], ids=["waiting", "detached"])
def test_spans_of_tasks_are_linked_to_those_that_others_make_of_a_request(
    instrumented: Callable[[Spans], AbstractContextManager[Starlette]],
    detach: bool,
    anyio_backend: Backend,
    spans: Spans,
) -> None:
    with instrumented(spans) as app:
        serve(app, anyio_backend, spans.tracing, detach=detach)
    stock, *tasks = spans.of_tasks()
    assert stock.name == "builtins.print"
    assert [span.name for span in tasks] == [f"{__name__}.pay_async", f"{__name__}.pay"]
    request = [ids(span) for span in spans.all() if span not in (stock, *tasks)]
    [trace_of_request] = {trace_id for trace_id, _ in request}
    for span in tasks:
        [link] = links(span)
        assert link in request
        assert span.parent is None
        assert ids(span)[0] != trace_of_request


def test_without_a_provider_tasks_run_all_the_same(anyio_backend: Backend) -> None:
    made: list[BackgroundTask] = []
    serve(lambda: made.append(add_task(pay, SECRET)), anyio_backend, Tracing())
    assert made[0].state == "succeeded"
