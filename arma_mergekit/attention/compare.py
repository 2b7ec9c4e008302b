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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arma_mergekit.attention.formulas import divergence
from arma_mergekit.attention.layers import Inputs, Layer, Model, observed, run, stream
from arma_mergekit.errors import CheckpointError, DataError, RecipeError

__all__ = [
    "HeadDivergences",
    "by_head",
    "compare_rows",
    "divergence_by_head",
    "divergences",
    "over_heads",
    "over_queries",
    "query_positions",
    "visit",
]

Array = npt.NDArray[np.float64]
# query positions at a time: their rows stay in a processor's cache, and preparing the keys costs less than they do
BLOCK = 32


def divergences(
    student: Model, inputs: Inputs, teacher: Model | Iterable[Layer], metric: str = "js"
) -> dict[int, Tensor]:
    """Divergence (B, H) of each attention layer of one forward pass, summed over query positions: `compare_rows`."""
    return compare_rows(student, inputs, [teacher], divergence(metric))


def compare_rows(
    student: Model | Iterable[Layer],
    inputs: Inputs,
    teachers: Sequence[Model | Iterable[Layer]],
    measure: Callable[..., Tensor],
) -> dict[int, Tensor]:
    """A measure (..., B, H) of each attention layer of one forward pass, summed over query positions.

    ``student``, ``teachers``: models, run in lock-step, or the layers that `record` kept of them. ``measure``: from
    rows (B, H, t, S) of student and teachers to (..., B, H, t). Keys: depths of the layers; those without softmax
    attention (Mamba, linear attention) are absent, those that run several times have their heads once per run.
    Differentiable with respect to the student where gradients are on; the backward pass computes the probabilities
    again, so then, too, no more than a block of them exists. CheckpointError as of `visit`.
    """
    queries = query_positions(inputs)
    found: dict[int, list[Tensor]] = {}

    def consume(*layers: Layer) -> None:
        found.setdefault(layers[0].index, []).append(over_queries(measure, layers, queries))

    visit(student, inputs, teachers, consume)
    return {layer: torch.cat(runs, -1) for layer, runs in found.items()}


def visit(
    student: Model | Iterable[Layer],
    inputs: Inputs,
    teachers: Sequence[Model | Iterable[Layer]],
    consume: Callable[..., None],
) -> None:
    """Hand over each attention layer of the student's forward pass with its counterpart in each teacher.

    CheckpointError if no attention was seen, or a teacher's layers are of other shapes.
    """
    seen = False
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(stream(t, inputs) if callable(t) else _each(t)))
            for t in teachers
        ]

        def pair(layer: Layer) -> None:
            nonlocal seen
            seen = True
            consume(layer, *(_counterpart(layer, next(others, None)) for others in streams))

        if callable(student):
            with observed(pair):
                run(student, inputs)
        else:
            for layer in student:
                pair(layer)
    if not seen:
        raise CheckpointError(
            "No softmax attention was seen: the model has none (Mamba), or computes it in code of its own (Bloom, "
            "Falcon, GPT-J), or was not loaded with attn_implementation 'sdpa' or 'eager'."
        )


def _counterpart(layer: Layer, other: Layer | None) -> Layer:
    if other is None or other.query.shape[:3] != layer.query.shape[:3]:
        raise CheckpointError(
            f"Attention layer {layer.index} has no counterpart of its shape in the teacher; compare models of one "
            "architecture, on the same inputs."
        )
    return other


def _each(layers: Iterable[Layer]) -> Generator[Layer]:
    yield from layers


def query_positions(inputs: Inputs) -> Tensor:
    """Which query positions (B, T) count: no padding, and not a text's first, whose row is always 1.

    Packed texts start where ``position_ids`` are 0.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return mask & (mask.cumsum(1) > 1) & (inputs.get("position_ids", mask.cumsum(1)) > 0)


def over_queries(measure: Callable[..., Tensor], layers: Sequence[Layer], queries: Tensor) -> Tensor:
    """A measure (..., B, H) of rows of all ``layers``, summed over query positions, a block of them at a time."""
    length = layers[0].query.shape[2]

    def block(start: int) -> Tensor:
        stop = min(start + BLOCK, length)
        rows = measure(*(layer.rows(start, stop) for layer in layers))
        return rows.masked_fill(~queries[:, None, start:stop], 0).sum(-1)

    if torch.is_grad_enabled():
        block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([block(start) for start in range(0, length, BLOCK)]).sum(0)


def over_heads(by_layer: Mapping[int, Tensor], weights: Mapping[int, Tensor] | None = None) -> Tensor:
    """Mean (...) over layers and heads of values (..., H) by layer; ``weights``: (H,) by layer, as `head_weights`."""
    values = torch.cat(list(by_layer.values()), -1)
    if weights is None:
        return values.mean(-1)
    fitting = {layer: len(weights.get(layer, ())) == found.shape[-1] for layer, found in by_layer.items()}
    if not all(fitting.values()) or not any(weights[layer].any() for layer in fitting):
        odd = min(fitting, key=lambda layer: fitting[layer])
        raise RecipeError(
            f"Layer {odd} needs weights for its {by_layer[odd].shape[-1]} heads, not all of them zero everywhere, as "
            "attention.head_weights gives them."
        )
    w = torch.cat([weights[layer] for layer in by_layer]).to(values)
    return (values * w).sum(-1) / w.sum()


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
    return by_head(total, batches, student)


def by_head(total: Mapping[int, Tensor], batches: Iterable[Inputs], model: Any) -> HeadDivergences:
    """Sums (..., H) of each layer over all query positions as means (..., layers, heads).

    DataError without any, CheckpointError for sums that are not finite.
    """
    positions = sum(int(query_positions(inputs).sum()) for inputs in batches)
    if not positions:
        raise DataError("Attention can be compared on texts of at least two tokens only; give longer ones.")
    layers = tuple(sorted(total))
    if broken := [layer for layer in layers if not total[layer].isfinite().all()]:
        raise CheckpointError(
            f"The attention of layer {broken[0]} is not finite: weights hold NaN or infinity, or overflow in their "
            "dtype."
        )
    heads = max(found.shape[-1] for found in total.values())
    values = np.full((*total[layers[0]].shape[:-1], len(layers), heads), np.nan)
    for row, layer in enumerate(layers):
        values[..., row, : total[layer].shape[-1]] = total[layer].cpu().numpy() / positions
    depths = range(0 if -1 in layers else model.config.get_text_config().num_hidden_layers)
    return HeadDivergences(values, layers, tuple(sorted(set(depths) - set(layers))))
