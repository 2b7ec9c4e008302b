"""A merge has the bits of mergekit-yaml, keeps the layout of its inputs, and appears whole or not at all."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import write_safetensors, write_tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import write_adapter

from arma_mergekit import __version__
from arma_mergekit.checkpoint import Checkpoint, open_model
from arma_mergekit.checkpoint.header import read_metadata
from arma_mergekit.cli import cli
from arma_mergekit.errors import CheckpointError, RecipeError, RunError, UsageError
from arma_mergekit.kernel import average
from arma_mergekit.merge import beside, merge, pinned, stream, verify
from arma_mergekit.merge.layout import Copied, lay_out
from arma_mergekit.merge.target import draft_of, remove_dead_drafts
from arma_mergekit.merge.unlike import unlike_base
from arma_mergekit.merge.verify import same_bits
from arma_mergekit.plan import plan
from arma_mergekit.recipe import Recipe

INDEX = "model.safetensors.index.json"
LOCK = "arma.lock.json"
Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {
        "base": write_tiny_llama(root / "base", seed=0),
        "tuned": write_tiny_llama(root / "tuned", seed=1),
        "second": write_tiny_llama(root / "second", seed=2),
        "half": write_tiny_llama(root / "half", seed=3, dtype="float16"),
        "full": write_tiny_llama(root / "full", seed=4, dtype="float32"),
        "half2": write_tiny_llama(root / "half2", seed=5, dtype="float16"),
        "full2": write_tiny_llama(root / "full2", seed=6, dtype="float32"),
    }
    found["sharded"] = shard(found["tuned"], root / "sharded", 5)
    adapted = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 64)}
    write_adapter(root / "lora", adapted)
    found["adapted"] = f"{found['base']}+{root / 'lora'}"
    return found


def shard(model, out, count):
    """The same checkpoint in ``count`` files, its tensors dealt out like cards."""
    tensors = load_file(model / "model.safetensors")
    out.mkdir()
    shutil.copy(model / "config.json", out)
    weight_map = {}
    for k in range(count):
        part = {name: tensors[name] for name in sorted(tensors)[k::count]}
        file = f"model-{k + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def content(base, *tuned, alpha=0.3, rest="finetuned", **keys):
    entries = [{"model": str(m), "parameters": {"alpha": alpha}} for m in tuned]
    return {
        "merge_method": "arma",
        "base_model": str(base),
        "models": entries,
        "parameters": {"rest": rest},
        **keys,
    }


def recipe(tmp_path, *args, **keys):
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(content(*args, **keys)))
    return Recipe.load(file)


def tensors(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [n for n in left if left[n].dtype != right[n].dtype] == []
    assert [n for n in left if not torch.equal(left[n], right[n])] == []


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


# ---------------------------------------------------------------------- the bits

CASES = {
    "attention": ("base", ["tuned"], {}),
    "attention, the rest the base's": ("base", ["tuned"], {"rest": "base"}),
    "everything": ("base", ["tuned"], {"rest": 0.7}),
    "extrapolated": ("base", ["tuned"], {"alpha": -0.4, "rest": 1.6}),
    "layer by layer": ("base", ["tuned"], {"alpha": [0.2, 0.9], "rest": [0.1, 1.2]}),
    "other shards": ("base", ["sharded"], {"rest": 0.5}),
    "shards of the base": ("sharded", ["base"], {"rest": "base"}),
    "two models": ("base", ["tuned", "second"], {"rest": 0.25}),
    "one of two unused": ("base", ["tuned", "second"], {"alpha": 0.0, "rest": 0.5}),
    "float16": ("half", ["half2"], {"rest": 0.5}),
    "bf16 with float16": ("base", ["half"], {"rest": 0.5}),
    "bf16 with float32": ("base", ["full"], {"rest": "finetuned"}),
    "read as float32": ("base", ["tuned"], {"rest": 0.5, "dtype": "float32"}),
    "read as float16": ("base", ["full"], {"rest": 0.5, "dtype": "float16"}),
    "float32 as bf16": ("full", ["full2"], {"rest": "finetuned", "dtype": "bfloat16"}),
    "written as float32": ("base", ["tuned"], {"rest": "finetuned", "out_dtype": "float32"}),
    "written as float16": ("full", ["tuned"], {"rest": 0.5, "out_dtype": "float16"}),
    "both": ("base", ["tuned"], {"rest": 0.5, "dtype": "float32", "out_dtype": "float16"}),
}


@pytest.mark.parametrize(("base", "tuned", "keys"), CASES.values(), ids=CASES.keys())
def test_a_merge_has_the_bits_of_mergekit(models, tmp_path, base, tuned, keys):
    made = recipe(tmp_path, models[base], *(models[t] for t in tuned), **keys)
    merge(made, tmp_path / "ours")
    run_merge(MergeConfiguration.model_validate(made.raw), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    assert_same(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))


def test_an_adapter_is_folded_in_without_a_directory_of_its_own(models, tmp_path):
    merge(recipe(tmp_path, models["base"], models["adapted"], rest="finetuned", alpha=0.5), tmp_path / "out")
    base, tuned, found = (
        Checkpoint.open(str(models["base"])),
        open_model(models["adapted"]),
        tensors(tmp_path / "out"),
    )
    for name in base.tensors:
        ours = found[name].view(torch.uint16).numpy()
        alpha = 0.5 if ".self_attn." in name else 1.0
        sides = [torch.from_numpy(np.array(c.read(name))).view(torch.bfloat16) for c in (base, tuned)]
        expected = average(sides[0], [sides[1]], [alpha]).view(torch.uint16).numpy()
        assert np.array_equal(ours, expected), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yml"]


def test_blocks_and_pieces_of_any_size_give_the_same_bits(models, tmp_path, monkeypatch):
    made = recipe(tmp_path, models["base"], models["adapted"], rest=0.4)
    merge(made, tmp_path / "whole")
    monkeypatch.setattr(stream, "CHUNK", 100)  # no multiple of a row
    monkeypatch.setattr("arma_mergekit.merge.layout.LONGEST_AVERAGE", 333)
    monkeypatch.setattr("arma_mergekit.merge.layout.LONGEST_COPY", 1000)
    merge(made, tmp_path / "pieces", workers=4)
    assert files(tmp_path / "pieces")["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]
    assert verify(tmp_path / "pieces").status == "verified"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alpha=st.floats(-2, 3), rest=st.floats(-2, 3), base=st.sampled_from(["base", "half", "full", "sharded"]),
    tuned=st.sampled_from(["second", "half2", "full2"]),
)  # fmt: skip
def test_whatever_the_alphas_the_kernel_would_have_said_the_same(
    models, tmp_path_factory, alpha, rest, base, tuned
):
    folder = tmp_path_factory.mktemp("case")
    merge(recipe(folder, models[base], models[tuned], alpha=alpha, rest=rest), folder / "out", digests=False)
    left, right, found = (tensors(p) for p in (models[base], models[tuned], folder / "out"))
    for name in found:
        weight = alpha if ".self_attn." in name else rest
        assert torch.equal(found[name], average(left[name], [right[name]], [weight])), name


def test_alpha_1_everywhere_is_the_finetuned_files_and_alpha_0_the_bases(models, tmp_path):
    merge(recipe(tmp_path, models["base"], models["sharded"], alpha=1, rest="finetuned"), tmp_path / "one")
    merge(recipe(tmp_path, models["base"], models["sharded"], alpha=0, rest="base"), tmp_path / "zero")
    for out, source in (("one", "sharded"), ("zero", "base")):
        weights = {n: b for n, b in files(models[source]).items() if n.endswith(".safetensors")}
        assert {n: b for n, b in files(tmp_path / out).items() if n.endswith(".safetensors")} == weights


def test_a_value_that_does_not_fit_the_dtype_is_named(models, tmp_path):
    big = write_tiny_llama(tmp_path / "big", dtype="float32")
    found = {n: t.float().numpy() for n, t in load_file(big / "model.safetensors").items()}
    found[Q1][0, 0] = 1e6
    write_safetensors(big / "model.safetensors", found)
    with pytest.raises(CheckpointError, match=rf"{Q1}: Values as large as 1e\+06 do not fit into F16"):
        merge(recipe(tmp_path, models["base"], big, alpha=1, out_dtype="float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_average_that_is_not_finite_is_named(models, tmp_path):
    broken = write_tiny_llama(tmp_path / "broken", dtype="float32")
    found = {n: t.numpy() for n, t in load_file(broken / "model.safetensors").items()}
    found[Q1] = np.where(np.arange(32) == 3, np.nan, found[Q1])
    write_safetensors(broken / "model.safetensors", found)
    with pytest.raises(CheckpointError, match=f"{Q1}: The average is not finite"):
        merge(recipe(tmp_path, models["base"], broken), tmp_path / "out")


def test_buffers_that_are_no_floats_must_agree(models, tmp_path):
    sides = []
    for k in range(2):
        side = write_tiny_llama(tmp_path / f"side{k}", seed=k)
        found = load_file(side / "model.safetensors") | {
            "model.layers.0.self_attn.mask": torch.tensor([k, 1])
        }
        save_file(found, side / "model.safetensors", metadata={"format": "pt"})
        sides.append(side)
    with pytest.raises(CheckpointError, match=r"mask .*differs between"):
        merge(recipe(tmp_path, *sides), tmp_path / "out")
    twin = tmp_path / "twin"
    shutil.copytree(sides[0], twin)
    merge(recipe(tmp_path, sides[0], twin, alpha=0.5), tmp_path / "out")
    assert tensors(tmp_path / "out")["model.layers.0.self_attn.mask"].tolist() == [0, 1]


# ---------------------------------------------------------------------- layout


def test_the_result_keeps_the_files_of_the_side_that_gives_most(models, tmp_path):
    merge(recipe(tmp_path, models["base"], models["sharded"], rest="finetuned"), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {
        p.name for p in models["sharded"].glob("*.safetensors")
    }
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    everything = tensors(tmp_path / "out").values()
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in everything),
        "total_size": sum(t.nbytes for t in everything),
    }
    assert index["weight_map"] == json.loads((models["sharded"] / INDEX).read_text())["weight_map"]


def test_shards_are_as_large_as_asked(models, tmp_path):
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out", shard_size=10_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert [p.name for p in shards] == [
        f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)
    ]
    for file in shards:
        assert sum(t.nbytes for t in load_file(file).values()) <= 10_000 or len(load_file(file)) == 1
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "whole")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert verify(tmp_path / "out").status == "verified"


def test_a_copy_is_few_long_runs(models, tmp_path):
    made = plan(recipe(tmp_path, models["base"], models["tuned"], rest="finetuned"))
    (shard,) = lay_out(made)
    copied = [p for p in shard.pieces if isinstance(p, Copied)]
    averaged = sum(t.action == "average" for t in made.tensors)
    assert len(copied) <= averaged + 1
    assert shard.pieces[0].start == 8 + len(shard.header)
    assert [p.stop for p in shard.pieces][:-1] == [p.start for p in shard.pieces][1:]
    assert shard.pieces[-1].stop == shard.size


def test_a_header_without_a_format_gets_one(models, tmp_path):
    plain = write_tiny_llama(tmp_path / "plain", seed=1)
    save_file(load_file(plain / "model.safetensors"), plain / "model.safetensors")
    assert read_metadata(plain / "model.safetensors")[0] == {}
    merge(recipe(tmp_path, models["base"], plain), tmp_path / "out")
    assert read_metadata(tmp_path / "out" / "model.safetensors")[0] == {"format": "pt"}


# ---------------------------------------------------------------------- what goes beside


def companion_model(path):
    write_tiny_llama(path)
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        (path / name).write_text(f'{{"from": "{path.name}"}}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "modeling_own.py").write_text("x = 1\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (path / "training_args.bin").write_bytes(b"a pickle")
    (path / "README.md").write_text("of the base")
    return path


def test_config_tokenizer_templates_and_code_are_the_bases_to_the_byte(models, tmp_path):
    base = companion_model(tmp_path / "from")
    merged = merge(recipe(tmp_path, base, models["tuned"]), tmp_path / "out")
    for name in (
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "modeling_own.py",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert (tmp_path / "out" / "README.md").exists() is False or "of the base" not in (
        tmp_path / "out" / "README.md"
    ).read_text()
    assert set(merged.lock["output"]["files"]) >= {"tokenizer.json", "additional_chat_templates/tools.jinja"}


BESIDE = (
    "video_preprocessor_config.json", "tekken.json", "audio_tokenizer_config.json", "source.spm", "target.spm",
    "bpe.codes", "vocab.txt", "License.md", "custom_generate/generate.py", "custom_generate/requirements.txt",
    "sub/mod.py", "sub/deep/er/mod.py", "modules.json", "1_Pooling/config.json",
)  # fmt: skip
NOT_BESIDE = (
    "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.bin", "weights.h5", "optimizer.pt", "a.gguf",
    "trainer_state.json", "train_results.json", "data.json", "notes.txt", "picture.png", ".env", ".hidden.json",
    "client_secret.json", "credentials.json", "siamese.json", "finetune.json", "arma.lock.json", "onnx/model.onnx",
    "checkpoint-5/modeling_own.py", ".git/hook.py", "a/b/c/d/mod.py", "data/rows.json", "onnx/config.json",
    "custom_generate/weights.safetensors",
)  # fmt: skip


def test_whatever_its_name_all_that_readers_need_goes_beside_and_nothing_else(models, tmp_path):
    base = write_tiny_llama(tmp_path / "from")
    for name in (*BESIDE, *NOT_BESIDE):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"{{}} {name}")
    (base / "pickled.model").write_bytes(b"\x80\x04 a pickle")
    (base / "zipped.model").write_bytes(b"PK\x03\x04 another")
    os.truncate(base / "tekken.json", 10**8)
    (base / "large.json").touch()
    os.truncate(base / "large.json", 10**9)
    (base / "elsewhere").symlink_to(tmp_path / "from" / "sub")
    out = tmp_path / "out"
    merge(recipe(tmp_path, base, models["tuned"]), out)
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written == {"config.json", "model.safetensors", LOCK, *BESIDE}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in BESIDE)
    assert verify(out).status == "verified"
    (out / "sub" / "mod.py").write_text("import os")
    (out / "source.spm").unlink()
    assert {"sub/mod.py is not the base's.", "source.spm is missing."} <= set(verify(out).findings)


def test_a_folder_of_code_that_leads_out_of_the_model_is_refused(models, tmp_path):
    base = companion_model(tmp_path / "from")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "generate.py").write_text("x = 1")
    (base / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the model"):
        merge(recipe(tmp_path, base, models["tuned"]), tmp_path / "out")


# ---------------------------------------------------------------------- what the fine-tuned model has otherwise


def put(path, name, content):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def unlike(models, tmp_path, ours, theirs, adapted=False):
    """Sentences on a base and a fine-tuned model (or an adapter) with these small files, without their names."""
    base, tuned = (write_tiny_llama(tmp_path / "unlike" / name) for name in ("base", "tuned"))
    if adapted:
        tuned = tmp_path / "unlike" / "lora"
        write_adapter(tuned, {"model.layers.0.self_attn.q_proj": (32, 32)})
    for path, files in ((base, ours), (tuned, theirs)):
        for name, content in files.items():
            put(path, name, content)
    ref = f"{base}+{tuned}" if adapted else str(tuned)
    found = list(unlike_base(open_model(str(base)), open_model(ref)))
    return [sentence.replace(ref, "TUNED").replace(str(base), "BASE") for sentence in found]


CONFIG, TOKENIZER, GENERATION = "tokenizer_config.json", "tokenizer.json", "generation_config.json"
JINJA = "chat_template.jinja"
UNLIKE = {
    "tokenizer": ({TOKENIZER: "1"}, {TOKENIZER: "2"}, "tokenizer.json differs between BASE and TUNED; the result has"),
    "vocabulary": ({"a.tiktoken": "1"}, {"a.tiktoken": "2"}, "a.tiktoken differs between BASE and TUNED"),
    "no tokenizer": (
        {}, {TOKENIZER: "1", CONFIG: {"eos_token": "x"}, JINJA: "t"},
        "Only TUNED has a tokenizer; the result has none, as the base: copy tokenizer.json, chat_template.jinja, "
        "tokenizer_config.json into it.",
    ),
    "template": ({}, {JINJA: "t"}, "Only TUNED has a chat template; the result has none"),
    "template in the settings": ({CONFIG: {}}, {CONFIG: {"chat_template": "t"}}, "Only TUNED has a chat template"),
    "other template": ({JINJA: "t"}, {CONFIG: {"chat_template": "u"}}, "The chat template of TUNED is not that of"),
    "further template": (
        {JINJA: "t"}, {JINJA: "t", "additional_chat_templates/rag.jinja": "r"}, "The chat template of TUNED is not",
    ),
    "end token": (
        {CONFIG: {"eos_token": "</s>"}}, {CONFIG: {"eos_token": {"content": "<|im_end|>"}}},
        'TUNED has other special tokens than BASE (eos_token "<|im_end|>" for "</s>"); the result has the base\'s',
    ),
    "end token in the map": (
        {"special_tokens_map.json": {"eos_token": "a"}}, {CONFIG: {"eos_token": "b"}}, 'TUNED has other special tokens',
    ),
    "generation": (
        {GENERATION: {"eos_token_id": 2}}, {GENERATION: {"eos_token_id": [2, 7]}},
        "TUNED generates with other settings than BASE (eos_token_id [2, 7] for 2); the result has the base's",
    ),
    "generation alone": ({}, {GENERATION: {"temperature": 0.6}}, "TUNED generates with other settings than BASE"),
    "end id of the config": ({GENERATION: {"eos_token_id": 7}}, {}, "TUNED generates with other settings than BASE"),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "expected"), UNLIKE.values(), ids=UNLIKE.keys())
def test_what_the_result_will_not_have_of_the_finetuned_model_is_one_sentence(
    models, tmp_path, ours, theirs, expected
):
    (sentence,) = unlike(models, tmp_path, ours, theirs)
    assert sentence.startswith(expected)


ALIKE = {
    "nothing": ({}, {}),
    "only the base's": ({TOKENIZER: "1", JINJA: "t", GENERATION: {"top_p": 0.9}}, {}),
    "kept elsewhere": ({JINJA: "t\n"}, {CONFIG: {"chat_template": [{"name": "default", "template": "t"}]}}),
    "saved again": (
        {CONFIG: {"eos_token": {"content": "e"}, "name_or_path": "a", "tokenizer_class": "LlamaTokenizer"}},
        {CONFIG: {"eos_token": "e", "bos_token": None, "backend": "tokenizers", "pad_token": "e"}},
    ),
    "library": (
        {GENERATION: {"transformers_version": "4", "do_sample": False, "bos_token_id": None}},
        {GENERATION: {"transformers_version": "5", "_from_model_config": True, "eos_token_id": [2], "temperature": 1.0,
                      "pad_token_id": 2, "use_cache": False}},
    ),
    "no JSON": ({CONFIG: {}}, {CONFIG: "{", GENERATION: "[]"}),
    "odd": ({CONFIG: {}}, {CONFIG: {"chat_template": [5, {"name": 3}], "eos_token": {}}, GENERATION: {}}),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), ALIKE.values(), ids=ALIKE.keys())
def test_what_changes_nothing_for_users_is_no_warning(models, tmp_path, ours, theirs):
    assert unlike(models, tmp_path, ours, theirs) == []


def test_the_tokenizer_saved_beside_an_adapter_is_the_finetuned_models(models, tmp_path):
    ours, theirs = {CONFIG: {}, TOKENIZER: "1"}, {CONFIG: {}, TOKENIZER: "1", JINJA: "t"}
    (sentence,) = unlike(models, tmp_path, ours, theirs, adapted=True)
    assert sentence.startswith("Only TUNED has a chat template")


def test_a_merge_warns_of_what_the_finetuned_model_has_otherwise(models, tmp_path):
    base, tuned = companion_model(tmp_path / "from"), companion_model(tmp_path / "to")
    merged = merge(recipe(tmp_path, base, tuned, alpha=0.5), tmp_path / "out")
    assert f"tokenizer.json differs between {base} and {tuned}; " in "\n".join(merged.warnings)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configs_dtype_follows_the_weights(models, tmp_path, key):
    base = write_tiny_llama(tmp_path / "from")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k if k != "dtype" else key: v for k, v in config.items()}))
    merge(recipe(tmp_path, base, models["tuned"], out_dtype="float32"), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {**{k: v for k, v in config.items() if k != "dtype"}, key: "float32"}


def test_a_companion_that_leads_out_of_the_model_is_refused(models, tmp_path):
    base = companion_model(tmp_path / "from")
    (tmp_path / "secret").write_text("password")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"link to .*secret, outside the model"):
        merge(recipe(tmp_path, base, models["tuned"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- lock


def test_the_lock_holds_digests_of_everything_read_and_written(models, tmp_path):
    merged = merge(recipe(tmp_path, models["base"], models["sharded"], alpha=[0.2, 0.6]), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    assert lock == merged.lock
    for name, said in lock["output"]["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert said == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(lock["output"]["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {LOCK}
    for side, model in zip(lock["inputs"], (models["base"], models["sharded"]), strict=True):
        assert set(side["files"]) == {p.name for p in model.iterdir()}
        for name, said in side["files"].items():
            assert said["sha256"] == hashlib.sha256((model / name).read_bytes()).hexdigest()
    assert lock["tool"]["arma_mergekit"] == __version__
    assert lock["alphas"][Q1] == 0.6
    assert lock["roles"][Q1] == [1, "q", True]
    assert lock["evaluation"] is None


def test_an_adapters_files_are_in_the_lock(models, tmp_path):
    merged = merge(recipe(tmp_path, models["base"], models["adapted"]), tmp_path / "out")
    assert {"lora/adapter_model.safetensors", "lora/adapter_config.json"} <= set(
        merged.lock["inputs"][1]["files"]
    )


def test_the_commit_of_a_hub_model_is_in_the_lock(models, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("ab" * 20)
    shutil.copytree(models["base"], snapshot)
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("ab" * 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    merged = merge(recipe(tmp_path, "org/name", models["tuned"]), tmp_path / "out")
    assert [side["commit"] for side in merged.lock["inputs"]] == ["ab" * 20, None]
    assert merged.lock["inputs"][0]["ref"] == "org/name"

    # its branch moves on: the same merge is still checked, and made, from the commit of then
    shutil.copytree(models["tuned"], snapshot.with_name("cd" * 20))
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("cd" * 20)
    assert verify(tmp_path / "out").status == "verified"
    assert pinned(merged.lock)["base_model"] == "org/name@" + "ab" * 20
    again = CliRunner().invoke(cli, ["reproduce", str(tmp_path / "out"), str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    shutil.rmtree(snapshot)
    assert verify(tmp_path / "out").status == "inconclusive"


def test_a_commit_is_pinned_in_references_of_every_form():
    inputs = [
        {"ref": "a/b@main", "commit": "1" * 40},
        {"ref": "a/b+c/d@v1", "commit": "2" * 40, "adapter_commit": "3" * 40},
        {"ref": "there/e", "commit": None},
    ]
    raw = {
        "base_model": "a/b@main",
        "models": [{"model": "a/b+c/d@v1"}, {"model": "there/e"}],
        "alpha": [0.5],
    }
    assert pinned({"recipe": raw, "inputs": inputs}) == {
        "base_model": "a/b@" + "1" * 40,
        "models": [{"model": f"a/b@{'2' * 40}+c/d@{'3' * 40}"}, {"model": "there/e"}],
        "alpha": [0.5],
    }


def test_every_file_that_is_read_or_copied_is_in_the_lock(models, tmp_path):
    shutil.copytree(models["sharded"], tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    inputs = merge(recipe(tmp_path, tmp_path / "base", models["tuned"]), tmp_path / "out").lock["inputs"]
    assert {"generation_config.json", "config.json", "model.safetensors.index.json"} < set(inputs[0]["files"])
    assert all(said["sha256"] for side in inputs for said in side["files"].values())


@pytest.mark.parametrize(
    ("spot", "sentence", "options"),
    [
        (("alphas",), "has other alphas than its recipe gives", {}),
        (("roles",), "has other roles than its recipe gives", {}),
        (
            ("output", "files", "model.safetensors", "sha256"),
            "its sha256 is not the one in",
            {"digests": True},
        ),
        (
            ("inputs", 1, "files", "config.json", "sha256"),
            "is not the file that was merged",
            {"digests": True},
        ),
    ],
)
def test_a_lock_that_says_something_else_is_found(models, tmp_path, spot, sentence, options):
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out")
    assert verify(tmp_path / "out", digests=True).status == "verified"
    lock = json.loads((tmp_path / "out" / "arma.lock.json").read_text())
    inside = lock
    for key in spot[:-1]:
        inside = inside[key]
    inside[spot[-1]] = "0" * 64 if spot[-1] == "sha256" else dict.fromkeys(inside[spot[-1]], 0.123)
    (tmp_path / "out" / "arma.lock.json").write_text(json.dumps(lock))
    report = verify(tmp_path / "out", **options)
    assert report.status == "differs"
    assert sentence in " ".join(report.findings)


def test_without_digests_nothing_is_hashed(models, tmp_path):
    merged = merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out", digests=False)
    weights = merged.lock["output"]["files"]["model.safetensors"]
    assert weights["sha256"] is None
    assert {f["sha256"] for side in merged.lock["inputs"] for f in side["files"].values()} == {None}
    assert verify(tmp_path / "out").status == "verified"


def test_new_tokens_of_the_finetuned_model_do_not_matter_where_the_rest_is_the_bases(models, tmp_path):
    write_tiny_llama(tmp_path / "tuned", 1, vocab_size=100)
    merge(recipe(tmp_path, models["base"], tmp_path / "tuned", rest="base"), tmp_path / "out")
    found, base = tensors(tmp_path / "out"), tensors(models["base"])
    assert [n for n in base if not torch.equal(found[n], base[n]) and ".self_attn." not in n] == []
    assert any(not torch.equal(found[n], base[n]) for n in base)
    assert verify(tmp_path / "out").status == "verified"


# ---------------------------------------------------------------------- the target


@pytest.mark.parametrize("sync", [True, False])
def test_every_file_and_directory_is_synced_unless_told_not_to(models, tmp_path, monkeypatch, sync):
    synced, early, fsync = set(), [], os.fsync
    monkeypatch.setattr(
        stream.os,
        "fsync",
        lambda f: (synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{f}"))), fsync(f)),
    )
    monkeypatch.setattr(stream, "write_back", lambda *part: early.append(part))
    made = recipe(tmp_path, models["base"], models["tuned"])
    merge(made, tmp_path / "out", sync=sync)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert bool(early) == sync
    if sync:
        assert synced >= names | {tmp_path.name}
        assert any(name.startswith(".out.arma-draft-") for name in synced)
    else:
        assert not synced
    merge(made, tmp_path / "again", digests=False)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "again"))


def test_a_directory_with_something_in_it_is_refused(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    made = recipe(tmp_path, models["base"], models["tuned"])
    with pytest.raises(UsageError, match=r"is not empty; .*--overwrite"):
        merge(made, tmp_path / "out")
    with pytest.raises(UsageError, match="holds no model, so it is not replaced"):
        merge(made, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == {"thesis.txt": b"years of work"}
    (tmp_path / "out" / "config.json").write_text('{"port": 80}')  # as in many a project
    with pytest.raises(UsageError, match="holds no model, so it is not replaced"):
        merge(made, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_mount_point_is_refused_before_any_work(models, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(UsageError, match=r"is a mount point, .* name one inside it"):
        merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out")


def test_overwrite_replaces_the_whole_directory(models, tmp_path):
    made = recipe(tmp_path, models["base"], models["sharded"])
    merge(made, tmp_path / "out", shard_size=5000)
    (tmp_path / "out" / "note.txt").write_text("of the old one")
    merge(made, tmp_path / "out", overwrite=True)
    assert {p.name for p in (tmp_path / "out").glob("*")} == {
        LOCK,
        *(p.name for p in models["sharded"].iterdir()),
    }
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_empty_directory_and_a_link_to_one_are_fine(models, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_a_config_that_vanishes_as_it_is_copied_is_an_input_that_changed(models, tmp_path, monkeypatch):
    shutil.copytree(models["base"], tmp_path / "base")
    real = beside.companions

    def vanishing(*arguments):
        for name, file, content in real(*arguments):
            file.unlink()
            yield name, file, content

    monkeypatch.setattr(beside, "companions", vanishing)
    with pytest.raises(CheckpointError, match=r"config\.json changed or vanished"):
        merge(recipe(tmp_path, tmp_path / "base", models["tuned"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_digests_are_those_of_the_files_whether_one_worker_fills_a_file_or_several(models, tmp_path, workers):
    lock = merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out", workers=workers).lock
    for name, said in lock["output"]["files"].items():
        assert said["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest(), name


@pytest.mark.parametrize("at", [0, 6, 7, 8, 12])
def test_verify_compares_the_last_bytes_too(at):
    one = np.arange(13, dtype=np.uint8)
    other = one.copy()
    assert same_bits(one, other)
    other[at] += 1
    assert not same_bits(one, other)


def test_an_adapter_inside_the_target_is_never_overwritten(models, tmp_path):
    out = tmp_path / "deployed"
    merge(recipe(tmp_path, models["base"], models["tuned"]), out)
    shutil.copytree(str(models["adapted"]).partition("+")[2], out / "adapter")
    made = recipe(tmp_path, models["base"], f"{models['base']}+{out / 'adapter'}")
    with pytest.raises(UsageError, match=r"deployed holds .*adapter, which is needed"):
        merge(made, out, overwrite=True)
    assert (out / "adapter" / "adapter_config.json").exists()


def test_inputs_are_never_overwritten(models, tmp_path):
    shutil.copytree(models["base"], tmp_path / "base")
    before = files(tmp_path / "base")
    with pytest.raises(UsageError, match="which is needed"):
        merge(recipe(tmp_path, tmp_path / "base", models["tuned"]), tmp_path / "base", overwrite=True)
    assert files(tmp_path / "base") == before


def test_a_full_disk_is_found_before_anything_is_written(models, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"has 0\.00 GB free and the result takes"):
        merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yml"]


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_result(models, tmp_path):
    made = recipe(tmp_path, models["base"], models["tuned"])
    merge(made, tmp_path / "out")
    before = files(tmp_path / "out")
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from arma_mergekit.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "merge", str(made.path), str(tmp_path / "out"), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert re.fullmatch(
        r"Error: Cannot write .*: File too large\. Nothing was left behind; .*\n", done.stderr
    )
    assert files(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yml"]


def test_an_input_that_shrinks_meanwhile_stops_the_merge(models, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(models["tuned"], tuned)
    made = recipe(tmp_path, models["base"], tuned)

    def begin(_):
        os.truncate(tuned / "model.safetensors", 5000)
        return lambda _: None

    with pytest.raises(CheckpointError, match="changed or vanished while it was in use"):
        merge(made, tmp_path / "out", begin=begin)
    assert not (tmp_path / "out").exists()


def test_drafts_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.arma-draft-dead1234").mkdir()
    (tmp_path / ".out.arma-draft-dead1234" / "model.safetensors").write_bytes(b"half of it")
    with draft_of(out, 0) as draft:
        assert not (tmp_path / ".out.arma-draft-dead1234").exists()
        held = subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; from arma_mergekit.merge.target import "
             "remove_dead_drafts; print(remove_dead_drafts(Path(sys.argv[1])))", str(out)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert held.stdout == "[]\n"
        assert draft.exists()
    assert out.is_dir()


def test_what_was_moved_aside_by_a_process_that_died_comes_back(tmp_path):
    old = tmp_path / ".out.arma-old-abcd1234"
    old.mkdir()
    (old / "config.json").write_text("{}")
    remove_dead_drafts(tmp_path / "out")
    assert files(tmp_path / "out") == {"config.json": b"{}"}


def test_names_with_wildcards_are_only_names(tmp_path):
    (tmp_path / ".x.arma-12345678").mkdir()
    assert remove_dead_drafts(tmp_path / "[x]") == []
    assert remove_dead_drafts(tmp_path / "?") == []
    assert (tmp_path / ".x.arma-12345678").exists()


def test_two_names_are_exchanged_in_two_steps_where_the_system_has_no_other_way(
    models, tmp_path, monkeypatch
):
    made = recipe(tmp_path, models["base"], models["tuned"])
    merge(made, tmp_path / "out")
    (tmp_path / "out" / "note.txt").write_text("old")
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    merge(made, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "note.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(models, tmp_path, number):
    made = recipe(tmp_path, models["base"], models["tuned"])
    slow = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs ignore it
        "from arma_mergekit.merge import stream; real = stream.write\n"
        "def write(*a): print('writing', flush=True); time.sleep(0.2); real(*a)\n"
        "stream.write = write; from arma_mergekit.cli import main; main()"
    )
    command = [sys.executable, "-c", slow, "merge", str(made.path), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("writing")  # of one worker or of two at once
        process.send_signal(number)
        process.wait(20)
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        said = process.stderr.read()
        assert "out is as it was, or complete; the same command starts again." in said
        assert "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yml"]


# ---------------------------------------------------------------------- verify


@pytest.fixture
def merged(models, tmp_path):
    merge(recipe(tmp_path, models["base"], models["sharded"], rest="finetuned"), tmp_path / "out")
    return tmp_path / "out"


def flip(file, at, bit=1):
    data = bytearray(file.read_bytes())
    data[at] ^= bit
    file.write_bytes(data)


def test_a_merge_is_verified_tensor_by_tensor(merged):
    report = verify(merged)
    assert (report.status, report.findings, report.missing) == ("verified", (), ())
    assert report.tensors == len(tensors(merged))


@pytest.mark.parametrize("name", [Q1, "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_one_flipped_bit_is_found_and_its_tensor_named(merged, name):
    info = Checkpoint.open(str(merged)).tensors[name]
    flip(info.file, info.stop - 1)
    report = verify(merged)
    assert report.status == "differs"
    (finding,) = report.findings
    assert re.fullmatch(rf"{name}: 1 of {info.numel:,} elements differ, by up to \S+\.", finding)


def test_every_difference_is_listed(merged):
    found = Checkpoint.open(str(merged)).tensors
    names = sorted(found)[::3]
    for name in names:
        flip(found[name].file, found[name].start)
    assert [f.partition(":")[0] for f in verify(merged).findings] == names


def test_files_of_another_model_are_found(models, merged):
    for file in models["sharded"].glob("*.safetensors"):
        shutil.copy(file, merged)
    differing = {f.partition(":")[0] for f in verify(merged).findings}
    assert differing == {n for n in tensors(merged) if ".self_attn." in n}


def test_a_changed_config_is_found(merged):
    config = (merged / "config.json").read_text()
    (merged / "config.json").write_text(config.replace("10000.0", "20000.0"))
    assert verify(merged).findings == ("config.json is not the base's.",)


def test_totals_in_the_index_are_checked(merged):
    text = (merged / INDEX).read_text()
    (merged / INDEX).write_text(re.sub(r'"total_size": \d+', '"total_size": 5', text))
    assert any("says total_size 5" in f for f in verify(merged, quick=True).findings)


def test_quick_reads_no_weights(merged):
    info = Checkpoint.open(str(merged)).tensors[Q1]
    flip(info.file, info.start)
    assert verify(merged, quick=True).status == "verified"
    os.truncate(info.file, info.file.stat().st_size - 2)
    assert verify(merged, quick=True).status == "unreadable"


def test_what_is_no_checkpoint_is_unreadable(merged):
    next(iter(merged.glob("*.safetensors"))).unlink()
    report = verify(merged)
    assert report.status == "unreadable"
    assert "is missing though" in report.findings[0]


def test_without_a_lock_or_recipe_it_is_inconclusive(models, merged, tmp_path):
    (merged / LOCK).unlink()
    assert verify(merged).status == "inconclusive"
    assert verify(merged, Recipe.load(tmp_path / "recipe.yml")).status == "verified"


def test_without_the_inputs_only_digests_are_compared(models, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(models["tuned"], tuned)
    merge(recipe(tmp_path, models["base"], tuned), tmp_path / "out")
    shutil.rmtree(tuned)
    assert verify(tmp_path / "out").status == "inconclusive"
    info = Checkpoint.open(str(tmp_path / "out")).tensors[Q1]
    flip(info.file, info.start)
    report = verify(tmp_path / "out")
    assert report.status == "differs"
    assert "model.safetensors is not the file that was merged" in report.findings[0]


def test_an_input_that_changed_since_is_a_difference(models, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(models["tuned"], tuned)
    merge(recipe(tmp_path, models["base"], tuned), tmp_path / "out")
    info = Checkpoint.open(str(tuned)).tensors[Q1]
    flip(info.file, info.start, 0x40)
    assert [f.partition(":")[0] for f in verify(tmp_path / "out").findings] == [Q1]


# ---------------------------------------------------------------------- commands


def invoke(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_merge_verify_and_reproduce_from_the_command_line(models, tmp_path):
    made = recipe(tmp_path, models["base"], models["tuned"])
    done = invoke("merge", made.path, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "8 tensors averaged" in done.output
    assert f"arma verify {tmp_path / 'out'}" in done.output
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out")], standalone_mode=False)
    assert (
        done.return_value,
        done.output.endswith("verified: 21 tensors have the bits that the inputs give.\n"),
    ) == (0, True)
    done = CliRunner().invoke(
        cli, ["reproduce", str(tmp_path / "out" / LOCK), str(tmp_path / "again")], standalone_mode=False
    )
    assert (done.return_value, "reproduced to the byte" in done.output) == (0, True)
    assert files(tmp_path / "again")["model.safetensors"] == files(tmp_path / "out")["model.safetensors"]


@pytest.mark.parametrize(("spoil", "code"), [("flip", 1), ("truncate", 2), ("lock", 3)])
def test_the_exit_code_of_verify_says_what_is_wrong(models, tmp_path, spoil, code):
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    if spoil == "flip":
        flip(file, -1)
    elif spoil == "truncate":
        os.truncate(file, 1000)
    else:
        (tmp_path / "out" / LOCK).unlink()
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--json"], standalone_mode=False)
    assert done.return_value == code
    assert json.loads(done.output)["status"] == {1: "differs", 2: "unreadable", 3: "inconclusive"}[code]


def test_a_merge_that_comes_out_otherwise_is_not_reproduced_and_the_input_is_blamed(models, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(models["tuned"], tuned)
    merge(recipe(tmp_path, models["base"], tuned), tmp_path / "out")
    info = Checkpoint.open(str(tuned)).tensors[Q1]
    flip(info.file, info.start, 0x40)
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    lock["tool"]["numpy"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(lock))
    done = CliRunner().invoke(
        cli, ["reproduce", str(tmp_path / "old.json"), str(tmp_path / "again")], standalone_mode=False
    )
    assert done.return_value == 1
    grades = [line.split(":")[0].strip() for line in done.output.splitlines()]
    assert grades[:3] == ["result", "input", "environment"]
    assert "model.safetensors of" in done.output


@pytest.mark.parametrize("text", ["5 parsecs", "-1", "0", "0.5", "GB"])
def test_a_shard_size_that_is_none_is_refused(models, tmp_path, text):
    made = recipe(tmp_path, models["base"], models["tuned"])
    done = CliRunner().invoke(
        cli,
        ["merge", str(made.path), str(tmp_path / "out"), f"--out-shard-size={text}"],
        standalone_mode=False,
    )
    assert isinstance(done.exception, UsageError)
    assert "--out-shard-size must be a size like 5GB" in str(done.exception)


# ---------------------------------------------------------------------- mergekit's executor


def linear(models):
    sides = [
        {"model": str(models[m]), "parameters": {"weight": w}} for m, w in (("base", 0.5), ("tuned", 0.5))
    ]
    return {"merge_method": "linear", "models": sides, "dtype": "bfloat16"}


def test_other_methods_go_to_mergekits_executor_and_are_as_safe(models, tmp_path):
    (tmp_path / "linear.yml").write_text(yaml.safe_dump(linear(models)))
    done = invoke("merge", tmp_path / "linear.yml", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "merge_method linear is mergekit's work" in done.output
    run_merge(
        MergeConfiguration.model_validate(linear(models)), str(tmp_path / "theirs"), MergeOptions(quiet=True)
    )
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "theirs"))
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    assert lock["executor"] == "mergekit"
    assert set(lock["output"]["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {LOCK}
    report = verify(tmp_path / "out")
    assert (report.status, report.findings) == ("inconclusive", ())
    flip(tmp_path / "out" / "model.safetensors", -1)
    assert verify(tmp_path / "out").status == "differs"


def test_a_failure_of_mergekit_is_a_sentence_and_leaves_nothing(models, tmp_path):
    (tmp_path / "bad.yml").write_text(yaml.safe_dump({**linear(models), "merge_method": "linea"}))
    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "bad.yml"), str(tmp_path / "out")], standalone_mode=False
    )
    assert isinstance(done.exception, RunError)
    assert "mergekit" in str(done.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yml"]


def with_tokenizer(path, seed, **config):
    """A tiny Llama with a tokenizer, a generation config and a licence."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    write_tiny_llama(path, seed, **config)
    words = models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 96)}}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>").save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    (path / "LICENSE").write_text("of the base")
    (path / "vocab.json").write_text("{}")
    return path


@pytest.fixture
def spoken(tmp_path):
    """Content of a recipe of ours that mergekit's executor does, since it names a tokenizer."""
    sides = [with_tokenizer(tmp_path / "models" / name, seed) for seed, name in enumerate(("base", "tuned"))]
    return content(*sides, tokenizer={"source": "base"})


def merge_others(tmp_path, given, *options):
    (tmp_path / "others.yml").write_text(yaml.safe_dump(given))
    return CliRunner().invoke(
        cli, ["merge", str(tmp_path / "others.yml"), str(tmp_path / "out"), *options], standalone_mode=False
    )


def test_what_mergekit_leaves_beside_the_base_is_there_and_readable_for_all(spoken, tmp_path):
    umask = os.umask(0o027)
    try:
        done = merge_others(tmp_path, spoken)
    finally:
        os.umask(umask)
    assert done.exit_code == 0, done.output
    base = tmp_path / "models" / "base"
    for name in ("generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "vocab.json").exists()  # of a tokenizer that mergekit writes anew
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()} == {"0o640"}
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    assert set(lock["output"]["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {LOCK}


def test_an_executor_that_loses_tensors_is_an_error_that_names_them(tmp_path):
    sides = [write_tiny_llama(tmp_path / "models" / name, seed) for seed, name in enumerate("ab")]
    for side in sides:  # Llama's attention_bias, which mergekit's definition of Llama does not have
        held = load_file(side / "model.safetensors")
        held["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32, dtype=torch.bfloat16)
        save_file(held, side / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((side / "config.json").read_text())
        (side / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    done = merge_others(tmp_path, linear({"base": sides[0], "tuned": sides[1]}))
    assert isinstance(done.exception, RunError)
    assert re.search(r"leaves out model\.layers\.1\.self_attn\.q_proj\.bias, which all", str(done.exception))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "others.yml"]


def fused(path, seed):
    """Experts one by one, which mergekit writes as transformers 5 holds them: all in two tensors."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(path)


def renamed(path, seed):
    """GPT-2 as it was first published: no `transformer.` before its names, and buffers beside its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 32}
    GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    held = load_file(path / "model.safetensors")
    held = {name.removeprefix("transformer."): values for name, values in held.items()}
    held |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})


def tied(path, seed):
    """A head that is the embedding, and is not stored."""
    write_tiny_llama(path, seed, tie_word_embeddings=True)


@pytest.mark.parametrize("write", [fused, renamed, tied])
def test_tensors_that_have_new_names_or_are_computed_are_not_lost(tmp_path, write):
    for seed, name in enumerate(("base", "tuned")):
        write(tmp_path / name, seed)
    done = merge_others(tmp_path, linear({n: tmp_path / n for n in ("base", "tuned")}))
    assert done.exit_code == 0, done.exception


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda given: given["models"][0].update(paramters={"alpha": 0.6}), "'paramters'"),
        (lambda given: given["parameters"].update(alpah=0.9), "'alpah'"),
        (lambda given: sliced(given)[0].update(paramters={"alpha": 0.6}), "'paramters' in .* at slices"),
        (
            lambda given: sliced(given)[0]["sources"][1]["parameters"].update(alpah=1),
            r"'alpah' in .*sources\[1\]",
        ),
        (lambda given: sliced(given) and given.update(paramters={}), "'paramters'"),
    ],
)
def test_a_key_that_mergekit_would_pass_over_is_an_error_in_recipes_of_ours(tmp_path, spoken, fault, words):
    fault(spoken)
    done = merge_others(tmp_path, spoken)
    assert isinstance(done.exception, RecipeError)
    assert re.search(words, str(done.exception))
    assert not (tmp_path / "out").exists()


def sliced(given):
    """Make slices of a recipe's models; returns them."""
    base, tuned = given["base_model"], given.pop("models")[0]
    given["slices"] = [
        {
            "sources": [
                {"model": base, "layer_range": at},
                {**tuned, "layer_range": at, "parameters": {"alpha": 1}},
            ]
        }
        for at in ([0, 1], [1, 2])
    ]
    return given["slices"]


def test_slices_of_ours_are_merged_by_mergekit(tmp_path, spoken):
    sliced(spoken)
    done = merge_others(tmp_path, spoken)
    assert done.exit_code == 0, done.exception
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "models" / "tuned"))


def test_files_of_mergekits_executor_are_as_large_as_asked_and_their_index_is_complete(models, tmp_path):
    done = merge_others(tmp_path, linear(models), "--out-shard-size=20KB")
    assert done.exit_code == 0, done.exception
    found = tensors(tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert metadata["total_parameters"] == sum(t.numel() for t in found.values())
    assert metadata["total_size"] == 2 * metadata["total_parameters"]
    assert "mergekit_version" in metadata
    assert (verify(tmp_path / "out").status, verify(tmp_path / "out").findings) == ("inconclusive", ())
    again = invoke("reproduce", tmp_path / "out" / LOCK, tmp_path / "again")
    assert again.exit_code == 0, again.output
    refused = merge_others(tmp_path, linear(models), "--no-digests", "--overwrite")
    assert isinstance(refused.exception, UsageError)


def test_what_mergekit_writes_is_synced(models, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda f: (synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{f}"))), fsync(f))
    )
    assert merge_others(tmp_path, linear(models)).exit_code == 0
    assert synced >= {p.name for p in (tmp_path / "out").iterdir()} | {tmp_path.name}


def test_an_input_that_changes_while_mergekit_reads_it_is_named(models, tmp_path, monkeypatch):
    shutil.copytree(models["tuned"], tmp_path / "tuned")

    def touched(*args, **keys):
        run_merge(*args, **keys)
        (tmp_path / "tuned" / "config.json").touch()

    monkeypatch.setattr("mergekit.merge.run_merge", touched)
    done = merge_others(tmp_path, linear(models | {"tuned": tmp_path / "tuned"}))
    assert isinstance(done.exception, CheckpointError)
    assert "config.json changed" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_silences_mergekit_too(tmp_path, spoken, quiet):
    done = merge_others(tmp_path, spoken, *["--quiet"] * quiet)
    assert done.exit_code == 0, done.exception
    assert (done.stdout == done.stderr == "") == quiet
    assert ("Building tokenizer" in done.stderr) != quiet


# ---------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Anonymous memory of the streaming itself, by numpy's own account of its buffers."""
    import tracemalloc

    peaks, sizes = [], []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        size = {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "vocab_size": 2048,
            "head_dim": 64,
            "num_hidden_layers": layers,
        }
        base, tuned = (write_tiny_llama(folder / f"m{k}", seed=k, **size) for k in range(2))
        made = recipe(folder, base, tuned, rest=0.5)
        plan(made)  # imports
        tracemalloc.start()
        merge(made, folder / "out", workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append((folder / "out" / "model.safetensors").stat().st_size)
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0])
    assert peaks[1] < 40e6


# ---------------------------------------------------------------------- what a hostile reviewer found


def test_a_model_called_base_is_not_taken_for_the_base(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["base"], "original")
    shutil.copytree(models["tuned"], "base")
    merge(recipe(tmp_path, "original", "base", alpha=0.4, rest="base"), tmp_path / "out")
    assert torch.equal(
        tensors(tmp_path / "out")["lm_head.weight"], tensors(tmp_path / "original")["lm_head.weight"]
    )
    assert verify(tmp_path / "out").status == "verified"


def test_tensors_of_no_elements_are_merged_too(models, tmp_path):
    sides = []
    for k in range(2):
        side = write_tiny_llama(tmp_path / f"side{k}", seed=k)
        empty = {
            "model.layers.0.self_attn.none": torch.zeros(4, 0, dtype=torch.bfloat16),
            "model.zero": torch.zeros(0),
        }
        save_file(load_file(side / "model.safetensors") | empty, side / "model.safetensors")
        sides.append(side)
    merge(recipe(tmp_path, *sides, out_dtype="float32"), tmp_path / "out")
    assert tensors(tmp_path / "out")["model.layers.0.self_attn.none"].shape == (4, 0)
    assert verify(tmp_path / "out").status == "verified"


def test_a_dtype_on_the_way_is_not_skipped_by_a_copy(models, tmp_path):
    made = recipe(tmp_path, models["base"], models["tuned"], dtype="float16", out_dtype="bfloat16")
    merge(made, tmp_path / "ours")
    run_merge(MergeConfiguration.model_validate(made.raw), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    assert_same(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))


@pytest.mark.parametrize("shard", ["tokenizer_1", "arma.lock.json", "vocab.json", "x.py"])
def test_weights_under_the_name_of_another_file_are_refused(models, tmp_path, shard):
    odd = write_tiny_llama(tmp_path / "odd", seed=1)
    names = list(load_file(odd / "model.safetensors"))
    (odd / "model.safetensors").rename(odd / shard)
    (odd / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(RecipeError, match=r"lists the shard .* which is no \.safetensors file"):
        merge(recipe(tmp_path, models["base"], odd), tmp_path / "out")


def test_a_target_that_appears_meanwhile_is_not_replaced(models, tmp_path):
    def begin(_):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("x")
        return lambda _: None

    with pytest.raises(UsageError, match="is not empty"):
        merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out", begin=begin)
    assert files(tmp_path / "out") == {"precious.txt": b"x"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yml"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["write", "unlink"])
def test_an_input_that_changes_meanwhile_is_named(models, tmp_path, name, change):
    tuned = tmp_path / "tuned"
    shutil.copytree(models["tuned"], tuned)

    def begin(_):
        if change == "write":
            flip(tuned / name, -1)
        else:
            (tuned / name).unlink()
        return lambda _: None

    with pytest.raises(CheckpointError, match=f"{name} changed or vanished while it was in use"):
        merge(recipe(tmp_path, models["base"], tuned, alpha=0.5), tmp_path / "out", begin=begin)
    assert not (tmp_path / "out").exists()


def test_a_model_may_have_more_files_than_a_process_may_open(models, tmp_path):
    made = recipe(tmp_path, models["base"], shard(models["tuned"], tmp_path / "many", 21), rest=0.5)
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)); "
        "from arma_mergekit.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "merge", str(made.path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "out").status == "verified"


@pytest.mark.parametrize("spoil", ["more", "changed", "unlisted", "missing"])
def test_verify_believes_the_inputs_and_not_the_lock(models, tmp_path, spoil):
    base = companion_model(tmp_path / "from")
    merge(recipe(tmp_path, base, models["tuned"]), tmp_path / "out")
    out, lock = tmp_path / "out", json.loads((tmp_path / "out" / LOCK).read_text())
    if spoil == "more":
        (out / "modeling_evil.py").write_text("import os")
    elif spoil == "missing":
        (out / "chat_template.jinja").unlink()
    else:
        (out / "tokenizer.json").write_text("{}")
    if spoil != "changed":
        for name in ("tokenizer.json", "chat_template.jinja"):
            lock["output"]["files"].pop(name)
        (out / LOCK).write_text(json.dumps(lock))
    flip(out / "model.safetensors", -1)
    report = verify(out)
    wanted = {"more": "modeling_evil.py is no file", "missing": "chat_template.jinja is missing"}
    assert any(wanted.get(spoil, "tokenizer.json is not the base's") in f for f in report.findings)
    assert any("elements differ" in f for f in report.findings)  # one finding does not hide another


LOCK_FAULTS = {
    "files": lambda lock: lock["output"].pop("files"),
    "bytes": lambda lock: lock["output"]["files"]["config.json"].update(bytes="many"),
    "sha256": lambda lock: lock["output"]["files"]["config.json"].update(sha256="1"),
    "outside": lambda lock: lock["output"]["files"].update({"../x": {"bytes": 1, "sha256": None}}),
    "absolute": lambda lock: lock["output"]["files"].update({"/etc/passwd": {"bytes": 1, "sha256": None}}),
    "inputs": lambda lock: lock.update(inputs=5),
    "tool": lambda lock: lock.pop("tool"),
    "recipe": lambda lock: lock.update(recipe=[]),
    "recipe_file": lambda lock: lock.update(recipe_file=5),
    "shard_size": lambda lock: lock["output"].update(shard_size=-1),
    "executor": lambda lock: lock.update(executor="me"),
    "format": lambda lock: lock.update(format=2),
}  # fmt: skip


@pytest.mark.parametrize("fault", LOCK_FAULTS.values(), ids=LOCK_FAULTS.keys())
def test_a_lock_that_is_none_is_refused_in_one_sentence_and_nothing_is_merged(models, tmp_path, fault):
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out")
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    fault(lock)
    (tmp_path / "out" / LOCK).write_text(json.dumps(lock))
    report = verify(tmp_path / "out")
    assert report.status == "unreadable"
    assert len(report.findings) == 1
    assert "is no lock that this version can use" in report.findings[0]
    args = ["reproduce", str(tmp_path / "out"), str(tmp_path / "again")]
    assert isinstance(CliRunner().invoke(cli, args, standalone_mode=False).exception, CheckpointError)
    assert not (tmp_path / "again").exists()


def test_a_lock_without_digests_is_not_compared(models, tmp_path):
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / "out", digests=False)
    args = ["reproduce", str(tmp_path / "out"), str(tmp_path / "again")]
    with pytest.raises(CheckpointError, match="has no digests to compare with"):
        raise CliRunner().invoke(cli, args, standalone_mode=False).exception


def test_scores_that_cannot_be_read_are_a_warning_and_not_in_the_lock(models, tmp_path):
    made = recipe(tmp_path, models["base"], models["tuned"])
    (tmp_path / "summary.json").write_text("{}")
    done = invoke("merge", made.path, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Warning: No scores in the lock: " in done.output
    assert json.loads((tmp_path / "out" / LOCK).read_text())["evaluation"] is None


def test_a_merge_from_the_command_line_has_a_card_and_its_picture(models, tmp_path):
    made = recipe(tmp_path, models["base"], models["adapted"], alpha=[0.2, 0.7])
    done = invoke("merge", made.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model_relation"] == "merge"
    assert "<svg" in (tmp_path / "out" / "alphas.svg").read_text()
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    assert lock["output"]["files"]["README.md"]["sha256"] == hashlib.sha256(card.encode()).hexdigest()
    assert lock["output"]["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != LOCK
    )
    assert "The licence of" in done.output
    assert verify(tmp_path / "out").status == "verified"


@pytest.mark.parametrize("name", ["a+b", "a@b", "with space", "ünï"])
def test_directories_of_any_name_are_verified(models, tmp_path, name):
    merge(recipe(tmp_path, models["base"], models["tuned"]), tmp_path / name)
    assert verify(tmp_path / name).status == "verified"
