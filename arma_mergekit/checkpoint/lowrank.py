"""What an adapter adds to one weight, whatever its format: a product of low rank, folded in a block of rows at a time.

    W_ft = round(W + scale * (L M))

    symbol   meaning                                        shape       dtype
    W        the base's weight as it is stored              (m, n)      bf16, f16, f32, f64
    L, M     the adapter's factors (lora.py, curlora.py)    (m, r), (r, n)
    L M      the product, in float64, then float32          (m, n)

The product is taken in float64 so that neither the BLAS nor its threads show in the float32 result; the rest is
float32 with one rounding to W's dtype. It knows one weight and its factors; no directories or configs of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint.header import TensorInfo, read_header
from arma_mergekit.checkpoint.locate import contained
from arma_mergekit.checkpoint.model import NUMPY
from arma_mergekit.checkpoint.read import read_into
from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import LARGEST_BF16, narrow, widen

__all__ = [
    "CONFIG",
    "REMEDY",
    "WEIGHTS",
    "Array",
    "Factors",
    "Left",
    "Product",
    "number",
    "read",
    "shortened",
    "tensors_in",
    "wide",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
REMEDY = "merge it with PEFT's merge_and_unload and name the resulting directory"
LARGEST_SETTING = 1e9
SHOWN = 60  # characters of a value in a sentence
Array = npt.NDArray[Any]
Left = Callable[[Array, int], Array]  # rows of W (k, n) and the first one's number to those rows of L (k, r)


class Factors(Protocol):
    """What is added to one weight."""

    @property
    def scale(self) -> float:
        """What L M is multiplied by."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Where the factors lie in the adapter's file."""

    def matrices(self, weight: TensorInfo) -> tuple[Left, npt.NDArray[np.float64]]:
        """L, a block of rows at a time, and M (r, n); CheckpointError if they are not for this weight."""


class Product:
    """scale * L M of one weight, some of its rows at a time."""

    def __init__(self, weight: TensorInfo, factors: Factors) -> None:
        self._left, self._right = factors.matrices(weight)
        self._weight, self._factors = weight, factors

    def add(self, base: Array, out: Array, row: int) -> None:
        """``out`` = ``base`` + scale * L M, both (k, n) from ``row`` on; CheckpointError if that is not finite."""
        delta = (wide(self._left(base, row)) @ self._right).astype(
            np.float64 if self._weight.dtype == "F64" else np.float32
        )
        delta *= delta.dtype.type(self._factors.scale)
        total = np.empty_like(delta)
        widen(base, total)
        total += delta
        largest = LARGEST_BF16 if self._weight.dtype == "BF16" else float(np.finfo(base.dtype).max)
        if not (np.abs(total, out=delta) <= largest).all():  # NaN fails too
            raise CheckpointError(
                f"{self._weight.file}, tensor {self._weight.name!r}: with adapter {self._factors.tensors[0].file} "
                f"its values are not finite or exceed {largest:g}; one of the two is broken."
            )
        narrow(total, out)


def read(tensor: TensorInfo) -> Array:
    """A tensor of the adapter; bf16 as its bits."""
    out = np.empty(tensor.shape, np.dtype(NUMPY[tensor.dtype]))
    read_into(tensor.file, tensor.start, out)
    return out


def wide(array: Array) -> npt.NDArray[np.float64]:
    """The values in float64; exact."""
    out = np.empty(array.shape, np.float64)
    widen(array, out)
    return out


def tensors_in(path: Path) -> tuple[Path, dict[str, TensorInfo]]:
    """File and tensors of an adapter's directory; CheckpointError if it holds none that is safe to open."""
    file = contained(path, WEIGHTS)
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {WEIGHTS}; pickled adapters are never opened, save it as safetensors."
        )
    return file, read_header(file)


def number(where: str, name: str, value: Any) -> float:
    """The value, or a CheckpointError that shows what the config has there."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_SETTING:
        raise CheckpointError(f"{where}: {name} in {CONFIG} must be a number, but got {shortened(value)}.")
    return value


def shortened(value: Any) -> str:
    """A value of a file, at a length that fits into a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
