"""Where two models differ: weights tensor by tensor from their files, attention head by head on texts.

It knows checkpoints, roles and texts; no alphas, markup or terminals. Weights are streamed with numpy, a megabyte at a
time; torch and transformers are loaded for attention only.

    r(G) = sqrt(sum over G of ||W_ft - W_base||^2 / sum over G of ||W_base||^2)        relative change
    s(G) = sum over G of ||W_ft - W_base||^2 / the same sum over all tensors           share of the change

G: any group of tensors, as a projection in a layer. Norms are Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint
from arma_mergekit.checkpoint.header import FLOATS
from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import CHUNK, widen
from arma_mergekit.roles import Role, roles

if TYPE_CHECKING:
    from arma_mergekit.attention import HeadDivergences

__all__ = [
    "AttentionDifference",
    "Change",
    "WeightDifference",
    "attention_difference",
    "relative",
    "summary",
    "weight_difference",
]


@dataclass(frozen=True)
class Change:
    """A tensor of both models: squared norms of its difference and of the base's."""

    role: Role
    numel: int
    difference: float
    base: float


@dataclass(frozen=True)
class WeightDifference:
    """``changes`` by name; ``apart``: tensors that could not be compared, and why."""

    changes: Mapping[str, Change]
    apart: Mapping[str, str]


def relative(changes: Iterable[Change]) -> float | None:
    """Relative change of a group; None if its base is all zero and its difference is not, or the group is empty."""
    found = list(changes)
    moved, base = (math.fsum(getattr(c, side) for c in found) for side in ("difference", "base"))
    if not found or (moved and not base):
        return None
    return math.sqrt(moved / base) if base else 0.0


def weight_difference(base: Checkpoint, tuned: Checkpoint) -> WeightDifference:
    """Compare every tensor; CheckpointError for values that are not finite."""
    placed = roles(base.tensors, base.config)
    apart = dict.fromkeys(base.tensors.keys() - tuned.tensors.keys(), "in the base only")
    apart |= dict.fromkeys(tuned.tensors.keys() - base.tensors.keys(), "in the fine-tuned model only")
    changes = {}
    for name in sorted(base.tensors.keys() & tuned.tensors.keys()):
        ours, theirs = base.tensors[name], tuned.tensors[name]
        if ours.shape != theirs.shape:
            apart[name] = (
                f"shape {list(ours.shape)} in the base, {list(theirs.shape)} in the fine-tuned model"
            )
        elif not {ours.dtype, theirs.dtype} <= FLOATS:
            apart[name] = f"{ours.dtype} and {theirs.dtype} are not compared"
        else:
            changes[name] = _change(name, placed[name], base, tuned)
    return WeightDifference(changes, dict(sorted(apart.items())))


def _change(name: str, role: Role, base: Checkpoint, tuned: Checkpoint) -> Change:
    # an adapter leaves most tensors alone: then both names lead to the same bytes
    adapted = any(isinstance(c, AdaptedCheckpoint) and name in c.factors for c in (base, tuned))
    same = base.tensors[name] == tuned.tensors[name] and not adapted
    difference, norm = _squares(base.read(name), None if same else tuned.read(name))
    if not math.isfinite(difference + norm):
        files = " or ".join(sorted({str(c.tensors[name].file) for c in (base, tuned)}))
        raise CheckpointError(
            f"{files}, tensor {name!r}: NaN or infinite values; download it again or retrain."
        )
    return Change(role, base.tensors[name].numel, difference, norm)


def _squares(base: npt.NDArray[Any], tuned: npt.NDArray[Any] | None) -> tuple[float, float]:
    """||tuned - base||^2 and ||base||^2 of arrays of any shape, bf16 as its bits; None: the base itself."""
    operands = [base.reshape(-1)] + ([] if tuned is None else [tuned.reshape(-1)])
    wide = np.float64 if any(array.dtype.itemsize > 2 for array in operands) else np.float32
    buffers = np.empty((2, min(base.size, CHUNK)), wide)
    difference = norm = 0.0
    for start in range(0, base.size, CHUNK):
        parts = [array[start : start + CHUNK] for array in operands]
        a, b = buffers[:, : parts[0].size]
        for part, buffer in zip(parts, (a, b), strict=False):
            widen(part, buffer)
        norm += float(a @ a)
        if tuned is not None:
            b -= a
            difference += float(b @ b)
    return difference, norm


@dataclass(frozen=True)
class AttentionDifference:
    """Divergence of the fine-tuned model's attention from the base's; of how many texts and tokens."""

    metric: str
    texts: int
    tokens: int
    heads: HeadDivergences


def attention_difference(
    base: str, tuned: str, text: str, metric: str = "js", field: str = "text", max_tokens: int = 2048
) -> AttentionDifference:
    """By head, on the texts of a file (JSONL, parquet, .txt, or builtin:prose) within ``max_tokens``.

    ``base``, ``tuned``: references, with adapters too. One model is in memory, and the base's queries and keys.
    """
    import torch

    from arma_mergekit.attention import divergence, divergence_by_head, record
    from arma_mergekit.evals.rows import Limits
    from arma_mergekit.evals.tasks import text_items
    from arma_mergekit.load import load_live, load_tokenizer
    from arma_mergekit.recipe import Recipe

    divergence(metric)
    recipe = Recipe.parse(
        {"merge_method": "arma", "base_model": base, "models": [{"model": tuned}]}, Path("inspect")
    )
    tokenizer, loaded = load_tokenizer(recipe), load_live(recipe)
    limits = Limits(loaded.max_positions, loaded.vocabulary)
    items = text_items(tokenizer, recipe.data_path(Path(text)), field, max_tokens, limits=limits)
    batches = [
        {"input_ids": torch.tensor([item.rows[0].tokens], device=loaded.live.device)} for item in items
    ]
    kept = [record(loaded.live.model, inputs) for inputs in batches]
    loaded.live.set_all(1.0)
    heads = divergence_by_head(loaded.live.model, kept, batches, metric)
    return AttentionDifference(metric, len(items), sum(b["input_ids"].numel() for b in batches), heads)


def summary(
    base: Checkpoint, tuned: Checkpoint, weights: WeightDifference, attention: AttentionDifference | None
) -> dict[str, Any]:
    """Everything as plain data for JSON, tables and pages; None where a number is not defined."""
    changes = list(weights.changes.values())
    total = math.fsum(c.difference for c in changes)
    groups: dict[tuple[bool, str, str], list[Change]] = {}
    stacks: dict[str, list[Change]] = {}
    for change in changes:
        role = change.role
        groups.setdefault((not role.attention, role.stack, role.part), []).append(change)
        stacks.setdefault(role.stack, []).append(change)
    return {
        "base": base.ref,
        "finetuned": tuned.ref,
        "model": (base.config.get("architectures") or [base.config.get("model_type", "model")])[0],
        "tensors": len(changes),
        "changed": sum(c.difference > 0 for c in changes),
        "parameters": sum(c.numel for c in changes),
        "relative_change": relative(changes),
        "layers": [{"stack": stack, "relative_change": _by_layer(found)} for stack, found in stacks.items()],
        "projections": [
            {
                "part": part, "attention": not rest, "stack": stack, "tensors": len(found),
                "parameters": sum(c.numel for c in found), "relative_change": relative(found),
                "share_of_change": math.fsum(c.difference for c in found) / total if total else 0.0,
                "by_layer": _by_layer(found),
            }
            for (rest, stack, part), found in groups.items()
        ],
        "by_tensor": {name: relative([change]) for name, change in weights.changes.items()},
        "not_compared": dict(weights.apart),
        "attention": None if attention is None else _of_heads(attention),
    }  # fmt: skip


def _by_layer(changes: Sequence[Change]) -> list[float | None]:
    """Relative change of each layer, from 0; None where the group has nothing there."""
    rows: dict[int, list[Change]] = {}
    for change in changes:
        if change.role.layer is not None:
            rows.setdefault(change.role.layer, []).append(change)
    return [relative(rows.get(layer, ())) for layer in range(1 + max(rows, default=-1))]


def _of_heads(found: AttentionDifference) -> dict[str, Any]:
    values = found.heads.values
    return {
        "metric": found.metric,
        "texts": found.texts,
        "tokens": found.tokens,
        "layers": list(found.heads.layers),
        "skipped": list(found.heads.skipped),
        "by_head": [[float(v) for v in row if not math.isnan(v)] for row in values],
        "by_layer": [float(v) for v in np.nanmean(values, 1)],
        "mean": float(np.nanmean(values)),
    }
