"""The `evals` block: suites of tasks, each `{type: options}`.

It knows which options a task has; the tasks themselves live in arma_mergekit/evals.

    nll         {data, field | prompt + answer}   NLL per token, of whole texts or of answers given prompts
    kl          {data, field}                     KL(base || merged) per token; no labels
    choice      {data}                            multiple choice by length-normalised likelihood
    generate    {data, match}                     greedy decoding against the answer
    lm_eval     {tasks}                           tasks or groups of lm-evaluation-harness
    divergence  {data, field, measure, teacher}   attention probabilities against a teacher's (METHODS.md 1.3)
    python      {call}                            a user's own `module:function`, called with `options`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from arma_mergekit.errors import unknown
from arma_mergekit.recipe.strict import Strict, listed

__all__ = ["TASKS", "TaskSpec"]

TEXT = ("data", "field", "max_tokens", "max_length")
GENERATE = ("data", "prompt", "answer", "max_new_tokens", "match", "prefix", "pattern")
LM_EVAL = ("include_path", "num_fewshot", "metric", "higher_is_better", "apply_chat_template", "gen_kwargs")
# type -> options beside weight and limit; the first is required
TASKS: Mapping[str, tuple[str, ...]] = {
    "nll": (*TEXT, "prompt", "answer", "answer_only"),
    "kl": TEXT,
    "choice": ("data", "prompt", "choices", "answer"),
    "generate": GENERATE,
    "lm_eval": ("tasks", *LM_EVAL, "batch_size"),
    "divergence": (*TEXT, "measure", "teacher"),
    "python": ("call", "data", "options"),
}
SHARED = ("weight", "limit", "watch")


class TaskSpec(Strict):
    """One task: its type, the options that type has, and defaults for all others.

    ``data`` is relative to the recipe (`Recipe.data_path`); empty for `lm_eval`. ``weight`` counts within the
    suite, ``limit`` cuts the number of items. ``watch``: scored for the verdict only, no search sees it.
    ``max_tokens`` cuts the file, ``max_length`` each text. ``answer_only``: None lets the data decide
    (records with prompt and answer, but without ``field``).
    """

    type: Literal["nll", "kl", "choice", "generate", "lm_eval", "divergence", "python"]
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
    max_new_tokens: PositiveInt | None = None
    match: Literal["exact", "prefix", "regex"] = "exact"
    prefix: PositiveInt | None = None  # characters of the answer that must agree
    pattern: str | None = None
    tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    include_path: Path | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    metric: str | None = None
    higher_is_better: bool | None = None
    apply_chat_template: bool = False
    batch_size: PositiveInt | None = None
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    measure: Literal["js", "kl", "mse", "cosine", "emd"] = "js"
    teacher: Literal["base", "finetuned"] = "base"
    call: str = Field(default="", pattern=r"^$|^[\w.]+:[\w.]+$")
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_entry(cls, entry: Any) -> Any:
        """`{nll: {data: x}}` as `{type: nll, data: x}`."""
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(f" must be one task, as in {{nll: {{data: my.jsonl}}}}, but got {entry!r}.")
        ((kind, options),) = entry.items()
        if kind not in TASKS:
            raise ValueError(f": {unknown('task', str(kind), TASKS)}")
        if not isinstance(options, dict):
            raise ValueError(
                f".{kind} must hold options, as in {{{TASKS[kind][0]}: …}}, but got {options!r}."
            )
        problems = list(_option_problems(kind, options))
        if problems:
            raise ValueError("\n".join(f".{kind}{problem}" for problem in problems))
        given = next(
            (how for key, how in (("prefix", "prefix"), ("pattern", "regex")) if key in options), None
        )
        return {"type": kind, **({"match": given} if given else {}), **options}

    @model_validator(mode="after")
    def _match_has_what_it_needs(self) -> TaskSpec:
        if (self.pattern is not None) != (self.match == "regex"):
            raise ValueError(f".{self.type}: `pattern` and `match: regex` need each other.")
        if (self.prefix is not None) != (self.match == "prefix"):
            raise ValueError(
                f".{self.type}: `prefix` (a number of characters) and `match: prefix` need each other."
            )
        return self


def _option_problems(kind: str, options: Mapping[Any, Any]) -> Iterator[str]:
    known = (*TASKS[kind], *SHARED)
    yield from (f": {unknown('key', str(key), known)}" for key in options if key not in known)
    if options.get(TASKS[kind][0]) in (None, "", []):
        yield f" needs `{TASKS[kind][0]}`."
