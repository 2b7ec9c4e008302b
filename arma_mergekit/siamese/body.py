"""Two passes over the same tokens, and one hidden state per token: what stands where a causal LM has its decoder.

    input ids ─┬─ decoder, adapter off ─ h_M  ─┐
               └─ decoder, adapter on  ─ h_M' ─┴─ gate ─ h ─ the LM's own head ─ logits

Which module of an LM is its decoder is found by trying: if the LM says the same when the module returns what it
returned before, and something else when it returns zeros, then all that follows is the head, whatever it scales or
caps. It knows transformers' causal LMs, caches and the gate; no adapters, files or generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from arma_mergekit.errors import CheckpointError
from arma_mergekit.evals.forward import calling
from arma_mergekit.siamese.cache import Query, SiameseCache, checked
from arma_mergekit.siamese.config import SiameseConfig
from arma_mergekit.siamese.gate import Gate, mix

__all__ = ["SiameseBody", "find_decoder"]

Run = Callable[..., Any]


@torch.no_grad()
def find_decoder(lm: Any) -> tuple[nn.Module, Tensor]:
    """The module whose hidden states the head is given, and a sample of them (1, T, d); CheckpointError if none is."""
    training = lm.training
    lm.eval()  # dropout would hide what is equal
    try:
        return _found(lm)
    finally:
        lm.train(training)


def _found(lm: Any) -> tuple[nn.Module, Tensor]:
    ids = torch.tensor([[1, 0, 2, 1]], device=lm.device)
    whole = lm(input_ids=ids, use_cache=False).logits
    for module in (lm.get_decoder(), getattr(lm, lm.base_model_prefix, None)):
        if module is None or module is lm or not _takes_a_cache(module):
            continue
        output = module(input_ids=ids, use_cache=False)
        h = getattr(output, "last_hidden_state", None)
        if h is None or h.shape[:2] != ids.shape:
            continue
        if torch.equal(_said(lm, module, output, h), whole) and not torch.equal(
            _said(lm, module, output, torch.zeros_like(h)), whole
        ):
            return module, h
    raise CheckpointError(
        f"{type(lm).__name__} does not come apart into a decoder with past_key_values and a head, so its passes cannot "
        "be mixed."
    )


def _takes_a_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters


def _said(lm: Any, module: nn.Module, output: Any, h: Tensor) -> Tensor:
    """Logits if the module returned h."""
    given = type(output)(last_hidden_state=h)
    with calling(module, lambda *_, **__: given):
        logits: Tensor = lm(input_ids=torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)).logits
    return logits


class SiameseBody(nn.Module):
    """The two passes and the gate; called as the decoder is, it returns the mixed ``last_hidden_state``.

    ``base``, ``tuned``: forward of the decoder of either pass; ``off``: makes the block the base's. They are the LM's,
    not children of this module. Hidden states and attentions of layers are those of the tuned pass. ``stacked``: the
    two terms of h are returned one after the other as a batch of 2B, for whoever has a head for each.
    """

    def __init__(
        self, base: Run, tuned: Run, off: Callable[[], AbstractContextManager[None]], lm_config: Any,
        config: SiameseConfig, like: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self._base, self._tuned, self.off, self._lm_config = base, tuned, off, lm_config
        self.config = config
        self.gate = Gate(like.shape[-1], config, like.device) if config.has_gate else None
        self.stacked = config.mode == "logit_average"
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def forward(
        self, *args: Any, prompt_mask: Tensor | None = None, attention_mask: Any = None,
        past_key_values: SiameseCache | None = None, use_cache: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The decoder's output; ``prompt_mask`` as `SiameseForCausalLM.forward` has it."""
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        given = {**kwargs, "attention_mask": attention_mask, "use_cache": cache is not None}
        caches = (None, None) if cache is None else (cache.base, cache.tuned)
        with self.off(), torch.no_grad():
            h = self._base(*args, past_key_values=caches[0], **given).last_hidden_state
        output = self._tuned(*args, past_key_values=caches[1], **given)
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        query = None
        if self.config.mode == "full":
            query = Query() if cache is None else cache.query
            attended = _attended(h, mask, past)
            prompt = attended & _prompt(prompt_mask, attended, past, query.started)
            query.add(h, output.last_hidden_state, prompt, attended & ~prompt)
        output.last_hidden_state = self._mixed(h, output.last_hidden_state, query)
        if cache is not None:
            output.past_key_values = cache
        return output

    def _cache(self, given: Any, use_cache: bool | None) -> SiameseCache | None:
        wanted = self._lm_config.use_cache if use_cache is None else use_cache
        return SiameseCache(self._lm_config) if given is None and wanted else checked(given)

    def _mixed(self, base: Tensor, tuned: Tensor, query: Query | None) -> Tensor:
        if self.config.mode == "logit_average":  # they are averaged after the head
            return torch.cat([base, tuned])
        gate: Tensor | float = self.config.value
        if self.gate is not None:
            gate = found = self.gate(base, tuned, None if query is None else query.mean())
            if self.watch is not None:
                self.watch(found, base, tuned)
        if self.stacked:
            return torch.cat(
                [mix(gate, base, torch.zeros_like(base)), mix(gate, torch.zeros_like(tuned), tuned)]
            )
        return mix(gate, base, tuned)


def _attended(h: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """Which of the tokens of h (B, T, d) are no padding (B, T)."""
    if mask is None:
        return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    return mask[:, past : past + h.shape[1]].to(h.device, torch.bool)


def _prompt(given: Tensor | None, attended: Tensor, past: int, started: bool) -> Tensor:
    """Which of these tokens are in the prompt (B, T): as ``given`` for the whole sequence, else all there are first."""
    if given is None:
        return torch.full_like(attended, not started)
    rows, length = attended.shape
    part = given[:, past : past + length].to(attended.device, torch.bool)
    part = nn.functional.pad(part, (0, length - part.shape[1]))
    return part.repeat_interleave(rows // len(part), 0)  # beams
