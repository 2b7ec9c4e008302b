"""What goes beside the weights: config, tokenizer, templates and custom code of the base, to the byte.

By the endings that readers of models ask for, since names differ from model to model (tekken.json, source.spm), but for
weights, what a training run leaves, and what by its name is a secret. Of folders those that belong to a model whole, of
others only code and templates.

The base's config.json is copied, not rewritten: a library that saves it again changes keys (`rope_theta` became
`rope_parameters`), which older readers silently ignore. Only its dtype changes when the weights' dtype does.
"""

from __future__ import annotations

import filecmp
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import SIAMESE, contained, readable
from arma_mergekit.checkpoint.read import opened

__all__ = ["LOCK", "companions", "unlike_companions", "write_companions"]

LOCK = "arma.lock.json"  # our own record, see lock.py
CODE = ("*.py", "*.jinja")
# of file names in lower case
WANTED = (
    *CODE, "*.json", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.bpe", "*.vocab", "*.tokenizer", "*vocab*.txt",
    "merges*.txt", "dict*.txt", "requirements.txt", "licen[cs]e*", "notice*", "use_policy*",
)  # fmt: skip
UNWANTED = (
    "*.index.json", "adapter_config.json",  # of weights that are not the result's: readers would look for those
    LOCK, SIAMESE, "finetune.json", "train*.json", "eval*.json", "*_results.json", "data.json", "dataset*.json",
    "*secret*", "*credential*", "*password*", "*api_key*", "*token.json", "service_account*",
)  # fmt: skip
FOLDERS = ("additional_chat_templates", "custom_generate", "[0-9]_*")  # the last: of sentence-transformers
STRANGE_FOLDERS = (".*", "checkpoint-*", "wandb", "venv")
DEEPEST = 3  # folders within folders
LARGEST = 200_000_000  # bytes; the largest tokenizers have a quarter of it
PICKLES = (b"\x80", b"PK\x03\x04")  # how they begin, zipped ones too
DTYPE_KEYS = (
    "dtype",
    "torch_dtype",
)  # of config.json; the second is what it was called before transformers 5


def companions(base: Checkpoint, dtype: str | None) -> Iterator[tuple[str, Path, bytes | None]]:
    """What a user of the result needs beside its weights: name, file, and its content if that is to be another.

    ``dtype`` (`bfloat16`) replaces the one in config.json.
    """
    with readable(base.ref):
        for name in _names(base.path, PurePosixPath()):
            file = contained(base.path, name)
            if not _is_pickle(file):
                yield name, file, _with_dtype(file, dtype) if dtype and name == "config.json" else None


def _names(path: Path, inside: PurePosixPath) -> Iterator[str]:
    for entry in sorted((path / inside).iterdir()):
        name = inside / entry.name
        if entry.is_dir():
            if _is_searched(entry, name):
                yield from _names(path, name)
        elif _is_wanted(name) and entry.is_file() and entry.stat().st_size <= LARGEST:
            yield str(name)


def _is_searched(folder: Path, name: PurePosixPath) -> bool:
    if len(name.parts) > DEEPEST or _is_one_of(name.name, STRANGE_FOLDERS):
        return False
    return _is_one_of(name.parts[0], FOLDERS) or not folder.is_symlink()


def _is_wanted(name: PurePosixPath) -> bool:
    last, whole = name.name.lower(), len(name.parts) == 1 or _is_one_of(name.parts[0], FOLDERS)
    hidden = last.startswith(".")
    return _is_one_of(last, WANTED if whole else CODE) and not _is_one_of(last, UNWANTED) and not hidden


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_pickle(file: Path) -> bool:
    with opened(file) as source:
        return os.pread(source, 4, 0).startswith(PICKLES)


def write_companions(base: Checkpoint, directory: Path, dtype: str | None) -> list[str]:
    """Write the companions and return their names."""
    names = []
    for name, file, content in companions(base, dtype):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            with (
                opened(file) as source,
                open(source, "rb", closefd=False) as stream,
                target.open("wb") as copy,
            ):
                shutil.copyfileobj(stream, copy)
        else:
            target.write_bytes(content)
        names.append(name)
    return names


def unlike_companions(base: Checkpoint, directory: Path, dtype: str | None) -> Iterator[str]:
    """Sentences on companions that are not in the directory as `write_companions` writes them."""
    for name, file, content in companions(base, dtype):
        there = directory / name
        if not there.is_file():
            yield f"{name} is missing."
        elif not (
            filecmp.cmp(file, there, shallow=False) if content is None else there.read_bytes() == content
        ):
            yield f"{name} is not the base's."


def _with_dtype(file: Path, dtype: str) -> bytes | None:
    """config.json with another dtype; None if it has that one."""
    config = read_json(file)
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, dict) else [])]
    said = [part[key] for part in parts for key in DTYPE_KEYS if key in part]
    if said and all(value == dtype for value in said):
        return None
    for part in parts:
        part.update({key: dtype for key in DTYPE_KEYS if key in part})
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
