"""What RQ's worker is told: what to import before it forks, and where its jobs are."""

import os
from typing import Any

from rq.job import Job

from engines import declared

REDIS_URL = os.environ["POSTLUDE_BROKER"]
QUEUES = [os.environ["POSTLUDE_QUEUE"]]


class RestoringJob(Job):
    def perform(self) -> Any:
        if headers := self.meta.get("postlude"):
            with declared.restore(headers):
                return super().perform()
        return super().perform()
