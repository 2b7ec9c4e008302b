"""Tasks that run the model themselves, and of which only the values are seen: no gradients.

A subclass says how items are scored; values go up when things get better, and the loss of an item is minus its value.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Measured, Model

__all__ = ["OutsideTask"]


class OutsideTask(ABC):
    """A task that is handed the transformers model."""

    unit = ""
    differentiable = False
    watch = False
    content: Any = None  # what it depends on cannot be told: its scores are never taken from a cache

    def __init__(self, name: str, ids: Sequence[str], weight: float = 1.0) -> None:
        self.name, self.ids, self.weight = name, tuple(ids), weight

    def prepare(self, base: Model) -> int:
        """Nothing to prepare."""
        return 0

    @abstractmethod
    def values(self, model: Any, items: Sequence[int]) -> Sequence[float]:
        """Headline numbers of these items by a transformers model, without gradients."""

    def measure(
        self, model: Model, items: Sequence[int], backward: Callable[[Any], None] | None = None
    ) -> Measured:
        """Score these items; see `Task.measure`. ``backward`` is never called."""
        import torch

        whole = transformers_model(model)
        with torch.no_grad(), counted(whole) as tokens:
            value = np.array(self.values(whole, items), np.float64)
        bad = [self.ids[i] for i, v in zip(items, value, strict=True) if not np.isfinite(v)]
        if bad:
            raise DataError(
                f"Task {self.name}: the score of item {bad[0]} (and {len(bad) - 1} more) is not finite."
            )
        return Measured(
            tuple(self.ids[i] for i in items), -value, value, np.ones(len(value)), int(sum(tokens))
        )


def transformers_model(model: Model) -> Any:
    """The transformers model inside of a live one, or the model itself."""
    from torch import nn

    return model if isinstance(model, nn.Module) else vars(model)["model"]


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Yield a list that grows by the input tokens of each forward pass, padding included."""
    tokens: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        tokens.append(0 if ids is None else ids.numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()
