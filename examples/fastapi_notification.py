"""FastAPI's tutorial on background tasks, with one import changed."""

import os
import tempfile

import uvicorn
from fastapi import FastAPI

from postlude.fastapi import BackgroundTasks

app = FastAPI()


def write_notification(email: str, message: str = "") -> None:
    with open("log.txt", mode="w") as email_file:
        content = f"notification for {email}: {message}"
        email_file.write(content)


@app.post("/send-notification/{email}")
async def send_notification(
    email: str, background_tasks: BackgroundTasks
) -> dict[str, str]:
    background_tasks.add_task(write_notification, email, message="some notification")
    return {"message": "Notification sent in the background"}


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    os.chdir(tempfile.gettempdir())
    url = f"http://127.0.0.1:{port}/send-notification/ada@example.org"
    print(f"curl -X POST {url}; sleep 1; cat {os.getcwd()}/log.txt")
    uvicorn.run(app, port=port)
