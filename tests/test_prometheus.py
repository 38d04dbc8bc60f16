"""What is counted and timed of tasks, in one process and in several."""

import json
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from observed import Backend, give_up, serve, stop
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from servers import start, wait_until

from postlude import add_task, task
from postlude.prometheus import Metrics

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "docs" / "grafana.json"

Counts = dict[tuple[str, ...], float]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def counts(registry: CollectorRegistry) -> Counts:
    """Returns what is not 0, by what it is, the name of the task, other labels."""
    found: Counts = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.value and sample.name.endswith(("_total", "_count")):
                what = sample.name.removeprefix("postlude_").removesuffix("_total")
                labels = dict(sample.labels)
                found[what, labels.pop("task"), *labels.values()] = sample.value
    return found


def named(name: str, error: BaseException | None = None) -> Callable[[], None]:
    @task(name=name)
    def run() -> None:
        if error is not None:
            raise error

    return run


def adding(func: Callable[[], object]) -> Callable[[], None]:
    """Makes an endpoint that adds a task."""

    def add() -> None:
        add_task(func)

    return add


def ran(name: str, outcome: str, times: int = 1) -> Counts:
    """Returns the counts of tasks that were accepted, started and finished."""
    return {
        ("tasks_accepted", name): times,
        ("tasks_started", name): times,
        ("tasks_finished", name, outcome): times,
        ("task_duration_seconds_count", name): times,
    }


@pytest.mark.parametrize("kind", ["sync", "async", "returned"])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "succeeded"), (ValueError(), "failed"), (SystemExit(), "failed")],
    ids=["None", "ValueError", "SystemExit"],
)
def test_a_task_is_counted_and_timed_with_its_outcome(
    kind: str,
    error: BaseException | None,
    outcome: str,
    anyio_backend: Backend,
    registry: CollectorRegistry,
) -> None:
    run = named("work", error)

    async def run_async() -> None:
        run()

    def run_later() -> Any:
        return run_async()

    kinds = {"sync": run, "async": run_async, "returned": run_later}
    func = task(name="work")(kinds[kind])

    def answer() -> None:
        add_task(func)
        add_task(func)

    serve(answer, anyio_backend, Metrics(registry=registry))
    assert counts(registry) == ran("work", outcome, 2)


def test_tasks_that_share_a_thread_and_those_that_a_task_adds_are_counted(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    @task(name="outer")
    def outer() -> None:
        add_task(named("inner"))

    def answer() -> None:
        for name in "one", "two":
            add_task(named(name))
        add_task(outer)

    serve(answer, anyio_backend, Metrics(registry=registry))
    names = ["one", "two", "outer", "inner"]
    assert counts(registry) == {
        key: value for name in names for key, value in ran(name, "succeeded").items()
    }


def test_waiting_tasks_are_accepted_but_not_started(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    started, go_on = threading.Event(), threading.Event()

    @task(name="held")
    def hold() -> None:
        started.set()
        go_on.wait(10)

    def answer() -> None:
        add_task(hold)
        add_task(named("waiting"))

    def look() -> None:
        assert started.wait(10)
        assert counts(registry) == {
            ("tasks_accepted", "held"): 1,
            ("tasks_started", "held"): 1,
            ("tasks_accepted", "waiting"): 1,
        }
        go_on.set()

    metrics = Metrics(registry=registry)
    serve(answer, anyio_backend, metrics, meanwhile=look, detach=True)
    assert counts(registry) == ran("held", "succeeded") | ran("waiting", "succeeded")


def test_lost_tasks_are_counted_by_whether_they_had_been_started(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    stop(anyio_backend, Metrics(registry=registry))
    assert counts(registry) == {
        **ran("running", "cancelled"),
        ("tasks_lost", "running", "running"): 1,
        ("tasks_accepted", "pending"): 1,
        ("tasks_lost", "pending", "pending"): 1,
    }


def test_a_task_whose_result_is_not_awaited_any_more_is_cancelled(
    registry: CollectorRegistry,
) -> None:
    give_up(Metrics(registry=registry))
    assert counts(registry) == ran("given up", "cancelled")


def test_a_duration_falls_into_one_of_the_buckets(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    metrics = Metrics(registry=registry, buckets=[60, 600])
    serve(adding(named("work")), anyio_backend, metrics)

    def bucket(bound: str) -> float | None:
        name = "postlude_task_duration_seconds_bucket"
        return registry.get_sample_value(name, {"task": "work", "le": bound})

    assert [bucket(bound) for bound in ("60.0", "600.0", "+Inf")] == [1, 1, 1]
    total = registry.get_sample_value(
        "postlude_task_duration_seconds_sum", {"task": "work"}
    )
    assert total is not None
    assert 0 < total < 60


def test_names_beyond_the_bound_are_counted_as_one(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    def answer() -> None:
        for name in "abcdab":
            add_task(named(name))

    serve(answer, anyio_backend, Metrics(registry=registry, max_names=2))
    assert counts(registry) == {
        **ran("a", "succeeded", 2),
        **ran("b", "succeeded", 2),
        **ran("other", "succeeded", 2),
    }


def test_a_name_that_has_been_seen_begins_with_0(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    metrics = Metrics(registry=registry)
    serve(adding(named("work")), anyio_backend, metrics)
    for outcome in "failed", "cancelled":
        labels = {"task": "work", "outcome": outcome}
        name = "postlude_tasks_finished_total"
        assert registry.get_sample_value(name, labels) == 0


def test_the_metrics_are_in_the_global_registry_unless_another_is_given(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postlude.prometheus.REGISTRY", registry)
    Metrics()
    Metrics(registry=CollectorRegistry())
    assert "postlude_tasks_accepted" in {family.name for family in registry.collect()}


def test_what_makes_no_sense_is_refused(registry: CollectorRegistry) -> None:
    with pytest.raises(ValueError, match="max_names must be at least 1, not 0"):
        Metrics(registry=registry, max_names=0)
    no_number: Any = "5"
    with pytest.raises(TypeError, match="max_names must be an int, not '5'"):
        Metrics(registry=registry, max_names=no_number)
    Metrics(registry=registry)
    with pytest.raises(ValueError, match="postlude_tasks_accepted"):
        Metrics(registry=registry)


def test_the_dashboard_asks_for_the_metrics_and_labels_that_there_are(
    anyio_backend: Backend, registry: CollectorRegistry
) -> None:
    serve(adding(named("work")), anyio_backend, Metrics(registry=registry))
    labels = {
        sample.name: {*sample.labels}
        for family in registry.collect()
        for sample in family.samples
    }
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    asked: set[str] = set()
    for target in (each for panel in dashboard["panels"] for each in panel["targets"]):
        query = target["expr"]
        names = re.findall(r"\b(postlude_\w+){(.*?)}", query)
        assert len(names) == query.count("postlude_") > 0
        groups = {
            name for by in re.findall(r"by \((.*?)\)", query) for name in by.split(", ")
        }
        assert {*re.findall(r"{{(\w+)}}", target["legendFormat"])} <= groups
        for name, matchers in names:
            # Prometheus itself adds the job.
            wanted = {*re.findall(r"(\w+)=", matchers)} - {"job"} | groups
            assert wanted <= labels[name], query
            asked.add(name)
        used = {*re.findall(r"\$(\w+)", query)}
        assert used <= variables | {"__range", "__rate_interval"}
    counters = {name for name in labels if name.endswith("_total")}
    histogram = "postlude_task_duration_seconds"
    assert asked == counters | {f"{histogram}_bucket", f"{histogram}_sum"}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends no server there")
def test_the_counts_of_several_processes_add_up(tmp_path: Path) -> None:
    directory = tmp_path / "metrics"
    directory.mkdir()
    command = [
        *[sys.executable, "-m", "uvicorn", "metrics:app", f"--app-dir={ROOT}/examples"],
        *["--workers=2", "--port={port}"],
    ]
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    with start(command, log=tmp_path / "log", environment=environment) as server:
        ordered = 0

        def processes() -> int:
            """Orders once more, and counts the processes that have been asked."""
            nonlocal ordered
            assert httpx2.post(f"{server.url}/orders/7").status_code == 202
            ordered += 1
            return len([*directory.glob("counter_*.db")])

        def finished() -> float:
            families = text_string_to_metric_families(
                httpx2.get(f"{server.url}/metrics").text
            )
            return sum(
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == "postlude_tasks_finished_total"
                and sample.labels["task"] == "send_receipt"
            )

        wait_until(lambda: processes() > 1)
        wait_until(lambda: finished() == ordered)
        server.stop(signal.SIGTERM)
