"""What a tuning run leaves behind: tuned.yml, stock.yml, one-knob.yml and summary.json, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from arma_mergekit import __version__
from arma_mergekit.checkpoint import open_model
from arma_mergekit.errors import RunError
from arma_mergekit.export import stock_recipe, tuned_recipe
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles

if TYPE_CHECKING:
    from arma_mergekit.tune import Candidate, Result

__all__ = ["merge_command", "summary", "write_results"]


def write_results(recipe: Recipe, result: Result, out: Path) -> dict[str, Any]:
    """Write the run's files into ``out`` and return the summary."""
    base = open_model(recipe.base_model)
    placed = roles(base.tensors, base.config)
    whole = summary(recipe, result)
    best, rival = result.best, result.rival
    recipes = {
        "tuned.yml": (best, tuned_recipe(recipe.raw, placed, best.alphas)),
        "stock.yml": (best, stock_recipe(recipe.raw, placed, dict.fromkeys(base.tensors, 0.0) | best.alphas)),
        "one-knob.yml": (rival, tuned_recipe(recipe.raw, placed, rival.alphas)),
    }
    texts = {}
    for name, (candidate, made) in recipes.items():
        head = f"# {merge_command(recipe, out / name)}\n# {candidate.name}: arma-tune {__version__}, see summary.json\n"
        texts[name] = head + to_yaml(made)
    write_whole(out, {**texts, "summary.json": json.dumps(whole, indent=2) + "\n"})
    return whole


def merge_command(recipe: Recipe, path: Path) -> str:
    """What a user types to merge this recipe; mergekit wants a place for folded adapters."""
    adapters = any("+" in entry.model for entry in recipe.models)
    return f"mergekit-yaml {path} merged/" + (" --lora-merge-cache lora-cache/" if adapters else "")


def summary(recipe: Recipe, result: Result) -> dict[str, Any]:
    """The result as JSON: scores with standard errors, shares kept, alphas, verdicts, cost."""
    return {
        "version": __version__,
        "recipe": str(recipe.path),
        "best": result.best.name,
        "rival": result.rival.name,
        "feasible": result.best.feasible,
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


def write_whole(out: Path, texts: Mapping[str, str]) -> None:
    """Write all files beside their places and sync them, then rename: a full disk leaves the old ones as they were."""
    drafts = {out / f".{name}.draft": out / name for name in texts}
    try:
        for (draft, _), text in zip(drafts.items(), texts.values(), strict=True):
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for draft, path in drafts.items():
            draft.replace(path)
    except OSError as error:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        raise RunError(
            f"Cannot write the results to {out}: {error.strerror}. Every score is in the journal; make room and start "
            "the same command again."
        ) from error
