"""`arma continual plan.yml`: fine-tune on one task after another, compare methods, measure forgetting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from arma_mergekit.cli.tune import Names, quiet_libraries, whole_number

__all__ = ["command", "render"]

SHOWN = ("OP", "BWT", "FWT", "forgetting", "learning accuracy")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the run.  [default: runs/<plan>]")
@click.option("--methods", type=Names(), help="Some of the plan's methods, by name.  [default: all]")
@click.option("--seeds", type=Names(), help="0,1,2: more seeds add to a finished run.  [default: the plan's]")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of a table.")
def command(
    plan: Path, out: Path | None, methods: list[str] | None, seeds: list[str] | None, as_json: bool
) -> int:
    """Train the tasks of PLAN in order with every method, test every task after each, and compare.

    Writes summary.json (score matrices, overall performance, backward and forward transfer, their definitions, every
    merge), report.html, matrices.svg, and each method's final model. Start it again with the same plan and it goes on
    where it stopped, inside a task too.
    """
    quiet_libraries()
    from transformers.utils import logging

    from arma_mergekit.continual.plan import Plan
    from arma_mergekit.continual.run import ContinualRun
    from arma_mergekit.report.continual import render as page
    from arma_mergekit.report.continual import standalone
    from arma_mergekit.results import write_files

    logging.disable_progress_bar()
    loaded = chosen(Plan.load(plan), methods, seeds)
    out = out or Path("runs") / plan.stem

    def progress(text: str) -> None:
        if not as_json:
            click.echo(text, err=True)

    found = ContinualRun(loaded, out, progress).run()
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    write_files(out, {"summary.json": text, "report.html": page(found), "matrices.svg": standalone(found)})
    click.echo(text.rstrip() if as_json else render(found))
    if not as_json:
        click.echo(f"\nReport: {out / 'report.html'}")
    return 0


def chosen(plan: Any, methods: list[str] | None, seeds: list[str] | None) -> Any:
    """The plan with fewer methods, or other seeds."""
    from arma_mergekit.errors import UsageError, unknown

    changes: dict[str, Any] = {}
    if methods is not None:
        known = {method.name: method for method in plan.methods}
        for name in methods:
            if name not in known:
                raise UsageError(unknown("method", name, known))
        changes["methods"] = tuple(known[name] for name in dict.fromkeys(methods))
    if seeds is not None:
        changes["seeds"] = tuple(dict.fromkeys(map(whole_number, seeds)))
    if () in changes.values():
        raise UsageError("--methods and --seeds take at least one entry.")
    return plan.model_copy(update=changes)


def render(found: Mapping[str, Any]) -> str:
    """A line a method: mean ± standard deviation over orders and seeds."""
    names = [name for name in SHOWN if name in found["methods"][0]["mean"]]
    width = max(len(m["name"]) for m in found["methods"]) + 2
    lines = [
        "",
        f"  {'':<{width}}" + "".join(f"{name:>19}" for name in names) + f"{'merges':>9}{'callback':>10}",
    ]
    for m in found["methods"]:
        cells = "".join(f"{spread(m['mean'][name], m['std'][name]):>19}" for name in names)
        lines.append(f"  {m['name']:<{width}}{cells}{m['merges']:>9g}{m['overhead']:>10.1%}")
    lines += ["", *(f"  {name}: {found['definitions'][name]}" for name in names)]
    return "\n".join(lines)


def spread(mean: float, std: float | None) -> str:
    """`0.713 ± 0.020`."""
    return f"{mean:.3f}" + ("" if std is None else f" ± {std:.3f}")
