"""Where checks go: files, GitHub's step summary and outputs, and lines of its log that show on the page of the run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from arma_mergekit import ci
from arma_mergekit.ci import Check
from arma_mergekit.errors import ArmaError, RunError
from arma_mergekit.whole import write_whole

__all__ = ["Publisher"]


@dataclass(frozen=True)
class Publisher:
    """Reports on one command. ``junit`` and ``summary``: files to write, XML and markdown; None for none."""

    title: str
    junit: Path | None
    summary: Path | None

    def publish(self, checks: Sequence[Check], more: str, outputs: Mapping[str, object]) -> int:
        """Tell everybody, with ``more`` markdown below the checks; returns the exit code that they ask for.

        ``outputs``: for the next steps of a job. RunError if a file cannot be written.
        """
        code = ci.exit_code(checks)
        head = f"### {self.title}: {f'failed (exit code {code})' if code else 'passed'}"
        markdown = "\n\n".join(filter(None, [head, ci.checks_table(checks), more])) + "\n"
        for path, text in ((self.junit, ci.junit(self.title, checks)), (self.summary, markdown)):
            if path is not None:
                write(path, text)
        ci.append("GITHUB_STEP_SUMMARY", f"{markdown}\n")
        ci.append("GITHUB_OUTPUT", ci.outputs({**outputs, "exit-code": code}))
        if os.environ.get("GITHUB_ACTIONS") == "true":
            for check in checks:
                if check.code and check.outcome != "passed":
                    line = ci.workflow_command("error", f"{self.title}: {check.name}", check.sentence)
                    click.echo(line, err=True)
        return code

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What cannot go on is told like a check that failed, then raised again."""
        try:
            yield
        except ArmaError as error:
            with contextlib.suppress(RunError):  # the first error is the one to end with
                self.publish([Check("it runs", "error", str(error), error.exit_code)], "", {})
            raise


def write(path: Path, text: str) -> None:
    """Whole or not at all; RunError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: text})
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}; make room, or name another place.") from error
