"""Forward passes over token rows: nothing computed twice, and never more than a chunk of logits.

It knows transformers causal LMs and tokens; no tasks, losses or data. A causal LM is taken apart into

    symbol          meaning                                           shape              dtype
    h = body(ids)   hidden states                                     (positions, d)     the model's
    z = head(h)     logits, with the model's own scaling or capping   (positions, V)     the model's

by calling its own forward with the body bypassed, so the head is right in any architecture. As V is far larger than
d, only h is kept: `by_chunk` computes z for some positions at a time, and again in the backward pass (checkpointing,
arXiv:1604.06174). Of a model that cannot be taken apart so, h are the logits and the head is the identity.

Rows are padded on the right: a causal model never looks there, so no mask is needed. The rows of an item share a
prompt: its first tokens pass once, and their keys and values serve every row. All items of a batch share equally many,
so that needs no mask either, only a cache of plain keys and values; without one, every row passes in full.

A model whose forward takes ``prompt_mask`` (siamese) is told which tokens are the prompt: those before the scored ones,
which of a text that is scored whole is its first.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from arma_mergekit.decode import stops

if TYPE_CHECKING:
    from arma_mergekit.evals.rows import Row

__all__ = ["CausalLM", "batches", "by_chunk", "calling", "cost", "shared_length"]

CHUNK_LOGITS = 1 << 22  # 16 MiB of float32, of which a loss and its gradient need a handful


def cost(items: Sequence[Sequence[Row]], shared: int) -> int:
    """Forward tokens of a batch, padding included, of whose items the ``shared`` first tokens pass once."""
    inputs = {(i, row.inputs) for i, rows in enumerate(items) for row in rows}
    return len(items) * shared + len(inputs) * (max(len(tokens) for _, tokens in inputs) - shared)


def shared_length(rows: Sequence[Row]) -> int:
    """First tokens that all rows have in common and that predict no scored one."""
    lowest, highest = min(row.tokens for row in rows), max(row.tokens for row in rows)
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(lowest, highest, strict=False))
    return min(sum(1 for _ in equal), *(row.start - 1 for row in rows))


def batches(
    items: Mapping[int, Sequence[Row]], limit: int, share: bool = True
) -> Iterator[tuple[list[int], int]]:
    """Keys of items of similar lengths together, and how many first tokens they ``share``, if they may.

    A batch has at most ``limit`` tokens by `cost` (one item may exceed it). Prompts are shared where that saves a
    third of all tokens: a pass of few tokens takes longer per token.
    """
    shared = {i: shared_length(rows) for i, rows in items.items()}
    full = sum(cost([rows], 0) for rows in items.values())
    if not share or 3 * sum(cost([rows], shared[i]) for i, rows in items.items()) > 2 * full:
        shared = dict.fromkeys(items, 0)
    longest = {i: max(len(row.tokens) for row in rows) for i, rows in items.items()}
    batch: list[int] = []
    for i in sorted(items, key=lambda i: (shared[i], longest[i], i)):
        if batch and cost([items[k] for k in (*batch, i)], shared[batch[0]]) > limit:
            yield batch, shared[batch[0]]
            batch = []
        batch.append(i)
    if batch:
        yield batch, shared[batch[0]]


def by_chunk(function: Callable[..., Tensor], width: int, *columns: Tensor) -> Tensor:
    """``function`` of columns (P, ...), some rows at a time; it may make blocks of ``width`` numbers per row.

    With several chunks, what it makes is freed in between and made again in the backward pass.
    """
    size = max(1, CHUNK_LOGITS // width)
    again = torch.is_grad_enabled() and len(columns[0]) > size
    run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False) if again else function
    parts = zip(*(torch.split(column, size) for column in columns), strict=True)
    return torch.cat([run(*part) for part in parts])


@dataclass(frozen=True)
class Anatomy:
    """How a causal LM comes apart.

    ``body``: name of the module below the head, None if it does not come apart; ``output``: class of what that
    returns; ``caches``: whether its cache holds plain keys and values; ``vocabulary``: V; ``prompted``: whether it is
    told what the prompt is.
    """

    body: str | None
    output: type
    caches: bool
    vocabulary: int
    prompted: bool


_known: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


class CausalLM:
    """A causal LM, alone or live, taken apart."""

    def __init__(self, model: Any) -> None:
        alone = isinstance(model, nn.Module)
        self.module = model if alone else model.model
        self._base: Mapping[str, Tensor] = {} if alone else model.base
        if self.module not in _known:
            _known[self.module] = _examine(self.module)
        self.anatomy = _known[self.module]

    @property
    def caches(self) -> bool:
        """Whether rows can share a prompt."""
        return self.anatomy.body is not None and self.anatomy.caches

    @property
    def stops(self) -> set[int]:
        """Tokens that end a text, by the model's generation settings."""
        return stops(self.module)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.anatomy.vocabulary

    def head(self, h: Tensor) -> Tensor:
        """Logits (P, V) of hidden states (P, d)."""
        return _head(self.module, self.anatomy, {}, h)

    def base_head(self) -> Callable[[Tensor], Tensor]:
        """The head of the base, whatever the live model becomes."""
        return torch.no_grad()(partial(_head, self.module, self.anatomy, self._base))

    def hidden(self, items: Sequence[Sequence[Row]], shared: int = 0) -> tuple[Tensor, int]:
        """Hidden states (P, d) that predict the scored tokens of these items' rows, in order; forward tokens spent.

        The ``shared`` first tokens of each item pass once (`batches`).
        """
        inputs = [(i, row.inputs, row.start) for i, rows in enumerate(items) for row in rows]
        distinct = {given: k for k, given in enumerate(dict.fromkeys(inputs))}
        cache = None
        if shared:
            cache = self._body(self._ids([rows[0].tokens[:shared] for rows in items])).past_key_values
            chosen = [i for i, _, _ in distinct]
            cache.batch_select_indices(torch.tensor(chosen, device=self.module.device))
        ids = self._ids([tokens[shared:] for _, tokens, _ in distinct])
        rows = [row for rows in items for row in rows]
        places = [
            (distinct[given], p - shared) for given, row in zip(inputs, rows, strict=True) for p in row.places
        ]
        starts = [start for _, _, start in distinct]
        return self._at(ids, places, cache, self._prompts(starts)), cost(items, shared)

    def _prompts(self, lengths: Sequence[int]) -> Mapping[str, Tensor]:
        """How many tokens of each row are its prompt, as the model is told."""
        if not self.anatomy.prompted:
            return {}
        places = torch.arange(max(lengths), device=self.module.device)
        return {"prompt_mask": places < torch.tensor(lengths, device=self.module.device)[:, None]}

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [(*row, *[row[-1]] * (longest - len(row))) for row in rows]  # any token will do
        return torch.tensor(padded, device=self.module.device)

    def _at(
        self,
        ids: Tensor,
        places: Sequence[tuple[int, int]],
        cache: Any = None,
        prompts: Mapping[str, Tensor] = {},
    ) -> Tensor:
        """Hidden states (P, d) at places (row, column) of ids (B, T)."""
        columns = sorted({column for _, column in places})
        kept = torch.tensor(columns, device=ids.device)
        if self.anatomy.body is None:
            found = self.module(input_ids=ids, logits_to_keep=kept, use_cache=False, **prompts).logits
        else:
            use_cache = cache is not None
            found = self._body(ids, cache, use_cache, prompts).last_hidden_state[:, kept]
        slot = {column: k for k, column in enumerate(columns)}
        chosen: Tensor = found[[row for row, _ in places], [slot[column] for _, column in places]]
        return chosen

    def _body(
        self, ids: Tensor, cache: Any = None, use_cache: bool = True, prompts: Mapping[str, Tensor] = {}
    ) -> Any:
        past = {} if cache is None else {"past_key_values": cache}
        body = getattr(self.module, str(self.anatomy.body))
        with _WideAttention():
            return body(input_ids=ids, use_cache=use_cache, **past, **prompts)

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], length: int, stops: Collection[int]
    ) -> tuple[list[list[int]], int]:
        """Most likely continuation of each prompt, ``length`` tokens or up to a stop; forward tokens spent.

        Prompts of different lengths start together at the shortest, and the others' tokens are fed until they end:
        no padding, so no mask and no positions.
        """
        rows = [list(prompt) for prompt in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        waiting, cache, fed, spent = set(range(len(rows))), None, 0, 0
        known, mask = min(map(len, rows)), self._prompts([len(row) for row in rows])
        while waiting:
            ids = torch.tensor([row[fed:known] for row in rows], device=self.module.device)
            best, cache = self._next(ids, cache, mask)
            fed, spent = known if self.caches else 0, spent + ids.numel()
            for i in (i for i, row in enumerate(rows) if len(row) == known):  # its prompt is used up
                rows[i].append(best[i])
                if i in waiting and best[i] not in stops:
                    said[i].append(best[i])
                if best[i] in stops or len(said[i]) == length:
                    waiting.discard(i)
            known += 1
        return said, spent

    def _next(self, ids: Tensor, cache: Any, prompts: Mapping[str, Tensor]) -> tuple[list[int], Any]:
        """Most likely token after each row of ids (B, T), and the cache that now holds them."""
        if self.caches:
            output = self._body(ids, cache, prompts=prompts)
            h, cache = output.last_hidden_state[:, -1], output.past_key_values
        else:
            h = self._at(ids, [(k, ids.shape[1] - 1) for k in range(len(ids))], None, prompts)
        return self.head(h).argmax(-1).tolist(), cache


class _WideAttention(TorchFunctionMode):
    """On CPUs, attention of 16-bit tensors in float32: more exact, and its backward pass is up to 3 times as fast."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        query: Any = given.get("query", args[0] if args else None)
        if func is not nn.functional.scaled_dot_product_attention or not _is_narrow(query):
            return func(*args, **given)
        wide = [[x.float() if _is_narrow(x) else x for x in operands] for operands in (args, given.values())]
        return func(*wide[0], **dict(zip(given, wide[1], strict=True))).to(query.dtype)


def _is_narrow(x: Any) -> bool:
    """Whether it is a 16-bit tensor on a CPU."""
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"


def _head(module: nn.Module, anatomy: Anatomy, weights: Mapping[str, Tensor], h: Tensor) -> Tensor:
    """Logits (P, V) of h (P, d), with other ``weights`` if given."""
    if anatomy.body is None:
        return h
    inputs = {"input_ids": torch.zeros(1, len(h), dtype=torch.long, device=h.device), "use_cache": False}
    output = anatomy.output(last_hidden_state=h[None])
    with calling(getattr(module, anatomy.body), lambda *_, **__: output):
        output = (
            torch.func.functional_call(module, dict(weights), (), inputs) if weights else module(**inputs)
        )
    logits: Tensor = output.logits[0]
    return logits


@contextlib.contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the module's forward is this."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@torch.no_grad()
def _examine(module: Any) -> Anatomy:
    """Take a model apart, and look whether the parts give what the whole gives, bit for bit."""
    ids = torch.tensor([[1, 0, 2, 1]], device=module.device)
    whole = module(input_ids=ids, use_cache=False).logits[0]
    body = getattr(module, module.base_model_prefix, None)
    prompted = "prompt_mask" in inspect.signature(module.forward).parameters
    apart = Anatomy(None, object, False, whole.shape[-1], prompted)
    if body is None:
        return apart
    output = body(input_ids=ids, use_cache=False)
    h = getattr(output, "last_hidden_state", None)
    if h is None or h.shape[:2] != ids.shape:
        return apart
    cache = getattr(body(input_ids=ids, use_cache=True), "past_key_values", None)
    found = Anatomy(module.base_model_prefix, type(output), _is_plain(cache), whole.shape[-1], prompted)
    return found if torch.equal(_head(module, found, {}, h[0]), whole) else apart


def _is_plain(cache: Any) -> bool:
    """Whether a cache, or both sides of a siamese one, holds keys and values only (no recurrent states)."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    sides = [getattr(cache, side, cache) for side in ("base", "tuned")]
    return all(type(side) is DynamicCache for side in sides) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for side in sides for layer in side.layers
    )
