"""The CURLoRA format: what a directory that `continual.curlora` saved through PEFT adds to each weight.

    L M = C (U R)        scale = curlora_alpha

    symbol    meaning                                            shape    dtype       in the file
    C         columns of W, as stored: L, taken from the base    (m, r)   W's         no
    R         rows of W, likewise                                (r, n)   W's         no
    U         curlora_U, what was trained                        (r, r)   float       yes
    rows      curlora_cross.rows: which rows of W R is           (r,)     I32         yes
    columns   curlora_cross.columns                              (r,)     I32         yes
    digest    curlora_cross.digest: of C and R, see `digest`     (16,)    U8          yes

C and R index the weight as it is stored, so Conv1D needs no case of its own. They are another model's if the base is:
what the digest does not match is refused when the tensor is first read. Source: CURLoRA (arXiv 2408.14572, eq. 1 to 4).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint.header import FLOATS, TensorInfo
from arma_mergekit.checkpoint.locate import readable
from arma_mergekit.checkpoint.lowrank import (
    REMEDY,
    Array,
    Left,
    number,
    read,
    shortened,
    tensors_in,
    wide,
)
from arma_mergekit.checkpoint.model import NUMPY, Checkpoint, some
from arma_mergekit.checkpoint.read import read_into
from arma_mergekit.digest import state
from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import CHUNK, narrow

__all__ = ["DIGEST_BYTES", "CURFactors", "check_config", "digest", "factors", "wrong_base"]

KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.curlora_(?:(?P<u>U)|cross\.(?P<part>rows|columns|digest))"
)
PARTS = {"U", "rows", "columns", "digest"}
DIGEST_BYTES = 16
INDICES = ("I32", "I64")


def digest(columns: npt.NDArray[np.uint16], rows: npt.NDArray[np.uint16]) -> bytes:
    """What C (m, r) and R (r, n), rounded to bf16 and given as bits, are recognised by.

    Rounded, so that a model is the same whether it is loaded in the dtype of its files or in bfloat16.
    """
    found = hashlib.sha256(repr((columns.shape, rows.shape)).encode())
    for bits in (columns, rows):
        found.update(np.ascontiguousarray(bits, "<u2").data)
    return found.digest()[:DIGEST_BYTES]


def wrong_base(what: str) -> CheckpointError:
    """What to say where the digests differ."""
    return CheckpointError(
        f"{what}: the rows and columns that this CURLoRA adapter is made of have other values here; "
        "use the base it was trained on, in the dtype it was trained in or bfloat16."
    )


@dataclass(frozen=True)
class CURFactors:
    """``scale * C U R`` of one weight."""

    u: TensorInfo
    rows: TensorInfo
    columns: TensorInfo
    digest: TensorInfo
    scale: float

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """What the file holds; C and R are the base's."""
        return self.u, self.rows, self.columns, self.digest

    def matrices(self, weight: TensorInfo) -> tuple[Left, npt.NDArray[np.float64]]:
        """C, which is part of each block of W, and U R; CheckpointError if the base is another one."""
        rows, columns = _indices(self.rows, weight.shape[0]), _indices(self.columns, weight.shape[1])
        with readable(f"{self.u.file} and {weight.file}"):
            states = state(self.u.file), state(weight.file)
        _verify(self, weight, *states)
        return lambda base, _: base[:, columns], wide(read(self.u)) @ wide(_rows(weight, rows))


@lru_cache(maxsize=1 << 14)  # every thread of a merge asks, and each answer reads the whole weight
def _verify(factors: CURFactors, weight: TensorInfo, *_: str) -> None:
    rows, columns = _indices(factors.rows, weight.shape[0]), _indices(factors.columns, weight.shape[1])
    found = digest(_bits(_columns(weight, columns)), _bits(_rows(weight, rows)))
    if found != read(factors.digest).tobytes():
        raise wrong_base(f"{weight.file}, tensor {weight.name!r}, with {factors.u.file}")


def _indices(info: TensorInfo, size: int) -> npt.NDArray[np.int64]:
    """Rows or columns, all of them in range."""
    found = read(info).astype(np.int64)
    if not ((found >= 0) & (found < size)).all():
        raise CheckpointError(
            f"{info.file}, {info.name}: indices must be 0 to {size - 1}, but go from {found.min()} to "
            f"{found.max()}; is it an adapter of another model?"
        )
    return found


def _rows(weight: TensorInfo, rows: npt.NDArray[np.int64]) -> Array:
    """R (r, n), a row read at a time."""
    out = np.empty((len(rows), weight.shape[1]), np.dtype(NUMPY[weight.dtype]))
    for row, into in zip(rows, out, strict=True):
        read_into(weight.file, weight.start + int(row) * out.shape[1] * out.itemsize, into)
    return out


def _columns(weight: TensorInfo, columns: npt.NDArray[np.int64]) -> Array:
    """C (m, r), from one pass over the weight."""
    m, n = weight.shape
    out = np.empty((m, len(columns)), np.dtype(NUMPY[weight.dtype]))
    step = max(1, CHUNK // n)
    block = np.empty((min(step, m), n), out.dtype)
    for first in range(0, m, step):
        part = block[: min(step, m - first)]
        read_into(weight.file, weight.start + first * n * out.itemsize, part)
        out[first : first + step] = part[:, columns]
    return out


def _bits(array: Array) -> npt.NDArray[np.uint16]:
    """The values rounded to bf16, as bits."""
    if array.dtype == np.uint16:
        return array
    out = np.empty(array.shape, np.uint16)
    narrow(array.astype(np.float32), out)
    return out


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError if it describes more than C U R."""
    if config.get("modules_to_save"):
        saved = shortened(config["modules_to_save"])
        raise CheckpointError(
            f"{file}: modules_to_save {saved} makes it more than C U R added to weights; {REMEDY}."
        )


def factors(path: Path, config: Mapping[str, Any], base: Checkpoint) -> dict[str, CURFactors]:
    """Factors by name of the weight they are added to; dtypes and shapes checked, values when they are read."""
    file, tensors = tensors_in(path)
    modules: dict[str, dict[str, TensorInfo]] = {}
    strange = []
    for name, info in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            modules.setdefault(match["module"], {})[match["u"] or match["part"]] = info
    if strange:
        raise CheckpointError(f"{file} holds more than CURLoRA's tensors ({some(strange)}); {REMEDY}.")
    lost = [module for module in modules if f"{module}.weight" not in base.tensors]
    if lost or not modules:
        what = f"adapts {some(lost)}, which {base.ref} does not have" if lost else "adapts nothing"
        raise CheckpointError(f"{file} {what}; is it an adapter of another model?")
    scale = number(str(file), "curlora_alpha", config.get("curlora_alpha", 1))
    return {
        f"{module}.weight": _checked(f"{file}, {module}", parts, base.tensors[f"{module}.weight"], scale)
        for module, parts in modules.items()
    }


def _checked(where: str, parts: Mapping[str, TensorInfo], weight: TensorInfo, scale: float) -> CURFactors:
    """The four tensors of one module, if their headers fit each other and the weight."""
    if missing := PARTS - set(parts):
        raise CheckpointError(f"{where}: {some(missing)} is missing; save the adapter again.")
    u, rows, columns, known = (parts[part] for part in ("U", "rows", "columns", "digest"))
    if not {u.dtype, weight.dtype} <= FLOATS:
        raise CheckpointError(
            f"{where}: U of {u.dtype} on a weight of {weight.dtype} cannot be folded; dequantise it first."
        )
    if len(weight.shape) != 2 or len(u.shape) != 2 or not 0 < u.shape[0] <= min(weight.shape):
        raise CheckpointError(f"{where}: U of shape {u.shape} does not fit a weight of shape {weight.shape}.")
    rank = u.shape[0]
    shapes = (u.shape[1:], rows.shape, columns.shape)
    if set(shapes) != {(rank,)} or rows.dtype not in INDICES or columns.dtype not in INDICES:
        raise CheckpointError(
            f"{where}: U must be square and rows and columns as many 32-bit whole numbers, but got "
            f"{u.shape}, {rows.dtype} {rows.shape} and {columns.dtype} {columns.shape}; save the adapter again."
        )
    if (known.dtype, known.shape) != ("U8", (DIGEST_BYTES,)):
        raise CheckpointError(f"{where}: digest must be {DIGEST_BYTES} bytes; save the adapter again.")
    return CURFactors(u, rows, columns, known, scale)
