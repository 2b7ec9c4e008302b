"""AIMMerging as a callback of `transformers.Trainer` and whatever derives from it; nothing of theirs is patched.

    trainer = Trainer(..., callbacks=[AIMMergingCallback(memory)])

It knows a model's trainable parameters (all of them, or a PEFT adapter's), its optimiser and the replay memory; when to
merge it asks the controller. With theta_t the parameters after the last merge, theta_k those of now and theta' those
after M more steps on the memory, a merge is (arXiv:2509.17348, section 3.3)

    theta_{t+1} = theta_t + w_in (theta_k - theta_t) + w_out (theta' - theta_k)

One copy c of the parameters in scope is all that is kept beside the model, on their own device. It holds theta_t, and
before the replay takes theta_k in, so that afterwards one more average is the merge, exactly:

    c = theta_t + (w_in - w_out)/(1 - w_out) (theta_k - theta_t);     theta_{t+1} = c + w_out (theta' - c)

Switches, each back to the published behaviour with ``controller: published``:

    switch          default                                            published
    probe_mode      eval: h without dropout                            train
    probe_share     1/8 of a step's rows: h costs about 5 % of a step  1: as many rows as a step
    probe_rows      fixed within an interval, so that h moves only     random: another batch at each step
                    because the model did
    moments         damp: Adam's first moments times w_out, the share  keep: moments of a place that was left
                    of the last steps that the merge keeps
    replay_lr       None: the trainer's own; a number takes effect     the option has none

(Lookahead, arXiv:1907.08610, has the same choice for its inner moments: keep, interpolate, reset.) With
``budget_steps``, training and replay together take that many optimiser steps, and the schedule counts both.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from arma_mergekit.continual.controller import Controller, Replay
from arma_mergekit.continual.memory import Memory
from arma_mergekit.continual.settings import AIMSettings, ReplaySettings, Settings
from arma_mergekit.continual.weights import (
    Copies,
    copies,
    distance,
    load,
    overwrite,
    pull,
    save,
    scoped,
    swapped,
    trainable,
)
from arma_mergekit.errors import CheckpointError, RunError
from arma_mergekit.whole import write_whole

__all__ = ["AIMMergingCallback", "MergingCallback", "Rehearsal", "ReplayCallback"]

Batch: TypeAlias = Mapping[str, Any]
Loss: TypeAlias = Callable[[Any, Batch], Tensor]
Collate: TypeAlias = Callable[[Sequence[Any]], Batch]

STATE, TENSORS = "merging.json", "merging.safetensors"
IGNORED = -100  # label of a token that does not count


class MergingCallback(TrainerCallback):  # type: ignore[misc]
    """What the methods share: parameters in scope, named copies of them, and state that survives a kill.

    ``tensors``: kind of copy to name to tensor. A subclass fills them in `begin` (once per task), acts in `step` and
    `end`, and has what else changes in `facts`. ``resume_from``: the checkpoint given to `train`, if it is not in the
    trainer's output_dir.
    """

    def __init__(self, settings: Settings, resume_from: Path | None = None) -> None:
        self.settings, self.resume_from = settings, resume_from
        self.tensors: dict[str, Copies] = {}
        self.facts: dict[str, Any] = {"tasks": 0}
        self.seconds = self.replay_seconds = 0.0  # spent here, and of replays, by this process

    # what a subclass does

    def begin(self, weights: Copies) -> None:
        """A task begins."""

    def step(self, weights: Copies, args: Any, state: Any, control: Any, live: Mapping[str, Any]) -> None:
        """After an optimiser step."""

    def end(self, weights: Copies, args: Any, state: Any, live: Mapping[str, Any]) -> None:
        """A task is over."""

    def averaged(self) -> Copies | None:
        """What is evaluated in place of the parameters, if not they themselves."""
        return None

    # what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Refuse what cannot work; begin a task, or go on inside one."""
        check_supported(args)
        self.weights = scoped(trainable(live["model"]), self.settings.scope)
        if state.global_step:
            self.load(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        else:
            self.begin(self.weights)
        check_copies(self.tensors, self.weights)

    def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Act after an optimiser step."""
        started = time.perf_counter()
        self.step(self.weights, args, state, control, live)
        self.seconds += time.perf_counter() - started

    def on_save(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Put the state beside the trainer's."""
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """End the task."""
        self.end(self.weights, args, state, live)
        self.facts["tasks"] += 1

    def save(self, directory: Path) -> None:
        """Write tensors and facts; the facts last, so that a state without them is no state."""
        save(
            directory / TENSORS,
            {f"{kind}/{name}": t for kind, kept in self.tensors.items() for name, t in kept.items()},
        )
        write_whole({directory / STATE: json.dumps(self.facts, allow_nan=False)})

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote; CheckpointError if it is not there."""
        try:
            self.facts = json.loads((directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{directory} has no state of the merging callback ({STATE}); resume from an older checkpoint, or give "
                "`resume_from`."
            ) from error
        self.tensors = {}
        for key, tensor in load(directory / TENSORS).items():
            kind, _, name = key.partition("/")
            self.tensors.setdefault(kind, {})[name] = tensor

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        """Within the block the model is what this method would hand over."""
        values = self.averaged()
        if values is None:
            yield
            return
        with swapped(trainable(model), values):
            yield


def check_supported(args: Any) -> None:
    """RunError for what would be averaged wrongly: sharded parameters, several processes, a checkpoint put back."""
    if getattr(args, "deepspeed", None):
        raise RunError(
            "DeepSpeed shards parameters or their optimiser's state, which cannot be merged here; train without."
        )
    if getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise RunError("FSDP shards parameters, which cannot be merged here; train without.")
    if args.world_size > 1:
        raise RunError(f"Merging while training runs in one process, but got {args.world_size}; start one.")
    if getattr(args, "load_best_model_at_end", False):
        raise RunError(
            "load_best_model_at_end puts an older model back before the last merge, which would mix the two; train "
            "without."
        )


def check_copies(tensors: Mapping[str, Copies], weights: Copies) -> None:
    """Bring copies to their parameters' devices; CheckpointError if they are of another model or scope."""
    for kind, kept in tensors.items():
        if kept.keys() != weights.keys():
            odd = sorted(kept.keys() ^ weights.keys())[0]
            raise CheckpointError(
                f"The saved {kind} does not fit the trainable parameters ({odd}); resume the same run."
            )
        for name, tensor in kept.items():
            kept[name] = tensor.to(weights[name].device)


def model_loss(model: Any, batch: Batch) -> Tensor:
    """The loss that a transformers model returns for a batch with labels: their mean."""
    loss: Tensor = model(**batch).loss
    return loss


class Rehearsal:
    """Losses and optimiser steps on the memory.

    ``collate``: makes a batch of records (None: the trainer's data collator, so records are features); ``loss``: of a
    model on a batch, as a mean over its labels.
    """

    def __init__(self, memory: Memory, collate: Collate | None = None, loss: Loss = model_loss) -> None:
        self.memory, self.collate, self.loss = memory, collate, loss

    def _prepared(self, records: Sequence[Any], live: Mapping[str, Any]) -> Batch:
        collate = self.collate or live["train_dataloader"].collate_fn
        device = next(live["model"].parameters()).device
        return {key: value.to(device) for key, value in collate(records).items()}

    @torch.no_grad()
    def probe(self, records: Sequence[Any], mode: str, live: Mapping[str, Any]) -> float:
        """h: the loss on these records; ``mode``: eval or train."""
        model = live["model"]
        was_training = model.training
        model.train(mode == "train")
        found = float(self.loss(model, self._prepared(records, live)))
        model.train(was_training)
        return found

    def step(
        self, records: Sequence[Any], size: int, args: Any, lr: float | None, live: Mapping[str, Any]
    ) -> None:
        """One optimiser step on these records, ``size`` at a time; a mean over all their labels, as the trainer's."""
        model, optimizer = live["model"], live["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        batches = [self._prepared(records[i : i + size], live) for i in range(0, len(records), size)]
        counts = [_labels(batch) for batch in batches]
        model.train()
        with learning_rate(optimizer, lr):
            for batch, count in zip(batches, counts, strict=True):
                loss = self.loss(model, batch) * (count / sum(counts))
                (loss if scaler is None else scaler.scale(loss)).backward()
            if args.max_grad_norm:
                if scaler is not None:
                    scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
                torch.nn.utils.clip_grad_norm_(
                    [p for p in model.parameters() if p.grad is not None], args.max_grad_norm
                )
            optimizer.step()
        optimizer.zero_grad()


def _labels(batch: Batch) -> int:
    labels = batch.get("labels")
    return 1 if labels is None else max(1, int((labels != IGNORED).sum()))


@contextmanager
def learning_rate(optimizer: Any, lr: float | None) -> Iterator[None]:
    """Within the block every group has this learning rate (None: its own)."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    try:
        yield
    finally:
        for group, own in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = own


class RehearsingCallback(MergingCallback):
    """A method that takes steps on the memory. ``budget_steps``: optimiser steps of a task, these included."""

    settings: Any

    def __init__(
        self, settings: Settings, memory: Memory, collate: Collate | None = None, loss: Loss = model_loss,
        budget_steps: int | None = None, resume_from: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__(settings, resume_from)
        self.rehearsal, self.budget = Rehearsal(memory, collate, loss), budget_steps
        self.facts |= {"draws": 0, "replayed": 0, "merges": []}

    def begin(self, weights: Copies) -> None:
        """Count anew."""
        self.facts |= {"replayed": 0, "merges": []}

    def draw(self, rows: int) -> list[dict[str, Any]]:
        """Other records at every call."""
        self.facts["draws"] += 1
        return self.rehearsal.memory.batch(self.facts["draws"], rows)

    def left(self, args: Any, state: Any) -> float:
        """Optimiser steps left in this task."""
        if self.budget is None:
            return float(state.max_steps - state.global_step)
        return float(self.budget - state.global_step - self.facts["replayed"])

    def replay(self, steps: int, args: Any, state: Any, live: Mapping[str, Any]) -> None:
        """Optimiser steps on the memory, within the budget; with one, the schedule counts them."""
        started, size = time.perf_counter(), args.per_device_train_batch_size
        for _ in range(steps if self.budget is None else min(steps, int(self.left(args, state)))):
            records = self.draw(size * args.gradient_accumulation_steps)
            self.rehearsal.step(records, size, args, self.settings.replay_lr, live)
            self.facts["replayed"] += 1
            if self.budget is not None:
                live["lr_scheduler"].step()
        spent = time.perf_counter() - started
        self.replay_seconds += spent
        self.seconds -= spent

    def stop_at_budget(self, args: Any, state: Any, control: Any) -> None:
        """End the task once the budget is used up."""
        if self.left(args, state) <= 0:
            control.should_training_stop = True


class ReplayCallback(RehearsingCallback):
    """Plain replay, no merging."""

    def __init__(self, memory: Memory, settings: ReplaySettings | None = None, **more: Any) -> None:
        super().__init__(settings or ReplaySettings(), memory, **more)

    def step(self, weights: Copies, args: Any, state: Any, control: Any, live: Mapping[str, Any]) -> None:
        """Replay once in a while."""
        if self.rehearsal.memory and state.global_step % self.settings.every == 0:
            self.replay(1, args, state, live)
        self.stop_at_budget(args, state, control)


class AIMMergingCallback(RehearsingCallback):
    """Merge while training; see the module. The first task, whose memory is empty, is trained as it is.

    ``memory``: records of past tasks; `collate`, `loss`: see `Rehearsal`. `facts["merges"]` tells every merge of the
    task: step, interval, weights, flag, signal.
    """

    def __init__(self, memory: Memory, settings: AIMSettings | None = None, **more: Any) -> None:
        super().__init__(settings or AIMSettings(), memory, **more)
        self.controller = Controller(self.settings)

    def begin(self, weights: Copies) -> None:
        """Keep theta_t, and start the recurrences."""
        super().begin(weights)
        self.controller = Controller(self.settings)
        self.tensors = {"anchor": copies(weights)} if self.rehearsal.memory else {}

    def save(self, directory: Path) -> None:
        """The controller's state too."""
        self.facts["controller"] = self.controller.to_json()
        super().save(directory)

    def load(self, directory: Path) -> None:
        """The controller's state too."""
        super().load(directory)
        self.controller = Controller(self.settings, self.facts["controller"])

    def step(self, weights: Copies, args: Any, state: Any, control: Any, live: Mapping[str, Any]) -> None:
        """Tell the controller the loss on the memory, and do what it says."""
        if self.tensors:
            answer = self.controller.after_step(self._signal(args, live))
            # without a step left to replay, a merge would only take back what was learned
            if isinstance(answer, Replay) and (self.budget is None or self.left(args, state) > 0):
                self._merge(answer.steps, weights, args, state, live)
            last = self.controller.last_replay() if self.budget is not None else 0
            if self.left(args, state) <= last or control.should_training_stop:
                self.end(weights, args, state, live)
        self.stop_at_budget(args, state, control)

    def end(self, weights: Copies, args: Any, state: Any, live: Mapping[str, Any]) -> None:
        """Merge what the last interval brought; the replay is what is left of the budget."""
        if not self.tensors or (self.budget is not None and self.left(args, state) <= 0):
            return
        answer = self.controller.at_end()
        if isinstance(answer, Replay):
            self._merge(answer.steps, weights, args, state, live)

    def _signal(self, args: Any, live: Mapping[str, Any]) -> float | None:
        """h; where a share of a step's rows is less than one, measured at every so-manieth step of an interval."""
        rows = self.settings.probe_share * args.per_device_train_batch_size * args.gradient_accumulation_steps
        since = self.controller.state.step - self.controller.state.merged_at
        if since % max(1, round(1 / rows)):
            return None
        if not since or self.settings.probe_rows == "random":
            self.facts["draws"] += 1
            self.facts["probe"] = self.facts["draws"]
        records = self.rehearsal.memory.batch(self.facts["probe"], max(1, round(rows)))
        return self.rehearsal.probe(records, self.settings.probe_mode, live)

    def _merge(self, steps: int, weights: Copies, args: Any, state: Any, live: Mapping[str, Any]) -> None:
        anchor, before = self.tensors["anchor"], self.facts["replayed"]
        merge = self.controller.merge(distance(anchor, weights))
        pull(anchor, weights, (merge.inner - merge.outer) / (1 - merge.outer))
        self.replay(steps, args, state, live)
        pull(anchor, weights, merge.outer)
        overwrite(weights, anchor)
        if self.settings.moments != "keep":
            scale_moments(live["optimizer"], weights, merge.outer if self.settings.moments == "damp" else 0.0)
        self.facts["merges"].append(asdict(merge) | {"replayed": self.facts["replayed"] - before})


@torch.no_grad()
def scale_moments(optimizer: Any, weights: Copies, factor: float) -> None:
    """First moments (Adam's, or SGD's momentum) of these parameters, times ``factor``; second moments stay."""
    for weight in weights.values():
        for name in ("exp_avg", "momentum_buffer"):
            moment = optimizer.state.get(weight, {}).get(name)
            if moment is not None:
                moment.mul_(factor)
