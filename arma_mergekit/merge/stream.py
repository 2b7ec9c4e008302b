"""Fills the files of a merge: copies and averages in blocks, digests behind; all cores, a few MB of memory.

    workers     one per core; each fills a file, piece by piece and in place (several share it if files are few)
    disk        is given each piece as it is written, so that the sync at the end finds little left to wait for
    digests     taken by the worker, of blocks that are still in its cache; if several share a file, another thread
                follows through it, while its pages are still in memory

Every worker owns buffers for one block (`kernel.CHUNK` elements of each operand) and makes nothing new; hashing,
reading, writing and numpy's loops leave the interpreter free, so threads are enough. It knows layouts and checkpoints;
no recipes, directories or progress bars.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, TensorInfo
from arma_mergekit.checkpoint.adapter import Product
from arma_mergekit.checkpoint.model import NUMPY
from arma_mergekit.checkpoint.read import changed, opened, read_into
from arma_mergekit.digest import sha256_of
from arma_mergekit.errors import CheckpointError, DataError
from arma_mergekit.kernel import CHUNK, average_block, narrow, sole_operand, widen
from arma_mergekit.merge.layout import Computed, Copied, Piece, Shard
from arma_mergekit.plan import Plan, PlannedTensor

__all__ = ["Advance", "Blocks", "Buffers", "Filled", "cores", "fill"]

HASHED = COPIED = 1 << 20  # bytes a digest, or a copy, takes in at a time
START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
LIBC = ctypes.CDLL(None)
Array = npt.NDArray[Any]
Advance = Callable[[int], None]


class Buffers:
    """Memory that is used again: fresh pages cost more than what is done with them."""

    def __init__(self) -> None:
        self._kept: dict[object, Array] = {}

    def __call__(self, key: object, dtype: npt.DTypeLike, size: int) -> Array:
        """An array (size,) over memory kept under this key."""
        kind = np.dtype(dtype)
        kept = self._kept.get(key)
        if kept is None or kept.nbytes < size * kind.itemsize:
            kept = self._kept[key] = np.empty(max(size, CHUNK) * kind.itemsize, np.uint8)
        return kept[: size * kind.itemsize].view(kind)


class Blocks:
    """Blocks of the result's tensors, computed from the inputs. One per thread: it reuses its buffers.

    ``before``: dtype (as safetensors spells it) that inputs are converted to before they are averaged, or None.
    """

    def __init__(self, plan: Plan, before: str | None = None) -> None:
        assert plan.base is not None
        self._sides: tuple[Checkpoint, ...] = (plan.base, *plan.finetuned)
        self._before = before
        self._buffer = Buffers()
        self._products: dict[int, tuple[str, Product]] = {}

    def __call__(self, tensor: PlannedTensor, first: int, last: int) -> Iterator[Array]:
        """Elements ``first`` to ``last`` of a tensor, block by block; each array (n,) is valid until the next.

        The range starts and ends with rows of the tensor.
        """
        step = min(self._step(side, tensor.name) for side in self._sides)
        for start in range(first, last, step):
            try:
                yield self._block(tensor, start, min(start + step, last))
            except CheckpointError as error:
                raise CheckpointError(f"{tensor.name}: {error}") from error

    def _step(self, side: Checkpoint, name: str) -> int:
        """Elements of a block: whole rows where an adapter is folded in."""
        if not isinstance(side, AdaptedCheckpoint) or name not in side.factors:
            return CHUNK
        width = side.tensors[name].shape[1]
        return max(1, CHUNK // width) * width

    def _block(self, tensor: PlannedTensor, start: int, stop: int) -> Array:
        only = sole_operand(tensor.alphas)
        if only is not None:
            found = self._operand(only + 1, tensor.name, start, stop)
        else:
            used = [(i, alpha) for i, alpha in enumerate(tensor.alphas, 1) if alpha]
            base, *others = (self._operand(i, tensor.name, start, stop) for i in (0, *(i for i, _ in used)))
            found = self._buffer("average", base.dtype, base.size)
            wide = np.float64 if any(x.dtype.itemsize > 2 for x in (base, *others)) else np.float32
            buffers = self._buffer("wide", wide, 3 * base.size).reshape(3, -1)
            average_block(base, others, [alpha for _, alpha in used], found, buffers)
        return self._converted(found, tensor.dtype, "result")

    def _operand(self, i: int, name: str, start: int, stop: int) -> Array:
        """Elements of one side, its adapter folded in, in the dtype they are averaged in."""
        side = self._sides[i]
        info = side.tensors[name]
        raw = self._buffer(("raw", i), np.dtype(NUMPY[info.dtype]), stop - start)
        read_into(info.file, info.start + start * raw.itemsize, raw)
        if isinstance(side, AdaptedCheckpoint) and name in side.factors:
            raw = self._folded(i, side, info, raw, start)
        return raw if self._before is None else self._converted(raw, self._before, ("cast", i))

    def _folded(self, i: int, side: AdaptedCheckpoint, info: TensorInfo, base: Array, start: int) -> Array:
        """W + scale * B A of whole rows."""
        known = self._products.get(i)
        if known is None or known[0] != info.name:
            known = self._products[i] = (info.name, Product(info, side.factors[info.name]))
        width = info.shape[1]
        out = self._buffer(("folded", i), base.dtype, base.size)
        known[1].add(base.reshape(-1, width), out.reshape(-1, width), start // width)
        return out

    def _converted(self, source: Array, dtype: str, key: object) -> Array:
        """The values in another dtype, rounded to nearest even; CheckpointError if one does not fit."""
        kind = np.dtype(NUMPY[dtype])
        if source.dtype == kind:
            return source
        wide = self._buffer(
            ("wide", key), np.float64 if 8 in (source.itemsize, kind.itemsize) else np.float32, source.size
        )
        widen(source, wide)
        out = self._buffer(key, kind, source.size)
        with np.errstate(over="ignore"):
            narrow(wide, out)
        check_range(wide, out, dtype)
        return out


def check_range(wide: Array, out: Array, dtype: str) -> None:
    """CheckpointError if a finite value became infinite by conversion."""
    if out.itemsize >= wide.itemsize or not out.size:
        return
    again = np.empty_like(wide)
    widen(out, again)
    if np.isinf(again).any() and np.isfinite(wide[np.isinf(again)]).any():
        raise CheckpointError(
            f"Values as large as {np.abs(wide).max():g} do not fit into {dtype}; choose another dtype."
        )


@dataclass(frozen=True)
class Filled:
    """sha256 of the files written and of the inputs asked for, in hex."""

    outputs: Mapping[str, str]
    inputs: Mapping[Path, str]


class Lane:
    """Consecutive pieces of a file that one worker fills, and how far it has come: offsets, then None at its end.

    ``digest``: takes in what is written, if that is the whole file, else None.
    """

    def __init__(self, file: Path, pieces: Sequence[Piece], digest: hashlib._Hash | None) -> None:
        self.file, self.pieces, self.digest = file, pieces, digest
        self.reached: SimpleQueue[int | None] = SimpleQueue()

    def write(self, target: int, data: Array, at: int) -> None:
        """Bytes at an offset of the file that ``target`` is."""
        write(target, data.data, at)
        if self.digest is not None:
            self.digest.update(data.data)


class Fill:
    """One merge under way: see `fill`."""

    def __init__(self, plan: Plan, directory: Path, before: str | None, advance: Advance, sync: bool) -> None:
        self._plan, self._directory, self._before, self._advance = plan, directory, before, advance
        self._sync = sync
        self._mine, self._stop = threading.local(), threading.Event()

    def run(self, shards: Sequence[Shard], inputs: Sequence[Path], digests: bool, workers: int) -> Filled:
        """Write all files; whatever fails stops the rest."""
        pools = [ThreadPoolExecutor(workers) for _ in range(3)]
        work, behind, reading = pools
        lanes = [self._lanes(shard, -(-workers // len(shards)), digests) for shard in shards]
        try:
            hashed = {file: reading.submit(self._digest, file) for file in inputs}
            filled = [[(lane, work.submit(self._fill, lane)) for lane in each] for each in lanes]
            done = [behind.submit(self._finish, *pair, digests) for pair in zip(shards, filled, strict=True)]
            outputs = {shard.name: future.result() for shard, future in zip(shards, done, strict=True)}
            return Filled(outputs, {file: future.result() for file, future in hashed.items()})
        finally:
            self._stop.set()
            for pool in pools:  # nothing is cancelled: what is queued sees the stop, and says that it has
                pool.shutdown()

    def _lanes(self, shard: Shard, count: int, digests: bool) -> list[Lane]:
        """The file, with its header, and its pieces in ``count`` parts of about the same number of bytes.

        Few files need several workers each; else one is best, since two writers of one file wait for each other.
        """
        file = self._directory / shard.name
        file.parent.mkdir(parents=True, exist_ok=True)
        header = len(shard.header).to_bytes(8, "little") + shard.header
        with file.open("xb") as stream:
            stream.write(header)
        parts: list[list[Piece]] = [[] for _ in range(count)]
        for piece in shard.pieces:
            parts[min(count - 1, piece.start * count // shard.size)].append(piece)
        return [
            Lane(file, part, hashlib.sha256(header) if digests and count == 1 else None) for part in parts
        ]

    def _digest(self, file: Path) -> str:
        try:
            return sha256_of(file, self._stop)
        except DataError as error:
            raise changed(file) from error

    def _fill(self, lane: Lane) -> None:
        """Fill a lane; a failure stops all lanes."""
        try:
            with open(lane.file, "r+b", buffering=0) as target:
                for piece in lane.pieces:
                    if self._stop.is_set():
                        return
                    self._write(lane, target.fileno(), piece)
                    if self._sync:
                        write_back(target.fileno(), piece.start, piece.stop)
                    lane.reached.put(piece.stop)
                    self._advance(piece.stop - piece.start)
        except BaseException:
            self._stop.set()
            raise
        finally:
            lane.reached.put(None)

    def _write(self, lane: Lane, target: int, piece: Piece) -> None:
        if not hasattr(self._mine, "blocks"):
            self._mine.blocks = Blocks(self._plan, self._before)
            self._mine.buffer = np.empty(COPIED, np.uint8)
        at = piece.start
        blocks = copied(piece, self._mine.buffer) if isinstance(piece, Copied) else self._computed(piece)
        for block in blocks:
            lane.write(target, block, at)
            at += block.nbytes

    def _computed(self, piece: Computed) -> Iterator[Array]:
        blocks: Blocks = self._mine.blocks
        return (block.view(np.uint8) for block in blocks(piece.tensor, piece.first, piece.last))

    def _finish(self, shard: Shard, lanes: Sequence[tuple[Lane, Future[None]]], digests: bool) -> str:
        """Wait for the lanes of a file, then sync; the sha256 in hex, empty if not asked for."""
        whole = lanes[0][0].digest
        with open(lanes[0][0].file, "rb", buffering=0) as file:
            found = self._follow(file, shard, lanes) if digests and whole is None else whole
            for _, future in lanes:
                future.result()
            if self._sync:
                os.fsync(file.fileno())
        return found.hexdigest() if found is not None else ""

    def _follow(
        self, file: FileIO, shard: Shard, lanes: Sequence[tuple[Lane, Future[None]]]
    ) -> hashlib._Hash:
        """The digest of a file that several workers fill, as far as they have come."""
        found, buffer, at = hashlib.sha256(), memoryview(bytearray(HASHED)), 0
        ends = chain.from_iterable(iter(lane.reached.get, None) for lane, _ in lanes)
        for end in chain(ends, [shard.size]):
            while at < end and not self._stop.is_set():
                count = file.readinto(buffer[: min(HASHED, end - at)]) or 0
                found.update(buffer[:count])
                at += count
        return found


def fill(
    plan: Plan,
    shards: Sequence[Shard],
    directory: Path,
    *,
    before: str | None = None,
    inputs: Sequence[Path] = (),
    digests: bool = True,
    sync: bool = True,
    workers: int | None = None,
    advance: Advance = lambda _: None,
) -> Filled:
    """Write the shards into ``directory``; ``sync``: and to disk.

    ``inputs``: files whose sha256 is taken meanwhile; ``digests``: of the outputs too; ``workers``: threads, by default
    one per core; ``advance`` is called by any of them with the bytes just written. OSError if a file cannot be written.
    """
    return Fill(plan, directory, before, advance, sync).run(shards, inputs, digests, workers or cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(file: int, data: bytes | memoryview, at: int) -> None:
    """All bytes at an offset."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], at + done)


def write_back(file: int, start: int, stop: int) -> None:
    """Have the disk begin with these bytes, so that the sync at the end finds little left to wait for.

    A hint: it does not wait, and where the system has no such call nothing is lost but time.
    """
    if (call := getattr(LIBC, "sync_file_range", None)) is not None:
        call(file, ctypes.c_int64(start), ctypes.c_int64(stop - start), START_WRITING)


def copied(piece: Copied, buffer: Array) -> Iterator[Array]:
    """The bytes, block by block, each valid until the next.

    Through a buffer that stays in the cache: on ext4 that takes less than copy_file_range, which goes by pages.
    """
    done, size = 0, piece.stop - piece.start
    with opened(piece.file) as source:
        while done < size:
            count = os.preadv(source, [buffer[: size - done].data], piece.offset + done)
            if not count:
                raise changed(piece.file)
            yield buffer[:count]
            done += count
