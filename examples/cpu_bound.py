"""CPU-bound work in a process of its own, while the server answers at once."""

import os
import tempfile
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTask, BackgroundTasksMiddleware, add_task, task

RESULTS = Path(tempfile.gettempdir())
jobs: dict[int, BackgroundTask] = {}


@task(process=True, timeout=60)
def count_primes(limit: int, result: Path) -> None:
    """Writes its result to a file, as nothing that it returns comes back."""
    count = sum(
        all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        for number in range(2, limit)
    )
    result.write_text(f"{count} (by process {os.getpid()})\n", encoding="utf-8")


def path_of(limit: int) -> Path:
    return RESULTS / f"primes-below-{limit}"


async def start(request: Request) -> PlainTextResponse:
    limit = request.path_params["limit"]
    # Function and arguments are pickled here, and what cannot be is refused.
    jobs[limit] = add_task(count_primes, limit, path_of(limit))
    return PlainTextResponse(f"See /primes/{limit}\n", status_code=202)


async def result(request: Request) -> JSONResponse:
    limit = request.path_params["limit"]
    state = jobs[limit].state if limit in jobs else None
    text = path_of(limit).read_text(encoding="utf-8") if state == "succeeded" else None
    return JSONResponse({"state": state, "primes": text, "server": os.getpid()})


routes = [
    Route("/primes/{limit:int}", start, methods=["POST"]),
    Route("/primes/{limit:int}", result),
]
app = BackgroundTasksMiddleware(Starlette(routes=routes), detach=True)

# A process that calls a function of this program imports it, and is not to serve, too.
if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/primes/300000; curl {url}/primes/300000")
    uvicorn.run(app, port=port)
