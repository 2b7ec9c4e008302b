"""Did it help? Paired bootstrap over held-back items of what people read: a merge against the simplest alternative.

It knows scores only. Both candidates are scored on the same items, so their difference is resampled item by item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arma_mergekit.evals.base import Measured

__all__ = ["Difference", "Verdict", "compare", "suite_shares"]

RESAMPLES = 2000
SIGNIFICANT = 1.96

Array = npt.NDArray[np.float64]
Scores = Mapping[str, Measured]  # task key `suite/task` to its held-back scores


@dataclass(frozen=True)
class Difference:
    """Mean and bootstrap standard error of a difference in share kept."""

    mean: float
    stderr: float

    @property
    def sign(self) -> int:
        """1 or -1 outside the standard error (two-sided 5 %), else 0."""
        return 0 if abs(self.mean) <= SIGNIFICANT * self.stderr else (1 if self.mean > 0 else -1)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Verdict:
    """A candidate against a rival: the difference in share kept, suite by suite, and the sentence that says it."""

    name: str
    rival: str
    suites: Mapping[str, Difference]

    @property
    def dominates(self) -> bool:
        """Better on a suite and worse on none, outside the standard error."""
        signs = [d.sign for d in self.suites.values()]
        return max(signs) > 0 and min(signs) >= 0

    @property
    def sentence(self) -> str:
        """What was found, in one line."""
        told = ", ".join(f"{suite} {d}" for suite, d in self.suites.items())
        signs = [d.sign for d in self.suites.values()]
        if self.dominates:
            return f"{self.name} beats {self.rival} (share kept: {told})."
        if min(signs) < 0 < max(signs):
            return f"{self.name} trades: better on one suite and worse on another than {self.rival} ({told})."
        if max(signs) == 0 and min(signs) == 0:
            return f"{self.name} is no better than {self.rival} ({told}): use that."
        return f"{self.name} is worse than {self.rival} ({told}): use that."


def suite_shares(scores: Scores, base: Scores, tuned: Scores) -> dict[str, float]:
    """Share kept of each suite, in headline scores: 0 = the worse of base and fine-tuned, 1 = the better."""
    return {
        suite: float(np.mean(list(tasks.values()))) for suite, tasks in _by_suite(scores, base, tuned).items()
    }


def compare(
    name: str, scores: Scores, rival: str, other: Scores, base: Scores, tuned: Scores, seed: int = 0
) -> Verdict:
    """Paired bootstrap of the difference in share kept; the ends of the scale are taken as they are."""
    rng = np.random.default_rng(seed)
    draws: dict[str, list[Array]] = {}
    means: dict[str, list[float]] = {}
    for key, ours in scores.items():
        suite, theirs = key.partition("/")[0], other[key]
        gap = abs(base[key].score - tuned[key].score)
        if gap == 0:
            continue
        picks = rng.integers(0, len(ours.ids), (RESAMPLES, len(ours.ids)))
        difference, weight = ours.value - theirs.value, ours.weight
        draws.setdefault(suite, []).append(difference[picks].sum(1) / weight[picks].sum(1) / gap)
        means.setdefault(suite, []).append(float(difference.sum() / weight.sum() / gap))
    suites = {
        suite: Difference(float(np.mean(means[suite])), float(np.mean(rows, axis=0).std()))
        for suite, rows in draws.items()
    }
    return Verdict(name, rival, suites)


def _by_suite(scores: Scores, base: Scores, tuned: Scores) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for key, measured in scores.items():
        low, high = sorted((base[key].score, tuned[key].score))
        if high > low:
            shares.setdefault(key.partition("/")[0], {})[key] = (measured.score - low) / (high - low)
    return shares
