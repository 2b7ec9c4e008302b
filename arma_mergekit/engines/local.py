"""The engine in this process: one model, one job at a time, in the order they came."""

from __future__ import annotations

from collections import deque

from arma_mergekit.worker import Description, Done, Job, Worker

__all__ = ["LocalEngine"]


class LocalEngine:
    """Scores a job when its result is asked for."""

    workers = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._queue: deque[tuple[str, Job]] = deque()

    def describe(self) -> Description:
        """Facts about the one worker."""
        return self.worker.describe()

    def submit(self, tag: str, job: Job) -> None:
        """Queue a job."""
        self._queue.append((tag, job))

    def wait(self) -> tuple[str, Done]:
        """Score the oldest job."""
        tag, job = self._queue.popleft()
        return tag, self.worker.do(job)

    def close(self) -> None:
        """Nothing to give back."""
