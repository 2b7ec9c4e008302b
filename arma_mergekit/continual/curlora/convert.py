"""A CURLoRA adapter as a LoRA adapter that does the same, for whatever serves LoRA.

    alpha * C U R = B A      Linear: B = alpha * C U,        A = R      (out, r), (r, in)
                             Conv1D: B = alpha * (U R)^T,    A = C^T    (weights are stored transposed there)

Exact: the rank is r already, so there is nothing to approximate (PEFT's `save_as_lora` takes an SVD of every C U R).
The scale is in B: lora_alpha = r. It costs r (out + in) numbers per matrix instead of r^2 + 2 r.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from arma_mergekit.continual.curlora.layer import CURLoRALinear

__all__ = ["save_as_lora", "to_lora"]


def to_lora(model: Any, adapter_name: str = "default") -> tuple[Any, dict[str, Tensor]]:
    """LoraConfig and tensors (float32, named as PEFT saves them) of one adapter of a `PeftModel`.

    ValueError if it has no such CURLoRA adapter, or one with modules_to_save.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CURLoRALinear) and adapter_name in module.curlora_U
    }
    if not layers:
        raise ValueError(f"The model has no CURLoRA adapter {adapter_name!r}.")
    config = model.peft_config[adapter_name]
    if config.modules_to_save:
        raise ValueError(f"Adapter {adapter_name!r} also has whole modules: {config.modules_to_save}.")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        b, a = _factors(layer, adapter_name)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        target_modules=[name.removeprefix("base_model.model.") for name in layers],
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
    )
    return lora, tensors


@torch.no_grad()
def _factors(layer: CURLoRALinear, adapter: str) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), contiguous, float32."""
    cross = layer.cross(adapter)
    C, R = cross.C.float(), cross.R.float()
    u = layer.scaling[adapter] * layer.curlora_U[adapter].float()
    b, a = ((u @ R).T, C.T) if layer.transposed else (C @ u, R)
    return b.contiguous(), a.contiguous()


def save_as_lora(path: str | Path, model: Any, adapter_name: str = "default") -> None:
    """Write `to_lora` to a directory that `PeftModel.from_pretrained` opens."""
    lora, tensors = to_lora(model, adapter_name)
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    lora.save_pretrained(str(path))
