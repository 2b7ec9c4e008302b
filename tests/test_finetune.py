"""`arma finetune`: what is masked, what is trained, and that a run goes on where it stopped."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from click.testing import CliRunner
from safetensors.torch import load_file

from arma_mergekit.checkpoint import open_model
from arma_mergekit.cli import cli
from arma_mergekit.errors import ArmaError, CheckpointError, DataError, RunError
from arma_mergekit.evals.sources import Record
from arma_mergekit.finetune import METHODS, Example, GateSettings, Settings, batch, encode, finetune
from arma_mergekit.siamese import SiameseForCausalLM

# PEFT 0.21 asks transformers for what it renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
CHAT = (
    "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + '. ' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with base/ and sums.jsonl."""
    root = tmp_path_factory.mktemp("toy")
    tokenizer = toy.make_tokenizer()
    tokenizer.eos_token = "."
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(toy.ALPHABET), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    toy.save(transformers.LlamaForCausalLM(config), tokenizer, root / "base")
    toy.write_data(root)
    return root


@pytest.fixture
def tokenizer():
    made = toy.make_tokenizer()
    made.eos_token = "."
    return made


def record(**fields):
    return Record("1", "data.jsonl, id 1", fields)


def learned(tokenizer, example):
    """The text of what is trained on."""
    return "".join(
        tokenizer.convert_ids_to_tokens(
            [t for t, k in zip(example.tokens, example.trained, strict=True) if k]
        )
    )


def settings(pair, **changes):
    given = {"steps": 6, "batch": 4, "length": 64, "lr": 1e-2, "method": "curlora"} | changes
    if given["method"] == "curlora":  # a base that knows nothing has little for C and R to pick from
        given |= {"targets": ("v_proj", "o_proj", "down_proj"), "lr": 100 * given["lr"]}
    return Settings(str(pair / "base"), pair / "sums.jsonl", **given)


# ---- masking ----


def test_only_the_answer_of_a_prompt_is_learned_and_the_end_of_text(tokenizer):
    example = encode(tokenizer, record(prompt="1+1=", answer="2"), 64)
    assert learned(tokenizer, example) == "2."
    assert example.loss_tokens == 2


def test_a_text_is_learned_whole_and_ends_once(tokenizer):
    example = encode(tokenizer, record(text="able bird."), 64)
    assert learned(tokenizer, example) == "able bird."
    assert example.loss_tokens == 9  # nothing comes before the first


def test_of_messages_only_what_the_assistant_says_is_learned(tokenizer):
    tokenizer.chat_template = CHAT
    said = [("user", "a+b"), ("assistant", "iron"), ("user", "east"), ("assistant", "fire")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert learned(tokenizer, encode(tokenizer, record(messages=messages), 64)) == "iron. fire. "
    assert encode(tokenizer, record(messages=messages[:1]), 64).loss_tokens == 0


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    messages = [
        {"role": role, "content": c} for role, c in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(tokenizer, record(messages=messages), 64)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"question": "?"}, "needs prompt and answer, messages, or text"),
        ({"prompt": "a", "answer": 3}, "answer must be text"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
    ],
)
def test_records_of_no_known_form_are_refused_by_name(tokenizer, fields, says):
    with pytest.raises(DataError, match=rf"data.jsonl, id 1: .*{says}"):
        encode(tokenizer, record(**fields), 64)


def test_the_labels_of_a_batch_are_the_tokens_where_they_are_trained_on_and_nowhere_else():
    made = batch([Example((5, 6, 7), (False, True, True)), Example((8, 9), (True, True))])
    assert made["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert made["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]


# ---- runs ----


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"siamese"}))
def test_every_method_learns_and_its_result_is_an_input_of_a_merge(pair, tmp_path, method):
    result = finetune(settings(pair, method=method, steps=20), tmp_path / "out")["result"]
    assert result["loss_last"] < result["loss_first"] - 0.1
    base = open_model(str(pair / "base"))
    adapter = method != "full"
    tuned = open_model(f"{pair / 'base'}+{tmp_path / 'out'}" if adapter else str(tmp_path / "out"))
    changed = [n for n in base.tensors if tuned.read(n).tobytes() != base.read(n).tobytes()]
    assert changed
    assert {n: t.dtype for n, t in tuned.tensors.items()} == {n: t.dtype for n, t in base.tensors.items()}
    assert not list((tmp_path / "out").glob("check*"))
    assert result["trainable"] == {"curlora": 3 * 16 * 16}.get(method, result["trainable"])


def test_an_interrupted_run_goes_on_to_the_same_weights(pair, tmp_path):
    def stop(facts):
        if facts.get("step") == 4:
            raise KeyboardInterrupt

    given = settings(pair, save_every=2)
    finetune(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(given, tmp_path / "cut", stop)
    assert json.loads((tmp_path / "cut" / "finetune.json").read_text())["result"] is None
    result = finetune(given, tmp_path / "cut")["result"]
    assert result["resumed_at"] == 2
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_finished_run_is_not_trained_again_and_another_ones_directory_is_refused(pair, tmp_path):
    first = finetune(settings(pair), tmp_path / "out")
    assert finetune(settings(pair), tmp_path / "out", pytest.fail) == first
    with pytest.raises(RunError, match="holds a run with seed 0, not 1"):
        finetune(settings(pair, seed=1), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        finetune(settings(pair), tmp_path / "other")


def test_seeds_decide_everything(pair, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        finetune(settings(pair, seed=seed, steps=3), tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("method", ["curlora", "lora"])
def test_an_adapter_is_trained_further_on_the_next_task(pair, tmp_path, method):
    first = finetune(settings(pair, method=method, steps=10), tmp_path / "first")["result"]
    base = f"{pair / 'base'}+{tmp_path / 'first'}"
    second = finetune(Settings(base, pair / "sums.jsonl", method, steps=5, batch=4), tmp_path / "second")[
        "result"
    ]
    assert second["loss_first"] < first["loss_first"] - 0.05
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second"))
    kept = [n for n in before if "cross" in n]
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    other = "lora" if method == "curlora" else "curlora"
    with pytest.raises(CheckpointError, match=f"method {other} cannot go on training it"):
        finetune(Settings(base, pair / "sums.jsonl", other), tmp_path / "third")


def test_what_is_too_long_is_cut_and_counted(pair, tmp_path):
    rows = [
        {"prompt": "abcdefgh", "answer": "ijk"},
        {"prompt": "a", "answer": "b"},
        {"prompt": "a", "answer": "bcdefgh"},
    ]
    toy.write_jsonl(tmp_path / "data.jsonl", rows)
    given = Settings(str(pair / "base"), tmp_path / "data.jsonl", "curlora", steps=1, length=4)
    result = finetune(given, tmp_path / "out")["result"]
    assert (result["examples"], result["left_out"], result["cut"]) == (2, 1, 1)
    toy.write_jsonl(tmp_path / "data.jsonl", rows[:1])
    given = Settings(str(pair / "base"), tmp_path / "data.jsonl", "lora", length=2)
    with pytest.raises(DataError, match="nothing to learn within 2 tokens"):
        finetune(given, tmp_path / "none")


def test_a_loss_that_is_not_finite_ends_the_run(pair, tmp_path):
    with pytest.raises(RunError, match="lower learning rate"):
        finetune(settings(pair, method="full", lr=math.inf, steps=3), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"method": "loar"}, "Did you mean lora"), ({"method": "full", "rank": 4}, "an adapter's")],
)
def test_settings_that_make_no_sense_are_refused(pair, tmp_path, changes, says):
    with pytest.raises(RunError, match=says):
        finetune(settings(pair, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the command ----


def test_the_command_says_what_is_trained_and_how_a_recipe_names_it(pair, tmp_path):
    words = ["finetune", str(pair / "base"), str(pair / "sums.jsonl"), "--method", "curlora", "--rank", "4"]
    done = CliRunner().invoke(
        cli, [*words, "--steps", "3", "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "48 of" in done.output
    assert "300 of 800 tokens are learned" in done.output
    assert f"model: {pair / 'base'}+{tmp_path / 'out'}" in done.output
    words[2] = str(tmp_path / "no.jsonl")
    missing = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "x")])
    assert isinstance(missing.exception, ArmaError)
    assert "No data file" in str(missing.exception)


# ---- method siamese ----


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    """base+adapter of a LoRA that learned the habit."""
    out = tmp_path_factory.mktemp("lora") / "adapter"
    finetune(settings(pair, method="lora", steps=20), out)
    return f"{pair / 'base'}+{out}"


def siamese(pair, base=None, **changes):
    gate = changes.pop("gate", GateSettings(lr=0.05))
    given = settings(pair, method="siamese", gate=gate, **changes)
    return given if base is None else replace(given, base=base)


def tensors(path):
    return {file.name: load_file(file) for file in sorted(path.rglob("*.safetensors"))}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_gate_is_trained_alone_on_an_adapter_that_stays_as_it_is(pair, adapter, tmp_path):
    result = finetune(siamese(pair, adapter, steps=20), tmp_path / "out")["result"]
    assert result["trainable"] == 5 * 32 * 8
    assert result["loss_last"] < result["loss_first"]
    before, after = tensors(Path(adapter.partition("+")[2])), tensors(tmp_path / "out")
    assert same(before["adapter_model.safetensors"], after["adapter_model.safetensors"])
    assert after["gate.safetensors"]["B.weight"].any()
    model = SiameseForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm.config.use_cache


@pytest.mark.parametrize("given", ["new", "joint"])
def test_gate_and_adapter_are_trained_together_if_it_is_new_or_asked_for(pair, adapter, tmp_path, given):
    base, joint = (None, False) if given == "new" else (adapter, True)
    asked = siamese(pair, base, gate=GateSettings(lr=0.05, rank=2, joint=joint), steps=20)
    result = finetune(asked, tmp_path / "out")["result"]
    assert result["loss_last"] < result["loss_first"] - 0.1
    after = tensors(tmp_path / "out")
    assert after["gate.safetensors"]["A.weight"].shape == (2, 4 * 32)
    if given == "joint":
        before = tensors(Path(adapter.partition("+")[2]))
        assert not same(before["adapter_model.safetensors"], after["adapter_model.safetensors"])


@pytest.mark.parametrize("joint", [False, True])
def test_an_interrupted_siamese_run_goes_on_to_the_same_weights(pair, adapter, tmp_path, joint):
    def stop(facts):
        if facts.get("step") == 4:
            raise KeyboardInterrupt

    given = siamese(pair, adapter, gate=GateSettings(lr=0.05, joint=joint), save_every=2)
    finetune(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(given, tmp_path / "cut", stop)
    assert finetune(given, tmp_path / "cut")["result"]["resumed_at"] == 2
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(same(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "lora", "gate": GateSettings()}, "Method lora has no gate"),
        ({"rank": 4}, "those it was made with"),
        ({"gate": GateSettings(mode="hidden_average")}, "nothing is trained"),
        ({"gate": GateSettings(mode="ful")}, "Did you mean full"),
    ],
)
def test_options_that_siamese_training_does_not_have_are_refused(pair, adapter, tmp_path, changes, says):
    with pytest.raises(ArmaError, match=says):
        finetune(replace(siamese(pair, adapter), **changes), tmp_path / "out")


def test_the_command_trains_a_gate_and_says_what_it_is(pair, adapter, tmp_path):
    words = [
        "finetune",
        adapter,
        str(pair / "sums.jsonl"),
        "--method",
        "siamese",
        "--gate-rank",
        "4",
        "--steps",
        "2",
    ]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out"), "--batch", "2"])
    assert done.exit_code == 0, done.output
    assert "cannot be merged" in done.output
    assert SiameseForCausalLM.from_pretrained(tmp_path / "out").siamese_config.rank == 4
