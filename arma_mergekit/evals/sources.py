"""Data files as records: JSONL, parquet, plain text. It knows no tokens, tasks or models.

    .parquet        one record a row (needs pyarrow)
    .txt            {"text"}: consecutive pieces of at least 1,000 characters, cut at the next blank line; without one
                    within 4,000 characters at the next line end, else at the last space
    anything else   JSONL, one object a line

A record's id decides which side of the split it is on: its own `id`, else the file's name and its number there.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from arma_mergekit.errors import DataError

__all__ = ["Record", "read_records"]

PIECE = re.compile(
    r"\S.{999,3999}?(?=\n[^\S\n]*\n)|\S.{999,3999}?(?=\n)|\S.{0,3999}(?=\s|\Z)|\S.{3999}", re.DOTALL
)
Found = tuple[str, int, Any]  # ("line", its number, its content)


@dataclass(frozen=True)
class Record:
    """One sample of a data file; ``where``: file and id, for errors."""

    id: str
    where: str
    fields: Mapping[str, Any]

    def text(self, key: str) -> str:
        """The text of a field; DataError if it is something else."""
        value = self.fields[key]
        if not isinstance(value, str):
            raise self.error(f"{key} must be text, but got {reprlib.repr(value)}")
        return value

    def error(self, problem: str) -> DataError:
        """The sentence that names file, id and problem."""
        return DataError(f"{self.where}: {problem}; correct or remove the record.")


def read_records(path: Path, needs: Sequence[str], limit: int | None = None) -> list[Record]:
    """The first ``limit`` records of a file, each with the fields it ``needs``; DataError names file and place."""
    read = READERS.get(path.suffix.lower(), _lines)
    try:
        records = [_record(path, found, needs) for found in islice(read(path), limit)]
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise DataError(f"Cannot read evaluation data {path}: {error}.") from error
    if not records:
        raise DataError(f"{path} has no records.")
    twice = [item for item, count in Counter(record.id for record in records).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: id {twice[0]!r} occurs more than once; ids decide which items are held back."
        )
    return records


def _lines(path: Path) -> Iterator[Found]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut strings at U+2028
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield "line", number, _parsed(path, number, line)


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text to a tokenizer
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); correct or remove the line.") from error
    return fields


def _rows(path: Path) -> Iterator[Found]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; pip install pyarrow, or convert the file to JSONL."
        ) from error
    with ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        yield from (("row", number, row) for number, row in enumerate(rows, 1))


def _pieces(path: Path) -> Iterator[Found]:
    text = path.read_text(encoding="utf-8-sig")
    for number, piece in enumerate(PIECE.finditer(text), 1):
        yield "piece", number, {"text": piece[0]}


READERS: Mapping[str, Callable[[Path], Iterator[Found]]] = {".parquet": _rows, ".txt": _pieces}


def _record(path: Path, found: Found, needs: Sequence[str]) -> Record:
    unit, number, fields = found
    where = f"{path}, {unit} {number}"
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: must be an object with {', '.join(needs) or 'fields'}, but got {reprlib.repr(fields)}."
        )
    missing = [key for key in needs if key not in fields]
    if missing:
        remedy = "give JSONL or parquet" if unit == "piece" else "add it"
        raise DataError(f"{where}: needs {', '.join(needs)}, but {', '.join(missing)} is missing; {remedy}.")
    given = fields.get("id")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise DataError(f"{where}: id must be text or a whole number, but got {reprlib.repr(given)}.")
    item = f"{path.stem}-{number}" if given is None else str(given)
    return Record(item, f"{path}, id {item}", fields)
