"""Suites: named evaluations made of tasks, built from the `evals` block of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arma_mergekit.errors import DataError, RecipeError, unknown

if TYPE_CHECKING:
    from arma_mergekit.evals.base import Task
    from arma_mergekit.evals.rows import Item, Limits
    from arma_mergekit.recipe import Recipe, TaskSpec

__all__ = ["make_suites"]


def make_suites(
    recipe: Recipe,
    names: Sequence[str],
    tokenizer: Any,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> dict[str, list[Task]]:
    """The tasks of these suites; RecipeError for a suite the recipe does not define, DataError for unusable data.

    ``max_positions``: tokens that the model takes; ``vocabulary``: rows of its embedding.
    """
    from arma_mergekit.evals.rows import Limits

    suites = {}
    for name in names:
        if name not in recipe.evals:
            raise RecipeError(
                unknown("suite", name, recipe.evals) if recipe.evals else f"{recipe.path}: no `evals`."
            )
        suites[name] = [
            make_task(spec, tokenizer, recipe.data_path(spec.data), Limits(max_positions, vocabulary))
            for spec in recipe.evals[name]
        ]
        _distinct(name, suites[name])
    return suites


def make_task(spec: TaskSpec, tokenizer: Any, path: Path, limits: Limits) -> Task:
    """One task from its options and data file."""
    from arma_mergekit.evals import tasks

    name = f"{spec.type}:{path.stem}"
    items = _items(spec, tokenizer, path, limits)
    task: Task
    if spec.type == "generate":
        needed = [tasks.needed_tokens(tokenizer, item, spec.prefix) for item in items]
        task = tasks.GenerateTask(name, items, needed, spec.weight)
    else:
        kinds: Mapping[str, Callable[..., Task]]
        kinds = {"nll": tasks.NllTask, "kl": tasks.KlTask, "choice": tasks.ChoiceTask}
        task = kinds[spec.type](name, items, spec.weight)
    task.watch = spec.watch
    return task


def _items(spec: TaskSpec, tokenizer: Any, path: Path, limits: Limits) -> list[Item]:
    from arma_mergekit.evals import tasks

    cut: Any = {"limit": spec.limit, "limits": limits}
    if spec.type == "choice":
        return tasks.choice_items(tokenizer, path, spec.prompt, spec.choices, spec.answer, **cut)
    if spec.type == "generate" or (spec.type == "nll" and _answers_only(spec, path)):
        return tasks.answer_items(tokenizer, path, spec.prompt, spec.answer, spec.max_tokens, **cut)
    return tasks.text_items(tokenizer, path, spec.field, spec.max_tokens, spec.max_length, **cut)


def _answers_only(spec: TaskSpec, path: Path) -> bool:
    from arma_mergekit.evals.rows import read_jsonl

    if spec.answer_only is not None:
        return spec.answer_only
    first = read_jsonl(path, [], 1)[0].fields
    return spec.prompt in first and spec.field not in first


def _distinct(suite: str, made: Sequence[Task]) -> None:
    names = [task.name for task in made]
    if len(set(names)) != len(names):
        raise DataError(f"Suite {suite!r} has the same task twice: {', '.join(names)}.")
