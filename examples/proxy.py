"""Pass an upstream response on as it streams in, and close it whatever happens."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from postlude import task
from postlude.responses import Response, StreamingResponse

PORT = int(os.environ.get("PORT", "8000"))
UPSTREAM = os.environ.get("UPSTREAM", f"http://127.0.0.1:{PORT}/upstream")


@task(always=True)
async def close(reply: httpx2.Response) -> None:
    await reply.aclose()


async def proxy(request: Request) -> Response:
    client: httpx2.AsyncClient = request.state.client
    try:
        reply = await client.send(client.build_request("GET", UPSTREAM), stream=True)
    except httpx2.RequestError:
        return Response(status_code=502)
    headers = {k: v for k, v in reply.headers.items() if k == "content-type"}
    response = StreamingResponse(reply.aiter_bytes(), reply.status_code, headers)
    response.add_task(close, reply)
    return response


async def count() -> AsyncGenerator[str]:
    for number in range(5):
        yield f"{number}\n"
        await anyio.sleep(0.1)


async def upstream(request: Request) -> Response:
    return StreamingResponse(count(), media_type="text/plain")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, httpx2.AsyncClient]]:
    async with httpx2.AsyncClient() as client:
        yield {"client": client}


routes = [Route("/", proxy), Route("/upstream", upstream)]
app = Starlette(routes=routes, lifespan=lifespan)

if __name__ == "__main__":
    print(f"curl -N http://127.0.0.1:{PORT}/")
    uvicorn.run(app, port=PORT)
