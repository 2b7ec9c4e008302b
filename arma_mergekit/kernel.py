"""The formula, written once: ``W = W_base + sum_i alpha_i * (W_i - W_base)``.

It knows tensors and numbers; no names, files or models. torch and numpy run the same three operations in the
same order and so give the same bits (no fused multiply-add, one rounding at the end):

    d = W_i - W_base;  d = d * alpha_i;  r = r + d          r starts as W_base

    symbol   meaning                                     dtype
    W_base   the base model's tensor                     bf16, f16, f32 or f64, any shape
    W_i      the i-th fine-tuned model's tensor          likewise; may differ from the base's
    alpha_i  weight of the i-th fine-tuned model         0 = base, 1 = fine-tuned, any finite number

Arithmetic is one step wider than the operands: float32 for 16-bit ones, float64 when any is float32 or float64.
Alphas are rounded to 7 decimals first, which undoes the noise of mergekit's interpolation of lists over depth. When
all alphas are 0 the base itself comes back, and when one is 1 and the others 0 that fine-tuned tensor itself: bit for
bit, no copy, no conversion.

numpy has no bfloat16, so there a bf16 array is passed as its bits, ``uint16``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from arma_mergekit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHUNK",
    "average",
    "average_block",
    "average_numpy",
    "narrow",
    "one_thread",
    "round_alpha",
    "scratch",
    "sole_operand",
    "widen",
]

CHUNK = 1 << 18  # elements: three float32 buffers of 1 MiB stay in a core's cache
LARGEST_BF16 = 3.3895313892515355e38


def round_alpha(alpha: float) -> float:
    """Alpha as the arithmetic sees it: 7 decimals."""
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, but got {alpha}.")
    return round(float(alpha), 7)


def sole_operand(alphas: Sequence[float]) -> int | None:
    """Which operand the average equals exactly: -1 the base, i the i-th fine-tuned one, None neither."""
    used = [(i, a) for i, a in enumerate(map(round_alpha, alphas)) if a != 0]
    if not used:
        return -1
    return used[0][0] if len(used) == 1 and used[0][1] == 1 else None


def _add_delta(xp: Any, before: Any, base: Any, other: Any, alpha: float, scratch: Any, out: Any) -> None:
    """The formula: ``out = before + alpha * (other - base)`` on wide buffers; ``xp`` is numpy or torch."""
    xp.subtract(other, base, out=scratch)
    xp.multiply(scratch, alpha, out=scratch)
    xp.add(before, scratch, out=out)


def _check_finite(lowest: float, highest: float, largest: float) -> None:
    if not (lowest >= -largest and highest <= largest):  # NaN fails both comparisons
        raise CheckpointError(
            f"The average is not finite: its values span {lowest:g} to {highest:g} and the dtype holds up to "
            f"{largest:g}; an input has NaN, infinite or far too large weights."
        )


def _used(tuned: Sequence[Any], alphas: Sequence[float]) -> list[tuple[Any, float]]:
    """The operands that count, with their alphas as the arithmetic sees them."""
    rounded = [round_alpha(a) for a in alphas]
    return [(t, a) for t, a in zip(tuned, rounded, strict=True) if a != 0]


def average(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    alphas: Sequence[float],
    *,
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Average tensors of one shape and device; inputs are borrowed and never written to.

    Returns ``out`` (contiguous) if given, else the sole operand itself where the alphas allow it, else a new tensor
    of the base's dtype. ``check`` raises CheckpointError on a result that is not finite.
    """
    import torch

    if any(t.shape != base.shape for t in tuned):
        raise ValueError(f"Shapes must agree, but got {[tuple(t.shape) for t in (base, *tuned)]}.")
    only = sole_operand(alphas)
    if only is not None:
        operand = base if only < 0 else tuned[only]
        return operand if out is None else out.copy_(operand)
    if not all(t.is_floating_point() for t in (base, *tuned)):
        raise ValueError(f"Only floating-point tensors can be averaged, but got {base.dtype}.")
    if out is None:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
    wide = torch.float64 if any(t.dtype.itemsize > 2 for t in (base, *tuned)) else torch.float32
    used = [(t.reshape(-1), a) for t, a in _used(tuned, alphas)]
    flat, result, largest = base.reshape(-1), out.view(-1), torch.finfo(out.dtype).max
    size = min(base.numel(), CHUNK if base.device.type == "cpu" else CHUNK << 6)
    buffers = torch.empty(4, size, dtype=wide, device=base.device)
    for start in range(0, base.numel(), size or 1):
        part = slice(start, min(start + size, base.numel()))
        origin, other, scratch, total = buffers[:, : part.stop - start]
        origin.copy_(flat[part])
        before = origin
        for tensor, alpha in used:
            other.copy_(tensor[part])
            _add_delta(torch, before, origin, other, alpha, scratch, out=total)
            before = total
        if check:
            lowest, highest = torch.aminmax(total)
            _check_finite(float(lowest), float(highest), largest)
        result[part].copy_(total)
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: one is enough for the kernel's cached steps, and two that share a core spin.

    Two cores, one of them busy elsewhere, 50 M bf16 elements: 0.1 s with one thread, 3 to 12 s with two.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def average_numpy(
    base: np.ndarray[Any, Any],
    tuned: Sequence[np.ndarray[Any, Any]],
    alphas: Sequence[float],
    *,
    check: bool = True,
) -> np.ndarray[Any, Any]:
    """`average` for numpy arrays of one shape; bf16 as its bits (``uint16``), for every operand alike."""
    if any(t.shape != base.shape for t in tuned):
        raise ValueError(f"Shapes must agree, but got {[t.shape for t in (base, *tuned)]}.")
    only = sole_operand(alphas)
    if only is not None:
        return base if only < 0 else tuned[only]
    out = np.empty(base.shape, base.dtype)
    flat, result, others = base.reshape(-1), out.reshape(-1), [t.reshape(-1) for t in tuned]
    buffers = scratch(min(base.size, CHUNK), base, *tuned)
    for start in range(0, base.size, CHUNK):
        part = slice(start, start + CHUNK)
        average_block(flat[part], [t[part] for t in others], alphas, result[part], buffers, check=check)
    return out


def scratch(size: int, *operands: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Buffers (3, size) for `average_block` of such operands."""
    return np.empty((3, size), np.float64 if any(t.dtype.itemsize > 2 for t in operands) else np.float32)


def average_block(
    base: np.ndarray[Any, Any],
    tuned: Sequence[np.ndarray[Any, Any]],
    alphas: Sequence[float],
    out: np.ndarray[Any, Any],
    buffers: np.ndarray[Any, Any],
    *,
    check: bool = True,
) -> None:
    """`average_numpy` of at most `CHUNK` elements (n,), into ``out``; buffers from `scratch` make nothing new."""
    origin, other, total = buffers[:, : base.size]
    widen(base, origin)
    used = _used(tuned, alphas)
    before = origin
    with np.errstate(over="ignore", invalid="ignore"):  # `check` says it in words
        for tensor, alpha in used:
            widen(tensor, other)
            after = origin if len(used) == 1 else total  # several models need the origin to the end
            _add_delta(np, before, origin, other, alpha, other, out=after)
            before = after
        if check and base.size:
            largest = LARGEST_BF16 if out.dtype == np.uint16 else float(np.finfo(out.dtype).max)
            _check_finite(float(before.min()), float(before.max()), largest)
        narrow(before, out, other)


def widen(source: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Exact conversion to the arithmetic's dtype; a bf16 is the upper half of a float32."""
    if source.dtype != np.uint16:
        out[:] = source
    elif out.dtype == np.float32:
        bits = out.view(np.uint32)
        bits[:] = source
        bits <<= 16
    else:
        out[:] = (source.astype(np.uint32) << 16).view(np.float32)


def narrow(
    source: np.ndarray[Any, Any], out: np.ndarray[Any, Any], spare: np.ndarray[Any, Any] | None = None
) -> None:
    """Rounding to nearest even, into ``out``; ``spare``, like the source, is overwritten."""
    if out.dtype != np.uint16:
        # to half through float32, which rounds twice, because torch does
        out[:] = source.astype(np.float32) if out.itemsize < source.itemsize // 2 else source
        return
    bits = source.astype(np.float32, copy=False).view(np.uint32)
    same = spare is not None and spare.dtype == np.float32
    rounded = spare.view(np.uint32) if spare is not None and same else np.empty_like(bits)
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    np.copyto(out, rounded, casting="unsafe")
