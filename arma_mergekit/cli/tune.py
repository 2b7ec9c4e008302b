"""`arma-tune recipe.yml --eval general,domain`: find the alphas."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arma_mergekit.errors import UsageError

if TYPE_CHECKING:
    from arma_mergekit.recipe import Recipe
    from arma_mergekit.tune import Result

__all__ = ["command"]


class Names(click.ParamType[list[str]]):
    """Comma-separated words."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """`a,b` to ["a", "b"]."""
        if isinstance(value, list):
            return value
        return [word.strip() for word in str(value).split(",") if word.strip()]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--eval", "suites", type=Names(), required=True, help="Suites of the recipe to steer by: general,domain."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of the run.  [default: runs/<recipe>]"
)
@click.option("--searchers", type=Names(), help="random, grid, bayes, rl, gradient.  [default: the recipe's]")
@click.option("--trials", type=click.IntRange(1), help="Budget of each arm, in full evaluations.")
@click.option("--seeds", type=Names(), help="One arm per searcher and seed: 0,1,2.")
@click.option("--maximize", metavar="SUITE", help="Raise this suite ...")
@click.option(
    "--keep", metavar="SUITE=SHARE", multiple=True, help="... and keep this share of another: domain=95%."
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of tables.")
def command(recipe: Path, suites: list[str], out: Path | None, as_json: bool, **overrides: Any) -> None:
    """Find the alphas of RECIPE on real evaluations, and say whether they beat one-knob averaging.

    Writes tuned.yml (run it with mergekit-yaml), stock.yml (the same for a mergekit without this package),
    summary.json and trials.jsonl. Start it again with the same recipe and it goes on where it stopped.
    """
    # before torch is imported: idle OpenMP threads that spin cost more than they give on few cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from arma_mergekit.recipe import Recipe

    loaded = adjust(Recipe.load(recipe), overrides)
    out = out or Path("runs") / recipe_name(recipe)
    from arma_mergekit.results import write_results
    from arma_mergekit.tune import Tuner

    log = Log(quiet=as_json)
    result = Tuner(loaded, suites, out, log).run()
    summary = write_results(loaded, result, out)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        click.echo(render(result, out))


def recipe_name(path: Path) -> str:
    """`recipes/icd10/recipe.yml` is `icd10`, `mine.yml` is `mine`."""
    return path.resolve().parent.name if path.stem == "recipe" else path.stem


def adjust(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with what the command line says instead."""
    changes: dict[str, Any] = {k: overrides[k] for k in ("searchers", "trials") if overrides[k]}
    if overrides["seeds"]:
        if not all(seed.isdigit() for seed in overrides["seeds"]):
            raise UsageError(f"--seeds takes whole numbers, but got {','.join(overrides['seeds'])}.")
        changes["seeds"] = [int(seed) for seed in overrides["seeds"]]
    if overrides["keep"] and not overrides["maximize"]:
        raise UsageError("--keep needs --maximize: which suite should rise while the other is kept?")
    if overrides["maximize"]:
        pairs = [pair.partition("=") for pair in overrides["keep"]]
        keep = {suite: share or "100%" for suite, _, share in pairs}
        changes["objective"] = {"maximize": overrides["maximize"], "keep": keep}
    return recipe.with_tune(changes)


class Log:
    """Progress on stderr: a line that updates itself on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self.arm, self.best, self.spent, self.seconds, self.shown = "", float("-inf"), 0.0, 0.0, 0.0
        self.status = ""
        self.best_shares: Mapping[str, float] = {}

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Show one event of a run."""
        if not self.quiet:
            getattr(self, f"on_{event}")(facts)

    def line(self, text: str, *, passing: bool = False) -> None:
        """Print a line; a passing one is overwritten by the next on a terminal."""
        end = "\r" if passing and self.live else "\n"
        clear = "\x1b[2K" if self.live else ""
        click.echo(f"{clear}{text}", err=True, nl=False)
        click.echo(end, err=True, nl=False)

    def on_load(self, facts: Mapping[str, Any]) -> None:
        """Models are being loaded."""
        self.line(f"Loading {facts['base']} and {facts['tuned']}")

    def on_separation(self, facts: Mapping[str, Any]) -> None:
        """Which tasks can tell base from fine-tuned."""
        self.line(f"\n{'task':<28}{'base':>9}{'fine-tuned':>12}{'separation':>12}")
        for found in facts["tasks"]:
            note = "" if found.task in facts["steering"] else "   too weak to steer by: left out"
            self.line(f"{found.task:<28}{found.base:>9.3f}{found.tuned:>12.3f}{found.sigmas:>11.1f}σ{note}")
        self.line("")

    def on_trial(self, facts: Mapping[str, Any]) -> None:
        """One trial was scored, or found in the journal."""
        if facts["arm"] != self.arm:
            if self.arm:
                self.line(self.status)
            self.arm, self.best, self.spent, self.seconds = facts["arm"], float("-inf"), 0.0, 0.0
        self.spent += facts["cost"]
        self.seconds += facts["seconds"]
        if facts["reward"] is not None and facts["part"] is None and facts["reward"] > self.best:
            self.best, self.best_shares = facts["reward"], facts["shares"]
        self.status = self.describe(facts)
        if time.monotonic() - self.shown > (0.2 if self.live else 10.0):
            self.shown = time.monotonic()
            self.line(self.status, passing=True)

    def describe(self, facts: Mapping[str, Any]) -> str:
        """`bayes  12.0/40 evaluations  best 0.812 (general 0.91, domain 0.74)  ETA 1:20`."""
        budget = facts["budget"]
        text = f"{self.arm:<24}{self.spent:>6.1f}{f'/{budget:g}' if budget else '':<4} evaluations"
        if self.best > float("-inf"):
            shares = ", ".join(f"{suite} {share:.2f}" for suite, share in self.best_shares.items())
            text += f"   best {self.best:.3f} ({shares})"
        if budget and facts["fresh"] and self.spent < budget:
            left = int(self.seconds / self.spent * (budget - self.spent))
            text += f"   ETA {left // 60}:{left % 60:02d}"
        return text

    def on_held(self, facts: Mapping[str, Any]) -> None:
        """A finished candidate is scored on held-back items."""
        if self.arm:
            self.line(self.status)
            self.arm = ""
        self.line(f"Held-back items: {facts['name']}", passing=True)


def render(result: Result, out: Path) -> str:
    """The table of held-back scores, the verdicts, and what to run next."""
    keys = list(result.candidates[0].held)
    widths = [max(len(key), 9) + 2 for key in keys]
    lines = ["", "Held-back items (score ± standard error; up is better)", ""]
    lines.append(f"{'':<28}" + "".join(f"{key:>{w}}" for key, w in zip(keys, widths, strict=True)))
    for candidate in result.candidates:
        cells = [f"{m.score:.3f} ± {m.stderr:.3f}" for m in candidate.held.values()]
        mark = "*" if candidate is result.best else " "
        lines.append(
            f"{mark} {candidate.name:<26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    lines += ["", *shares_table(result.shares), ""]
    lines += [f"  {verdict.sentence}" for verdict in result.verdicts]
    lines += [
        "",
        f"Best on the search half: {result.best.name} (*).",
        f"  mergekit-yaml {out / 'tuned.yml'} merged/",
    ]
    return "\n".join(lines)


def shares_table(shares: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """Share kept of each suite: 0 % = the worse of base and fine-tuned, 100 % = the better."""
    suites = list(next(iter(shares.values())))
    lines = [f"{'Share kept':<28}" + "".join(f"{suite:>12}" for suite in suites)]
    for name, row in shares.items():
        lines.append(f"  {name:<26}" + "".join(f"{row[suite]:>11.0%} " for suite in suites))
    return lines
