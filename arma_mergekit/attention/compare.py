"""How far a model's attention is from a teacher's, by layer and head.

It knows models, texts and divergences; no tasks. With a and m the attention rows of student and teacher,

    D[l, h] = mean over texts and query positions q of d(a[l, h, q, :], m[l, h, q, :])

Padding is no query position, nor is a text's first, whose row is always 1. Two models run in lock-step, so that one
layer of each is in memory; a model is compared with its own earlier weights through the queries and keys it then had.
Regularising a merge by the divergence of attention is the idea of ARMA (GitHub leileicheng854/ARAM); rows, positions
and the choice of teacher are ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arma_mergekit.attention.formulas import Divergence, divergence
from arma_mergekit.attention.layers import Inputs, Layer, Model, observed, run, stream
from arma_mergekit.errors import CheckpointError, DataError

__all__ = ["HeadDivergences", "divergence_by_head", "divergences", "query_positions"]

Array = npt.NDArray[np.float64]
# query positions at a time: their rows stay in a processor's cache, and preparing the keys costs less than they do
BLOCK = 32


def divergences(
    student: Model, inputs: Inputs, teacher: Model | Iterable[Layer], metric: str = "js"
) -> dict[int, Tensor]:
    """Divergence (B, H) of each attention layer of one forward pass, summed over query positions.

    ``teacher``: another model, run in lock-step, or the layers that `record` kept of the same inputs. Keys: depths of
    the layers; those without softmax attention (Mamba, linear attention) are absent, those that run several times have
    their heads once per run. Differentiable with respect to the student where gradients are on; the backward pass
    computes the probabilities again, so then, too, no more than a block of them exists.
    CheckpointError if no attention was seen, or the teacher's layers are of other shapes.
    """
    distance, queries = divergence(metric), query_positions(inputs)
    found: dict[int, list[Tensor]] = {}

    def consume(layer: Layer) -> None:
        other = next(others, None)
        if other is None or other.query.shape[:3] != layer.query.shape[:3]:
            raise CheckpointError(
                f"Attention layer {layer.index} has no counterpart of its shape in the teacher; compare models of one "
                "architecture, on the same inputs."
            )
        found.setdefault(layer.index, []).append(_compare(distance, layer, other, queries))

    counterparts = stream(teacher, inputs) if callable(teacher) else _each(teacher)
    with contextlib.closing(counterparts) as others, observed(consume):
        run(student, inputs)
    if not found:
        raise CheckpointError(
            "No softmax attention was seen: the model has none (Mamba), or computes it in code of its own (Bloom, "
            "Falcon, GPT-J), or was not loaded with attn_implementation 'sdpa' or 'eager'."
        )
    return {layer: torch.cat(runs, 1) for layer, runs in found.items()}


def _each(layers: Iterable[Layer]) -> Generator[Layer]:
    yield from layers


def query_positions(inputs: Inputs) -> Tensor:
    """Which query positions (B, T) count: no padding, and not a text's first, whose row is always 1."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return mask.bool() & (mask.cumsum(1) > 1)


def _compare(distance: Divergence, student: Layer, teacher: Layer, queries: Tensor) -> Tensor:
    """Divergence (B, H) of a layer, summed over the query positions, a block of them at a time."""
    length = student.query.shape[2]

    def block(start: int) -> Tensor:
        stop = min(start + BLOCK, length)
        rows = distance(student.rows(start, stop), teacher.rows(start, stop))
        return rows.masked_fill(~queries[:, None, start:stop], 0).sum(-1)

    if torch.is_grad_enabled():
        block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([block(start) for start in range(0, length, BLOCK)]).sum(0)


@dataclass(frozen=True)
class HeadDivergences:
    """``values`` (layers, heads): mean divergence per query position; NaN where a layer has fewer heads.

    ``layers``: the depth of each row, -1 for a block that several layers share (Zamba). ``skipped``: depths without
    softmax attention, of which nothing is known; left empty if some share a block.
    """

    values: Array
    layers: tuple[int, ...]
    skipped: tuple[int, ...]


@torch.no_grad()
def divergence_by_head(
    student: Any, teacher: Model | Sequence[Sequence[Layer]], batches: Sequence[Inputs], metric: str = "js"
) -> HeadDivergences:
    """Divergence of each head, mean over the query positions of all batches.

    ``student``: a transformers model. ``teacher``: another, run in lock-step, or what `record` returned for each batch
    when the same model had other weights.
    """
    total: dict[int, Tensor] = {}
    for number, inputs in enumerate(batches):
        other = teacher if callable(teacher) else teacher[number]
        for layer, found in divergences(student, inputs, other, metric).items():
            total[layer] = total.get(layer, 0) + found.sum(0).double()
    positions = sum(int(query_positions(inputs).sum()) for inputs in batches)
    if not positions:
        raise DataError("Attention can be compared on texts of at least two tokens only; give longer ones.")
    layers = tuple(sorted(total))
    values = np.full((len(layers), max(map(len, total.values()))), np.nan)
    for row, layer in zip(values, layers, strict=True):
        row[: len(total[layer])] = total[layer].cpu().numpy() / positions
    depths = range(0 if -1 in layers else student.config.get_text_config().num_hidden_layers)
    return HeadDivergences(values, layers, tuple(sorted(set(depths) - set(layers))))
