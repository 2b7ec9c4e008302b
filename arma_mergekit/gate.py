"""What a release must pass: the rules for a tuning run and for a merged checkpoint, as checks with exit codes.

    symbol   meaning                                                                   shape
    d        mean of (ours - promised) over a task's held-back items, headline values  ()
    e        its error: that of the paired mean, at least ROUNDING of the promise's    ()
    z        normal quantile of 1 - FALSE_ALARMS / (number of comparisons)             ()

    promise  no task has d < -z e: no score is worse than the lock says, beyond the error
    keep     no suite's share kept (verdict.kept) is below what the recipe asks, beyond z errors
    gain     better than one-knob averaging on a suite, no worse on any (verdict.compare)

It knows locks, recipes and models; formats are ci.py's. A promise is in headline scores, which mean the same in every
release; shares are on the scale of a release's own base and fine-tuned model, so keep and gain are judged by its lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from arma_mergekit.checkpoint import AdaptedCheckpoint, open_model
from arma_mergekit.ci import CONSTRAINT, NO_GAIN, WORSE, Check, tradeoff
from arma_mergekit.errors import InputError
from arma_mergekit.evals.base import Measured, Split, paired
from arma_mergekit.evaluation import Asked, Evaluation, aligned, sample
from arma_mergekit.merge.lock import LOCK, read_lock
from arma_mergekit.recipe import Recipe
from arma_mergekit.report import data
from arma_mergekit.report.markup import percent, score
from arma_mergekit.report.words import verdict
from arma_mergekit.verdict import Difference, compare, kept

if TYPE_CHECKING:
    from arma_mergekit.evals.base import Task

__all__ = ["Answers", "check_checkpoint", "check_tuning", "gate"]

FALSE_ALARMS = 0.025  # of a gate whose every comparison is between equals
GAIN = "gain over one knob"
ROUNDING = 0.1  # of a score's own standard error: machines round differently

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """Held-back scores of a merge, and what was asked, by task."""

    scores: Mapping[str, Measured]
    asked: Mapping[str, Asked]


def gate(out: Path, lock: Path, recipe: Path | None, use_recorded: bool) -> tuple[list[Check], str]:
    """Checks of the checkpoint in ``out`` against ``lock``, and a picture in markdown, "" if there is none to draw.

    ``recipe``: to score by, instead of the one in the lock; ``use_recorded``: score nothing, believe the locks.
    InputError for what cannot be compared.
    """
    promised, file = Evaluation.of(read_lock(lock), lock), out / LOCK
    there = read_lock(file) if use_recorded or file.exists() else {}
    own = Evaluation.of(there, file) if use_recorded or there.get("evaluation") else None
    if own is not None and use_recorded:
        ours = recorded(own)
    else:
        ours = measure(out, promised, Recipe.load(recipe) if recipe else recipe_of(promised))
    return check_checkpoint(ours, promised, own), picture(ours, own) if own else ""


def check_tuning(summary: Record) -> list[Check]:
    """Of a finished tuning run: does the best keep what was asked, and does it beat one-knob averaging?"""
    best = data.candidate(summary, summary["best"])
    checks = []
    for suite, least in summary["keep"].items():
        share = best["search_share"][suite]
        told = (
            f"{best['name']} keeps {percent(share)} of {suite} on search items, asked are {percent(least)}."
        )
        checks.append(_check(f"keep {suite}", share >= least, told, CONSTRAINT))
    found = verdict(summary)
    told = found["sentence"] if found else f"No searched merge is better than {summary['best']}."
    return [*checks, _check(GAIN, bool(found and found["dominates"]), told, NO_GAIN)]


def check_checkpoint(ours: Answers, promised: Evaluation, own: Evaluation | None) -> list[Check]:
    """Of a merged checkpoint: against the evaluation in a lock, and by the evaluation of its own lock, if it has one.

    InputError if the lock's scores are of other items.
    """
    _comparable(ours.asked, promised.asked)
    theirs = promised.scores("merged")
    limit = NormalDist().inv_cdf(1 - FALSE_ALARMS / (len(theirs) + len(own.keep if own else ())))
    checks = [_promise(task, ours.scores[task], theirs[task], limit) for task in theirs]
    if own is None:
        reason = "The checkpoint has no lock with an evaluation of its own to judge this by."
        return [*checks, Check("keep", "skipped", reason), Check(GAIN, "skipped", reason)]
    scale = _Scale.of(ours, own)
    shares = scale.shares()
    keeps = [_keeps(suite, least, shares, own, limit) for suite, least in own.keep.items()]
    return [*checks, *keeps, _gain(scale, own)]


def _comparable(ours: Mapping[str, Asked], promised: Mapping[str, Asked]) -> None:
    """InputError unless everything that was promised was asked of ours, of the same items and tokens."""
    if other := [task for task, asked in promised.items() if ours.get(task) != asked]:
        raise InputError(
            f"{', '.join(other)}: the lock has scores of other items, or of other tokens, than these; restore the "
            "evals, data and tokenizer it was made with, or gate against a lock made with these."
        )


def _check(name: str, passed: bool, sentence: str, code: int) -> Check:
    return Check(name, "passed" if passed else "failed", sentence, code)


def _promise(task: str, ours: Measured, promised: Measured, limit: float) -> Check:
    """Whether a task's score is what was promised, within the error."""
    difference, error = paired(ours, promised, "value")
    error = max(error, ROUNDING * promised.stderr)
    told = f"{score(ours.score, ours.stderr)}, promised {score(promised.score)}: "
    told += f"{difference:+.3f} ± {error:.3f} (limit {-limit * error:.3f})."
    return _check(task, difference >= -limit * error, told, WORSE)


@dataclass(frozen=True)
class _Scale:
    """Scores of a checkpoint beside those in its own lock, on the tasks that both answered alike."""

    mine: Mapping[str, Measured]
    base: Mapping[str, Measured]
    tuned: Mapping[str, Measured]
    knob: Mapping[str, Measured]
    weights: Mapping[str, float]

    @classmethod
    def of(cls, ours: Answers, own: Evaluation) -> _Scale:
        tasks = [task for task, asked in own.asked.items() if ours.asked.get(task) == asked]
        base, tuned, knob = (own.scores(side) for side in ("base", "fine-tuned", "one knob"))
        mine, base, tuned, knob = ({t: side[t] for t in tasks} for side in (ours.scores, base, tuned, knob))
        return cls(mine, base, tuned, knob, {t: own.weights.get(t, 1.0) for t in tasks})

    def shares(self) -> dict[str, Difference]:
        """Share kept of each suite."""
        return kept(self.mine, self.base, self.tuned, self.weights)


def _keeps(
    suite: str, least: float, shares: Mapping[str, Difference], own: Evaluation, limit: float
) -> Check:
    """Whether a suite keeps what was asked, within the error, and did on the search items."""
    if suite not in shares:
        return Check(f"keep {suite}", "skipped", "No task of it was scored that tells base from fine-tuned.")
    share = shares[suite]
    told = f"Keeps {percent(share.mean, share.stderr)} of {suite}, asked are {percent(least)}"
    told += "." if own.feasible else "; on the search items it kept less."
    within = share.mean >= least - limit * share.stderr
    return _check(f"keep {suite}", within and own.feasible, told, CONSTRAINT)


def _gain(scale: _Scale, own: Evaluation) -> Check:
    if own.candidate == own.rival:
        return Check(GAIN, "skipped", f"This is one-knob averaging itself: {own.rival}.")
    if not scale.mine:
        return Check(GAIN, "skipped", "No task was scored on the items of the checkpoint's own lock.")
    sides = scale.mine, own.rival, scale.knob, scale.base, scale.tuned, scale.weights
    found = compare("This checkpoint", *sides)
    return _check(GAIN, found.dominates, found.sentence, NO_GAIN)


def picture(ours: Answers, own: Evaluation) -> str:
    """Base, fine-tuned, one knob and this checkpoint by share kept, as `ci.tradeoff` draws them."""
    mine = {suite: share.mean for suite, share in _Scale.of(ours, own).shares().items()}
    there = {side: own.share_kept[side] for side in ("base", "fine-tuned", "one knob")}
    return tradeoff({**there, "this checkpoint": mine}, "this checkpoint")


# ---------------------------------------------------------------------- scores


def recorded(evaluation: Evaluation) -> Answers:
    """What a lock says that its own checkpoint scores."""
    return Answers(evaluation.scores("merged"), evaluation.asked)


def recipe_of(evaluation: Evaluation) -> Recipe:
    """The recipe that the scores were made by; its data lies where that says.

    InputError if the lock has none, or one that names code to run: a lock is data, and may be anybody's.
    """
    if evaluation.recipe is None:
        raise InputError(
            "The lock does not hold the recipe that its scores were made by; give it as --recipe."
        )
    recipe = Recipe.parse(evaluation.recipe, Path(evaluation.recipe_file))
    if code := [spec.code for specs in recipe.evals.values() for spec in specs if spec.code]:
        raise InputError(
            f"The recipe in the lock runs code ({code[0]}); give the recipe itself as --recipe to allow that."
        )
    return recipe


def measure(out: Path, evaluation: Evaluation, recipe: Recipe) -> Answers:
    """Score the checkpoint in ``out`` on the held-back items of an evaluation, as transformers loads it.

    InputError for what cannot be loaded, or not be compared. The base comes and goes before it.
    """
    tasks = _tasks(out, recipe, evaluation.suites)
    held = {key: Split(task.ids, evaluation.holdout).held for key, task in tasks.items()}
    asked = {key: (sample([task.ids[i] for i in held[key]]), task.content) for key, task in tasks.items()}
    _comparable(asked, evaluation.asked)  # before minutes are spent
    model = _load(str(out), None)
    return Answers({key: aligned(task.measure(model, held[key])) for key, task in tasks.items()}, asked)


def _tasks(out: Path, recipe: Recipe, suites: Sequence[str]) -> dict[str, Task]:
    """The tasks of the suites, with the checkpoint's own tokenizer, and prepared with the base."""
    from arma_mergekit.evals import REGULARIZER, make_suites, suite_specs
    from arma_mergekit.load import load_tokenizer, max_positions

    if any(spec.teacher == "finetuned" for specs in suite_specs(recipe, suites).values() for spec in specs):
        raise InputError(
            f"{recipe.path}: a task with `teacher: finetuned` can only be compared with --recorded."
        )
    base: Any = _load(recipe.base_model, recipe.dtype)
    tokenizer = load_tokenizer(recipe.model_copy(update={"base_model": str(out)}))
    rows = len(base.get_input_embeddings().weight)
    made = make_suites(recipe, suites, tokenizer, max_positions(base.config), rows)
    tasks = {f"{suite}/{t.name}": t for suite, found in made.items() if suite != REGULARIZER for t in found}
    for task in tasks.values():
        task.prepare(base)
    return tasks


def _load(ref: str, dtype: str | None) -> Any:
    """A model of its own, in the dtype asked for or else its config's."""
    import torch

    from arma_mergekit.load import as_dtype, build_model

    checkpoint = open_model(ref)
    if isinstance(checkpoint, AdaptedCheckpoint):
        raise InputError(f"{ref} has an adapter, which the gate does not fold; use --recorded.")
    model = build_model(checkpoint.path, as_dtype(dtype, checkpoint))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
