"""Take a file, answer 202 Accepted at once, count its lines after the response."""

import os
import tempfile
from pathlib import Path
from uuid import uuid4

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route

from postlude import BackgroundTask, task
from postlude.responses import JSONResponse, Response

jobs: dict[str, BackgroundTask] = {}
lines: dict[str, int] = {}
remove = task(always=True)(os.remove)


def count_lines(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        lines[path.name] = sum(1 for _ in file)


async def upload(request: Request) -> Response:
    path = Path(tempfile.gettempdir(), f"upload-{uuid4()}")
    file = await anyio.open_file(path, "xb")
    try:
        async with file:
            async for chunk in request.stream():
                await file.write(chunk)
    except BaseException as exc:
        remove(path)
        if isinstance(exc, ClientDisconnect):
            return Response(status_code=400)
        raise
    response = JSONResponse({"result": f"/results/{path.name}"}, status_code=202)
    jobs[path.name] = response.add_task(count_lines, path)
    response.add_task(remove, path)
    return response


async def result(request: Request) -> Response:
    name = request.path_params["name"]
    if job := jobs.get(name):
        return JSONResponse({"state": job.state, "lines": lines.get(name)})
    return Response(status_code=404)


routes = [Route("/uploads", upload, methods=["POST"]), Route("/results/{name}", result)]
app = Starlette(routes=routes)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"curl --data-binary @{__file__} http://127.0.0.1:{port}/uploads")
    print(f"curl http://127.0.0.1:{port}/results/NAME")
    uvicorn.run(app, port=port)
