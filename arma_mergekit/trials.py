"""The journal of a run: one JSON record a line, written before anybody acts on it.

A record is stored under a key that says what was asked (`bayes/0/17`); asking again returns it instead of computing
it, so a run that was killed and started again asks the same questions and goes on where it stopped. A line cut short
by a kill is dropped. The first record is the run's fingerprint; a journal of another run is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arma_mergekit.errors import RunError

__all__ = ["Journal"]

Record = dict[str, Any]


class Journal:
    """Append-only records by key, in ``path``. ``fingerprint``: flat facts that make a run the same run."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        records = self._read()
        if not records:
            self._records: dict[str, Record] = {}
            self.append("fingerprint", dict(fingerprint))
            return
        self._records = {record["key"]: record for record in records}
        self._check(fingerprint)

    def __len__(self) -> int:
        return len(self._records) - 1

    def once(self, key: str, compute: Callable[[], Record]) -> Record:
        """The record of this key: from the journal, or computed, written and synced now."""
        if key not in self._records:
            self.append(key, compute())
        return self._records[key]

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def records(self) -> list[Record]:
        """All records in the order they were written, without the fingerprint."""
        return [record for key, record in self._records.items() if key != "fingerprint"]

    def append(self, key: str, record: Record) -> None:
        """Write one record and wait until it is on disk."""
        whole = {"key": key} | record
        # what the caller sees is what a resumed run will read: floats survive JSON, tuples become lists
        text = json.dumps(whole, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[key] = json.loads(text)

    def _read(self) -> list[Record]:
        """Whole records; a torn last line is cut off the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise RunError(
                f"Journal {self.path} is damaged ({error}). Give another --out, or delete it."
            ) from error

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        before = {k: v for k, v in self._records["fingerprint"].items() if k != "key"}
        now = json.loads(json.dumps(dict(fingerprint)))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            what = "; ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed)
            raise RunError(
                f"{self.path.parent} holds another run: {what}. Give another --out, or restore the recipe."
            )
