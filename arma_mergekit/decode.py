"""Decoding a token at a time, greedy or sampled, and what it costs. It knows transformers causal LMs and tokens.

    p = softmax(z / temperature),   z = logits after the tokens so far;   temperature 0: the most likely token

The model's cache is used where it has one; a model without one reads everything again for each token.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Decoder", "Footprint", "footprints", "stops"]

PROMPT = 16  # tokens of what speed is measured after


class Decoder:
    """The continuation of one prompt by one model.

    ``ids``: tokens of the prompt, at least one; ``seed``: of the draws, where the temperature is not 0. Decoders of
    several models can take turns: each has its own random numbers.
    """

    def __init__(self, model: Any, ids: Sequence[int], temperature: float = 0.0, seed: int = 0) -> None:
        import torch

        self.model, self.temperature = model, temperature
        self.cache: Any = None
        self.said: list[int] = []
        self._prompt, self._device = list(ids), next(model.parameters()).device
        self._random = torch.Generator(self._device).manual_seed(seed)

    def step(self) -> int:
        """The next token, which then counts as said."""
        import torch

        fed = self.said[-1:] if self.cache is not None else [*self._prompt, *self.said]
        ids = torch.tensor([fed], device=self._device)
        past = {} if self.cache is None else {"past_key_values": self.cache}
        with torch.no_grad():
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **past)
        self.cache = getattr(output, "past_key_values", None)
        self.said.append(self._chosen(output.logits[0, -1].float()))
        return self.said[-1]

    def _chosen(self, logits: Tensor) -> int:
        """A token by its logits (V,)."""
        import torch

        if not self.temperature:
            return int(logits.argmax())
        p = (logits / self.temperature).softmax(-1)
        return int(torch.multinomial(p, 1, generator=self._random))


def stops(model: Any, tokenizer: Any = None) -> set[int]:
    """Tokens that end a text, by the model's generation settings and its tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in [*ends, getattr(tokenizer, "eos_token_id", None)] if end is not None}


@dataclass(frozen=True)
class Footprint:
    """What answering costs: greedy decoding of one text, bytes of weights, and bytes of the cache per token of text."""

    tokens_per_second: float
    weight_bytes: int
    cache_bytes: int


def footprints(models: Mapping[str, Any], tokens: int = 24, rounds: int = 3) -> dict[str, Footprint]:
    """Of each model; they take turns, so that a busy machine is as busy for one as for another.

    Speed is the median over ``rounds`` of ``tokens`` after the first, which reads the prompt.
    """
    speeds: dict[str, list[float]] = {name: [] for name in models}
    caches: dict[str, int] = {}
    for _ in range(rounds):
        for name, model in models.items():
            decoder = Decoder(model, range(PROMPT))
            decoder.step()
            started = time.perf_counter()
            for _ in range(tokens):
                decoder.step()
            speeds[name].append(tokens / (time.perf_counter() - started))
            caches[name] = _tensor_bytes(decoder.cache) // (PROMPT + tokens)
    return {
        name: Footprint(median(speeds[name]), _weight_bytes(model), caches[name])
        for name, model in models.items()
    }


def _weight_bytes(model: Any) -> int:
    """Parameters and buffers, what is shared counted once."""
    return _unique([*model.parameters(), *model.buffers()])


def _tensor_bytes(thing: Any) -> int:
    """Every tensor inside of an object."""
    from torch import Tensor

    found, seen, pending = list[Tensor](), set[int](), [thing]
    while pending:
        thing = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, Mapping):
            pending += thing.values()
        elif isinstance(thing, Collection) and not isinstance(thing, str | bytes | range):
            pending += thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            pending += vars(thing).values()
    return _unique(found)


def _unique(tensors: Sequence[Tensor]) -> int:
    return sum({(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())
