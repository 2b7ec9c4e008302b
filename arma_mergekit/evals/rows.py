"""Tasks that score continuations: token rows, and what is measured where their tokens are predicted.

A *row* is a token sequence with the position where its scored part begins. It knows no models (forward.py) and no
files (sources.py).
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Measured, Model

if TYPE_CHECKING:
    from arma_mergekit.evals.forward import CausalLM

__all__ = ["UNLIMITED", "Item", "Limits", "Row", "RowTask", "continuation"]

PLAIN = (str, int, float, tuple, type(None), re.Pattern)
BATCH_TOKENS = 512
GRADIENT_TOKENS = 256  # what a gradient keeps is about 1 MB a token at d = 576 and 30 layers


@dataclass(frozen=True)
class Limits:
    """What the model takes: ``positions`` of a sequence, rows of its embedding (``vocabulary``); None: not known."""

    positions: int | None = None
    vocabulary: int | None = None

    def check(self, tokens: Sequence[int], where: str, more: int = 0) -> None:
        """DataError if the model cannot take these tokens and ``more`` that it makes itself."""
        if self.positions is not None and len(tokens) + more > self.positions:
            made = f" and max_new_tokens {more}" if more else ""
            raise DataError(
                f"{where}: has {len(tokens)} tokens{made}, but the model takes {self.positions}; shorten or remove it."
            )
        largest = max(tokens, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise DataError(
                f"{where}: token {largest} is none of the model's {self.vocabulary}, so the tokenizer does not belong "
                "to the model; put the model's own beside it."
            )


UNLIMITED = Limits()


@dataclass(frozen=True)
class Row:
    """``tokens`` of one sequence, of which those from ``start`` >= 1 on are scored."""

    tokens: tuple[int, ...]
    start: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The scored tokens."""
        return self.tokens[self.start :]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model must see to score them."""
        return self.tokens[:-1]

    @property
    def places(self) -> range:
        """Where among the inputs each of them is predicted."""
        return range(self.start - 1, len(self.tokens) - 1)


@dataclass(frozen=True)
class Item:
    """One sample: its rows are scored together. ``answer``: index of the right one; ``text``: the answer as given."""

    id: str
    rows: tuple[Row, ...]
    answer: int = 0
    text: str = ""


class RowTask(ABC):
    """A task made of rows; a subclass says what the logits of an item's rows mean."""

    unit = ""
    differentiable = True
    watch = False

    def __init__(self, name: str, items: Sequence[Item], weight: float = 1.0) -> None:
        self.name, self.items, self.weight = name, tuple(items), weight
        self.ids = tuple(item.id for item in items)

    @functools.cached_property
    def content(self) -> str | None:
        """Digest of class, options and token rows: every plain value it holds (the rest is made from them)."""
        named = ("name", "weight", "watch", "ids")
        options = {k: v for k, v in vars(self).items() if k not in named and isinstance(v, PLAIN)}
        return hashlib.sha256(repr((type(self).__qualname__, sorted(options.items()))).encode()).hexdigest()

    def prepare(self, base: Model) -> int:
        """Nothing to prepare."""
        return 0

    def item_weight(self, item: Item) -> float:
        """What the item counts for in the mean; its scored tokens."""
        return float(sum(len(row.targets) for row in item.rows))

    @abstractmethod
    def columns(self, logits: Any, targets: Any, teacher: Any) -> Any:
        """What is measured at each scored position, (P, k), from float32 logits (P, V) and targets (P,).

        The first column is differentiable. ``teacher``: what `teacher` returned.
        """

    @abstractmethod
    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """Loss () of an item and its headline value (None: -loss), from the columns (targets, k) of its rows."""

    def teacher(self, items: Sequence[int]) -> Any:
        """A tensor (P, ...) for `columns`, or None."""
        return None

    def measure(
        self, model: Model, items: Sequence[int], backward: Callable[[Any], None] | None = None
    ) -> Measured:
        """Score these items; see `Task.measure`."""
        import torch

        from arma_mergekit.evals.forward import CausalLM

        lm = CausalLM(model)
        weights = {i: self.item_weight(self.items[i]) for i in items}
        total, losses, values, spent = sum(weights.values()), {}, {}, 0
        with torch.set_grad_enabled(backward is not None):
            limit = BATCH_TOKENS if backward is None else GRADIENT_TOKENS
            for batch, shared in self._batches(lm, items, limit):
                outcomes, tokens = self._score(lm, batch, shared)
                spent += tokens
                if backward is not None:
                    backward(torch.stack([loss for loss, _ in outcomes]).sum() / total)
                for i, (loss, value) in zip(batch, outcomes, strict=True):
                    losses[i] = float(loss.detach())
                    values[i] = -losses[i] if value is None else value
        return self._measured(items, losses, values, weights, spent)

    def _batches(
        self, lm: CausalLM, items: Sequence[int], limit: int = BATCH_TOKENS
    ) -> Iterator[tuple[list[int], int]]:
        from arma_mergekit.evals.forward import batches

        return batches({i: self.items[i].rows for i in items}, limit, lm.caches)

    def _score(
        self, lm: CausalLM, batch: Sequence[int], shared: int
    ) -> tuple[list[tuple[Any, float | None]], int]:
        """Outcome of each item of a batch, and the forward tokens spent."""
        import torch

        from arma_mergekit.evals.forward import by_chunk

        def columns(h: Any, targets: Any, *teacher: Any) -> Any:
            return self.columns(lm.head(h).float(), targets, *(teacher or (None,)))

        rows = [row for i in batch for row in self.items[i].rows]
        h, tokens = lm.hidden([self.items[i].rows for i in batch], shared)
        targets = torch.tensor([t for row in rows for t in row.targets], device=h.device)
        teacher = self.teacher(batch)
        given = (h, targets) if teacher is None else (h, targets, teacher)
        found = by_chunk(columns, lm.vocabulary, *given)
        by_row = iter(torch.split(found, [len(row.targets) for row in rows]))
        return [self.outcome(i, [next(by_row) for _ in self.items[i].rows]) for i in batch], tokens

    def _measured(
        self, items: Sequence[int], losses: Mapping[int, float], values: Mapping[int, float],
        weights: Mapping[int, float], tokens: int,
    ) -> Measured:  # fmt: skip
        bad = [self.ids[i] for i in items if not math.isfinite(losses[i])]
        if bad:
            raise DataError(
                f"Task {self.name}: the loss of item {bad[0]} (and {len(bad) - 1} more) is not finite."
            )
        loss, value, weight = (np.array([c[i] for i in items], np.float64) for c in (losses, values, weights))
        return Measured(tuple(self.ids[i] for i in items), loss, value, weight, tokens)


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
