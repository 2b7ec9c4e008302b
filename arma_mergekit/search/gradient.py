"""Projected Adam on exact gradients of rotating minibatches, stopped early by items it takes no gradient of.

    symbol  meaning                                                             shape
    v       the values; starts at the start                                     (K,)
    g       dJ/dv on a part of the search data, another one each step            (K,)
    m, q    Adam's running means of g and g^2 (arXiv 1412.6980)                  (K,)
    eta_t   step length: constant, then falling to a tenth over the last half   ()

    m <- b1 m + (1 - b1) g      q <- b2 q + (1 - b2) g^2
    v <- clip(v + eta_t * (m / (1 - b1^t)) / (sqrt(q / (1 - b2^t)) + eps), low, high)

Early stopping: a quarter of the search data is held aside, the rest gives gradients in turn. After every turn the
average of its iterates (which averages the minibatch noise away) is looked at: scored on what is held aside. A walk
ends when its steps are paid for, or after some looks in a row without a new best. The best of all looks is then scored
in full. Data that cannot be cut in four serves for both, and looks are full scores.

A failed trial halves the step length and goes back to the last point that worked. The budget holds one walk, or up to
three when it is large, the second and third from all ones (the fine-tuned model) and all zeros (the base). With what is
left of it, and for a caller who goes on asking after it, there are further walks at half the step length from the best
point known, until one gains less than a hundredth of what was gained so far: then it has no further question. The seed
is not used.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

import numpy as np

from arma_mergekit.search.base import Array, Problem, Query, Trial

__all__ = ["GradientSearcher"]

RATE = 0.08  # eta
BETAS = (0.8, 0.99)  # b1, b2
EPSILON = 1e-12
SHORT_WALK, LARGEST_RATE = 1.0, 0.25  # with few steps each is longer, so that together they could go this far
MOST_PARTS = 8
ASIDE = (3, 4)  # the part held aside; of 8 parts it is those numbered 3 and 7
WALK = 70  # steps that a start of its own is worth
LONGEST = 100  # steps of a walk: longer ones gained nothing on any test problem
LEAST_GAIN = 0.01  # of a further walk, as a share of all gains
OTHER_STARTS = (1.0, 0.0)
RECOVERY = 1.2  # growth of a halved step with every success, up to what it was
PATIENCE = 3  # looks without gain, or failures at a start, before a walk is given up
LOOKING = 0.15  # looks cost at most this share of what the steps cost

Dialogue = Generator[Query, Trial, None]


class GradientSearcher:
    """The walks as one conversation: each ``yield`` asks a query and receives its trial."""

    concurrent: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        n = 1 if problem.parts < ASIDE[1] else ASIDE[1] if problem.parts < MOST_PARTS else MOST_PARTS
        self._aside = ASIDE if n > 1 else None
        self._parts = [(i, n) if n > 1 else None for i in range(n) if n == 1 or i % ASIDE[1] != ASIDE[0]]
        self._step = Query((), gradient=True, part=self._parts[0]).cost
        self._look = Query((), part=self._aside).cost
        self._final = 0.0 if self._aside is None else Query(()).cost
        self._every = max(len(self._parts), int(np.ceil(self._look / (LOOKING * self._step))))
        self._turn = 0  # of the parts
        self._spent = 0.0
        self._best: tuple[float, Array] | None = None  # of all looks
        self._first: float | None = None  # reward of all looks
        self._dialogue = self._walks()
        self._query: Query | None = next(self._dialogue)

    def ask(self) -> Query | None:
        """The next gradient or score, the same one again until it is told; None after a walk without gain."""
        return self._query

    def tell(self, trial: Trial) -> None:
        """Carry on with the answer."""
        self._spent += trial.paid
        try:
            self._query = self._dialogue.send(trial)
        except StopIteration:
            self._query = None

    # ------------------------------------------------------------------ the conversation

    def _walks(self) -> Dialogue:
        """The planned starts share the budget; later walks refine the best point while that gains something."""
        problem = self._problem
        count = int(np.clip(self._steps(problem.budget) // WALK, 1, 1 + len(OTHER_STARTS)))
        planned = self._steps(problem.budget / count)
        others = [np.full(len(problem.names), value) for value in OTHER_STARTS]
        for start in [problem.start, *others][:count]:
            yield from self._walk(start, planned, RATE)
        while True:
            before, left = self._best, self._steps(problem.budget - self._spent)
            start = problem.start if before is None else before[1]
            yield from self._walk(start, left if left >= self._every else planned, RATE / 2)
            if before is not None and not self._gained(before[0]):
                return

    def _gained(self, before: float) -> bool:
        """Whether the best look rose noticeably above ``before``."""
        best = before if self._best is None else self._best[0]
        all_gains = best - (before if self._first is None else self._first)
        return best - before >= LEAST_GAIN * abs(all_gains) and best > before

    def _steps(self, units: float) -> int:
        """Steps of a walk that ``units`` full evaluations pay for, its looks and its full score included."""
        each = self._step + self._look / self._every
        return max(0, int((units - self._look - self._final) / each + 1e-9))

    def _walk(self, start: Array, steps: int, rate: float) -> Dialogue:
        """Steps from ``start`` with a look after every few; then the best point in full, if it is a new one."""
        steps = min(steps, LONGEST)
        rate = largest = max(rate, min(SHORT_WALK / max(steps, 1), LARGEST_RATE))
        v = good = self._clip(start)
        adam, path, failed, idle, known = Adam(len(v)), list[Array](), 0, 0, self._best
        best = (yield from self._look_at(v)) if steps else None
        for t in range(steps):
            trial = yield from self._slope(v)
            if trial.reward is None or trial.gradient is None or not np.all(np.isfinite(trial.gradient)):
                failed += 1
                v, rate = (v + good) / 2, rate / 2
                if not path and failed == PATIENCE:
                    break
                continue
            path.append(v)
            good, rate = v, min(largest, rate * RECOVERY)
            v = self._clip(v + rate * decay(t / steps) * adam.step(np.array(trial.gradient)))
            if len(path) % self._every == 0 or t == steps - 1:
                reward = yield from self._look_at(self._clip(np.mean([*path, v][-self._every :], axis=0)))
                idle += 1
                if reward is not None and (best is None or reward > best):
                    best, idle = reward, 0
                if idle == PATIENCE:
                    break
        if self._aside is not None and self._best is not None and self._best is not known:
            yield Query(self._problem.clip(self._best[1]))
        elif self._best is None:
            yield Query(self._problem.clip(start))

    def _slope(self, v: Array) -> Generator[Query, Trial, Trial]:
        """Gradient on the next part of the data."""
        part = self._parts[self._turn % len(self._parts)]
        self._turn += 1
        return (yield Query(self._problem.clip(v), gradient=True, part=part))

    def _look_at(self, v: Array) -> Generator[Query, Trial, float | None]:
        """Score on the items held aside, remembered if it is the best."""
        trial = yield Query(self._problem.clip(v), part=self._aside)
        if trial.reward is not None and not trial.estimated:
            self._first = trial.reward if self._first is None else self._first
            if self._best is None or trial.reward > self._best[0]:
                self._best = (trial.reward, v)
        return trial.reward

    def _clip(self, v: Array) -> Array:
        return np.array(self._problem.clip(v))


class Adam:
    """Direction of the next step (K,): about 1 per coordinate where gradients agree, less where not."""

    def __init__(self, size: int) -> None:
        self._m, self._q, self._t = np.zeros(size), np.zeros(size), 0

    def step(self, g: Array) -> Array:
        """Take in a gradient."""
        (b1, b2), self._t = BETAS, self._t + 1
        self._m = b1 * self._m + (1 - b1) * g
        self._q = b2 * self._q + (1 - b2) * g**2
        direction: Array = self._m / (1 - b1**self._t) / (np.sqrt(self._q / (1 - b2**self._t)) + EPSILON)
        return direction


def decay(progress: float) -> float:
    """Relative step length at ``progress`` 0 to 1: flat, then falling to a tenth over the last half."""
    return min(1.0, 1.9 - 1.8 * progress)
