"""Named copies of a model's trainable parameters, and averages of the two. It knows tensors and names; no training.

    symbol  meaning                                            shape
    w       the live parameters that train and are in scope    name -> any
    c       a copy of each, on its device, in its dtype        name -> the same

Every average is the one formula of kernel.py: c + alpha (w - c).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arma_mergekit.continual.settings import Scope
from arma_mergekit.errors import CheckpointError, RunError
from arma_mergekit.kernel import average
from arma_mergekit.roles import roles

__all__ = [
    "Copies", "Weights", "copies", "distance", "load", "overwrite", "pull", "save", "scoped", "swapped",
    "trainable",
]  # fmt: skip

Weights: TypeAlias = Mapping[str, Tensor]
Copies: TypeAlias = dict[str, Tensor]


def trainable(model: Any) -> Copies:
    """The parameters that train, by name; RunError if there are none, or if some are not here as whole tensors."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise RunError("The model has no trainable parameter; give it an adapter, or unfreeze it.")
    apart = [
        n for n, p in found.items() if p.is_meta or hasattr(p, "placements") or not p.is_floating_point()
    ]
    if apart:
        raise RunError(
            f"Parameter {apart[0]} is sharded, offloaded or quantised; merge whole floating-point ones only."
        )
    return found


def scoped(weights: Weights, scope: Scope) -> Copies:
    """Those in scope: all, or what is inside softmax attention by roles.py (an adapter's factors like their matrix)."""
    if scope == "all":
        return dict(weights)
    placed = roles(weights)
    found = {name: w for name, w in weights.items() if placed[name].attention}
    if not found:
        raise RunError(
            "No trainable parameter is inside attention, so scope attention has nothing to merge; use all."
        )
    return found


def copies(weights: Weights) -> Copies:
    """A copy of each, contiguous, on its own device."""
    return {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in weights.items()}


@torch.no_grad()
def overwrite(weights: Weights, values: Weights) -> None:
    """Give live parameters these values, in place."""
    for name, value in values.items():
        weights[name].copy_(value)


@torch.no_grad()
def pull(kept: Weights, weights: Weights, alpha: float) -> None:
    """c = c + alpha (w - c), in place; c may also be the live parameters and w the copies."""
    for name, c in kept.items():
        average(c.detach(), [weights[name].detach()], [alpha], out=c.detach())


@torch.no_grad()
def distance(kept: Weights, weights: Weights) -> float:
    """sum |w - c| over all elements."""
    each = [(weights[name].detach().float() - c.float()).abs().sum() for name, c in kept.items()]
    return float(torch.stack([part.to(each[0].device) for part in each]).sum(dtype=torch.float64).item())


@contextmanager
def swapped(weights: Weights, values: Weights) -> Iterator[None]:
    """Within the block the parameters have other values; afterwards their own again, bit for bit."""
    before = copies({name: weights[name] for name in values})
    overwrite(weights, values)
    try:
        yield
    finally:
        overwrite(weights, before)


def save(path: Path, tensors: Weights) -> None:
    """Write a safetensors file, whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        save_file(
            {name: t.detach().contiguous() for name, t in tensors.items()}, draft, metadata={"format": "pt"}
        )
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise RunError(f"Cannot write {path}: {error}. Make room, or give another --out.") from error


def load(path: Path) -> Copies:
    """What `save` wrote, on the CPU; CheckpointError if it cannot be read."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}; resume from an earlier checkpoint.") from error
