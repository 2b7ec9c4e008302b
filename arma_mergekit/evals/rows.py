"""Tasks that score continuations: token rows, packed into batches, one forward pass each.

A *row* is a token sequence with the position where its scored part begins. Rows are padded on the right: a causal
model never looks there, so no mask is needed, and only positions that predict a scored token reach the head.
"""

from __future__ import annotations

import json
import math
import reprlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Measured, Model

__all__ = ["UNLIMITED", "Item", "Limits", "Record", "Row", "RowTask", "continuation", "read_jsonl"]

BATCH_TOKENS = 512  # a (512, 50k) block of bf16 logits is 50 MB


@dataclass(frozen=True)
class Limits:
    """What the model takes: ``positions`` of a sequence, rows of its embedding (``vocabulary``); None: not known."""

    positions: int | None = None
    vocabulary: int | None = None

    def check(self, tokens: Sequence[int], where: str) -> None:
        """DataError if the model cannot take these tokens."""
        if self.positions is not None and len(tokens) > self.positions:
            raise DataError(
                f"{where}: has {len(tokens)} tokens, but the model takes {self.positions}; shorten or remove it."
            )
        largest = max(tokens, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise DataError(
                f"{where}: token {largest} is none of the model's {self.vocabulary}, so the tokenizer does not belong "
                "to the model; put the model's own beside it."
            )


UNLIMITED = Limits()


@dataclass(frozen=True)
class Record:
    """A line of a data file; ``id``: its line number if it gives none, ``where``: file and id, for errors."""

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


@dataclass(frozen=True)
class Row:
    """``tokens`` of one sequence, of which those from ``start`` >= 1 on are scored."""

    tokens: tuple[int, ...]
    start: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The scored tokens."""
        return self.tokens[self.start :]


@dataclass(frozen=True)
class Item:
    """One sample: its rows are scored together (the choices of a question)."""

    id: str
    rows: tuple[Row, ...]
    answer: int = 0


class RowTask(ABC):
    """A task made of rows; a subclass says what the logits of an item's rows mean."""

    unit = ""
    differentiable = True
    watch = False

    def __init__(self, name: str, items: Sequence[Item], weight: float = 1.0) -> None:
        self.name, self.items, self.weight = name, tuple(items), weight
        self.ids = tuple(item.id for item in items)

    def prepare(self, base: Model) -> int:
        """Nothing to prepare."""
        return 0

    def item_weight(self, item: Item) -> float:
        """What the item counts for in the mean; its scored tokens."""
        return float(sum(len(row.targets) for row in item.rows))

    @abstractmethod
    def outcome(self, index: int, logits: Sequence[Any]) -> tuple[Any, float | None]:
        """Loss () of an item and its headline value (None: -loss), from the float32 logits (targets, V) of its rows."""

    def measure(
        self, model: Model, items: Sequence[int], backward: Callable[[Any], None] | None = None
    ) -> Measured:
        """Score these items; see `Task.measure`."""
        import torch

        weights = {i: self.item_weight(self.items[i]) for i in items}
        total, losses, values, tokens = sum(weights.values()), {}, {}, 0
        with torch.set_grad_enabled(backward is not None):
            for batch in self._batches(items):
                rows = [row for i in batch for row in self.items[i].rows]
                blocks = iter(row_logits(model, rows))
                batch_loss = []
                for i in batch:
                    item_loss, item_value = self.outcome(i, [next(blocks) for _ in self.items[i].rows])
                    losses[i] = float(item_loss.detach())
                    values[i] = -losses[i] if item_value is None else item_value
                    batch_loss.append(item_loss)
                tokens += len(rows) * max(len(row.tokens) for row in rows)
                if backward is not None:
                    backward(torch.stack(batch_loss).sum() / total)
        bad = [self.ids[i] for i in items if not math.isfinite(losses[i])]
        if bad:
            raise DataError(
                f"Task {self.name}: the loss of item {bad[0]} (and {len(bad) - 1} more) is not finite."
            )
        loss, value, weight = (np.array([c[i] for i in items], np.float64) for c in (losses, values, weights))
        return Measured(tuple(self.ids[i] for i in items), loss, value, weight, tokens)

    def _batches(self, items: Sequence[int]) -> Iterator[list[int]]:
        """Items of similar length together, at most BATCH_TOKENS with padding (one item may exceed it)."""
        length = {i: max(len(row.tokens) for row in self.items[i].rows) for i in items}
        batch: list[int] = []
        rows = longest = 0
        for i in sorted(items, key=lambda i: (length[i], i)):
            longest = max(longest, length[i])
            if batch and (rows + len(self.items[i].rows)) * longest > BATCH_TOKENS:
                yield batch
                batch, rows, longest = [], 0, length[i]
            batch.append(i)
            rows += len(self.items[i].rows)
        if batch:
            yield batch


def row_logits(model: Model, rows: Sequence[Row]) -> Iterator[Any]:
    """Float32 logits (targets, V) of each row, from one forward pass over all of them."""
    import torch

    longest = max(len(row.tokens) for row in rows)
    # any token will do as padding: nothing scored comes after it
    padded = [row.tokens + (row.tokens[-1],) * (longest - len(row.tokens)) for row in rows]
    positions = sorted({p for row in rows for p in range(row.start - 1, len(row.tokens) - 1)})
    slot = {position: k for k, position in enumerate(positions)}
    logits = model(
        input_ids=torch.tensor(padded, device=model.device),
        logits_to_keep=torch.tensor(positions, device=model.device),
        use_cache=False,
    ).logits
    for row, block in zip(rows, logits, strict=True):
        yield block[slot[row.start - 1] : slot[len(row.tokens) - 2] + 1].float()


def continuation(
    tokenizer: Any, prompt: str, answer: str, where: str = "", limits: Limits = UNLIMITED
) -> Row:
    """The row of prompt + answer, tokenised as one text; scored from the first token that reaches into the answer.

    ``where`` (file and id) opens the message of a DataError.
    """
    tokens, start = _encoded(tokenizer, prompt, answer)
    if not 1 <= start < len(tokens):
        raise DataError(
            f"{where}: prompt {reprlib.repr(prompt)} with answer {reprlib.repr(answer)} leaves no token to predict "
            "after the first; lengthen them."
        )
    limits.check(tokens, where)
    return Row(tokens, start)


def _encoded(tokenizer: Any, prompt: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Tokens of prompt + answer, and which is the first that reaches into the answer."""
    try:
        encoded = tokenizer(prompt + answer, return_offsets_mapping=True)
    except (NotImplementedError, ValueError):  # from tokenizers in Python and from Mistral's: no offsets
        encoded = tokenizer(prompt + answer)
    tokens = tuple(encoded["input_ids"])
    if "offset_mapping" in encoded:
        inside = (k for k, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt))
    else:
        alone = tokenizer(prompt)["input_ids"]
        pairs = zip_longest(tokens, alone[: len(tokens)])
        inside = (k for k, (token, before) in enumerate(pairs) if token != before)
    return tokens, next(inside, len(tokens))


def read_jsonl(path: Path, needs: Sequence[str], limit: int | None = None) -> list[Record]:
    """Records of a JSONL file; DataError names file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut strings at U+2028
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read evaluation data {path}: {error}.") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(records) < limit):
            records.append(_record(path, number, line, needs))
    if not records:
        raise DataError(f"{path} has no records.")
    twice = [item for item, count in Counter(record.id for record in records).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: id {twice[0]!r} occurs more than once; ids decide which items are held back."
        )
    return records


def _record(path: Path, number: int, line: str, needs: Sequence[str]) -> Record:
    where = f"{path}, line {number}"
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text to a tokenizer
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); correct or remove the line.") from error
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: must be an object with {', '.join(needs) or 'fields'}, but got {reprlib.repr(fields)}."
        )
    missing = [key for key in needs if key not in fields]
    if missing:
        raise DataError(f"{where}: needs {', '.join(needs)}, but {', '.join(missing)} is missing; add it.")
    given = fields.get("id")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise DataError(f"{where}: id must be text or a whole number, but got {reprlib.repr(given)}.")
    item = f"{path.stem}-{number}" if given is None else str(given)
    return Record(item, f"{path}, id {item}", fields)
