"""Tasks that are tried again: by stamina and by tenacity, async and sync."""

import os
from collections import Counter

import stamina
import tenacity
import uvicorn
from fastapi import FastAPI

from postlude import BackgroundTasksMiddleware, add_task

again = stamina.retry(on=ConnectionError, attempts=5, wait_jitter=0.1)
# Without `stop` it never stops; without `reraise` the failure is a RetryError.
at_once = tenacity.retry(stop=tenacity.stop_after_attempt(5), reraise=True)
tries: Counter[str] = Counter()


def say(line: str) -> None:
    tries[line] += 1
    if tries[line] % 3:
        raise ConnectionError("nobody answers")
    print(f"{line} at try {tries[line]}", flush=True)


@again
async def send_receipt(number: int) -> None:
    say(f"sent the receipt of order {number}")


@again
def pack(number: int) -> None:
    say(f"packed order {number}")


@at_once
async def book_courier(number: int) -> None:
    say(f"booked the courier of order {number}")


@at_once
def print_label(number: int) -> None:
    say(f"printed the label of order {number}")


app = FastAPI()
app.add_middleware(BackgroundTasksMiddleware, detach=True)


@app.post("/orders/{number}", status_code=202)
def order(number: int) -> None:
    for step in send_receipt, pack, book_courier, print_label:
        add_task(step, number)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    print(f"curl -X POST http://127.0.0.1:{port}/orders/7")
    uvicorn.run(app, port=port)
