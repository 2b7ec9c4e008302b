"""What goes beside the weights: config, tokenizer, templates and custom code of the base, to the byte.

The base's config.json is copied, not rewritten: a library that saves it again changes keys (`rope_theta` became
`rope_parameters`), which older readers silently ignore. Only its dtype changes when the weights' dtype does.
"""

from __future__ import annotations

import filecmp
import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import contained, readable
from arma_mergekit.checkpoint.read import opened

__all__ = ["companions", "differing_tokenizers", "unlike_companions", "write_companions"]

PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "*.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "*_processor_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py", "*processing_*.py",
    "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
FOLDERS = ("additional_chat_templates",)
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
WEIGHTS = "*.safetensors*"  # and their index
DTYPE_KEYS = (
    "dtype",
    "torch_dtype",
)  # of config.json; the second is what it was called before transformers 5


def companions(base: Checkpoint, dtype: str | None) -> Iterator[tuple[str, Path, bytes | None]]:
    """What a user of the result needs beside its weights: name, file, and its content if that is to be another.

    ``dtype`` (`bfloat16`) replaces the one in config.json.
    """
    with readable(base.ref):
        for name in _names(base.path):
            file = contained(base.path, name)
            yield name, file, _with_dtype(file, dtype) if dtype and name == "config.json" else None


def _names(path: Path) -> Iterator[str]:
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and entry.name in FOLDERS:
            yield from (f"{entry.name}/{p.name}" for p in sorted(entry.iterdir()) if p.is_file())
        elif _is_companion(entry.name) and entry.is_file():
            yield entry.name


def _is_companion(name: str) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in PATTERNS) and not fnmatch.fnmatch(name, WEIGHTS)


def write_companions(base: Checkpoint, directory: Path, dtype: str | None) -> list[str]:
    """Write the companions and return their names."""
    names = []
    for name, file, content in companions(base, dtype):
        target = directory / name
        target.parent.mkdir(exist_ok=True)
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


def differing_tokenizers(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Tokenizer files that both have and that are not the same."""
    pairs = [(base.path / name, tuned.path / name) for name in TOKENIZER]
    with readable(f"the tokenizers of {base.ref} and {tuned.ref}"):
        return [
            a.name for a, b in pairs if a.is_file() and b.is_file() and not filecmp.cmp(a, b, shallow=False)
        ]
