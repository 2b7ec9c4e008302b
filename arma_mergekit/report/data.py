"""What a report needs of a run beyond what its summary says. It knows no markup.

arm       a searcher with a seed; its trials have keys `searcher/seed/index`
family    candidates that share a colour and a shape: the arms of a searcher, the values of a knob
full      a trial scored on all search items; only these count for the best so far
regret    the best reward known of the run minus the best so far of an arm
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

__all__ = [
    "ENDS", "KNOB", "best_known", "candidate", "family", "is_arm", "is_full", "regrets", "seeds", "spread", "suites",
    "winner",
]  # fmt: skip

Record = Mapping[str, Any]
Curve = list[tuple[float, float]]  # (cost, value), in order of cost

ENDS = ("base", "fine-tuned")
KNOB = "one knob"
# where the front is searched, an arm has a leg per emphasis; rewards of the balanced one alone are the run's
ARM = re.compile(r"(?P<searcher>[^/]+)/(?P<seed>\d+)(/balance)?/\d+")
VARIANT = re.compile(rf" seed \d+$|(?<=^{KNOB}, everything) .*|(?<=^{KNOB}, attention) .*")
PICK = re.compile(r".+ \((?P<name>.+)\)")


def suites(summary: Record) -> list[str]:
    """Suites that have a share, in order of appearance."""
    return list(dict.fromkeys(s for c in summary.get("candidates", ()) for s in c["share_kept"]))


def family(name: str) -> str:
    """`bayes seed 1` and `knee (bayes)` are bayes, `one knob, everything 0.5` is `one knob, everything`."""
    pick = PICK.fullmatch(name)
    return VARIANT.sub("", pick["name"] if pick else name)


def is_arm(c: Record) -> bool:
    """Whether a candidate was searched: neither an end nor one knob."""
    return family(c["name"]) not in ENDS and not family(c["name"]).startswith(KNOB)


def candidate(summary: Record, name: object) -> Record:
    """The candidate of that name, or nothing."""
    return next((c for c in summary.get("candidates", ()) if c["name"] == name), {})


def is_full(trial: Record) -> bool:
    """Whether a trial counts for the best so far."""
    return trial.get("reward") is not None and trial.get("part") is None


def winner(c: Record, trials: Iterable[Record]) -> Record:
    """The trial that a candidate comes from, or nothing."""
    return next((t for t in trials if is_full(t) and t["reward"] == c.get("search_reward")), {})


def seeds(trials: Iterable[Record]) -> dict[str, dict[int, list[Record]]]:
    """Trials by searcher and seed."""
    found: dict[str, dict[int, list[Record]]] = {}
    for trial in trials:
        if match := ARM.fullmatch(trial["key"]):
            found.setdefault(match["searcher"], {}).setdefault(int(match["seed"]), []).append(trial)
    return found


def best_known(summary: Record, trials: Iterable[Record]) -> float:
    """The highest reward of candidates and of full trials of arms."""
    rewards = [c.get("search_reward") for c in summary.get("candidates", ())]
    rewards += [t["reward"] for t in trials if is_full(t) and ARM.fullmatch(t["key"])]
    return max((r for r in rewards if r is not None), default=0.0)


def regrets(trials: Sequence[Record], top: float) -> Curve:
    """(forward tokens spent, regret) after each trial of an arm, from its first full one on."""
    spent = accumulate(t.get("tokens", 0) for t in trials)
    best = accumulate((t["reward"] if is_full(t) else -float("inf") for t in trials), max)
    return [(cost, top - reward) for cost, reward in zip(spent, best, strict=True) if reward > -float("inf")]


def spread(curves: Iterable[Curve]) -> tuple[Curve, Curve, Curve]:
    """Lowest, median and highest of step curves, wherever all of them have a value."""
    found = [curve for curve in curves if curve]
    start = max((curve[0][0] for curve in found), default=0.0)
    costs = sorted({cost for curve in found for cost, _ in curve if cost >= start})
    values = [sorted(next(v for c, v in reversed(curve) if c <= cost) for curve in found) for cost in costs]
    rows = list(zip(costs, values, strict=True))
    return [(c, v[0]) for c, v in rows], [(c, median(v)) for c, v in rows], [(c, v[-1]) for c, v in rows]
