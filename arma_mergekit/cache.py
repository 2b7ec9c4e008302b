"""Scores that were computed before: one SQLite file, shared by runs, that cannot return another candidate's answer.

A score is stored under the digest of everything it depends on:

    weights      digests of the base's and the fine-tuned model's files, the alphas, the dtype
    task         its class, options and items as token rows (so: data and tokenizer), which items were scored
    arithmetic   versions of torch, transformers and this package, threads, device, batch size

Alphas and files stand for the weights themselves: the kernel that joins them is deterministic (kernel.py). A task that
does not say what it depends on (`Task.content` is None) is never stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.digest import cache_directory
from arma_mergekit.errors import RunError
from arma_mergekit.evals.base import Measured, Task

if TYPE_CHECKING:
    from arma_mergekit.worker import Job

__all__ = ["EvalCache", "default_path", "hashed"]

Array = npt.NDArray[np.float64]
Answer = tuple[Measured, Array | None]

TABLE = "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, record TEXT NOT NULL)"


def default_path() -> Path:
    """The user's."""
    return cache_directory() / "evals.sqlite"


class EvalCache:
    """Answers by what they depend on. ``path``: the SQLite file; RunError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: Mapping[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._base.execute(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"Cannot use the evaluation cache {path} ({error}); give --cache none, or delete it."
            ) from error

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add to what all answers of this process depend on: weights and arithmetic, as JSON."""
        self.facts = {**self.facts, **facts}

    def once(self, task: Task, job: Job, ids: Sequence[str], compute: Callable[[], Answer]) -> Answer:
        """The answer for these items of a task, stored or computed now."""
        content = task.content
        if content is None:
            return compute()
        key = hashed([self.facts, content, list(job.alphas), list(ids), job.gradient])
        stored = self._get(key)
        if stored is not None:
            return stored
        found = compute()
        with contextlib.suppress(
            sqlite3.Error
        ):  # a full disk must not stop the run; the journal has the score
            self._base.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, pack(*found)))
        return found

    def _get(self, key: str) -> Answer | None:
        row = self._base.execute("SELECT record FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None else unpack(row[0])

    def close(self) -> None:
        """Close the file."""
        self._base.close()


def hashed(parts: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pack(measured: Measured, slopes: Array | None) -> str:
    """An answer as JSON."""
    return json.dumps({**measured.to_json(), "slopes": None if slopes is None else slopes.tolist()})


def unpack(text: str) -> Answer:
    """The other way."""
    found = json.loads(text)
    return Measured.from_json(found), None if found["slopes"] is None else np.array(found["slopes"])
