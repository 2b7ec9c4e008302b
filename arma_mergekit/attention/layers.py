"""Attention probabilities of any transformers causal LM, whatever attention function it was loaded with.

It knows transformers' attention functions; no second model, recipe or task. While `observed`, a model computes what it
always computes, to the bit, and each layer hands its queries and keys to a consumer on the way. Probabilities are
recomputed from these, in float32, by the model's own eager function: masks, soft-capping, sliding windows, sinks and
grouped heads are the model's, whatever the architecture. Some query positions at a time (`Layer.rows`), so that memory
depends neither on depth nor on the square of the text.

    symbol   meaning                  shape
    B, T     texts, query positions
    S        key positions            T without a cache
    H, d     query heads, their size  grouped-query attention has fewer heads of keys

Layers without softmax attention (Mamba, linear attention) hand over nothing.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arma_mergekit.errors import CheckpointError

__all__ = ["Inputs", "Layer", "Model", "observed", "record", "run", "stream"]

Model = Callable[..., Any]  # a transformers causal LM, or a live model
Inputs = Mapping[str, Tensor]  # input_ids (B, T) and what else the model takes, as attention_mask (B, T)

After = Callable[["Layer", Tensor, Tensor], object]  # of a layer, its values and its output, see `observed`

_consumer: ContextVar[tuple[Callable[[Layer], object], After | None] | None] = ContextVar(
    "consumer", default=None
)
_lock = threading.Lock()
_open = 0


@dataclass(frozen=True)
class Layer:
    """One call of a layer's attention: ``query`` (B, H, T, d), ``key`` (B, H or fewer, S, d), and what came with them.

    ``mask``: None (causal, if the module is), True where a key is seen, or what is added to the scores; (B, 1, T, S).
    ``options``: keyword arguments of the attention function (scaling, softcap, ...).
    """

    module: Any
    query: Tensor
    key: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]

    @property
    def index(self) -> int:
        """Depth of the layer, from 0; -1 if several share this block (Zamba)."""
        own = self.module.layer_idx
        return -1 if own is None else int(own)

    def probabilities(self) -> Tensor:
        """Attention probabilities (B, H, T, S) in float32."""
        return self.rows(0, self.query.shape[2])

    def rows(self, start: int, stop: int) -> Tensor:
        """Those of the query positions from ``start`` to before ``stop``, without keys at the end that none sees."""
        keys = self._seen(start, stop)
        key = self.key[:, :, :keys].float()
        options = {name: self._cut(option, start, stop, keys) for name, option in self.options.items()}
        _, weights = _own_eager(self.module)(
            self.module,
            self.query[:, :, start:stop].float(),
            key,
            key[..., :1],  # stands in for the values: nobody reads what they are averaged to
            self._added(start, stop, keys),
            **options | {"dropout": 0.0},
        )
        return weights

    def kept(self) -> Layer:
        """A copy that later changes of the model's weights do not reach."""
        module = copy.copy(self.module)
        module._parameters = {name: _copied(p) for name, p in self.module._parameters.items()}  # sinks
        options = {name: _copied(option) for name, option in self.options.items()}
        return Layer(module, _copied(self.query), _copied(self.key), self.mask, options)

    @property
    def _causal(self) -> bool:
        """SDPA's rule for a call without a mask."""
        given = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    def _seen(self, start: int, stop: int) -> int:
        """How many keys, from the first, these queries see."""
        everything = self.key.shape[2]
        if self.mask is None:
            return stop if self._causal else everything
        if self.query.shape[2] != everything:
            return everything
        later = self.mask[..., start:stop, stop:]
        hidden = ~later if later.dtype == torch.bool else later <= torch.finfo(later.dtype).min / 2
        return stop if bool(hidden.all()) else everything

    def _added(self, start: int, stop: int, keys: int) -> Tensor | None:
        """What eager functions add to the scores: 0 where a key is seen, else a very negative number."""
        if self.mask is None:
            if not self._causal:
                return None
            seen = torch.ones(stop - start, keys, dtype=torch.bool, device=self.key.device).tril(start)
        else:
            seen = self.mask[..., start:stop, :keys]
        if seen.dtype != torch.bool:
            return seen.float()
        return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)

    def _cut(self, option: Any, start: int, stop: int, keys: int) -> Any:
        """Of an option with a value per query (a position bias), that of these queries and keys."""
        per_query = isinstance(option, Tensor) and option.ndim == 4 and option.shape[2] == self.query.shape[2]
        return option[..., start:stop, :keys] if per_query else option


def _copied(value: Any) -> Any:
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _own_eager(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention function beside a module's class: the definition of its probabilities."""
    for kind in type(module).__mro__:
        own: Any = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if own is not None:
            return own  # type: ignore[no-any-return]
    raise CheckpointError(
        f"{type(module).__name__}: no eager_attention_forward beside it, so its attention cannot be observed."
    )


@contextlib.contextmanager
def observed(consume: Callable[[Layer], object], after: After | None = None) -> Iterator[None]:
    """Within the block, ``consume`` gets each attention layer that a transformers model runs, in this thread.

    What the model computes stays the same to the bit. Only models loaded with SDPA or eager attention are seen.
    ``after`` gets the layer again with its values (B, heads of keys, S, d) and what was made of them (B, T, H, d).
    """
    token = _consumer.set((consume, after))
    try:
        with _tapped():
            yield
    finally:
        _consumer.reset(token)


@contextlib.contextmanager
def _tapped() -> Iterator[None]:
    """Put `_tap` before transformers' attention functions, once however many threads observe."""
    from transformers import modeling_utils

    global _open
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS
    with _lock:
        if not _open:
            functions["sdpa"], functions["eager"] = partial(_tap, functions["sdpa"]), partial(_tap, None)
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                del functions["sdpa"], functions["eager"]


def _tap(
    function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Any:
    """An attention function (None: the module's own eager one) that shows its arguments to the consumer first."""
    function, consumer = function or _own_eager(module), _consumer.get()
    if consumer is None:
        return function(module, query, key, value, attention_mask, **options)
    (consume, after), layer = consumer, Layer(module, query, key, attention_mask, options)
    consume(layer)
    result = function(module, query, key, value, attention_mask, **options)
    if after is not None:
        after(layer, value, result[0])
    return result


def run(model: Model, inputs: Inputs) -> None:
    """A forward pass for what can be seen on the way."""
    model(**inputs, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def record(model: Model, inputs: Inputs) -> list[Layer]:
    """A forward pass's attention layers, kept: layers x T x (query and key heads) x d numbers in the model's dtype."""
    layers: list[Layer] = []
    with observed(lambda layer: layers.append(layer.kept())):
        run(model, inputs)
    return layers


class _Abandoned(Exception):  # noqa: N818 (ends a forward pass nobody waits for)
    """The consumer of a stream went away."""


def stream(model: Model, inputs: Inputs) -> Generator[Layer]:
    """A forward pass's attention layers, one by one: in a thread of its own, it waits before a layer nobody asked for.

    No gradients. Who leaves early closes it (`contextlib.closing`), else the thread waits on.
    """
    ready: queue.SimpleQueue[Layer | None] = queue.SimpleQueue()
    wanted = threading.Semaphore()
    abandoned = threading.Event()

    def hand_over(layer: Layer) -> None:
        wanted.acquire()
        if abandoned.is_set():
            raise _Abandoned
        ready.put(layer)

    def hand_over_all() -> None:
        with torch.no_grad(), observed(hand_over):
            run(model, inputs)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(hand_over_all)
        done.add_done_callback(lambda _: ready.put(None))
        try:
            while (layer := ready.get()) is not None:
                yield layer
                del layer
                wanted.release()
            done.result()
        finally:
            abandoned.set()
            wanted.release()
