"""From a model reference to the files of a directory, never outside it.

    reference = path[@revision][+adapter[@revision]]          mergekit's syntax; `+` and `@` always separate

A path is local if it exists, else a hub id looked up in huggingface_hub's cache; nothing is downloaded. The
cache is the one place where weight files may be symlinks out of the directory:

    models--org--name/snapshots/<commit>/model.safetensors -> ../../blobs/<sha>
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from arma_mergekit.errors import CheckpointError

__all__ = ["SIAMESE", "ModelReference", "contained", "locate", "readable", "refuse_siamese"]

SIAMESE = "siamese.json"  # what makes a directory a siamese model
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelReference:
    """A model and, after `+`, the adapter on top of it; revisions only for hub ids."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Parse mergekit's syntax; CheckpointError if it has too many separators or an empty part."""
        model, *adapters = text.split("+")
        parts = [part.split("@") for part in (model, *adapters)]
        if len(parts) > 2 or any(len(p) > 2 or not all(s.strip() for s in p) for p in parts):
            rename = "; rename the directory, since `+` and `@` separate" if Path(text).exists() else ""
            raise CheckpointError(
                f"Model {text!r} is not of the form path[@revision][+adapter[@revision]]{rename}."
            )
        named = [(part[0], part[1] if len(part) == 2 else None) for part in parts]
        return cls(*named[0], *(named[1] if adapters else ()))


@contextmanager
def readable(ref: str) -> Iterator[None]:
    """Within it, an operating system that refuses to read makes a CheckpointError about ``ref``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {ref[:200]}: {error.strerror}; check the path and its rights."
        ) from error


def locate(path: str, revision: str | None = None, base_dir: Path | None = None) -> Path:
    """Directory of a model or adapter; relative paths start at ``base_dir``, default the current one."""
    local = (base_dir or Path()) / path
    if local.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a local directory, which has no revision {revision!r}; write {path}."
            )
        return local
    if local.exists():
        raise CheckpointError(f"{path} is a file; name the directory that holds config.json and the weights.")
    if not HUB_ID.fullmatch(path):
        raise CheckpointError(f"No model directory {path}; paths start at the current directory.")
    return _from_hub_cache(path, revision)


def _from_hub_cache(repo: str, revision: str | None) -> Path:
    # a third of a second to import, so only for hub ids
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        raise CheckpointError(
            f"No model directory {repo} (paths start at the current directory), and no hub model of that "
            f"name in the local cache; `{command}` would download one."
        ) from error


def contained(directory: Path, name: str) -> Path:
    """The file of that name in the directory; CheckpointError if its name or a symlink leads elsewhere."""
    pure = PurePosixPath(name)
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or PureWindowsPath(name).drive
        or "\\" in name
        or "\0" in name
    ):
        raise CheckpointError(
            f"{directory} refers to {name!r}, which is outside the model; do not trust this model."
        )
    file = directory / name
    try:
        real, home = file.resolve(), directory.resolve()
    except RuntimeError as error:  # what Python says to a loop up to 3.12
        raise CheckpointError(f"{file} is a link to itself; put the file itself in its place.") from error
    if home in real.parents or (
        home.parent.name == "snapshots" and home.parent.parent / "blobs" in real.parents
    ):
        return file
    raise CheckpointError(f"{file} is a link to {real}, outside the model; put the file itself in its place.")


def refuse_siamese(path: Path) -> None:
    """CheckpointError if the directory holds a siamese model, which no checkpoint is equal to."""
    if (path / SIAMESE).is_file():
        own = path / "adapter"
        part = f"; its adapter alone can be, as base+{own}" if own.is_dir() else ""
        raise CheckpointError(
            f"{path} is a siamese model: a gate decides between its two passes anew for every token, so it cannot be "
            f"merged or exported as one checkpoint{part}."
        )
