"""The built-in tasks on local JSONL data: nll, kl, choice, generate.

nll       negative log-likelihood per token: of the whole text ({"text"}), or of the answer only
          ({"prompt", "answer"})
kl        KL(base || merged) per token of {"text"}, from the full next-token distributions; needs no labels
choice    {"prompt", "choices", "answer": index}: right when the right choice has the highest
          length-normalised log-likelihood; loss: cross-entropy over the choices
generate  {"prompt", "answer"}: right when greedy decoding yields the answer (its first `prefix` characters, if
          given; or anything in which `regex` finds the answer); loss: NLL of the answer's tokens
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Measured, Model
from arma_mergekit.evals.rows import (
    UNLIMITED,
    Item,
    Limits,
    Row,
    RowTask,
    continuation,
)
from arma_mergekit.evals.sources import read_records

__all__ = [
    "ChoiceTask",
    "GenerateTask",
    "KlTask",
    "NllTask",
    "answer_items",
    "choice_items",
    "needed_tokens",
    "text_items",
]


MAX_NEW_TOKENS = 32
DECODE_TOKENS = 4096  # in the cache at a time


def _nll(logits: Any, targets: Any) -> Any:
    """Negative log-likelihood (P,) of targets (P,) by logits (P, V)."""
    import torch

    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


class NllTask(RowTask):
    """Negative log-likelihood per scored token; headline: its negative."""

    unit = "-nats/token"

    def columns(self, logits: Any, targets: Any, teacher: Any) -> Any:
        """The negative log-likelihood."""
        return _nll(logits, targets)[:, None]

    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """Sum over the item's scored tokens."""
        return rows[0].sum(), None


class KlTask(RowTask):
    """KL(base || merged) per token, summed over the vocabulary; headline: its negative, 0 for the base itself.

    The base's hidden states are kept, d numbers per token, and its logits computed from them when they are needed.
    """

    unit = "-nats/token"

    def prepare(self, base: Model) -> int:
        """Keep the base's hidden states (targets, d) of every item, and its head."""
        import torch

        from arma_mergekit.evals.forward import CausalLM

        lm = CausalLM(base)
        self._head = lm.base_head()
        self._states: dict[int, Any] = {}
        spent = 0
        with torch.no_grad():
            for batch, _ in self._batches(lm, range(len(self.items))):
                h, tokens = lm.hidden([self.items[i].rows for i in batch])
                lengths = [len(self.items[i].rows[0].targets) for i in batch]
                self._states |= dict(zip(batch, torch.split(h, lengths), strict=True))
                spent += tokens
        return spent

    def teacher(self, items: Sequence[int]) -> Any:
        """The base's hidden states (P, d)."""
        import torch

        return torch.cat([self._states[i] for i in items])

    def columns(self, logits: Any, targets: Any, teacher: Any) -> Any:
        """sum_v p_base(v) log(p_base(v) / p(v))."""
        log_p = self._head(teacher).float().log_softmax(-1)
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1, keepdim=True)

    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """Sum over the item's positions."""
        return rows[0].sum(), None


class ChoiceTask(RowTask):
    """Multiple choice by log-likelihood per token; loss: cross-entropy over the choices.

    The cross-entropy takes s_c = (log-likelihood per token of choice c) x (mean tokens of the item's choices): the same
    order as the headline, and the plain log-likelihoods when all choices are equally long.
    """

    unit = "accuracy"

    def item_weight(self, item: Item) -> float:
        """Every question counts the same."""
        return 1.0

    def columns(self, logits: Any, targets: Any, teacher: Any) -> Any:
        """The negative log-likelihood."""
        return _nll(logits, targets)[:, None]

    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """Cross-entropy of the right choice, and whether it was the first."""
        import torch

        each = torch.stack([-row.mean() for row in rows])
        scale = sum(map(len, rows)) / len(rows)
        answer = self.items[index].answer
        return -(each * scale).log_softmax(0)[answer], float(each.argmax() == answer)


class GenerateTask(RowTask):
    """Greedy decoding yields the answer; loss: NLL of the answer's tokens, mean over the item's tokens.

    Without ``regex`` decided from one pass over prompt + answer: greedy decoding yields exactly these tokens if and
    only if each is the most likely one after those before it. (Another tokenisation of the same text does not count.)
    ``needed``: how many of each item's tokens must agree.

    With ``regex``, up to ``max_new_tokens`` are decoded, and what it finds first in their text (its first group, or
    all of the match) must equal the answer, white space at the ends aside. That costs a forward pass per token.
    """

    unit = "exact match"

    def __init__(
        self, name: str, items: Sequence[Item], needed: Sequence[int], weight: float = 1.0, *,
        tokenizer: Any = None, regex: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:  # fmt: skip
        super().__init__(name, items, weight)
        self._needed, self._tokenizer = tuple(needed), tokenizer
        self._regex = None if regex is None else re.compile(regex)
        self._length = None if regex is None else max_new_tokens

    def measure(
        self, model: Model, items: Sequence[int], backward: Callable[[Any], None] | None = None
    ) -> Measured:
        """Score these items; see `Task.measure`."""
        found = super().measure(model, items, backward)
        if self._regex is None:
            return found
        said, spent = self._decode(model, items)
        value = np.array([float(self._is_right(said[i], self.items[i].text)) for i in items])
        return replace(found, value=value, tokens=found.tokens + spent)

    def _decode(self, model: Model, items: Sequence[int]) -> tuple[dict[int, str], int]:
        """Text that greedy decoding says to each item, and the forward tokens spent."""
        from arma_mergekit.evals.forward import CausalLM

        lm = CausalLM(model)
        stops, length = lm.stops | {self._tokenizer.eos_token_id}, self._length or 0
        prompts = {i: self.items[i].rows[0].tokens[: self.items[i].rows[0].start] for i in items}
        order = sorted(items, key=lambda i: len(prompts[i]))
        size = max(1, DECODE_TOKENS // (len(prompts[order[-1]]) + length))
        texts: dict[int, str] = {}
        spent = 0
        for batch in (order[k : k + size] for k in range(0, len(order), size)):
            said, tokens = lm.greedy([prompts[i] for i in batch], length, stops)
            decoded = (self._tokenizer.decode(answer, skip_special_tokens=True) for answer in said)
            texts |= dict(zip(batch, decoded, strict=True))
            spent += tokens
        return texts, spent

    def _is_right(self, said: str, answer: str) -> bool:
        match = self._regex.search(said) if self._regex else None
        found = match and match.group(1 if match.re.groups else 0)
        return found is not None and found.strip() == answer.strip()

    def item_weight(self, item: Item) -> float:
        """Every question counts the same."""
        return 1.0

    def columns(self, logits: Any, targets: Any, teacher: Any) -> Any:
        """The negative log-likelihood, and whether the target is the most likely token."""
        import torch

        return torch.stack([_nll(logits, targets), (logits.argmax(-1) == targets).float()], -1)

    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """Mean NLL of the answer's tokens, and whether the first ``needed`` of them are all the most likely ones."""
        loss, hit = rows[0].unbind(-1)
        return loss.mean(), float(hit[: self._needed[index]].all())


def text_items(
    tokenizer: Any, path: Path, field: str = "text", max_tokens: int | None = None, max_length: int = 1024,
    limit: int | None = None, limits: Limits = UNLIMITED,
) -> list[Item]:  # fmt: skip
    """Items of whole texts, each cut to ``max_length`` tokens and the model's positions, within ``max_tokens``."""
    longest = min(max_length, limits.positions or max_length)
    items = []
    for record in read_records(path, [field], limit):
        encoded = tokenizer(record.text(field), truncation=True, max_length=longest)
        tokens = tuple(encoded["input_ids"])
        if len(tokens) > 1:
            limits.check(tokens, record.where)
            items.append(Item(record.id, (Row(tokens, 1),)))
    return _within(max_tokens, items, path)


def answer_items(
    tokenizer: Any, path: Path, prompt: str = "prompt", answer: str = "answer", max_tokens: int | None = None,
    limit: int | None = None, limits: Limits = UNLIMITED, new_tokens: int = 0,
) -> list[Item]:  # fmt: skip
    """Items of {"prompt", "answer"}, scored on the answer, within ``max_tokens``.

    The model must have positions for the prompt and ``new_tokens`` more.
    """
    items = []
    for record in read_records(path, [prompt, answer], limit):
        asked, wanted = record.text(prompt), record.text(answer)
        if not wanted:
            raise record.error(f"{answer} is empty")
        row = continuation(tokenizer, asked, wanted, record.where, limits)
        limits.check(row.tokens[: row.start], record.where, new_tokens)
        items.append(Item(record.id, (row,), text=wanted))
    return _within(max_tokens, items, path)


def choice_items(
    tokenizer: Any, path: Path, prompt: str = "prompt", choices: str = "choices", answer: str = "answer",
    limit: int | None = None, limits: Limits = UNLIMITED,
) -> list[Item]:  # fmt: skip
    """Items of {"prompt", "choices", "answer": index}, one row a choice."""
    items = []
    for record in read_records(path, [prompt, choices, answer], limit):
        asked, offered, right = record.text(prompt), record.fields[choices], record.fields[answer]
        if not (
            isinstance(offered, list) and len(offered) > 1 and all(c and isinstance(c, str) for c in offered)
        ):
            raise record.error(
                f"{choices} must be two texts or more, none empty, but got {reprlib.repr(offered)}"
            )
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(offered):
            raise record.error(
                f"{answer} must index {choices} (0 to {len(offered) - 1}), but got {reprlib.repr(right)}"
            )
        rows = tuple(continuation(tokenizer, asked, choice, record.where, limits) for choice in offered)
        items.append(Item(record.id, rows, right))
    return items


def _within(max_tokens: int | None, items: Sequence[Item], path: Path) -> list[Item]:
    """The first items, as many as have ``max_tokens`` together; DataError if there are none."""
    used = accumulate(len(item.rows[0].tokens) for item in items)
    kept = [
        item for item, total in zip(items, used, strict=True) if max_tokens is None or total <= max_tokens
    ]
    if not kept:
        within = "" if max_tokens is None else f" within max_tokens {max_tokens}"
        raise DataError(
            f"{path} has no text of at least two tokens{within}; give longer texts or a larger limit."
        )
    return kept


def needed_tokens(tokenizer: Any, item: Item, prefix: int | None) -> int:
    """How many of the answer's tokens spell its first ``prefix`` characters (all, without prefix)."""
    targets = item.rows[0].targets
    if prefix is None:
        return len(targets)
    lengths = (k for k in range(1, len(targets) + 1) if len(tokenizer.decode(list(targets[:k]))) >= prefix)
    return next(lengths, len(targets))
