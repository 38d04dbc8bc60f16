"""Background tasks for Starlette and any ASGI framework, run well."""

from ._options import task
from ._tasks import BackgroundTask, BackgroundTasks, TaskState

__all__ = ["BackgroundTask", "BackgroundTasks", "TaskState", "task"]
