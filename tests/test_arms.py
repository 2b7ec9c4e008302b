"""Asking, telling and the journal, without a model: losses are a closed form of the alphas, answers come scrambled."""

import contextlib
import json
import os
import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arma_mergekit.arms import Arm, Listed
from arma_mergekit.errors import RunError
from arma_mergekit.evals.base import Measured, Split
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles
from arma_mergekit.search import SEARCHERS
from arma_mergekit.space import make_space
from arma_mergekit.trials import Journal
from arma_mergekit.tune import Tuner
from arma_mergekit.worker import Description, Done, TaskInfo

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
TENSORS = tuple(f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in KINDS)
IDS = tuple(f"item {k}" for k in range(48))
WANTED = {"general/x": 0.1, "domain/y": 0.9}  # the alpha at which each task is best
TRIALS = 24
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name == "bayes:gp" else name for name in SEARCHERS]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Processes are killed here, not machines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Killed(BaseException):
    """The process is gone."""


class Formula:
    """An engine whose losses are |alpha - wanted|^2 of each task, at ``workers`` jobs a time, in a seeded random order.

    ``killed_after``: so many answers.
    """

    def __init__(self, workers=1, seed=0, killed_after=None, holdout=0.5):
        self.workers, self.random, self.left = workers, random.Random(seed), killed_after
        self.jobs, self.done = {}, []
        self.split = Split(IDS, holdout)

    def describe(self):
        tasks = {key: TaskInfo(IDS, "nats", 1.0, False, True, None) for key in WANTED}
        shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "model_type": "llama"}
        ones = np.linspace(0.5, 1.5, len(TENSORS))
        return Description(TENSORS, {}, ones, (64,) * len(TENSORS), shape, tasks, 0)

    def submit(self, tag, job):
        assert tag not in self.jobs
        self.jobs[tag] = job

    def wait(self):
        if self.left == 0:
            raise Killed
        self.left = None if self.left is None else self.left - 1
        tag = self.random.choice(list(self.jobs)[: self.workers])
        self.done.append((tag, self.jobs[tag]))
        return tag, self.score(self.jobs.pop(tag))

    def score(self, job):
        chosen = self.split.held if job.held else self.split.part(job.part, job.complement)
        alphas = np.array(job.alphas)
        measured = {key: self.measure(alphas - WANTED[key], chosen) for key in job.tasks}
        slopes = {k: 2 * (alphas - WANTED[k]) / len(alphas) for k in job.tasks} if job.gradient else {}
        return Done(measured, slopes, 10 * len(chosen) * len(job.tasks), 0.0)

    def measure(self, away, chosen):
        items = np.array(chosen)
        taste = 0.2 * np.sin(items + 7 * away.sum())  # an item's own, by candidate
        loss = 0.5 + 0.01 * items + float(np.mean(away**2)) + taste
        return Measured(tuple(IDS[i] for i in chosen), loss, -loss, np.ones(len(chosen)), 10 * len(chosen))


def recipe(searcher, **tune):
    content = {
        "merge_method": "arma", "base_model": "base", "models": [{"model": "finetuned"}],
        "tune": {"searchers": [searcher], "trials": TRIALS, **tune},
    }  # fmt: skip
    return Recipe.parse(content, Path("recipe.yml"))


def search(path, name, engine, budget=TRIALS, **options):
    """Ends and one arm over this journal, to its end or to the engine's; the arm as it was at its end."""
    tuner = Tuner(recipe(name, **options), ["general", "domain"], engine, lambda *_: None)
    with closing(Journal(path, {})) as tuner.journal, contextlib.suppress(Killed):
        tuner.prepare()
        tuner.arms = list(tuner._arms(0.7, budget))
        tuner._search(tuner.arms)
        return tuner.arms[0]


def records(path):
    """The arm's trials in a journal, by key."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["key"]: record for record in found if "told_before" in record}


def questions(path):
    """What was asked, by number."""
    found = records(path).items()
    return {int(k.rpartition("/")[2]): (r["values"], r["wants_gradient"], r["told_before"]) for k, r in found}


def spent(path):
    """Full evaluations."""
    return sum(record["cost"] for record in records(path).values())


class FewTexts(Formula):
    """With a regulariser that has fewer items than the suites, so that a part of the data has one of them."""

    key = "regularizer/js"

    def describe(self):
        about = super().describe()
        about.tasks[self.key] = TaskInfo(IDS[:12], "nats", 1.0, False, True, None)
        return about

    def score(self, job):
        done = super().score(replace(job, tasks=tuple(WANTED)))
        few = Split(IDS[:12], 0.5)
        chosen = few.held if job.held else few.part(job.part, job.complement)
        done.measured[self.key] = self.measure(np.array(job.alphas), chosen)
        return replace(done, slopes=done.slopes and {**done.slopes, self.key: 2 * np.array(job.alphas)})


def test_a_part_with_one_text_of_a_regulariser_has_a_score_and_no_error_of_it(tmp_path):
    path = tmp_path / "trials.jsonl"
    js = {"attention": "js", "text": "prose.jsonl", "weight": 0.1}
    search(path, "gradient", FewTexts(), regularizer=js)
    parts = [record for record in records(path).values() if record["part"] is not None]
    alone = [record for record in parts if FewTexts.key not in record["stderr"]]
    assert alone
    assert all(set(record["scores"]) == {*WANTED, FewTexts.key} for record in parts)
    assert all(set(record["stderr"]) >= set(WANTED) for record in parts)


@pytest.mark.parametrize("name", EVERY)
def test_with_one_worker_a_run_cut_off_at_any_record_asks_what_it_would_have_asked(tmp_path, name):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    search(whole, name, Formula())
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines), 5 if name.startswith("bayes") else 2):
        path.write_bytes(b"".join(lines[:cut]))
        search(path, name, Formula(seed=1))
        assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("name", EVERY)
def test_with_several_workers_a_killed_run_goes_on_and_asks_nothing_again(tmp_path, name, workers):
    for seed in range(6):
        path = tmp_path / f"{seed}.jsonl"
        search(path, name, Formula(workers, seed, killed_after=6 + 5 * seed))
        before, answered = path.read_bytes(), records(path)
        engine = Formula(workers, seed + 100)
        search(path, name, engine)
        assert path.read_bytes().startswith(before)
        assert not {tag for tag, _ in engine.done} & set(answered)
        assert sorted(questions(path)) == list(range(len(questions(path))))


@pytest.mark.parametrize("name", ["bayes", "cmaes", "random", "rl"])
def test_questions_open_at_a_kill_are_asked_again_and_no_others(tmp_path, name):
    for seed in range(4):
        path = tmp_path / f"{seed}.jsonl"
        engine = Formula(5, seed, killed_after=20 + seed)
        search(path, name, engine)
        left = {tag: job.alphas for tag, job in engine.jobs.items()}
        engine = Formula(5, seed + 100)
        search(path, name, engine)
        again = {tag: job.alphas for tag, job in engine.done}
        assert len(left) == 5
        assert {tag: again[tag] for tag in left} == left


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("name", EVERY)
def test_no_arm_overspends_and_an_extended_one_asks_on(tmp_path, name, workers):
    path = tmp_path / "trials.jsonl"
    search(path, name, Formula(workers))
    first, asked = spent(path), questions(path)
    search(path, name, Formula(workers), budget=TRIALS + 6)
    assert first <= TRIALS + 1e-9
    assert spent(path) <= TRIALS + 6 + 1e-9
    assert {k: q for k, q in questions(path).items() if k in asked} == asked
    if name != "grid":  # which has no further question
        assert first > TRIALS - 3
    if name not in ("grid", "gradient"):  # which ends when a walk gains nothing
        assert spent(path) > TRIALS


@pytest.mark.parametrize("workers", [2, 5])
def test_every_worker_has_a_job_as_long_as_there_is_budget(tmp_path, workers):
    busy = []

    class Watched(Formula):
        def wait(self):
            busy.append(len(self.jobs))
            return super().wait()

    search(tmp_path / "trials.jsonl", "random", Watched(workers), rung=1)
    assert busy == [2, 1, *[workers] * (TRIALS - workers), *range(workers, 0, -1)]


def test_a_smaller_budget_stops_questions_that_were_open(tmp_path):
    path = tmp_path / "trials.jsonl"
    search(path, "random", Formula(5, seed=1, killed_after=12))
    before = spent(path)
    search(path, "random", Formula(5), budget=before + 1)
    assert spent(path) <= before + 1 + 1e-9


# ---------------------------------------------------------------------- one arm


@contextlib.contextmanager
def an_arm(path, searcher, rung=4, budget=8.0):
    """An arm of one value, the alpha of everything, on the scale of the formula's ends."""
    engine = Formula()
    tuner = Tuner(recipe("random"), ["general", "domain"], engine, lambda *_: None)
    space = make_space(roles(TENSORS, dict(engine.describe().config)), "everything", "finetuned", (-9.0, 9.0))
    with closing(Journal(path, {})) as tuner.journal:
        tuner.prepare()
        yield Arm("a", "a", space, searcher, budget, tuner.scale, tuner.journal, lambda *_: None, rung)


def answer(arm, running):
    """Score a trial to its end."""
    while arm.advance(running, Formula().score(running.job)):
        pass


def finished(path, searcher, **options):
    """An arm whose trials were scored one after the other, until there was none."""
    with an_arm(path, searcher, **options) as arm:
        while (running := arm.start()) is not None:
            answer(arm, running)
    return arm


def test_a_hopeless_candidate_costs_a_rung_and_never_becomes_the_best(tmp_path):
    arm = finished(tmp_path / "j", Listed([0.5, 5.0, -3.0, 0.45, 0.55]))
    assert [r["status"] for r in arm.records] == ["done", "ruled out", "ruled out", "done", "done"]
    assert [r["cost"] for r in arm.records] == [1, 0.25, 0.25, 1, 1]
    assert arm.spent == 3.5
    assert [t.full for t in arm.trials] == [True, False, False, True, True]
    assert not any(r["feasible"] for r in arm.records if r["status"] == "ruled out")
    best = max((t for t in arm.trials if t.full), key=lambda t: t.reward)
    assert all(t.reward < best.reward for t in arm.trials if not t.full)


def test_a_ruled_out_candidate_is_told_about_what_all_items_would_have_said(tmp_path):
    by_rungs = finished(tmp_path / "j", Listed([0.5, 1.2])).trials[1]
    at_once = finished(tmp_path / "k", Listed([0.5, 1.2]), rung=1).trials[1]
    assert by_rungs.estimated
    assert by_rungs.reward == pytest.approx(at_once.reward, abs=0.1)


def test_the_two_halves_of_a_promoted_candidate_are_the_whole(tmp_path):
    by_rungs = finished(tmp_path / "j", Listed([0.45, 0.5]))
    at_once = finished(tmp_path / "k", Listed([0.45, 0.5]), rung=1)
    for one, other in zip(by_rungs.records, at_once.records, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], rel=1e-12)
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-12)
        assert (one["tokens"], one["cost"]) == (other["tokens"], other["cost"])


@pytest.mark.parametrize(("jobs", "cost"), [(0, 0.25), (1, 1.0)], ids=["at the rung", "at the rest"])
def test_a_candidate_that_cannot_be_scored_is_a_failed_trial(tmp_path, jobs, cost):
    error = Done({}, {}, 0, 0.1, "The loss of item 3 is not finite.")
    with an_arm(tmp_path / "j", Listed([0.5])) as arm:
        running = arm.start()
        for _ in range(jobs):
            assert arm.advance(running, Formula().score(running.job))
        assert not arm.advance(running, error)
    (record,) = arm.records
    assert (record["status"], record["reward"], record["error"]) == ("failed", None, error.error)
    assert arm.spent == cost


def test_a_record_is_on_disk_before_the_searcher_is_told(tmp_path):
    path, told = tmp_path / "j", []

    class Watchful(Listed):
        def tell(self, trial):
            last = json.loads(path.read_bytes().splitlines()[-1])
            told.append(last["values"] == list(trial.query.values) and last["reward"] == trial.reward)

    finished(path, Watchful([0.5, 5.0, 0.4]))
    assert told == [True, True, True]


@pytest.mark.parametrize("values", [[0.5, 0.3], [0.5]])
def test_a_searcher_that_asks_otherwise_than_the_journal_answers_is_refused(tmp_path, values):
    finished(tmp_path / "j", Listed([0.5, 0.4]))
    with pytest.raises(RunError, match="answers another question at a/1"):
        finished(tmp_path / "j", Listed(values))


def test_a_searcher_that_must_wait_has_one_question_open(tmp_path):
    class Patient(Listed):
        concurrent = False

    with an_arm(tmp_path / "j", Patient([0.5, 0.4])) as arm:
        running = arm.start()
        assert arm.start() is None
        answer(arm, running)
        assert arm.start() is not None


def test_a_question_that_cannot_be_paid_for_waits_until_another_turns_out_cheap(tmp_path):
    with an_arm(tmp_path / "j", Listed([0.5, 5.0, 0.4]), budget=2.5) as arm:
        answer(arm, arm.start())
        hopeless = arm.start()
        assert arm.start() is None  # 1 spent, 1 reserved, half of one left
        answer(arm, hopeless)
        assert arm.spent == 1.25
        assert arm.start().query.values == (0.4,)
