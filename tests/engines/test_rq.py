"""What is particular to RQ."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Generator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.job import Job
from rq.serializers import JSONSerializer

from engines import on_rq
from engines.brokers import stoppable, url_of
from postlude import BackgroundTask, task
from postlude.engines import NotSerialisable, OutcomeUnknown, Receipt, enqueue
from postlude.engines.rq import RQEngine

pytestmark = pytest.mark.anyio

request_id: ContextVar[str] = ContextVar("request_id", default="")


def declared(engine: Any) -> Callable[..., None]:
    """Returns a function of that engine."""

    def upload(*args: object, **kwargs: object) -> None: ...

    upload.__qualname__ = "upload"
    return task(engine=engine)(upload)


UPLOAD = f"{__name__}.upload"
NO_RETRY = Retry(NoBackoff(), 0)


@pytest.fixture
def queue(tmp_path: Path) -> Generator[rq.Queue]:
    """A queue of the test's own, without jobs in the end."""
    url, name = url_of("redis", tmp_path), f"postlude-{uuid.uuid4().hex}"
    with redis.Redis.from_url(url) as connection:
        yield rq.Queue(name, connection=connection)
    on_rq.clean(url, name)


async def sent(engine: RQEngine, *args: Any, **kwargs: Any) -> Job:
    """Hands a task over and returns the job that RQ has then."""
    async with engine:
        receipt = await enqueue(declared(engine), *args, **kwargs)
    queue: rq.Queue = engine._options["queue"]
    assert receipt.engine == "rq"
    job = queue.fetch_job(receipt.id)
    assert job
    return job


async def test_a_job_has_the_options_declared(queue: rq.Queue) -> None:
    engine = RQEngine(queue)
    eager = engine.options(timeout=7, retry=rq.Retry(max=3, interval=5), at_front=True)
    first = await sent(engine, 1)
    second = await sent(eager.options(result_ttl=60, meta={"by": "us"}), 2)
    assert queue.job_ids == [second.id, first.id]
    assert (first.timeout, second.timeout) == (rq.Queue.DEFAULT_TIMEOUT, 7)
    assert (second.retries_left, second.retry_intervals) == (3, [5])
    assert (second.result_ttl, second.meta) == (60, {"by": "us"})
    assert (first.retries_left, first.meta) == (None, {})


async def test_a_job_tells_its_function_but_not_its_arguments(queue: rq.Queue) -> None:
    job = await sent(RQEngine(queue), "a secret", password="another")
    assert (job.func_name, job.description) == (UPLOAD, UPLOAD)
    described = RQEngine(queue).options(description="upload a photo")
    assert (await sent(described)).description == "upload a photo"
    described = RQEngine(queue).options(description=None)
    assert (await sent(described)).description == UPLOAD


async def test_functions_may_have_queues_of_their_own(queue: rq.Queue) -> None:
    other = rq.Queue(f"{queue.name}-other", connection=queue.connection)
    engine = RQEngine(queue)
    job = await sent(engine.options(queue=other))
    assert (other.job_ids, queue.job_ids) == ([job.id], [])
    other.delete(delete_jobs=True)


async def test_the_serializer_of_the_queue_is_used(queue: rq.Queue) -> None:
    json = rq.Queue(queue.name, connection=queue.connection, serializer=JSONSerializer)
    job = await sent(RQEngine(json), (1, 2), {3: "three"})
    assert list(job.args) == [[1, 2], {"3": "three"}]
    async with RQEngine(json) as engine:
        with pytest.raises(NotSerialisable, match=f"rq cannot be sent .* {UPLOAD}: "):
            BackgroundTask(declared(engine), {1})
    # Pickle sends almost anything.
    assert (await sent(RQEngine(queue), {1}, Path())).args == ({1}, Path())
    async with RQEngine(queue) as engine:
        with pytest.raises(TypeError, match=f"rq cannot be sent a call of {UPLOAD}: "):
            BackgroundTask(declared(engine), lambda: None)


async def test_headers_stand_beside_what_else_a_job_has_as_meta(
    queue: rq.Queue,
) -> None:
    engine = RQEngine(queue, headers=lambda: {"request-id": "7"})
    job = await sent(engine.options(meta={"by": "us"}))
    assert job.meta == {"by": "us", "postlude": {"request-id": "7"}}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retry": "x"}, TypeError, "RQ does not take {'retry': 'x'}: "),
        ({"job_id": "7"}, TypeError, "job_id= is for one job, not for a function: wri"),
        ({"kwargs": {}}, TypeError, r"write queue\.enqueue_call\(func, \.\.\., kwargs"),
        ({"job_timeout": 7}, TypeError, "job_timeout= is no option of RQ; .* timeout,"),
        ({"queue": "images"}, TypeError, "must be an rq.Queue, not 'images': write rq"),
        ({"timeout": 0}, ValueError, "0 timeout is not allowed"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    engine = RQEngine(rq.Queue("images", connection=redis.Redis()))
    with pytest.raises(error, match=message):
        engine.options(**options)


def test_a_queue_that_is_none_is_refused() -> None:
    name: Any = "images"
    with pytest.raises(TypeError, match=r"write rq\.Queue\(name, connection="):
        RQEngine(name)


class Album:
    class Cover:
        def show(self) -> None: ...

    def add(self) -> None: ...


def test_a_function_that_rq_would_not_find_is_refused() -> None:
    engine = RQEngine(rq.Queue("images", connection=redis.Redis()))
    task(engine=engine)(Album.add)
    with pytest.raises(TypeError, match=r"in it, not .*Album\.Cover\.show: move it"):
        task(engine=engine)(Album.Cover.show)
    assert [*engine.functions] == [f"{__name__}.Album.add"]


class Photo:
    @classmethod
    def load(cls, photo: int) -> None: ...

    @staticmethod
    def show(kind: type) -> None: ...


class Picture(Photo):
    pass


async def test_rq_is_sent_a_class_method_without_its_class(queue: rq.Queue) -> None:
    engine = RQEngine(queue)
    load, show = Photo.__dict__["load"], Photo.__dict__["show"]
    task(engine=engine)(load)
    task(engine=engine)(show)
    async with engine:
        receipts = [await enqueue(Photo.load, 42), await enqueue(Photo.show, Photo)]
        with pytest.raises(
            TypeError, match=r"RQ would call .*Photo\.load of the class"
        ):
            await enqueue(Picture.load, 42)
    jobs = [queue.fetch_job(receipt.id) for receipt in receipts]
    assert [job and job.args for job in jobs] == [(42,), (Photo,)]
    for job in jobs:
        assert job
        assert job.func
        job.func(*job.args)


async def test_a_redis_that_does_not_answer_in_time_may_have_the_job(
    tmp_path: Path,
) -> None:
    with stoppable("redis", tmp_path) as (_, server):
        connection = redis.Redis(port=server.port, retry=NO_RETRY, socket_timeout=0.1)
        async with RQEngine(rq.Queue(connection=connection), timeout=30) as engine:
            func = declared(engine)
            assert isinstance(await enqueue(func), Receipt)
            server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(OutcomeUnknown, match=f"{UPLOAD} may still run: rq did"):
                await enqueue(func)


# --- in a worker ---------------------------------------------------------------------

WORKED = """
import os
import signal
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import rq
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.job import Job

request_id = ContextVar("request_id", default="")


class RestoringJob(Job):
    def perform(self):
        request_id.set(self.meta.get("postlude", {}).get("request-id", ""))
        return super().perform()


class Album:
    @staticmethod
    def sort(path):
        Path(path).write_text("sorted")


def tell(path):
    Path(path).write_text(request_id.get())


async def tell_async(path):
    tell(path)


def end_once(path):
    with Path(path).open("a") as file:
        file.write("ran")
    if Path(path).read_text() == "ran":
        os.kill(os.getpid(), signal.SIGKILL)


def tell_from_meta(path):
    job = rq.get_current_job()
    Path(path).write_text(job.meta["postlude"]["request-id"])
"""


def work(queue: rq.Queue, directory: Path, *options: str) -> str:
    """Runs a worker until there is nothing more to do."""
    url = url_of("redis", directory)
    command = [sys.executable, "-m", "rq.cli", "worker", "--burst", "--url", url]
    done = subprocess.run(
        [*command, *options, queue.name],
        env=os.environ | {"PYTHONPATH": str(directory)},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tell", "7"),
        ("tell_async", "7"),
        ("tell_from_meta", "7"),
        ("Album.sort", "sorted"),
    ],
)
async def test_a_job_class_of_the_worker_restores_headers(
    name: str, told: str, queue: rq.Queue, tmp_path: Path
) -> None:
    (tmp_path / "worked.py").write_text(WORKED)
    engine = RQEngine(queue, headers=lambda: {"request-id": "7"})

    def func(path: str) -> None: ...

    func.__module__, func.__qualname__ = "worked", name
    async with engine:
        await enqueue(task(engine=engine)(func), str(tmp_path / "told"))
    work(queue, tmp_path, "--job-class", "worked.RestoringJob")
    assert (tmp_path / "told").read_text() == told


@pytest.mark.parametrize("times", [0, 1])
async def test_a_job_whose_process_is_killed_runs_again_if_it_may(
    times: int, queue: rq.Queue, tmp_path: Path
) -> None:
    (tmp_path / "worked.py").write_text(WORKED)

    def func(path: str) -> None: ...

    func.__module__, func.__qualname__ = "worked", "end_once"
    engine = RQEngine(queue)
    if times:
        engine = engine.options(retry=rq.Retry(max=times))
    async with engine:
        receipt = await enqueue(task(engine=engine)(func), str(tmp_path / "told"))
    work(queue, tmp_path)
    assert (tmp_path / "told").read_text() == "ran" * (1 + times)
    job = queue.fetch_job(receipt.id)
    assert job
    assert (job.is_failed, job.is_finished) == (not times, bool(times))
