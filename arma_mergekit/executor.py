"""mergekit's own executor, for recipes that `arma merge` does not do itself: other methods, slices, tokenizer surgery.

The directory is as safe as that of our own merges (a draft that is renamed when complete, a lock beside the weights);
speed, memory and arithmetic are mergekit's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from arma_mergekit.checkpoint import Checkpoint, open_model
from arma_mergekit.digest import DigestMemo, sha256_of
from arma_mergekit.errors import ArmaError, CheckpointError, RunError
from arma_mergekit.merge.lock import foreign_lock
from arma_mergekit.merge.run import Describe, finish, needed
from arma_mergekit.merge.target import check_target, draft_of

__all__ = ["merge_with_mergekit", "reason"]

OTHERS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


def reason(content: Mapping[str, Any]) -> str | None:
    """Why a recipe is mergekit's to do, as the start of a sentence; None if it is ours."""
    method = content.get("merge_method")
    if method != "arma":
        return f"merge_method {method}" if isinstance(method, str) else None
    used = [key for key in OTHERS if content.get(key) is not None]
    return " and ".join(used) or None


def merge_with_mergekit(
    content: Mapping[str, Any],
    path: Path,
    out: Path,
    *,
    overwrite: bool = False,
    memo: DigestMemo | None = None,
    describe: Describe = lambda *_: {},
) -> dict[str, Any]:
    """Merge into ``out`` with mergekit; returns the lock. RunError with mergekit's words if it fails."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    import arma_mergekit.method  # noqa: F401

    try:
        config = MergeConfiguration.model_validate(dict(content))
        models = [str(model) for model in config.referenced_models()]
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{path}: mergekit refuses the recipe ({_first_line(error)}).") from error
    sides = _opened(models)
    check = partial(check_target, out, overwrite, needed(sides, path))
    check()
    size = max((sum(t.nbytes for t in s.tensors.values()) for s in sides), default=0)
    with (
        draft_of(out, size, check) as draft,
        tempfile.TemporaryDirectory(dir=draft, prefix=".", ignore_cleanup_errors=True) as folded,
    ):
        options = MergeOptions(lora_merge_cache=folded, write_model_card=False, quiet=True)
        try:
            run_merge(config, str(draft), options, config_source=json.dumps(content))
        except ArmaError:
            raise
        except Exception as error:  # whatever a method of mergekit raises ends this command, not the program
            raise RunError(f"{path}: mergekit's executor failed ({_first_line(error)}).") from error
        memo = memo or DigestMemo()
        inputs = {file: memo.digest(file) for side in sides for file in side.files}
        shutil.rmtree(folded)
        files = sorted(f for f in draft.rglob("*") if f.is_file() and not f.name.startswith("."))
        outputs = {f.relative_to(draft).as_posix(): (f.stat().st_size, sha256_of(f)) for f in files}
        lock = foreign_lock(content, path, sides, inputs, outputs)
        finish(lock, describe(lock, sides), draft)
    return lock


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
