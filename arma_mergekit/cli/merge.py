"""`arma merge recipe.yml out/`: a merge at copy speed."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arma_mergekit.errors import RunError, UsageError

if TYPE_CHECKING:
    from arma_mergekit.checkpoint import Checkpoint
    from arma_mergekit.merge.run import Describe

__all__ = ["command", "run_merge"]

LARGEST_NUMBER = 1e12
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace the model that is in OUT, as a whole.")
@click.option(
    "--out-shard-size",
    "shard_size",
    help="Most bytes in a file, as 5GB or 500M.  [default: files as in the inputs]",
)
@click.option(
    "--digests/--no-digests",
    default=True,
    show_default=True,
    help="Write sha256 of every file to arma.lock.json.",
)
@click.option(
    "--sync/--no-sync",
    default=True,
    show_default=True,
    help="Wait until everything is on the disk, so that a loss of power cannot take it.",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
def command(
    recipe: Path,
    out: Path,
    overwrite: bool,
    shard_size: str | None,
    digests: bool,
    sync: bool,
    quiet: bool,
) -> int:
    """Merge RECIPE into the directory OUT: the bits of mergekit-yaml, as fast as the disk.

    OUT appears when it is complete. A recipe that needs it (another merge method, slices, a tokenizer setting) is given
    to mergekit's executor.
    """
    from arma_mergekit.executor import merge_with_mergekit, reason
    from arma_mergekit.recipe.document import read_yaml

    content = read_yaml(recipe)
    why = reason(content)
    size = _bytes(shard_size)
    if why is None:
        run_merge(
            content, recipe, out, quiet, overwrite=overwrite, shard_size=size, digests=digests, sync=sync
        )
        return 0
    if not digests or not sync:
        raise UsageError(
            f"{recipe} needs mergekit's executor ({why}), which has no --no-digests or --no-sync; leave them out."
        )
    _say(
        f"{why} is mergekit's work: merging with its executor, which is slower and takes more memory.",
        quiet,
        err=True,
    )
    describe, warnings = describer(recipe)
    with _unharmed(out), _silent(quiet):
        lock = merge_with_mergekit(
            content, recipe, out, overwrite=overwrite, shard_size=size, describe=describe
        )
    _warn(warnings, quiet)
    _say(f"{out}: {_size(lock)}.", quiet)
    return 0


def run_merge(content: dict[str, Any], path: Path, out: Path, quiet: bool, **options: Any) -> dict[str, Any]:
    """Merge ourselves (``options``: `merge`'s), with progress, warnings and what to do next; returns the lock."""
    from arma_mergekit.cli.plan import size
    from arma_mergekit.cli.progress import Progress
    from arma_mergekit.digest import DigestMemo
    from arma_mergekit.merge import merge
    from arma_mergekit.recipe import Recipe

    describe, warnings = describer(path)
    with _unharmed(out), Progress(quiet) as progress:
        merged = merge(
            Recipe.parse(content, path), out, memo=DigestMemo.default(), describe=describe,
            begin=lambda plan: progress.start(plan.bytes_written), **options,
        )  # fmt: skip
        seconds = progress.seconds
    _warn([*merged.warnings, *warnings], quiet)
    counts, written = merged.lock["tensors"], merged.lock["output"]["bytes"]
    rate = size(round(written / max(seconds, 1e-9)))
    _say(f"{out}: {counts['averaged']} tensors averaged, {counts['copied']} copied.", quiet)
    _say(f"{_size(merged.lock)} in {seconds:.1f} s ({rate}/s). Check it: arma verify {out}", quiet)
    return merged.lock


@contextlib.contextmanager
def _unharmed(out: Path) -> Iterator[None]:
    """Say what an interruption leaves."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"\n{out} is as it was, or complete; the same command starts again.", err=True)
        raise


@contextlib.contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    """Without the progress bars and hints of mergekit and transformers, most of which know no such setting.

    Their errors come as exceptions.
    """
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere if quiet else sys.stderr):
        yield


def describer(recipe: Path) -> tuple[Describe, list[str]]:
    """What adds the evaluation and the model card to a merge of this recipe, and where its warnings will be."""
    from arma_mergekit import card
    from arma_mergekit.evaluation import of_run

    warnings: list[str] = []

    def describe(lock: dict[str, Any], sides: Sequence[Checkpoint]) -> dict[str, str]:
        try:
            lock["evaluation"] = of_run(recipe.parent, lock) if lock["executor"] == "arma" else None
        except RunError as error:  # the weights are right all the same
            warnings.append(f"No scores in the lock: {error}")
        found = card.licences({ref: path for side in sides for ref, path in side.directories.items()})
        warnings.extend(card.warnings(found))
        texts = {"README.md": card.render(lock, found), card.PICTURE: card.picture(lock)}
        return {name: text for name, text in texts.items() if text}

    return describe, warnings


def _warn(warnings: Sequence[str], quiet: bool) -> None:
    for warning in warnings:
        _say(f"Warning: {warning}", quiet, err=True)


def _size(lock: dict[str, Any]) -> str:
    from arma_mergekit.cli.plan import size

    return f"{len(lock['output']['files'])} files, {size(lock['output']['bytes'])}"


def _say(text: str, quiet: bool, err: bool = False) -> None:
    if not quiet:
        click.echo(text, err=err)


def _bytes(text: str | None) -> int | None:
    """`5GB`, `500M`, `1GiB` or a plain number as bytes."""
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip())
    size = 0.0
    if match is not None and float(match["number"]) < LARGEST_NUMBER:
        step = 1024 if match["binary"] else 1000
        size = float(match["number"]) * step ** " KMGT".index(match["unit"].upper() or " ")
    if size < 1:
        raise UsageError(f"--out-shard-size must be a size like 5GB or 500M, but got {text!r}.")
    return int(size)
