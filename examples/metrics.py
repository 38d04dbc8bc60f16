"""Metrics of tasks for Prometheus, from one process or from several."""

import os
import random
import time

import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry, exposition
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from postlude import BackgroundTasksMiddleware, add_task, task
from postlude.prometheus import Metrics


@task(name="send_receipt")
def send_receipt(number: int) -> None:
    time.sleep(0.01 * random.expovariate(1))  # in place of a mail server


@task(name="book_courier")
async def book_courier(number: int) -> None:
    if number % 3 == 0:
        raise LookupError(f"no courier for order {number}")


async def order(request: Request) -> PlainTextResponse:
    number = request.path_params["number"]
    add_task(send_receipt, number)
    add_task(book_courier, number)
    return PlainTextResponse("Thank you!\n", status_code=202)


def metrics(request: Request) -> Response:
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    text = exposition.generate_latest(registry)
    return Response(text, media_type=exposition.CONTENT_TYPE_LATEST)


routes = [
    Route("/orders/{number:int}", order, methods=["POST"]),
    Route("/metrics", metrics),
]
app = BackgroundTasksMiddleware(Starlette(routes=routes), observers=[Metrics()])

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/orders/7; curl {url}/metrics")
    uvicorn.run(app, port=port)
