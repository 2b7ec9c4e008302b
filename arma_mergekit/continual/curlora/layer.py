"""One adapted weight: `y = base(x) + alpha * x (C U R)^T`, without C U R ever being there.

    Linear    y += alpha * (((x R^T) U^T) C^T)       W (out, in): C (out, r), R (r, in)
    Conv1D    y += alpha * (((x C) U) R)             W (in, out): C (in, r),  R (r, out)

    symbol    meaning                              shape           dtype
    x, y      input, output                        (..., in/out)   the base's
    C, R      columns and rows of W as stored      (m, r), (r, n)  the base's; taken from it, never saved
    U         what is trained, zero at first       (r, r)          float32 (PEFT's rule) or the base's

Source: CURLoRA, arXiv 2408.14572, eq. 1 to 4. Backward keeps x R^T (tokens, r) where LoRA keeps x, and optimiser
states of r * r numbers. C and R are copies, so they stay the base's while the adapter is merged into it. It knows
PEFT's layers; the draw is draw.py's, the digest the file format's (checkpoint/curlora.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from arma_mergekit.checkpoint.curlora import DIGEST_BYTES, digest, wrong_base
from arma_mergekit.continual.curlora.config import CURLoRAConfig
from arma_mergekit.continual.curlora.draw import draw
from arma_mergekit.errors import CheckpointError

__all__ = ["CURLoRALayer", "CURLoRALinear", "Cross"]

SAVED = ("rows", "columns", "digest")  # buffers of `Cross` that are saved


class Cross(nn.Module):
    """C and R of one adapter, and what they are found again by: rows (r,), columns (r,), digest (16,)."""

    rows: Tensor
    columns: Tensor
    digest: Tensor
    C: Tensor
    R: Tensor

    def __init__(self, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_buffer("digest", torch.empty(DIGEST_BYTES, dtype=torch.uint8, device=rows.device))
        self.register_buffer("C", None, persistent=False)
        self.register_buffer("R", None, persistent=False)
        self.digest.copy_(self.take(weight, rows, columns))

    @torch.no_grad()
    def take(self, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Copy C and R from the weight (m, n); returns their digest (16,)."""
        self.C = weight.index_select(1, columns.to(weight.device))
        self.R = weight.index_select(0, rows.to(weight.device))
        found = digest(_bits(self.C), _bits(self.R))
        return torch.frombuffer(bytearray(found), dtype=torch.uint8).to(weight.device)


def _bits(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint16]]:
    bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
    return bits.view(np.uint16)


class CURLoRALayer(BaseTunerLayer):  # type: ignore[misc]  # PEFT has no types
    """What PEFT asks of an adapted layer."""

    adapter_layer_names = ("curlora_U",)
    other_param_names = ("curlora_cross", "scaling", "r")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.curlora_U = nn.ParameterDict()
        self.curlora_cross = nn.ModuleDict()
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def base_weight(self) -> Tensor:
        """W as stored (m, n)."""
        weight: Tensor = self.get_base_layer().weight
        return weight

    def cross(self, adapter: str) -> Cross:
        """C and R of an adapter."""
        return cast(Cross, self.curlora_cross[adapter])

    def update_layer(self, adapter_name: str, config: CURLoRAConfig, module_name: str) -> None:
        """Add an adapter of that name, U = 0; ValueError if the weight has not r usable rows and columns."""
        if self.merged:
            raise ValueError(
                f"{module_name} has {self.merged_adapters} merged into it; unmerge before adding."
            )
        weight = self.base_weight
        if weight.is_meta:
            raise ValueError(f"{module_name} has no values yet (device meta); load the base first.")
        drawn = draw(weight, config.r, config.sampling, config.legacy, config.seed, module_name)
        rows, columns = (torch.from_numpy(found).to(weight.device) for found in drawn)
        self.r[adapter_name], self.scaling[adapter_name] = config.r, config.curlora_alpha
        self.curlora_cross[adapter_name] = Cross(weight, rows, columns)
        self.curlora_U[adapter_name] = nn.Parameter(torch.zeros(config.r, config.r, dtype=weight.dtype))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """alpha * C U R in W's orientation (m, n), at least float32: for merging alone."""
        cross, u = self.cross(adapter), self.curlora_U[adapter]
        wide = torch.promote_types(cross.C.dtype, torch.float32)
        product: Tensor = (
            cross.C.to(wide) @ (self.scaling[adapter] * u.to(cross.C.device, wide)) @ cross.R.to(wide)
        )
        return product

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Yes; PEFT's own conversion takes an SVD, ours (convert.py) is exact without."""
        return True


class CURLoRALinear(nn.Module, CURLoRALayer):
    """nn.Linear or transformers' Conv1D with CURLoRA adapters."""

    active_adapters: Sequence[str]  # PEFT's

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: CURLoRAConfig, module_name: str
    ) -> None:
        super().__init__()
        CURLoRALayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus that of each active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for adapter in self.active_adapters:
            if adapter in self.curlora_U:
                y = y + self._product(adapter, x).to(y.dtype)
        return y

    def _product(self, adapter: str, x: Tensor) -> Tensor:
        """alpha * x (C U R)^T, or its transposed form, through r channels."""
        cross, u = self.cross(adapter), self.curlora_U[adapter]
        C, R = cross.C, cross.R
        first, last = (C.T, R.T) if self.transposed else (R, C)
        u = self.scaling[adapter] * (u.T if self.transposed else u)
        inner = functional.linear(x.to(C.dtype), first)
        return functional.linear(functional.linear(inner.to(u.dtype), u).to(C.dtype), last)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (by default the active ones) into the base's weight; ``safe_merge`` refuses NaN."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.curlora_U:
                continue
            merged = self._shifted(adapter, 1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"With adapter {adapter!r} the weight is not finite; it seems to be broken.")
            self.base_weight.data.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged adapters out again; exact but for the rounding to the weight's dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.base_weight.data.copy_(self._shifted(self.merged_adapters.pop(), -1))

    def _shifted(self, adapter: str, sign: int) -> Tensor:
        weight = self.base_weight.data
        return (weight + sign * self.get_delta_weight(adapter)).to(weight.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """Take C and R anew for every adapter in ``state_dict``; CheckpointError if it was made of another base."""
        weight = state_dict.get(f"{prefix}base_layer.weight", self.base_weight)
        for name in self.r:
            keys = [f"{prefix}curlora_U.{name}", *(f"{prefix}curlora_cross.{name}.{part}" for part in SAVED)]
            given = [state_dict[key] for key in keys if key in state_dict]
            if given:
                self._retake(prefix[:-1], self.cross(name), weight, given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _retake(self, where: str, cross: Cross, weight: Tensor, given: Sequence[Tensor]) -> None:
        """C and R of the rows and columns in ``given`` (U and the `SAVED` ones), checked against their digest."""
        if self.merged:
            raise ValueError(f"{where} has {self.merged_adapters} merged into it; unmerge before loading.")
        if [t.shape[-1:] for t in given] != [cross.rows.shape] * 3 + [cross.digest.shape]:
            raise CheckpointError(
                f"{where}: needs U, {', '.join(SAVED)} of rank {len(cross.rows)}; save it again."
            )
        _, rows, columns, known = given
        for indices, size in zip((rows, columns), weight.shape, strict=True):
            if indices.is_floating_point() or not ((indices >= 0) & (indices < size)).all():
                raise CheckpointError(f"{where}: indices must be whole numbers from 0 to {size - 1}.")
        if not torch.equal(cross.take(weight, rows, columns).cpu(), known.cpu()):
            raise wrong_base(where)
