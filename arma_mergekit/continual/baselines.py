"""SFA, EMA, MagMax and EWC behind the interface of callback.py. They need no memory of past tasks.

    theta   the parameters now                 theta_0  as they were before the first task
    theta_p as they were when the task began   T        optimiser steps of the task

    SFA     theta = (1 - b) theta + b theta_p, every p T steps and at the end                  arXiv:2501.05559
    EMA     bar = d bar + (1 - d) theta after each step; bar is evaluated, theta trains on     arXiv:1312.6120 (Polyak)
    MagMax  theta_0 + per element the task vector of largest magnitude is evaluated,           arXiv:2407.06322, eq. 2
            theta trains on
    EWC     loss + l/2 sum F (theta - theta_p)^2, F = g F + mean over the task's examples of   arXiv:1612.00796, eq. 3;
            the squared gradient                                                               online: arXiv:1805.06370

Of SFA the first task is left alone: before it there is nothing to keep. Copies of the parameters in scope: SFA and EMA
one, MagMax and EWC two. Of an adapter, MagMax compares its factors, not their product.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arma_mergekit.continual.callback import Loss, MergingCallback, model_loss
from arma_mergekit.continual.settings import EMASettings, EWCSettings, Settings, SFASettings
from arma_mergekit.continual.weights import Copies, copies, pull
from arma_mergekit.errors import RunError

__all__ = ["EMACallback", "EWCCallback", "MagMaxCallback", "SFACallback"]


class SFACallback(MergingCallback):
    """Pull back toward the parameters that the task began with."""

    settings: SFASettings

    def __init__(self, settings: SFASettings | None = None, resume_from: Path | None = None) -> None:
        super().__init__(settings or SFASettings(), resume_from)

    def begin(self, weights: Copies) -> None:
        """Keep theta_p, but of the first task."""
        self.tensors = {"previous": copies(weights)} if self.facts["tasks"] else {}

    def step(self, weights: Copies, args: Any, state: Any, control: Any, live: Mapping[str, Any]) -> None:
        """Average at the end of each period."""
        period = max(1, round(self.settings.period * state.max_steps))
        if self.tensors and (state.global_step % period == 0 or state.global_step == state.max_steps):
            pull(weights, self.tensors["previous"], self.settings.back)


class EMACallback(MergingCallback):
    """Evaluate a running average of all tasks' steps."""

    settings: EMASettings

    def __init__(self, settings: EMASettings | None = None, resume_from: Path | None = None) -> None:
        super().__init__(settings or EMASettings(), resume_from)

    def begin(self, weights: Copies) -> None:
        """Start where the first task does."""
        self.tensors = self.tensors or {"average": copies(weights)}

    def step(self, weights: Copies, args: Any, state: Any, control: Any, live: Mapping[str, Any]) -> None:
        """Move the average."""
        pull(self.tensors["average"], weights, 1 - self.settings.decay)

    def averaged(self) -> Copies | None:
        """The average."""
        return self.tensors.get("average")


class MagMaxCallback(MergingCallback):
    """Evaluate the union of the largest changes any task made."""

    def __init__(self, settings: Settings | None = None, resume_from: Path | None = None) -> None:
        super().__init__(settings or Settings(), resume_from)

    def begin(self, weights: Copies) -> None:
        """Keep theta_0."""
        if not self.tensors:
            self.tensors = {"origin": copies(weights), "largest": copies(weights)}
            for vector in self.tensors["largest"].values():
                vector.zero_()

    @torch.no_grad()
    def end(self, weights: Copies, args: Any, state: Any, live: Mapping[str, Any]) -> None:
        """Take in the task's vector, theta - theta_0."""
        for name, origin in self.tensors["origin"].items():
            vector, largest = weights[name].detach() - origin, self.tensors["largest"][name]
            torch.where(vector.abs() > largest.abs(), vector, largest, out=largest)

    def averaged(self) -> Copies | None:
        """theta_0 + the largest."""
        if not self.tensors:
            return None
        return {
            name: origin + self.tensors["largest"][name] for name, origin in self.tensors["origin"].items()
        }


class EWCCallback(MergingCallback):
    """Hold parameters that past tasks depend on. The penalty's gradient is added after clipping."""

    settings: EWCSettings

    def __init__(
        self, settings: EWCSettings | None = None, loss: Loss = model_loss, resume_from: Path | None = None
    ) -> None:
        super().__init__(settings or EWCSettings(), resume_from)
        self.loss = loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Refuse float16, whose gradients are scaled."""
        if args.fp16:
            raise RunError("EWC adds to gradients, which float16 training scales; use bf16 or float32.")
        super().on_train_begin(args, state, control, **live)

    def begin(self, weights: Copies) -> None:
        """Keep theta_p; nothing is held before a task has ended."""
        if self.tensors:
            self.tensors["previous"] = copies(weights)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Add l F (theta - theta_p)."""
        for name, fisher in self.tensors.get("fisher", {}).items():
            weight = self.weights[name]
            if weight.grad is not None:
                weight.grad.addcmul_(
                    fisher, weight - self.tensors["previous"][name], value=self.settings.strength
                )

    def end(self, weights: Copies, args: Any, state: Any, live: Mapping[str, Any]) -> None:
        """F of the task, from its first examples, one at a time."""
        old = self.tensors.get("fisher")
        fisher = copies(weights) if old is None else old
        for kept in fisher.values():
            kept.mul_(0.0 if old is None else self.settings.decay)
        self._add_fisher(fisher, weights, live)
        self.tensors = {"fisher": fisher, "previous": copies(weights)}

    def _add_fisher(self, fisher: Copies, weights: Copies, live: Mapping[str, Any]) -> None:
        model, loader = live["model"], live["train_dataloader"]
        count = min(self.settings.examples, len(loader.dataset))
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        for i in range(count):
            model.zero_grad()
            batch = {k: v.to(device) for k, v in loader.collate_fn([loader.dataset[i]]).items()}
            self.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            for name, weight in weights.items():
                if weight.grad is not None:
                    fisher[name].addcmul_(weight.grad, weight.grad, value=1 / count)
        model.zero_grad()
        model.train(was_training)
