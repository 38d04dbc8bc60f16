"""Time limits, and limits of how many tasks of a function run at once."""

import os
import time

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTasksMiddleware, add_task, task

calling = {"now": 0, "most": 0}


@task(timeout=0.5)
async def call_courier(city: str) -> None:
    """Fails with `TimeoutError` if nobody answers in time."""
    await anyio.sleep(0 if city != "Atlantis" else 60)
    print(f"a courier goes to {city}", flush=True)


@task(limiter=2)
async def call_api(order: int) -> None:
    """Is never called more than twice at once, however many orders there are."""
    calling["now"] += 1
    calling["most"] = max(calling.values())
    await anyio.sleep(0.1)
    calling["now"] -= 1


@task(timeout=0.5, limiter=1)
def print_label(city: str) -> None:
    """Goes on in its thread after the time limit, and keeps its place until it ends."""
    time.sleep(0 if city != "Atlantis" else 2)
    print(f"printed the label for {city}", flush=True)


async def order(request: Request) -> PlainTextResponse:
    add_task(call_courier, request.path_params["city"])
    add_task(print_label, request.path_params["city"])
    add_task(call_api, 7)
    return PlainTextResponse("Thank you!\n", status_code=202)


async def status(request: Request) -> JSONResponse:
    return JSONResponse(calling | app.status()._asdict())


routes = [Route("/orders/{city}", order, methods=["POST"]), Route("/status", status)]
app = BackgroundTasksMiddleware(Starlette(routes=routes), detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/orders/Atlantis; curl {url}/status")
    uvicorn.run(app, port=port)
