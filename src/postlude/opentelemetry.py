"""An observer that makes a span of each task: the extra `postlude[opentelemetry]`."""

from collections.abc import Generator
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace import Link, SpanKind, StatusCode, TracerProvider

from ._options import dotted_name_of
from ._tasks import BackgroundTask, TaskState

__all__ = ["Tracing"]


class Tracing:
    """Makes a span of each task that runs in `BackgroundTasksMiddleware`.

    The span is named after the task and begins a trace of its own, as the span of the
    request has usually ended by then. A link leads to the span that was current when
    the task was added, which in a task is the span of that task. Its kind is
    `CONSUMER`, and its attributes are `code.function.name` and `postlude.task.id`,
    which is the `task_id` of log records. If the task fails or is stopped, the status
    is `ERROR`, with the exception as an event and `error.type`.

    A task's arguments are never part of it. What the exception says is.

    Example:
        .. code-block:: python

            from starlette.applications import Starlette

            from postlude import BackgroundTasksMiddleware
            from postlude.opentelemetry import Tracing

            app = BackgroundTasksMiddleware(Starlette(), observers=[Tracing()])

    Args:
        tracer_provider: What makes the spans; by default the global provider.

    .. versionadded:: 0.1.0
    """

    def __init__(self, *, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("postlude", tracer_provider=tracer_provider)

    @contextmanager
    def __call__(self, task: BackgroundTask) -> Generator[None]:
        """Makes the span current as long as the task runs."""
        origin = trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            task.name,
            # Without a parent, but with the baggage, by which a sampler may decide.
            trace.set_span_in_context(trace.INVALID_SPAN),
            SpanKind.CONSUMER,
            {
                "code.function.name": dotted_name_of(task.func),
                "postlude.task.id": task.id,
            },
            [Link(origin)] if origin.is_valid else [],
        )
        # For good, as the context is the task's alone: what is logged when the task
        # has failed belongs to the span as well.
        context.attach(trace.set_span_in_context(span))
        try:
            yield
        except BaseException as exc:
            kind = type(exc)
            module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
            span.set_attribute("error.type", f"{module}{kind.__qualname__}")
            span.set_status(StatusCode.ERROR, f"{kind.__name__}: {exc}")
            span.record_exception(exc)
            raise
        else:
            # What a sync task has returned is not awaited any more.
            if task.state is TaskState.CANCELLED:
                span.set_status(StatusCode.ERROR, task.state)
        finally:
            span.end()
