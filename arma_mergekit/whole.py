"""Small files written whole or not at all. It knows paths and texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(texts: Mapping[Path, str], mode: int = 0o666) -> None:
    """Write all files beside their places and sync them, then rename: OSError leaves the old ones as they were.

    What exists and is no file (a pipe, /dev/stdout) is written to and never replaced. ``mode``: rights of new files,
    less the umask.
    """
    drafts = {
        path: path.with_name(f".{path.name}.draft") for path in texts if path.is_file() or not path.exists()
    }
    try:
        for path, text in texts.items():
            if path in drafts:
                _write(drafts[path], text, mode)
            else:
                path.write_text(text, encoding="utf-8")
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _write(draft: Path, text: str, mode: int) -> None:
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
