"""arma.lock.json: what went into a merge and what came out of it, so that anybody can check or repeat it.

    inputs    every file of every model that was read, with its sha256
    output    every file of the result, with its sha256
    recipe    as plain data, and from it alpha and role of every tensor
    evaluation    what the tuning run that found the alphas measured, if there was one

Paths are spelled as the recipe spells them. It knows plans, files and JSON.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from arma_mergekit import __version__
from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.model import INDEX
from arma_mergekit.checkpoint.read import changed
from arma_mergekit.errors import CheckpointError
from arma_mergekit.merge.beside import LOCK, companions
from arma_mergekit.plan import Plan
from arma_mergekit.recipe import Recipe

__all__ = [
    "FORMAT",
    "LOCK",
    "by_tensor",
    "foreign_lock",
    "input_files",
    "make_lock",
    "name_in",
    "pinned",
    "read_lock",
    "write_lock",
]

FORMAT = 1
DEEPEST = 40  # levels of a recipe
COMMIT = re.compile(r"[0-9a-f]{40}")


def make_lock(
    recipe: Recipe,
    plan: Plan,
    shard_size: int | None,
    inputs: Mapping[Path, str | None],
    outputs: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """The lock of a merge as JSON data. ``inputs``: file -> sha256; ``outputs``: name -> bytes, sha256."""
    assert plan.base is not None
    sides = [("base", plan.base), *(("fine-tuned", side) for side in plan.finetuned)]
    frame = _frame("arma", recipe.raw, recipe.path, sides, inputs, outputs)
    frame["output"] |= {"parameters": sum(t.numel for t in plan.tensors), "shard_size": shard_size}
    return {
        **frame,
        "tensors": {
            "averaged": sum(t.action == "average" for t in plan.tensors),
            "copied": sum(t.action == "copy" for t in plan.tensors),
        },
        **by_tensor(plan),
        "evaluation": None,
    }


def by_tensor(plan: Plan) -> dict[str, dict[str, Any]]:
    """Alphas and roles as a lock has them."""
    return {
        "alphas": {t.name: t.alphas[0] if len(t.alphas) == 1 else list(t.alphas) for t in plan.tensors},
        "roles": {t.name: [t.role.layer, t.role.part, t.role.attention] for t in plan.tensors},
    }


def foreign_lock(
    content: Mapping[str, Any],
    path: Path,
    models: Iterable[Checkpoint],
    inputs: Mapping[Path, str | None],
    outputs: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """The lock of a merge that mergekit's executor made: without alphas, since another method may have none."""
    return _frame("mergekit", content, path, [("input", model) for model in models], inputs, outputs)


def _frame(
    executor: str,
    content: Mapping[str, Any],
    path: Path,
    sides: Iterable[tuple[str, Checkpoint]],
    inputs: Mapping[Path, str | None],
    outputs: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """What every lock has."""
    return {
        "format": FORMAT,
        "tool": {
            "arma_mergekit": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "executor": executor,
        "recipe_file": str(path),
        "recipe": {k: v for k, v in content.items() if k not in ("evals", "tune")},
        "inputs": [_input(role, side, inputs) for role, side in sides],
        "output": {
            "files": {
                name: {"bytes": size, "sha256": sha256 or None}
                for name, (size, sha256) in sorted(outputs.items())
            },
            "bytes": sum(size for size, _ in outputs.values()),
        },
    }


def _input(role: str, side: Checkpoint, digests: Mapping[Path, str | None]) -> dict[str, Any]:
    read = _files(side, role == "base")
    try:
        files = {name_in(side, f): {"bytes": f.stat().st_size, "sha256": digests.get(f)} for f in read}
    except FileNotFoundError as error:
        raise changed(Path(error.filename)) from error
    commits = [
        *map(_commit, side.directories.values()),
        None,
    ]  # of the model, and of its adapter if it has one
    return {
        "role": role,
        "ref": side.ref,
        "commit": commits[0],
        "adapter_commit": commits[1],
        "files": files,
    }


def _files(side: Checkpoint, base: bool) -> list[Path]:
    """What is read of a model; of the base also what is copied beside the weights."""
    index = [file] if (file := side.path / INDEX).is_file() else []
    beside = [file for _, file, _ in companions(side, None)] if base else []
    return list(dict.fromkeys((*side.files, *index, *beside)))


def name_in(side: Checkpoint, file: Path) -> str:
    """A file's name within its model; an adapter's with its directory's."""
    return (
        file.relative_to(side.path).as_posix()
        if file.is_relative_to(side.path)
        else f"{file.parent.name}/{file.name}"
    )


def input_files(sides: Sequence[Checkpoint]) -> list[Path]:
    """Every file that is read of the base, which comes first, and of the fine-tuned models, once."""
    return list(dict.fromkeys(file for i, side in enumerate(sides) for file in _files(side, i == 0)))


def _commit(path: Path) -> str | None:
    """The commit of a model in the hub's cache, whose directory is named by it."""
    return path.name if path.parent.name == "snapshots" and COMMIT.fullmatch(path.name) else None


def pinned(lock: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a lock, its hub models at the commits that were merged, wherever their branches are now."""
    names = {side["ref"]: _at_commit(side) for side in lock["inputs"]}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    return {key: replaced(value) for key, value in lock["recipe"].items()}


def _at_commit(side: Mapping[str, Any]) -> str:
    """A reference with the commits of the model and of its adapter."""
    commits = (side["commit"], side.get("adapter_commit"))
    parts = zip(side["ref"].split("+"), commits, strict=False)
    return "+".join(f"{part.partition('@')[0]}@{commit}" if commit else part for part, commit in parts)


class _File(BaseModel):
    bytes: int = Field(ge=0, lt=1 << 63)
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")


class _Input(BaseModel):
    role: str
    ref: str
    commit: str | None = Field(pattern=f"^{COMMIT.pattern}$")
    adapter_commit: str | None = Field(default=None, pattern=f"^{COMMIT.pattern}$")
    files: dict[str, _File]


class _Output(BaseModel):
    files: dict[str, _File]
    bytes: int
    shard_size: int | None = Field(default=None, ge=1)


class _Lock(BaseModel):
    """What those who read a lock rely on; other keys are none of their business."""

    format: Literal[1]
    executor: Literal["arma", "mergekit"]
    tool: dict[str, str]
    recipe_file: str
    recipe: dict[str, Any]
    inputs: list[_Input]
    output: _Output


def read_lock(file: Path) -> dict[str, Any]:
    """A lock; CheckpointError, in one sentence, if it is none."""
    content = read_json(file)
    try:
        _Lock.model_validate(content, strict=True)
        json.dumps(content["recipe"], allow_nan=False)
        strange = [name for name in content["output"]["files"] if not _is_inside(name)]
        if strange or _depth(content["recipe"]) > DEEPEST:
            raise ValueError(
                f"output.files names {strange[0][:60]!r}" if strange else "recipe is nested too deeply"
            )
    except (ValueError, RecursionError) as error:
        why = str(error)[:200]
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            why = f"{'.'.join(str(part)[:60] for part in fault['loc'])}: {fault['msg']}"
        raise CheckpointError(
            f"{file} is no lock that this version can use ({why}); merge again with `arma merge`."
        ) from error
    return content


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in the directory."""
    path = PurePosixPath(name)
    if not path.parts:
        return False
    return (
        name.isprintable()
        and len(name) < 500
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
    )


def _depth(value: Any, level: int = 0) -> int:
    if level > DEEPEST or not isinstance(value, dict | list):
        return level
    inside = value.values() if isinstance(value, dict) else value
    return max((_depth(item, level + 1) for item in inside), default=level)


def write_lock(lock: Mapping[str, Any], file: Path) -> None:
    """As JSON, stable and readable."""
    # escaped, since names of files need not be text
    file.write_text(json.dumps(lock, indent=1) + "\n", encoding="utf-8")
