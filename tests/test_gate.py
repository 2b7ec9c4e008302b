import contextlib
import copy
import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import toy
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from arma_mergekit import evaluation
from arma_mergekit.ci import exit_code
from arma_mergekit.cli.gate import command
from arma_mergekit.cli.merge import command as merge
from arma_mergekit.cli.tune import command as tune
from arma_mergekit.errors import InputError, RunError
from arma_mergekit.evals.base import Measured
from arma_mergekit.evaluation import Evaluation
from arma_mergekit.gate import FALSE_ALARMS, Answers, check_checkpoint

WEIGHTS, LOCK = "model.safetensors", "arma.lock.json"
KL, SUMS = "general/kl:general", "domain/generate:sums"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A toy pair, its run, and two merges: `tuned` and `one-knob`, each with its lock."""
    root = tmp_path_factory.mktemp("gate")
    recipe = toy.make_pair(root)
    options = [
        "--searchers",
        "gradient",
        "--trials",
        "4",
        "--out",
        str(root / "run"),
        "--eval",
        "general,domain",
    ]
    assert CliRunner().invoke(tune, [str(recipe), *options]).exit_code == 0
    for name in ("tuned", "one-knob"):
        words = [str(root / "run" / f"{name}.yml"), str(root / name), "--quiet"]
        assert CliRunner().invoke(merge, words).exit_code == 0
        with edited(root / name) as lock:
            lock["evaluation"] = evaluation.of_run(root / "run", lock)
    return root


class edited:  # noqa: N801
    """A lock to change within the block."""

    def __init__(self, out):
        self.file = out / LOCK

    def __enter__(self):
        self.lock = json.loads(self.file.read_text())
        return self.lock

    def __exit__(self, *error):
        self.file.write_text(json.dumps(self.lock))


@pytest.fixture
def tuned(made, tmp_path):
    """A copy of the tuned merge, to be damaged."""
    return shutil.copytree(made / "tuned", tmp_path / "tuned")


def lock_of(out):
    return json.loads((out / LOCK).read_text())


def evaluation_of(out):
    return Evaluation.of(lock_of(out), out / LOCK)


def gate(out, *options):
    """Exit code and JSON."""
    run = CliRunner().invoke(command, [str(out), "--json", *map(str, options)], standalone_mode=False)
    if run.exception:
        raise run.exception
    return run.return_value, {check["name"]: check for check in json.loads(run.stdout)["checks"]}


# ---------------------------------------------------------------------- a checkpoint


def test_a_checkpoint_scores_what_was_found_when_it_was_tuned(made, tmp_path):
    code, checks = gate(made / "tuned", "--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md")
    assert code == 0
    assert {check["outcome"] for check in checks.values()} == {"passed"}
    assert set(checks) == {*lock_of(made / "tuned")["evaluation"]["samples"], "gain over one knob"}
    assert all("+0.000 ±" in check["sentence"] for name, check in checks.items() if "/" in name)
    assert ElementTree.parse(tmp_path / "j.xml").find("testsuite").get("tests") == str(len(checks))
    assert '"this checkpoint"' in (tmp_path / "s.md").read_text()


def test_scores_of_a_checkpoint_are_those_of_the_live_model_item_by_item(made):
    from arma_mergekit.gate import measure, recipe_of

    promised = evaluation_of(made / "tuned")
    ours, theirs = (
        measure(made / "tuned", promised, recipe_of(promised)).scores,
        promised.scores("merged"),
    )
    assert set(ours) == set(theirs)
    for task, mine in ours.items():
        assert mine.ids == theirs[task].ids
        np.testing.assert_allclose(mine.value, theirs[task].value, rtol=1e-5, atol=1e-6)


def test_damaged_weights_fail_naming_the_task_and_how_far_it_fell(tuned):
    weights = load_file(tuned / WEIGHTS)
    weights["model.layers.1.mlp.down_proj.weight"] *= 0.2
    save_file(weights, tuned / WEIGHTS, {"format": "pt"})
    code, checks = gate(tuned)
    assert code == 7
    assert checks[KL]["outcome"] == "failed"
    assert ", promised -0." in checks[KL]["sentence"]


def test_another_tokenizer_is_found_out(tuned):
    file = tuned / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"general/kl:general.*other tokens"):
        gate(tuned)


def test_one_knob_averaging_itself_needs_no_gain_over_one_knob(made):
    code, checks = gate(made / "one-knob")
    assert code == 0
    assert checks["gain over one knob"]["outcome"] == "skipped"


def test_a_release_that_is_worse_than_another_fails_against_that(made):
    for options in ([], ["--recorded"]):
        code, checks = gate(made / "one-knob", "--against", made / "tuned" / LOCK, *options)
        assert code == 7
        assert checks[SUMS]["outcome"] == "failed"


def test_a_better_release_passes_against_a_worse_one(made):
    assert gate(made / "tuned", "--against", made / "one-knob" / LOCK)[0] == 0


def test_recorded_numbers_are_compared_without_a_model_or_data(tuned):
    (tuned / WEIGHTS).unlink()
    (tuned / "config.json").unlink()
    assert gate(tuned, "--recorded")[0] == 0


def test_a_constraint_is_violated_only_beyond_the_error(tuned):
    share = lock_of(tuned)["evaluation"]["share_kept"]["merged"]["domain"]
    for least, expected in ((share + 0.01, 0), (share + 0.3, 5)):
        with edited(tuned) as lock:
            lock["evaluation"]["keep"] = {"domain": least}
        code, checks = gate(tuned, "--recorded")
        assert code == expected
        assert "of domain, asked are" in checks["keep domain"]["sentence"]


def test_what_the_search_could_not_keep_is_not_kept(tuned):
    with edited(tuned) as lock:
        lock["evaluation"] |= {"keep": {"domain": 0.1}, "feasible": False}
    code, checks = gate(tuned, "--recorded")
    assert code == 5
    assert "on the search items it kept less" in checks["keep domain"]["sentence"]


def test_no_gain_over_one_knob_is_six(tuned):
    with edited(tuned) as lock:
        for columns in lock["evaluation"]["items"].values():
            columns["one knob"] = columns["merged"]
    code, checks = gate(tuned, "--recorded")
    assert code == 6
    assert "no better than" in checks["gain over one knob"]["sentence"]


def test_a_checkpoint_without_a_lock_is_held_to_the_promise_alone(tuned, made):
    (tuned / LOCK).unlink()
    code, checks = gate(tuned, "--against", made / "tuned" / LOCK)
    assert code == 0
    assert {name for name, check in checks.items() if check["outcome"] == "skipped"} == {
        "keep",
        "gain over one knob",
    }


def test_what_the_own_lock_has_no_scores_of_is_not_judged_by_it(tuned, made):
    with edited(tuned) as lock:
        lock["evaluation"]["samples"] = dict.fromkeys(lock["evaluation"]["samples"], "other")
        lock["evaluation"]["keep"] = {"domain": 0.9}
    code, checks = gate(tuned, "--against", made / "tuned" / LOCK)
    assert code == 0
    assert {name for name, check in checks.items() if check["outcome"] == "skipped"} == {
        "keep domain",
        "gain over one knob",
    }


def test_scores_of_other_items_are_not_compared(made, tmp_path):
    for name in ("recipe.yml", "general.jsonl", "choices.jsonl"):
        shutil.copy(made / name, tmp_path / name)
    lines = (made / "sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sums.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(InputError, match=r"^domain/generate:sums: the lock has scores of other items"):
        gate(made / "tuned", "--recipe", tmp_path / "recipe.yml")


def test_an_edited_item_under_the_same_id_is_another_item(made, tmp_path):
    for name in ("recipe.yml", "general.jsonl", "choices.jsonl"):
        shutil.copy(made / name, tmp_path / name)
    (tmp_path / "sums.jsonl").write_text(
        (made / "sums.jsonl").read_text().replace('"prompt": "1+1', '"prompt": "1+2')
    )
    with pytest.raises(InputError, match=r"^domain/generate:sums: the lock has scores of other items"):
        gate(made / "tuned", "--recipe", tmp_path / "recipe.yml")


def test_a_lock_that_promises_nothing_is_refused_with_a_remedy(tuned):
    with edited(tuned) as lock:
        lock["evaluation"] = None
    with pytest.raises(InputError, match=r"promises no scores.*arma-tune"):
        gate(tuned)


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ({"python": {"function": "my.py:score", "limit": 3}}, r"my\.py:score"),
        ({"lm_eval": {"tasks": ["mine"], "include_path": "tasks"}}, "tasks"),
    ],
    ids=["python", "lm_eval"],
)
def test_a_lock_runs_no_code(tuned, task, named):
    with edited(tuned) as lock:
        lock["evaluation"]["recipe"]["evals"]["domain"] = [task]
    with pytest.raises(InputError, match=rf"runs code \({named}\); give the recipe itself"):
        gate(tuned)


def test_a_missing_lock_is_an_input_error(tuned):
    with pytest.raises(InputError, match=r"none\.json"):
        gate(tuned, "--against", tuned / "none.json")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_lock_ends_with_a_sentence(made, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("damaged")
    lock = lock_of(made / "tuned")
    spot = lock["evaluation"]
    while isinstance(spot, dict) and spot:
        above, key = spot, data.draw(st.sampled_from(sorted(spot)))
        spot = spot[key]
        if data.draw(st.booleans()):
            break
    above[key] = data.draw(
        st.sampled_from([None, 3, "x", [], {}, [None], {"x": "y"}, float("nan"), "nan inf"])
    )
    (out / LOCK).write_text(json.dumps(lock))
    with contextlib.suppress(InputError):
        gate(out, "--recorded")


# ---------------------------------------------------------------------- the rule

N = 200


def answers(accuracies, seed):
    rng = np.random.default_rng(seed)
    values = {f"s/{k}": (rng.random(N) < p).astype(float) for k, p in enumerate(accuracies)}
    ids = {t: tuple(f"{t} {i}" for i in range(N)) for t in values}
    return {t: Measured(ids[t], -v, v, np.ones(N), 0) for t, v in values.items()}


def promise_of(scores):
    """An evaluation with these scores as those of every side."""
    lines = {t: " ".join(map(str, evaluation.aligned(m).value)) for t, m in scores.items()}
    weight = {"weight": " ".join("1" * N)}
    return Evaluation(
        candidate="a", rival="b", feasible=True, keep={}, holdout=0.5, suites=("s",), recipe_file="", recipe=None,
        items={t: weight | dict.fromkeys(evaluation.SIDES, line) for t, line in lines.items()}, contents={},
        samples={t: evaluation.sample(m.ids) for t, m in scores.items()},
        share_kept={side: {} for side in evaluation.SIDES},
    )  # fmt: skip


def judged(ours, promised):
    there = promise_of(promised)
    mine = Answers({t: evaluation.aligned(m) for t, m in ours.items()}, there.asked)
    return exit_code(check_checkpoint(mine, there, None))


@pytest.mark.parametrize("tasks", [1, 6])
def test_equals_raise_a_false_alarm_as_seldom_as_promised_however_many_tasks(tasks):
    gates = 400
    rates = [0.6] * tasks
    alarms = sum(judged(answers(rates, 2 * k), answers(rates, 2 * k + 1)) == 7 for k in range(gates))
    assert alarms <= gates * FALSE_ALARMS + 3 * (gates * FALSE_ALARMS) ** 0.5


def test_a_clear_drop_of_one_task_among_many_is_found():
    found = [judged(answers([0.6] * 5 + [0.35], 2 * k), answers([0.6] * 6, 2 * k + 1)) for k in range(20)]
    assert found.count(7) >= 19


def test_gains_never_fail():
    assert judged(answers([0.9, 0.8], 0), answers([0.2, 0.3], 1)) == 0


def test_differences_are_paired():
    promised = answers([0.6], 0)
    value = promised["s/0"].value.copy()
    value[np.flatnonzero(value)[:12]] = 0  # 6 points, one and a half unpaired errors, three paired ones
    ours = {"s/0": Measured(promised["s/0"].ids, -value, value, np.ones(N), 0)}
    assert judged(ours, promised) == 7


def test_rounding_of_another_machine_is_no_drop():
    promised = answers([0.6], 0)
    value = promised["s/0"].value - 1e-4  # the same for each item, so of no paired error at all
    assert judged({"s/0": Measured(promised["s/0"].ids, -value, value, np.ones(N), 0)}, promised) == 0


def test_the_order_of_items_does_not_matter():
    promised = answers([0.6], 0)["s/0"]
    order = np.random.default_rng(0).permutation(N)
    ids = tuple(promised.ids[i] for i in order)
    mixed = Measured(ids, promised.loss[order], promised.value[order], promised.weight[order], 0)
    same, moved = evaluation.aligned(promised), evaluation.aligned(mixed)
    assert same.ids == moved.ids
    assert (same.value == moved.value).all()


# ---------------------------------------------------------------------- what a lock carries


def test_a_lock_has_the_scores_of_the_run_to_seven_digits(made):
    found = lock_of(made / "tuned")["evaluation"]
    assert (found["candidate"], found["rival"].startswith("one knob")) == ("gradient", True)
    for side in evaluation.SIDES:
        for task, measured in evaluation_of(made / "tuned").scores(side).items():
            held = found["held_back"][side][task]
            assert measured.score == pytest.approx(held["score"], rel=1e-6, abs=1e-9)
            assert measured.stderr == pytest.approx(held["stderr"], rel=1e-5, abs=1e-9)


def test_no_id_of_an_item_is_in_a_lock(made):
    text = json.dumps(lock_of(made / "tuned")["evaluation"]["items"])
    assert "1+1=?" in (made / "sums.jsonl").read_text()
    assert "+" not in text.replace("e+", "")


def test_the_rival_is_known_as_such(made):
    found = lock_of(made / "one-knob")["evaluation"]
    assert found["candidate"] == found["rival"]
    assert found["verdict"] is None


def test_an_edited_recipe_has_no_evaluation(made):
    lock = lock_of(made / "tuned")
    lock["alphas"]["model.layers.0.mlp.up_proj.weight"] += 0.01
    with pytest.raises(RunError, match="no merge with these alphas"):
        evaluation.of_run(made / "run", lock)


def test_other_weights_have_no_evaluation(made):
    lock = lock_of(made / "tuned")
    lock["inputs"] = copy.deepcopy(lock["inputs"])
    lock["inputs"][1]["files"][WEIGHTS]["sha256"] = "0" * 64
    with pytest.raises(RunError, match=r"other weights of .*finetuned"):
        evaluation.of_run(made / "run", lock)


def test_where_no_run_ended_there_is_no_evaluation(made, tmp_path):
    assert evaluation.of_run(tmp_path, lock_of(made / "tuned")) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"fingerprint": {}}'])
def test_a_damaged_run_is_told(made, tmp_path, text):
    shutil.copy(made / "run" / "trials.jsonl", tmp_path)
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(RunError, match="damaged or of another version"):
        evaluation.of_run(tmp_path, lock_of(made / "tuned"))
