"""The course of a run: examples in, Trainer, one record of it (`finetune.json`), the result out.

    loss = mean over the trained-on tokens of a batch of -log p(token | what came before)

transformers' Trainer trains: AdamW, cosine decay after a warm-up of a tenth, gradient norm at most 1. What is here is
what it leaves open: what is refused, the record, resuming. Examples with nothing to learn are left out, and counted.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arma_mergekit import __version__
from arma_mergekit.checkpoint import Checkpoint, open_model
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.digest import sha256_of
from arma_mergekit.errors import DataError, RunError
from arma_mergekit.evals.sources import Record, read_records
from arma_mergekit.finetune.examples import Example, batch, encode
from arma_mergekit.finetune.kinds import Kind, make
from arma_mergekit.finetune.settings import Settings
from arma_mergekit.load import max_positions, open_tokenizer
from arma_mergekit.whole import write_whole

__all__ = ["RECORD", "finetune"]

RECORD = "finetune.json"
CHECKPOINTS = "checkpoints"  # removed at the end
Notify = Callable[[Mapping[str, Any]], None]


def finetune(settings: Settings, out: Path, notify: Notify = lambda _: None) -> dict[str, Any]:
    """Train into the directory ``out``, from where it stopped if it has begun; returns its `finetune.json`.

    ``out`` gets the adapter, or the whole model in the base's dtype. RunError if it holds a run of other settings,
    CheckpointError or DataError for what cannot be used.
    """
    settings = settings.complete()
    # of an adapter to be switched on and off, any kind will do; of others, those that can be folded
    base = open_model(settings.base.partition("+")[0] if settings.gate else settings.base)
    record = _record(settings, base)
    before = _earlier(out, record)
    if before is not None and before["result"] is not None:
        return before
    kind, tokenizer = make(settings, base), open_tokenizer(base.path)
    positions = max_positions(kind.model.config)
    length = min(settings.length, positions) if positions else settings.length
    examples = [encode(tokenizer, r, length) for r in _records(settings.data)]
    usable = [example for example in examples if example.loss_tokens]
    if not usable:
        raise DataError(f"{settings.data} has nothing to learn within {length} tokens; raise the length.")
    out.mkdir(parents=True, exist_ok=True)
    _write(out, record)
    facts = {**_counts(kind.model), **_sizes(examples, usable)}
    notify(facts)
    record["result"] = {**facts, **_train(settings, kind, usable, out, notify)}
    kind.model.config.use_cache = True
    kind.save(out, tokenizer)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    _write(out, record)
    return record


def _records(path: Path) -> list[Record]:
    if not path.is_file():
        raise DataError(f"No data file {path}; paths start at the current directory.")
    return read_records(path, ())


def _train(
    settings: Settings, kind: Kind, examples: Sequence[Example], out: Path, notify: Notify
) -> dict[str, Any]:
    """Loss at the start and the end, steps and seconds of this process."""
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    place = out / CHECKPOINTS
    per_epoch = -(-len(examples) // settings.batch)
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    kind.model.config.use_cache = False
    arguments = TrainingArguments(
        str(place), per_device_train_batch_size=settings.batch, max_steps=steps, learning_rate=settings.lr,
        lr_scheduler_type="cosine", warmup_steps=-(-steps // 10), weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=max(1, steps // 50), logging_first_step=True, save_steps=settings.save_every,
        save_total_limit=2, seed=settings.seed, data_seed=settings.seed, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, label_names=["labels"], logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = Trainer(
        kind.model, arguments, data_collator=batch, train_dataset=list(examples), optimizers=(kind.optimizer(), None)
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress(notify))
    last = get_last_checkpoint(str(place)) if place.is_dir() else None
    started, done = time.monotonic(), int(last.rpartition("-")[2]) if last else 0
    trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise RunError(
            f"The loss became {losses[-1]} in {out}; take a lower learning rate and another directory."
        )
    return {
        "steps": trainer.state.global_step, "resumed_at": done, "seconds": seconds,
        "seconds_per_step": seconds / max(1, trainer.state.global_step - done),
        "loss_first": losses[0], "loss_last": losses[-1],
    }  # fmt: skip


def _progress(notify: Notify) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        """Tells what the Trainer logs."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                notify({"step": state.global_step, "of": state.max_steps, "loss": logs["loss"]})

    return Progress()


def _counts(model: Any) -> dict[str, int]:
    everything = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in everything),
        "trainable": sum(p.numel() for p in everything if p.requires_grad),
    }


def _sizes(examples: Sequence[Example], usable: Sequence[Example]) -> dict[str, int]:
    return {
        "examples": len(usable),
        "left_out": len(examples) - len(usable),
        "cut": sum(example.cut for example in usable),
        "tokens": sum(len(example.tokens) for example in usable),
        "loss_tokens": sum(example.loss_tokens for example in usable),
    }


def _record(settings: Settings, base: Checkpoint) -> dict[str, Any]:
    """What `finetune.json` starts as: enough to tell whether a run may be resumed."""
    if not settings.data.is_file():
        raise DataError(f"No data file {settings.data}; paths start at the current directory.")
    return {
        "format": 1,
        "arma_mergekit": __version__,
        "settings": {**asdict(settings), "data": str(settings.data), "targets": list(settings.targets)},
        "data_sha256": sha256_of(settings.data),
        "base_tensors": len(base.tensors),
        "result": None,
    }


def _earlier(out: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the run in ``out``, if it is this one; RunError if it is another's."""
    if not (out / RECORD).is_file():
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty and holds no run of finetune; name another directory.")
        return None
    earlier = read_json(out / RECORD)
    flat = [{"data_sha256": r["data_sha256"], **r["settings"]} for r in (earlier, record)]
    for key, value in flat[1].items():
        if flat[0].get(key) != value:
            raise RunError(
                f"{out} holds a run with {key} {flat[0].get(key)!r}, not {value!r}; name another directory."
            )
    return earlier


def _write(out: Path, record: Mapping[str, Any]) -> None:
    write_whole({out / RECORD: json.dumps(record, indent=2) + "\n"})
