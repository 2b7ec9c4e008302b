"""Suites: named evaluations made of tasks, built from the `evals` block of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arma_mergekit.errors import DataError, RecipeError, unknown

if TYPE_CHECKING:
    from arma_mergekit.evals.base import Task
    from arma_mergekit.evals.rows import Item, Limits
    from arma_mergekit.recipe import Recipe, TaskSpec

__all__ = ["REGULARIZER", "check_test_sets", "make_suites", "suite_specs"]

REGULARIZER = "regularizer"  # a suite of tasks that cost, rather than count

# Names of test sets that results are reported on: anywhere in a name as a word of it …
TEST_SETS = (
    "agieval", "aime", "arc_challenge", "arc_easy", "bbh", "big_bench", "bigbench", "boolq", "ceval", "cmmlu",
    "commonsenseqa", "commonsense_qa", "gpqa", "gsm8k", "hellaswag", "hendrycks_math", "humaneval", "ifeval", "lambada",
    "leaderboard", "livecodebench", "math_500", "mbpp", "metabench", "mgsm", "minerva_math", "mmlu", "mt_bench",
    "musr", "naturalquestions", "nq_open", "openbookqa", "openllm", "piqa", "siqa", "social_iqa", "squad", "squadv2",
    "super_glue", "tinybenchmarks", "triviaqa", "truthfulqa", "wikitext", "winogrande",
)  # fmt: skip
# … or, of those that mean other things too, the whole name but for a split.
WORDS = (
    "arc", "ai2_arc", "copa", "drop", "glue", "logiqa", "math", "medqa", "quac", "race", "sciq", "swag", "wsc",
)  # fmt: skip
TEST_SET = re.compile(
    rf"(?:^|.*_)((?:{'|'.join(TEST_SETS)})(?:_.*)?)$|^((?:{'|'.join(WORDS)})(?:_(?:test|dev|val|validation|train))?)$"
)


def suite_specs(recipe: Recipe, names: Sequence[str]) -> dict[str, tuple[TaskSpec, ...]]:
    """What these suites are made of; a name that is none of the recipe's may be an lm-eval task or group.

    RecipeError for a name that is neither. Nothing is loaded.
    """
    return {name: recipe.evals.get(name) or (_named_task(recipe, name),) for name in names}


def _named_task(recipe: Recipe, name: str) -> TaskSpec:
    from arma_mergekit.evals.lm_eval import knows
    from arma_mergekit.recipe import TaskSpec

    if knows(name):
        return TaskSpec.model_validate(name)
    raise RecipeError(
        unknown("suite", name, recipe.evals)
        if recipe.evals
        else f"{recipe.path}: no `evals`, and lm-eval has no task {name!r}."
    )


def check_test_sets(recipe: Recipe, suites: Sequence[str], allow: bool = False) -> None:
    """RecipeError if a search would steer by a well-known test set, by the name of its task or data file."""
    if allow:
        return
    for suite, specs in suite_specs(recipe, suites).items():
        for name in (n for spec in specs if not spec.watch for n in (*spec.tasks, spec.data.stem)):
            if TEST_SET.match(re.sub(r"[\W_]+", "_", name.lower())):
                raise RecipeError(
                    f"Suite {suite} would tune on {name}, a test set that results are reported on; use other data, set "
                    "`watch: true` to score it for the verdict only, or allow it with --allow-test-sets."
                )


def make_suites(
    recipe: Recipe,
    names: Sequence[str],
    tokenizer: Any,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> dict[str, list[Task]]:
    """The tasks of these suites, and of the recipe's regulariser as suite `REGULARIZER`.

    RecipeError for an unknown name (`suite_specs`), DataError for unusable data. ``max_positions``: tokens that the
    model takes; ``vocabulary``: rows of its embedding.
    """
    from arma_mergekit.evals.rows import Limits
    from arma_mergekit.recipe import TaskSpec

    limits, suites = Limits(max_positions, vocabulary), {}
    wanted = suite_specs(recipe, names)
    if recipe.tune.regularizer is not None:
        wanted[REGULARIZER] = (TaskSpec.model_validate(recipe.tune.regularizer.task),)
    for name, specs in wanted.items():
        suites[name] = [task for spec in specs for task in make_tasks(recipe, spec, tokenizer, limits)]
        _distinct(name, suites[name])
    return suites


def make_tasks(recipe: Recipe, spec: TaskSpec, tokenizer: Any, limits: Limits) -> list[Task]:
    """The tasks of an entry: one, or those that a name of lm-eval's stands for."""
    if spec.type == "lm_eval":
        from arma_mergekit.evals import lm_eval

        include = recipe.data_path(spec.include_path) if spec.include_path else None
        made = lm_eval.make_tasks(spec, tokenizer, include, limits)
    elif spec.type == "python":
        made = [_python(recipe, spec, tokenizer)]
    else:
        made = [_on_rows(spec, tokenizer, recipe.data_path(spec.data), limits)]
    for task in made:
        task.watch = spec.watch
    return made


def _python(recipe: Recipe, spec: TaskSpec, tokenizer: Any) -> Task:
    from arma_mergekit.evals.python import PythonTask, load_function
    from arma_mergekit.evals.sources import read_records

    function = load_function(spec.function, recipe.path.parent)
    if spec.data == Path():
        records: list[dict[str, Any]] = [{"id": str(i)} for i in range(spec.limit or 0)]
    else:
        read = read_records(recipe.data_path(spec.data), [], spec.limit)
        records = [{**record.fields, "id": record.id} for record in read]
    name = f"python:{spec.function.rpartition(':')[2]}"
    return PythonTask(name, function, tokenizer, records, spec.options, spec.weight)


def _on_rows(spec: TaskSpec, tokenizer: Any, path: Path, limits: Limits) -> Task:
    from arma_mergekit.evals import tasks

    name = f"{spec.type}:{path.stem}"
    items = _items(spec, tokenizer, path, limits)
    if spec.type == "generate":
        needed = [tasks.needed_tokens(tokenizer, item, spec.prefix) for item in items]
        length = spec.max_new_tokens or tasks.MAX_NEW_TOKENS
        return tasks.GenerateTask(
            name, items, needed, spec.weight, tokenizer=tokenizer, regex=spec.regex, max_new_tokens=length
        )
    if spec.type == "divergence":
        from arma_mergekit.evals.divergence import DivergenceTask

        toward = "" if spec.teacher == "base" else f"-{spec.teacher}"
        return DivergenceTask(name + toward, items, spec.metric or "js", spec.teacher, spec.weight)
    kinds: Mapping[str, Callable[..., Task]]
    kinds = {"nll": tasks.NllTask, "kl": tasks.KlTask, "choice": tasks.ChoiceTask}
    return kinds[spec.type](name, items, spec.weight)


def _items(spec: TaskSpec, tokenizer: Any, path: Path, limits: Limits) -> list[Item]:
    from arma_mergekit.evals import tasks

    cut: Any = {"limit": spec.limit, "limits": limits}
    if spec.type == "choice":
        return tasks.choice_items(tokenizer, path, spec.prompt, spec.choices, spec.answer, **cut)
    if spec.type == "generate" or (spec.type == "nll" and _answers_only(spec, path)):
        room = (spec.max_new_tokens or tasks.MAX_NEW_TOKENS) if spec.regex is not None else 0
        return tasks.answer_items(
            tokenizer, path, spec.prompt, spec.answer, spec.max_tokens, **cut, new_tokens=room
        )
    return tasks.text_items(tokenizer, path, spec.field, spec.max_tokens, spec.max_length, **cut)


def _answers_only(spec: TaskSpec, path: Path) -> bool:
    from arma_mergekit.evals.sources import read_records

    if spec.answer_only is not None:
        return spec.answer_only
    first = read_records(path, [], 1)[0].fields
    return spec.prompt in first and spec.field not in first


def _distinct(suite: str, made: Sequence[Task]) -> None:
    names = [task.name for task in made]
    if len(set(names)) != len(names):
        raise DataError(f"Suite {suite!r} has the same task twice: {', '.join(names)}.")
