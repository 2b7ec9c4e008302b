"""The journal of a run: one JSON record a line, written before anybody acts on it.

A record is stored under a key that says what was asked (`bayes/0/17`); asking again returns it instead of computing
it, so a run that was killed and started again asks the same questions and goes on where it stopped. A line cut short
by a kill is dropped. The first record is the run's fingerprint; a journal of another run is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arma_mergekit.errors import RunError

__all__ = ["Journal"]

Record = dict[str, Any]


class Journal:
    """Append-only records by key, in ``path``. ``fingerprint``: flat facts that make a run the same run.

    One process at a time: the file is locked until the journal is closed or the process ends.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise RunError(f"Cannot write {path}: {error.strerror}. Give another --out.") from error
        try:
            self._lock()
            self._begin(fingerprint)
        except RunError:
            self.close()
            raise

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        records = self._read()
        self._records: dict[str, Record] = {record["key"]: record for record in records}
        if len(records) > 1:
            self._check(fingerprint)
        else:  # nothing was scored yet, so nothing can be mixed up
            self._file.truncate(0)
            self.append("fingerprint", dict(fingerprint))

    def __len__(self) -> int:
        return len(self._records) - 1

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def close(self) -> None:
        """Give the run directory back."""
        self._file.close()

    def once(self, key: str, compute: Callable[[], Record]) -> Record:
        """The record of this key: from the journal, or computed, written and synced now."""
        if key not in self._records:
            self.append(key, compute())
        return self._records[key]

    def records(self) -> list[Record]:
        """All records in the order they were written, without the fingerprint."""
        return [record for key, record in self._records.items() if key != "fingerprint"]

    def under(self, prefix: str) -> dict[int, Record]:
        """Records of `prefix/0`, `prefix/1`, ... by number, in the order they were written."""
        pairs = ((key.rpartition("/"), record) for key, record in self._records.items())
        return {int(end): record for (start, _, end), record in pairs if start == prefix and end.isdigit()}

    def append(self, key: str, record: Record) -> None:
        """Write one record and wait until it is on disk."""
        # what the caller sees is what a resumed run will read: floats survive JSON, tuples become lists
        text = json.dumps({"key": key} | record, allow_nan=False)
        try:
            self._file.write(f"{text}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"Cannot write {self.path}: {error.strerror}. Nothing that was scored is lost; make room and start "
                "the same command again."
            ) from error
        self._records[key] = json.loads(text)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{self.path.parent} is in use by another run; wait for it, or give another --out."
            ) from error

    def _read(self) -> list[Record]:
        """Whole records; a torn last line is cut off the file."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self._file.truncate(len(whole))
        try:
            records = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise self.damaged(str(error)) from error
        if not all(isinstance(r, dict) and isinstance(r.get("key"), str) for r in records):
            raise self.damaged("a line is no record")
        if records and records[0]["key"] != "fingerprint":
            raise self.damaged("its first line is missing")
        return records

    def damaged(self, why: str) -> RunError:
        """The error for a journal that cannot be used."""
        return RunError(f"Journal {self.path} is damaged ({why}). Give another --out, or delete it.")

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        before = {k: v for k, v in self._records["fingerprint"].items() if k != "key"}
        now = json.loads(json.dumps(dict(fingerprint)))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            told = [f"{k} was {said(before.get(k))} and is {said(now.get(k))}" for k in changed[:3]]
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise RunError(
                f"{self.path.parent} holds another run: {'; '.join(told)}{more}. Give another --out, or restore what "
                "changed."
            )


def said(value: Any) -> str:
    """A fact of a fingerprint in a sentence."""
    return "absent" if value is None else reprlib.repr(value)
