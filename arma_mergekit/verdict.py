"""Did it help? Paired bootstrap over held-back items of what people read: a merge against the simplest alternative.

It knows scores only. Both candidates are scored on the same items, so their difference is resampled item by item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arma_mergekit.evals.base import Measured, paired

__all__ = ["Difference", "Verdict", "clear_tasks", "compare", "kept"]

RESAMPLES = 2000
SIGNIFICANT = 1.96
MIN_SEPARATION = 3.0  # of a held-back task, in paired standard errors

Array = npt.NDArray[np.float64]
Scores = Mapping[str, Measured]  # task key `suite/task` to its held-back scores


@dataclass(frozen=True)
class Difference:
    """Mean and bootstrap standard error of a difference in share kept."""

    mean: float
    stderr: float

    @property
    def sign(self) -> int:
        """1 or -1 outside the error (two-sided 5 %), else 0."""
        return 0 if abs(self.mean) <= SIGNIFICANT * self.stderr else (1 if self.mean > 0 else -1)

    @property
    def no_worse(self) -> bool:
        """Not below zero by more than one standard error."""
        return self.mean >= -self.stderr

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
        """Better on a suite outside the error, and no worse on any."""
        found = self.suites.values()
        return any(d.sign > 0 for d in found) and all(d.no_worse for d in found)

    @property
    def sentence(self) -> str:
        """What was found, in one line."""
        told = ", ".join(f"{suite} {d}" for suite, d in self.suites.items())
        signs = {d.sign for d in self.suites.values()}
        if self.dominates:
            return f"{self.name} beats {self.rival} (share kept: {told})."
        if 1 in signs:
            return f"{self.name} trades one suite for another against {self.rival} (share kept: {told})."
        if -1 in signs:
            return f"{self.name} is worse than {self.rival} (share kept: {told}): use that."
        return f"{self.name} is no better than {self.rival} (share kept: {told or 'no task can tell'}): use that."


def clear_tasks(base: Scores, tuned: Scores) -> list[str]:
    """Tasks whose headline scores tell base from fine-tuned on these items; the others have no scale to share."""
    gaps = {key: paired(tuned[key], ours, "value") for key, ours in base.items()}
    return [key for key, (mean, error) in gaps.items() if abs(mean) > MIN_SEPARATION * error]


def kept(scores: Scores, base: Scores, tuned: Scores, weights: Mapping[str, float]) -> dict[str, Difference]:
    """Share kept of each suite, in headline scores: 0 = the worse of base and fine-tuned, 1 = the better.

    The mean over its clear tasks by their weights, and the error of its distance from the worse end; a suite without
    such a task is absent.
    """
    worse = {key: min(base[key], tuned[key], key=lambda m: m.score) for key in base}
    return dict(compare("", scores, "", worse, base, tuned, weights).suites)


def compare(
    name: str,
    scores: Scores,
    rival: str,
    other: Scores,
    base: Scores,
    tuned: Scores,
    weights: Mapping[str, float],
) -> Verdict:
    """Paired bootstrap of the difference in share kept; the ends of the scale are taken as they are.

    Tasks on the same items are resampled together, so their errors do not pass for independent.
    """
    rng = np.random.default_rng(0)
    resampled: dict[tuple[str, ...], npt.NDArray[np.int64]] = {}
    rows: dict[str, list[tuple[float, Array, float]]] = {}
    for key in clear_tasks(base, tuned):
        ours, theirs, gap = scores[key], other[key], abs(base[key].score - tuned[key].score)
        if ours.ids not in resampled:
            resampled[ours.ids] = rng.integers(0, len(ours.ids), (RESAMPLES, len(ours.ids)))
        picks, difference, weight = resampled[ours.ids], ours.value - theirs.value, ours.weight
        draws = difference[picks].sum(1) / weight[picks].sum(1) / gap
        mean = float(difference.sum() / weight.sum() / gap)
        rows.setdefault(key.partition("/")[0], []).append((mean, draws, weights[key]))
    suites = {}
    for suite, found in rows.items():
        total = sum(w for _, _, w in found)
        spread = sum(draws * w for _, draws, w in found) / total
        suites[suite] = Difference(sum(m * w for m, _, w in found) / total, float(np.std(spread)))
    return Verdict(name, rival, suites)
