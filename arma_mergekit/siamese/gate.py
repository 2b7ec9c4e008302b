"""The gate between two hidden states of the same token, and what is mixed by it.

    gate_t = sigmoid([q_M ; h_M,t ; h_M',t ; q_M'] W_A W_B)          full
    gate_t = sigmoid([h_M,t ; h_M',t] W_A W_B)                       no_query
    h_t    = gate_t * h_M,t + (1 - gate_t) * h_M',t

    symbol       meaning                                             shape            dtype
    h_M, h_M'    hidden states after the final norm: base, tuned     (B, T, d)        the model's
    q_M, q_M'    their means over the prompt                         (B, d)           float32
    W_A, W_B     what is trained; A.weight, B.weight transposed      (4d, r), (r, d)  float32
    gate         weight of the base, per token and channel           (B, T, d)        float32

Dropout follows each of the two products. Source: IMSM, arXiv 2412.17383. The published code starts W_B at random; here
it starts at zero, so an untrained gate is one half everywhere. It knows tensors; no models, prompts or caches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from arma_mergekit.siamese.config import SiameseConfig

__all__ = ["Gate", "mix"]


class Gate(nn.Module):
    """The gate of hidden states of ``width`` d."""

    def __init__(self, width: int, config: SiameseConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.width, self.sees_prompt, self.dropout = width, config.mode == "full", config.dropout
        inputs = (4 if self.sees_prompt else 2) * width
        self.A = nn.Linear(inputs, config.rank, bias=False, device=device, dtype=torch.float32)
        self.B = nn.Linear(config.rank, width, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.B.weight)

    def forward(self, base: Tensor, tuned: Tensor, query: tuple[Tensor, Tensor] | None) -> Tensor:
        """The gate (B, T, d) of h_M and h_M' (B, T, d); ``query``: q_M and q_M' (B, d), if it sees the prompt.

        The product of each block of W_A is taken alone, so that q passes once and nothing is concatenated.
        """
        blocks = torch.split(self.A.weight, self.width, 1)
        low = functional.linear(base.float(), blocks[-3 if self.sees_prompt else 0])
        low = low + functional.linear(tuned.float(), blocks[-2 if self.sees_prompt else 1])
        if query is not None:
            first, last = query
            low = low + (functional.linear(first, blocks[0]) + functional.linear(last, blocks[3]))[:, None]
        return torch.sigmoid(self._drop(self.B(self._drop(low))))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


def mix(gate: Tensor | float, base: Tensor, tuned: Tensor) -> Tensor:
    """``gate * base + (1 - gate) * tuned``, at least in float32, rounded once to their dtype.

    A gate of 1 or 0 gives the operand bit for bit; as a number it gives the operand itself.
    """
    if not isinstance(gate, Tensor) and gate in (0, 1):
        return base if gate else tuned
    wide = torch.promote_types(base.dtype, torch.float32)
    return (gate * base.to(wide) + (1 - gate) * tuned.to(wide)).to(base.dtype)
