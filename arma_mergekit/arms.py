"""An arm: one searcher over one space, its trials scored through jobs and kept in the journal.

    ask -> jobs -> record in the journal -> tell

It knows the searcher's protocol, the scale and the journal; no models, and not which searcher it has. Trials may run
side by side. A record says how many trials had been told when it was asked, and the same of those still open when it
was written, so that an arm that is started again asks and tells in the same order, in whatever order answers came.

Low-fidelity rung: a candidate is scored on a fixed part of the search items first. If its reward there is lower than
that of the arm's best on the same items, by more than RULED_OUT standard errors of the paired difference, it is told
that difference and costs no more; otherwise the other items are scored too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from arma_mergekit.errors import RunError
from arma_mergekit.evals.base import Measured, join
from arma_mergekit.scoring import Scale
from arma_mergekit.search.base import Problem, Query, Searcher, Trial
from arma_mergekit.space import Space
from arma_mergekit.trials import Journal
from arma_mergekit.worker import Done, Job

__all__ = ["Arm", "Listed", "Running"]

Array = npt.NDArray[np.float64]
Record = dict[str, Any]
Steps = Generator[Job, Done, Record]

DECIMALS = 4  # of an alpha: what is scored is what the exported recipe says
RULED_OUT = 3.0


class Listed:
    """A searcher that asks about given values of one knob, in order: averaging with one alpha, the rival."""

    concurrent: ClassVar[bool] = True

    def __init__(self, values: Sequence[float]) -> None:
        self._left = list(values)

    def ask(self) -> Query | None:
        """The next value."""
        return Query((self._left.pop(0),)) if self._left else None

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""


@dataclass
class Running:
    """A trial on its way: ``tag`` names its jobs, ``job`` is the one to be scored now."""

    arm: Arm
    index: int
    query: Query
    steps: Steps
    job: Job

    @property
    def tag(self) -> str:
        """A name no other running trial has."""
        return f"{self.arm.key}/{self.index}"


@dataclass
class Arm:
    """One searcher with one seed (or one knob) and what it found so far.

    ``key`` opens the journal's keys; ``budget`` in full evaluations; ``rung`` = n: the part (0, n) is scored first,
    1: no rung; ``emphasis``: of the objective (objective.py).
    """

    name: str
    key: str
    space: Space
    searcher: Searcher
    budget: float
    scale: Scale
    journal: Journal
    report: Callable[[Arm, Record, bool], None]
    rung: int = 1
    emphasis: Mapping[str, float] = field(default_factory=dict)
    problem: Problem | None = None

    def __post_init__(self) -> None:
        self.spent = 0.0
        self.trials: list[Trial] = []
        self.records: list[Record] = []
        self.running: dict[int, Running] = {}
        # asked and not answered, with how many had been told then: running, or not affordable, or cut off by a kill
        self._open: dict[int, tuple[Query, int]] = {}
        self._asked = 0
        self._replay()

    # ------------------------------------------------------------------ going on

    def start(self) -> Running | None:
        """The next trial, or None: nothing can be asked now."""
        if self.running and not self.searcher.concurrent:
            return None
        index = next((index for index in self._open if index not in self.running), self._asked)
        if index == self._asked and not self._ask():
            return None
        query, _ = self._open[index]
        reserved = sum(running.query.cost for running in self.running.values())
        if self.spent + reserved + query.cost > self.budget + 1e-9:
            return None
        steps = self._steps(query, self._incumbent())
        self.running[index] = Running(self, index, query, steps, next(steps))
        return self.running[index]

    def advance(self, running: Running, done: Done) -> bool:
        """Take in what a job found; True if the trial needs another (its ``job``), False if it is over."""
        try:
            running.job = running.steps.send(done)
        except StopIteration as stop:
            del self.running[running.index]
            _, told_before = self._open.pop(running.index)
            still_open = [[index, told] for index, (_, told) in self._open.items()]
            record = stop.value | {"told_before": told_before, "open": still_open}
            self.journal.append(f"{self.key}/{running.index}", record)
            self._tell(running.query, self.journal[f"{self.key}/{running.index}"], fresh=True)
            return False
        return True

    def _ask(self) -> bool:
        """Open the searcher's next question; False if it has none."""
        query = self.searcher.ask()
        if query is None:
            return False
        self._open[self._asked] = query, len(self.trials)
        self._asked += 1
        return True

    # ------------------------------------------------------------------ what was there before

    def _replay(self) -> None:
        """Ask and tell as the journal says it was; what was asked and never answered is open again."""
        found = self.journal.under(self.key)
        asked = {index: record["told_before"] for index, record in found.items()}
        asked |= {index: told for record in found.values() for index, told in record["open"]}
        for told, (index, record) in enumerate(found.items()):
            while asked.get(self._asked, told + 1) <= told and self._ask():
                pass
            query, _ = self._open.pop(index, (None, 0))
            if query is None or [record["values"], record["wants_gradient"]] != [
                [*query.values],
                query.gradient,
            ]:
                raise self._changed(index)
            self._tell(query, record, fresh=False)

    def _changed(self, index: int) -> RunError:
        """For a searcher that asks another question than the journal answers: its code or a library changed."""
        return RunError(
            f"{self.journal.path} answers another question at {self.key}/{index} than is asked now: a searcher or "
            "library changed since. Give another --out."
        )

    # ------------------------------------------------------------------ one trial

    def _tell(self, query: Query, record: Record, fresh: bool) -> None:
        gradient = record["gradient"]
        trial = Trial(
            query, record["reward"], None if gradient is None else tuple(gradient), cost=record["cost"],
            estimated=record["status"] == "ruled out",
        )  # fmt: skip
        self.spent += record["cost"]
        self.trials.append(trial)
        self.records.append(record)
        self.searcher.tell(trial)
        self.report(self, record, fresh)

    def _incumbent(self) -> Record | None:
        """The best trial that has scores on the rung's items."""
        found = [
            r for r in self.records if r["reward"] is not None and r.get("rung") and r["status"] == "done"
        ]
        return max(found, key=lambda r: r["reward"], default=None)

    def _steps(self, query: Query, incumbent: Record | None) -> Steps:
        """The jobs of one trial, one after the other, and its record."""
        alphas = tuple(float(a) for a in np.round(self.space.alphas(query.values), DECIMALS))
        tasks = tuple(self.scale.steering)
        whole = query.part is None and not query.gradient
        if not whole or self.rung == 1:
            done = yield Job(alphas, tasks, query.part, gradient=query.gradient)
            return self._record(query, done, query.cost)
        part = (0, self.rung)
        low = yield Job(alphas, tasks, part)
        if low.error is None and incumbent is not None:
            gap, error = self.scale.duel(low.measured, unpack(incumbent["rung"]), part, self.emphasis)
            if gap + RULED_OUT * error < 0:
                return self._ruled_out(query, low, incumbent["reward"] + gap)
        if low.error is not None:
            return self._record(query, low, query.cost / self.rung)
        rest = yield Job(alphas, tasks, part, complement=True)
        return self._record(query, both(low, rest), query.cost) | {"rung": pack(low.measured)}

    def _record(self, query: Query, done: Done, cost: float) -> Record:
        asked = {
            "values": list(query.values),
            "wants_gradient": query.gradient,
            "part": query.part,
            "cost": cost,
        }
        if done.error is not None:
            return asked | {
                "status": "failed", "error": done.error, "reward": None, "gradient": None, "feasible": False,
                "tokens": 0, "seconds": done.seconds,
            }  # fmt: skip
        losses = {k: m.mean_loss for k, m in done.measured.items()}
        reward = self.scale.reward(losses, query.part, self.emphasis)
        gradient = None
        if query.gradient:
            by_alpha = sum(reward.slopes[key] * slope for key, slope in done.slopes.items())
            gradient = [float(g) for g in self.space.pullback(query.values, by_alpha)]
        return asked | {
            "status": "done",
            "reward": reward.value,
            "gradient": gradient,
            "feasible": reward.feasible,
            "shares": dict(reward.shares),
            "scores": {k: m.score for k, m in done.measured.items()},
            "stderr": {k: m.stderr for k, m in done.measured.items() if len(m.ids) > 1},
            "losses": losses,
            "tokens": done.tokens,
            "seconds": done.seconds,
        }

    def _ruled_out(self, query: Query, low: Done, estimate: float) -> Record:
        """A candidate that lost on the rung: what it would be worth, by its distance from the best there."""
        record = self._record(query, low, query.cost / self.rung)
        return record | {"status": "ruled out", "reward": estimate, "part": [0, self.rung], "feasible": False}


def both(low: Done, rest: Done) -> Done:
    """Two halves of one scoring."""
    if rest.error is not None:
        return rest
    measured = {key: join(m, rest.measured[key]) for key, m in low.measured.items()}
    return Done(measured, {}, low.tokens + rest.tokens, low.seconds + rest.seconds)


def pack(scores: Mapping[str, Measured]) -> Record:
    """Losses and weights by item, as JSON."""
    return {
        key: {"ids": list(m.ids), "loss": m.loss.tolist(), "weight": m.weight.tolist()}
        for key, m in scores.items()
    }


def unpack(data: Record) -> dict[str, Measured]:
    """The other way; without headline values, which no search uses."""
    columns = {k: (tuple(m["ids"]), np.array(m["loss"]), np.array(m["weight"])) for k, m in data.items()}
    return {key: Measured(ids, loss, -loss, weight, 0) for key, (ids, loss, weight) in columns.items()}
