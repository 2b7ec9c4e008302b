"""Progress of a run on stderr: a line that updates itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click

__all__ = ["Log", "shown"]

EVERY_LIVE, EVERY_PLAIN = 0.2, 10.0  # seconds between two lines


@dataclass
class Standing:
    """How an arm is doing."""

    budget: float
    spent: float = 0.0
    best: float = float("-inf")
    shares: Mapping[str, float] = field(default_factory=dict)
    fresh: float = 0.0  # evaluations of this process ...
    since: float = field(default_factory=time.monotonic)  # ... since then


class Log:
    """Takes the events of a run."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self.arms: dict[str, Standing] = {}
        self.arm, self.shown, self.last = "", 0.0, ""

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Show one event of a run."""
        if not self.quiet:
            getattr(self, f"on_{event}")(facts)

    def line(self, text: str, *, passing: bool = False) -> None:
        """Print a line, not twice in a row; a passing one is overwritten by the next on a terminal."""
        if text == self.last and not self.live and text:
            return
        self.last = text
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
        key = facts["key"]
        if key != self.arm:
            self._finish_line()
        standing = self.arms.setdefault(key, Standing(facts["budget"]))
        standing.spent += facts["cost"]
        if facts["fresh"]:
            standing.fresh += facts["cost"]
        else:
            standing.since = time.monotonic()
        full = facts["status"] == "done" and facts["part"] is None
        if full and facts["reward"] > standing.best:
            standing.best, standing.shares = facts["reward"], facts["shares"]
        self.arm = key
        if time.monotonic() - self.shown > (EVERY_LIVE if self.live else EVERY_PLAIN):
            self.shown = time.monotonic()
            self.line(describe(key, standing), passing=True)

    def on_held(self, facts: Mapping[str, Any]) -> None:
        """A finished candidate was scored on held-back items."""
        self._finish_line()
        self.line(f"Held-back items: {facts['done']} of {facts['of']} candidates", passing=True)

    def _finish_line(self) -> None:
        if self.arm:
            self.line(describe(self.arm, self.arms[self.arm]))
            self.arm = ""


def describe(name: str, standing: Standing) -> str:
    """`bayes/0  12.0/40 evaluations  best 0.812 (general 0.91, domain 0.74)  ETA 1:20`."""
    text = f"{name:<24}{standing.spent:>6.1f}{f'/{standing.budget:g}':<5} evaluations"
    if standing.shares:
        shares = ", ".join(f"{suite} {share:.2f}" for suite, share in standing.shares.items())
        text += f"   best {standing.best:.3f} ({shares})"
    if standing.fresh and standing.spent < standing.budget:
        pace = (time.monotonic() - standing.since) / standing.fresh
        left = int(pace * (standing.budget - standing.spent))
        text += f"   ETA {left // 60}:{left % 60:02d}"
    return text


def shown(score: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(score, 3) + 0.0:.3f}"
