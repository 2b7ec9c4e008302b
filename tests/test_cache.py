import json
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import toy

from arma_mergekit.cache import EvalCache
from arma_mergekit.errors import RunError
from arma_mergekit.recipe import Recipe
from arma_mergekit.run import open_run
from arma_mergekit.worker import Job

SUITES = ["general", "domain"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return Recipe.load(toy.make_pair(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def worker(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    with open_run(recipe, SUITES, root / "run", lambda *_: None, root / "evals.sqlite") as tuner:
        yield tuner.engine.worker


def job(worker, alpha, **more):
    return Job(
        (alpha,) * len(worker.describe().tensors), ("general/kl:general", "domain/generate:sums"), **more
    )


@pytest.fixture
def computed(worker, monkeypatch):
    """Keys of the tasks that were really scored, in order."""
    scored, measure = [], worker._measure
    monkeypatch.setattr(
        worker, "_measure", lambda key, job, items: scored.append(key) or measure(key, job, items)
    )
    return scored


def same(a, b):
    return all(
        np.array_equal(getattr(a.measured[k], column), getattr(b.measured[k], column))
        for k in a.measured
        for column in ("ids", "loss", "value", "weight")
    )


def test_a_score_is_computed_once_and_comes_back_to_the_last_bit(worker, computed):
    first = worker.do(job(worker, 0.37))
    again = worker.do(job(worker, 0.37))
    assert len(computed) == 2
    assert same(first, again)
    assert again.tokens == first.tokens


@pytest.mark.parametrize(
    "other",
    [
        {"alpha": 0.4101},
        {"part": (0, 4)},
        {"part": (1, 4)},
        {"part": (0, 4), "complement": True},
        {"held": True},
        {"gradient": True},
    ],
    ids=str,
)
def test_whatever_differs_in_the_question_is_another_question(worker, computed, other):
    worker.do(job(worker, 0.41))
    before = len(computed)
    worker.do(job(worker, **{"alpha": 0.41, **other}))
    assert len(computed) == before + 2


def test_gradients_come_back_to_the_last_bit(worker, computed):
    first, again = (worker.do(job(worker, 0.53, gradient=True)) for _ in range(2))
    assert len(computed) == 2
    assert all(np.array_equal(first.slopes[k], again.slopes[k]) for k in first.slopes)


def test_one_changed_alpha_of_many_is_another_candidate(worker, computed):
    whole = job(worker, 0.61)
    worker.do(whole)
    worker.do(replace(whole, alphas=(0.62, *whole.alphas[1:])))
    assert len(computed) == 4


def test_a_changed_data_file_or_task_option_is_another_task(recipe, worker, tmp_path):
    contents = {key: task.content for key, task in worker.tasks.items()}
    text = recipe.path.read_text().replace("data: general", f"data: {recipe.path.parent}/general")
    text = text.replace("sums.jsonl}", "sums.jsonl, prefix: 1}").replace(
        "data: sums", f"data: {recipe.path.parent}/sums"
    )
    text = text.replace("data: choices", f"data: {tmp_path}/choices")
    lines = (recipe.path.parent / "choices.jsonl").read_text().splitlines()
    (tmp_path / "choices.jsonl").write_text(
        "\n".join([*lines[:-1], lines[-1].replace('"answer": 0', '"answer": 1')])
    )
    (tmp_path / "other.yml").write_text(text)
    with open_run(Recipe.load(tmp_path / "other.yml"), SUITES, tmp_path / "run", lambda *_: None) as tuner:
        other = {key: task.content for key, task in tuner.engine.worker.tasks.items()}
    changed = {key for key in contents if contents[key] != other[key]}
    assert changed == {"domain/generate:sums", "domain/choice:choices"}


def test_a_task_that_does_not_say_what_it_depends_on_is_never_kept(worker, computed, monkeypatch):
    task = worker.tasks["general/kl:general"]
    monkeypatch.setattr(task, "content", None)
    for _ in range(2):
        worker.do(job(worker, 0.71))
    assert computed.count("general/kl:general") == 2
    assert computed.count("domain/generate:sums") == 1


def test_a_file_that_is_no_cache_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "evals.sqlite").write_text("hello " * 200)
    with pytest.raises(RunError, match=r"Cannot use the evaluation cache .*--cache none"):
        EvalCache(tmp_path / "evals.sqlite")


def test_a_second_run_of_the_same_models_asks_the_cache(recipe, tmp_path):
    settings = {"searchers": ["random"], "trials": 2}
    results = []
    for name in ("one", "two"):
        out, cache = tmp_path / name, tmp_path / "evals.sqlite"
        with open_run(recipe.with_tune(settings), SUITES, out, lambda *_: None, cache) as tuner:
            tuner.run()
            if name == "one":
                rows = stored(cache)
        results.append(
            [
                r
                for line in (out / "trials.jsonl").read_text().splitlines()
                if "losses" in (r := json.loads(line))
            ]
        )
    assert stored(cache) == rows > 0
    assert [r["losses"] for r in results[0]] == [r["losses"] for r in results[1]]


def stored(cache):
    return sqlite3.connect(cache).execute("SELECT count(*) FROM scores").fetchone()[0]
