"""Which heads to watch: SEEKR's importance (arXiv 2411.06171), to weigh a divergence by head.

It knows two models and texts; no alphas. A head matters if fine-tuning moved it and if the loss feels it:

    I[l, h] = F[l, h] * S[l, h]
    F[l, h] = mean over texts and query positions q of sum_j (a_base[l, h, q, j] - a_ft[l, h, q, j])^2
    S[l, h] = the same mean of sum_j (dL / da_base[l, h, q, j])^2

    symbol   meaning                                       unit
    a        attention rows of base and fine-tuned
    L        negative log-likelihood of a text, the base's  nats
    j        keys that q sees

With o = a v the output of a head, dL/da[q, j] = <dL/do[q], v[j]>: no probabilities enter the graph, and any attention
function will do. SEEKR weighs the past tasks of a model that goes on learning; one base and one fine-tune is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arma_mergekit.attention.compare import BLOCK, divergences, query_positions
from arma_mergekit.attention.layers import Inputs, Layer, Model, observed

__all__ = ["head_importance", "head_weights"]

Teacher = Model | Sequence[Sequence[Layer]]


def head_weights(
    base: Any, finetuned: Teacher, batches: Sequence[Inputs], share: float = 0.25
) -> dict[int, Tensor]:
    """1 for the share of heads with the largest importance, else 0: (H,) by layer, for `over_heads`."""
    importance = head_importance(base, finetuned, batches)
    everyone = torch.cat(list(importance.values()))
    least = everyone.topk(max(1, math.ceil(share * len(everyone)))).values[-1]
    return {layer: (values >= least).float() for layer, values in importance.items()}


def head_importance(base: Any, finetuned: Teacher, batches: Sequence[Inputs]) -> dict[int, Tensor]:
    """Importance (H,) of the heads of each layer.

    ``base``: a transformers model, its gradients are left alone. ``finetuned``: another, or what `record` returned for
    each batch when the same model had other weights. Both without dropout.
    """
    moved: dict[int, Tensor] = {}
    felt: dict[int, Tensor] = {}
    for number, inputs in enumerate(batches):
        other = finetuned if callable(finetuned) else finetuned[number]
        with torch.no_grad():
            found = divergences(base, inputs, other, "mse")
        for total, new in ((moved, found), (felt, _squared_slopes(base, inputs))):
            for layer, values in new.items():
                total[layer] = total.get(layer, 0) + values.sum(0).double()
    positions = sum(int(query_positions(inputs).sum()) for inputs in batches)
    return {layer: moved[layer] * felt[layer] / positions**2 for layer in moved}


def _squared_slopes(model: Any, inputs: Inputs) -> dict[int, Tensor]:
    """Sums (B, H) over query positions and the keys they see of (dL/da)^2."""
    queries = query_positions(inputs)
    # no padding is predicted, and nothing from padding
    labels = inputs["input_ids"].masked_fill(~queries, -100)
    found: dict[int, list[Tensor]] = {}

    def hook(layer: Layer, value: Tensor, output: Tensor) -> None:
        def add(slope: Tensor) -> None:
            # the backward pass comes to the runs of a shared layer from the last to the first
            found.setdefault(layer.index, []).insert(0, _in_blocks(layer, value, slope, queries))

        output.register_hook(add)  # type: ignore[no-untyped-call]

    with torch.enable_grad(), _leaf(model) as embedded, observed(lambda _: None, after=hook):
        loss = model(**inputs, labels=labels, use_cache=False).loss * int((labels[:, 1:] != -100).sum())
        torch.autograd.grad(loss, embedded)
    return {layer: torch.cat(found[layer], -1) for layer in sorted(found)}


@contextmanager
def _leaf(model: Any) -> Iterator[list[Tensor]]:
    """The embedded texts of the next forward pass (a list, then of one), which gradients reach whatever is frozen."""
    embedded: list[Tensor] = []

    def tap(_: Any, __: Any, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(tap)
    try:
        yield embedded
    finally:
        handle.remove()


@torch.no_grad()
def _in_blocks(layer: Layer, value: Tensor, slope: Tensor, queries: Tensor) -> Tensor:
    """Sum (B, H) of <dL/do[q], v[j]>^2, from ``value`` (B, heads of keys, S, d) and ``slope`` dL/do (B, T, H, d)."""
    value = value.float().repeat_interleave(slope.shape[2] // value.shape[1], 1)
    total = torch.zeros(slope.shape[0], slope.shape[2], device=slope.device)
    for start in range(0, slope.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, slope.shape[1]))
        seen = layer.rows(part.start, part.stop) > 0
        keys = value[:, :, : seen.shape[-1]].transpose(2, 3)
        squared = (slope[:, part].float().transpose(1, 2) @ keys).square() * seen
        total += squared.sum(-1).masked_fill(~queries[:, None, part], 0).sum(-1)
    return total
