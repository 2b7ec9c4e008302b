"""What a task is, what scoring it returns, and how its items are split.

    symbol   meaning                                                         shape
    loss     smooth loss of each item; goes down when things get better      (n,)
    value    headline number of each item (correct or not, -NLL); goes up    (n,)
    weight   what an item counts for (its scored tokens, or 1)               (n,)

    mean = sum(loss) / sum(weight), and likewise for value; its standard error is that of a ratio.

Searching uses losses, since they separate candidates that accuracies cannot; people read values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Measured", "Model", "Part", "Split", "Task", "held_back", "join", "paired", "parts"]

Array = npt.NDArray[np.float64]
Part = tuple[int, int]  # (i, n): the i-th of n parts of the search items


class Model(Protocol):
    """What tasks call: a causal LM, alone or live."""

    @property
    def device(self) -> Any:
        """Where its inputs must be."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """Forward pass with ``input_ids`` (B, T) and ``logits_to_keep`` (P,), returning ``.logits`` (B, P, V)."""
        ...


@dataclass(frozen=True)
class Measured:
    """Scores of some items of a task; arrays (n,) as above, ``tokens`` = forward tokens spent, padding included."""

    ids: tuple[str, ...]
    loss: Array
    value: Array
    weight: Array
    tokens: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_json` was made of."""
        loss, value, weight = (np.array(data[k], dtype=np.float64) for k in ("loss", "value", "weight"))
        return cls(tuple(data["ids"]), loss, value, weight, data["tokens"])

    def to_json(self) -> dict[str, Any]:
        """Plain data; floats survive JSON exactly."""
        columns = {k: getattr(self, k).tolist() for k in ("loss", "value", "weight")}
        return {"ids": list(self.ids), **columns, "tokens": self.tokens}

    @property
    def mean_loss(self) -> float:
        """Smooth loss; goes down when things get better."""
        return float(self.loss.sum() / self.weight.sum())

    @property
    def score(self) -> float:
        """Headline number; goes up when things get better."""
        return float(self.value.sum() / self.weight.sum())

    @property
    def loss_stderr(self) -> float:
        """Standard error of ``mean_loss``."""
        return _ratio_stderr(self.loss, self.weight)

    @property
    def stderr(self) -> float:
        """Standard error of ``score``."""
        return _ratio_stderr(self.value, self.weight)


def join(a: Measured, b: Measured) -> Measured:
    """Scores of disjoint items of one task as one."""
    columns = (np.concatenate([getattr(m, k) for m in (a, b)]) for k in ("loss", "value", "weight"))
    loss, value, weight = columns
    return Measured(a.ids + b.ids, loss, value, weight, a.tokens + b.tokens)


def paired(ours: Measured, theirs: Measured, of: str = "loss") -> tuple[float, float]:
    """Mean of ours - theirs over items that both scored, and its standard error. ``of``: "loss" or "value"."""
    if ours.ids != theirs.ids:
        raise ValueError("Only scores of the same items in the same order can be paired.")
    difference = getattr(ours, of) - getattr(theirs, of)
    return float(difference.sum() / ours.weight.sum()), _ratio_stderr(difference, ours.weight)


def _ratio_stderr(total: Array, weight: Array) -> float:
    """Standard error of sum(total) / sum(weight) over independent items (the usual linearisation)."""
    n = len(total)
    if n < 2:
        return float("nan")
    residual = total - weight * (total.sum() / weight.sum())
    return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / weight.sum())


@runtime_checkable
class Task(Protocol):
    """A named set of items that can be scored.

    ``watch``: only for the verdict, on held-back items; no search sees it. ``content``: digest of all that decides its
    scores beside the model, so that they may be kept for later runs; None if there is none.
    """

    name: str
    unit: str
    ids: tuple[str, ...]
    weight: float
    watch: bool
    differentiable: bool

    @property
    def content(self) -> str | None:
        """See above."""
        ...

    def prepare(self, base: Model) -> int:
        """Called once with the base model before anything is scored; returns the forward tokens spent."""
        ...

    def measure(
        self, model: Model, items: Sequence[int], backward: Callable[[Any], None] | None = None
    ) -> Measured:
        """Score these items. With ``backward``, call it with tensors that add up to their mean loss."""
        ...


def _rank(item_id: str, salt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}:{item_id}".encode()).digest()[:8], "big")


def held_back(ids: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Indices (search, held back): by hash of the id, so an item stays on its side whatever else is in the file."""
    limit = int(share * 2**64)
    kept = [i for i, item in enumerate(ids) if _rank(item, "holdout") < limit]
    return sorted(set(range(len(ids))) - set(kept)), kept


def parts(ids: Sequence[str], items: Sequence[int], n: int) -> list[list[int]]:
    """Cut items into n parts of nearly equal size, at random but fixed by the ids."""
    order = sorted(items, key=lambda i: _rank(ids[i], "part"))
    return [order[k::n] for k in range(n)]


class Split:
    """The items of a task: those searched on, cut into parts, and those held back."""

    def __init__(self, ids: Sequence[str], holdout: float) -> None:
        self.ids = ids
        self.search, self.held = held_back(ids, holdout)

    def part(self, part: Part | None, complement: bool = False) -> list[int]:
        """Search items of a part, or all of them; ``complement``: those outside the part."""
        if part is None:
            return self.search
        chosen = parts(self.ids, self.search, part[1])[part[0]]
        return sorted(set(self.search) - set(chosen)) if complement else chosen
