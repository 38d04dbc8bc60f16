"""A span for each task, linked to the one it was added in, printed to the console."""

import os
import time

import uvicorn
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from postlude import BackgroundTasksMiddleware, add_task, task
from postlude.opentelemetry import Tracing

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("shop")


@task(name="send_receipt")
def send_receipt(number: int) -> None:
    with tracer.start_as_current_span("smtp"):
        time.sleep(0.1)  # in place of a mail server
    add_task(archive, number)


@task(name="archive")
async def archive(number: int) -> None:
    if number % 7 == 0:
        raise OSError("the archive is full")


async def order(request: Request) -> PlainTextResponse:
    # An instrumentation for Starlette makes such a span of each request.
    with tracer.start_as_current_span("POST /orders"):
        add_task(send_receipt, request.path_params["number"])
        return PlainTextResponse("Thank you!\n", status_code=202)


routes = [Route("/orders/{number:int}", order, methods=["POST"])]
app = BackgroundTasksMiddleware(Starlette(routes=routes), observers=[Tracing()])

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"curl -X POST http://127.0.0.1:{port}/orders/7")
    uvicorn.run(app, port=port)
