"""What FastAPI injects: as its own, one a request, and named if it is dropped."""

import gc
import importlib
import importlib.util
import inspect
import logging
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, Any

import fastapi
import fastapi.responses
import fastapi.security
import pytest
import starlette.responses
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Security
from served_fastapi import OURS, OWN, Tasks, clean_up, injecting, log, write
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.testclient import TestClient
from starlette.types import ASGIApp

import postlude.fastapi
from postlude import (
    BackgroundTask,
    BackgroundTasks,
    BackgroundTasksMiddleware,
    TaskState,
    responses,
)

# FastAPI has had both since 0.135.
GENERATORS = importlib.util.find_spec("fastapi.sse") is not None

Wrap = Callable[[ASGIApp], ASGIApp]

WRAPS: dict[str, Wrap] = {
    "bare": lambda app: app,
    "attached": BackgroundTasksMiddleware,
    "detached": lambda app: BackgroundTasksMiddleware(app, detach=True),
}
both_kinds = pytest.mark.parametrize("kind", [OWN, OURS], ids=["fastapi", "postlude"])
each_way = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


@pytest.fixture(autouse=True)
def _clean(caplog: pytest.LogCaptureFixture) -> Generator[None]:
    log.clear()
    caplog.set_level(logging.WARNING, "postlude")
    yield
    log.clear()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    gc.collect()
    return [each.getMessage() for each in caplog.records if each.name == "postlude"]


# --- one a request -------------------------------------------------------------------


def sharing(kind: Any) -> FastAPI:
    """Makes an app that adds a task wherever FastAPI injects something."""
    inject = injecting({Tasks: kind})
    seen: list[object] = []

    def add(tasks: Tasks, line: str) -> None:
        seen.append(tasks)
        tasks.add_task(write, line)

    @inject
    async def of_app(tasks: Tasks) -> None:
        seen.clear()
        add(tasks, "app")

    @inject
    def of_router(tasks: Tasks) -> None:
        add(tasks, "router")

    @inject
    async def sub(tasks: Tasks) -> None:
        add(tasks, "sub-dependency")

    @inject
    def dependency(tasks: Tasks, _: Annotated[None, Depends(sub)]) -> None:
        add(tasks, "dependency")

    class Dependency:
        @inject
        def __init__(self, tasks: Tasks) -> None:
            add(tasks, "class")

    @inject
    async def secret(tasks: Tasks, scopes: fastapi.security.SecurityScopes) -> None:
        add(tasks, f"security {scopes.scope_str}")

    @inject
    async def session(tasks: Tasks) -> AsyncIterator[None]:
        add(tasks, "async yield")
        yield

    @inject
    def session_sync(tasks: Tasks) -> Iterator[None]:
        add(tasks, "yield")
        yield

    @inject
    async def again(tasks: Tasks) -> None:
        add(tasks, "not cached")

    async def overridden() -> None:
        raise NotImplementedError

    @inject
    def override(
        tasks: Tasks, _: Annotated[None, Depends(again, use_cache=False)]
    ) -> None:
        add(tasks, "override")

    router = APIRouter(prefix="/prefix", dependencies=[Depends(of_router)])
    dependencies = [
        Depends(dependency),
        Depends(Dependency),
        Security(secret, scopes=["one"]),
        Security(secret, scopes=["two"]),
        Depends(session),
        Depends(session_sync),
        Depends(again, use_cache=False),
        Depends(overridden),
    ]

    @router.get("/{name}", dependencies=dependencies)
    @inject
    def endpoint(tasks: Tasks, name: str) -> int:
        """Tells how many objects there have been."""
        add(tasks, name)
        return len({id(tasks) for tasks in seen})

    app = FastAPI(dependencies=[Depends(of_app)])
    app.include_router(router)
    app.dependency_overrides[overridden] = override
    return app


SHARED = [
    *["app", "router", "sub-dependency", "dependency", "class"],
    *["security one", "security two", "async yield", "yield"],
    *["not cached", "not cached", "override", "endpoint"],
]


@both_kinds
@each_way
@pytest.mark.parametrize("mount", ["", "/mounted"], ids=["app", "mounted"])
def test_all_that_handles_a_request_shares_one_object(
    kind: Any, wrap: Wrap, mount: str
) -> None:
    app = sharing(kind)
    if mount:
        outer = FastAPI()
        outer.mount(mount, app)
        app = outer
    with TestClient(wrap(app)) as client:
        for _ in range(2):
            assert client.get(f"{mount}/prefix/endpoint").json() == 1
    assert log == SHARED * 2


@each_way
def test_it_is_found_again_where_fastapi_asks_once_more(wrap: Wrap) -> None:
    # As old FastAPIs do for dependencies with different security scopes.
    app, inject = FastAPI(), postlude.fastapi._inject

    def add_to_fastapis(tasks: fastapi.BackgroundTasks) -> None:
        tasks.add_task(write, "FastAPI's own")

    @app.get("/", dependencies=[Depends(add_to_fastapis)])
    async def endpoint(
        tasks: postlude.fastapi.BackgroundTasks,
        again: Annotated[BackgroundTasks, Depends(inject, use_cache=False)],
    ) -> bool:
        tasks.add_task(write, "ours")
        return again is tasks

    with TestClient(wrap(app)) as client:
        assert client.get("/").json() is True
    assert log == ["FastAPI's own", "ours"]


def test_openapi_tells_nothing_of_it() -> None:
    assert sharing(OURS).openapi() == sharing(OWN).openapi()


def streaming(kind: Any) -> FastAPI:
    """Makes an app that adds tasks while it streams."""
    app, inject = FastAPI(), injecting({Tasks: kind})

    def lines(tasks: Tasks) -> Iterator[str]:
        tasks.add_task(write, "first")
        yield "first"
        tasks.add_task(write, "second")
        yield "second"

    @app.get("/response")
    @inject
    async def respond(tasks: Tasks) -> fastapi.Response:
        return fastapi.responses.StreamingResponse(lines(tasks))

    @app.get("/text", response_class=postlude.fastapi.PlainTextResponse)
    @inject
    async def text(tasks: Tasks) -> str:
        return "".join(lines(tasks))

    if not GENERATORS:
        return app

    @app.get("/sync", response_class=fastapi.responses.StreamingResponse)
    @app.get("/jsonl")
    @inject
    def stream_sync(tasks: Tasks) -> Iterator[str]:
        yield from lines(tasks)

    @app.get("/async", response_class=fastapi.responses.StreamingResponse)
    @app.get("/jsonl-async")
    @inject
    async def stream(tasks: Tasks) -> AsyncIterator[str]:
        for line in lines(tasks):
            yield line

    sse = importlib.import_module("fastapi.sse")
    app.get("/sse", response_class=sse.EventSourceResponse)(stream)
    return app


@both_kinds
@each_way
@pytest.mark.parametrize(
    "path", ["/response", "/text", "/sync", "/async", "/jsonl", "/jsonl-async", "/sse"]
)
def test_tasks_added_while_the_body_is_streamed_run(
    kind: Any, wrap: Wrap, path: str
) -> None:
    if path[1:] not in ("response", "text") and not GENERATORS:
        pytest.skip("this FastAPI knows no generator endpoints")
    with TestClient(wrap(streaming(kind))) as client:
        assert client.get(path).text.count("first") == 1
    assert log == ["first", "second"]


@each_way
def test_behind_a_middleware_of_starlettes_tasks_run_once(wrap: Wrap) -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: postlude.fastapi.BackgroundTasks) -> None:
        tasks.add_task(write, "task")

    async def dispatch(
        request: fastapi.Request, call_next: RequestResponseEndpoint
    ) -> fastapi.Response:
        return await call_next(request)

    with TestClient(wrap(BaseHTTPMiddleware(app, dispatch))) as client:
        client.get("/")
    assert log == ["task"]


# --- what it is ----------------------------------------------------------------------


@each_way
def test_it_is_our_group_and_returns_handles(wrap: Wrap) -> None:
    app, handles = FastAPI(), list[BackgroundTask]()

    @app.get("/")
    async def endpoint(tasks: postlude.fastapi.BackgroundTasks) -> None:
        def add_another() -> None:
            handles.append(tasks.add_task(write, "another"))

        assert isinstance(tasks, BackgroundTasks)
        handles.append(tasks.add_task(add_another))
        assert tasks.tasks == handles

    with TestClient(wrap(app)) as client:
        assert client.get("/").status_code == 200
    assert log == ["another"]
    assert [handle.state for handle in handles] == [TaskState.SUCCEEDED] * 2


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
def test_what_a_later_task_adds_to_it_runs_with_the_request(*, detach: bool) -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(
        tasks: postlude.fastapi.BackgroundTasks,
    ) -> postlude.fastapi.JSONResponse:
        def add_to_it() -> None:
            tasks.add_task(write, "by the response's")

        tasks.add_task(write, "injected")
        return postlude.fastapi.JSONResponse({}, background=BackgroundTask(add_to_it))

    with TestClient(BackgroundTasksMiddleware(app, detach=detach)) as client:
        client.get("/")
    assert log == ["injected", "by the response's"]


def test_the_name_can_be_called_as_fastapis_class_can() -> None:
    # pyright does not like it, so the documentation does not tell.
    tasks = OURS()
    assert isinstance(tasks, BackgroundTasks)


def test_each_response_that_fastapi_takes_from_starlette_is_there() -> None:
    theirs = {
        name
        for name, value in vars(fastapi.responses).items()
        if getattr(starlette.responses, name, None) is value and name[0].isupper()
    }
    tasks = {"BackgroundTask", "BackgroundTasks"}
    assert theirs - {"Any"} == {*postlude.fastapi.__all__} - tasks
    for name in theirs - {"Any"}:
        assert getattr(postlude.fastapi, name) is getattr(responses, name)


@both_kinds
@each_way
def test_fastapis_telemetry_sees_the_tasks(kind: Any, wrap: Wrap) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    if "telemetry" not in inspect.signature(FastAPI).parameters:
        pytest.skip("this FastAPI has no telemetry")
    spans: list[tuple[str, str]] = []

    class Processor(sdk.SpanProcessor):  # type: ignore[misc, name-defined]
        def on_end(self, span: Any) -> None:
            spans.append((span.name, span.attributes.get("code.function.name")))

    provider = sdk.TracerProvider()
    provider.add_span_processor(Processor())
    app = FastAPI(telemetry={"tracer_provider": provider})

    @app.get("/")
    @injecting({Tasks: kind})
    async def endpoint(tasks: Tasks) -> None:
        tasks.add_task(write, "task")

    with TestClient(wrap(app)) as client:
        assert client.get("/").status_code == 200
    assert log == ["task"]
    name = "served_fastapi.write" if kind is OWN else "postlude.fastapi._Injected"
    assert [name] == [func for span, func in spans if span.endswith("background_task")]


# --- what is dropped -----------------------------------------------------------------

DROPPED = (
    "background tasks dropped by FastAPI, as the request failed, was a WebSocket, or "
    "had a response with a background of its own: 'served_fastapi.write', "
    "'served_fastapi.clean_up'"
)
TOO_LATE = (
    "background task 'served_fastapi.write' is not run, as FastAPI has called those of "
    "its request already: wrap the application in BackgroundTasksMiddleware"
)


def test_what_is_dropped_is_named_once_nothing_holds_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, handles = FastAPI(), list[BackgroundTask]()

    @app.get("/")
    async def endpoint(tasks: postlude.fastapi.BackgroundTasks) -> None:
        group = BackgroundTasks()
        handles.append(group.add_task(write, "never"))
        tasks.tasks.append(group)
        handles.append(tasks.add_task(clean_up))
        raise LookupError("with a traceback that holds the group")

    with pytest.raises(LookupError) as raised:
        TestClient(app).get("/")
    assert warnings(caplog) == []
    assert [handle.state for handle in handles] == [TaskState.PENDING] * 2
    del raised
    assert warnings(caplog) == [DROPPED]
    assert [handle.state for handle in handles] == [TaskState.CANCELLED] * 2
    assert log == []


def test_a_request_without_tasks_drops_none(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: postlude.fastapi.BackgroundTasks) -> None:
        raise HTTPException(404)

    for wrap in WRAPS.values():
        with TestClient(wrap(app)) as client:
            assert client.get("/").status_code == 404
    caplog.set_level(logging.INFO, "postlude")
    assert warnings(caplog) == []


def test_what_comes_too_late_for_fastapi_is_named_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, late = FastAPI(), list[BackgroundTask]()

    async def add_late(
        tasks: postlude.fastapi.BackgroundTasks,
    ) -> AsyncIterator[None]:
        yield
        late.append(tasks.add_task(write, "late"))

    app.get("/", dependencies=[Depends(add_late)])(lambda: None)
    TestClient(app).get("/")
    assert [task.state for task in late] == [TaskState.CANCELLED]
    assert warnings(caplog) == [TOO_LATE]


AT_EXIT = """
import logging
import postlude
from postlude.fastapi import _Injected

logging.basicConfig()
dropped, kept = _Injected(), _Injected()
dropped.add_task(print, "dropped")
kept.add_task(print, "kept")
postlude.kept = kept
del dropped
"""


def test_python_exits_without_a_word_of_what_is_held_until_then() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=True
    )
    [line] = ended.stderr.splitlines()
    assert line.startswith("WARNING:postlude:background tasks dropped by FastAPI")


# --- the extra -----------------------------------------------------------------------


def test_postlude_itself_needs_no_fastapi() -> None:
    script = "import sys, postlude; print({'fastapi', 'pydantic'} & {*sys.modules})"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "set()\n"


def test_the_lowest_fastapi_that_is_allowed_is_the_lowest_that_is_tested() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    pyproject = tomllib.loads(path.read_text(encoding="utf-8"))
    [extra] = pyproject["project"]["optional-dependencies"]["fastapi"]
    assert extra in pyproject["dependency-groups"]["tests"]
