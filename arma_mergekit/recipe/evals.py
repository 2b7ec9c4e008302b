"""The `evals` block: suites of tasks, each `{type: options}`, or the name of an lm-eval task or group.

It knows which options a task has; the tasks themselves live in arma_mergekit/evals.

    nll         {data, field | prompt + answer}   NLL per token, of whole texts or of answers given prompts
    kl          {data, field}                     KL(base || merged) per token; no labels
    choice      {data, prompt, choices, answer}   multiple choice by length-normalised likelihood
    generate    {data, prompt, answer, prefix}    greedy decoding against the answer, or what a regex finds in it
    divergence  {data, field, metric, teacher}    attention probabilities against those of base or fine-tuned
    lm_eval     {tasks, include_path, …}          tasks and groups of lm-eval by name
    python      {function, data, options}         a function of your own
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from arma_mergekit.errors import unknown
from arma_mergekit.recipe.strict import Strict, listed

__all__ = ["TASKS", "TaskSpec"]

TEXT = ("data", "field", "max_tokens", "max_length")
TASKS: Mapping[str, tuple[str, ...]] = {  # type -> options beside those that all have; the first is needed
    "nll": (*TEXT, "prompt", "answer", "answer_only"),
    "kl": TEXT,
    "choice": ("data", "prompt", "choices", "answer"),
    "generate": ("data", "prompt", "answer", "prefix", "regex", "max_new_tokens"),
    "divergence": (*TEXT, "metric", "teacher"),
    "lm_eval": (
        "tasks", "include_path", "num_fewshot", "samples", "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs",
        "metric",
    ),
    "python": ("function", "data", "options"),
}  # fmt: skip
SHARED = ("weight", "limit", "watch")
DIVERGENCES = ("js", "kl", "mse", "cosine", "emd")
FUNCTION = re.compile(r"([^\W\d]\w*(\.\w+)*|.+\.py):\w+")


class TaskSpec(Strict):
    """One task: its type, the options that type has, and defaults for all others.

    Paths are relative to the recipe (`Recipe.data_path`). ``field``, ``prompt``, ``answer`` and ``choices`` name what
    the records of ``data`` hold. ``weight`` counts within the suite, ``limit`` cuts the number of items. ``watch``:
    scored for the verdict only, no search sees it. ``max_tokens`` cuts the file, ``max_length`` each whole text.
    ``answer_only``: None lets the data decide (the first record has ``prompt``, but not ``field``). ``prefix``:
    characters of the answer that must agree; ``regex``: what it finds in ``max_new_tokens`` must be the answer.

    ``metric``: of a divergence, js unless given; of lm-eval tasks, their first (`name` or `name,filter`). ``samples``:
    document numbers by lm-eval task. ``fewshot_as_multiturn``: None is what ``apply_chat_template`` is. ``function``:
    `module:name` or `file.py:name`; ``options``: its keyword arguments.
    """

    type: Literal["nll", "kl", "choice", "generate", "divergence", "lm_eval", "python"]
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
    prefix: PositiveInt | None = None
    regex: str | None = None
    max_new_tokens: PositiveInt | None = None
    metric: str | None = None
    teacher: Literal["base", "finetuned"] = "base"
    tasks: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    include_path: Path | None = None
    num_fewshot: NonNegativeInt | None = None
    samples: dict[str, Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: dict[str, Any] | None = None
    function: str = ""
    options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_entry(cls, entry: Any) -> Any:
        """`{nll: {data: x}}` as `{type: nll, data: x}`, and `name` as `{type: lm_eval, tasks: [name]}`."""
        if isinstance(entry, str) and entry:
            return {"type": "lm_eval", "tasks": [entry]}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(
                f" must be one task, as in {{nll: {{data: my.jsonl}}}}, or a name of lm-eval's, but got {entry!r}."
            )
        ((kind, options),) = entry.items()
        if kind not in TASKS:
            raise ValueError(f": {unknown('task', str(kind), TASKS)}")
        if not isinstance(options, dict):
            raise ValueError(
                f".{kind} must hold options, as in {{{TASKS[kind][0]}: …}}, but got {options!r}."
            )
        problems = [*_option_problems(kind, options), *CHECKS.get(kind, lambda _: ())(options)]
        if problems:
            raise ValueError("\n".join(f".{kind}{problem}" for problem in problems))
        return {"type": kind, **options}

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that it names, of data and of code, and directories that stand for what they hold."""
        module = self.function.partition(":")[0]
        code = (Path(module),) if module.endswith(".py") else ()
        data = (self.data,) if self.data != Path() else ()
        return (*data, *code, *((self.include_path,) if self.include_path else ()))

    @property
    def code(self) -> str | None:
        """What it runs that comes with the recipe: a function, or a folder of lm-eval's YAML files, which may call."""
        return self.function or (str(self.include_path) if self.include_path else None)


def _option_problems(kind: str, options: Mapping[Any, Any]) -> Iterator[str]:
    known = (*TASKS[kind], *SHARED)
    yield from (f": {unknown('key', str(key), known)}" for key in options if key not in known)
    needed = TASKS[kind][0]
    if options.get(needed) in (None, "", []):
        yield f" needs `{needed}`."


def _generate_problems(options: Mapping[Any, Any]) -> Iterator[str]:
    regex = options.get("regex")
    if regex is None and options.get("max_new_tokens") is not None:
        yield " has `max_new_tokens`, which needs `regex`: without one, as many as the answer has are compared."
    if regex is not None and options.get("prefix") is not None:
        yield " has both `regex` and `prefix`; give one."
    try:
        re.compile(regex if isinstance(regex, str) else "")
    except re.error as error:
        yield f".regex must be a regular expression, but {regex!r} is none ({error})."


def _divergence_problems(options: Mapping[Any, Any]) -> Iterator[str]:
    metric = options.get("metric")
    if metric is not None and metric not in DIVERGENCES:
        yield f": {unknown('metric', str(metric), DIVERGENCES)}"


def _lm_eval_problems(options: Mapping[Any, Any]) -> Iterator[str]:
    if options.get("limit") is not None and options.get("samples") is not None:
        yield " has both `limit` and `samples`; give one."
    if options.get("fewshot_as_multiturn") and not options.get("apply_chat_template"):
        yield " has `fewshot_as_multiturn`, which needs `apply_chat_template: true`."


def _python_problems(options: Mapping[Any, Any]) -> Iterator[str]:
    function = options.get("function")
    if function and not (isinstance(function, str) and FUNCTION.fullmatch(function)):
        yield f".function must be module:name or file.py:name, but got {function!r}."
    if function and options.get("data") is None and options.get("limit") is None:
        yield " needs `data`, or a `limit`: how many items the function makes up itself."


CHECKS = {
    "generate": _generate_problems,
    "divergence": _divergence_problems,
    "lm_eval": _lm_eval_problems,
    "python": _python_problems,
}
