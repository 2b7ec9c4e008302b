"""The scale of a run: what the losses of a candidate are worth, given those of base and fine-tuned.

It knows scores and the objective; no models, searchers or files.

    separation   (fine-tuned - base) / standard error of each task: what cannot tell the two apart cannot steer
    reward       objective of the losses, on the scale of the very items that were scored
    duel         the paired difference of two candidates' rewards on the same items, with its standard error
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.errors import RecipeError, RunError
from arma_mergekit.evals import REGULARIZER
from arma_mergekit.evals.base import Measured, Part, Split, paired
from arma_mergekit.objective import Bound, End, Objective, Reward, share

__all__ = ["Scale", "Scores", "Separation", "suite_of"]

Array = npt.NDArray[np.float64]
Scores = Mapping[str, Measured]  # task key `suite/task` to its scores

MIN_SEPARATION = 3.0
MIN_ITEMS = 8  # three standard errors of fewer say little
MOST_PARTS = 16


def suite_of(key: str) -> str:
    """`general` of `general/kl:prose`."""
    return key.partition("/")[0]


@dataclass(frozen=True)
class Separation:
    """How clearly a task tells base from fine-tuned: (fine-tuned - base) / standard error, on search items."""

    task: str
    base: float
    tuned: float
    sigmas: float
    items: int

    @classmethod
    def of(cls, task: str, base: Measured, tuned: Measured) -> Separation:
        """From the scores of the two ends, by their losses."""
        gap, error = paired(tuned, base)
        sigmas = abs(gap) / error if error > 0 else math.inf
        return cls(task, base.score, tuned.score, sigmas if gap else 0.0, len(base.ids))

    @property
    def clear(self) -> bool:
        """Whether the task can steer a search."""
        return self.sigmas >= MIN_SEPARATION and self.items >= MIN_ITEMS


class Scale:
    """Losses to rewards.

    ``ends``: scores of "base" and "finetuned" on the search items; ``splits`` and ``weights`` by task key; ``options``:
    keyword arguments of Objective, ``keep`` as Bounds; ``penalty``: weight of the regulariser's tasks, if any.
    RunError for a suite without a task that tells base from fine-tuned; ``keep_weak`` lets weak ones steer.
    """

    def __init__(
        self,
        ends: Mapping[str, Scores],
        splits: Mapping[str, Split],
        weights: Mapping[str, float],
        options: Mapping[str, Any],
        keep_weak: bool = False,
        penalty: float = 0.0,
    ) -> None:
        self.ends, self._splits, self._weights = ends, splits, weights
        measured = [key for key in ends["base"] if suite_of(key) != REGULARIZER]
        self.separation = [Separation.of(k, ends["base"][k], ends["finetuned"][k]) for k in measured]
        counted = [s.task for s in self.separation if s.clear or (keep_weak and s.sigmas > 0)]
        self._check_suites(counted)
        costing = [key for key in ends["base"] if suite_of(key) == REGULARIZER]
        self.steering = [*counted, *costing]
        self._suites: dict[str, dict[str, float]] = {}
        for key in counted:
            self._suites.setdefault(suite_of(key), {})[key] = weights[key]
        self._objectives: dict[Part | None, Objective] = {}
        self._options = {**options, "penalties": {key: penalty / self._gap(key) for key in costing}}
        if options.get("keep"):
            self._options["keep"] = {suite: self._least(suite, b) for suite, b in options["keep"].items()}

    @property
    def keep(self) -> Mapping[str, float]:
        """Least shares of the suites to keep."""
        return self._options.get("keep") or {}

    @property
    def parts(self) -> int:
        """Into how many parts every steering task can be cut, with at least 2 items each (1 of a regulariser's).

        A regulariser has no level to estimate, so its few texts need not cost a search its minibatches.
        """
        least = {key: 1 if key in self._options["penalties"] else 2 for key in self.steering}
        return max(1, min(MOST_PARTS, *(len(self._splits[key].search) // n for key, n in least.items())))

    def reward(
        self,
        losses: Mapping[str, float],
        part: Part | None = None,
        emphasis: Mapping[str, float] | None = None,
    ) -> Reward:
        """J of these mean losses of the steering tasks, on the scale of the part they were measured on."""
        if part not in self._objectives:
            self._objectives[part] = self._objective(part)
        objective = self._objectives[part]
        return (replace(objective, emphasis=emphasis) if emphasis else objective).reward(losses)

    def duel(
        self, ours: Scores, theirs: Scores, part: Part, emphasis: Mapping[str, float]
    ) -> tuple[float, float]:
        """J(ours) - J(theirs) on the items of a part, and its standard error (delta method, tasks independent)."""
        won, lost = (
            self.reward({k: m.mean_loss for k, m in side.items()}, part, emphasis) for side in (ours, theirs)
        )
        errors = [lost.slopes[key] * paired(ours[key], theirs[key])[1] for key in self.steering]
        return won.value - lost.value, float(np.linalg.norm(errors))

    def _objective(self, part: Part | None) -> Objective:
        """The objective on the scale of these items: ends and candidate share their items, and so their noise."""
        ends = {key: self._end(key, part) for tasks in self._suites.values() for key in tasks}
        return Objective(self._suites, ends, **self._options)

    def _end(self, key: str, part: Part | None) -> End:
        base, tuned = self.ends["base"][key], self.ends["finetuned"][key]
        better = base if base.mean_loss < tuned.mean_loss else tuned
        place = {item: k for k, item in enumerate(better.ids)}
        split = self._splits[key]
        chosen = [place[split.ids[i]] for i in split.part(part)]
        # the gap of all items (steady), the level of these items (its noise is the candidate's too, and cancels)
        level = float(better.loss[chosen].sum() / better.weight[chosen].sum())
        return End(math.exp(-level), End.of(base.mean_loss, tuned.mean_loss).gap)

    def _gap(self, key: str) -> float:
        gap = abs(self.ends["base"][key].mean_loss - self.ends["finetuned"][key].mean_loss)
        if gap == 0:
            raise RunError(f"{key} is the same for base and fine-tuned; leave the regularizer out.")
        return gap

    def _check_suites(self, steering: list[str]) -> None:
        mute = {suite_of(s.task) for s in self.separation} - {suite_of(key) for key in steering}
        if mute:
            table = "; ".join(f"{s.task} {s.sigmas:.1f} over {s.items} items" for s in self.separation)
            raise RunError(
                f"Suite {min(mute)} has no task that tells base from fine-tuned (at least {MIN_SEPARATION:g} standard "
                f"errors over {MIN_ITEMS} items; found: {table}). Add items or a task, leave the suite out of --eval, "
                "or set tune: {keep_weak: true}."
            )

    def _least(self, suite: str, bound: Bound) -> float:
        """The least share a bound stands for."""
        if bound.unit == "share":
            return bound.amount
        tasks = self._suites[suite]
        if bound.unit == "se":
            found = {s.task: s.sigmas for s in self.separation}
            errors = [weight / found[key] for key, weight in tasks.items()]
            return 1 - bound.amount * float(np.linalg.norm(errors)) / sum(tasks.values())
        if len(tasks) > 1:
            raise RecipeError(
                f"keep {suite}: {bound} needs a suite of one steering task, but it has {len(tasks)}."
            )
        (key,) = tasks
        better = min(self.ends[side][key].mean_loss for side in ("base", "finetuned"))
        return share(better + bound.amount, self._end(key, None))
