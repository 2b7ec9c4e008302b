"""From losses of tasks to one number J that goes up, and its slope. It knows numbers only.

    symbol   meaning
    L_t      loss of task t (goes down when things get better)
    p_t      exp(-L_t): the probability given to a right token, answer or choice (geometric mean), which follows
             accuracy far more closely than the loss does: going from hopeless to bad saves nats, not answers
    r_t      share kept of task t:  (p_t - worse) / (better - worse)  over base and fine-tuned
    R_s      share kept of suite s: mean of r_t over its tasks, by their weights

    balance               J = sum_s e_s / sum_s (e_s / R_s), the harmonic mean of the shares with emphasis e (1 unless
                          the front is searched);  the smallest share where one is not positive
    maximize a, keep b p  J = R_a - SLOPE * max(0, p - R_b)
    sum                   J = sum_s w_s R_s
    pareto                one search per emphasis: all alike, then each suite's own times EMPHASIS

Each may carry penalties, J - sum_t c_t L_t: the attention regulariser, c = weight / (its loss between the two ends).

Both ends have balance 0. A share above 1 (better than both ends) counts only EXCESS of itself in `balance`, so a suite
cannot be bought with another's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import TypeVar

__all__ = ["Bound", "End", "Objective", "Reward", "emphases", "front", "share"]

EXCESS = 0.25
SLOPE = 10.0
EMPHASIS = 4.0
UNITS = {"%": "share", "": "share", "se": "se", "nats": "nats"}
BOUND = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%|se|nats|)\s*", re.ASCII)

Named = TypeVar("Named")


@dataclass(frozen=True)
class Bound:
    """How much of a suite to keep.

    ``unit``: "share" (of the gap between base and fine-tuned), "se" (at most this many standard errors of that gap
    below the better end), "nats" (the loss at most this far above the better end's; suites of one steering task).
    """

    amount: float
    unit: str = "share"

    @classmethod
    def parse(cls, text: object) -> Bound:
        """`95%`, .95, `2 se`, `0.05 nats`; ValueError otherwise."""
        found = None if isinstance(text, bool) else BOUND.fullmatch(str(text))
        if found is None:
            raise ValueError(f" must be 95% (of the gap), 2 se or 0.05 nats, but got {text!r}.")
        amount = float(found[1]) / (100 if found[2] == "%" else 1)
        if UNITS[found[2]] == "share" and amount > 2:
            raise ValueError(f" must be a share such as 95% or 0.95, but got {text!r}.")
        return cls(amount, UNITS[found[2]])

    def __str__(self) -> str:
        return (
            f"{self.amount:.4g} {self.unit}"
            if self.unit != "share"
            else f"{self.amount:.4%}".replace(".0000", "")
        )


@dataclass(frozen=True)
class End:
    """The scale of a task: p of its ``better`` end, and how far the worse one is below it (``gap`` > 0)."""

    better: float
    gap: float

    @classmethod
    def of(cls, base: float, tuned: float) -> End:
        """From the losses of base and fine-tuned."""
        low, high = sorted((exp(-base), exp(-tuned)))
        return cls(high, high - low)


def share(loss: float, end: End) -> float:
    """Share kept: 1 at the better end, 0 at the worse, linear in p = exp(-loss)."""
    return 1 - (end.better - exp(-loss)) / end.gap


@dataclass(frozen=True)
class Reward:
    """``value`` J, ``shares`` of the suites, ``slopes`` dJ/dL_t of the tasks, ``feasible``: every `keep` holds."""

    value: float
    shares: Mapping[str, float]
    slopes: Mapping[str, float]
    feasible: bool = True


@dataclass(frozen=True)
class Objective:
    """J over suites of tasks. ``suites``: suite to {task: weight}; ``ends``: task to its ends.

    ``maximize`` names the suite to raise and ``keep`` the least shares of others; ``weights`` asks for a sum; with
    neither, all suites are balanced, or ``only`` those named, by their ``emphasis``. ``penalties``: task to c.
    """

    suites: Mapping[str, Mapping[str, float]]
    ends: Mapping[str, End]
    maximize: str | None = None
    keep: Mapping[str, float] | None = None
    weights: Mapping[str, float] | None = None
    only: Sequence[str] | None = None
    emphasis: Mapping[str, float] = field(default_factory=dict)
    penalties: Mapping[str, float] = field(default_factory=dict)

    def reward(self, losses: Mapping[str, float]) -> Reward:
        """J, the shares and the slopes at these losses (one per task)."""
        shares = self.shares(losses)
        value, by_suite = self._value(shares)
        slopes = {}
        for suite, tasks in self.suites.items():
            total = sum(tasks.values())
            for task, weight in tasks.items():
                slopes[task] = (
                    -by_suite.get(suite, 0.0) * weight / total * exp(-losses[task]) / self.ends[task].gap
                )
        for task, cost in self.penalties.items():
            value -= cost * losses[task]
            slopes[task] = -cost
        feasible = all(shares[suite] >= least for suite, least in (self.keep or {}).items())
        return Reward(value, shares, slopes, feasible)

    def shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Share kept of each suite."""
        return {
            suite: sum(w * share(losses[t], self.ends[t]) for t, w in tasks.items()) / sum(tasks.values())
            for suite, tasks in self.suites.items()
        }

    def _value(self, shares: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """J and dJ/dR_s."""
        if self.weights is not None:
            return sum(w * shares[s] for s, w in self.weights.items()), dict(self.weights)
        if self.maximize is not None:
            return _constrained(shares, self.maximize, self.keep or {})
        chosen = {s: shares[s] for s in self.only or shares}
        return _harmonic(chosen, {s: self.emphasis.get(s, 1.0) for s in chosen})


def _harmonic(shares: Mapping[str, float], emphasis: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    lowest = min(shares, key=lambda s: shares[s])
    if shares[lowest] <= 0:
        return shares[lowest], {lowest: 1.0}
    counted = {s: min(r, 1 + EXCESS * (r - 1)) for s, r in shares.items()}
    total = sum(emphasis.values())
    mean = total / sum(emphasis[s] / r for s, r in counted.items())
    return mean, {
        s: (EXCESS if shares[s] > 1 else 1.0) * emphasis[s] / total * mean**2 / r**2
        for s, r in counted.items()
    }


def _constrained(
    shares: Mapping[str, float], maximize: str, keep: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    short = {s: least - shares[s] for s, least in keep.items() if shares[s] < least}
    slopes = {maximize: 1.0}
    for suite in short:
        slopes[suite] = slopes.get(suite, 0.0) + SLOPE
    return shares[maximize] - SLOPE * sum(short.values()), slopes


def emphases(suites: Sequence[str]) -> dict[str, dict[str, float]]:
    """What a search for the front looks for in turn: name of the emphasis to e by suite."""
    return {"balance": {}} | {suite: {suite: EMPHASIS} for suite in suites}


def front(points: Iterable[tuple[Named, Mapping[str, float]]]) -> list[Named]:
    """Those whose shares no other point matches everywhere and exceeds somewhere (Pareto), in the order given."""
    rows = list(points)

    def beaten(shares: Mapping[str, float]) -> bool:
        return any(
            all(other[s] >= r for s, r in shares.items()) and any(other[s] > r for s, r in shares.items())
            for _, other in rows
        )

    return [name for name, shares in rows if not beaten(shares)]
