"""What a tuning run leaves behind: tuned.yml, stock.yml, summary.json. Each appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from arma_mergekit import __version__
from arma_mergekit.checkpoint import open_model
from arma_mergekit.export import stock_recipe, tuned_recipe
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles

if TYPE_CHECKING:
    from arma_mergekit.tune import Candidate, Result

__all__ = ["summary", "write_results", "write_whole"]


def write_results(recipe: Recipe, result: Result, out: Path) -> dict[str, Any]:
    """Write the run's files into ``out`` and return the summary."""
    base = open_model(recipe.base_model)
    placed = roles(base.tensors, base.config)
    best = result.best
    head = f"# {best.name}: found by arma-tune {__version__}, see summary.json\n"
    for name, made in (
        ("tuned.yml", tuned_recipe(recipe.raw, placed, best.alphas)),
        ("stock.yml", stock_recipe(recipe.raw, placed, complete(recipe, base.tensors, best.alphas))),
    ):
        write_whole(out / name, f"# mergekit-yaml {out / name} merged/\n{head}" + to_yaml(made))
    whole = summary(recipe, result)
    write_whole(out / "summary.json", json.dumps(whole, indent=2) + "\n")
    return whole


def complete(recipe: Recipe, tensors: Mapping[str, Any], alphas: Mapping[str, float]) -> dict[str, float]:
    """Alphas of all tensors; those equal in both models take the base's."""
    return dict.fromkeys(tensors, 0.0) | dict(alphas)


def summary(recipe: Recipe, result: Result) -> dict[str, Any]:
    """The result as JSON: scores with standard errors, shares kept, alphas, verdicts, cost."""
    return {
        "version": __version__,
        "recipe": str(recipe.path),
        "best": result.best.name,
        "rival": result.rival.name,
        "candidates": [candidate_summary(c, result.shares[c.name]) for c in result.candidates],
        "separation": [vars(s) for s in result.separation],
        "verdicts": [
            {
                "name": v.name,
                "rival": v.rival,
                "dominates": v.dominates,
                "sentence": v.sentence,
                "suites": {s: {"mean": d.mean, "stderr": d.stderr} for s, d in v.suites.items()},
            }
            for v in result.verdicts
        ],
        "forward_tokens": result.tokens,
        "seconds": round(result.seconds, 1),
    }


def candidate_summary(candidate: Candidate, shares: Mapping[str, float]) -> dict[str, Any]:
    """One candidate as JSON."""
    return {
        "name": candidate.name,
        "search_reward": candidate.reward,
        "feasible": candidate.feasible,
        "evaluations": candidate.evaluations,
        "held_back": {
            key: {"score": m.score, "stderr": m.stderr, "loss": m.mean_loss, "items": len(m.ids)}
            for key, m in candidate.held.items()
        },
        "share_kept": dict(shares),
        "alphas": candidate.alphas,
    }


def to_yaml(data: Mapping[str, Any]) -> str:
    """YAML with lists of numbers on one line."""

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, row: list[Any]) -> yaml.Node:
        flat = all(isinstance(x, (int, float)) for x in row)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=flat)

    Dumper.add_representer(list, represent)
    return str(yaml.dump(dict(data), Dumper=Dumper, sort_keys=False, width=120))


def write_whole(path: Path, text: str) -> None:
    """Write beside the target, sync, rename."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
