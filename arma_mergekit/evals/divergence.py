"""The task `divergence`: how far a model's attention is from that of the base or the fine-tuned model.

    loss of a text = sum over query positions q of the mean over layers l and heads h of d(a[l, h, q, :], m[l, h, q, :])

with a the candidate's attention rows, m the teacher's and d a divergence of `attention`, which see; needs no labels.
Entered in an objective with a negative weight it is the regulariser of ARMA's idea.

The teacher is the live model itself with other weights, so its queries and keys are kept: layers x tokens x (query and
key heads) x head size numbers in the model's dtype, 46 kB a token for SmolLM2-135M. Mind ``max_tokens``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from arma_mergekit.attention import Inputs, Layer, divergence, divergences, record
from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Measured, Model
from arma_mergekit.evals.rows import Item

__all__ = ["DivergenceTask"]


class DivergenceTask:
    """Mean divergence of attention rows per query position; headline: its negative, 0 for the teacher itself.

    ``items``: texts of at least two tokens (`tasks.text_items`). ``metric``: a name in `attention.DIVERGENCES`.
    ``teacher``: ``base`` or ``finetuned``; for the latter `prepare` needs a live model.
    """

    differentiable = True
    watch = False

    def __init__(
        self,
        name: str,
        items: Sequence[Item],
        metric: str = "js",
        teacher: Literal["base", "finetuned"] = "base",
        weight: float = 1.0,
    ) -> None:
        divergence(metric)
        self.name, self.items, self.weight = name, tuple(items), weight
        self.metric, self.teacher = metric, teacher
        self.ids = tuple(item.id for item in items)
        self.unit = f"-{metric}/token"

    @property
    def content(self) -> str:
        """Digest of metric, teacher and texts."""
        given = (type(self).__qualname__, self.metric, self.teacher, self.items)
        return hashlib.sha256(repr(given).encode()).hexdigest()

    def prepare(self, base: Model) -> int:
        """Keep the teacher's queries and keys of every text."""
        with _as_teacher(base, self.teacher):
            self._kept: list[list[Layer]] = [record(base, _inputs(base, item)) for item in self.items]
        return sum(len(item.rows[0].tokens) for item in self.items)

    def measure(
        self, model: Model, items: Sequence[int], backward: Callable[[Any], None] | None = None
    ) -> Measured:
        """Score these texts, each alone: nothing is padded. See `Task.measure`."""
        weights = np.array([len(self.items[i].rows[0].targets) for i in items], np.float64)
        losses = []
        with torch.set_grad_enabled(backward is not None):
            for i in items:
                by_layer = divergences(model, _inputs(model, self.items[i]), self._kept[i], self.metric)
                loss = torch.cat(list(by_layer.values()), 1).mean()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise DataError(f"Task {self.name}: the loss of item {self.ids[i]} is not finite.")
                if backward is not None:
                    backward(loss / weights.sum())
        loss_of_items = np.array(losses)
        tokens = sum(len(self.items[i].rows[0].tokens) for i in items)
        return Measured(tuple(self.ids[i] for i in items), loss_of_items, -loss_of_items, weights, tokens)


def _inputs(model: Model, item: Item) -> Inputs:
    return {"input_ids": torch.tensor([item.rows[0].tokens], device=model.device)}


@contextlib.contextmanager
def _as_teacher(live: Any, teacher: str) -> Iterator[None]:
    """The model with the teacher's weights; it arrives as the base."""
    if teacher == "finetuned":
        live.set_all(1.0)
    try:
        yield
    finally:
        if teacher == "finetuned":
            live.set_all(0.0)
