import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import toy
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.ci import (
    Check,
    append,
    checks_table,
    exit_code,
    junit,
    outputs,
    tradeoff,
    workflow_command,
)
from arma_mergekit.cli.publish import Publisher
from arma_mergekit.cli.tune import command as tune
from arma_mergekit.errors import ArmaError, RecipeError, RunError
from arma_mergekit.gate import check_tuning

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ("passed", "failed", "skipped", "error")
CHECKS = st.lists(
    st.builds(Check, st.text(), st.sampled_from(OUTCOMES), st.text(), st.integers(0, 7)), max_size=5
)


# ---------------------------------------------------------------------- formats


@given(CHECKS)
def test_junit_is_well_formed_and_counts_right_whatever_it_is_told(checks):
    (suite,) = ElementTree.fromstring(junit("t", checks).encode())
    assert int(suite.get("tests")) == len(suite.findall("testcase")) == len(checks)
    for key, tag, outcome in (
        ("failures", "failure", "failed"),
        ("errors", "error", "error"),
        ("skipped", "skipped", "skipped"),
    ):
        assert (
            int(suite.get(key))
            == len(suite.findall(f"testcase/{tag}"))
            == sum(c.outcome == outcome for c in checks)
        )


def test_junit_says_what_failed_and_why():
    suite = ElementTree.fromstring(junit("arma gate", [Check("keep a<b", "failed", "Keeps 3 % & less.", 5)]))[
        0
    ]
    case = suite[0]
    assert (case.get("classname"), case.get("name")) == ("arma gate", "keep a<b")
    assert case.find("failure").get("message") == case.find("failure").text == "Keeps 3 % & less."


@given(CHECKS)
def test_the_exit_code_is_that_of_the_first_failure(checks):
    codes = [c.code for c in checks if c.outcome in ("failed", "error")]
    assert exit_code(checks) == (codes or [0])[0]


@given(CHECKS)
def test_a_table_has_a_row_for_each_check_and_three_cells_in_each(checks):
    lines = checks_table(checks).split("\n")
    assert len(lines) == 2 + len(checks)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {4}


def parsed(text):
    """Names and values as GitHub's runner reads them: `name<<end`, lines, `end`."""
    found, lines = {}, iter(text.split("\n"))
    for line in lines:
        if line:
            name, end = line.split("<<")
            value = []
            while (line := next(lines)) != end:
                value.append(line)
            found[name] = "\n".join(value)
    return found


@given(st.dictionaries(st.sampled_from(["recipe", "best", "exit-code"]), st.text()))
def test_no_output_can_end_early_or_set_another(values):
    assert parsed(outputs(values)) == values


@given(st.text(), st.text())
def test_a_workflow_command_is_one_line(title, message):
    line = workflow_command("error", title, message)
    assert line.startswith("::error title=")
    assert not set("\r\n") & set(line)
    assert line.removeprefix("::error title=").index("::") == len(line) - len("::error title=") - len(
        line.split("::", 2)[2]
    ) - len("::")


def test_a_workflow_command_says_what_github_reads_back():
    assert workflow_command("error", "a: b, c", "100 %\nx") == "::error title=a%3A b%2C c::100 %25%0Ax"


SHARES = st.dictionaries(
    st.text(min_size=1),
    st.fixed_dictionaries({"general": st.floats(-9, 9), "domain": st.floats(-9, 9)}),
    min_size=1,
)


@given(SHARES)
def test_every_point_of_the_chart_is_strictly_inside_and_no_name_breaks_it(shares):
    lines = tradeoff(shares, "").split("\n")
    assert (lines[0], lines[1].strip(), lines[-1]) == ("```mermaid", "quadrantChart", "```")
    points = [
        re.fullmatch(r' {4}"([^"`\n]*)": \[(0\.\d+), (0\.\d+)\] radius: 5, color: #\w{6}', p)
        for p in lines[5:-1]
    ]
    assert all(points)
    assert len(points) == len(shares)


def test_the_chart_keeps_places_and_says_its_scale():
    chart = tradeoff({"base": {"a": 1.0, "b": 0.0}, "best": {"a": 0.5, "b": 1.15}}, "best")
    assert 'x-axis "a: -5%" --> "105%"' in chart
    assert 'y-axis "b: -5%" --> "120%"' in chart
    assert '"best": [0.5000, 0.9600] radius: 8' in chart


def test_with_one_suite_there_is_nothing_to_trade():
    assert tradeoff({"base": {"a": 1.0}}, "base") == ""
    assert tradeoff({}, "base") == ""


def test_nothing_is_appended_where_no_server_asks(monkeypatch, tmp_path):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    append("GITHUB_STEP_SUMMARY", "x")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    append("GITHUB_STEP_SUMMARY", "x")
    append("GITHUB_STEP_SUMMARY", "y")
    assert (tmp_path / "s.md").read_text() == "xy"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(RunError, match=r"GITHUB_STEP_SUMMARY.*directory"):
        append("GITHUB_STEP_SUMMARY", "x")


# ---------------------------------------------------------------------- where checks go


@pytest.fixture
def github(monkeypatch, tmp_path):
    """The environment of a step; returns what it left there."""
    files = {name: tmp_path / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    for name, file in files.items():
        file.write_text("")
        monkeypatch.setenv(name, str(file))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    return files


FAILED = Check("keep domain", "failed", "Keeps less.", 5)


def test_on_github_summary_outputs_and_annotations_are_written(github, tmp_path, capsys):
    publisher = Publisher("arma gate", tmp_path / "new" / "j.xml", tmp_path / "s.md")
    assert publisher.publish([FAILED], "more", {"recipe": "x"}) == 5
    assert (tmp_path / "s.md").read_text().strip() == github["GITHUB_STEP_SUMMARY"].read_text().strip()
    assert "### arma gate: failed (exit code 5)" in (tmp_path / "s.md").read_text()
    assert parsed(github["GITHUB_OUTPUT"].read_text()) == {"recipe": "x", "exit-code": "5"}
    assert capsys.readouterr().err == "::error title=arma gate%3A keep domain::Keeps less.\n"
    assert (tmp_path / "new" / "j.xml").exists()


def test_elsewhere_there_are_no_workflow_commands(monkeypatch, capsys):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    assert Publisher("t", None, None).publish([FAILED], "", {}) == 5
    assert capsys.readouterr() == ("", "")


def test_an_error_is_reported_and_raised_again(github, tmp_path):
    publisher = Publisher("arma-tune", tmp_path / "j.xml", None)
    with pytest.raises(RecipeError, match="No recipe"), publisher.errors():
        raise RecipeError("No recipe x.")
    assert ElementTree.parse(tmp_path / "j.xml").find("*/testcase/error").text == "No recipe x."
    assert parsed(github["GITHUB_OUTPUT"].read_text()) == {"exit-code": "3"}


def test_where_nothing_can_be_written_the_first_error_stays(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArmaError, match="first"), Publisher("t", tmp_path / "file" / "j.xml", None).errors():
        raise RecipeError("first")
    with pytest.raises(RunError, match=r"Cannot write .*j.xml"):
        Publisher("t", tmp_path / "file" / "j.xml", None).publish([], "", {})


# ---------------------------------------------------------------------- arma-tune --ci


def make_summary(**changes):
    verdict = {
        "name": "gradient",
        "rival": "one knob 0.3",
        "dominates": True,
        "sentence": "gradient beats it.",
        "suites": {},
    }
    best = {"name": "gradient", "search_share": {"domain": 0.9, "general": 0.5}}
    return {"best": "gradient", "keep": {}, "verdicts": [verdict], "candidates": [best]} | changes


def test_a_gain_over_one_knob_passes():
    assert exit_code(check_tuning(make_summary())) == 0


def test_a_best_that_does_not_beat_one_knob_asks_for_six():
    verdict = {**make_summary()["verdicts"][0], "dominates": False}
    assert exit_code(check_tuning(make_summary(verdicts=[verdict]))) == 6


def test_one_knob_or_an_end_as_the_best_asks_for_six():
    rival = {"name": "one knob 0.3", "search_share": {}}
    assert exit_code(check_tuning(make_summary(best="one knob 0.3", candidates=[rival]))) == 6


def test_a_violated_constraint_comes_before_a_missing_gain():
    summary = make_summary(keep={"domain": 0.95}, verdicts=[])
    keep, gain = check_tuning(summary)
    assert (keep.name, keep.outcome, gain.outcome) == ("keep domain", "failed", "failed")
    assert "90.0 % of domain" in keep.sentence
    assert "95.0 %" in keep.sentence
    assert exit_code([keep, gain]) == 5
    assert exit_code(check_tuning(make_summary(keep={"domain": 0.9}))) == 0


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return toy.make_pair(tmp_path_factory.mktemp("ci"))


def ci_run(recipe, out, *options):
    words = [str(recipe), "--eval", "general,domain", "--out", str(out), "--ci", *options]
    return CliRunner().invoke(tune, words, standalone_mode=False)


def test_tuning_for_a_server_leaves_reports_and_says_what_to_merge(pair, tmp_path, github):
    run = ci_run(pair, tmp_path / "run", "--searchers", "gradient", "--trials", "4")
    assert run.return_value == 0, run.output
    assert "\x1b" not in run.output
    case = ElementTree.parse(tmp_path / "run" / "junit.xml").find("*/testcase")
    assert case.get("name") == "gain over one knob"
    markdown = (tmp_path / "run" / "summary.md").read_text()
    for part in ("### arma-tune: passed", "| **gradient** |", "quadrantChart"):
        assert part in markdown
    assert markdown in github["GITHUB_STEP_SUMMARY"].read_text()
    told = parsed(github["GITHUB_OUTPUT"].read_text())
    assert told == {"recipe": str(tmp_path / "run" / "tuned.yml"), "best": "gradient", "exit-code": "0"}


def test_tuning_for_a_server_ends_with_six_and_one_knob_where_nothing_beats_that(pair, tmp_path, github):
    run = ci_run(pair, tmp_path, "--searchers", "random", "--trials", "1")
    assert json.loads((tmp_path / "summary.json").read_text())["verdicts"][0]["dominates"] is False
    assert run.return_value == 6
    assert parsed(github["GITHUB_OUTPUT"].read_text())["recipe"] == str(tmp_path / "one-knob.yml")


def test_tuning_for_a_server_reports_a_recipe_it_cannot_read(tmp_path):
    run = ci_run(tmp_path / "none.yml", tmp_path / "run")
    assert isinstance(run.exception, RecipeError)
    assert "No recipe" in ElementTree.parse(tmp_path / "run" / "junit.xml").find("*/testcase/error").text


# ---------------------------------------------------------------------- the action, the workflow, the other servers

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / "docs" / "examples" / "release.yml").read_text())
EXPRESSION = re.compile(r"\$\{\{ *([\w.-]+) *\}\}")
STUBS = {  # what needs a network; `hf upload RELEASE DIRECTORY .` copies
    "hf": 'if [ "$1" = upload ]; then mkdir -p "uploaded/$2" && cp -r "$3/." "uploaded/$2"; fi',
    "python": f'if [ "$2" = pip ]; then exit 0; fi; exec {sys.executable} "$@"',
    "arma": f'exec {sys.executable} -m arma_mergekit "$@"',
    "arma-tune": f'exec {sys.executable} -m arma_mergekit tune "$@"',
}


class Job:
    """Runs steps as GitHub does: expressions filled in, each `run` in a bash of its own, outputs handed on."""

    def __init__(self, directory, environment):
        self.directory, self.environment, self.summary = directory, environment, directory / "step-summary.md"
        tools = directory / "tools"
        tools.mkdir()
        for name, body in STUBS.items():
            (tools / name).write_text(f"#!/bin/bash\n{body}\n")
            (tools / name).chmod(0o755)
        self.path = f"{tools}:{os.environ['PATH']}"
        self.failed = None

    def run(self, steps, inputs=None):
        """The steps, up to the first that fails, but those that always run."""
        outputs = {}

        def fill(text):
            return EXPRESSION.sub(lambda found: look(found[1]), str(text))

        def look(name):
            match name.split("."):
                case ["inputs", key]:
                    return inputs[key]
                case ["steps", step, "outputs", key]:
                    return outputs.get(step, {}).get(key, "")
                case ["secrets", _]:
                    return "secret"
                case ["github", "action_path"]:
                    return str(ROOT)
            raise AssertionError(f"{name} means nothing here")

        for step in steps:
            if step.get("if") == "inputs.install == 'true'" and inputs["install"] != "true":
                continue
            if self.failed and step.get("if") != "always()":
                continue
            if "arma_mergekit@" in step.get("uses", ""):
                given = {key: fill(value) for key, value in step["with"].items()}
                defaults = {key: entry.get("default", "") for key, entry in ACTION["inputs"].items()}
                self.run(ACTION["runs"]["steps"], defaults | given)
            elif "run" in step:
                environment = {key: fill(value) for key, value in step.get("env", {}).items()}
                outputs[step.get("id")] = self.bash(step["name"], step["run"], environment)
        return outputs

    def bash(self, name, script, environment=None):
        """One step; returns its outputs."""
        (self.directory / "script").write_text(script)
        output = self.directory / "output"
        output.write_text("")
        files = {
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_ACTIONS": "true",
        }
        own = {**self.environment, **files, "GITHUB_RUN_NUMBER": "7", "PATH": self.path}
        environment = {**os.environ, **own, **(environment or {})}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "script"],
            cwd=self.directory, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            self.failed = (name, done.returncode, done.stdout + done.stderr)
        return (
            parsed(output.read_text())
            if "<<" in output.read_text()
            else dict(line.split("=", 1) for line in output.read_text().splitlines())
        )


@pytest.fixture
def repository(pair, tmp_path):
    """A checkout with recipe.yml, whose models are where it says."""
    for name in ("recipe.yml", "general.jsonl", "sums.jsonl", "choices.jsonl"):
        shutil.copy(pair.parent / name, tmp_path / name)
    return tmp_path


def job_of(directory):
    return Job(directory, WORKFLOW["env"])


def test_every_run_step_names_its_shell_and_takes_inputs_only_through_the_environment():
    for step in [*ACTION["runs"]["steps"], *WORKFLOW["jobs"]["release"]["steps"]]:
        if "run" in step:
            assert "${{" not in step["run"], step["name"]
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)
    assert {step["shell"] for step in ACTION["runs"]["steps"]} == {"bash"}


def test_the_workflow_gives_the_action_inputs_that_it_has():
    (step,) = (s for s in WORKFLOW["jobs"]["release"]["steps"] if "arma_mergekit@" in s.get("uses", ""))
    needed = {name for name, entry in ACTION["inputs"].items() if entry.get("required")}
    assert needed <= set(step["with"]) <= set(ACTION["inputs"])


@pytest.mark.slow
def test_the_workflow_releases_a_checkpoint_and_gates_the_next_one_against_it(repository):
    job = job_of(repository)
    job.run(WORKFLOW["jobs"]["release"]["steps"])
    assert job.failed is None
    uploaded = repository / "uploaded" / "your-org" / "merged"
    assert {"model.safetensors", "config.json", "arma.lock.json"} <= {
        file.name for file in uploaded.iterdir()
    }
    for part in ("### arma-tune: passed", "### arma gate: passed"):
        assert part in job.summary.read_text()
    (repository / "release").mkdir()
    shutil.copy(uploaded / "arma.lock.json", repository / "release" / "arma.lock.json")
    job.summary.write_text("")
    job.run(WORKFLOW["jobs"]["release"]["steps"])
    assert job.failed is None
    assert job.summary.read_text().count("### arma gate: passed") == 2


@pytest.mark.slow
def test_a_release_that_is_worse_than_promised_is_not_uploaded(repository):
    job = job_of(repository)
    promised = repository / "release" / "arma.lock.json"
    promised.parent.mkdir()
    script = "arma-tune recipe.yml --eval general,domain --out runs/a --ci && arma merge runs/a/tuned.yml a"
    job.bash("the release before", script)
    lock = json.loads((repository / "a" / "arma.lock.json").read_text())
    for task, columns in lock["evaluation"]["items"].items():
        if "generate" in task:
            columns["merged"] = " ".join("1" for _ in columns["merged"].split())
    promised.write_text(json.dumps(lock))
    job.run(WORKFLOW["jobs"]["release"]["steps"])
    name, code, log = job.failed
    assert (name, code) == ("Gate", 7)
    assert "::error title=arma gate%3A domain/generate%3Asums::" in log
    assert not (repository / "uploaded").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("no_gain", "ends"), [("one-knob", None), ("fail", ("Tune", 6))])
def test_where_nothing_beats_one_knob_that_is_merged_or_the_job_ends(repository, no_gain, ends):
    job = job_of(repository)
    inputs = {key: entry.get("default", "") for key, entry in ACTION["inputs"].items()}
    inputs |= {"recipe": "recipe.yml", "eval": "general,domain", "no-gain": no_gain, "install": "false"}
    inputs["tune-options"] = "--searchers random --trials 1"
    outputs = job.run(ACTION["runs"]["steps"], inputs)
    assert (job.failed and job.failed[:2]) == ends
    assert outputs["tune"]["recipe"] == "runs/release/one-knob.yml"
    assert (repository / "merged").exists() == (ends is None)


PAGE = (ROOT / "docs" / "ci.md").read_text()
(GITLAB,) = (
    b for b in map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)) if "release" in b
)
(SHELL,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["\n".join(GITLAB["release"]["script"]), SHELL], ids=["GitLab", "shell"])
def test_the_scripts_of_other_servers_run(repository, script):
    job = job_of(repository)
    job.bash("script", script)
    assert job.failed is None
    assert (repository / "merged" / "arma.lock.json").exists()
    if "junit" in script:
        made = {str(file.relative_to(repository)) for file in repository.rglob("*.xml")}
        assert made == set(GITLAB["release"]["artifacts"]["reports"]["junit"]) - {"runs/release/release.xml"}
