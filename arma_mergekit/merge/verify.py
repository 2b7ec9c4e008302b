"""Is this directory what its recipe says? The merge again, tensor by tensor, compared and not written.

    verified        every tensor has the bits that the inputs and the recipe give
    differs         a tensor, a shape, a file or a header is not what it should be; all of them are listed
    unreadable      the directory is no whole checkpoint
    inconclusive    nothing is wrong, but not all could be checked: no lock, or inputs that are not here any more

With its inputs gone, files can still be compared with the sha256 in the lock. README.md is for people to edit, so that
it was is a remark. It knows plans, locks and checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.adapter import shortened
from arma_mergekit.checkpoint.header import read_json, read_metadata
from arma_mergekit.checkpoint.locate import readable
from arma_mergekit.checkpoint.model import INDEX
from arma_mergekit.checkpoint.read import read_into
from arma_mergekit.digest import sha256_of
from arma_mergekit.errors import CheckpointError, RecipeError
from arma_mergekit.kernel import widen
from arma_mergekit.merge.beside import companions, unlike_companions
from arma_mergekit.merge.layout import rows, sides_of
from arma_mergekit.merge.lock import LOCK, by_tensor, input_files, name_in, pinned, read_lock
from arma_mergekit.merge.reproduce import CARD, WRITTEN_ANEW
from arma_mergekit.merge.stream import Advance, Blocks, Buffers, cores
from arma_mergekit.plan import Plan, PlannedTensor, plan
from arma_mergekit.plan.plan import DTYPES
from arma_mergekit.recipe import Recipe

__all__ = ["Report", "verify"]

Status = Literal["verified", "differs", "unreadable", "inconclusive"]


@dataclass(frozen=True)
class Report:
    """What was found, a sentence each.

    ``findings``: what is wrong; ``missing``: what could not be checked; ``remarks``: what is neither; ``tensors``: how
    many were compared.
    """

    findings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    tensors: int = 0
    readable: bool = True

    @property
    def status(self) -> Status:
        """In a word."""
        if not self.readable:
            return "unreadable"
        return "differs" if self.findings else "inconclusive" if self.missing else "verified"


def verify(
    out: Path,
    recipe: Recipe | None = None,
    *,
    quick: bool = False,
    digests: bool = False,
    begin: Callable[[int], Advance] = lambda _: lambda _: None,
) -> Report:
    """Compare ``out`` with what its lock's recipe gives (or ``recipe``).

    ``quick``: headers and sizes only; ``digests``: check those of the lock too, though the tensors are compared
    anyway; ``begin`` is told how many bytes will be compared and returns what is called with them as they are.
    """
    try:
        with readable(str(out)):
            merged = Checkpoint.at(out)
        lock = read_lock(out / LOCK) if (out / LOCK).is_file() else None
    except CheckpointError as error:
        return Report(tuple(str(error).splitlines()), readable=False)
    findings, remarks = [*_headers(merged), *_files(out, lock, sizes_only=True)], tuple(_card(out, lock))
    planned, missing = _replayable(lock, recipe)
    if lock is not None and not quick and (digests or planned is None):
        findings += _files(out, lock)
    if planned is None:
        files = lock["output"]["files"].values() if lock is not None and not quick else ()
        if files and all(said["sha256"] is None for said in files):
            missing = (*missing, f"{LOCK} has no digests, so nothing was compared.")
        return Report(tuple(dict.fromkeys(findings)), missing, remarks)
    source = recipe or _recipe(lock or {})
    unlike = list(_structure(merged, planned))
    findings += [*unlike, *_companions(merged, planned, source)]
    if lock is not None and recipe is None:
        findings += _told(lock, planned)
    if quick or unlike:
        return Report(tuple(dict.fromkeys(findings)), remarks=remarks)
    findings += _files(out, lock, only=WRITTEN_ANEW)
    if digests and lock is not None:
        findings += _inputs(lock, planned)
    advance = begin(sum(t.bytes_written for t in planned.tensors))
    findings += replay(merged, planned, DTYPES.get(source.dtype or ""), advance)
    return Report(tuple(dict.fromkeys(findings)), remarks=remarks, tensors=len(planned.tensors))


def _recipe(lock: Mapping[str, Any]) -> Recipe:
    return Recipe.parse(pinned(lock) if lock else {}, Path(lock.get("recipe_file", LOCK)))


def _replayable(lock: Mapping[str, Any] | None, recipe: Recipe | None) -> tuple[Plan | None, tuple[str, ...]]:
    """The plan to replay, or why there is none."""
    if recipe is None and lock is None:
        return None, (f"There is no {LOCK}; name the recipe with --recipe.",)
    if recipe is None and lock is not None and lock.get("executor") != "arma":
        return None, (
            "It was merged by mergekit's executor, which is not replayed: only digests were compared.",
        )
    try:
        return plan(recipe or _recipe(lock or {})).check(), ()
    except RecipeError as error:
        return None, (
            *str(error).splitlines(),
            "Without its inputs the merge is not replayed: only digests were compared.",
        )


def _headers(merged: Checkpoint) -> Iterator[str]:
    """Headers that say `format: pt`, an index with totals that are right."""
    for file in sorted({t.file for t in merged.tensors.values()}):
        if read_metadata(file)[0].get("format") != "pt":
            yield f"{file.name} does not say `format: pt` in its header."
    if (merged.path / INDEX).is_file():
        found = read_json(merged.path / INDEX).get("metadata")
        said = found if isinstance(found, dict) else {}
        totals = {
            "total_size": sum(t.nbytes for t in merged.tensors.values()),
            "total_parameters": sum(t.numel for t in merged.tensors.values()),
        }
        for key, value in totals.items():
            if said.get(key) != value:
                yield f"{INDEX} says {key} {shortened(said.get(key))}, its files hold {value}."


def _files(
    out: Path, lock: Mapping[str, Any] | None, sizes_only: bool = False, only: Sequence[str] | None = None
) -> Iterator[str]:
    """Files of the lock that are gone, or have another size or content."""
    for name, said in (lock or {"output": {"files": {}}})["output"]["files"].items():
        file = out / name
        if name == CARD or (only is not None and name not in only):
            continue
        if not file.is_file():
            yield f"{name} is missing, though {LOCK} lists it."
        elif file.stat().st_size != said["bytes"]:
            yield f"{name} has {file.stat().st_size:,} bytes, {LOCK} says {said['bytes']:,}."
        elif not sizes_only and said["sha256"] is not None and sha256_of(file) != said["sha256"]:
            yield f"{name} is not the file that was merged: its sha256 is not the one in {LOCK}."


def _card(out: Path, lock: Mapping[str, Any] | None) -> Iterator[str]:
    said = lock["output"]["files"].get(CARD) if lock else None
    file = out / CARD
    if said and said["sha256"] is not None and not (file.is_file() and sha256_of(file) == said["sha256"]):
        yield f"{CARD} was {'edited' if file.is_file() else 'deleted'} after the merge."


def _told(lock: Mapping[str, Any], planned: Plan) -> Iterator[str]:
    """What the lock says of tensors that is not what its recipe gives."""
    for what, facts in by_tensor(planned).items():
        if lock.get(what) != facts:
            yield f"{LOCK} has other {what} than its recipe gives."


def _inputs(lock: Mapping[str, Any], planned: Plan) -> Iterator[str]:
    """Inputs whose sha256 is not the one in the lock."""
    for side, said in zip(sides_of(planned), lock["inputs"], strict=False):
        for file in input_files([side]):
            known = said["files"].get(name_in(side, file), {}).get("sha256")
            if known is not None and sha256_of(file) != known:
                yield f"{file} is not the file that was merged: its sha256 is not the one in {LOCK}."


def _companions(merged: Checkpoint, planned: Plan, recipe: Recipe) -> Iterator[str]:
    """Files beside the weights that are not the base's, or that no merge writes."""
    dtype = recipe.out_dtype or recipe.dtype
    base = sides_of(planned)[0]
    yield from unlike_companions(base, merged.path, dtype)
    wanted = [name for name, _, _ in companions(base, dtype)]
    weights = {t.file for t in merged.tensors.values()}
    for file in sorted(p for p in merged.path.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = file.relative_to(merged.path).as_posix()
        if name.startswith("."):  # what git and downloads from the hub leave; no library loads it
            continue
        if name not in (*wanted, INDEX, LOCK, *WRITTEN_ANEW) and file not in weights:
            yield f"{name} is no file of this merge."


def _structure(merged: Checkpoint, planned: Plan) -> Iterator[str]:
    """Tensors that are missing, too many, or of another shape or dtype."""
    assert planned.base is not None
    wanted = {t.name: (t.dtype, planned.base.tensors[t.name].shape) for t in planned.tensors}
    for name in sorted(set(wanted) - set(merged.tensors)):
        yield f"{name} is missing."
    for name in sorted(set(merged.tensors) - set(wanted)):
        yield f"{name} is in no input, or left out by the recipe."
    for name in sorted(set(wanted) & set(merged.tensors)):
        info = merged.tensors[name]
        if (info.dtype, info.shape) != wanted[name]:
            dtype, shape = wanted[name]
            yield f"{name} is {info.dtype} {list(info.shape)} and should be {dtype} {list(shape)}."


def replay(merged: Checkpoint, planned: Plan, before: str | None, advance: Advance) -> list[str]:
    """A sentence for every tensor whose bits are not those that the inputs give."""
    mine = threading.local()
    with ThreadPoolExecutor(cores()) as pool:

        def compare(part: tuple[PlannedTensor, int, int]) -> Difference:
            if not hasattr(mine, "blocks"):
                mine.blocks, mine.buffer = Blocks(planned, before), Buffers()
            found = _compare(merged, mine.blocks, mine.buffer, *part)
            advance((part[2] - part[1]) * part[0].bytes_written // max(part[0].numel, 1))
            return found

        found: dict[str, Difference] = {}
        parts = list(_parts(planned))
        for (tensor, _, _), difference in zip(parts, pool.map(compare, parts), strict=True):
            found[tensor.name] = found.get(tensor.name, Difference()) + difference
    sizes = {t.name: t.numel for t in planned.tensors}
    return [
        f"{name}: {d.elements:,} of {sizes[name]:,} elements differ, by up to {d.largest:.3g}."
        for name, d in found.items()
        if d.elements
    ]


@dataclass(frozen=True)
class Difference:
    """How many elements differ, and the largest absolute difference (NaN if one side is NaN)."""

    elements: int = 0
    largest: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.elements + other.elements, float(np.maximum(self.largest, other.largest)))


def _parts(planned: Plan) -> Iterator[tuple[PlannedTensor, int, int]]:
    """Tensors in pieces of whole rows."""
    for tensor in planned.tensors:
        for first, last in rows(tensor.numel, sides_of(planned)[0].tensors[tensor.name].shape):
            yield tensor, first, last


def _compare(
    merged: Checkpoint, blocks: Blocks, buffer: Buffers, tensor: PlannedTensor, first: int, last: int
) -> Difference:
    info = merged.tensors[tensor.name]
    total, at = Difference(), first
    for wanted in blocks(tensor, first, last):
        got = buffer("got", wanted.dtype, wanted.size)
        read_into(info.file, info.start + at * got.itemsize, got)
        at += got.size
        if not same_bits(got, wanted):
            total += _difference(got, wanted)
    return total


def same_bits(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays (n,) have the same bits; eight bytes at a time."""
    words = got.nbytes // 8 * 8
    a, b = got.view(np.uint8), wanted.view(np.uint8)
    return np.array_equal(a[:words].view(np.uint64), b[:words].view(np.uint64)) and np.array_equal(
        a[words:], b[words:]
    )


def _difference(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> Difference:
    wide = np.empty((2, got.size), np.float64)
    widen(got, wide[0])
    widen(wanted, wide[1])
    bits = f"u{got.itemsize}"
    return Difference(
        int((got.view(bits) != wanted.view(bits)).sum()), float(np.abs(wide[0] - wide[1]).max())
    )
