"""Which columns and rows of a weight C and R are: the draw of CURLoRA.

    p_j = ||W[:, j]||^2 / ||W||_F^2           (arXiv 2408.14572, eq. 2; rows likewise)
    inverted   q_j ~ 1 / (p_j + 0.001 / n)    (eq. 3)       uniform   q_j ~ 1       normal   q_j ~ p_j

    symbol   meaning                                                     shape
    W        the base's weight                                           (m, n)
    p, q     shares of the squared norm; probabilities of being drawn    (n,)

Drawn without replacement, and never a column that is all zero. The epsilon is relative to the mean 1/n: the released
code's 0.001 is absolute, and with n = 4096 it nearly cancels the inversion (odds of the likeliest to the least likely
column 2.8 instead of 92). `legacy` keeps that, with replacement and zero columns first. It knows one weight; no
modules or PEFT.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["draw"]

EPSILON = 1e-3  # of the mean share
LEGACY_EPSILON = 1e-3
Indices = npt.NDArray[np.int32]
Shares = npt.NDArray[np.float64]


def draw(
    weight: Tensor, r: int, sampling: str, legacy: bool, seed: int, name: str
) -> tuple[Indices, Indices]:
    """Rows (r,) and columns (r,) of a weight (m, n); ValueError if it has not so many that are not zero.

    Depends on the weight, the seed and the module's ``name``, not on what else is drawn.
    """
    entropy = [seed, zlib.crc32(name.encode())]
    # columns before rows, as the released code has it
    if legacy:
        old = np.random.RandomState(entropy)
        columns, rows = (_draw_legacy(shares(weight, dim), r, old) for dim in (0, 1))
        return rows, columns
    rng = np.random.default_rng(entropy)
    columns, rows = (
        _draw(shares(weight, dim), r, SAMPLINGS[sampling], rng, f"{name} has only {{}} {what}")
        for dim, what in ((0, "columns"), (1, "rows"))
    )
    return rows, columns


def shares(weight: Tensor, dim: int) -> Shares:
    """p of the columns (dim 0) or rows (dim 1)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    squared = torch.linalg.vector_norm(weight.detach(), dim=dim, dtype=wide).double().square()
    found: Shares = (squared / squared.sum()).cpu().numpy()
    return found


SAMPLINGS: dict[str, Callable[[Shares], Shares]] = {
    "inverted": lambda p: 1 / (p + EPSILON / len(p)),
    "uniform": np.ones_like,
    "normal": lambda p: p,
}


def _draw(
    p: Shares, r: int, odds: Callable[[Shares], Shares], rng: np.random.Generator, too_few: str
) -> Indices:
    usable = np.flatnonzero(p > 0)  # none where the weight is not finite
    if len(usable) < r:
        raise ValueError(f"{too_few.format(len(usable))} that are finite and not zero; choose r <= that.")
    q = odds(p)[usable]
    return np.sort(rng.choice(usable, r, replace=False, p=q / q.sum())).astype(np.int32)


def _draw_legacy(p: Shares, r: int, rng: np.random.RandomState) -> Indices:
    q = 1 / (p + LEGACY_EPSILON)
    return rng.choice(len(p), r, replace=True, p=q / q.sum()).astype(np.int32)
