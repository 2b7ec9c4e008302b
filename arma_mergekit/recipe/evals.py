"""The `evals` block: suites of tasks, each `{type: options}`.

It knows which options a task has; the tasks themselves live in arma_mergekit/evals.

    nll         {data, field | prompt + answer}   NLL per token, of whole texts or of answers given prompts
    kl          {data, field}                     KL(base || merged) per token; no labels
    choice      {data, prompt, choices, answer}   multiple choice by length-normalised likelihood
    generate    {data, prompt, answer, prefix}    greedy decoding against the answer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from arma_mergekit.errors import unknown
from arma_mergekit.recipe.strict import Strict

__all__ = ["TASKS", "TaskSpec"]

TEXT = ("data", "field", "max_tokens", "max_length")
TASKS: Mapping[str, tuple[str, ...]] = {  # type -> options beside those that all have
    "nll": (*TEXT, "prompt", "answer", "answer_only"),
    "kl": TEXT,
    "choice": ("data", "prompt", "choices", "answer"),
    "generate": ("data", "prompt", "answer", "prefix"),
}
SHARED = ("weight", "limit", "watch")
PLANNED = ("lm_eval", "divergence", "python")


class TaskSpec(Strict):
    """One task: its type, the options that type has, and defaults for all others.

    ``data`` is relative to the recipe (`Recipe.data_path`); ``field``, ``prompt``, ``answer`` and ``choices`` name
    what its records hold. ``weight`` counts within the suite, ``limit`` cuts the number of items. ``watch``: scored
    for the verdict only, no search sees it. ``max_tokens`` cuts the file, ``max_length`` each whole text.
    ``answer_only``: None lets the data decide (the first record has ``prompt``, but not ``field``).
    """

    type: Literal["nll", "kl", "choice", "generate"]
    weight: PositiveFloat = 1.0
    limit: PositiveInt | None = None
    watch: bool = False
    data: Path = Path()
    field: str = "text"
    prompt: str = "prompt"
    answer: str = "answer"
    choices: str = "choices"
    answer_only: bool | None = None
    max_tokens: PositiveInt | None = None
    max_length: PositiveInt = 1024
    prefix: PositiveInt | None = None  # characters of the answer that must agree

    @model_validator(mode="before")
    @classmethod
    def _from_entry(cls, entry: Any) -> Any:
        """`{nll: {data: x}}` as `{type: nll, data: x}`."""
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(f" must be one task, as in {{nll: {{data: my.jsonl}}}}, but got {entry!r}.")
        ((kind, options),) = entry.items()
        if kind in PLANNED:
            raise ValueError(f": `{kind}` is not available yet; use {', '.join(TASKS)}.")
        if kind not in TASKS:
            raise ValueError(f": {unknown('task', str(kind), TASKS)}")
        if not isinstance(options, dict):
            raise ValueError(f".{kind} must hold options, as in {{data: …}}, but got {options!r}.")
        problems = list(_option_problems(kind, options))
        if problems:
            raise ValueError("\n".join(f".{kind}{problem}" for problem in problems))
        return {"type": kind, **options}


def _option_problems(kind: str, options: Mapping[Any, Any]) -> Iterator[str]:
    known = (*TASKS[kind], *SHARED)
    yield from (f": {unknown('key', str(key), known)}" for key in options if key not in known)
    if options.get("data") in (None, ""):
        yield " needs `data`."
