"""The report of a tuning run: one HTML file that needs no network, and its parts for other places.

It reads what a run left behind (summary.json, trials.jsonl) and knows no models, searchers or scores of its own:
every number in it is in those files, or a sum or difference of theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arma_mergekit.errors import RunError
from arma_mergekit.report.page import render
from arma_mergekit.report.pareto import pareto_svg
from arma_mergekit.report.words import cautions, markdown
from arma_mergekit.whole import write_whole

__all__ = ["cautions", "markdown", "pareto_svg", "read_run", "render", "write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write report.html of the run in this directory (or ``out``) and return its path; RunError if there is no run."""
    path = out or run / "report.html"
    text = render(*read_run(run))
    try:
        write_whole({path: text})
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}. Make room, or give another --out.") from error
    return path


def read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and journal of a run; RunError if they are not there or damaged."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        lines = (run / "trials.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        # a run that goes on may be in the middle of its last line
        trials = [json.loads(line) for line in lines if line.endswith("\n")]
        if not isinstance(summary, dict) or not all(isinstance(t, dict) and "key" in t for t in trials):
            raise ValueError("no summary, or a line that is no record")
    except OSError as error:
        raise RunError(
            f"No finished run in {run}: cannot read {Path(error.filename).name} ({error.strerror}). Give the directory "
            "of one, or finish this one with the `arma-tune` command that began it."
        ) from error
    except ValueError as error:
        raise RunError(f"The run in {run} is damaged ({error}). Make another with `arma-tune`.") from error
    return summary, trials
