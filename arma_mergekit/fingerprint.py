"""What makes a run the same run: flat facts of its recipe, data and models.

It knows recipes and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arma_mergekit import __version__
from arma_mergekit.cache import hashed
from arma_mergekit.digest import DigestMemo, sha256_of
from arma_mergekit.evals import suite_specs
from arma_mergekit.plan import Plan
from arma_mergekit.recipe import Recipe

__all__ = ["digest_of", "fingerprint"]

FREE = ("trials", "seeds", "searchers", "compare")  # may change from one start of a run to the next


def fingerprint(recipe: Recipe, suites: Sequence[str], planned: Plan, memo: DigestMemo) -> dict[str, Any]:
    """Flat facts: every entry of the recipe that decides a score, suites, digests of data and models, version."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    for key in FREE:
        content.get("tune", {}).pop(key, None)
    specs = suite_specs(recipe, suites)
    content["evals"] = {
        s: [t.model_dump(mode="json", exclude_none=True) for t in specs[s]] for s in sorted(specs)
    }
    facts = {f"recipe: {name}": value for name, value in flat(content)}
    paths = {path for tasks in specs.values() for task in tasks for path in task.paths}
    if recipe.tune.regularizer is not None:
        paths.add(recipe.tune.regularizer.text)
    for path in sorted(paths):
        for file in files(recipe.data_path(path)):
            facts[f"data {path}: {file.name}"] = sha256_of(file)
    for model in [planned.base, *planned.finetuned] if planned.base else []:
        for file in model.files:
            facts[f"model {model.ref}: {file.name}"] = memo.digest(file)
    return facts | {"suites": sorted(suites), "version": __version__}


def digest_of(paths: Sequence[Path], memo: DigestMemo) -> str:
    """Of files, by their names and what is in them."""
    return hashed([[path.name, memo.digest(path)] for path in paths])


def files(path: Path) -> list[Path]:
    """A file, or the files below a directory."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists of mappings by dotted name."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list) and any(isinstance(row, Mapping) for row in content):
        for k, row in enumerate(content):
            yield from flat(row, f"{name}.{k}")
    else:
        yield name, content
