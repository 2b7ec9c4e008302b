"""From losses of tasks to one number J that goes up, and its slope. It knows numbers only.

    symbol   meaning
    L_t      loss of task t (goes down when things get better)
    p_t      exp(-L_t): the probability given to a right token, answer or choice (geometric mean), which follows
             accuracy far more closely than the loss does: going from hopeless to bad saves nats, not answers
    r_t      share kept of task t:  (p_t - worse) / (better - worse)  over base and fine-tuned
    R_s      share kept of suite s: mean of r_t over its tasks, by their weights

    balance               J = harmonic mean of the shares;  the smaller share where one is not positive
    maximize a, keep b p  J = R_a - SLOPE * max(0, p - R_b)
    sum                   J = sum_s w_s R_s

Both ends have balance 0. A share above 1 (better than both ends) counts only EXCESS of itself in `balance`, so a suite
cannot be bought with another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

__all__ = ["End", "Objective", "Reward", "share"]

EXCESS = 0.25
SLOPE = 10.0


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
    neither, all suites are balanced, or ``only`` those named.
    """

    suites: Mapping[str, Mapping[str, float]]
    ends: Mapping[str, End]
    maximize: str | None = None
    keep: Mapping[str, float] | None = None
    weights: Mapping[str, float] | None = None
    only: Sequence[str] | None = None

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
        return _harmonic({s: shares[s] for s in self.only or shares})


def _harmonic(shares: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    lowest = min(shares, key=lambda s: shares[s])
    if shares[lowest] <= 0:
        return shares[lowest], {lowest: 1.0}
    counted = {s: min(r, 1 + EXCESS * (r - 1)) for s, r in shares.items()}
    mean = len(counted) / sum(1 / r for r in counted.values())
    return mean, {
        s: (EXCESS if shares[s] > 1 else 1.0) * mean**2 / (len(counted) * r**2) for s, r in counted.items()
    }


def _constrained(
    shares: Mapping[str, float], maximize: str, keep: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    short = {s: least - shares[s] for s, least in keep.items() if shares[s] < least}
    slopes = {maximize: 1.0}
    for suite in short:
        slopes[suite] = slopes.get(suite, 0.0) + SLOPE
    return shares[maximize] - SLOPE * sum(short.values()), slopes
