"""The built-in tasks on local JSONL data: nll, kl, choice, generate.

nll       negative log-likelihood per token: of the whole text ({"text"}), or of the answer only
          ({"prompt", "answer"})
kl        KL(base || merged) per token of {"text"}, from the full next-token distributions; needs no labels
choice    {"prompt", "choices", "answer": index}: right when the right choice has the highest
          length-normalised log-likelihood; loss: cross-entropy over the choices
generate  {"prompt", "answer"}: right when greedy decoding yields the answer (its first `prefix` characters, if
          given); loss: NLL of the answer's tokens
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Model
from arma_mergekit.evals.rows import (
    UNLIMITED,
    Item,
    Limits,
    Row,
    RowTask,
    continuation,
    read_jsonl,
    row_logits,
)

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


def _nll(logits: Any, targets: Sequence[int]) -> Any:
    """Negative log-likelihood (targets,) in float32."""
    import torch

    return torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets, device=logits.device), reduction="none"
    )


class NllTask(RowTask):
    """Negative log-likelihood per scored token; headline: its negative."""

    unit = "-nats/token"

    def outcome(self, index: int, logits: Sequence[Any]) -> tuple[Any, float | None]:
        """Sum over the item's scored tokens."""
        (row,) = self.items[index].rows
        return _nll(logits[0], row.targets).sum(), None


class KlTask(RowTask):
    """KL(base || merged) per token, summed over the vocabulary; headline: its negative, 0 for the base itself.

    The base's logits are kept in the dtype they come in: tokens x vocabulary x 2 bytes in bf16, so mind `max_tokens`.
    """

    unit = "-nats/token"

    def prepare(self, base: Model) -> int:
        """Keep the base's logits of every item."""
        import torch

        self._teacher: dict[int, Any] = {}
        tokens = 0
        with torch.no_grad():
            for batch in self._batches(range(len(self.items))):
                rows = [self.items[i].rows[0] for i in batch]
                for i, logits in zip(batch, row_logits(base, rows), strict=True):
                    kept = logits.to(torch.bfloat16)
                    self._teacher[i] = kept if torch.equal(kept.float(), logits) else logits.clone()
                tokens += len(rows) * max(len(row.tokens) for row in rows)
        return tokens

    def outcome(self, index: int, logits: Sequence[Any]) -> tuple[Any, float | None]:
        """Sum over the item's positions of sum_v p_base(v) log(p_base(v) / p(v))."""
        import torch

        teacher = self._teacher[index].float().log_softmax(-1)
        return torch.nn.functional.kl_div(
            logits[0].log_softmax(-1), teacher, reduction="sum", log_target=True
        ), None


class ChoiceTask(RowTask):
    """Multiple choice by log-likelihood per token; loss: cross-entropy over the choices.

    The cross-entropy takes s_c = (log-likelihood per token of choice c) x (mean tokens of the item's choices): the same
    order as the headline, and the plain log-likelihoods when all choices are equally long.
    """

    unit = "accuracy"

    def item_weight(self, item: Item) -> float:
        """Every question counts the same."""
        return 1.0

    def outcome(self, index: int, logits: Sequence[Any]) -> tuple[Any, float | None]:
        """Cross-entropy of the right choice, and whether it was the first."""
        import torch

        item = self.items[index]
        each = torch.stack([-_nll(x, r.targets).mean() for x, r in zip(logits, item.rows, strict=True)])
        scale = sum(len(r.targets) for r in item.rows) / len(item.rows)
        return -(each * scale).log_softmax(0)[item.answer], float(each.argmax() == item.answer)


class GenerateTask(RowTask):
    """Greedy decoding yields the answer; loss: NLL of the answer's tokens, mean over the item's tokens.

    Decided from one pass over prompt + answer: greedy decoding yields exactly these tokens if and only if each is the
    most likely one after those before it. (Another tokenisation of the same text does not count.)
    """

    unit = "exact match"

    def __init__(self, name: str, items: Sequence[Item], needed: Sequence[int], weight: float = 1.0) -> None:
        super().__init__(name, items, weight)
        self._needed = tuple(needed)

    def item_weight(self, item: Item) -> float:
        """Every question counts the same."""
        return 1.0

    def outcome(self, index: int, logits: Sequence[Any]) -> tuple[Any, float | None]:
        """Mean NLL of the answer's tokens, and whether the first ``needed`` of them are all the most likely ones."""
        (row,) = self.items[index].rows
        needed = self._needed[index]
        greedy = logits[0][:needed].argmax(-1).tolist()
        return _nll(logits[0], row.targets).mean(), float(tuple(greedy) == row.targets[:needed])


def text_items(
    tokenizer: Any, path: Path, field: str = "text", max_tokens: int | None = None, max_length: int = 1024,
    limit: int | None = None, limits: Limits = UNLIMITED,
) -> list[Item]:  # fmt: skip
    """Items of whole texts, each cut to ``max_length`` tokens and the model's positions, within ``max_tokens``."""
    longest = min(max_length, limits.positions or max_length)
    items = []
    for record in read_jsonl(path, [field], limit):
        encoded = tokenizer(record.text(field), truncation=True, max_length=longest)
        tokens = tuple(encoded["input_ids"])
        if len(tokens) > 1:
            limits.check(tokens, record.where)
            items.append(Item(record.id, (Row(tokens, 1),)))
    return _within(max_tokens, items, path)


def answer_items(
    tokenizer: Any, path: Path, prompt: str = "prompt", answer: str = "answer", max_tokens: int | None = None,
    limit: int | None = None, limits: Limits = UNLIMITED,
) -> list[Item]:  # fmt: skip
    """Items of {"prompt", "answer"}, scored on the answer, within ``max_tokens``."""
    items = []
    for record in read_jsonl(path, [prompt, answer], limit):
        asked, wanted = record.text(prompt), record.text(answer)
        if not wanted:
            raise record.error(f"{answer} is empty")
        items.append(Item(record.id, (continuation(tokenizer, asked, wanted, record.where, limits),)))
    return _within(max_tokens, items, path)


def choice_items(
    tokenizer: Any, path: Path, prompt: str = "prompt", choices: str = "choices", answer: str = "answer",
    limit: int | None = None, limits: Limits = UNLIMITED,
) -> list[Item]:  # fmt: skip
    """Items of {"prompt", "choices", "answer": index}, one row a choice."""
    items = []
    for record in read_jsonl(path, [prompt, choices, answer], limit):
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
