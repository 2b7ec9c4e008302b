"""Projected Adam on exact gradients of rotating minibatches, then full scores of a few candidates.

    symbol  meaning                                                             shape
    v       the values; starts at the start                                     (K,)
    g       dJ/dv on part t mod n of the search data                             (K,)
    m, q    Adam's running means of g and g^2 (arXiv 1412.6980)                  (K,)
    eta_t   step length: constant, then falling to a tenth over the last half   ()

    m <- b1 m + (1 - b1) g      q <- b2 q + (1 - b2) g^2
    v <- clip(v + eta_t * (m / (1 - b1^t)) / (sqrt(q / (1 - b2^t)) + eps), low, high)

Steps are paid for from the budget (a gradient on one part of n costs 3 / n), after a reserve for full
scores, on which alone the best is picked: the start and the middle of a long run, the average of the last
quarter of the iterates (which averages the minibatch noise away) and the last iterate. A failed trial halves
the step length and goes back to the last point that worked; a full score in the middle that is worse than
the start's goes back there.

The budget holds one round of steps, or up to three when it is large, the second and third from all ones (the
fine-tuned model) and all zeros (the base). With what is left of it, and for a caller who goes on asking after it, there
are further rounds from the best point known, until one gains less than a hundredth of what was gained so far: then
it has no further question. The seed is not used.
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
MOST_PARTS = 8  # n
GRADIENT_COST = Query((), gradient=True).cost
ROUND = 70  # steps that a start of its own is worth
LONGEST = 100  # steps of a round: longer ones gained nothing on any test problem
SHORTEST = 4.0  # full evaluations that are worth a round
LEAST_GAIN = 0.01  # of a further round, as a share of all gains
OTHER_STARTS = (1.0, 0.0)
TAIL = 0.25  # share of the iterates that are averaged
RECOVERY = 1.2  # growth of a halved step with every success, up to what it was
FULL_SCORES = {4: 24, 2: 4, 1: 0}  # full scores of a round -> fewest steps that warrant them
PATIENCE = 3  # failures at a start before it is given up

Dialogue = Generator[Query, Trial, None]


class GradientSearcher:
    """The rounds as one conversation: each ``yield`` asks a query and receives its trial."""

    concurrent: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._parts = max(1, min(problem.parts, MOST_PARTS))
        self._spent = 0.0
        self._best: tuple[float, Array] | None = None  # among full scores
        self._first: float | None = None  # reward of all
        self._turn = 0  # of the parts
        self._dialogue = self._rounds()
        self._query: Query | None = next(self._dialogue)

    def ask(self) -> Query | None:
        """The next gradient or full score, the same one again until it is told; None after a round without gain."""
        return self._query

    def tell(self, trial: Trial) -> None:
        """Carry on with the answer."""
        self._spent += trial.paid
        if self._first is None:
            self._first = trial.reward
        try:
            self._query = self._dialogue.send(trial)
        except StopIteration:
            self._query = None

    # ------------------------------------------------------------------ the conversation

    def _rounds(self) -> Dialogue:
        """The planned starts share the budget; later rounds refine the best point while that gains something."""
        problem = self._problem
        count = int(np.clip(self._plan(problem.budget)[0] // ROUND, 1, 1 + len(OTHER_STARTS)))
        longest = max(FULL_SCORES) + LONGEST * GRADIENT_COST / self._parts
        units = min(problem.budget / count, longest)
        others = [np.full(len(problem.names), value) for value in OTHER_STARTS]
        for start in [problem.start, *others][:count]:
            yield from self._round(start, units, RATE)
        while True:
            before, left = self._best, problem.budget - self._spent
            start = problem.start if before is None else before[1]
            yield from self._round(start, min(units, left) if left >= SHORTEST else units, RATE / 2)
            if before is not None and not self._gained(before[0]):
                return

    def _gained(self, before: float) -> bool:
        """Whether the best full score rose noticeably above ``before``."""
        best = before if self._best is None else self._best[0]
        all_gains = best - (before if self._first is None else self._first)
        return best - before >= LEAST_GAIN * abs(all_gains) and best > before

    def _round(self, start: Array, units: float, rate: float) -> Dialogue:
        """Steps from ``start``, then full scores; costs at most ``units`` full evaluations."""
        steps, scores = self._plan(units)
        rate = largest = max(rate, min(SHORT_WALK / max(steps, 1), LARGEST_RATE))
        v = good = self._clip(start)
        adam, path, failed = Adam(len(v)), list[Array](), 0
        before = (yield from self._score(v)) if scores > 2 else None
        for t in range(steps):
            if scores > 2 and t == steps // 2 and (yield from self._lost(v, before)):
                v = good = self._clip(start)
                adam, path = Adam(len(v)), []
                rate = largest = largest / 2
            trial = yield from self._slope(v)
            if trial.reward is None or trial.gradient is None or not np.all(np.isfinite(trial.gradient)):
                failed += 1
                v, rate = (v + good) / 2, rate / 2
                if not path and failed == PATIENCE:
                    break
            else:
                path.append(v)
                good, rate = v, min(largest, rate * RECOVERY)
                v = self._clip(v + rate * decay(t / steps) * adam.step(np.array(trial.gradient)))
        if scores > 1 and path:
            yield from self._score(v)
        tail = [*path, v][-max(1, int(TAIL * len(path))) :]
        yield from self._score(self._clip(np.mean(tail, axis=0)))

    def _plan(self, units: float) -> tuple[int, int]:
        """Gradient steps and full scores that ``units`` full evaluations pay for."""
        for scores, fewest in FULL_SCORES.items():
            steps = int((units - scores) * self._parts / GRADIENT_COST + 1e-9)
            if steps >= fewest:
                return steps, scores
        return 0, 1

    def _lost(self, v: Array, before: float | None) -> Generator[Query, Trial, bool]:
        """Whether the full score of ``v`` is worse than ``before``, which is None where that is not known."""
        reward = yield from self._score(v)
        return before is not None and (reward is None or reward < before)

    def _slope(self, v: Array) -> Generator[Query, Trial, Trial]:
        """Gradient on the next part of the data; on all of it if it has no parts."""
        part = (self._turn % self._parts, self._parts) if self._parts > 1 else None
        self._turn += 1
        return (yield Query(self._problem.clip(v), gradient=True, part=part))

    def _score(self, v: Array) -> Generator[Query, Trial, float | None]:
        """Full score, remembered if it is the best and no estimate."""
        trial = yield Query(self._problem.clip(v))
        if trial.full and trial.reward is not None and (self._best is None or trial.reward > self._best[0]):
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
