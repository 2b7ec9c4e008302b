"""A directory that appears when it is complete, or not at all.

    out/                       the target: absent, empty, or (with ``overwrite``) a merge to be replaced as a whole
    .out.arma-draft-XXXXXXXX/  the draft beside it, on the same filesystem; a lock in it lives as long as its process
    .out.arma-old-XXXXXXXX/    what was replaced, for the moment it takes to delete it

The draft is synced and then takes the target's name: one rename where the target is absent or empty, one exchange of
two names (renameat2) where it is replaced. Drafts of dead processes are recognised by their free lock and removed. It
knows directories; no models.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from arma_mergekit.errors import RunError, UsageError

__all__ = ["check_target", "draft_of", "remove_dead_drafts"]

LOCK = ".lock"
DRAFT, OLD = ".arma-draft-", ".arma-old-"
ENDING = "[a-z0-9_]{8}"  # what mkdtemp adds
SLACK = 1 << 20  # bytes of small files beside the weights
AT_FDCWD, EXCHANGE = -100, 2


def check_target(out: Path, overwrite: bool, protected: tuple[Path, ...]) -> None:
    """UsageError if ``out`` cannot become the result: a file, in use, or a directory that is none of ours to replace.

    ``protected``: files and directories that must not be inside what is replaced.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a directory that does not exist yet.")
    if _real(out).is_mount():
        raise UsageError(
            f"{out} is a mount point, which no other directory can take the place of; name one inside it."
        )
    if out.is_dir() and not any(out.iterdir()):
        return
    if not out.exists():
        return
    if not overwrite:
        raise UsageError(
            f"{out} is not empty; name another directory, or give --overwrite to replace it as a whole."
        )
    if not _is_model(out):
        raise UsageError(
            f"{out} holds no model, so it is not replaced; delete it yourself, or name another directory."
        )
    here = _real(out)
    inside = next((p for p in protected if here in (_real(p), *_real(p).parents)), None)
    if inside is not None:
        raise UsageError(f"{out} holds {inside}, which is needed; name another directory.")


def _is_model(out: Path) -> bool:
    """Whether a merge wrote it, or it looks like a model; a lone config.json is in many a project."""
    weights = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
    return weights or (out / "arma.lock.json").is_file()


@contextlib.contextmanager
def draft_of(
    out: Path, size: int, check: Callable[[], None] = lambda: None, sync: bool = True
) -> Iterator[Path]:
    """A new directory that becomes ``out`` at the end of the block, and is removed if the block fails.

    ``size``: bytes it will hold; RunError if the disk has less, or for whatever else the disk refuses. ``check`` is
    called before the work and again before the rename: what it raises ends the block. ``sync``: the names are on the
    disk at the end.
    """
    out = _real(out)
    with contextlib.ExitStack() as stack:
        try:
            draft, lock = _begin(out, size, check)
            stack.callback(
                shutil.rmtree, draft, ignore_errors=True
            )  # what is left of it, or what it replaced
            stack.callback(os.close, lock)
            yield draft
            _finish(draft, out, check, sync)
        except OSError as error:
            raise RunError(
                f"Cannot write {error.filename or out}: {error.strerror}. Nothing was left behind; start the same "
                "command again when that is mended."
            ) from error


def _real(path: Path) -> Path:
    """Without links; UsageError for one that leads to itself."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the second is what Python says to a loop up to 3.12
        raise UsageError(f"{path} cannot be followed ({error}); name another directory.") from error


def _begin(out: Path, size: int, check: Callable[[], None]) -> tuple[Path, int]:
    """The draft, and its lock."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(out.parent):
        remove_dead_drafts(out)
        check()
        free = shutil.disk_usage(out.parent).free
        if free < size + SLACK:
            raise RunError(
                f"{out.parent} has {free / 1e9:.2f} GB free and the result takes {size / 1e9:.2f}; make room, or name "
                "a directory elsewhere."
            )
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}{DRAFT}", dir=out.parent))
        lock = os.open(draft / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return draft, lock


def _finish(draft: Path, out: Path, check: Callable[[], None], sync: bool) -> None:
    """Give the draft the target's name; ``sync``: what names it holds, and that it has it."""
    mask = os.umask(0)
    os.umask(mask)
    draft.chmod(0o777 & ~mask)
    with _alone_in(out.parent):
        check()
        (draft / LOCK).unlink()
        if sync:
            for folder in (draft, *(p for p in draft.rglob("*") if p.is_dir())):
                _sync(folder)
        if out.exists() and any(out.iterdir()):
            _exchange(draft, out)
        else:
            draft.rename(out)
        if sync:
            _sync(out.parent)


def remove_dead_drafts(out: Path) -> list[Path]:
    """Delete what killed processes left beside ``out``, or put back what they had moved aside; returns the drafts."""
    found = []
    ours = re.compile(rf"\.{re.escape(out.name)}({re.escape(DRAFT)}|{re.escape(OLD)}){ENDING}")
    for draft in sorted(p for p in out.parent.iterdir() if ours.fullmatch(p.name)):
        if draft.is_dir() and not draft.is_symlink() and not _in_use(draft):
            if OLD in draft.name and not out.exists():
                draft.rename(out)
            else:
                shutil.rmtree(draft, ignore_errors=True)
            found.append(draft)
    return found


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that write drafts into this directory waiting."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a network filesystem without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _in_use(draft: Path) -> bool:
    """Whether a living process holds the draft's lock."""
    try:
        lock = os.open(draft / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _exchange(draft: Path, out: Path) -> None:
    """Swap the two names at once; in two steps where the system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(draft), os.fsencode(out))
    if swap is not None and swap(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0:
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}{OLD}", dir=out.parent))
    out.rename(aside)
    try:
        draft.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
