"""The command line: the only place that prints, parses arguments, sets up logging and exits.

A command lives in a module of this package and is imported when it is called, so `arma --help` stays fast.
"""

from __future__ import annotations

import importlib
import io
import signal
import sys
from typing import Any

import click

from arma_mergekit import __version__
from arma_mergekit.errors import ArmaError, RunError, unknown

__all__ = ["COMMANDS", "main", "tune"]

MOST_LINES = 40  # of an error
TERMINATED = 143  # exit code, as shells have it
COMMANDS = {
    "chat": "Ask several models the same, and read their answers side by side.",
    "continual": "Fine-tune on one task after another, and measure forgetting.",
    "doctor": "Tell whether mergekit sees `merge_method: arma`, and why not.",
    "merge": "Merge a recipe into a directory, at copy speed.",
    "finetune": "Fine-tune a model, whole or through an adapter.",
    "gate": "Tell whether a merged checkpoint scores what was promised.",
    "lora": "Write a CURLoRA adapter as a LoRA adapter that does the same.",
    "inspect": "Show where two models differ, or what a siamese gate does.",
    "plan": "Show what a recipe does to every tensor, reading headers only.",
    "report": "Write the HTML report of a tuning run again.",
    "reproduce": "Merge again what a lock describes, and compare.",
    "sweep": "Score averages with one alpha, and say which to use.",
    "verify": "Tell whether a merged directory is what its recipe says.",
    "tune": "Find the alphas of a recipe on real evaluations.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when called; errors end as one sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, without importing any."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of that name and return its ``command``."""
        if cmd_name not in COMMANDS:
            raise click.UsageError(unknown("command", cmd_name, COMMANDS))
        command = importlib.import_module(f"arma_mergekit.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, so that help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version")
def cli() -> None:
    """Give a fine-tuned language model back what it knew."""


def run(command: click.Command, name: str, args: list[str] | None = None) -> None:
    """Run a command and exit: 0, or the code of the error (errors.py), its sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    # ends as Ctrl-C does, so that drafts are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        result: Any = command.main(args, prog_name=name, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"Error: {error.filename or 'input or output'}: {error.strerror or error}.", err=True)
        sys.exit(RunError.exit_code)
    except ArmaError as error:
        click.echo(f"Error: {clipped(str(error))}", err=True)
        sys.exit(error.exit_code)


def clipped(text: str) -> str:
    """The first sentences of many."""
    lines = text.splitlines()
    more = f"... and {len(lines) - MOST_LINES:,} more." if len(lines) > MOST_LINES else ""
    return "\n".join(filter(None, [*lines[:MOST_LINES], more]))


def main() -> None:
    """Entry point of `arma`."""
    run(cli, "arma")


def tune() -> None:
    """Entry point of `arma-tune`, the same as `arma tune`."""
    command = importlib.import_module("arma_mergekit.cli.tune").command
    run(command, "arma-tune")
