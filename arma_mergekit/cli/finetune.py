"""`arma finetune BASE DATA --method curlora --out DIR`: an adapter or a whole model, ready to be merged."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from arma_mergekit.cli.tune import quiet_libraries

__all__ = ["command"]

EVERY_PLAIN = 10.0  # seconds between two lines where nobody watches
METHODS = ("curlora", "lora", "siamese", "full")
MODES = ("full", "no_query", "hidden_average", "logit_average")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(METHODS), required=True, help="What is trained.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the result.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the adapter.  [default: 16]")
@click.option("--alpha", type=float, help="Its scale.  [default: curlora 1, lora 32, siamese 16]")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME",
    help="Module to adapt, again for each.  [default: curlora q, k, v; others all linear]",
)  # fmt: skip
@click.option(
    "--lr", type=float, help="Learning rate.  [default: curlora 2.5e-4, lora 2e-4, siamese 3e-4, full 2e-5]"
)
@click.option("--joint", is_flag=True, help="siamese: train the adapter of BASE too, not the gate alone.")
@click.option("--mode", type=click.Choice(MODES), help="siamese: how the passes are mixed.  [default: full]")
@click.option("--gate-rank", type=click.IntRange(1), help="siamese: rank of the gate.  [default: 8]")
@click.option("--gate-lr", type=float, help="siamese: learning rate of the gate.  [default: 1e-3]")
@click.option(
    "--epochs",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Passes over DATA.",
)
@click.option("--steps", type=click.IntRange(1), help="Steps, instead of epochs.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Examples a step.")
@click.option(
    "--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of an example, at most."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of order and initial values."
)
@click.option(
    "--save-every",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Steps between two points to resume from.",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
def command(
    base: str, data: Path, out: Path, steps: int | None, joint: bool, mode: str | None, gate_rank: int | None,
    gate_lr: float | None, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Fine-tune BASE on DATA (JSONL, parquet or .txt) into OUT.

    Records hold prompt and answer (the answer is learned), messages (what the assistant says is learned), or text. BASE
    may be model+adapter: then that adapter is trained further. The same command goes on where an interrupted one
    stopped.

    Method siamese trains a gate that decides token by token between BASE and its adapter: of model+adapter the gate
    alone, else with a new adapter.
    """
    quiet_libraries()
    from arma_mergekit.finetune import GateSettings, Settings, finetune

    asked = {"mode": mode, "rank": gate_rank, "lr": gate_lr, "joint": joint or None}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    gate = GateSettings(**given) if given else None
    show = Progress(quiet)
    record = finetune(Settings(base, data, steps=steps or 0, gate=gate, **options), out, show)
    if not quiet:
        click.echo(described(record, base, out))


class Progress:
    """Shows what a run tells, on stderr: a line that updates itself on a terminal, some lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self.since = self.shown = 0.0
        self.first = 0

    def __call__(self, facts: Mapping[str, Any]) -> None:
        """One event: the sizes of the run, then losses."""
        if self.quiet:
            return
        if "step" not in facts:
            click.echo(opening(facts), err=True)
            return
        now, last = time.monotonic(), facts["step"] == facts["of"]
        if not self.since:
            self.since, self.first = now, facts["step"]
        if self.live or last or now - self.shown > EVERY_PLAIN:
            self.shown = now
            start, end = ("\r\x1b[2K", "\n" if last else "") if self.live else ("", "\n")
            click.echo(f"{start}{self.line(facts, now - self.since)}{end}", err=True, nl=False)

    def line(self, facts: Mapping[str, Any], seconds: float) -> str:
        """`step 120/400   loss 1.234   0:42 left`."""
        done = facts["step"] - self.first
        left = int(seconds / done * (facts["of"] - facts["step"])) if done else None
        rest = "" if left is None else f"   {left // 60}:{left % 60:02d} left"
        return f"step {facts['step']}/{facts['of']}   loss {facts['loss']:.3f}{rest}"


def opening(facts: Mapping[str, Any]) -> str:
    """What is trained on what."""
    share = facts["trainable"] / facts["parameters"]
    left_out = (
        f", {facts['left_out']} left out (nothing to learn within the length)" if facts["left_out"] else ""
    )
    cut = f", {facts['cut']} cut" if facts["cut"] else ""
    return (
        f"{facts['trainable']:,} of {facts['parameters']:,} parameters are trained ({share:.3%}).\n"
        f"{facts['examples']:,} examples{cut}{left_out}; {facts['loss_tokens']:,} of {facts['tokens']:,} tokens are "
        "learned, the others are context."
    )


def described(record: Mapping[str, Any], base: str, out: Path) -> str:
    """How it went, and how a recipe names the result."""
    result, method = record["result"], record["settings"]["method"]
    model = str(out) if method == "full" else f"{base.partition('+')[0]}+{out}"
    ending = f"In a recipe: `model: {model}`. What was forgotten: arma sweep or arma tune."
    if method == "siamese":
        ending = f"It decodes with two passes and cannot be merged. What the gate does: arma inspect {out} --text FILE."
    return (
        f"{out}: loss {result['loss_first']:.3f} -> {result['loss_last']:.3f} on what was trained on, in "
        f"{result['steps']} steps of {result['seconds_per_step']:.2f} s.\n{ending}"
    )
