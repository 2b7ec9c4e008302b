"""Where every byte of the result goes: its files, their headers, and the pieces that fill them.

    file     = length of the header (8 bytes), header, tensors without gaps
    piece    = bytes start to stop of the file: copied from one place, or computed from several

The result keeps the shards of the side that most bytes are copied from, so a copy is a few long runs; a shard in which
nothing changes shape or type keeps its header to the byte. It knows plans and headers; it reads and writes no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint
from arma_mergekit.checkpoint.header import DTYPE_BITS, read_metadata
from arma_mergekit.checkpoint.model import INDEX, SINGLE
from arma_mergekit.kernel import sole_operand
from arma_mergekit.plan import Plan, PlannedTensor

__all__ = ["INDEX", "Computed", "Copied", "Piece", "Shard", "index_json", "lay_out", "rows", "sides_of"]

LONGEST_COPY = 1 << 23  # bytes of a piece: what one worker does, and the disk is given, at a time
LONGEST_AVERAGE = 1 << 21  # elements


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes as they are in ``file`` from ``offset`` on."""

    start: int
    stop: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Computed:
    """Elements ``first`` to ``last`` of a tensor that is averaged, folded or converted."""

    start: int
    stop: int
    tensor: PlannedTensor
    first: int
    last: int


Piece = Copied | Computed


@dataclass(frozen=True)
class Shard:
    """One file of the result: ``places`` maps its tensors to where their bytes start; ``pieces`` are in file order."""

    name: str
    header: bytes
    places: dict[str, int]
    pieces: tuple[Piece, ...]
    size: int


def lay_out(plan: Plan, shard_size: int | None = None) -> list[Shard]:
    """Files of the result; ``shard_size``: at most so many bytes of tensors in each, instead of the source's files."""
    side = _supplier(plan)
    order = sorted(plan.tensors, key=lambda t: (str(side.tensors[t.name].file), side.tensors[t.name].start))
    if shard_size is None:
        groups = _by_file(side, order)
    else:
        filled = list(_filled(order, shard_size))
        names = _names(len(filled))
        groups = dict(zip(names, filled, strict=True))
    return [_shard(plan, side, name, tensors) for name, tensors in groups.items()]


def index_json(shards: Sequence[Shard], tensors: Iterable[PlannedTensor]) -> str:
    """model.safetensors.index.json: where each tensor is, and totals of bytes and parameters."""
    tensors = list(tensors)
    totals = {
        "total_parameters": sum(t.numel for t in tensors),
        "total_size": sum(t.bytes_written for t in tensors),
    }
    places = {name: shard.name for shard in shards for name in shard.places}
    return json.dumps({"metadata": totals, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def _supplier(plan: Plan) -> Checkpoint:
    """The side that most bytes are copied from; the base if none is."""
    sides = sides_of(plan)
    copied = [1, *(0 for _ in plan.finetuned)]
    for tensor in plan.tensors:
        only = sole_operand(tensor.alphas)
        if only is not None:
            copied[only + 1] += tensor.bytes_written
    return sides[copied.index(max(copied))]


def sides_of(plan: Plan) -> tuple[Checkpoint, ...]:
    """Base and fine-tuned models."""
    assert plan.base is not None
    return (plan.base, *plan.finetuned)


def _by_file(side: Checkpoint, order: Iterable[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in order:
        name = side.tensors[tensor.name].file.relative_to(side.path).as_posix()
        groups.setdefault(name, []).append(tensor)
    return groups


def _filled(order: Iterable[PlannedTensor], limit: int) -> Iterator[list[PlannedTensor]]:
    """Tensors in order, as many together as the limit allows."""
    group: list[PlannedTensor] = []
    size = 0
    for tensor in order:
        if group and size + tensor.bytes_written > limit:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.bytes_written
    yield group


def _names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _shard(plan: Plan, side: Checkpoint, name: str, tensors: Sequence[PlannedTensor]) -> Shard:
    header = _header(side, tensors)
    places, pieces, at = dict[str, int](), list[Piece](), 8 + len(header)
    for tensor in tensors:
        places[tensor.name] = at
        pieces += _pieces(plan, tensor, at)
        at += tensor.bytes_written
    return Shard(name, header, places, tuple(_joined(pieces)), at)


def _header(side: Checkpoint, tensors: Sequence[PlannedTensor]) -> bytes:
    """The source's own header if it says just this, else a new one, padded to 8 bytes."""
    entries: dict[str, Any] = {}
    at = 0
    for tensor in tensors:
        stop = at + tensor.bytes_written
        shape = list(side.tensors[tensor.name].shape)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    files = {side.tensors[tensor.name].file for tensor in tensors}
    metadata, raw = read_metadata(files.pop()) if len(files) == 1 else ({}, b"")
    wanted = {"__metadata__": {**metadata, "format": "pt"}, **entries}
    if raw and json.loads(raw) == wanted:
        return raw
    text = json.dumps(wanted, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _pieces(plan: Plan, tensor: PlannedTensor, at: int) -> Iterator[Piece]:
    """What fills one tensor, in pieces small enough to share out."""
    source = _copied_from(plan, tensor)
    if source is not None:
        info = source.tensors[tensor.name]
        yield Copied(at, at + info.nbytes, info.file, info.start)
        return
    width = DTYPE_BITS[tensor.dtype] // 8
    for first, last in rows(tensor.numel, sides_of(plan)[0].tensors[tensor.name].shape):
        yield Computed(at + first * width, at + last * width, tensor, first, last)


def rows(numel: int, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last element of parts of a tensor that are whole rows, about `LONGEST_AVERAGE` elements each."""
    row = max(1, (*shape, 1)[len(shape) - 1])
    step = max(1, LONGEST_AVERAGE // row) * row
    for first in range(0, numel, step):
        yield first, min(first + step, numel)


def _copied_from(plan: Plan, tensor: PlannedTensor) -> Checkpoint | None:
    """The side whose bytes are the result's; None if there is something to compute."""
    only = sole_operand(tensor.alphas)
    if only is None or tensor.converted:
        return None
    side = sides_of(plan)[only + 1]
    return None if isinstance(side, AdaptedCheckpoint) and tensor.name in side.factors else side


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Copies of neighbouring bytes as one, up to `LONGEST_COPY`; longer ones cut."""
    run: Copied | None = None
    for piece in pieces:
        if isinstance(piece, Copied) and piece.start == piece.stop:
            continue
        if (
            run is not None
            and isinstance(piece, Copied)
            and piece.file == run.file
            and piece.offset == run.offset + run.stop - run.start
        ):
            run = Copied(run.start, piece.stop, run.file, run.offset)
            continue
        if run is not None:
            yield from _cut(run)
        run = piece if isinstance(piece, Copied) else None
        if run is None:
            yield piece
    if run is not None:
        yield from _cut(run)


def _cut(run: Copied) -> Iterator[Copied]:
    for start in range(run.start, run.stop, LONGEST_COPY):
        stop = min(start + LONGEST_COPY, run.stop)
        yield Copied(start, stop, run.file, run.offset + start - run.start)
