"""What a tuning run leaves behind: recipes, summary.json and report.html, whole or not at all; study.log for Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from arma_mergekit import __version__, report
from arma_mergekit.checkpoint import open_model
from arma_mergekit.errors import RunError
from arma_mergekit.export import stock_recipe, tuned_recipe
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles
from arma_mergekit.search.bayes import write_studies
from arma_mergekit.whole import write_whole

if TYPE_CHECKING:
    from arma_mergekit.tune import Candidate, Compared, Result, Tuner
    from arma_mergekit.verdict import Difference, Verdict

__all__ = ["merge_command", "summary", "write_best", "write_files", "write_results"]


def write_results(tuner: Tuner, result: Result, out: Path, command: str = "") -> dict[str, Any]:
    """Write the run's files into ``out`` and return the summary. ``command``: the line that made the run."""
    recipe = tuner.recipe
    recipes = {"tuned.yml": result.best, "one-knob.yml": result.rival}
    recipes |= {f"tuned-{name.replace(' ', '-')}.yml": pick for name, pick in result.picks.items()}
    texts = {name: recipe_text(recipe, candidate, out / name) for name, candidate in recipes.items()}
    texts["stock.yml"] = recipe_text(recipe, result.best, out / "stock.yml", stock=True)
    whole = summary(tuner, result) | {
        "command": command,
        "next": merge_command(recipe, out / "tuned.yml"),
        "fingerprint": tuner.journal["fingerprint"],
    }
    texts["summary.json"] = json.dumps(whole, indent=2) + "\n"
    texts["report.html"] = report.render(whole, tuner.journal.records())
    write_files(out, texts)
    if studies := tuner.studies():
        write_studies(out / "study.log", studies)
    return whole


def write_best(recipe: Recipe, best: Candidate, out: Path) -> Path:
    """Only tuned.yml, of a run that was interrupted; returns its path."""
    write_files(out, {"tuned.yml": recipe_text(recipe, best, out / "tuned.yml")})
    return out / "tuned.yml"


def recipe_text(recipe: Recipe, candidate: Candidate, path: Path, stock: bool = False) -> str:
    """A recipe that merges this candidate; ``stock``: for a mergekit without this package."""
    base = open_model(recipe.base_model)
    placed = roles(base.tensors, base.config)
    if stock:
        made = stock_recipe(recipe.raw, placed, dict.fromkeys(base.tensors, 0.0) | candidate.alphas)
    else:
        made = tuned_recipe(recipe.raw, placed, candidate.alphas)
    head = f"# {merge_command(recipe, path)}\n# {candidate.name}: arma-tune {__version__}, see summary.json\n"
    return head + to_yaml(made)


def merge_command(recipe: Recipe, path: Path) -> str:
    """What a user types to merge this recipe; mergekit wants a place for folded adapters."""
    adapters = any("+" in entry.model for entry in recipe.models)
    return f"mergekit-yaml {path} merged/" + (" --lora-merge-cache lora-cache/" if adapters else "")


def summary(tuner: Tuner, result: Result) -> dict[str, Any]:
    """The result as JSON: scores with standard errors, shares kept, alphas, verdicts, cost."""
    recipe, scale = tuner.recipe, result.scale
    watched = [key for key, task in tuner.about.tasks.items() if task.watch]
    return {
        "version": __version__,
        "recipe": str(recipe.path),
        "recipe_content": recipe.raw,
        "weights": {key: task.weight for key, task in tuner.about.tasks.items()},
        "best": result.best.name,
        "rival": result.rival.name,
        "feasible": result.best.feasible,
        "objective": recipe.tune.objective.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        "keep": dict(scale.keep),
        "holdout": recipe.tune.holdout,
        "seeds": list(recipe.tune.seeds),
        "candidates": [candidate_summary(c, result.shares[c.name]) for c in result.candidates],
        "picks": {name: pick.name for name, pick in result.picks.items()},
        "separation": [vars(s) for s in result.separation],
        "steering": scale.steering,
        "watched": watched,
        "verdicts": [verdict_summary(v) for v in result.verdicts],
        "curve": [
            {"alpha": r["values"][0], "shares": r["shares"], "reward": r["reward"]}
            for r in result.curve
            if r["reward"] is not None
        ],
        "divergence": {
            "metric": "js",
            "pairs": {f"{n} against base": by_layer(h) for n, h in result.heads.items() if h},
        },
        "compared": [compared_summary(found) for found in result.compared],
        "ledger": [vars(phase) for phase in result.ledger],
        "forward_tokens": sum(phase.forward_tokens for phase in result.ledger),
        "seconds": round(sum(phase.seconds for phase in result.ledger), 1),
    }


def verdict_summary(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON."""
    return {
        "name": verdict.name,
        "rival": verdict.rival,
        "dominates": verdict.dominates,
        "sentence": verdict.sentence,
        "suites": {suite: vars(d) for suite, d in verdict.suites.items()},
    }


def compared_summary(found: Compared) -> dict[str, Any]:
    """A model that was compared with the best merge, as JSON; its scores are among the candidates."""
    return {
        "name": found.guest.name,
        "model": found.guest.ref,
        "kind": found.guest.kind,
        "verdict": verdict_summary(found.verdict),
        "own": vars(found.own),
        "merge": vars(found.merge),
    }


def by_layer(heads: Mapping[int, list[float]]) -> list[list[float]]:
    """Rows of all depths from the first; an empty one where there is no softmax attention."""
    return [heads.get(depth, []) for depth in range(max(heads) + 1)]


def candidate_summary(candidate: Candidate, shares: Mapping[str, Difference]) -> dict[str, Any]:
    """One candidate as JSON."""
    return {
        "name": candidate.name,
        "search_reward": candidate.reward,
        "search_share": dict(candidate.searched),
        "feasible": candidate.feasible,
        "evaluations": candidate.evaluations,
        "held_back": {
            key: {"score": m.score, "stderr": m.stderr, "loss": m.mean_loss, "items": len(m.ids)}
            for key, m in candidate.held.items()
        },
        "share_kept": {suite: d.mean for suite, d in shares.items()},
        "share_stderr": {suite: d.stderr for suite, d in shares.items()},
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


def write_files(out: Path, texts: Mapping[str, str]) -> None:
    """Write the run's files; RunError leaves the old ones as they were."""
    try:
        write_whole({out / name: text for name, text in texts.items()})
    except OSError as error:
        raise RunError(
            f"Cannot write the results to {out}: {error.strerror}. Every score is in the journal; make room and start "
            "the same command again."
        ) from error
