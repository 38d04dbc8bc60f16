"""A health endpoint that tells which tasks are running, and which are waiting."""

import os
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTasksMiddleware, add_task


def make_thumbnail(photo: str, width: int) -> None:
    time.sleep(0.5)  # in place of an image library


async def upload(request: Request) -> PlainTextResponse:
    for width in 1024, 256, 64:
        add_task(make_thumbnail, request.path_params["photo"], width)
    return PlainTextResponse("Thank you!\n", status_code=202)


async def healthz(request: Request) -> JSONResponse:
    # Where Starlette makes the middleware, as app.add_middleware() lets it do, that is
    # BackgroundTasksMiddleware.current() instead of app.
    tasks = [task._asdict() for task in app.tasks()]
    return JSONResponse(app.status()._asdict() | {"tasks": tasks})


routes = [
    Route("/photos/{photo}", upload, methods=["POST"]),
    Route("/healthz", healthz),
]
app = BackgroundTasksMiddleware(Starlette(routes=routes), max_running=100)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/photos/cat; curl {url}/healthz")
    uvicorn.run(app, port=port)
