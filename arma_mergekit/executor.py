"""mergekit's own executor, for recipes that `arma merge` does not do itself: other methods, slices, tokenizer surgery.

The directory is as safe as that of our own merges: a draft, synced, that is renamed when complete; a lock beside the
weights; inputs that did not change meanwhile; every tensor that all models have, and every file that a user of the base
had. What differs is mergekit's: speed, memory, arithmetic (a value that does not fit its dtype is not noticed), and
config.json, which transformers writes anew.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import model_validator

from arma_mergekit.checkpoint import Checkpoint, open_model
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.model import INDEX, some
from arma_mergekit.checkpoint.read import changed
from arma_mergekit.digest import DigestMemo, sha256_of, state
from arma_mergekit.errors import ArmaError, CheckpointError, RunError
from arma_mergekit.merge.beside import companions
from arma_mergekit.merge.lock import foreign_lock
from arma_mergekit.merge.run import Describe, finish, needed
from arma_mergekit.merge.target import check_target, draft_of
from arma_mergekit.plan.compare import RECOMPUTED, setting
from arma_mergekit.recipe import ModelEntry, Recipe
from arma_mergekit.recipe.recipe import Parameters
from arma_mergekit.recipe.strict import Strict
from arma_mergekit.roles import roles

__all__ = ["merge_with_mergekit", "reason"]

LAYERS = ("slices", "modules")  # keys of recipes whose result has other layers than its inputs
TOKENIZER = ("tokenizer", "tokenizer_source", "chat_template")  # keys that make another tokenizer
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
NOT_NEEDED = (*RECOMPUTED, ".position_ids")  # buffers that a model computes for itself


def reason(content: Mapping[str, Any]) -> str | None:
    """Why a recipe is mergekit's to do, as the start of a sentence; None if it is ours."""
    method = content.get("merge_method")
    if method != "arma":
        return f"merge_method {method}" if isinstance(method, str) else None
    used = [key for key in (*LAYERS, *TOKENIZER) if content.get(key) is not None]
    return " and ".join(used) or None


def merge_with_mergekit(
    content: Mapping[str, Any],
    path: Path,
    out: Path,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    memo: DigestMemo | None = None,
    describe: Describe = lambda *_: {},
) -> dict[str, Any]:
    """Merge into ``out`` with mergekit, in files of at most ``shard_size`` bytes of tensors; returns the lock.

    RunError with mergekit's words if it fails; RecipeError for keys that a recipe of ours does not have.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    import arma_mergekit.method  # noqa: F401

    if content.get("merge_method") == "arma":  # mergekit passes over what it does not know
        (_Layered if any(content.get(key) for key in LAYERS) else Recipe).parse(content, path)
    try:
        config = MergeConfiguration.model_validate(dict(content))
        models = [str(model) for model in config.referenced_models()]
        donor = str(config.base_model or models[0])
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{path}: mergekit refuses the recipe ({_first_line(error)}).") from error
    sides = _opened(models)
    check = partial(check_target, out, overwrite, needed(sides, path))
    check()
    before = {file: state(file) for side in sides for file in side.files}
    size = max((sum(t.nbytes for t in s.tensors.values()) for s in sides), default=0)
    with (
        draft_of(out, size, check) as draft,
        tempfile.TemporaryDirectory(dir=draft, prefix=".", ignore_cleanup_errors=True) as folded,
    ):
        options = MergeOptions(lora_merge_cache=folded, write_model_card=False, quiet=True)
        options = options.model_copy(update={"out_shard_size": shard_size} if shard_size else {})
        try:
            run_merge(config, str(draft), options, config_source=json.dumps(content))
        except ArmaError:
            raise
        except Exception as error:  # whatever a method of mergekit raises ends this command, not the program
            raise RunError(f"{path}: mergekit's executor failed ({_first_line(error)}).") from error
        shutil.rmtree(folded)
        sides = _opened(models)  # with those that mergekit had to fetch
        base = next((side for side in sides if side.ref == donor), None)
        merged = Checkpoint.at(draft)
        if base is not None:
            _check_whole(content, path, base, sides, merged)
            _add_companions(content, base, draft)
        _complete_index(merged)
        memo = memo or DigestMemo()
        inputs = {file: memo.digest(file) for side in sides for file in side.files}
        outputs = {name: (file.stat().st_size, sha256_of(file)) for name, file in _settled(draft).items()}
        lock = foreign_lock(content, path, sides, inputs, outputs)
        lock["output"]["shard_size"] = shard_size
        finish(lock, describe(lock, sides), draft)
        for file, then in before.items():
            if not file.is_file() or state(file) != then:
                raise changed(file)
    return lock


class _Source(ModelEntry):
    """A model's layers in a slice."""

    layer_range: Any


class _Slice(Strict):
    """Layers of the result."""

    sources: tuple[_Source, ...]
    base_model: Any = None
    residual_weight: Any = None
    parameters: Parameters = Parameters()


class _Module(Strict):
    """A part of the result, such as its text model."""

    slices: tuple[_Slice, ...] | None = None
    models: tuple[ModelEntry, ...] | None = None
    parameters: Parameters = Parameters()


class _Layered(Recipe):
    """A recipe of slices or modules. Which of them make a model mergekit says."""

    base_model: Any = None
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[_Slice, ...] | None = None
    modules: dict[str, _Module] | None = None

    @model_validator(mode="after")
    def _whole_models(self) -> _Layered:
        return self


def _opened(models: list[str]) -> list[Checkpoint]:
    """Those models that we can read too."""
    found = []
    for model in models:
        try:
            found.append(open_model(model))
        except CheckpointError:
            if Path(model.partition("+")[0]).is_dir():  # pickled, broken, or no model: mergekit would open it
                raise
    return found


def _check_whole(
    content: Mapping[str, Any], path: Path, base: Checkpoint, sides: Sequence[Checkpoint], merged: Checkpoint
) -> None:
    """RunError if the result lacks a tensor that all models have: mergekit merges what its definitions list.

    It may rename or fuse tensors, as transformers 5 does, so what has gone must be as large as what is new; embedding
    and head count as one each, since a tokenizer resizes them. With other layers nothing can be told.
    """
    if any(content.get(key) for key in LAYERS):
        return
    tied = setting(base.config, "tie_word_embeddings") is not False
    placed = roles(base.tensors, base.config)
    gone = {
        name
        for name in set(base.tensors).intersection(*(side.tensors for side in sides)) - set(merged.tensors)
        if not name.endswith(NOT_NEEDED) and not (tied and placed[name].part == "head")
    }
    new = set(merged.tensors).difference(*(side.tensors for side in sides))
    if _extent(base, gone) > _extent(merged, new):
        raise RunError(
            f"{path}: mergekit's executor leaves out {some(gone)}, which all models have and loading would fill at "
            f"random; `merge_method: arma` without {', '.join((*LAYERS, *TOKENIZER))} keeps every tensor."
        )


def _extent(model: Checkpoint, names: Iterable[str]) -> int:
    placed = roles(model.tensors, model.config)
    return sum(1 if placed[n].part in ("embed", "head") else model.tensors[n].numel for n in names)


def _add_companions(content: Mapping[str, Any], base: Checkpoint, draft: Path) -> None:
    """The base's files that mergekit left out, but for those of a tokenizer that is not the base's any more."""
    another = any(content.get(key) is not None for key in TOKENIZER)
    for name, file, _ in companions(base, None):
        if another and any(fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER_FILES):
            continue
        if not (draft / name).exists():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, draft / name)


def _complete_index(merged: Checkpoint) -> None:
    """Both totals in the index, if there is one."""
    file = merged.path / INDEX
    if file.is_file():
        index = read_json(file)
        index["metadata"] = {
            **(index.get("metadata") or {}),
            "total_parameters": sum(t.numel for t in merged.tensors.values()),
            "total_size": sum(t.nbytes for t in merged.tensors.values()),
        }
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _settled(draft: Path) -> dict[str, Path]:
    """Files of the result by name, on the disk and for others to read (safetensors writes them for the owner only)."""
    mask = os.umask(0)
    os.umask(mask)
    files = sorted(f for f in draft.rglob("*") if f.is_file() and not f.name.startswith("."))
    for file in files:
        file.chmod(0o666 & ~mask)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return {f.relative_to(draft).as_posix(): f for f in files}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
