"""Django in the middleware: add_task() in a sync view and in an async one."""

import os
import tempfile
import time
from pathlib import Path

import anyio
import uvicorn
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

from postlude import BackgroundTasksMiddleware, add_task

LOG = Path(tempfile.gettempdir(), "django.log")


def note(line: str) -> None:
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


async def send_receipt(number: int) -> None:
    await anyio.sleep(0.2)
    note(f"sent the receipt of order {number}")


def make_thumbnail(name: str) -> None:
    time.sleep(0.2)
    note(f"made the thumbnail of {name}")


def photo(request: HttpRequest, name: str) -> HttpResponse:
    add_task(make_thumbnail, name)
    return HttpResponse(b"Thank you!\n", status=202)


async def order(request: HttpRequest, number: int) -> HttpResponse:
    add_task(note, f"packed order {number}")
    add_task(send_receipt, number)
    return HttpResponse(b"Thank you!\n", status=202)


urlpatterns = [path("photos/<name>", photo), path("orders/<int:number>", order)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1"])
app = BackgroundTasksMiddleware(get_asgi_application(), detach=True)

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    url = f"http://127.0.0.1:{port}"
    print(f"curl -X POST {url}/orders/7; sleep 1; tail {LOG}")
    print(f"curl -X POST {url}/photos/cat; sleep 1; tail {LOG}")
    uvicorn.run(app, port=port)
