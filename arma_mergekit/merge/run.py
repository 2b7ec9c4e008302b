"""One merge, from recipe to directory. See the package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.header import FLOATS, TensorInfo
from arma_mergekit.checkpoint.model import SINGLE
from arma_mergekit.checkpoint.read import changed, read_into
from arma_mergekit.digest import DigestMemo, sha256_of, state
from arma_mergekit.errors import CheckpointError
from arma_mergekit.merge.beside import write_companions
from arma_mergekit.merge.layout import INDEX, Shard, index_json, lay_out, sides_of
from arma_mergekit.merge.lock import LOCK, input_files, make_lock, write_lock
from arma_mergekit.merge.stream import Advance, fill
from arma_mergekit.merge.target import check_target, draft_of
from arma_mergekit.merge.unlike import unlike_base
from arma_mergekit.plan import Plan, plan
from arma_mergekit.plan.plan import DTYPES
from arma_mergekit.recipe import Recipe

__all__ = ["Describe", "Merged", "agree", "finish", "merge", "needed"]

Describe = Callable[[dict[str, Any], Sequence[Checkpoint]], Mapping[str, str]]

BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Merged:
    """What a merge made: the lock as written, and warnings."""

    lock: dict[str, Any]
    warnings: tuple[str, ...]


def merge(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    digests: bool = True,
    sync: bool = True,
    workers: int | None = None,
    memo: DigestMemo | None = None,
    begin: Callable[[Plan], Advance] = lambda _: lambda _: None,
    describe: Describe = lambda *_: {},
) -> Merged:
    """Merge into the directory ``out``, which appears when it is complete.

    ``shard_size``: bytes of tensors in a file, by default as the inputs have them; ``digests``: sha256 of every file of
    inputs and result; ``sync``: wait until all is on the disk, so that a loss of power cannot take it; ``memo``:
    digests known from earlier; ``begin`` is told the plan and returns what is called with bytes as they are written;
    ``describe`` is shown the lock, may add to it, and returns further files as texts by name.
    RecipeError, CheckpointError, UsageError or RunError; then ``out`` is as it was.
    """
    planned = plan(recipe).check()
    sides = sides_of(planned)
    check = partial(check_target, out, overwrite, needed(sides, recipe.path))
    check()
    before = _states(input_files(sides))
    agree(planned)
    warnings = [sentence for side in planned.finetuned for sentence in unlike_base(sides[0], side)]
    shards = lay_out(planned, shard_size)
    memo = memo or DigestMemo()
    known: dict[Path, str | None] = {file: memo.get(file) if digests else None for file in before}
    advance = begin(planned)
    with draft_of(out, sum(s.size for s in shards), check, sync) as draft:
        filled = fill(
            planned, shards, draft, before=DTYPES.get(recipe.dtype or ""), advance=advance, workers=workers,
            inputs=[file for file, found in known.items() if digests and found is None], digests=digests, sync=sync,
        )  # fmt: skip
        known |= {file: memo.put(file, found, before[file]) for file, found in filled.inputs.items()}
        outputs = {s.name: (s.size, filled.outputs[s.name]) for s in shards}
        outputs |= _write_small(recipe, planned, shards, draft, digests)
        lock = make_lock(recipe, planned, shard_size, known, outputs)
        finish(lock, describe(lock, sides), draft, digests, sync)
        _check_states(before)
    return Merged(lock, (*planned.warnings, *warnings))


def needed(sides: Iterable[Checkpoint], recipe: Path) -> tuple[Path, ...]:
    """What a result must not replace: the models, their adapters, the recipe, where we are."""
    return (*(path for side in sides for path in side.directories.values()), recipe, Path.cwd())


def _states(files: Iterable[Path]) -> dict[Path, str]:
    """Size and times of change of the inputs; CheckpointError for one that is not there any more."""
    found = {}
    for file in files:
        try:
            found[file] = state(file)
        except OSError as error:
            raise changed(file) from error
    return found


def _check_states(before: Mapping[Path, str]) -> None:
    """CheckpointError if an input changed while it was read."""
    now = _states(before)
    for file, then in before.items():
        if now[file] != then:
            raise changed(file)


def agree(planned: Plan) -> None:
    """CheckpointError if a tensor of integers or booleans is not the same in all models."""
    base, *tuned = sides_of(planned)
    for name, info in base.tensors.items():
        others = [side for side in tuned if name in side.tensors and info.dtype not in FLOATS]
        for side in others:
            if not _same_bytes(info, side.tensors[name]):
                raise CheckpointError(
                    f"{name} ({info.dtype}) is not floating-point and differs between {base.ref} and {side.ref}: it "
                    "can't be averaged, so make it the same in all of them."
                )


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.nbytes) != (other.dtype, other.nbytes):
        return False
    ours, theirs = np.empty((2, BLOCK), np.uint8)
    for at in range(0, one.nbytes, BLOCK):
        count = min(BLOCK, one.nbytes - at)
        read_into(one.file, one.start + at, ours[:count])
        read_into(other.file, other.start + at, theirs[:count])
        if not np.array_equal(ours[:count], theirs[:count]):
            return False
    return True


def _write_small(
    recipe: Recipe, planned: Plan, shards: Sequence[Shard], draft: Path, digests: bool
) -> dict[str, tuple[int, str]]:
    """Everything but the weights and the lock; returns bytes and sha256 by name."""
    names = write_companions(sides_of(planned)[0], draft, recipe.out_dtype or recipe.dtype)
    if [shard.name for shard in shards] != [SINGLE]:
        (draft / INDEX).write_text(index_json(shards, planned.tensors), encoding="utf-8")
        names.append(INDEX)
    return {n: ((draft / n).stat().st_size, sha256_of(draft / n) if digests else "") for n in names}


def finish(
    lock: dict[str, Any], texts: Mapping[str, str], draft: Path, digests: bool = True, sync: bool = True
) -> None:
    """Write the further files of a merge, then its lock; ``sync`` all that is small."""
    written = lock["output"]
    for name, text in texts.items():
        (draft / name).write_text(text, encoding="utf-8")
        size = (draft / name).stat().st_size
        written["files"][name] = {"bytes": size, "sha256": sha256_of(draft / name) if digests else None}
        written["bytes"] += size
    write_lock(lock, draft / LOCK)
    if sync:
        _sync_files(draft / n for n in (*written["files"], LOCK) if not n.endswith(".safetensors"))


def _sync_files(files: Iterable[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
