"""A LoRA adapter on top of a checkpoint, folded into each weight when it is read; nothing is written to disk.

    W_ft = round(W + scale * (B A))        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

    symbol   meaning                                       shape       dtype
    W        the base's weight                             (out, in)   bf16, f16, f32, f64; Conv1D transposed
    A, B     lora_A, lora_B (lora_embedding_A, _B alike)   (r, in), (out, r)
    B A      the product, in float64, then float32         (out, in)

The product is taken in float64 so that neither the BLAS nor its threads show in the float32 result; the rest
is float32 with one rounding to W's dtype. Source: LoRA (arXiv 2106.09685; rank-stabilised: 2312.03732), files
as PEFT 0.21 saves them. What PEFT would compute differently (DoRA, saved modules, initialisations that change
the base) is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint.header import FLOATS, TensorInfo, read_header, read_json
from arma_mergekit.checkpoint.locate import ModelReference, contained, locate, readable
from arma_mergekit.checkpoint.model import NUMPY, Checkpoint, some
from arma_mergekit.checkpoint.read import read_into
from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import LARGEST_BF16, narrow, widen

__all__ = ["AdaptedCheckpoint", "Factors", "Product", "open_model"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
REMEDY = "merge it with PEFT's merge_and_unload and name the resulting directory"
PLAIN_INIT = (True, False, None, "gaussian", "eva")  # those that leave the base's weights as they are
CHUNK = 1 << 20  # elements folded at a time
LARGEST_SETTING = 1e9
SHOWN = 60  # characters of a value in a sentence
# options of PEFT's LoraConfig under which W + scale * B A is not what the adapter computes
REFUSED = (
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What is added to one weight: ``scale * B A``, transposed if ``transposed``."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose adapted tensors are folded when read; names, shapes and dtypes are the base's."""

    factors: Mapping[str, Factors]

    def bytes_read(self, name: str) -> int:
        """Bytes of files that reading this tensor touches, the adapter's included."""
        factors = self.factors.get(name)
        return super().bytes_read(name) + (factors.a.nbytes + factors.b.nbytes if factors else 0)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The base's tensor if the adapter leaves it alone, else a new array of W + scale * B A."""
        base = super().read(name)
        factors = self.factors.get(name)
        return base if factors is None else _fold(self.tensors[name], base, factors)

    @property
    def directories(self) -> dict[str, Path]:
        """Those of the model and of the adapter, by their references."""
        model, _, adapter = self.ref.partition("+")
        return {model: self.path, adapter: next(iter(self.factors.values())).a.file.parent}

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of the model, and the adapter's."""
        factors = {tensor.file for f in self.factors.values() for tensor in (f.a, f.b)}
        return tuple(sorted({*super().files, *factors, *(f.parent / CONFIG for f in factors)}))


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
        config = _read_config(path)
        factors = _factors(path, config, base)
    return AdaptedCheckpoint(ref, base.path, base.config, base.tensors, factors)


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, if it describes a plain LoRA."""
    file = contained(path, CONFIG)
    if not file.is_file():
        raise CheckpointError(f"{path} has no {CONFIG}; name a directory that PEFT saved an adapter into.")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {config.get('peft_type')!r} is not LORA; {REMEDY}.")
    used = [key for key in REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        used.append("init_lora_weights")
    if used:
        settings = ", ".join(f"{key} {shortened(config[key])}" for key in used)
        raise CheckpointError(f"{file}: {settings} makes it more than B A added to weights; {REMEDY}.")
    return config


def _factors(path: Path, config: Mapping[str, Any], base: Checkpoint) -> dict[str, Factors]:
    """Factors by name of the weight they are added to."""
    file = contained(path, WEIGHTS)
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {WEIGHTS}; pickled adapters are never opened, save it as safetensors."
        )
    pairs: dict[str, dict[str, TensorInfo]] = {}
    strange = []
    for name, info in read_header(file).items():
        match = KEY.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            pairs.setdefault(match["module"], {})[match["factor"] or match["embedding"]] = info
    if strange:
        raise CheckpointError(f"{file} holds more than LoRA factors ({some(strange)}); {REMEDY}.")
    _check_fit(file, pairs, base)
    return {f"{module}.weight": _pair(file, module, pair, config, base) for module, pair in pairs.items()}


def _check_fit(file: Path, pairs: Mapping[str, Mapping[str, TensorInfo]], base: Checkpoint) -> None:
    halves = [module for module, pair in pairs.items() if len(pair) < 2]
    if halves:
        raise CheckpointError(
            f"{file} has only one of the two factors of {some(halves)}; save the adapter again."
        )
    lost = [module for module in pairs if f"{module}.weight" not in base.tensors]
    if lost or not pairs:
        what = f"adapts {some(lost)}, which {base.ref} does not have" if lost else "adapts nothing"
        raise CheckpointError(f"{file} {what}; is it an adapter of another model?")
    tied = [m for m, pair in pairs.items() if "lora_embedding" in pair["A"].name]
    if tied and base.config.get("tie_word_embeddings", "lm_head.weight" not in base.tensors):
        raise CheckpointError(
            f"{file} adapts {tied[0]}, which {base.ref} ties to its head and cannot change alone; {REMEDY}."
        )


def _pair(
    file: Path, module: str, pair: Mapping[str, TensorInfo], config: Mapping[str, Any], base: Checkpoint
) -> Factors:
    """Factors of one module, their shapes, dtypes and rank checked."""
    a, b, weight = pair["A"], pair["B"], base.tensors[f"{module}.weight"]
    where = f"{file}, {module}"
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.numel:
        raise CheckpointError(f"{where}: factors of shape {a.shape} and {b.shape} do not multiply as B A.")
    if not {a.dtype, b.dtype, weight.dtype} <= FLOATS:
        raise CheckpointError(
            f"{where}: factors of {a.dtype} and {b.dtype} on a weight of {weight.dtype} cannot be folded; "
            "dequantise it first."
        )
    product = (b.shape[0], a.shape[1])
    if weight.shape not in (product, product[::-1]):
        raise CheckpointError(
            f"{where}: B A has shape {product}, the weight of {base.ref} {weight.shape}; wrong base?"
        )
    square = product == product[::-1]
    turned = bool(config.get("fan_in_fan_out")) or "lora_embedding" in a.name
    scale = _scale(where, module, a.shape[0], config)
    return Factors(a, b, scale, transposed=turned if square else weight.shape != product)


def _scale(where: str, module: str, rank: int, config: Mapping[str, Any]) -> float:
    """lora_alpha / r of a module, by the patterns that override both."""
    expected = _overridden(where, module, config, "rank_pattern", "r")
    alpha = _overridden(where, module, config, "alpha_pattern", "lora_alpha")
    if expected != rank:
        raise CheckpointError(
            f"{where}: its factors have rank {rank}, {CONFIG} says {expected:g}; save the adapter again."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _overridden(where: str, module: str, config: Mapping[str, Any], patterns: str, default: str) -> float:
    """The first pattern that ends the module's name, as PEFT matches them, else the default."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: {patterns} in {CONFIG} must map names to numbers.")
    value = next(
        (v for pattern, v in table.items() if _matches(f"{where}, {patterns}", pattern, module)),
        config.get(default, 8),
    )
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_SETTING:
        raise CheckpointError(f"{where}: {default} in {CONFIG} must be a number, but got {shortened(value)}.")
    return value


def shortened(value: Any) -> str:
    """A value of a file, at a length that fits into a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _matches(where: str, pattern: str, module: str) -> bool:
    """PEFT's rule; patterns that could take forever (they come from a file) are refused."""
    quantifiers = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > 500 or quantifiers > 2 or re.search(r"\)[*+?{]", pattern):
        raise CheckpointError(f"{where}: the pattern {pattern[:60]!r} in {CONFIG} is too complex; {REMEDY}.")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise CheckpointError(
            f"{where}: {pattern!r} in {CONFIG} is no regular expression ({error})."
        ) from error


class Product:
    """scale * B A of one weight, some of its rows at a time."""

    def __init__(self, weight: TensorInfo, factors: Factors) -> None:
        left, right = _read(factors.b), _read(factors.a)
        self._left: npt.NDArray[Any]
        self._left, right = (right.T, left.T) if factors.transposed else (left, right)
        self._right = _wide(right)
        self._weight, self._factors = weight, factors

    def add(self, base: npt.NDArray[Any], out: npt.NDArray[Any], row: int) -> None:
        """``out`` = ``base`` + scale * B A, both (k, in) from ``row`` on; CheckpointError if that is not finite."""
        delta = (_wide(self._left[row : row + len(base)]) @ self._right).astype(
            np.float64 if self._weight.dtype == "F64" else np.float32
        )
        delta *= delta.dtype.type(self._factors.scale)
        total = np.empty_like(delta)
        widen(base, total)
        total += delta
        largest = LARGEST_BF16 if self._weight.dtype == "BF16" else float(np.finfo(base.dtype).max)
        if not (np.abs(total, out=delta) <= largest).all():  # NaN fails too
            raise CheckpointError(
                f"{self._weight.file}, tensor {self._weight.name!r}: with adapter {self._factors.b.file} its values "
                f"are not finite or exceed {largest:g}; one of the two is broken."
            )
        narrow(total, out)


def _read(factor: TensorInfo) -> npt.NDArray[Any]:
    out = np.empty(factor.shape, np.dtype(NUMPY[factor.dtype]))
    read_into(factor.file, factor.start, out)
    return out


def _wide(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Part of a factor in float64; exact."""
    out = np.empty(array.shape, np.float64)
    widen(array, out)
    return out


def _fold(weight: TensorInfo, base: npt.NDArray[Any], factors: Factors) -> npt.NDArray[Any]:
    """W + scale * B A, a block of rows at a time."""
    product, out = Product(weight, factors), np.empty(base.shape, base.dtype)
    rows = max(1, CHUNK // base.shape[1])
    for row in range(0, base.shape[0], rows):
        product.add(base[row : row + rows], out[row : row + rows], row)
    return out
