"""`arma-tune recipe.yml --eval general,domain`: find the alphas."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arma_mergekit.errors import UsageError

if TYPE_CHECKING:
    from arma_mergekit.recipe import Recipe
    from arma_mergekit.tune import Result

__all__ = ["command"]

INFEASIBLE = 5  # exit code: no candidate keeps what was asked


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
def command(recipe: Path, suites: list[str], out: Path | None, as_json: bool, **overrides: Any) -> int:
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
    from arma_mergekit.results import merge_command, write_results
    from arma_mergekit.tune import Tuner

    log = Log(quiet=as_json)
    if not suites or len(set(suites)) != len(suites):
        raise UsageError(
            f"--eval takes suites of the recipe, each once, but got {','.join(suites) or 'none'}."
        )
    tuner = Tuner(loaded, suites, out, log)
    try:
        result = tuner.run()
        summary = write_results(loaded, result, out)
    finally:
        tuner.journal.close()
    keep = loaded.tune.objective.keep
    click.echo(
        json.dumps(summary, indent=2)
        if as_json
        else render(result, keep, merge_command(loaded, out / "tuned.yml"))
    )
    return 0 if result.best.feasible else INFEASIBLE


def recipe_name(path: Path) -> str:
    """`recipes/icd10/recipe.yml` is `icd10`, `mine.yml` is `mine`."""
    return path.resolve().parent.name if path.stem == "recipe" else path.stem


def adjust(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with what the command line says instead."""
    changes: dict[str, Any] = {}
    for key in ("searchers", "trials", "seeds"):
        if overrides[key] is not None:
            changes[key] = overrides[key]
    if "seeds" in changes:
        changes["seeds"] = [whole_number(seed) for seed in changes["seeds"]]
    if [] in changes.values():
        raise UsageError("--searchers and --seeds take at least one entry.")
    if overrides["keep"] and not overrides["maximize"]:
        raise UsageError("--keep needs --maximize: which suite should rise while the other is kept?")
    if overrides["maximize"]:
        changes["objective"] = {"maximize": overrides["maximize"], "keep": dict(map(kept, overrides["keep"]))}
    return recipe.with_tune(changes)


def whole_number(text: str) -> int:
    """A seed."""
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"--seeds takes whole numbers, but got {text!r}.")
    return int(text)


def kept(pair: str) -> tuple[str, str]:
    """`domain=95%` as (domain, 95%)."""
    suite, _, share = pair.partition("=")
    if not suite or not share.strip().rstrip("%").replace(".", "", 1).isdecimal():
        raise UsageError(f"--keep takes a suite and a share, as in domain=95%, but got {pair!r}.")
    return suite, share


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

    def on_warning(self, facts: Mapping[str, Any]) -> None:
        """Something of the plan that is worth knowing."""
        self.line(f"Warning: {facts['text']}")

    def on_load(self, facts: Mapping[str, Any]) -> None:
        """Models are being loaded."""
        self.line(f"Loading {facts['base']} and {facts['tuned']}")

    def on_separation(self, facts: Mapping[str, Any]) -> None:
        """Which tasks can tell base from fine-tuned."""
        self.line(f"\n{'task':<28}{'base':>9}{'fine-tuned':>12}{'separation of losses':>22}")
        for found in facts["tasks"]:
            note = "" if found.task in facts["steering"] else "   too weak to steer by: left out"
            self.line(
                f"{found.task:<28}{shown(found.base):>9}{shown(found.tuned):>12}{found.sigmas:>21.1f}σ{note}"
            )
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


def render(result: Result, keep: Mapping[str, float], command: str) -> str:
    """The table of held-back scores, the verdicts, and what to run next."""
    lines = ["", *scores_table(result), "", *shares_table(result.shares), ""]
    lines += [f"  {verdict.sentence}" for verdict in result.verdicts]
    lines += [
        "",
        f"Best on the search items: {result.best.name} (*).",
        *cautions(result, keep),
        f"  {command}",
    ]
    return "\n".join(lines)


def cautions(result: Result, keep: Mapping[str, float]) -> list[str]:
    """What speaks against taking the best as it is."""
    best, lines = result.best, []
    for suite, least in keep.items():
        if not best.feasible:
            lines.append(
                f"No candidate keeps {least:.0%} of {suite} on the search items; this one comes closest."
            )
        share = result.shares[best.name].get(suite)
        if share is not None and share < least:
            lines.append(f"On held-back items it keeps {share:.0%} of {suite}, not {least:.0%}.")
    if best.name in ("base", "fine-tuned"):
        lines.append(f"No average scores higher than {best.name} as it is.")
    if any(v.name == best.name and not v.dominates for v in result.verdicts):
        lines.append(f"It does not beat {result.rival.name} on held-back items: consider one-knob.yml.")
    return lines


def scores_table(result: Result) -> list[str]:
    """Headline scores on held-back items."""
    keys = list(result.candidates[0].held)
    widths = [max(len(key), 15) + 2 for key in keys]
    lines = ["Held-back items (score ± standard error; up is better)", ""]
    lines.append(f"{'':<28}" + "".join(f"{key:>{w}}" for key, w in zip(keys, widths, strict=True)))
    for candidate in result.candidates:
        cells = [f"{shown(m.score)} ± {m.stderr:.3f}" for m in candidate.held.values()]
        mark = "*" if candidate is result.best else " "
        lines.append(
            f"{mark} {candidate.name:<26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    return lines


def shown(score: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(score, 3) + 0.0:.3f}"


def shares_table(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Share kept of each suite: 0 % = the worse of base and fine-tuned, 100 % = the better."""
    suites = list(next(iter(shares.values())))
    lines = [f"{'Share kept':<28}" + "".join(f"{suite:>12}" for suite in suites)]
    for name, row in shares.items():
        lines.append(f"  {name:<26}" + "".join(f"{row[suite]:>11.0%} " for suite in suites))
    return lines
