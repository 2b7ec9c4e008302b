"""`arma verify out/`: is this directory what its recipe says?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from arma_mergekit.errors import ArmaError

__all__ = ["CODES", "command"]

FAILED = 4
CODES = {"verified": 0, "differs": 1, "unreadable": 2, "inconclusive": 3}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Path(path_type=Path), help="Default: the one in OUT/arma.lock.json.")
@click.option("--quick", is_flag=True, help="Names, shapes, sizes and headers only.")
@click.option("--digests", is_flag=True, help="Check every sha256 of the lock too, of inputs and result.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(out: Path, recipe: Path | None, quick: bool, digests: bool, as_json: bool) -> int:
    """Merge again, tensor by tensor, and compare with OUT; nothing is written.

    Exit code 0: verified; 1: differs, and every difference is listed; 2: OUT is no whole checkpoint; 3: inconclusive,
    because there is no lock or an input is missing; 4: the comparison itself failed.
    """
    from arma_mergekit.cli.progress import Progress
    from arma_mergekit.merge import verify
    from arma_mergekit.recipe import Recipe

    try:
        with Progress() as progress:
            given = Recipe.load(recipe) if recipe else None
            report = verify(out, given, quick=quick, digests=digests, begin=progress.start)
    except (ArmaError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        return FAILED
    if as_json:
        facts = {
            "status": report.status,
            "findings": report.findings,
            "missing": report.missing,
            "remarks": report.remarks,
            "tensors": report.tensors,
        }
        click.echo(json.dumps(facts, indent=2))
        return CODES[report.status]
    for sentence in (*report.findings, *report.missing, *report.remarks):
        click.echo(f"  {sentence}")
    compared = (
        f"{report.tensors} tensors have the bits that the inputs give"
        if report.tensors
        else "headers and sizes fit"
    )
    click.echo(f"{out}: {report.status}{f': {compared}' if report.status == 'verified' else ''}.")
    return CODES[report.status]
