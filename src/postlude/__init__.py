"""Background tasks for Starlette that all run, and tell you when they fail."""

from ._options import task
from ._tasks import BackgroundTask, BackgroundTasks, TaskState

__all__ = ["BackgroundTask", "BackgroundTasks", "TaskState", "task"]
