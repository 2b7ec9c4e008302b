"""Suites: named evaluations made of tasks, built from the `evals` block of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arma_mergekit.errors import DataError, RecipeError, unknown

if TYPE_CHECKING:
    from arma_mergekit.evals.base import Task
    from arma_mergekit.recipe import Recipe, TaskSpec

__all__ = ["make_suites"]


def make_suites(recipe: Recipe, names: Sequence[str], tokenizer: Any) -> dict[str, list[Task]]:
    """The tasks of these suites; RecipeError for a suite the recipe does not define."""
    suites = {}
    for name in names:
        if name not in recipe.evals:
            raise RecipeError(
                unknown("suite", name, recipe.evals) if recipe.evals else f"{recipe.path}: no `evals`."
            )
        suites[name] = [
            make_task(spec, tokenizer, recipe.data_path(spec.data)) for spec in recipe.evals[name]
        ]
        _distinct(name, suites[name])
    return suites


def make_task(spec: TaskSpec, tokenizer: Any, path: Path) -> Task:
    """One task from its options and data file."""
    task = _make(spec, tokenizer, path)
    task.watch = spec.watch
    return task


def _make(spec: TaskSpec, tokenizer: Any, path: Path) -> Task:
    from arma_mergekit.evals import rows, tasks

    name = f"{spec.type}:{path.stem}"
    if spec.type in ("nll", "kl"):
        kind = tasks.NllTask if spec.type == "nll" else tasks.KlTask
        first = rows.read_jsonl(path, [], 1)[0]
        if spec.type == "nll" and "prompt" in first and spec.field not in first:
            items = tasks.answer_items(tokenizer, path, spec.limit)
        else:
            items = tasks.text_items(tokenizer, path, spec.field, spec.max_tokens, limit=spec.limit)
        return kind(name, items, spec.weight)
    if spec.type == "choice":
        return tasks.ChoiceTask(name, tasks.choice_items(tokenizer, path, spec.limit), spec.weight)
    if spec.type == "generate":
        items = tasks.answer_items(tokenizer, path, spec.limit)
        needed = [tasks.needed_tokens(tokenizer, item, spec.prefix) for item in items]
        return tasks.GenerateTask(name, items, needed, spec.weight)
    raise RecipeError(unknown("task", spec.type, ["nll", "kl", "choice", "generate"]))


def _distinct(suite: str, made: Sequence[Task]) -> None:
    names = [task.name for task in made]
    if len(set(names)) != len(names):
        raise DataError(f"Suite {suite!r} has the same task twice: {', '.join(names)}.")
