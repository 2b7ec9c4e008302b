import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_llama
from safetensors.torch import load_file, save_file
from toy import make_tokenizer

import arma_mergekit
from arma_mergekit.errors import CheckpointError
from arma_mergekit.load import load_live, load_tokenizer
from arma_mergekit.recipe import Recipe

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def pair(tmp_path):
    return make_pair(tmp_path)


def make_pair(root, **config):
    for seed, name in enumerate(("base", "tuned")):
        write_tiny_llama(root / name, seed, **config)
    return root


def recipe(root, dtype="float32", base="base"):
    path = root / "recipe.yml"
    path.write_text(
        f"merge_method: arma\nbase_model: {root}/{base}\nmodels:\n  - model: {root}/tuned\n"
        + (f"dtype: {dtype}\n" if dtype else "")
    )
    return Recipe.load(path)


def edit_config(root, *names, **changes):
    for name in names or ("base", "tuned"):
        file = root / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(root, change, *names):
    """Apply ``change(tensors)`` to the weights of both models, or of those named."""
    for name in names or ("base", "tuned"):
        file = root / name / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def refusal(root, **options):
    with pytest.raises(CheckpointError) as error:
        load_live(recipe(root, **options))
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_tensor_that_neither_checkpoint_has_is_refused_by_name(pair, capfd):
    edit_weights(pair, lambda tensors: tensors.pop(UP))
    message = refusal(pair)
    assert UP in message
    assert str(pair / "base") in message
    assert "REPORT" not in capfd.readouterr().err  # transformers' table of the same


def test_layers_that_only_config_json_knows_are_refused(pair):
    edit_config(pair, num_hidden_layers=3)
    message = refusal(pair)
    assert "model.layers.2." in message
    assert "config.json" in message


def test_sizes_of_config_json_that_disagree_with_the_weights_are_refused(pair):
    edit_config(pair, intermediate_size=72)
    message = refusal(pair)
    assert "model.layers.0.mlp.down_proj.weight has shape (32, 64)" in message
    assert "(32, 72)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_value_that_is_not_finite_is_refused_with_its_file_and_tensor(pair, side, value):
    edit_weights(pair, lambda tensors: tensors[UP].view(-1)[100].fill_(value), side)
    where = pair / side / "model.safetensors"
    assert refusal(pair) == (
        f"{where}, tensor '{UP}' has NaN or infinite values; download it again or retrain."
    )


def test_a_value_too_large_for_the_dtype_of_the_run_is_refused(pair):
    edit_weights(pair, lambda tensors: tensors[UP].view(-1)[3].fill_(1e5), "tuned")
    message = refusal(pair, dtype="float16")
    assert UP in message
    assert "float16" in message
    load_live(recipe(pair, dtype="bfloat16"))


def store_head(tensors):
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()


def test_a_tied_head_that_is_stored_too_shares_the_alpha_of_the_embedding(tmp_path):
    edit_weights(make_pair(tmp_path, tie_word_embeddings=True), store_head)
    loaded = load_live(recipe(tmp_path))
    assert EMBEDDING in loaded.tensors
    assert "lm_head.weight" not in loaded.tensors
    assert loaded.aliases == {"lm_head.weight": EMBEDDING}


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_tied_head_that_differs_from_the_embedding_is_refused_by_both_names(tmp_path, side):
    edit_weights(make_pair(tmp_path, tie_word_embeddings=True), store_head)
    edit_weights(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1), side)
    message = refusal(tmp_path)
    assert EMBEDDING in message
    assert "lm_head.weight" in message
    assert str(tmp_path / side) in message


def test_models_that_are_not_tied_have_no_aliases(pair):
    loaded = load_live(recipe(pair))
    assert "lm_head.weight" in loaded.tensors
    assert loaded.aliases == {}


def test_an_unknown_model_type_is_refused_with_the_directory(pair):
    edit_config(pair, model_type="foo")
    message = refusal(pair)
    assert str(pair / "base") in message
    assert "`foo`" in message


@pytest.mark.parametrize(
    "broken",
    [
        {"hidden_act": "zzz"},
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"hidden_size": -4},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_a_configuration_transformers_cannot_build_is_refused_in_one_sentence(pair, broken):
    edit_config(pair, **broken)
    assert f"The model {pair / 'base'} cannot be loaded (" in refusal(pair)


def test_code_in_a_model_directory_is_neither_run_nor_asked_about(pair):
    edit_config(pair, model_type="foo", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"})
    (pair / "base" / "a.py").write_text("raise SystemExit('ran')")
    assert "custom code" in refusal(pair)


@pytest.mark.parametrize("kind", ["t5", "bart", "vit"])
def test_only_causal_language_models_are_searched(pair, kind):
    edit_config(pair, model_type=kind)
    assert f"'{kind}' is no causal language model" in refusal(pair)


def test_without_a_dtype_in_the_recipe_that_of_config_json_counts(tmp_path):
    make_pair(tmp_path, dtype="float16")
    assert load_live(recipe(tmp_path, dtype=None)).live.model.dtype == torch.float16


def test_a_dtype_of_config_json_that_nobody_knows_is_refused_unless_the_recipe_has_one(pair):
    edit_config(pair, dtype="bf16")
    message = refusal(pair, dtype=None)
    assert str(pair / "base" / "config.json") in message
    assert "Did you mean bfloat16?" in message
    load_live(recipe(pair, dtype="bfloat16"))


def test_models_of_different_vocabularies_are_refused_though_a_merge_could_do(pair):
    shutil.rmtree(pair / "tuned")
    write_tiny_llama(pair / "tuned", 1, vocab_size=100)
    assert refusal(pair).startswith("The vocabularies differ: ")


def test_positions_and_vocabulary_are_those_of_the_model(pair):
    loaded = load_live(recipe(pair))
    assert (loaded.max_positions, loaded.vocabulary) == (128, 96)


def test_an_adapted_base_is_adapted_where_the_fine_tuned_model_does_not_differ_too(pair):
    adapter = pair / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    a, b = torch.ones(2, 32), torch.ones(64, 2)
    module = "base_model.model." + UP.removesuffix(".weight")
    save_file(
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    folded = (load_file(pair / "base" / "model.safetensors")[UP].float() + b @ a).bfloat16()
    edit_weights(pair, lambda tensors: tensors.update({UP: folded}), "tuned")
    loaded = load_live(recipe(pair, base=f"base+{adapter}"))
    assert UP not in loaded.tensors
    assert torch.equal(dict(loaded.live.model.named_parameters())[UP], folded.float())


def test_the_tokenizer_of_the_base_is_loaded(pair):
    make_tokenizer().save_pretrained(pair / "base")
    assert load_tokenizer(recipe(pair))("1+2")["input_ids"] == make_tokenizer()("1+2")["input_ids"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "mistral"])
def test_a_directory_without_a_tokenizer_is_refused(pair, kind):
    edit_config(pair, model_type=kind)
    with pytest.raises(CheckpointError, match=r"copy the tokenizer's files") as error:
        load_tokenizer(recipe(pair))
    assert str(pair / "base") in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"version',
        "[]",
        '{"version": "1.0"}',
        '{"version": "1.0", "added_tokens": [], "model": {"type": "Foo"}}',
    ],
)
def test_a_broken_tokenizer_file_is_refused_in_one_sentence(pair, text):
    make_tokenizer().save_pretrained(pair / "base")
    (pair / "base" / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(recipe(pair))
    assert str(error.value).startswith(f"The tokenizer of {pair / 'base'} cannot be loaded (")
    assert "\n" not in str(error.value)


def test_no_progress_bar_appears_when_the_command_line_forbids_them(pair):
    recipe(pair)
    code = "import sys; from arma_mergekit.load import *; from arma_mergekit.recipe import Recipe; "
    code += "print(len(load_live(Recipe.load(sys.argv[1])).tensors))"
    root = Path(arma_mergekit.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, pair / "recipe.yml"],
        env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "21\n", "")
