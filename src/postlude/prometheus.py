"""An observer that counts and times tasks: the extra `postlude[prometheus]`."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from threading import Lock
from time import perf_counter
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from ._tasks import BackgroundTask, TaskState, _leaves, _leaves_thread, _parts

__all__ = ["Metrics"]

# From what only hands something over to what takes its time, in seconds.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)


class _Metrics(NamedTuple):
    """What is measured of the tasks of all names."""

    accepted: Counter
    started: Counter
    finished: Counter
    lost: Counter
    duration: Histogram


class _Series:
    """What is measured of the tasks of one name: looked up once, and 0 from then on."""

    __slots__ = ("accepted", "duration", "finished", "lost", "started")

    def __init__(self, metrics: _Metrics, name: str) -> None:
        self.accepted = metrics.accepted.labels(name)
        self.started = metrics.started.labels(name)
        self.finished = {
            state: metrics.finished.labels(name, state)
            for state in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED)
        }
        self.lost = {
            state: metrics.lost.labels(name, state)
            for state in (TaskState.PENDING, TaskState.RUNNING)
        }
        self.duration = metrics.duration.labels(name)


class Metrics:
    """Counts and times the tasks that run in `BackgroundTasksMiddleware`.

    The metrics, each with the label `task`, which is the name of the task:

    ================================= ==================================================
    `postlude_tasks_accepted_total`   Tasks that are to run.
    `postlude_tasks_started_total`    Of these, tasks that have been started.
    `postlude_tasks_finished_total`   Of these, tasks that have ended; the label
                                      `outcome` is `succeeded`, `failed`, or
                                      `cancelled` if they were stopped.
    `postlude_tasks_lost_total`       Tasks lost when the application stopped; the label
                                      `state` is `running` if they had been started,
                                      `pending` if not.
    `postlude_task_duration_seconds`  How long tasks took, however they ended: a
                                      histogram.
    ================================= ==================================================

    They work in the multiprocess mode of `prometheus_client` as well. Waiting are the
    tasks that have been accepted, but neither started nor lost while pending.

    Example:
        .. code-block:: python

            from starlette.applications import Starlette

            from postlude import BackgroundTasksMiddleware
            from postlude.prometheus import Metrics

            app = BackgroundTasksMiddleware(Starlette(), observers=[Metrics()])

    Args:
        registry: Where to register the metrics; by default the global registry.
        buckets: The upper bounds of the histogram's buckets, in seconds.
        max_names: How many names of tasks, in a process, have metrics of their own.
            The tasks of all further names are counted under the name `other`.

    Raises:
        TypeError: If `max_names` is not an int.
        ValueError: If `max_names` is less than 1, or the registry holds the metrics of
            another `Metrics` already.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        *,
        registry: CollectorRegistry | None = None,
        buckets: Sequence[float] = _BUCKETS,
        max_names: int = 100,
    ) -> None:
        if not isinstance(max_names, int):
            raise TypeError(f"max_names must be an int, not {max_names!r}")
        if max_names < 1:
            raise ValueError(f"max_names must be at least 1, not {max_names!r}")
        if registry is None:
            registry = REGISTRY

        def counter(what: str, help_text: str, *labels: str) -> Counter:
            name = f"postlude_tasks_{what}"
            return Counter(name, help_text, ["task", *labels], registry=registry)

        self._metrics = _Metrics(
            counter("accepted", "Tasks that are to run."),
            counter("started", "Tasks that have been started."),
            counter("finished", "Tasks that have ended.", "outcome"),
            counter("lost", "Tasks lost when the application stopped.", "state"),
            Histogram(
                "postlude_task_duration_seconds",
                "How long tasks took, however they ended.",
                ["task"],
                registry=registry,
                buckets=buckets,
            ),
        )
        self._max_names = max_names
        self._lock = Lock()
        self._series: dict[str, _Series] = {}

    def accepted(self, task: BackgroundTask) -> None:
        """Counts a task that is to run."""
        self._of(task).accepted.inc()

    @contextmanager
    def __call__(self, task: BackgroundTask) -> Generator[None]:
        """Counts a task that starts, and times and counts it when it ends."""
        series = self._of(task)
        series.started.inc()
        outcome = TaskState.SUCCEEDED
        began = perf_counter()
        try:
            yield
        except BaseException as exc:
            outcome = TaskState.CANCELLED if _is_stopped(exc) else TaskState.FAILED
            raise
        else:
            # What a sync task has returned is not awaited any more.
            if task.state is TaskState.CANCELLED:
                outcome = task.state
        finally:
            series.duration.observe(perf_counter() - began)
            series.finished[outcome].inc()

    def lost(self, task: BackgroundTask) -> None:
        """Counts a task that was lost when the application stopped."""
        state = TaskState.RUNNING if task.started_at else TaskState.PENDING
        self._of(task).lost[state].inc()

    def _of(self, task: BackgroundTask) -> _Series:
        name = task.name
        found = self._series.get(name)
        if found is None:
            with self._lock:
                if name not in self._series and len(self._series) >= self._max_names:
                    name = "other"
                found = self._series.get(name) or _Series(self._metrics, name)
                self._series[name] = found
        return found


def _is_stopped(exc: BaseException) -> bool:
    """Whether a task that has raised this was stopped, and has not failed."""
    if isinstance(exc, Exception):
        return False
    try:
        return any(map(_leaves, _parts(exc)))
    except RuntimeError:
        # There is no event loop in a worker thread.
        return any(map(_leaves_thread, _parts(exc)))
