"""Fills the files of a merge: copies in the kernel, averages in blocks, digests behind; all cores, a few MB of memory.

    workers     one per core; each takes the next piece in file order, reads, computes and writes it in place
    digests     one thread per file follows the pieces that are done, while their pages are still in memory

Every worker owns buffers for one block (`kernel.CHUNK` elements of each operand) and makes nothing new; hashing,
reading, writing and numpy's loops leave the interpreter free, so threads are enough. It knows layouts and checkpoints;
no recipes, directories or progress bars.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
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

__all__ = ["Advance", "Blocks", "Filled", "cores", "fill"]

HASHED = 1 << 20  # bytes a digest takes in at a time
UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
Array = npt.NDArray[Any]
Advance = Callable[[int], None]


class Blocks:
    """Blocks of the result's tensors, computed from the inputs. One per thread: it reuses its buffers.

    ``before``: dtype (as safetensors spells it) that inputs are converted to before they are averaged, or None.
    """

    def __init__(self, plan: Plan, before: str | None = None) -> None:
        assert plan.base is not None
        self._sides: tuple[Checkpoint, ...] = (plan.base, *plan.finetuned)
        self._before = before
        self._buffers: dict[object, Array] = {}
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

    def _buffer(self, key: object, dtype: npt.DTypeLike, size: int) -> Array:
        """An array (size,) over memory kept under this key."""
        kind = np.dtype(dtype)
        kept = self._buffers.get(key)
        if kept is None or kept.nbytes < size * kind.itemsize:
            kept = self._buffers[key] = np.empty(max(size, CHUNK) * kind.itemsize, np.uint8)
        return kept[: size * kind.itemsize].view(kind)


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


class Fill:
    """One merge under way: see `fill`."""

    def __init__(self, plan: Plan, directory: Path, before: str | None, advance: Advance) -> None:
        self._plan, self._directory, self._before, self._advance = plan, directory, before, advance
        self._mine, self._stop = threading.local(), threading.Event()

    def run(self, shards: Sequence[Shard], inputs: Sequence[Path], digests: bool, workers: int) -> Filled:
        """Write all files; whatever fails stops the rest."""
        pools = [ThreadPoolExecutor(count) for count in (workers, 2 * workers, workers)]
        work, behind, reading = pools
        try:
            hashed = {file: reading.submit(self._digest, file) for file in inputs}
            done: list[Future[str]] = []
            for first in range(0, len(shards), workers):
                for earlier in done[max(0, first - workers) : first]:
                    earlier.result()  # few pieces wait at a time
                done += self._begin(shards[first : first + workers], work, behind, digests)
            outputs = {shard.name: future.result() for shard, future in zip(shards, done, strict=True)}
            return Filled(outputs, {file: future.result() for file, future in hashed.items()})
        finally:
            self._stop.set()
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def _begin(
        self, shards: Sequence[Shard], work: ThreadPoolExecutor, behind: ThreadPoolExecutor, digests: bool
    ) -> list[Future[str]]:
        """Queue the pieces of these files in turn: two writers of one file would wait for each other."""
        files = [self._create(shard) for shard in shards]
        queued: list[list[Future[None]]] = [[] for _ in shards]
        for pieces in zip_longest(*(shard.pieces for shard in shards)):
            for file, piece, futures in zip(files, pieces, queued, strict=True):
                if piece is not None:
                    futures.append(work.submit(self._write, file, piece))
        return [
            behind.submit(self._finish, file, shard, futures, digests)
            for file, shard, futures in zip(files, shards, queued, strict=True)
        ]

    def _digest(self, file: Path) -> str:
        try:
            return sha256_of(file, self._stop)
        except DataError as error:
            raise changed(file) from error

    def _create(self, shard: Shard) -> int:
        path = self._directory / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        write(file, len(shard.header).to_bytes(8, "little") + shard.header, 0)
        return file

    def _write(self, file: int, piece: Piece) -> None:
        """Fill one piece of an output file; what is queued after a failure is not done."""
        if self._stop.is_set():
            return
        try:
            if isinstance(piece, Copied):
                with opened(piece.file) as source:
                    copy(source, file, piece)
            else:
                self._compute(file, piece)
        except BaseException:
            self._stop.set()
            raise
        self._advance(piece.stop - piece.start)

    def _compute(self, file: int, piece: Computed) -> None:
        if not hasattr(self._mine, "blocks"):
            self._mine.blocks = Blocks(self._plan, self._before)
        at = piece.start
        for block in self._mine.blocks(piece.tensor, piece.first, piece.last):
            write(file, block.view(np.uint8).data, at)
            at += block.nbytes

    def _finish(self, file: int, shard: Shard, pieces: Sequence[Future[None]], digests: bool) -> str:
        """Follow the pieces with the digest, then sync; the sha256 in hex, empty if not asked for."""
        try:
            found, buffer = hashlib.sha256(), bytearray(HASHED)
            ends = [8 + len(shard.header), *(piece.stop for piece in shard.pieces)]
            done: Sequence[Future[None] | None] = [None, *pieces]
            at = 0
            for end, piece in zip(ends, done, strict=True):
                if piece is not None:
                    piece.result()
                while digests and at < end:
                    view = memoryview(buffer)[: min(HASHED, end - at)]
                    at += os.preadv(file, [view], at)
                    found.update(view)
            os.fsync(file)
            return found.hexdigest() if digests else ""
        finally:
            for future in pieces:  # they write to the file that is closed now
                with contextlib.suppress(CancelledError):  # `wait` would never return
                    future.exception()
            os.close(file)


def fill(
    plan: Plan,
    shards: Sequence[Shard],
    directory: Path,
    *,
    before: str | None = None,
    inputs: Sequence[Path] = (),
    digests: bool = True,
    workers: int | None = None,
    advance: Advance = lambda _: None,
) -> Filled:
    """Write the shards into ``directory``, synced to disk.

    ``inputs``: files whose sha256 is taken meanwhile; ``digests``: of the outputs too; ``workers``: threads, by default
    one per core; ``advance`` is called by any of them with the bytes just written. OSError if a file cannot be written.
    """
    return Fill(plan, directory, before, advance).run(shards, inputs, digests, workers or cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(file: int, data: bytes | memoryview, at: int) -> None:
    """All bytes at an offset."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], at + done)


def copy(source: int, target: int, piece: Copied) -> None:
    """In the kernel (the filesystem may share the blocks), or through a buffer where it cannot."""
    done, size = 0, piece.stop - piece.start
    while done < size and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, size - done, piece.offset + done, piece.start + done)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            break
        if count == 0:
            raise changed(piece.file)
        done += count
    while done < size:
        data = os.pread(source, min(HASHED, size - done), piece.offset + done)
        if not data:
            raise changed(piece.file)
        write(target, data, piece.start + done)
        done += len(data)
