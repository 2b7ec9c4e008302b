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

from arma_mergekit.errors import CheckpointError

__all__ = ["Switch"]

FLAG = "_disable_adapters"  # what both kinds of PEFT's layers look at in forward
KINDS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class Switch:
    """The adapted layers of a PeftModel, as they are now; CheckpointError if there are none, or the head is one."""

    def __init__(self, model: Any) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, KINDS)]
        kind = "/".join(
            sorted(getattr(c.peft_type, "value", str(c.peft_type)) for c in model.peft_config.values())
        )
        if not self._layers:
            raise CheckpointError(
                f"A {kind} adapter adds tokens or attention to no layer of its own, so it cannot be switched off "
                "between two passes; take one that adapts layers, such as LORA."
            )
        if isinstance(model.get_base_model().get_output_embeddings(), KINDS):
            raise CheckpointError(
                f"The {kind} adapter changes the head, but both passes must share it; train one that leaves it alone."
            )

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the layers are the base's; ValueError if the adapter is merged into them."""
        layers = [vars(layer) for layer in self._layers]  # a module's own __setattr__ is slow
        if any(layer.get("merged_adapters") for layer in layers):
            raise ValueError("The adapter is merged into the weights, so there is no base; unmerge it first.")
        before = [layer[FLAG] for layer in layers]
        try:
            for layer in layers:
                layer[FLAG] = True
            yield
        finally:
            for layer, flag in zip(layers, before, strict=True):
                layer[FLAG] = flag
