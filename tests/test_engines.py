"""Real Ray on this machine: two actors, a toy pair, and processes that are really killed."""

import contextlib
import json
import os
import pickle
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import toy
from click.testing import CliRunner

from arma_mergekit import errors
from arma_mergekit.cli.tune import command
from arma_mergekit.engines.local import LocalEngine
from arma_mergekit.engines.ray import LOOPBACK, SETTINGS, TRIES, RayEngine, connect, share_out
from arma_mergekit.errors import ArmaError, CheckpointError, DataError, RecipeError, RunError, UsageError
from arma_mergekit.recipe import Recipe
from arma_mergekit.worker import Job, Worker

os.environ.update(SETTINGS | LOOPBACK)  # read when Ray is imported
ray = pytest.importorskip("ray")

SUITES = ("general", "domain")
TASKS = ("general/kl:general", "domain/python:score")
# a task that kills its process: as often as there are files that tell it to, and always if weights are large
SCORE = """\
import os, pathlib, signal
here = pathlib.Path(__file__).parent

def score(model, tokenizer, records):
    size = float(model.model.embed_tokens.weight.float().norm())
    told = next(here.glob("die*"), None)
    if told or size > float((here / "most").read_text()):
        told and told.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [size] * len(records)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A toy pair whose recipe has relative paths, to be used from its directory."""
    root = tmp_path_factory.mktemp("toy")
    recipe = toy.make_pair(root)
    text = recipe.read_text().replace(f"{root}/", "")
    recipe.write_text(text)
    scored = text.replace("generate: {data: sums.jsonl}", "python: {function: 'score.py:score', limit: 20}")
    (root / "scored.yml").write_text(scored)
    (root / "score.py").write_text(SCORE)
    (root / "most").write_text("inf")
    return root


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of two CPUs that listens on this machine only, started from another directory."""
    elsewhere, before = tmp_path_factory.mktemp("elsewhere"), os.getcwd()
    os.chdir(elsewhere)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    os.chdir(before)
    yield
    ray.shutdown()


@pytest.fixture
def at_root(root, monkeypatch):
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def engine(cluster, at_root):
    with closing(RayEngine(Recipe.load("scored.yml"), SUITES, workers=2)) as engine:
        yield engine


def job(engine, alpha):
    return Job((alpha,) * len(engine.describe().tensors), TASKS)


def scores(done):
    assert done.error is None
    return {key: m.loss.tolist() for key, m in done.measured.items()}


def collect(engine, alphas):
    """Scores of these alphas, by alpha."""
    for alpha in alphas:
        engine.submit(f"{alpha:g}", job(engine, alpha))
    found = [engine.wait() for _ in alphas]
    assert sorted(tag for tag, _ in found) == sorted(f"{alpha:g}" for alpha in alphas)
    return {tag: scores(done) for tag, done in found}


@pytest.mark.slow
def test_killed_actors_are_replaced_and_every_score_is_that_of_this_process(engine, root):
    alphas = [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]
    expected = collect(LocalEngine(Worker(Recipe.load("scored.yml"), SUITES)), alphas)
    for kill in range(engine.workers):
        (root / f"die {kill}").touch()
    assert collect(engine, alphas) == expected
    assert not list(root.glob("die*"))


@pytest.mark.slow
def test_a_job_that_kills_every_actor_fails_and_the_others_do_not(engine, root):
    engine.submit("poison", job(engine, 40.0))
    (root / "most").write_text("50")
    expected = collect(LocalEngine(Worker(Recipe.load("scored.yml"), SUITES)), [0.0, 0.5])
    for alpha in (0.0, 0.5):
        engine.submit(f"{alpha:g}", job(engine, alpha))
    found = dict(engine.wait() for _ in range(3))
    assert found["poison"].error.startswith(f"{TRIES} workers died while they scored it")
    assert {tag: scores(found[tag]) for tag in expected} == expected
    (root / "most").write_text("inf")
    assert collect(engine, [0.5])["0.5"] == expected["0.5"]


def invoke(recipe, out, *options):
    call = [recipe, "--eval", ",".join(SUITES), "--out", str(out), "--searchers", "random", "--trials", "6"]
    return CliRunner().invoke(command, [*call, *options], catch_exceptions=False)


def journal(out):
    lines = (out / "trials.jsonl").read_text().splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def test_a_run_on_two_actors_finds_what_a_run_in_this_process_finds(cluster, at_root, tmp_path):
    cache = tmp_path / "evals.sqlite"
    invoke("recipe.yml", tmp_path / "ray", "--engine", "ray", "--workers", "2", "--cache", str(cache))
    stored = rows(cache)
    invoke("recipe.yml", tmp_path / "local", "--cache", "none")
    invoke("recipe.yml", tmp_path / "cached", "--cache", str(cache))
    parallel, alone, cached = (journal(tmp_path / name) for name in ("ray", "local", "cached"))
    assert parallel.keys() == alone.keys()
    for key, record in alone.items():
        for field in {"values", "losses", "reward", "base", "finetuned", "held"} & record.keys():
            assert parallel[key][field] == record[field] == cached[key][field], key
    assert rows(cache) == stored > 0  # what an actor scored is an answer here


def rows(cache):
    with closing(sqlite3.connect(cache)) as base:
        return base.execute("SELECT count(*) FROM scores").fetchone()[0]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["model", "data", "suite"])
def test_what_a_worker_cannot_use_is_said_as_in_this_process(cluster, root, tmp_path, broken):
    text = (root / "recipe.yml").read_text().replace("data: ", f"data: {root}/")
    text = text.replace(" finetuned\n", f" {root}/finetuned\n", 1).replace(" base\n", f" {root}/base\n")
    change = {
        "model": ("/finetuned\n", "/nowhere\n"),
        "data": ("sums.jsonl", "none.jsonl"),
        "suite": ("", ""),
    }
    (tmp_path / "recipe.yml").write_text(text.replace(*change[broken]))
    kind = {"model": CheckpointError, "data": DataError, "suite": RecipeError}[broken]
    recipe, suites = (
        Recipe.load(tmp_path / "recipe.yml"),
        ("general", "domian" if broken == "suite" else "domain"),
    )
    with pytest.raises(kind) as here:
        Worker(recipe, suites)
    with pytest.raises(kind) as there:
        RayEngine(recipe, suites, workers=1)
    assert type(there.value) is type(here.value)
    assert str(there.value) == str(here.value)


def everything(kind):
    return {kind, *(found for child in kind.__subclasses__() for found in everything(child))}


@pytest.mark.parametrize("kind", sorted(everything(ArmaError), key=lambda kind: kind.__name__))
def test_errors_travel_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("One sentence.")))
    assert type(error) is kind
    assert str(error) == "One sentence."
    assert kind.__name__ in errors.__all__


def test_what_an_actor_needs_travels_between_processes(root):
    recipe = Recipe.load(root / "recipe.yml")
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy == recipe
    assert (copy.path, copy.raw) == (recipe.path, recipe.raw)


@pytest.mark.parametrize(
    ("has", "workers", "count", "needs"),
    [
        ({"CPU": 2.0}, None, 2, {"num_cpus": 1}),
        ({"CPU": 64.0}, None, 4, {"num_cpus": 16}),
        ({"CPU": 64.0}, 16, 16, {"num_cpus": 4}),
        ({"CPU": 64.0, "GPU": 8.0}, None, 8, {"num_cpus": 1, "num_gpus": 1}),
        ({"CPU": 64.0, "GPU": 8.0}, 3, 3, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_devices_are_shared_out(has, workers, count, needs):
    assert share_out(has, workers) == (count, needs)


@pytest.mark.parametrize(("has", "sentence"), [({"CPU": 2.0}, "2 CPUs and no GPU"), ({"GPU": 1.0}, "1 GPUs")])
def test_more_workers_than_devices_is_a_usage_error(has, sentence):
    with pytest.raises(UsageError, match=f"--workers 3 needs .* has {sentence}"):
        share_out(has, 3)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost"])
def test_an_address_where_no_cluster_is_is_refused_at_once(monkeypatch, address):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match=f"No Ray cluster at {address} .*ray start --head"):
        connect(address)


@pytest.mark.parametrize("option", [["--workers", "2"], ["--ray-address", "auto"]])
def test_options_of_a_cluster_need_one(at_root, tmp_path, option):
    with pytest.raises(UsageError, match="need --engine ray"):
        invoke("recipe.yml", tmp_path / "run", *option)


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_running_and_its_run_goes_on(at_root, tmp_path):
    out = tmp_path / "run"
    call = [sys.executable, "-m", "arma_mergekit", "tune", "recipe.yml", "--eval", ",".join(SUITES)]
    call += [
        "--out",
        str(out),
        "--searchers",
        "rl,bayes",
        "--trials",
        "40",
        "--cache",
        "none",
        "--engine",
        "ray",
    ]
    mine = os.environ | {"ARMA_TEST": str(out)}
    running = subprocess.Popen(call, env=mine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and lines(out) < 40:
        time.sleep(0.1)
    assert len(processes(mine["ARMA_TEST"])) > 3
    running.kill()
    running.wait()
    before = (out / "trials.jsonl").read_bytes()
    assert 40 <= lines(out) < 90
    while processes(mine["ARMA_TEST"]):
        time.sleep(0.5)
    done = subprocess.run(call, env=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "trials.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    costs = [record["cost"] for key, record in journal(out).items() if key.startswith("rl/0/")]
    assert 39 < sum(costs) <= 40 + 1e-9


def lines(out):
    return (out / "trials.jsonl").read_bytes().count(b"\n") if (out / "trials.jsonl").exists() else 0


def processes(mark):
    """Those whose environment has this text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [file] if mark.encode() in file.read_bytes() else []
    return found
