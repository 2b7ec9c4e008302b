"""What a gate does: by channel, by task, over tokens; and the fixed average of outputs it comes to, if it comes to one.

    symbol    meaning                                                        shape
    g         gate at each scored token: weight of the base                  (P, d)
    mean      of g over tokens, by channel                                   (d,)
    spread    standard deviation of g over tokens, by channel                (d,)
    c         mean of g over tokens and channels                             ()
    kl_one    KL(p(g) || p(c)) per token: what one number would get wrong    nats

A gate that is c for every token is the average c z_M + (1 - c) z_M' of the two models' logits, since the head is
linear: no gate is needed for that, and no training. It knows a siamese model and token rows; no files of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arma_mergekit.errors import DataError, RunError
from arma_mergekit.evals.forward import CausalLM, by_chunk
from arma_mergekit.evals.rows import Row, continuation
from arma_mergekit.evals.sources import Record, read_records
from arma_mergekit.siamese.gate import mix

if TYPE_CHECKING:
    from arma_mergekit.siamese.model import SiameseForCausalLM

__all__ = ["CONSTANT", "diagnose", "read_rows"]

CONSTANT = 0.01  # a gate that moves less over tokens is called constant
LONGEST = 512  # tokens of a text
States = tuple[Tensor, Tensor, Tensor]  # g, h_M, h_M' (P, d)


def read_rows(tokenizer: Any, path: Path, field: str = "text", max_tokens: int = 2048) -> list[Row]:
    """Rows of a file until they have ``max_tokens`` together: prompt and answer (or the right choice), or texts."""
    rows: list[Row] = []
    for record in read_records(path, ()):
        row = _row(tokenizer, record, field)
        if len(row.tokens) > 1:
            rows.append(row)
        if sum(len(row.tokens) for row in rows) >= max_tokens:
            break
    if not rows:
        raise DataError(f"{path} has no text of at least two tokens; give longer texts.")
    return rows


def _row(tokenizer: Any, record: Record, field: str) -> Row:
    answer = record.fields.get("answer")
    choices = record.fields.get("choices")
    if isinstance(choices, list) and isinstance(answer, int) and 0 <= answer < len(choices):
        answer = choices[answer]
    if "prompt" in record.fields and isinstance(answer, str):
        return continuation(tokenizer, record.text("prompt"), answer, record.where)
    if field not in record.fields:
        raise record.error(f"needs prompt and answer, or {field}")
    return Row(tuple(tokenizer(record.text(field))["input_ids"][:LONGEST]), 1)


def diagnose(model: SiameseForCausalLM, tasks: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Plain data: an entry for each task and one for all, with the symbols above; RunError if there is no gate."""
    config = model.siamese_config
    if model.body.gate is None:
        raise RunError(
            f"Mode {config.mode} has no gate: every token takes the base with weight {config.value:g}."
        )
    states = {name: _states(model, rows) for name, rows in tasks.items()}
    found = [_entry(model, name, len(tasks[name]), state) for name, state in states.items()]
    if len(states) > 1:
        g, h, other = (torch.cat(column) for column in zip(*states.values(), strict=True))
        found.append(_entry(model, "all", sum(map(len, tasks.values())), (g, h, other)))
    return {
        "siamese": {"mode": config.mode, "rank": config.rank, "channels": model.body.gate.width},
        "tasks": found,
        "constant": found[-1]["spread"] <= CONSTANT,
        "average": found[-1]["mean"],
    }


@torch.no_grad()
def _states(model: SiameseForCausalLM, rows: Sequence[Row]) -> States:
    """g, h_M and h_M' where scored tokens are predicted."""
    kept = []
    with _watching(model) as seen:
        for row in rows:
            prompt = torch.ones(1, row.start, dtype=torch.bool)
            model.body(torch.tensor([row.inputs], device=model.device), prompt_mask=prompt, use_cache=False)
            kept.append([column[0, row.start - 1 :] for column in seen.pop()])
    g, h, other = (torch.cat(column) for column in zip(*kept, strict=True))
    return g, h, other


@contextlib.contextmanager
def _watching(model: SiameseForCausalLM) -> Iterator[list[States]]:
    seen: list[States] = []
    model.body.watch = lambda *states: seen.append(states)
    try:
        yield seen
    finally:
        model.body.watch = None


def _entry(model: SiameseForCausalLM, name: str, items: int, states: States) -> dict[str, Any]:
    g = states[0].double()
    mean, spread = g.mean(0), g.std(0, correction=0)
    return {
        "name": name,
        "items": items,
        "tokens": len(g),
        "mean": float(mean.mean()),
        "spread": float(spread.square().mean().sqrt()),
        "between_channels": float(mean.std(correction=0)),
        "kl_one": _kl(model, states, float(mean.mean())),
        "by_channel": [round(v, 6) for v in mean.tolist()],
        "spread_by_channel": [round(v, 6) for v in spread.tolist()],
    }


@torch.no_grad()
def _kl(model: SiameseForCausalLM, states: States, constant: float) -> float | None:
    """KL(p(g) || p(c)) per token; None if the two passes have heads of their own."""
    lm = CausalLM(model)
    if lm.anatomy.body is None:
        return None

    def divergence(g: Tensor, h: Tensor, other: Tensor) -> Tensor:
        log_p, log_q = (
            lm.head(mix(gate, h, other)).float().log_softmax(-1) for gate in (g, torch.full_like(g, constant))
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return max(0.0, float(by_chunk(divergence, lm.vocabulary, *states).double().mean()))
