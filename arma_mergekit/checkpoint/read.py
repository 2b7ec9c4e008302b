"""Bytes of a file at an offset, read and not mapped: a map of a file that shrinks kills the process without a word."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.errors import CheckpointError

__all__ = ["changed", "opened", "read_into"]


def read_into(file: Path, offset: int, out: npt.NDArray[Any]) -> None:
    """Fill an array with a file's bytes from ``offset`` on; CheckpointError if it has not so many any more."""
    view, done = out.reshape(-1).view(np.uint8).data, 0
    with opened(file) as descriptor:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise changed(file)
            done += count


@contextlib.contextmanager
def opened(file: Path) -> Iterator[int]:
    """A descriptor of an input, for as long as it takes: a model may have more files than a process may open."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise changed(file) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}.") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def changed(file: Path) -> CheckpointError:
    """What to say of an input that is no longer what its header said."""
    return CheckpointError(f"{file} changed or vanished while it was in use; start again.")
