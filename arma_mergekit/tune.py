"""A tuning run: ends, one-knob averaging, arms, verdict; every step in the journal before the next begins.

    base, fine-tuned     the scale (and which tasks can tell them apart)
    one knob             averaging of everything, and of attention only: the rivals to beat
    each arm             ask -> score -> journal -> tell, until its budget is spent (arms.py)
    held-back items      the best of each arm once, beside base, fine-tuned, one knob and other models

It knows recipes, jobs and scores; it cannot tell one searcher from another, nor one engine from another. Budgets are
equal: cost is counted in forward tokens, a backward pass double. Every arm starts at the best alpha for everything.
Killed and started again with the same recipe, a run asks the same questions, finds the answers in its journal and goes
on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.arms import DECIMALS, Arm, Listed, Running
from arma_mergekit.cache import hashed
from arma_mergekit.decode import Footprint
from arma_mergekit.engines import Engine
from arma_mergekit.errors import RecipeError, RunError
from arma_mergekit.evals import REGULARIZER
from arma_mergekit.evals.base import Measured, Split
from arma_mergekit.objective import emphases, front
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles
from arma_mergekit.scoring import Scale, Scores, Separation, suite_of
from arma_mergekit.search import WITH_GRADIENTS, make_searcher
from arma_mergekit.search.base import Problem, Trial
from arma_mergekit.space import Space, make_space
from arma_mergekit.trials import Journal
from arma_mergekit.verdict import Difference, Verdict, compare, kept
from arma_mergekit.worker import Done, Job

__all__ = ["Candidate", "Compared", "Guest", "Phase", "Result", "Tuner"]

Array = npt.NDArray[np.float64]
Progress = Callable[[str, Mapping[str, Any]], None]
Record = dict[str, Any]

START = 0.75  # where no single alpha could be scored
KNOB = tuple(round(0.1 * k, 1) for k in range(1, 10))
ATTENTION_KNOB = (0.0, 0.2, 0.4, 0.6, 0.8)
EVERYTHING, ATTENTION = "one knob, everything", "one knob, attention"
DERIVATIVE_FREE = {"groups": "kind", "rest": "kind", "bounds": (-0.5, 1.5)}
DERIVATIVE = {"groups": "tensor", "rest": "tensor", "bounds": (-1.0, 2.5)}
SAFE = 0.5  # least share of every suite in a pick of the front


@dataclass
class Candidate:
    """A merge that was found: its alphas by checkpoint tensor, its search reward, and its held-back scores.

    ``reward`` is None when every trial failed. ``searched``: share of each suite on search items.
    """

    name: str
    alphas: dict[str, float]
    reward: float | None
    feasible: bool = True
    evaluations: float = 0.0
    searched: Mapping[str, float] = field(default_factory=dict)
    held: Scores = field(default_factory=dict)

    @property
    def rank(self) -> tuple[bool, float]:
        """What the best is picked by: feasible ones first, then the search reward."""
        return self.feasible, -np.inf if self.reward is None else self.reward


@dataclass(frozen=True)
class Guest:
    """A model that is no average of base and fine-tuned, to compare with. ``digest``: of all its files."""

    name: str
    ref: str
    kind: str
    digest: str


@dataclass(frozen=True)
class Compared:
    """How a guest, which is a candidate without alphas, fares against the best merge.

    ``own``, ``merge``: what answering costs the guest and any merge, measured in turns.
    """

    guest: Guest
    candidate: Candidate
    verdict: Verdict
    own: Footprint
    merge: Footprint


@dataclass(frozen=True)
class Phase:
    """What a part of the run cost. ``evaluations``: full ones; ``trials``: questions asked."""

    phase: str
    trials: int
    evaluations: float
    forward_tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a run found; ``best`` has the highest search reward of all, ``rival`` that of the one-knob averages.

    ``shares``: candidate to suite to share kept on held-back items; ``picks``: name of a pick of the front to its
    candidate; ``curve``: trials of the first knob; ``heads``: fine-tuned and best to the divergence of their
    attention from the base's, by depth and head.
    """

    scale: Scale
    candidates: Sequence[Candidate]
    rival: Candidate
    best: Candidate
    verdicts: Sequence[Verdict]
    shares: Mapping[str, Mapping[str, Difference]]
    picks: Mapping[str, Candidate]
    curve: Sequence[Record]
    heads: Mapping[str, Mapping[int, list[float]]]
    ledger: Sequence[Phase]
    compared: Sequence[Compared] = ()

    @property
    def separation(self) -> Sequence[Separation]:
        """Every task that could steer."""
        return self.scale.separation


class Tuner:
    """One run. ``suites``: names of the recipe's suites to balance; ``journal``: to be set before it runs.

    ``guests``: what the recipe compares with.
    """

    journal: Journal

    def __init__(
        self,
        recipe: Recipe,
        suites: Sequence[str],
        engine: Engine,
        progress: Progress,
        guests: Sequence[Guest] = (),
    ) -> None:
        self.recipe, self.engine, self.progress, self.guests = recipe, engine, progress, guests
        self.config = recipe.tune
        self.options = self.config.objective.options(suites)
        self.about = engine.describe()
        self.roles = roles(self.about.tensors, dict(self.about.config))
        self.splits = {key: Split(task.ids, self.config.holdout) for key, task in self.about.tasks.items()}
        self._check()
        self.arms: list[Arm] = []

    def _check(self) -> None:
        """Everything that can be wrong before anything is scored."""
        for key, split in self.splits.items():
            if len(split.search) < 2 or len(split.held) < 2:
                raise RunError(
                    f"{key} has {len(split.search)} items to search on and {len(split.held)} held back; it needs at "
                    "least 2 of each."
                )
        for searcher in self.config.searchers:
            self._space_of(searcher)
        blind = [k for k, t in self.about.tasks.items() if not t.watch and not t.differentiable]
        sighted = [name for name in self.config.searchers if name in WITH_GRADIENTS]
        if blind and sighted:
            raise RecipeError(
                f"Searcher {sighted[0]} needs tasks with a differentiable loss, but {blind[0]} has none; mark it "
                f"`watch: true`, or leave {sighted[0]} out of --searchers."
            )

    # ------------------------------------------------------------------ the run

    def run(self, more: int | None = None) -> Result:
        """Do whatever the journal does not hold yet, and return the result.

        ``more``: evaluations that every arm gets beyond those it had; asked again before they are spent, no more.
        """
        self.prepare()
        self.arms = knobs = self._knobs()
        self._search(knobs)
        budget = self._budget(more)
        arms = list(self._arms(self._start(), budget))
        self.arms = [*knobs, *arms]
        self._search(arms)
        self.journal.once(f"spent/{budget:g}", dict)
        return self._judge(knobs, arms)

    def _budget(self, more: int | None) -> float:
        """Evaluations of each arm: the recipe's, or more if the run was extended."""
        extended = [float(record["trials"]) for record in self.journal.under("extended").values()]
        budget = max([float(self.config.trials), *extended])
        if more is not None and f"spent/{budget:g}" in self.journal:
            budget += more
            self.journal.append(f"extended/{len(extended)}", {"trials": budget})
        return budget

    def prepare(self) -> None:
        """Score base and fine-tuned, which sets the scale, and guests: what is wrong with them is known early."""
        ends = self._ends()
        weights = {key: task.weight for key, task in self.about.tasks.items()}
        penalty = 0.0 if self.config.regularizer is None else self.config.regularizer.weight
        self.scale = Scale(ends, self.splits, weights, self.options, self.config.keep_weak, penalty)
        self.progress("separation", {"tasks": self.scale.separation, "steering": self.scale.steering})
        self._receive()

    def sweep(self, values: Sequence[float], scope: str = "everything") -> Result:
        """One knob only: these values of one alpha for everything, or for ``attention`` with the rest fine-tuned."""
        self.prepare()
        name, groups = (ATTENTION, "global") if scope == "attention" else (EVERYTHING, "everything")
        self.arms = [self._knob(name, groups, values)]
        self._search(self.arms)
        return self._judge(self.arms, [])

    def best_so_far(self) -> Candidate | None:
        """What an interrupted run would call its best."""
        found = [c for arm in self.arms if (c := self._best([arm])).alphas]
        return max(found, key=lambda c: c.rank, default=None)

    def _search(self, arms: Sequence[Arm]) -> None:
        """Keep every worker busy until no arm can go on."""
        running: dict[str, Running] = {}
        while True:
            while len(running) < self.engine.workers and (trial := _next(arms)) is not None:
                running[trial.tag] = trial
                self.engine.submit(trial.tag, trial.job)
            if not running:
                return
            tag, done = self.engine.wait()
            trial = running.pop(tag)
            if trial.arm.advance(trial, done):
                running[tag] = trial
                self.engine.submit(tag, trial.job)

    def _do(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Done]]:
        """Score these jobs, each as it comes; RunError if one cannot be."""
        for tag, job in jobs.items():
            self.engine.submit(tag, job)
        for _ in jobs:
            tag, done = self.engine.wait()
            if done.error is not None:
                raise RunError(f"{done.error} It is one of the models that every merge is measured by.")
            yield tag, done

    def _ends(self) -> dict[str, dict[str, Measured]]:
        steering = tuple(key for key, task in self.about.tasks.items() if not task.watch)
        sides = {"base": 0.0, "finetuned": 1.0}

        def compute() -> Record:
            jobs = {side: Job(self._constant(alpha), steering) for side, alpha in sides.items()}
            found = dict(self._do(jobs))
            record: Record = {side: dump(done.measured) for side, done in found.items()}
            return record | costs(found.values(), self.about.prepared)

        record = self.journal.once("ends", compute)
        try:
            return {side: load(record[side]) for side in sides}
        except (KeyError, TypeError) as error:
            raise self.journal.damaged(f"the record of the ends lacks {error}") from error

    def _constant(self, alpha: float) -> tuple[float, ...]:
        return (alpha,) * len(self.about.tensors)

    # ------------------------------------------------------------------ arms

    def _knobs(self) -> list[Arm]:
        """The rivals: one alpha for everything, and one for attention with the rest fine-tuned."""
        knobs = [self._knob(EVERYTHING, "everything", KNOB)]
        if any(role.attention for role in self.roles.values()):
            knobs.append(self._knob(ATTENTION, "global", ATTENTION_KNOB))
        return knobs

    def _knob(self, name: str, groups: str, values: Sequence[float]) -> Arm:
        space = make_space(self.roles, groups, "finetuned", (min(values), max(values) + 1e-9))
        return Arm(name, name, space, Listed(values), len(values), self.scale, self.journal, self._report)

    def _arms(self, start: float, budget: float) -> Iterator[Arm]:
        """Every searcher with every seed; when the front is searched, once for each emphasis."""
        # searchers plan for the budget the run began with, so that a larger one later only goes on asking
        horizon = self.journal.once("horizon", lambda: {"trials": budget})["trials"]
        legs = emphases(self.config.objective.pareto) if self.config.objective.pareto else {"": {}}
        for name in self.config.searchers:
            space = self._space_of(name)
            problem = self._problem(space, start, horizon / len(legs))
            for seed in self.config.seeds:
                title = name if seed == 0 else f"{name} seed {seed}"
                for leg, emphasis in legs.items():
                    key = f"{name}/{seed}/{leg}".rstrip("/")
                    searcher = make_searcher(name, problem, seed)
                    yield Arm(
                        title, key, space, searcher, budget / len(legs), self.scale, self.journal, self._report,
                        self._rung(), emphasis, problem,
                    )  # fmt: skip

    def _rung(self) -> int:
        """How many parts the search items are cut into for the first look; 1 where there are too few."""
        return self.config.rung if self.scale.parts >= 2 * self.config.rung else 1

    def _report(self, arm: Arm, record: Record, fresh: bool) -> None:
        self.progress(
            "trial", {**record, "arm": arm.name, "key": arm.key, "fresh": fresh, "budget": arm.budget}
        )

    def _start(self) -> float:
        """The best alpha for everything: every arm begins level with the rival."""
        tried = self.journal.under(EVERYTHING).values()
        done = [record for record in tried if record["reward"] is not None]
        return max(done, key=lambda r: r["reward"])["values"][0] if done else START

    def _space_of(self, searcher: str) -> Space:
        """The recipe's space; what it leaves out depends on whether the searcher has gradients."""
        default = DERIVATIVE if searcher in WITH_GRADIENTS else DERIVATIVE_FREE
        words = {**default, **self.config.space.model_dump(exclude_none=True)}
        return make_space(self.roles, words.pop("groups"), words.pop("rest"), **words)

    def _problem(self, space: Space, start: float, horizon: float) -> Problem:
        return Problem(
            space.names, space.low, space.high, space.constant_point(start), self._features(space), horizon,
            self.scale.parts,
        )  # fmt: skip

    def _features(self, space: Space) -> Array:
        """(K, 4), standardised: depth, log relative change, log parameters, attention or not."""
        changes = dict(zip(self.about.tensors, self.about.changes, strict=True))
        sizes = dict(zip(self.about.tensors, self.about.sizes, strict=True))
        layers = 1 + max((r.layer or 0 for r in self.roles.values()), default=0)
        rows = []
        for members in space.members().values():
            depth = np.mean([(self.roles[t].layer or 0) / layers for t in members])
            change = np.log(np.mean([min(changes[t], 1e6) for t in members]) + 1e-12)
            attention = np.mean([self.roles[t].attention for t in members])
            rows.append([depth, change, np.log(sum(sizes[t] for t in members)), attention])
        table = np.array(rows)
        spread = table.std(0)
        standardised: Array = (table - table.mean(0)) / np.where(spread > 0, spread, 1)
        return standardised

    def studies(self) -> dict[str, tuple[Problem, Sequence[Trial]]]:
        """Every arm's problem and trials, for other tools."""
        return {arm.key: (arm.problem, arm.trials) for arm in self.arms if arm.problem is not None}

    # ------------------------------------------------------------------ candidates

    def _best(self, arms: Sequence[Arm]) -> Candidate:
        """The best of the trials of these arms that scored all search data; without alphas if there is none."""
        evaluations = sum(arm.spent for arm in arms)
        nothing = Candidate(arms[0].name, {}, None, feasible=False)
        best = max(self._trials(arms), key=lambda c: c.rank, default=nothing)
        best.evaluations = evaluations
        if isinstance(arms[0].searcher, Listed) and best.alphas:
            best.name = f"{best.name} {min(best.alphas.values()):g}"
        return best

    def _candidate(self, arm: Arm, record: Record, evaluations: float) -> Candidate:
        alphas = np.round(arm.space.alphas(record["values"]), DECIMALS)
        reward = self.scale.reward(record["losses"]).value if arm.emphasis else record["reward"]
        named = self._named([float(a) for a in alphas])
        return Candidate(arm.name, named, reward, record["feasible"], evaluations, record["shares"])

    def _named(self, alphas: Sequence[float]) -> dict[str, float]:
        """Alphas by stored name; every further name of a tensor has the same."""
        named = dict(zip(self.about.tensors, alphas, strict=True))
        return named | {alias: named[tensor] for alias, tensor in self.about.aliases.items()}

    def _end(self, name: str, side: str, alpha: float) -> Candidate:
        """Base or fine-tuned as a candidate."""
        scores = self.scale.ends[side]
        reward = self.scale.reward({k: scores[k].mean_loss for k in self.scale.steering})
        return Candidate(
            name, self._named(self._constant(alpha)), reward.value, reward.feasible, 0, reward.shares
        )

    def _picks(self, candidates: Sequence[Candidate]) -> dict[str, Candidate]:
        """Named points of the front of all full trials (shares on search items): safest, knee, best of each suite."""
        wanted = self.config.objective.pareto
        if not wanted:
            return {}
        every = [*candidates, *self._trials(self.arms)]
        shares = [(c, {s: c.searched[s] for s in wanted}) for c in every]
        useful = [c for c in front(shares) if min(c.searched[s] for s in wanted) >= SAFE]
        if not useful:
            return {}
        names = {"safest": wanted[0]} | {f"best {suite}": suite for suite in wanted[1:]}
        picks = {name: max(useful, key=lambda c: c.searched[suite]) for name, suite in names.items()}
        picks["knee"] = max(useful, key=lambda c: c.rank)
        return {name: replace(c, name=f"{name} ({c.name})") for name, c in picks.items()}

    def _trials(self, arms: Sequence[Arm]) -> Iterator[Candidate]:
        """Every full trial of these arms."""
        for arm in arms:
            for record, trial in zip(arm.records, arm.trials, strict=True):
                if trial.full:
                    yield self._candidate(arm, record, arm.spent)

    # ------------------------------------------------------------------ the verdict

    def _judge(self, knobs: Sequence[Arm], arms: Sequence[Arm]) -> Result:
        """Score ends, knobs and arms once on the held-back items and compare."""
        outer = [self._end("base", "base", 0.0), self._end("fine-tuned", "finetuned", 1.0)]
        rivals = [c for knob in knobs if (c := self._best([knob])).alphas]
        if not rivals:
            raise RunError(
                "No candidate has a finite loss: the average of these two models does not work at any alpha."
            )
        names = dict.fromkeys(arm.name for arm in arms)
        found = [c for name in names if (c := self._best([a for a in arms if a.name == name])).alphas]
        picks = self._picks([*rivals, *found])
        candidates = [*outer, *rivals, *found, *picks.values()]
        self.hold(candidates)
        base, tuned = (c.held for c in outer)
        weights = {key: task.weight for key, task in self.about.tasks.items()}
        rival = max(rivals, key=lambda c: c.rank)
        best = max([*found, rival, *outer], key=lambda c: c.rank)
        verdicts = [
            compare(c.name, c.held, rival.name, rival.held, base, tuned, weights)
            for c in [*found, *picks.values()]
        ]
        shares = {c.name: kept(c.held, base, tuned, weights) for c in candidates}
        curve = knobs[0].records
        heads = {c.name: self._heads(c) for c in (outer[1], best) if c is not outer[0]}
        ledger = self._ledger([*knobs, *arms])
        compared = [self._compared(guest, best, base, tuned, weights) for guest in self.guests]
        candidates += [found.candidate for found in compared]
        shares |= {c.candidate.name: kept(c.candidate.held, base, tuned, weights) for c in compared}
        return Result(
            self.scale, candidates, rival, best, verdicts, shares, picks, curve, heads, ledger, compared
        )

    def _receive(self) -> None:
        """Score every guest on the held-back items; once, while its files stay as they are."""
        jobs = {
            guest_key(guest): Job(tasks=self._held_tasks(), held=True, model=guest.name)
            for guest in self.guests
            if guest_key(guest) not in self.journal
        }
        for number, (key, done) in enumerate(self._do(jobs), 1):
            costs_to_answer = {side: asdict(found) for side, found in done.footprints.items()}
            self.journal.append(
                key, {"held": dump(done.measured), "footprints": costs_to_answer} | costs([done])
            )
            self.progress("held", {"done": number, "of": len(jobs)})

    def _compared(
        self, guest: Guest, best: Candidate, base: Scores, tuned: Scores, weights: Mapping[str, float]
    ) -> Compared:
        record = self.journal[guest_key(guest)]
        candidate = Candidate(guest.name, {}, None, held=load(record["held"]))
        verdict = compare(guest.name, candidate.held, best.name, best.held, base, tuned, weights)
        own, merge = (Footprint(**record["footprints"][side]) for side in ("own", "merge"))
        return Compared(guest, candidate, verdict, own, merge)

    def _held_tasks(self) -> tuple[str, ...]:
        """Tasks with a verdict: all but the regulariser's."""
        return tuple(key for key in self.about.tasks if suite_of(key) != REGULARIZER)

    def hold(self, candidates: Sequence[Candidate]) -> None:
        """Score candidates on the held-back items of every task, watched ones too; once per set of alphas."""
        keys = [f"held back/{_digest(candidate)}" for candidate in candidates]
        missing = {
            key: Job(self._alphas(candidate), self._held_tasks(), held=True)
            for key, candidate in zip(keys, candidates, strict=True)
            if key not in self.journal
        }
        for number, (key, done) in enumerate(self._do(missing), 1):
            self.journal.append(key, {"held": dump(done.measured)} | costs([done]))
            self.progress("held", {"done": number, "of": len(missing)})
        for key, candidate in zip(keys, candidates, strict=True):
            candidate.held = load(self.journal[key]["held"])

    def _heads(self, candidate: Candidate) -> dict[int, list[float]]:
        """Divergence of its attention from the base's, by depth and head; empty where there is nothing to compare."""

        def compute() -> Record:
            ((_, done),) = self._do({candidate.name: Job(self._alphas(candidate), heads=True)})
            return {"heads": dict(done.heads)} | costs([done])

        record = self.journal.once(f"heads/{_digest(candidate)}", compute)
        return {int(depth): row for depth, row in record["heads"].items()}

    def _alphas(self, candidate: Candidate) -> tuple[float, ...]:
        return tuple(candidate.alphas[t] for t in self.about.tensors)

    def _ledger(self, arms: Sequence[Arm]) -> list[Phase]:
        """What each part of the run cost, kills and restarts included."""
        ends = self.journal["ends"]
        rows = [Phase("base and fine-tuned", 2, 2.0, ends["tokens"], ends["seconds"])]
        for name in dict.fromkeys(arm.name for arm in arms):
            records = [r for arm in arms if arm.name == name for r in arm.records]
            spent = sum(r["cost"] for r in records)
            rows.append(Phase(name, len(records), spent, *_sums(records)))
        after = {"held-back items": "held back/", "attention by head": "heads/", "other models": "compared/"}
        for title, start in after.items():
            records = [r for r in self.journal.records() if r["key"].startswith(start)]
            if not records:
                continue
            rows.append(Phase(title, len(records), 0.0, *_sums(records)))
        return rows


def _next(arms: Sequence[Arm]) -> Running | None:
    """A trial of the arm with the fewest running, so that adaptive searchers learn from as much as possible."""
    for arm in sorted(arms, key=lambda arm: len(arm.running)):
        if (trial := arm.start()) is not None:
            return trial
    return None


def _sums(records: Sequence[Record]) -> tuple[int, float]:
    return sum(r["tokens"] for r in records), sum(r["seconds"] for r in records)


def guest_key(guest: Guest) -> str:
    """Where the journal has the scores of a guest."""
    return f"compared/{guest.digest[:16]}"


def _digest(candidate: Candidate) -> str:
    return hashed(candidate.alphas)[:16]


def costs(done: Any, more: int = 0) -> Record:
    """Forward tokens and seconds of jobs, as a record says them."""
    jobs = list(done)
    return {"tokens": more + sum(d.tokens for d in jobs), "seconds": sum(d.seconds for d in jobs)}


def dump(scores: Scores) -> Record:
    """Scores as JSON."""
    return {key: m.to_json() for key, m in scores.items()}


def load(data: Mapping[str, Any]) -> dict[str, Measured]:
    """Scores from JSON."""
    return {key: Measured.from_json(m) for key, m in data.items()}
