"""Models that are no merges, scored beside those of a run."""

import json
import os
import shutil

import pytest
import torch
import toy
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from arma_mergekit import report
from arma_mergekit.cli.tune import command
from arma_mergekit.errors import CheckpointError, RecipeError, UsageError
from arma_mergekit.evals.forward import CausalLM
from arma_mergekit.evals.rows import Item, Row
from arma_mergekit.evals.tasks import ChoiceTask, NllTask
from arma_mergekit.models import open_named
from arma_mergekit.recipe import Recipe
from arma_mergekit.siamese import SiameseForCausalLM

FAST = ("--searchers", "random", "--trials", "1")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return toy.make_pair(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="session")
def siamese(recipe):
    """A siamese directory beside the pair, with an adapter and a gate that nothing has trained."""
    root = recipe.parent
    torch.manual_seed(3)
    lm = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(lm, config).save_pretrained(root / "adapter")
    model = SiameseForCausalLM.from_parts(str(root / "base"), str(root / "adapter"))
    torch.nn.init.normal_(model.body.gate.B.weight, std=2.0)
    model.save_pretrained(root / "siamese")
    return root / "siamese"


def tune(recipe, out, *options):
    run = ["--eval", "general,domain", "--out", str(out), *FAST, *options]
    return CliRunner().invoke(command, [str(recipe), *run], catch_exceptions=False)


def summary(out):
    return json.loads((out / "summary.json").read_text())


def keys(out):
    return [json.loads(line)["key"] for line in (out / "trials.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def compared(recipe, siamese, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    twin = f"twin={recipe.parent / 'finetuned'}"
    return out, tune(recipe, out, "--compare", f"siamese={siamese}", "--compare", twin)


def test_a_copy_of_the_finetuned_model_scores_what_the_finetuned_scores(compared):
    out, result = compared
    assert result.exit_code == 0
    by_name = {c["name"]: c for c in summary(out)["candidates"]}
    assert by_name["twin"]["held_back"] == by_name["fine-tuned"]["held_back"]
    assert by_name["twin"]["share_kept"] == by_name["fine-tuned"]["share_kept"]
    assert by_name["siamese"]["held_back"] != by_name["fine-tuned"]["held_back"]
    assert set(by_name["siamese"]["held_back"]) == set(by_name["base"]["held_back"])


def test_the_summary_says_what_answering_costs(compared):
    out, _ = compared
    twin, siamese = sorted(summary(out)["compared"], key=lambda c: c["kind"])
    assert (twin["kind"], siamese["kind"]) == ("checkpoint", "siamese")
    assert twin["own"]["weight_bytes"] == twin["merge"]["weight_bytes"]
    assert twin["own"]["cache_bytes"] == twin["merge"]["cache_bytes"]
    both = siamese["own"]["cache_bytes"] / siamese["merge"]["cache_bytes"]
    assert 2 <= both < 2.2  # two caches, and the prompt's mean
    assert siamese["own"]["weight_bytes"] > siamese["merge"]["weight_bytes"]
    assert siamese["own"]["tokens_per_second"] < siamese["merge"]["tokens_per_second"]
    assert siamese["verdict"]["name"] == "siamese"
    assert siamese["verdict"]["rival"] == summary(out)["best"]


def test_terminal_and_report_tell_how_each_fares_against_the_best(compared):
    out, result = compared
    page = (out / "report.html").read_text()
    for found in summary(out)["compared"]:
        assert found["verdict"]["sentence"] in result.stdout
        assert found["verdict"]["sentence"] in page
    assert "Other models" in result.stdout
    assert "Against other models" in page
    assert report.render(summary(out) | {"compared": []}, []).count("Against other models") == 0


def test_a_model_is_scored_again_when_its_files_change_and_only_then(recipe, siamese, compared, tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(siamese, mine)
    shutil.copytree(compared[0], out)
    before = keys(out)
    assert tune(recipe, out, "--compare", f"renamed={mine}").exit_code == 0
    assert keys(out) == before
    gate = SiameseForCausalLM.from_pretrained(mine)
    gate.body.gate.B.weight.data.mul_(0.5)
    gate.save_pretrained(mine)
    assert tune(recipe, out, "--compare", f"renamed={mine}").exit_code == 0
    assert len(keys(out)) == len(before) + 1
    assert keys(out)[-1].startswith("compared/")


def test_a_finished_run_takes_another_model_and_scores_nothing_else(recipe, compared, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(compared[0], out)
    before = keys(out)
    added = f"adapted={recipe.parent / 'base'}+{recipe.parent / 'adapter'}"
    assert tune(recipe, out, "--compare", added).exit_code == 0
    assert keys(out)[:-1] == before
    assert [c["kind"] for c in summary(out)["compared"]] == ["adapter"]


def test_a_recipe_names_what_it_is_compared_with(recipe, tmp_path):
    text = recipe.read_text() + f"  compare: {{twin: {recipe.parent / 'base'}}}\n"
    mine = recipe.parent / "compare.yml"
    mine.write_text(text)
    assert Recipe.load(mine).tune.compare == {"twin": str(recipe.parent / "base")}
    both = Recipe.load(mine).with_tune({"compare": {"other": "x"}}).tune.compare
    assert both == {"other": "x"}


@pytest.mark.parametrize("name", ["base", "bayes", "fine-tuned", "a b", "", "x" * 41])
def test_names_that_a_run_uses_itself_are_refused(recipe, name):
    with pytest.raises(RecipeError, match="compare"):
        Recipe.load(recipe).with_tune({"compare": {name: "x"}})


def test_what_is_wrong_with_a_model_is_said_before_anything_is_scored(recipe, siamese, tmp_path):
    with pytest.raises(UsageError, match="NAME=MODEL"):
        tune(recipe, tmp_path / "a", "--compare", "siamese")
    with pytest.raises(CheckpointError, match="No model directory nowhere"):
        tune(recipe, tmp_path / "b", "--compare", "x=nowhere")
    shutil.copytree(recipe.parent / "base", tmp_path / "words")
    tokenizer = (tmp_path / "words" / "tokenizer.json").read_text()
    (tmp_path / "words" / "tokenizer.json").write_text(
        tokenizer.replace('"z":25', '"Z":25').replace('"z": 25', '"Z": 25')
    )
    with pytest.raises(CheckpointError, match=r"compare: x .* has another vocabulary"):
        tune(recipe, tmp_path / "c", "--compare", f"x={tmp_path / 'words'}")
    attentive = recipe.parent / "attentive.yml"
    attentive.write_text(
        recipe.read_text().replace(
            "  domain:\n", "    - divergence: {data: general.jsonl, watch: true}\n  domain:\n"
        )
    )
    with pytest.raises(RecipeError, match=r"general/divergence:general compares attention, .* siamese"):
        tune(attentive, tmp_path / "d", "--compare", f"siamese={siamese}")
    assert not [p for p in tmp_path.iterdir() if (p / "trials.jsonl").exists()]


def test_another_model_under_the_same_name_is_not_taken_for_the_first(recipe, compared, tmp_path):
    assert tune(recipe, tmp_path, "--compare", f"siamese={recipe.parent / 'base'}").exit_code == 0
    by_name = {c["name"]: c for c in summary(tmp_path)["candidates"]}
    assert by_name["siamese"]["held_back"] == by_name["base"]["held_back"]


# ------------------------------------------------------------------ what the gate is told


@pytest.fixture(scope="session")
def model(siamese):
    return SiameseForCausalLM.from_pretrained(siamese, dtype=torch.float32).requires_grad_(False)


def rows(seed, prompt, answers):
    torch.manual_seed(seed)
    asked = tuple(torch.randint(3, 40, (prompt,)).tolist())
    return tuple(Row((*asked, *torch.randint(3, 40, (n,)).tolist()), prompt) for n in answers)


def test_the_prompt_of_a_scored_row_is_what_comes_before_its_answer(model):
    items = [Item(str(k), rows(k, 4 + k, [3 + k])) for k in range(5)]
    found = NllTask("nll", items).measure(model, range(5))
    for item, loss in zip(items, found.loss, strict=True):
        (row,) = item.rows
        ids = torch.tensor([row.tokens])
        labels = ids.clone()
        labels[:, : row.start] = -100
        assert loss == pytest.approx(float(model(ids, labels=labels).loss) * len(row.targets), rel=1e-4)


def test_choices_that_share_a_prompt_score_as_if_each_passed_alone(model):
    items = [Item(str(k), rows(k, 30, [2, 4, 3, 2]), answer=1) for k in range(3)]
    lm = CausalLM(model)
    assert lm.caches
    together = ChoiceTask("choice", items).measure(model, range(3))
    whole, tokens = lm.hidden([item.rows for item in items])
    shared, fewer = lm.hidden([item.rows for item in items], 29)
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
    assert fewer < tokens
    assert together.tokens == fewer


def test_a_text_scored_whole_does_not_see_its_end(model):
    long = Row(tuple(range(3, 23)), 1)
    cut = Row(long.tokens[:10], 1)
    lm = CausalLM(model)
    torch.testing.assert_close(lm.hidden([[long]])[0][:9], lm.hidden([[cut]])[0], rtol=1e-4, atol=1e-5)


def test_prompts_of_different_lengths_are_continued_as_each_alone(model):
    prompts = [rows(k, n, [1])[0].tokens[:n] for k, n in enumerate((4, 9, 6))]
    said, _ = CausalLM(model).greedy(prompts, 8, set())
    for prompt, answer in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        wanted = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == wanted[0, len(prompt) :].tolist()


def test_a_siamese_directory_speaks_with_both_sides_and_the_mixture(siamese, recipe):
    from arma_mergekit.chat import Settings, open_cast

    voices = open_cast(str(siamese), {}).load(["base", "finetuned", "siamese"])
    plain = {
        name: open_named(ref).load("cpu")
        for name, ref in (
            ("base", str(recipe.parent / "base")),
            ("finetuned", f"{recipe.parent / 'base'}+{recipe.parent / 'adapter'}"),
        )
    }
    ids = torch.tensor([[5, 9, 30, 4]])
    for voice in voices[:2]:
        torch.testing.assert_close(
            voice.model(input_ids=ids).logits.float(),
            plain[voice.name](input_ids=ids).logits.float(),
            rtol=0.05,
            atol=0.05,
        )
    assert not torch.equal(voices[2].model(input_ids=ids).logits, voices[0].model(input_ids=ids).logits)
    answer = voices[2].ask("door", Settings(max_tokens=4))
    while not answer.stopped:
        answer.step()
    assert answer.tokens <= 4
    assert os.path.isdir(siamese)
