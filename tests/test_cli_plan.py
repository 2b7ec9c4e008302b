import json
import re

import pytest
import yaml
from conftest import write_tiny_llama

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.cli import cli, run
from arma_mergekit.recipe import Recipe


@pytest.fixture
def arma(tmp_path, monkeypatch, capsys):
    """Run `arma` in a directory with a base and a fine-tuned model; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "base", 0, num_hidden_layers=4)
    write_tiny_llama(tmp_path / "ft", 1, num_hidden_layers=4)

    def arma(*arguments, **changes):
        recipe = {
            "merge_method": "arma",
            "base_model": "base",
            "models": [{"model": "ft", "parameters": {"alpha": [0.0, 0.2, 0.6, 1.2]}}],
        }
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe | changes))
        with pytest.raises(SystemExit) as ended:
            run(cli, "arma", list(arguments))
        return ended.value.code, *capsys.readouterr()

    return arma


def test_the_plan_of_a_recipe_is_a_table_a_plot_and_totals(arma):
    code, out, err = arma("plan", "recipe.yml")
    assert (code, err) == (0, "")
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in out.splitlines()]
    assert lines[0] == "recipe.yml  LlamaForCausalLM  4 layers  39 tensors  43.3 K parameters"
    assert lines[1:3] == ["base  base  BF16", "fine-tuned  ft  BF16"]
    assert "q  4  4.1 K  8.19 kB  3 average, 1 copy base  0 … 1.2" in lines
    assert "up  4  8.19 K  16.4 kB  copy fine-tuned  1" in lines
    assert "total  39  43.3 K  86.6 kB  12 averaged, 27 copied" in lines
    assert "alpha by layer  0  3  ▁ 0  █ 1.2" in lines
    assert "q k v o  ▁▂▅█  0 … 1.2" in lines
    assert lines[-1] == "read 105 kB  write 86.6 kB  peak memory 18.4 kB of weights"
    assert max(map(len, out.splitlines())) <= 100


def test_a_deep_models_plot_fits_a_terminal(arma, tmp_path):
    for name in ("base", "ft"):
        (tmp_path / name).rename(tmp_path / f"{name}-shallow")
        write_tiny_llama(tmp_path / name, num_hidden_layers=130, hidden_size=8, head_dim=2)
    code, out, _ = arma("plan", "recipe.yml", models=[{"model": "ft", "parameters": {"alpha": [0, 1]}}])
    assert code == 0
    axis, bars = (line for line in out.splitlines() if "█" in line)
    assert axis.split()[:8] == ["alpha", "by", "layer", "0", "30", "60", "90", "129"]
    assert len(re.search("[▁▂▃▄▅▆▇█]{10,}", bars)[0]) == 44
    assert max(len(line) for line in out.splitlines() if "Warning" not in line) <= 100


def test_warnings_stand_between_plot_and_totals_and_do_not_fail(arma):
    code, out, err = arma("plan", "recipe.yml", parameters={"rest": 7})
    assert (code, err) == (0, "")
    assert "  Warning: Alpha leaves [-1.5, 3], the furthest is 7 for " in out


def test_json_has_the_documented_schema(arma):
    code, out, err = arma("plan", "recipe.yml", "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert list(content) == [
        "tensors",
        "errors",
        "warnings",
        "bytes_read",
        "bytes_written",
        "peak_memory_bytes",
    ]
    assert {tuple(tensor) for tensor in content["tensors"]} == {
        ("name", "layer", "role", "action", "alpha", "source")
    }
    found = {tensor.pop("name"): tensor for tensor in content["tensors"]}
    assert found["model.layers.2.self_attn.q_proj.weight"] == {
        "layer": 2, "role": "q", "action": "average", "alpha": 0.6, "source": "both",
    }  # fmt: skip
    assert found["lm_head.weight"] == {
        "layer": None, "role": "head", "action": "copy", "alpha": 1.0, "source": "ft",
    }  # fmt: skip
    assert content["bytes_written"] == 2 * sum(t.numel for t in Checkpoint.open("base").tensors.values())


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_exit_with_3_one_a_line_and_no_table(arma, as_json):
    changes = {"models": [{"model": "nowhere", "paramters": 1}], "dtypes": "x"}
    code, out, err = arma("plan", "recipe.yml", *(["--json"] if as_json else []), **changes)
    assert code == 3
    sentences = (
        json.loads(out)["errors"] if as_json else [line.removeprefix("Error: ") for line in err.splitlines()]
    )
    assert len(sentences) == 3
    for part, sentence in zip(
        ("'paramters'", "'dtypes'", "No model directory nowhere"), sentences, strict=True
    ):
        assert part in sentence
    assert as_json or out == ""


def test_a_file_that_is_no_recipe_exits_with_3_as_json_too(arma, tmp_path):
    code, out, err = arma("plan", "gone.yml")
    assert (code, out, err) == (3, "", "Error: No recipe gone.yml.\n")
    code, out, _ = arma("plan", "gone.yml", "--json")
    assert code == 3
    assert json.loads(out)["errors"] == ["No recipe gone.yml."]


def test_several_finetuned_models_are_numbered_and_plotted_apart(arma, tmp_path):
    write_tiny_llama(tmp_path / "ft2", 2, num_hidden_layers=4)
    models = [{"model": m, "parameters": {"alpha": a}} for m, a in (("ft", 0.3), ("ft2", [0, 0.5]))]
    code, out, _ = arma("plan", "recipe.yml", models=models, parameters={"rest": "base"})
    assert code == 0
    assert re.search(r"fine-tuned 2 +ft2", out)
    assert out.count("alpha by layer") == 2
    assert "0.3, 0 … 0.5" in out


def test_alphas_that_a_search_has_yet_to_find_are_question_marks(arma):
    suites = {"evals": {"general": [{"kl": {"data": "x"}}]}}
    code, out, _ = arma("plan", "recipe.yml", models=[{"model": "ft"}], **suites)
    assert code == 0
    assert re.search(r"    q .* average +\?\n", out)
    assert "arma-tune finds them" in out


def test_planning_leaves_the_directory_as_it_was(arma, tmp_path):
    def snapshot():
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.name != "recipe.yml"}

    before = snapshot()
    arma("plan", "recipe.yml")
    assert snapshot() == before


def test_the_recipe_planned_is_the_recipe_loaded(arma, tmp_path):
    arma("plan", "recipe.yml")
    assert Recipe.load(tmp_path / "recipe.yml").models[0].parameters.alpha == [0.0, 0.2, 0.6, 1.2]
