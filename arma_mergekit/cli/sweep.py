"""`arma sweep recipe.yml`: one alpha for everything (or for attention), a curve and a recommendation in minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arma_mergekit.cli.tune import (
    Names,
    cache_option,
    cache_path,
    check_suites,
    command_line,
    quiet_libraries,
    recipe_name,
)

if TYPE_CHECKING:
    from arma_mergekit.tune import Result

__all__ = ["command"]

BAR = 20  # characters of 100 %


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--eval", "suites", type=Names(), help="Suites to score.  [default: all of the recipe]")
@click.option(
    "--points", type=click.IntRange(3, 41), default=11, show_default=True, help="Alphas from 0 to 1."
)
@click.option(
    "--scope",
    type=click.Choice(["everything", "attention"]),
    default="everything",
    show_default=True,
    help="What the alpha is for; `attention` leaves the rest fine-tuned.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of the run.  [default: runs/<recipe>-sweep]"
)
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of tables.")
def command(
    recipe: Path,
    suites: list[str] | None,
    points: int,
    scope: str,
    out: Path | None,
    cache: str,
    as_json: bool,
) -> int:
    """Score averages of base and fine-tuned with one alpha, and say which to use.

    Writes tuned.yml (run it with mergekit-yaml), summary.json, report.html and trials.jsonl.
    """
    quiet_libraries()
    from arma_mergekit.recipe import Recipe

    loaded = Recipe.load(recipe)
    chosen = list(loaded.evals) if suites is None else suites
    out = out or Path("runs") / f"{recipe_name(recipe)}-sweep"
    check_suites(chosen)
    from arma_mergekit.cli.log import Log
    from arma_mergekit.results import write_results
    from arma_mergekit.run import open_run

    values = [round(k / (points - 1), 4) for k in range(1, points - 1)]
    with open_run(loaded, chosen, out, Log(quiet=as_json), cache_path(cache)) as tuner:
        result = tuner.sweep(values, scope)
        summary = write_results(tuner, result, out, command_line("arma sweep", recipe, chosen, out))
    click.echo(json.dumps(summary, indent=2) if as_json else render(result, summary["next"]))
    return 0


def render(result: Result, command: str) -> str:
    """The curve on search items, and the best with its held-back shares."""
    from arma_mergekit.cli.tables import scores_table

    best = result.best
    kept = ", ".join(f"{d.mean:.0%} ± {d.stderr:.0%} of {s}" for s, d in result.shares[best.name].items())
    return "\n".join(
        [
            "",
            "Share kept on search items (0 = the worse of base and fine-tuned, 1 = the better)",
            "",
            *curve(rows(result)),
            "",
            *scores_table(result),
            "",
            f"Use {best.name}: on held-back items it keeps {kept}.",
            f"  {command}",
        ]
    )


def rows(result: Result) -> list[tuple[float, Mapping[str, float], float]]:
    """Alpha, shares and reward of every point, the ends too."""
    ends = {c.name: c for c in result.candidates[:2]}
    scored: list[tuple[float, Mapping[str, float], float]] = [
        (alpha, ends[name].searched, ends[name].reward or 0.0)
        for name, alpha in (("base", 0.0), ("fine-tuned", 1.0))
    ]
    scored += [(r["values"][0], r["shares"], r["reward"]) for r in result.curve if r["reward"] is not None]
    return sorted(scored, key=lambda row: row[0])


def curve(points: Sequence[tuple[float, Mapping[str, Any], float]]) -> list[str]:
    """One line a point, one bar a suite."""
    suites = list(points[0][1])
    best = max(points, key=lambda row: row[2])[0]
    lines = [f"  {'alpha':<8}" + "".join(f"{suite:<{BAR + 8}}" for suite in suites) + "objective"]
    for alpha, shares, reward in points:
        bars = "".join(f"{bar(shares[s])} {shares[s]:>5.0%}  " for s in suites)
        lines.append(f"{'*' if alpha == best else ' '} {alpha:<8g}{bars}{reward:>9.3f}")
    return lines


def bar(share: float) -> str:
    """`████████·····` of a share, cut to 0 and 1."""
    filled = round(BAR * min(1.0, max(0.0, share)))
    return "█" * filled + "·" * (BAR - filled)
