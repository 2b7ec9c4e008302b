"""A tuning run: ends, one-knob averaging, arms, verdict; every step in the journal before the next begins.

    recipe -> suites + live model -> scorer
    base, fine-tuned                       the scale (and which tasks can tell them apart)
    one knob                               averaging of everything, and of attention only: the rivals to beat
    each arm (searcher, seed)              ask -> score -> journal -> tell, until its budget is spent
    held-back items                        the best of each arm once, beside base, fine-tuned and one knob

It cannot tell one searcher from another. Budgets are equal: cost is counted in forward tokens, a backward pass double.
Killed and started again with the same recipe, a run asks the same questions, finds the answers in its journal and goes
on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit import __version__
from arma_mergekit.errors import DataError, RunError
from arma_mergekit.evals import make_suites
from arma_mergekit.evals.base import Measured
from arma_mergekit.live import LiveModel
from arma_mergekit.load import Loaded, load_live, load_tokenizer
from arma_mergekit.objective import Reward
from arma_mergekit.plan import Plan, plan
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles
from arma_mergekit.scoring import DECIMALS, Scored, Scorer, Separation
from arma_mergekit.search import make_searcher
from arma_mergekit.search.base import Problem, Query, Trial
from arma_mergekit.space import Space, make_space
from arma_mergekit.trials import Journal
from arma_mergekit.verdict import Verdict, compare, suite_shares

__all__ = ["Arm", "Candidate", "Result", "Tuner"]

Array = npt.NDArray[np.float64]
Progress = Callable[[str, Mapping[str, Any]], None]

START = 0.75
KNOB = tuple(round(0.1 * k, 1) for k in range(1, 10))
ATTENTION_KNOB = (0.0, 0.2, 0.4, 0.6, 0.8)
DERIVATIVE_FREE = {"groups": "kind", "rest": "kind", "bounds": (-0.5, 1.5)}
DERIVATIVE = {"groups": "tensor", "rest": "tensor", "bounds": (-1.0, 2.5)}


@dataclass(frozen=True)
class Arm:
    """One searcher with one seed."""

    searcher: str
    seed: int

    @property
    def name(self) -> str:
        """`bayes`, or `bayes seed 1`."""
        return self.searcher if self.seed == 0 else f"{self.searcher} seed {self.seed}"


@dataclass
class Candidate:
    """A merge that was found: its alphas by checkpoint tensor, its search reward, and its held-back scores.

    ``reward`` is None when every trial failed.
    """

    name: str
    alphas: dict[str, float]
    reward: float | None
    feasible: bool = True
    evaluations: float = 0.0
    held: dict[str, Measured] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[bool, float]:
        """What the best is picked by: feasible ones first, then the search reward."""
        return self.feasible, -np.inf if self.reward is None else self.reward


@dataclass(frozen=True)
class Result:
    """What a run found; ``best`` has the highest search reward of all, ``rival`` that of the one-knob averages."""

    ends: Mapping[str, Mapping[str, Measured]]
    separation: Sequence[Separation]
    candidates: Sequence[Candidate]
    rival: Candidate
    best: Candidate
    verdicts: Sequence[Verdict]
    shares: Mapping[str, Mapping[str, float]]
    tokens: int
    seconds: float


class Tuner:
    """One run in one directory. ``suites``: names of the recipe's suites to balance."""

    def __init__(self, recipe: Recipe, suites: Sequence[str], out: Path, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        options = recipe.tune.objective.options(suites)
        planned = plan(recipe, require_alpha=False).check()
        for warning in planned.warnings:
            progress("warning", {"text": warning})
        progress("load", {"base": recipe.base_model, "tuned": recipe.finetuned[0].model})
        self.loaded: Loaded = load_live(recipe)
        limits = {"max_positions": self.loaded.max_positions, "vocabulary": self.loaded.vocabulary}
        tasks = make_suites(recipe, suites, load_tokenizer(recipe), **limits)
        self.scorer = Scorer(self.live, tasks, recipe.tune.holdout)
        self.scorer.objective_options = options
        self.roles = roles(self.loaded.tensors, self.config)
        for searcher in recipe.tune.searchers:
            self._space_of(searcher)
        # last: what cannot start leaves no run behind
        self.journal = Journal(out / "trials.jsonl", fingerprint(recipe, suites, planned))

    @property
    def live(self) -> LiveModel:
        """The model candidates are set in."""
        return self.loaded.live

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the base, as a dictionary."""
        config: Any = self.live.model.config
        return dict(config.to_dict())

    def run(self) -> Result:
        """Do whatever the journal does not hold yet, and return the result."""
        ends = self._ends()
        found = self.scorer.use_ends(ends, self.recipe.tune.keep_weak)
        self.progress("separation", {"tasks": found, "steering": list(self.scorer.steering)})
        knobs = [self._knob("one knob, everything", "everything", "finetuned", KNOB)]
        if any(r.attention for r in self.roles.values()):
            knobs.append(self._knob("one knob, attention", "global", "finetuned", ATTENTION_KNOB))
        arms = [
            self._arm(Arm(s, seed)) for s in self.recipe.tune.searchers for seed in self.recipe.tune.seeds
        ]
        return self._judge(ends, found, [k for k in knobs if k.alphas], [a for a in arms if a.alphas])

    def _ends(self) -> dict[str, dict[str, Measured]]:
        record = self.journal.once(
            "ends", lambda: {k: dump(v) for k, v in self.scorer.measure_ends().items()}
        )
        try:
            return {side: load(record[side]) for side in ("base", "finetuned")}
        except (KeyError, TypeError) as error:
            raise self.journal.damaged(f"the record of the ends lacks {error}") from error

    def space(self, groups: str | float, rest: str | float, bounds: tuple[float, float]) -> Space:
        """A search space over the tensors that differ."""
        return make_space(self.roles, groups, rest, bounds)

    def _knob(self, name: str, groups: str, rest: str, values: Sequence[float]) -> Candidate:
        """The best of a few values of one alpha."""
        space = self.space(groups, rest, (0.0, 1.0))
        trials = [self._score(f"{name}/{v}", name, space, Query((v,))) for v in values]
        best = self._best(name, space, trials, len(values))
        if best.alphas:
            best.name = (
                f"{name} {next(v for v, t in zip(values, trials, strict=True) if t.reward == best.reward):g}"
            )
        return best

    def _arm(self, arm: Arm) -> Candidate:
        """Ask, score, journal, tell until the budget is spent or the searcher has no further question."""
        space = self._space_of(arm.searcher)
        problem = self._problem(space)
        searcher = make_searcher(arm.searcher, problem, arm.seed)
        spent, trials = 0.0, list[Trial]()
        budget = float(self.recipe.tune.trials)
        while (query := searcher.ask()) is not None and spent + query.cost <= budget + 1e-9:
            trial = self._score(f"{arm.searcher}/{arm.seed}/{len(trials)}", arm.name, space, query, budget)
            spent += query.cost
            searcher.tell(trial)
            trials.append(trial)
        return self._best(arm.name, space, trials, spent)

    def _best(self, name: str, space: Space, trials: Sequence[Trial], evaluations: float) -> Candidate:
        """The best of the trials that scored all search data; without alphas if there is none."""
        found = [self._candidate(name, space, t, evaluations) for t in trials if t.full]
        nothing = Candidate(name, {}, None, feasible=False, evaluations=evaluations)
        return max(found, key=lambda c: c.rank, default=nothing)

    def _space_of(self, searcher: str) -> Space:
        """The recipe's space; what it leaves out depends on whether the searcher has gradients."""
        default = DERIVATIVE if searcher == "gradient" else DERIVATIVE_FREE
        words = {**default, **self.recipe.tune.space.model_dump(exclude_none=True)}
        return self.space(words["groups"], words["rest"], tuple(words["bounds"]))

    def _problem(self, space: Space) -> Problem:
        # searchers plan for the budget the run began with, so that a larger one later only goes on asking
        horizon = self.journal.once("horizon", lambda: {"trials": self.recipe.tune.trials})["trials"]
        return Problem(
            space.names, space.low, space.high, space.constant_point(START), self._features(space),
            float(horizon), self.scorer.parts,
        )  # fmt: skip

    def _features(self, space: Space) -> Array:
        """(K, 4), standardised: depth, log relative change, log parameters, attention or not."""
        norms = dict(zip(self.loaded.tensors, self.live.delta_norms(), strict=True))
        sizes = dict(zip(self.loaded.tensors, self.live.sizes(), strict=True))
        layers = 1 + max((r.layer or 0 for r in self.roles.values()), default=0)
        rows = []
        for members in space.members().values():
            depth = np.mean([(self.roles[t].layer or 0) / layers for t in members])
            change = np.log(np.mean([min(norms[t], 1e6) for t in members]) + 1e-12)
            attention = np.mean([self.roles[t].attention for t in members])
            rows.append([depth, change, np.log(sum(sizes[t] for t in members)), attention])
        table = np.array(rows)
        spread = table.std(0)
        standardised: Array = (table - table.mean(0)) / np.where(spread > 0, spread, 1)
        return standardised

    def _score(self, key: str, arm: str, space: Space, query: Query, budget: float | None = None) -> Trial:
        """The trial of a query, from the journal or scored now. A failed one has no reward."""
        fresh = key not in self.journal
        started = time.monotonic()
        record = self.journal.once(key, lambda: self._record(space, query))
        if record["values"] != list(query.values):
            raise_changed(key, self.journal.path)
        seconds = time.monotonic() - started
        self.progress(
            "trial",
            {**record, "arm": arm, "fresh": fresh, "seconds": seconds, "budget": budget, "cost": query.cost},
        )
        gradient = record["gradient"]
        details = {"feasible": float(record["feasible"])}
        return Trial(query, record["reward"], None if gradient is None else tuple(gradient), details)

    def _record(self, space: Space, query: Query) -> dict[str, Any]:
        asked = {"values": query.values, "wants_gradient": query.gradient, "part": query.part}
        started = time.monotonic()
        try:
            scored: Scored = self.scorer.score(space, query)
        except (
            DataError
        ) as error:  # a candidate whose loss is not finite is a failed trial, not the end of the run
            return asked | {
                "status": "failed", "error": str(error), "reward": None, "gradient": None, "feasible": False,
                "tokens": 0, "seconds": time.monotonic() - started,
            }  # fmt: skip
        reward: Reward = scored.reward
        return asked | {
            "status": "done",
            "reward": reward.value,
            "feasible": reward.feasible,
            "shares": dict(reward.shares),
            "gradient": None if scored.gradient is None else [float(g) for g in scored.gradient],
            "scores": {k: m.score for k, m in scored.measured.items()},
            "stderr": {k: m.stderr for k, m in scored.measured.items()},
            "losses": {k: m.mean_loss for k, m in scored.measured.items()},
            "tokens": scored.tokens,
            "seconds": time.monotonic() - started,
        }

    def _candidate(self, name: str, space: Space, trial: Trial, evaluations: float) -> Candidate:
        alphas = np.round(space.alphas(trial.query.values), DECIMALS)
        named = {t: float(a) for t, a in zip(space.tensors, alphas, strict=True)}
        named |= {alias: named[tensor] for alias, tensor in self.loaded.aliases.items()}
        return Candidate(name, named, trial.reward, bool(trial.details["feasible"]), evaluations)

    def _end(self, name: str, alpha: float, scores: Mapping[str, Measured]) -> Candidate:
        """Base or fine-tuned as a candidate."""
        reward = self.scorer.objective().reward({k: scores[k].mean_loss for k in self.scorer.steering})
        named = dict.fromkeys([*self.loaded.tensors, *self.loaded.aliases], alpha)
        return Candidate(name, named, reward.value, reward.feasible)

    def _judge(
        self,
        ends: dict[str, dict[str, Measured]],
        found: list[Separation],
        knobs: list[Candidate],
        arms: list[Candidate],
    ) -> Result:
        """Score ends, knobs and arms once on the held-back items and compare."""
        outer = [self._end("base", 0.0, ends["base"]), self._end("fine-tuned", 1.0, ends["finetuned"])]
        if not knobs:
            raise RunError(
                "No candidate has a finite loss: the average of these two models does not work at any alpha."
            )
        candidates = [*outer, *knobs, *arms]
        for candidate in candidates:
            candidate.held = self.held(candidate)
        base, tuned = (c.held for c in outer)
        weights = {key: task.weight for key, task in self.scorer.tasks.items()}
        rival = max(knobs, key=lambda c: c.rank)
        best = max([*arms, rival, *outer], key=lambda c: c.rank)
        verdicts = [compare(a.name, a.held, rival.name, rival.held, base, tuned, weights) for a in arms]
        shares = {c.name: suite_shares(c.held, base, tuned, weights) for c in candidates}
        tokens = sum(r.get("tokens", 0) for r in self.journal.records())
        seconds = sum(r.get("seconds", 0.0) for r in self.journal.records())
        return Result(ends, found, candidates, rival, best, verdicts, shares, tokens, seconds)

    def held(self, candidate: Candidate) -> dict[str, Measured]:
        """Scores of a candidate on the held-back items of every task, watched ones too; once per set of alphas."""
        key = hashlib.sha256(json.dumps(candidate.alphas, sort_keys=True).encode()).hexdigest()[:16]

        def compute() -> dict[str, Any]:
            self.live.set([candidate.alphas[t] for t in self.loaded.tensors])
            started = time.monotonic()
            held = dump(self.scorer.measure(list(self.scorer.tasks), held=True))
            return {"held": held, "seconds": time.monotonic() - started}

        self.progress("held", {"name": candidate.name})
        return load(self.journal.once(f"held back/{key}", compute)["held"])


def fingerprint(recipe: Recipe, suites: Sequence[str], planned: Plan) -> dict[str, Any]:
    """What makes a run the same run: recipe, models, data, suites, package; not the budget, seeds and searchers."""
    content = recipe.model_dump(mode="json")
    for key in ("trials", "seeds", "searchers"):
        content.get("tune", {}).pop(key, None)
    data = {str(t.data): recipe.data_path(t.data) for suite in suites for t in recipe.evals.get(suite, ())}
    models = [planned.base, *planned.finetuned] if planned.base else []
    return {
        "recipe": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
        "suites": sorted(suites),
        "data": {name: digest(path) for name, path in sorted(data.items())},
        "models": {f"{model.ref}: {file.name}": digest(file) for model in models for file in model.files},
        "version": __version__,
    }


def digest(path: Path) -> str:
    """Half of a file's sha256, in hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()[:32]


def dump(scores: Mapping[str, Measured]) -> dict[str, Any]:
    """Scores as JSON."""
    return {
        key: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(m).items()}
        for key, m in scores.items()
    }


def load(data: Mapping[str, Any]) -> dict[str, Measured]:
    """Scores from JSON."""
    scores = {}
    for key, m in data.items():
        loss, value, weight = (np.array(m[k], dtype=np.float64) for k in ("loss", "value", "weight"))
        scores[key] = Measured(tuple(m["ids"]), loss, value, weight, m["tokens"])
    return scores


def raise_changed(key: str, path: Path) -> None:
    """A searcher asked another question than the journal answers: its code or a library changed."""
    raise RunError(
        f"{path} answers another question at {key} than is asked now: a searcher or library changed since. "
        "Give another --out."
    )
