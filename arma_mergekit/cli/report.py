"""`arma report RUN`: the page of a finished tuning run."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: RUN/report.html]")
@click.option(
    "--markdown", "as_markdown", is_flag=True, help="Print a summary in markdown instead, for a CI step."
)
def command(run: Path, out: Path | None, as_markdown: bool) -> int:
    """Write the report of the tuning run in directory RUN: one HTML file that needs no network."""
    from arma_mergekit import report

    if as_markdown:
        click.echo(report.markdown(report.read_run(run)[0]), nl=False)
    else:
        click.echo(report.write_report(run, out))
    return 0
