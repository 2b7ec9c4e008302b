"""`arma gate out/ --against arma.lock.json`: is this checkpoint as good as promised?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arma_mergekit.cli.tune import quiet_libraries

if TYPE_CHECKING:
    from arma_mergekit.ci import Check

__all__ = ["command"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="LOCK",
    help="The promise: an arma.lock.json, of OUT or of an earlier release.  [default: OUT/arma.lock.json]",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe whose evals and data to score by.  [default: the one in LOCK]",
)
@click.option("--recorded", is_flag=True, help="Compare what the locks of OUT and LOCK say; load no model.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML to this file.")
@click.option("--summary", type=click.Path(path_type=Path), help="Write a summary in markdown to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    out: Path,
    against: Path | None,
    recipe: Path | None,
    recorded: bool,
    junit: Path | None,
    summary: Path | None,
    as_json: bool,
) -> int:
    """Score the merged checkpoint OUT on held-back items, as transformers loads it, and compare with a promise.

    Against the lock of OUT itself: does what will be shipped score what was found when it was tuned? Against that of an
    earlier release: is it at least as good, on the same items?

    \b
    Exit code 0  every check passed
              7  a task's score is below the promise, beyond the error
              5  a suite keeps less than the recipe's `keep` asks
              6  no better than one-knob averaging
              3  not comparable: no scores in the lock, or other items
              4  a file cannot be written

    The first of 7, 5, 6 that applies. Differences are paired, item by item, and their limits so wide that one gate in
    40 raises a false alarm, however many tasks there are. 5 and 6 are judged by the lock of OUT.

    On GitHub the step summary, outputs and annotations are written too. `arma verify` tells whether OUT has the right
    bits; this tells whether they are good.
    """
    quiet_libraries()
    from arma_mergekit.cli.publish import Publisher
    from arma_mergekit.gate import gate
    from arma_mergekit.merge.lock import LOCK

    against, publisher = against or out / LOCK, Publisher("arma gate", junit, summary)
    with publisher.errors():
        checks, picture = gate(out, against, recipe, recorded)
    code = publisher.publish(checks, picture, {})
    if as_json:
        facts = {"out": str(out), "against": str(against), "recorded": recorded, "exit_code": code}
        click.echo(json.dumps({**facts, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        click.echo("\n".join([*lines(checks), f"{out}: {f'failed ({code})' if code else 'passed'}."]))
    return code


def lines(checks: Sequence[Check]) -> list[str]:
    """The checks for a terminal."""
    width = max(len(check.name) for check in checks)
    return [f"{check.outcome:<8} {check.name:<{width}}  {check.sentence}" for check in checks]
