"""Engines: where candidates are scored. A run hands out jobs and takes what comes back, in any order.

local   in this process, one after the other
ray     on a Ray cluster, one live model per actor
"""

from __future__ import annotations

from typing import Protocol

from arma_mergekit.worker import Description, Done, Job

__all__ = ["Engine"]


class Engine(Protocol):
    """Scores jobs; ``workers`` of them at the same time."""

    workers: int

    def describe(self) -> Description:
        """Facts about models and tasks, the same for every worker."""
        ...

    def submit(self, tag: str, job: Job) -> None:
        """Hand out a job under a name of its own."""
        ...

    def wait(self) -> tuple[str, Done]:
        """The next finished job and its name."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
