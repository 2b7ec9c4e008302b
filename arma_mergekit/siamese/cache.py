"""What a siamese model remembers of the tokens it has seen: two caches, and the prompt's mean hidden states.

    q = sum over prompt tokens of h / their number

    symbol    meaning                                                            shape        dtype
    h         [h_M ; h_M'] of a token                                            (2d,)        float32
    sums      of h over the prompt, and over what came after it                  (B, 2, 2d)   float32
    counts    how many tokens each of them has                                   (B, 2)       float32

A generation has one prompt, and its q stays while tokens are added. The next generation that goes on with the same
cache has all of them in its prompt, what was said included: `Query.next_prompt`. So it computes what it would from
nothing. It knows transformers' caches; no models or gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

__all__ = ["Query", "SiameseCache", "checked"]


class Query:
    """Running sums over a prompt."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None
        self.known = True  # False once tokens were removed

    @property
    def started(self) -> bool:
        """Whether it has seen a token."""
        return self.sums is not None

    def add(self, base: Tensor, tuned: Tensor, prompt: Tensor, later: Tensor) -> None:
        """Tokens with h_M, h_M' (B, T, d), in the prompt or after it by two masks (B, T)."""
        weights = torch.stack([prompt, later], 1).float()
        sums = weights @ torch.cat([base, tuned], -1).float()
        counts = weights.sum(-1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts

    def mean(self) -> tuple[Tensor, Tensor]:
        """q_M and q_M' (B, d); zero without a prompt."""
        assert self.sums is not None
        assert self.counts is not None
        means = self.sums[:, 0] / self.counts[:, :1].clamp(min=1)
        first, last = means.chunk(2, -1)
        return first, last

    def next_prompt(self) -> None:
        """From here on, all tokens so far are the prompt; ValueError if some were removed in between."""
        if self.sums is None or self.counts is None:
            return
        if not self.known:
            raise ValueError("Tokens were removed from this cache, so its prompt is not known; start anew.")
        self.sums = torch.stack([self.sums.sum(1), torch.zeros_like(self.sums[:, 1])], 1)
        self.counts = torch.stack([self.counts.sum(1), torch.zeros_like(self.counts[:, 1])], 1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.sums is not None and self.counts is not None:
            self.sums = self.sums.index_select(0, rows.to(self.sums.device))
            self.counts = self.counts.index_select(0, rows.to(self.counts.device))


class SiameseCache(Cache):  # type: ignore[misc]  # transformers is not followed
    """The cache of the base pass and that of the tuned pass, of equal length, and the `Query`.

    ``config``: of the causal LM, for the kinds of its layers. Made empty by `generate`, and given back by it for a
    further call.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        self.base, self.tuned = DynamicCache(config=text), DynamicCache(config=text)
        self.query = Query()
        self.offloading = False
        self.layer_class_to_replicate = None

    @property
    def layers(self) -> list[Any]:
        """Those of both, so that what transformers does to layers it does to both passes."""
        return [*self.base.layers, *self.tuned.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of beams that go on."""
        super().reorder_cache(beam_idx)
        self.query.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self.query.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        super().batch_repeat_interleave(repeats)
        if self.query.sums is not None:
            rows = torch.arange(len(self.query.sums)).repeat_interleave(repeats)
            self.query.select(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the prompt's mean stays."""
        super().crop(tokens_to_remove)
        self.query.known = self.query.known and not tokens_to_remove

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.query = Query()


def checked(given: Any) -> SiameseCache | None:
    """The cache that was given, if any; ValueError if it is another kind."""
    if given is not None and not isinstance(given, SiameseCache):
        raise ValueError(
            f"past_key_values must be a SiameseCache, one of both passes, but got {type(given).__name__}."
        )
    return given
