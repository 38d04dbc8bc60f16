"""Whatever a route returns, tasks can follow it: postlude.responses has them all."""

import os
from collections import Counter

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from postlude import responses

visits: Counter[str] = Counter()


async def count(page: str) -> None:
    visits[page] += 1


async def home(request: Request) -> responses.HTMLResponse:
    response = responses.HTMLResponse("<h1>Welcome!</h1>\n")
    response.add_task(count, "home")
    return response


async def old_home(request: Request) -> responses.RedirectResponse:
    response = responses.RedirectResponse("/")
    response.add_task(count, "old home")
    return response


async def countdown(request: Request) -> responses.StreamingResponse:
    response = responses.StreamingResponse(f"{n}\n" for n in (3, 2, 1))
    response.add_task(count, "countdown")
    return response


async def source(request: Request) -> responses.FileResponse:
    response = responses.FileResponse(__file__)
    response.add_task(count, "source")
    return response


async def counted(request: Request) -> responses.JSONResponse:
    return responses.JSONResponse(visits)


paths = {"/": home, "/old": old_home, "/countdown": countdown, "/source": source}
routes = [Route(path, endpoint) for path, endpoint in paths.items()]
app = Starlette(routes=[*routes, Route("/visits", counted)])

if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    for path in [*paths, "/visits"]:
        print(f"curl http://127.0.0.1:{port}{path}")
    uvicorn.run(app, port=port)
