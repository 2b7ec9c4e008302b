"""An adapter on top of a checkpoint, folded into each weight when it is read; nothing is written to disk.

    peft_type   format          W_ft
    LORA        lora.py         W + scale * B A
    CURLORA     curlora.py      W + alpha * C U R

The arithmetic is lowrank.py's. It knows checkpoints and these formats; no torch or PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint import curlora, lora
from arma_mergekit.checkpoint.header import TensorInfo, read_json
from arma_mergekit.checkpoint.locate import ModelReference, contained, locate, readable, refuse_siamese
from arma_mergekit.checkpoint.lowrank import CONFIG, REMEDY, Factors, Product, shortened
from arma_mergekit.checkpoint.model import Checkpoint
from arma_mergekit.errors import CheckpointError

__all__ = ["AdaptedCheckpoint", "Factors", "Product", "open_model", "shortened"]

CHUNK = 1 << 20  # elements folded at a time


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose adapted tensors are folded when read; names, shapes and dtypes are the base's."""

    factors: Mapping[str, Factors]

    def bytes_read(self, name: str) -> int:
        """Bytes of files that reading this tensor touches, the adapter's included."""
        factors = self.factors.get(name)
        return super().bytes_read(name) + (sum(t.nbytes for t in factors.tensors) if factors else 0)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The base's tensor if the adapter leaves it alone, else a new array of W + scale * L M."""
        base = super().read(name)
        factors = self.factors.get(name)
        return base if factors is None else _fold(self.tensors[name], base, factors)

    @property
    def directories(self) -> dict[str, Path]:
        """Those of the model and of the adapter, by their references."""
        model, _, adapter = self.ref.partition("+")
        return {model: self.path, adapter: next(iter(self.factors.values())).tensors[0].file.parent}

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of the model, and the adapter's."""
        weights = {tensor.file for factors in self.factors.values() for tensor in factors.tensors}
        return tuple(sorted({*super().files, *weights, *(file.parent / CONFIG for file in weights)}))


def open_model(ref: str, base_dir: Path | None = None) -> Checkpoint:
    """Open `path[@revision][+adapter[@revision]]`; an AdaptedCheckpoint if there is an adapter.

    Headers only. CheckpointError for anything wrong with the model, the adapter, or their fit.
    """
    reference = ModelReference.parse(ref)
    base = Checkpoint.open(ref.partition("+")[0], base_dir)
    if reference.adapter is None:
        return base
    with readable(ref):
        path = locate(reference.adapter, reference.adapter_revision, base_dir)
        factors = _factors(path, base)
    return AdaptedCheckpoint(ref, base.path, base.config, base.tensors, factors)


def _factors(path: Path, base: Checkpoint) -> Mapping[str, Factors]:
    """What the adapter adds, by names of weights, in the format that its config names."""
    file = contained(path, CONFIG)
    if not file.is_file():
        refuse_siamese(path)
        raise CheckpointError(f"{path} has no {CONFIG}; name a directory that PEFT saved an adapter into.")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind == "LORA":
        lora.check_config(file, config)
        return lora.factors(path, config, base)
    if kind == "CURLORA":
        curlora.check_config(file, config)
        return curlora.factors(path, config, base)
    raise CheckpointError(f"{file}: peft_type {shortened(kind)} is neither LORA nor CURLORA; {REMEDY}.")


def _fold(weight: TensorInfo, base: npt.NDArray[Any], factors: Factors) -> npt.NDArray[Any]:
    """W + scale * L M, a block of rows at a time."""
    product, out = Product(weight, factors), np.empty(base.shape, base.dtype)
    rows = max(1, CHUNK // base.shape[1])
    for row in range(0, base.shape[0], rows):
        product.add(base[row : row + rows], out[row : row + rows], row)
    return out
