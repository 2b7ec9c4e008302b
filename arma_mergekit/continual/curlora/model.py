"""CURLoRA's tuner: finds the modules to adapt and puts layers in their place.

It knows PEFT's tuner API; the maths is layer.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from arma_mergekit.continual.curlora.config import CURLoRAConfig
from arma_mergekit.continual.curlora.layer import CURLoRALayer, CURLoRALinear
from arma_mergekit.roles import roles

__all__ = ["CURLoRAModel"]

DEFAULT_PARTS = ("q", "k", "v", "qkv", "kv")  # the paper's targets, as roles.py names them
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CURLoRAModel(BaseTuner):  # type: ignore[misc]  # PEFT has no types
    """A model with CURLoRA adapters (arXiv 2408.14572); made by `get_peft_model` from a `CURLoRAConfig`."""

    prefix = "curlora_"
    tuner_layer_cls = CURLoRALayer
    target_module_mapping: Mapping[str, list[str]] = {}

    def _prepare_adapter_config(
        self, peft_config: CURLoRAConfig, model_config: dict[str, Any]
    ) -> CURLoRAConfig:
        """Queries, keys and values of whatever architecture, if no targets are given."""
        if peft_config.target_modules is None:
            names = [name.replace(".base_layer.", ".") for name in self.model.state_dict()]
            found = {
                name.removesuffix(".weight").rpartition(".")[2]
                for name, role in roles(names, model_config).items()
                if role.attention and role.part in DEFAULT_PARTS and name.endswith(".weight")
            }
            if not found:
                raise ValueError("No queries, keys or values found; give CURLoRAConfig its target_modules.")
            peft_config.target_modules = found
        return peft_config

    def _create_and_replace(
        self,
        config: CURLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, CURLoRALinear):
            target.update_layer(adapter_name, config, current_key)
            return
        _check_target(target, current_key)
        layer = CURLoRALinear(target, adapter_name, config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable before it is active
        self._replace_module(parent, target_name, layer, target)


def _check_target(target: nn.Module, name: str) -> None:
    """TypeError unless it is a plain Linear or Conv1D whose weight holds numbers that can be picked."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kind = type(base).__name__
    if not isinstance(base, nn.Linear | Conv1D):
        raise TypeError(f"CURLoRA adapts Linear and Conv1D, but {name} is {kind}; change target_modules.")
    weight = base.weight
    if weight.dtype not in FLOATS or weight.ndim != 2 or getattr(weight, "quant_state", None) is not None:
        raise TypeError(
            f"CURLoRA needs the rows and columns of a weight, but {name} ({kind}, {weight.dtype}) is quantised; "
            "load the base in bfloat16, or use LoRA."
        )
