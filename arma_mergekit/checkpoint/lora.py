"""The LoRA format: what a directory that PEFT saved adds to each weight.

    L M = B A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

    symbol   meaning                                       shape
    A, B     lora_A, lora_B (lora_embedding_A, _B alike)   (r, in), (out, r); their product transposed for Conv1D

Source: LoRA (arXiv 2106.09685; rank-stabilised: 2312.03732), files as PEFT 0.21 saves them. What PEFT would compute
differently (DoRA, saved modules, initialisations that change the base) is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint.header import FLOATS, TensorInfo
from arma_mergekit.checkpoint.lowrank import (
    CONFIG,
    REMEDY,
    Left,
    number,
    read,
    shortened,
    tensors_in,
    wide,
)
from arma_mergekit.checkpoint.model import Checkpoint, some
from arma_mergekit.errors import CheckpointError

__all__ = ["LoRAFactors", "check_config", "factors"]

KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
MOST_PATTERNS = 10_000  # each is tried on each module
PLAIN_INIT = (True, False, None, "gaussian", "eva")  # those that leave the base's weights as they are
# what is a Conv1D in transformers: PEFT turns the product there whatever the config's flag says, which is only that of
# the last module it wrapped (GPT-2 with its head adapted too: false)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
# options of PEFT's LoraConfig under which W + scale * B A is not what the adapter computes
REFUSED = (
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class LoRAFactors:
    """``scale * B A``, transposed if ``transposed``."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """B and A."""
        return self.b, self.a

    def matrices(self, weight: TensorInfo) -> tuple[Left, npt.NDArray[np.float64]]:
        """B and A, or A^T and B^T."""
        left, right = read(self.b), read(self.a)
        if self.transposed:
            left, right = right.T, left.T
        return lambda base, row: left[row : row + len(base)], wide(right)


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError unless it describes a plain LoRA."""
    used = [key for key in REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        used.append("init_lora_weights")
    if used:
        settings = ", ".join(f"{key} {shortened(config[key])}" for key in used)
        raise CheckpointError(f"{file}: {settings} makes it more than B A added to weights; {REMEDY}.")


def factors(path: Path, config: Mapping[str, Any], base: Checkpoint) -> dict[str, LoRAFactors]:
    """Factors by name of the weight they are added to."""
    file, tensors = tensors_in(path)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    strange = []
    for name, info in tensors.items():
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
) -> LoRAFactors:
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
    turned = _is_turned(module, config, base) or "lora_embedding" in a.name
    scale = _scale(where, module, a.shape[0], config)
    return LoRAFactors(a, b, scale, transposed=turned if square else weight.shape != product)


def _is_turned(module: str, config: Mapping[str, Any], base: Checkpoint) -> bool:
    """Whether a module holds its weight as (in, out): by what it is, in a model that is known to have such."""
    if base.config.get("model_type") in CONV1D_MODELS:
        return module.rpartition(".")[2] in CONV1D
    return bool(config.get("fan_in_fan_out"))


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
    if len(table) > MOST_PATTERNS:
        raise CheckpointError(
            f"{where}: {patterns} in {CONFIG} has {len(table):,} patterns, more than {MOST_PATTERNS:,}; {REMEDY}."
        )
    value = next(
        (v for pattern, v in table.items() if _matches(f"{where}, {patterns}", pattern, module)),
        config.get(default, 8),
    )
    return number(where, default, value)


def _matches(where: str, pattern: str, module: str) -> bool:
    """PEFT's rule."""
    try:
        return _compiled(pattern).match(module) is not None
    except ValueError as error:
        raise CheckpointError(f"{where}: {pattern[:60]!r} in {CONFIG} {error}.") from error


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """ValueError for what could take forever, since it comes from a file, or is no expression."""
    quantifiers = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > 500 or quantifiers > 2 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"is too complex a pattern; {REMEDY}")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"is no regular expression ({error})") from error
