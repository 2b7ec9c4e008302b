"""How far apart attention probabilities are: five divergences of rows, and the four of ARMA's script.

It knows tensors only. Rows are compared position by position:

    symbol   meaning                                             shape
    a        attention rows of the student (the candidate)       (..., S) float32, sum to 1, to less with a sink
    m        attention rows of the teacher (base or fine-tuned)  (..., S) float32
    d(a, m)  one of `DIVERGENCES`                                (...)

Keys that a row does not see have probability 0 and change nothing. The script (`model_merge_optimizer`, GitHub
leileicheng854/ARAM) takes all of a layer's (B, H, T, S) to one number, after averaging over the batch: `LEGACY`. There
a text's first position and the padding count, and rows of different texts are mixed; kept for comparison only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from arma_mergekit.errors import RecipeError, unknown

__all__ = [
    "DIVERGENCES",
    "LEGACY",
    "Divergence",
    "cosine",
    "divergence",
    "emd",
    "js",
    "kl",
    "legacy_cosine",
    "legacy_emd",
    "legacy_kl",
    "legacy_mse",
    "mse",
]

Divergence = Callable[[Tensor, Tensor], Tensor]
TINY = torch.finfo(torch.float32).tiny


def js(a: Tensor, m: Tensor) -> Tensor:
    """Jensen-Shannon divergence KL(a || c) / 2 + KL(m || c) / 2 with c = (a + m) / 2; nats, symmetric, in [0, ln 2].

    As ln(a / c) = log1p(u), ln(m / c) = log1p(-u) with u = (a - m) / (a + m): exact also where a and m nearly agree.
    """
    # the bound keeps u = -1 (a underflowed) finite, at an error below 1e-6
    u = ((a - m) / (a + m).clamp_min(TINY)).clamp(-1 + 1e-7, 1 - 1e-7)
    return (a * u.log1p() + m * (-u).log1p()).sum(-1) / 2


def kl(a: Tensor, m: Tensor) -> Tensor:
    """KL(m || a) = sum_j m ln(m / a) + a - m; nats, not symmetric, >= 0, unbounded.

    The last two terms vanish where rows sum to 1, and keep it >= 0 where a sink takes its share.
    """
    ratio = a.clamp_min(TINY) / m.clamp_min(TINY)
    return (a - m - m * ratio.log()).sum(-1)


def mse(a: Tensor, m: Tensor) -> Tensor:
    """Squared error sum_j (a - m)^2; symmetric, in [0, 2]. Summed: a mean would depend on the padding of the batch."""
    return (a - m).square().sum(-1)


def cosine(a: Tensor, m: Tensor) -> Tensor:
    """1 - cos(a, m) = ||a / ||a|| - m / ||m||||^2 / 2; symmetric, in [0, 1]."""
    unit = partial(torch.nn.functional.normalize, dim=-1)
    return (unit(a) - unit(m)).square().sum(-1) / 2


def emd(a: Tensor, m: Tensor) -> Tensor:
    """Earth mover's distance along the text, sum_j |CDF_a(j) - CDF_m(j)|; key positions, symmetric, in [0, S - 1].

    Rows are scaled to sum to 1 first, which matters only where a sink takes its share.
    """
    whole = partial(torch.nn.functional.normalize, p=1, dim=-1)
    return (whole(a) - whole(m)).cumsum(-1).abs().sum(-1)


def legacy_mse(a: Tensor, m: Tensor) -> Tensor:
    """mean((a - m)^2) over heads, queries and keys; symmetric, in [0, 1]."""
    return (a.mean(0) - m.mean(0)).square().mean()


def legacy_cosine(a: Tensor, m: Tensor) -> Tensor:
    """1 - cos of the two layers as one vector each; symmetric, in [0, 1]."""
    return 1 - torch.nn.functional.cosine_similarity(a.mean(0).flatten(), m.mean(0).flatten(), dim=0)


def legacy_emd(a: Tensor, m: Tensor) -> Tensor:
    """1-Wasserstein distance of the two multisets of probabilities; symmetric, in [0, 1], blind to positions."""
    return (a.mean(0).flatten().sort().values - m.mean(0).flatten().sort().values).abs().mean()


def legacy_kl(a: Tensor, m: Tensor) -> Tensor:
    """KL(softmax(m) || softmax(a)) of a second softmax over keys, summed over queries, mean over heads; nats, >= 0."""
    a, m = a.mean(0).log_softmax(-1), m.mean(0).log_softmax(-1)
    return torch.nn.functional.kl_div(a, m, reduction="batchmean", log_target=True)


DIVERGENCES: Mapping[str, Divergence] = {"js": js, "kl": kl, "mse": mse, "cosine": cosine, "emd": emd}
LEGACY: Mapping[str, Divergence] = {
    "legacy_mse": legacy_mse,
    "legacy_cosine": legacy_cosine,
    "legacy_emd": legacy_emd,
    "legacy_kl": legacy_kl,
}


def divergence(name: str) -> Divergence:
    """A divergence of `DIVERGENCES`; RecipeError if there is none of this name."""
    if name not in DIVERGENCES:
        raise RecipeError(unknown("divergence", name, DIVERGENCES))
    return DIVERGENCES[name]
