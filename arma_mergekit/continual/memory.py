"""The replay memory: a few examples of every past task, kept word for word. It knows records; no models or tokens.

Of each task ``share`` of the records stay (at least one), as equally many of each label as there are, the rest from
the labels that have more; records without a label are one group. Within a group it is a reservoir: each record draws a
number from (seed, task, its text) and the lowest stay (bottom-k sampling), which is uniform, needs one pass and does
not depend on the order of the file. The n-th batch is a function of (seed, n), so a resumed run needs to know n only.

**Privacy.** The memory is a verbatim copy of training data. It is as confidential as they are, outlives them where they
are deleted, and does not belong beside weights that are given away. The file is made readable for its owner only;
``share: 0`` keeps nothing.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from arma_mergekit.errors import DataError, RunError
from arma_mergekit.whole import write_whole

__all__ = ["SHARE", "Memory", "balanced"]

Record: TypeAlias = Mapping[str, Any]

SHARE = 0.02  # of each task's records, as in arXiv:2509.17348, section 4


class Memory:
    """Records of past tasks. ``label``: the field to balance by, where a record has it."""

    def __init__(self, share: float = SHARE, seed: int = 0, label: str = "label") -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"0 <= share <= 1 must hold, but got share={share}.")
        self.share, self.seed, self.label = share, seed, label
        self.tasks: dict[str, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.tasks.values()))

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of them, task after task."""
        return list(chain.from_iterable(self.tasks.values()))

    def add(self, task: str, records: Sequence[Record]) -> None:
        """Keep a share of a task that is over; a task is added once."""
        if task in self.tasks:
            raise ValueError(f"Task {task!r} is in the memory already.")
        size = max(1, round(self.share * len(records))) if self.share and records else 0
        if size:
            self.tasks[task] = balanced(records, size, f"{self.seed}/{task}", self.label)

    def batch(self, draw: int, rows: int) -> list[dict[str, Any]]:
        """``rows`` different records (all, if there are fewer), uniformly; the same for the same ``draw``."""
        records = self.records
        return random.Random(f"{self.seed}/{draw}").sample(records, min(rows, len(records)))

    def save(self, path: Path) -> None:
        """Write JSON lines {"task", "record"}, whole or not at all, readable for the owner only."""
        lines = [json.dumps({"task": t, "record": r}) + "\n" for t, kept in self.tasks.items() for r in kept]
        try:
            write_whole({path: "".join(lines)}, mode=0o600)
        except OSError as error:
            raise RunError(
                f"Cannot write {path}: {error.strerror}. Make room, or give another --out."
            ) from error

    def load(self, path: Path) -> None:
        """Take the tasks that `save` wrote; DataError if the file is damaged."""
        tasks: dict[str, list[dict[str, Any]]] = {}
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                tasks.setdefault(found["task"], []).append(dict(found["record"]))
        except OSError as error:
            raise DataError(f"Cannot read the memory {path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"The memory {path} is damaged ({error}); give another --out.") from error
        self.tasks = tasks


def balanced(records: Iterable[Record], size: int, seed: str, label: str = "label") -> list[dict[str, Any]]:
    """``size`` of the records (all, if there are fewer), labels as equal in number as they can be; one pass.

    Each label's own are drawn uniformly; the result depends on the set of records and the seed only.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        text = json.dumps(dict(record), sort_keys=True)
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        key, group = -int.from_bytes(digest[:8], "big"), groups.setdefault(json.dumps(record.get(label)), [])
        (heapq.heappush if len(group) < size else heapq.heappushpop)(group, (key, text))
    # lowest first within a label; then one of each label in turn, labels in the order of their first
    ranked = sorted(
        (sorted(group, reverse=True) for group in groups.values()), key=lambda g: g[0], reverse=True
    )
    turns = chain.from_iterable(zip_longest(*ranked))
    return [json.loads(kept[1]) for kept in turns if kept is not None][:size]
