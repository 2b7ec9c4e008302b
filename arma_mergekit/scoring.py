"""Scores points: live model + suites + objective -> reward, slope, cost. It knows no searchers and no files.

role       items of each task
search     what searchers see; minibatches are parts of it
held back  fixed by the items' ids; looked at once per finished candidate, for the verdict
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.errors import RunError
from arma_mergekit.evals.base import Measured, Task, held_back, parts
from arma_mergekit.live import LiveModel
from arma_mergekit.objective import End, Objective, Reward
from arma_mergekit.search.base import Query
from arma_mergekit.space import Space

__all__ = ["DECIMALS", "Scored", "Scorer", "Separation"]

Array = npt.NDArray[np.float64]

DECIMALS = 4  # of an alpha: what is scored is what the exported recipe says
MIN_SEPARATION = 3.0
MIN_ITEMS = 8  # three standard errors of fewer say little


@dataclass(frozen=True)
class Separation:
    """How clearly a task tells base from fine-tuned: (fine-tuned - base) / standard error, on search items."""

    task: str
    base: float
    tuned: float
    sigmas: float
    items: int

    @property
    def clear(self) -> bool:
        """Whether the task can steer a search."""
        return self.sigmas >= MIN_SEPARATION and self.items >= MIN_ITEMS


@dataclass(frozen=True)
class Scored:
    """Reward of a point, dJ/dvalues if asked, each task's scores, forward tokens (a backward pass counts double)."""

    reward: Reward
    gradient: Array | None
    measured: Mapping[str, Measured]
    tokens: int


class Scorer:
    """Scores points of any space over ``live``. ``suites``: name to tasks; those not ``watch``ed steer."""

    def __init__(self, live: LiveModel, suites: Mapping[str, Sequence[Task]], holdout: float) -> None:
        self.live = live
        self.tasks = {f"{suite}/{task.name}": task for suite, tasks in suites.items() for task in tasks}
        self.steering = [key for key, task in self.tasks.items() if not task.watch]
        self.items = {key: held_back(task.ids, holdout) for key, task in self.tasks.items()}
        self._check_items()
        live.set_all(0.0)
        for task in self.tasks.values():
            task.prepare(live)
        self._objectives: dict[tuple[int, int] | None, Objective] = {}
        self.objective_options: dict[str, Any] = {}

    def _check_items(self) -> None:
        for key, (search, kept) in self.items.items():
            if len(search) < 2 or len(kept) < 2:
                raise RunError(
                    f"{key} has {len(search)} items to search on and {len(kept)} held back; "
                    "it needs at least 2 of each."
                )

    def measure(
        self, keys: Sequence[str], part: tuple[int, int] | None = None, held: bool = False
    ) -> dict[str, Measured]:
        """Score the live model as it is on these tasks."""
        return {key: self.tasks[key].measure(self.live, self._select(key, part, held)) for key in keys}

    def measure_ends(self) -> dict[str, dict[str, Measured]]:
        """Base and fine-tuned on the search items."""
        ends = {}
        for name, alpha in (("base", 0.0), ("finetuned", 1.0)):
            self.live.set_all(alpha)
            ends[name] = self.measure(self.steering)
        return ends

    def use_ends(
        self, ends: Mapping[str, Mapping[str, Measured]], keep_weak: bool = False
    ) -> list[Separation]:
        """Take the scale from the ends; tasks that cannot tell base from fine-tuned stop steering (unless kept)."""
        self._ends = ends
        found = [separation(key, ends["base"][key], ends["finetuned"][key]) for key in self.steering]
        self.steering = [s.task for s in found if s.clear or (keep_weak and s.sigmas > 0)]
        mute = {key.partition("/")[0] for key in self.tasks} - {
            key.partition("/")[0] for key in self.steering
        }
        if mute:
            table = "; ".join(f"{s.task} {s.sigmas:.1f} over {s.items} items" for s in found)
            raise RunError(
                f"Suite {min(mute)} has no task that tells base from fine-tuned (at least {MIN_SEPARATION:g} standard "
                f"errors over {MIN_ITEMS} items; found: {table}). Add items or a task, leave the suite out of --eval, "
                "or set tune: {keep_weak: true}."
            )
        return found

    def objective(self, part: tuple[int, int] | None = None) -> Objective:
        """The objective on the scale of these items: ends and candidate share their items, and so their noise."""
        if part not in self._objectives:
            self._objectives[part] = self._objective(part)
        return self._objectives[part]

    def _objective(self, part: tuple[int, int] | None) -> Objective:
        suites: dict[str, dict[str, float]] = {}
        ends = {}
        for key in self.steering:
            suites.setdefault(key.partition("/")[0], {})[key] = self.tasks[key].weight
            base, tuned = self._ends["base"][key], self._ends["finetuned"][key]
            better = base if base.mean_loss < tuned.mean_loss else tuned
            chosen = self._positions(key, part)
            # the gap of all items (steady), the level of these items (its noise is the candidate's too, and cancels)
            level = float(better.loss[chosen].sum() / better.weight[chosen].sum())
            ends[key] = End(math.exp(-level), End.of(base.mean_loss, tuned.mean_loss).gap)
        return Objective(suites, ends, **self.objective_options)

    def score(self, space: Space, query: Query) -> Scored:
        """Score one point; see `Query` for what can be asked."""
        self.live.set(np.round(space.alphas(query.values), DECIMALS))
        if not query.gradient:
            measured = self.measure(self.steering, query.part)
            reward = self.objective(query.part).reward({k: m.mean_loss for k, m in measured.items()})
            return Scored(reward, None, measured, sum(m.tokens for m in measured.values()))
        measured, slopes = {}, {}
        for key in self.steering:
            with self.live.differentiable() as gradient:
                items = self._select(key, query.part)
                measured[key] = self.tasks[key].measure(
                    self.live, items, backward=lambda loss: loss.backward()
                )
                slopes[key] = gradient()
        reward = self.objective(query.part).reward({k: m.mean_loss for k, m in measured.items()})
        by_alpha = sum(reward.slopes[key] * slopes[key] for key in self.steering)
        tokens = 3 * sum(m.tokens for m in measured.values())
        return Scored(reward, space.pullback(query.values, by_alpha), measured, tokens)

    def _select(self, key: str, part: tuple[int, int] | None = None, held: bool = False) -> list[int]:
        search, kept = self.items[key]
        if held:
            return kept
        return search if part is None else parts(self.tasks[key].ids, search, part[1])[part[0]]

    def _positions(self, key: str, part: tuple[int, int] | None) -> list[int]:
        """Where the part's items stand within the search items."""
        place = {item: k for k, item in enumerate(self.items[key][0])}
        return [place[item] for item in self._select(key, part)]

    @property
    def parts(self) -> int:
        """Into how many parts every steering task can be cut, with at least 2 items each; at most 16."""
        return max(1, min(16, *(len(self.items[key][0]) // 2 for key in self.steering)))


def separation(key: str, base: Measured, tuned: Measured) -> Separation:
    """|loss(ft) - loss(base)| over the standard error of their paired difference."""
    difference = Measured(base.ids, tuned.loss - base.loss, tuned.loss - base.loss, base.weight, 0)
    error = difference.loss_stderr
    sigmas = abs(difference.mean_loss) / error if error > 0 else float("inf")
    return Separation(key, base.score, tuned.score, sigmas if difference.mean_loss else 0.0, len(base.ids))
