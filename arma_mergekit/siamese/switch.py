"""An adapter off for the length of a block, without PEFT's walk over all modules.

PEFT's `disable_adapter` finds every layer anew and sets `requires_grad` of every parameter, twice a token. Here the
layers are found once, and one flag of each is set; gradients are left alone. It knows PEFT's layers; no models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["Switch"]

FLAG = "_disable_adapters"  # what both kinds of PEFT's layers look at in forward


class Switch:
    """The adapted layers of a model, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers: list[dict[str, Any]] = [vars(m) for m in model.modules() if isinstance(m, kinds)]

    def __len__(self) -> int:
        return len(self._layers)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the layers are the base's; ValueError if the adapter is merged into them."""
        if any(layer.get("merged_adapters") for layer in self._layers):
            raise ValueError("The adapter is merged into the weights, so there is no base; unmerge it first.")
        before = [layer[FLAG] for layer in self._layers]
        try:
            for layer in self._layers:
                layer[FLAG] = True
            yield
        finally:
            for layer, flag in zip(self._layers, before, strict=True):
                layer[FLAG] = flag
