import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import toy
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from arma_mergekit.cli.sweep import command as sweep
from arma_mergekit.cli.tune import command
from arma_mergekit.errors import RecipeError, RunError
from arma_mergekit.load import load_live
from arma_mergekit.plan import plan
from arma_mergekit.recipe import Recipe

SUITES = "general,domain"


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return toy.make_pair(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, invoke(recipe, out)


def invoke(recipe, out, *options, suites=SUITES):
    return CliRunner().invoke(
        command, [str(recipe), "--eval", suites, "--out", str(out), *options], catch_exceptions=False
    )


def command_line(recipe, out):
    return [sys.executable, "-m", "arma_mergekit", "tune", str(recipe), "--eval", SUITES, "--out", str(out)]


def results(out):
    """What a run found, without the times."""
    found = json.loads((out / "summary.json").read_text())
    for key in ("seconds", "recipe"):
        found.pop(key)
    return found, (out / "tuned.yml").read_text().split("\n", 2)[2]


def test_a_run_ends_with_a_table_a_verdict_per_arm_and_the_next_command(finished):
    out, result = finished
    assert result.exit_code == 0
    assert "Held-back items" in result.stdout
    for name in ("base", "fine-tuned", "one knob, everything", "bayes", "rl", "gradient"):
        assert name in result.stdout
    assert f"mergekit-yaml {out / 'tuned.yml'} merged/" in result.stdout
    verdicts = json.loads((out / "summary.json").read_text())["verdicts"]
    assert [v["name"] for v in verdicts] == ["bayes", "rl", "gradient"]
    assert all(v["sentence"] in result.stdout for v in verdicts)


def test_the_winner_keeps_more_of_both_suites_than_either_end(finished):
    out, _ = finished
    found = json.loads((out / "summary.json").read_text())
    by_name = {c["name"]: c for c in found["candidates"]}
    assert by_name[found["best"]]["search_reward"] > 0.3
    assert min(by_name["base"]["share_kept"].values()) == pytest.approx(0, abs=1e-9)
    assert min(by_name["fine-tuned"]["share_kept"].values()) == pytest.approx(0, abs=1e-9)


def test_the_tuned_recipe_plans_without_errors_and_says_what_was_scored(finished):
    out, _ = finished
    found = json.loads((out / "summary.json").read_text())
    alphas = next(c["alphas"] for c in found["candidates"] if c["name"] == found["best"])
    planned = plan(Recipe.load(out / "tuned.yml"))
    assert planned.errors == ()
    got = {t.name: t.alphas[0] for t in planned.tensors if t.name in alphas}
    assert got == pytest.approx(alphas, abs=1e-6)


def test_the_stock_recipe_has_no_word_of_ours(finished):
    out, _ = finished
    stock = yaml.safe_load((out / "stock.yml").read_text())
    assert stock["merge_method"] == "linear"
    assert set(stock) <= {"merge_method", "models", "parameters", "dtype"}


def test_no_searcher_sees_a_held_back_item_or_a_watched_task(finished):
    out, _ = finished
    records = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    ends = next(r for r in records if r["key"] == "ends")["base"]
    held = next(r for r in records if r["key"].startswith("held back"))["held"]
    trials = [r for r in records if "reward" in r]
    assert (
        {key for r in trials for key in r["scores"]}
        == set(ends)
        == {"general/kl:general", "domain/generate:sums"}
    )
    for key, scores in ends.items():
        assert not set(scores["ids"]) & set(held[key]["ids"])
    assert "general/nll:general" in held


def test_the_same_command_again_scores_nothing_and_finds_the_same(finished, recipe):
    out, _ = finished
    before, journal = results(out), (out / "trials.jsonl").read_bytes()
    assert invoke(recipe, out).exit_code == 0
    assert results(out) == before
    assert (out / "trials.jsonl").read_bytes() == journal


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_run_cut_off_anywhere_goes_on_to_the_same_result(finished, recipe, tmp_path, share):
    out, _ = finished
    journal = (out / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(journal[: int(len(journal) * share)])
    assert invoke(recipe, tmp_path).exit_code == 0
    assert results(tmp_path)[0]["candidates"] == results(out)[0]["candidates"]
    assert results(tmp_path)[1] == results(out)[1]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_goes_on_to_the_same_result(finished, recipe, tmp_path):
    out, _ = finished
    call = command_line(recipe, tmp_path)
    for kill in range(20):
        running = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(4 + 0.37 * kill)
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert invoke(recipe, tmp_path).exit_code == 0
    assert results(tmp_path)[0]["candidates"] == results(out)[0]["candidates"]


def test_other_weights_under_the_same_name_are_another_run(recipe, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(recipe.parent, mine)
    (mine / "recipe.yml").write_text(recipe.read_text().replace(str(recipe.parent), str(mine)))
    assert (
        invoke(mine / "recipe.yml", tmp_path / "run", "--searchers", "random", "--trials", "1").exit_code == 0
    )
    weights = load_file(mine / "finetuned" / "model.safetensors")
    save_file({k: v * 1.3 for k, v in weights.items()}, mine / "finetuned" / "model.safetensors")
    with pytest.raises(RunError, match=r"model .*model.safetensors was .*another --out"):
        invoke(mine / "recipe.yml", tmp_path / "run", "--searchers", "random", "--trials", "1")


def test_a_run_that_cannot_start_leaves_no_run_behind(recipe, tmp_path):
    with pytest.raises(RecipeError):
        invoke(recipe, tmp_path / "run", suites="general,domian")
    assert not (tmp_path / "run").exists()


def test_when_nothing_keeps_what_was_asked_the_exit_code_says_so(recipe, tmp_path):
    options = ["--maximize", "general", "--keep", "domain=150%", "--searchers", "random", "--trials", "2"]
    call = command_line(recipe, tmp_path)
    run = subprocess.run([*call, *options], capture_output=True, text=True)
    assert run.returncode == 5
    assert "No candidate keeps 150.0 % of domain" in run.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["feasible"] is False


def test_a_suite_that_cannot_tell_base_from_finetuned_is_refused(recipe, tmp_path):
    text = recipe.read_text().replace("general.jsonl}", "general.jsonl, limit: 6}")
    few = tmp_path / "few.yml"
    few.write_text(text.replace("data: ", f"data: {recipe.parent}/"))
    with pytest.raises(RunError, match=r"Suite general has no task that tells base from fine-tuned"):
        invoke(few, tmp_path / "run")


def test_keep_is_respected_on_the_search_items(recipe, tmp_path):
    options = ["--maximize", "general", "--keep", "domain=90%", "--searchers", "gradient", "--trials", "6"]
    assert invoke(recipe, tmp_path, *options).exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "summary.json").read_text())
    full = [
        r
        for r in records
        if r["key"].startswith("gradient/") and r["part"] is None and not r["wants_gradient"]
    ]
    feasible = [r["reward"] for r in full if r["feasible"]]
    assert all(r["feasible"] == (r["shares"]["domain"] >= 0.9) for r in full)
    gradient = next(c for c in found["candidates"] if c["name"] == "gradient")
    assert gradient["search_reward"] == (max(feasible) if feasible else max(r["reward"] for r in full))


def test_a_run_directory_of_another_recipe_is_refused_naming_what_changed(finished, recipe):
    out, _ = finished
    with pytest.raises(RunError, match=r"recipe: tune.objective.* is .*another --out"):
        invoke(recipe, out, "--maximize", "general", "--keep", "domain=90%")


def test_a_larger_budget_extends_a_run_without_asking_again(finished, recipe, tmp_path):
    out, _ = finished
    before = (out / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(before)
    assert invoke(recipe, tmp_path, "--trials", "6").exit_code == 0
    after = (tmp_path / "trials.jsonl").read_bytes()
    assert after.startswith(before)
    assert {json.loads(line)["key"] for line in after[len(before) :].splitlines()} >= {"bayes/0/4", "rl/0/5"}


def test_an_unknown_suite_is_refused_with_the_nearest_name(recipe, tmp_path):
    with pytest.raises(RecipeError, match="Did you mean general"):
        invoke(recipe, tmp_path, suites="generl,domain")


def test_keep_without_maximize_is_a_usage_error(recipe, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "arma_mergekit", "tune", str(recipe), "--eval", SUITES, "--keep", "domain=9%"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert "--maximize" in run.stderr


def test_mergekit_yaml_ships_the_bits_that_were_scored(finished, recipe, tmp_path):
    out, _ = finished
    merge = [
        sys.executable,
        "-m",
        "arma_mergekit.mergekit_yaml",
        str(out / "tuned.yml"),
        str(tmp_path / "merged"),
    ]
    subprocess.run([*merge, "--quiet"], check=True, capture_output=True)
    found = json.loads((out / "summary.json").read_text())
    alphas = next(c["alphas"] for c in found["candidates"] if c["name"] == found["best"])
    loaded = load_live(Recipe.load(recipe))
    loaded.live.set([alphas[t] for t in loaded.tensors])
    scored = dict(loaded.live.model.named_parameters())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(loaded.tensors) <= set(merged)
    for name in loaded.tensors:
        assert merged[name].dtype == scored[name].dtype
        assert torch.equal(merged[name], scored[name]), name


def full(records, arm):
    return [
        r for r in records if r["key"].startswith(f"{arm}/") and r["status"] == "done" and r["part"] is None
    ]


def journal(out):
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def test_every_arm_starts_at_the_best_alpha_for_everything(finished):
    out, _ = finished
    records = journal(out)
    knob = max(full(records, "one knob, everything"), key=lambda r: r["reward"])["values"][0]
    for arm in ("bayes", "rl"):
        first = next(r for r in records if r["key"] == f"{arm}/0/0")
        assert set(first["values"]) == {knob}


def test_a_front_has_picks_that_nothing_else_beats_and_a_recipe_for_each(recipe, tmp_path):
    options = ["--pareto", SUITES, "--searchers", "random,gradient", "--trials", "14"]
    run = invoke(recipe, tmp_path, *options)
    assert run.exit_code == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert set(found["picks"]) == {"safest", "knee", "best domain"}
    by_name = {c["name"]: c for c in found["candidates"]}
    shares = {pick: by_name[name]["search_share"] for pick, name in found["picks"].items()}
    assert shares["safest"]["general"] >= shares["knee"]["general"] >= shares["best domain"]["general"]
    assert shares["safest"]["domain"] <= shares["knee"]["domain"] <= shares["best domain"]["domain"]
    for pick, name in found["picks"].items():
        planned = plan(Recipe.load(tmp_path / f"tuned-{pick.replace(' ', '-')}.yml"))
        got = {t.name: t.alphas[0] for t in planned.tensors if t.name in by_name[name]["alphas"]}
        assert got == pytest.approx(by_name[name]["alphas"], abs=1e-6)
        assert pick in run.stdout
    asked = {r["key"].split("/")[2] for r in journal(tmp_path) if r["key"].startswith("random/")}
    assert asked == {"balance", "general", "domain"}


def test_more_trials_extend_a_finished_run_once(recipe, tmp_path):
    options = ["--searchers", "random", "--trials", "2"]
    assert invoke(recipe, tmp_path, *options).exit_code == 0
    before = (tmp_path / "trials.jsonl").read_bytes()
    assert invoke(recipe, tmp_path, *options, "--more-trials", "2").exit_code == 0
    after = (tmp_path / "trials.jsonl").read_bytes()
    assert after.startswith(before)
    assert sum(r["cost"] for r in journal(tmp_path) if r["key"].startswith("random/")) == pytest.approx(
        4, abs=0.8
    )
    assert invoke(recipe, tmp_path, *options).exit_code == 0  # an extended run stays extended
    assert (tmp_path / "trials.jsonl").read_bytes() == after
    cut = after[
        : len(before) + 40
    ]  # killed while it was extended: the same command goes on, and adds no more
    (tmp_path / "trials.jsonl").write_bytes(after[: after.index(b"\n", len(cut)) + 1])
    assert invoke(recipe, tmp_path, *options, "--more-trials", "2").exit_code == 0
    assert journal(tmp_path)[-1]["key"] == journal_keys(after)[-1]


def journal_keys(data):
    return [json.loads(line)["key"] for line in data.splitlines()]


def test_interrupted_a_run_leaves_its_best_so_far_and_goes_on_later(recipe, tmp_path):
    call = [*command_line(recipe, tmp_path), "--searchers", "random", "--trials", "400", "--cache", "none"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell's background jobs ignore SIGINT, and so would their children
    running = subprocess.Popen(call, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    journal_file = tmp_path / "trials.jsonl"
    while not (journal_file.exists() and b'"random/0/3"' in journal_file.read_bytes()):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Best so far" in told
    assert "goes on" in told
    assert plan(Recipe.load(tmp_path / "tuned.yml")).errors == ()
    assert not (tmp_path / "summary.json").exists()


def test_a_first_look_at_a_part_saves_half_of_a_hopeless_candidate(recipe, tmp_path):
    halved = tmp_path / "recipe.yml"
    halved.write_text(recipe.read_text().replace("data: ", f"data: {recipe.parent}/") + "  rung: 2\n")
    assert invoke(halved, tmp_path / "run", "--searchers", "random", "--trials", "8").exit_code == 0
    trials = [r for r in journal(tmp_path / "run") if r["key"].startswith("random/")]
    out = [r for r in trials if r["status"] == "ruled out"]
    assert out
    assert {r["cost"] for r in out} == {0.5}
    assert sum(r["cost"] for r in trials) <= 8 < len(trials)
    best = max(r["reward"] for r in trials if r["status"] == "done")
    assert all(r["reward"] < best for r in out)


def test_what_the_command_line_says_of_the_space_is_what_is_searched(recipe, tmp_path):
    options = [
        "--groups",
        "layer",
        "--rest",
        "0.5",
        "--bounds",
        "0",
        "1",
        "--searchers",
        "random",
        "--trials",
        "2",
    ]
    assert invoke(recipe, tmp_path, *options).exit_code == 0
    trials = [r for r in journal(tmp_path) if r["key"].startswith("random/")]
    assert all(len(r["values"]) == 2 and 0 <= min(r["values"]) <= max(r["values"]) <= 1 for r in trials)
    found = json.loads((tmp_path / "summary.json").read_text())
    alphas = next(c["alphas"] for c in found["candidates"] if c["name"] == "random")
    assert alphas["model.layers.0.mlp.up_proj.weight"] == 0.5


def test_a_sweep_recommends_one_alpha_and_shows_the_curve(recipe, tmp_path):
    run = CliRunner().invoke(
        sweep, [str(recipe), "--points", "5", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert run.exit_code == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [row["alpha"] for row in found["curve"]] == [0.25, 0.5, 0.75]
    best = max(found["curve"], key=lambda row: row["reward"])["alpha"]
    assert f"Use one knob, everything {best:g}: on held-back items it keeps" in run.stdout
    assert run.stdout.count("█") > 20


def test_a_report_is_written_with_every_run(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert "gradient" in page


def test_a_regulariser_pulls_the_attention_of_what_is_found_toward_the_base(recipe, tmp_path):
    text = recipe.read_text().replace("data: ", f"data: {recipe.parent}/")
    found = {}
    for weight in (0.0001, 3.0):
        mine = tmp_path / f"{weight}.yml"
        mine.write_text(f"{text}  regularizer: {{text: {recipe.parent}/general.jsonl, weight: {weight}}}\n")
        out = tmp_path / str(weight)
        assert invoke(mine, out, "--searchers", "gradient", "--trials", "12").exit_code == 0
        best = full(journal(out), "gradient")
        found[weight] = max(best, key=lambda r: r["reward"])["losses"]["regularizer/divergence:general"]
        summary = json.loads((out / "summary.json").read_text())
        assert all("regularizer" not in suite for c in summary["candidates"] for suite in c["share_kept"])
        assert "regularizer/divergence:general" in summary["steering"]
    assert found[3.0] < found[0.0001]
