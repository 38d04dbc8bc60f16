"""Background tasks for ASGI apps that all run, and tell you when they fail."""

from ._options import task
from ._tasks import BackgroundTask, BackgroundTasks, TaskState
from .middleware import BackgroundTasksMiddleware, add_task

__all__ = [
    "BackgroundTask",
    "BackgroundTasks",
    "BackgroundTasksMiddleware",
    "TaskState",
    "add_task",
    "task",
]
