"""sha256 of files, remembered by path, size, time of change and inode, as `make` does.

Hashing a large checkpoint takes minutes, and the same base goes into many runs. The hub's cache needs no hashing at
all: the name of a file there is its sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import threading
from pathlib import Path

from arma_mergekit.errors import DataError

__all__ = ["DigestMemo", "cache_directory", "known_digest", "sha256_of", "state"]

BLOCK = 1 << 20
TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, state TEXT NOT NULL, sha256 TEXT NOT NULL)"
SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_directory() -> Path:
    """`$ARMA_CACHE`, else a directory in the user's cache."""
    root = os.environ.get("ARMA_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "arma_mergekit"


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
    """A file's sha256 in hex; DataError if it cannot be read. Once ``stop`` is set it is given up, and empty."""
    found, buffer = hashlib.sha256(), bytearray(BLOCK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                found.update(view[:count])
                if stop is not None and stop.is_set():
                    return ""
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    return found.hexdigest()


def known_digest(path: Path) -> str | None:
    """The sha256 that the hub's cache names a large file by, else None."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and SHA256.fullmatch(real.name) else None


class DigestMemo:
    """Digests of files that have not changed since. Without ``path`` it remembers nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._base: sqlite3.Connection | None = None
        with contextlib.suppress(OSError, sqlite3.Error):  # a memo that cannot be kept is no reason to stop
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._base = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
                self._base.execute(TABLE)

    @classmethod
    def default(cls) -> DigestMemo:
        """The user's."""
        return cls(cache_directory() / "digests.sqlite")

    def digest(self, path: Path) -> str:
        """The file's sha256, computed only if it is not known."""
        return self.get(path) or self.put(path, sha256_of(path), state(path))

    def get(self, path: Path) -> str | None:
        """The sha256 if it is known and the file still the same."""
        if (named := known_digest(path)) is not None or self._base is None:
            return named
        with contextlib.suppress(sqlite3.Error, OSError):
            row = self._base.execute(
                "SELECT sha256 FROM files WHERE path = ? AND state = ?",
                (os.fsencode(path.resolve()), state(path)),
            ).fetchone()
            return None if row is None else str(row[0])
        return None

    def put(self, path: Path, sha256: str, before: str) -> str:
        """Remember a digest, unless the file is no longer in the state it had ``before`` it was hashed."""
        if self._base is not None:
            with contextlib.suppress(sqlite3.Error, OSError):
                if state(path) != before:
                    return sha256
                self._base.execute(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                    (os.fsencode(path.resolve()), before, sha256),
                )
        return sha256

    def close(self) -> None:
        """Close the file."""
        if self._base is not None:
            self._base.close()


def state(path: Path) -> str:
    """Size, inode, and times of change: the second one (ctime) nobody can set back."""
    status = path.stat()
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"
