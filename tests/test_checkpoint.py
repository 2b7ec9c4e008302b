import json
import os
import re
import struct

import numpy as np
import pytest
from conftest import write_safetensors, write_tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, ModelReference, open_model, read_header
from arma_mergekit.errors import CheckpointError

# ---- one file ----


def raw_safetensors(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "empty file": (b"", "has no header"),
    "claims 2^60 bytes": (struct.pack("<Q", 2**60) + b"{}", "claims 1,152,921,504,606,846,976 bytes.*has 10"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "claims 100 bytes"),
    "pickle": (b"\x80\x02}q\x00.", "pickle, which is never opened"),
    "zip": (b"PK\x03\x04" + bytes(50), "zip or pickled"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_safetensors_file_is_refused_with_its_likely_cause(tmp_path, lie):
    content, reason = LIES[lie]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_HEADERS = {
    "not json": (b"{not json", "no valid JSON"),
    "not an object": (b"[1]", "no JSON object"),
    "deeply nested": (b"[" * 100_000, "nested too deeply"),
    "name twice": (b'{"a": {}, "a": {}}', "'a' occurs twice"),
    "metadata not text": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "'a': needs dtype"),
    "entry not an object": ({"a": 3}, "'a': needs dtype"),
    "unknown dtype": ({"a": entry("BF15", offsets=(0, 4))}, "Unknown dtype 'BF15'. Did you mean BF16"),
    "negative shape": ({"a": entry(shape=(-2,))}, "whole numbers"),
    "fractional offset": ({"a": entry(offsets=(0, 8.0))}, "whole numbers"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, "whole numbers"),
    "true as a size": ({"a": entry(shape=(True, 2))}, "whole numbers"),
    "size and offsets disagree": ({"a": entry(shape=(3,))}, "takes 12 bytes, but its offsets span 8"),
    "shape of 2^60 elements": ({"a": entry(shape=(2**60,))}, "takes 4,611,686,018,427,387,904 bytes"),
    "offset beyond the file": ({"a": entry(shape=(3,), offsets=(0, 12))}, "'a'.*ends at byte .* truncated"),
    "bytes nobody claims": (
        {"a": entry(shape=(1,), offsets=(0, 4))},
        "4 bytes that its header does not mention",
    ),
    "gap": ({"a": entry(shape=(1,), offsets=(4, 8))}, "'a'.*gap"),
    "overlap": ({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}, "'b'.*overlaps"),
    "control characters in a name": ({"a\n": entry()}, "no name of a tensor"),
    "endless name": ({"a" * 1000: entry()}, "no name of a tensor"),
}


@pytest.mark.parametrize("lie", BAD_HEADERS)
def test_every_false_claim_of_a_header_is_one_sentence_that_names_file_and_tensor(tmp_path, lie):
    header, reason = BAD_HEADERS[lie]
    file = raw_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(file))


def test_a_truncated_file_is_refused_however_much_is_missing(tmp_path):
    whole = write_tiny_llama(tmp_path / "model") / "model.safetensors"
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in [*range(20), 500, len(content) // 2, len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="download it again"):
            read_header(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_refused_or_describes_a_file_that_the_safetensors_library_opens(tmp_path, flips):
    header = {"a": entry(), "b": entry("BF16", (1, 2), (8, 12)), "__metadata__": {"format": "pt"}}
    file = raw_safetensors(tmp_path / "model.safetensors", header, bytes(12))
    content = bytearray(file.read_bytes())
    for position, value in flips:
        content[position % (len(content) - 12)] = value
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except CheckpointError:
        return
    try:
        with safe_open(file, "np") as opened:
            assert sorted(opened.keys()) == sorted(tensors)
    except SafetensorError as error:
        raise AssertionError(f"we accept what safetensors refuses: {error}") from error
    assert all(0 < t.start <= t.stop <= len(content) for t in tensors.values())


def test_headers_and_bytes_are_those_the_safetensors_library_wrote(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        f"{dtype}{shape}": np.asarray(random.standard_normal(shape) * 50).astype(dtype)
        for dtype in ("float16", "float32", "float64", "int8", "uint8", "int64", "bool")
        for shape in ((), (0, 3), (5,), (2, 3, 4))
    }
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(str(tmp_path))
    assert set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert checkpoint.tensors[name].nbytes == checkpoint.bytes_read(name) == array.nbytes
        assert checkpoint.tensors[name].numel == array.size


def test_bf16_is_read_as_its_bits_and_cannot_be_written_to(tmp_path):
    file = tmp_path / "m" / "model.safetensors"
    write_tiny_llama(file.parent)
    write_safetensors(file, {"a": np.array([1.0, -2.5], np.float32)}, "bfloat16")
    array = Checkpoint.open(str(file.parent)).read("a")
    assert array.tolist() == [0x3F80, 0xC020]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_not_a_crash(tmp_path):
    path = write_tiny_llama(tmp_path / "m")
    checkpoint = Checkpoint.open(str(path))
    os.truncate(path / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        checkpoint.read("model.norm.weight")


# ---- a directory ----


def shard(path, parts=2, index=None):
    """Split model.safetensors of a directory into shards with an index."""
    checkpoint = Checkpoint.open(str(path))
    names = list(checkpoint.tensors)
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        mine = names[i::parts]
        bits = {n: np.left_shift(checkpoint.read(n).astype("<u4"), 16).view("<f4") for n in mine}
        write_safetensors(path / file, bits, "bfloat16")
        weight_map |= dict.fromkeys(mine, file)
    (path / "model.safetensors").unlink()
    write_index(path, index or weight_map)
    return weight_map


def write_index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def model(tmp_path):
    return write_tiny_llama(tmp_path / "model")


def test_a_sharded_checkpoint_reads_like_the_single_file_it_was_split_from(model, tmp_path):
    whole = Checkpoint.open(str(write_tiny_llama(tmp_path / "whole")))
    shard(model, 3)
    parts = Checkpoint.open(str(model))
    assert list(parts.tensors) == list(whole.tensors)
    assert len({t.file for t in parts.tensors.values()}) == 3
    for name in whole.tensors:
        assert parts.read(name).tobytes() == whole.read(name).tobytes()


def test_all_broken_shards_are_reported_at_once(model):
    weight_map = shard(model, 3)
    first, second, _ = sorted(set(weight_map.values()))
    (model / first).unlink()
    (model / second).write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(model))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert re.search(f"{first} is missing.*download", lines[0])
    assert re.search(f"{second} is not a safetensors file", lines[1])


def test_a_tensor_the_index_promises_but_the_shard_lacks_is_named(model):
    weight_map = shard(model)
    write_index(model, weight_map | {"model.ghost.weight": weight_map["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"lacks model\.ghost\.weight though .* lists it there"):
        Checkpoint.open(str(model))


def test_swapped_shards_are_noticed(model):
    first, second = sorted(set(shard(model).values()))
    (model / first).rename(model / "x")
    (model / second).rename(model / first)
    (model / "x").rename(model / second)
    with pytest.raises(CheckpointError, match="belongs to another shard"):
        Checkpoint.open(str(model))


@pytest.mark.parametrize(
    "outside", ["../other/model.safetensors", "/etc/model.safetensors", "..\\x.safetensors", "C:x"]
)
def test_an_index_that_points_outside_the_model_is_refused(model, outside):
    weight_map = shard(model)
    write_index(model, weight_map | {"model.norm.weight": outside})
    with pytest.raises(CheckpointError, match="outside the model"):
        Checkpoint.open(str(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_symlink_out_of_the_model_is_refused(model, tmp_path, name):
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*outside the model"):
        Checkpoint.open(str(model))


def test_a_symlink_to_the_model_directory_itself_is_fine(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert Checkpoint.open(str(tmp_path / "link")).tensors


def hub_cache(root, model, repo="models--org--name", commit="abc123"):
    """A model as huggingface_hub keeps it: the snapshot's files are links to blobs."""
    snapshot = root / repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / repo / "blobs").mkdir()
    (root / repo / "refs").mkdir()
    (root / repo / "refs" / "main").write_text(commit)
    for file in list(model.iterdir()):
        file.rename(root / repo / "blobs" / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    return snapshot


def test_the_links_of_the_hub_cache_are_legitimate(model, tmp_path):
    assert Checkpoint.open(str(hub_cache(tmp_path / "hub", model))).tensors


def test_links_of_a_cache_to_anywhere_but_its_blobs_are_not(model, tmp_path):
    snapshot = hub_cache(tmp_path / "hub", model)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "elsewhere").write_bytes(b"")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the model"):
        Checkpoint.open(str(snapshot))


def test_a_hub_id_is_found_in_the_local_cache_and_nowhere_else(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"No model directory org/name .*hf download org/name"):
        Checkpoint.open("org/name")
    snapshot = hub_cache(tmp_path / "hub", model)
    assert Checkpoint.open("org/name").path == snapshot
    assert Checkpoint.open("org/name@main").ref == "org/name@main"
    with pytest.raises(CheckpointError, match="hf download org/name --revision v2"):
        Checkpoint.open("org/name@v2")


def test_a_local_directory_comes_before_a_hub_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open("model").path.resolve() == model
    with pytest.raises(CheckpointError, match="local directory, which has no revision 'main'"):
        Checkpoint.open("model@main")


def test_a_missing_directory_a_file_and_an_empty_directory_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "nowhere": "No model directory",
        "file": "is a file",
        "empty": r"no config\.json",
    }.items():
        with pytest.raises(CheckpointError, match=reason):
            Checkpoint.open(str(tmp_path / name))


def test_pickled_weights_are_never_opened(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*convert"):
        Checkpoint.open(str(model))
    write_index(model, {"a": "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match="pickled shard"):
        Checkpoint.open(str(model))


def test_two_sets_of_weights_in_one_directory_are_refused(model):
    write_index(model, {"a": "model.safetensors"})
    with pytest.raises(CheckpointError, match="delete the stale one"):
        Checkpoint.open(str(model))


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_broken_index_is_refused(model, content):
    shard(model)
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(str(model))


def test_a_config_may_hold_infinity_as_state_space_models_do(model):
    (model / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(str(model)).config == {"time_step_limit": [0.0, float("inf")]}


def test_a_broken_link_says_so(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(CheckpointError, match="link to a file that does not exist"):
        Checkpoint.open(str(model))


def test_links_in_a_circle_pipes_and_endless_paths_do_not_hang_or_crash(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to"):
        Checkpoint.open(str(model))
    os.mkfifo(model / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors\.index\.json"):
        Checkpoint.open(str(model))
    with pytest.raises(CheckpointError, match=r"Cannot read .* name too long"):
        Checkpoint.open("x" * 5000)


def test_references_have_mergekits_syntax():
    parse = ModelReference.parse
    assert parse("a/b") == ModelReference("a/b")
    assert parse("a/b@v1+c@v2") == ModelReference("a/b", "v1", "c", "v2")
    assert parse("a+c") == ModelReference("a", None, "c")


@pytest.mark.parametrize("text", ["a+b+c", "a@b@c", "a+", "+a", "@a", "a@"])
def test_references_with_too_many_or_empty_parts_are_refused(text):
    with pytest.raises(CheckpointError, match=re.escape(repr(text))):
        ModelReference.parse(text)


def test_a_directory_with_a_separator_in_its_name_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b+c").mkdir()
    with pytest.raises(CheckpointError, match="rename the directory"):
        Checkpoint.open("a+b+c")


# ---- adapters ----

Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def write_adapter(path, shapes, seed=0, rank=4, dtype="float32", **config):
    """A LoRA as PEFT saves it; ``shapes``: module -> (out, in), or (out, in, rank)."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "bias": "none",
        "fan_in_fan_out": False,
    } | config
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (out, into, *own) in shapes.items():
        r = own[0] if own else rank
        for factor, shape in (("A", (r, into)), ("B", (out, r))):
            values = random.standard_normal(shape).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", tensors, dtype)
    return tensors


def widened(bits):
    return (bits.astype("<u4") << 16).view("<f4").reshape(bits.shape)


def nearest_bf16(values):
    """Round float64 to bf16 bits, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_an_adapter_is_folded_into_its_weights_and_leaves_the_others_mapped(model, tmp_path):
    factors = write_adapter(tmp_path / "lora", {Q0: (32, 32), DOWN1: (32, 64)})
    base, adapted = Checkpoint.open(str(model)), open_model(f"{model}+{tmp_path / 'lora'}")
    assert isinstance(adapted, AdaptedCheckpoint)
    assert adapted.tensors == base.tensors
    assert adapted.config == base.config
    for module in (Q0, DOWN1):
        name = f"{module}.weight"
        a, b = (factors[f"base_model.model.{module}.lora_{f}.weight"].astype(np.float64) for f in "AB")
        exact = widened(base.read(name)).astype(np.float64) + 2.0 * (b @ a)
        assert adapted.read(name).tobytes() == nearest_bf16(exact).tobytes()
        assert adapted.bytes_read(name) == base.bytes_read(name) + 4 * (a.size + b.size)
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert adapted.read(untouched).tobytes() == base.read(untouched).tobytes()
    assert adapted.bytes_read(untouched) == base.bytes_read(untouched)


def test_folding_in_blocks_of_rows_changes_nothing(model, tmp_path, monkeypatch):
    write_adapter(tmp_path / "lora", {Q0: (32, 32), DOWN1: (32, 64)}, dtype="bfloat16")
    ref = f"{model}+{tmp_path / 'lora'}"
    whole = {m: open_model(ref).read(f"{m}.weight").tobytes() for m in (Q0, DOWN1)}
    monkeypatch.setattr("arma_mergekit.checkpoint.adapter.CHUNK", 100)
    assert {m: open_model(ref).read(f"{m}.weight").tobytes() for m in (Q0, DOWN1)} == whole


def scale_of(model, tmp_path, rank=4, shape=(32, 32), **config):
    write_adapter(tmp_path / "lora", {Q0: (*shape, rank)}, **config)
    return open_model(f"{model}+{tmp_path / 'lora'}").factors[f"{Q0}.weight"].scale


def test_scale_follows_rank_alpha_patterns_and_rslora(model, tmp_path):
    assert scale_of(model, tmp_path) == 8 / 4
    assert scale_of(model, tmp_path, use_rslora=True) == 8 / 2
    assert (
        scale_of(model, tmp_path, rank=2, rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 16})
        == 8 / 2
    )
    assert (
        scale_of(model, tmp_path, alpha_pattern={"k_proj": 3, r"layers\.[0-9]+\.self_attn\.q_proj": 5})
        == 5 / 4
    )
    assert (
        scale_of(model, tmp_path, alpha_pattern={"attn.q_proj": 3}) == 8 / 4
    )  # not after a dot, so no match


def test_conv1d_weights_take_the_transposed_product(model, tmp_path):
    factors = write_adapter(tmp_path / "lora", {Q0: (32, 32), DOWN1: (64, 32)}, fan_in_fan_out=True)
    adapted = open_model(f"{model}+{tmp_path / 'lora'}")
    base = Checkpoint.open(str(model))
    for module in (Q0, DOWN1):
        a, b = (factors[f"base_model.model.{module}.lora_{f}.weight"].astype(np.float64) for f in "AB")
        exact = widened(base.read(f"{module}.weight")).astype(np.float64) + 2.0 * (b @ a).T
        assert adapted.read(f"{module}.weight").tobytes() == nearest_bf16(exact).tobytes()


def test_embeddings_can_be_adapted_unless_they_are_tied(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"A": (4, 96), "B": (32, 4)}
    factors = {f: random.standard_normal(s).astype(np.float32) for f, s in shapes.items()}
    write_adapter(tmp_path / "lora", {})
    names = {f"base_model.model.model.embed_tokens.lora_embedding_{f}": v for f, v in factors.items()}
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", names)
    free = write_tiny_llama(tmp_path / "free")
    name = "model.embed_tokens.weight"
    exact = (
        widened(Checkpoint.open(str(free)).read(name))
        + 2.0 * (factors["B"].astype(np.float64) @ factors["A"]).T
    )
    assert open_model(f"{free}+{tmp_path / 'lora'}").read(name).tobytes() == nearest_bf16(exact).tobytes()
    tied = write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="ties to its head"):
        open_model(f"{tied}+{tmp_path / 'lora'}")


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "peft_type": "IA3",
    "bias": "lora_only",
    "init_lora_weights": "pissa_niter_16",
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "lora_alpha": "8",
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"q_proj(": 3},
}


@pytest.mark.parametrize("key", REFUSED)
def test_adapters_that_are_more_than_a_product_are_refused_by_name(model, tmp_path, key):
    write_adapter(tmp_path / "lora", {Q0: (32, 32)}, **{key: REFUSED[key]})
    with pytest.raises(
        CheckpointError, match=key if key != "rank_pattern" else "rank 4, .* says 3"
    ) as caught:
        open_model(f"{model}+{tmp_path / 'lora'}")
    assert "\n" not in str(caught.value)


def test_a_pattern_that_would_take_forever_is_refused(model, tmp_path):
    write_adapter(tmp_path / "lora", {Q0: (32, 32)}, rank_pattern={"([a-z_.0]+)+!": 4})
    with pytest.raises(CheckpointError, match="too complex"):
        open_model(f"{model}+{tmp_path / 'lora'}")


def test_more_patterns_than_any_adapter_has_are_refused(model, tmp_path):
    write_adapter(tmp_path / "lora", {Q0: (32, 32)}, rank_pattern={f"q{i}": 4 for i in range(10_001)})
    with pytest.raises(CheckpointError, match=r"has 10,001 patterns, more than 10,000"):
        open_model(f"{model}+{tmp_path / 'lora'}")


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({Q0: (32, 48)}, r"B A has shape \(32, 48\), the weight of .* \(32, 32\)"),
        (
            {"model.layers.7.self_attn.q_proj": (32, 32)},
            r"layers\.7.* does not have; is it an adapter of another model",
        ),
        ({}, "adapts nothing"),
    ],
)
def test_an_adapter_of_another_base_is_refused(model, tmp_path, shapes, reason):
    write_adapter(tmp_path / "lora", shapes)
    with pytest.raises(CheckpointError, match=reason):
        open_model(f"{model}+{tmp_path / 'lora'}")


def test_lonely_factors_whole_tensors_and_missing_files_are_refused(model, tmp_path):
    ref = f"{model}+{tmp_path / 'lora'}"
    factors = write_adapter(tmp_path / "lora", {Q0: (32, 32)})
    file = tmp_path / "lora" / "adapter_model.safetensors"
    write_safetensors(file, dict(list(factors.items())[:1]))
    with pytest.raises(CheckpointError, match="only one of the two factors"):
        open_model(ref)
    write_safetensors(file, factors | {"base_model.model.lm_head.weight": np.zeros((96, 32), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"more than LoRA factors \(base_model\.model\.lm_head\.weight\)"
    ):
        open_model(ref)
    file.rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled adapters are never opened"):
        open_model(ref)
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        open_model(ref)


def test_a_fold_that_is_not_finite_names_the_tensor(model, tmp_path):
    factors = write_adapter(tmp_path / "lora", {Q0: (32, 32)})
    factors = {name: values * np.float32(1e30) for name, values in factors.items()}
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", factors)
    adapted = open_model(f"{model}+{tmp_path / 'lora'}")
    with np.errstate(over="ignore"), pytest.raises(CheckpointError, match=rf"{re.escape(Q0)}.*not finite"):
        adapted.read(f"{Q0}.weight")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for what it renamed
def test_folding_agrees_with_peft(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    path = write_tiny_llama(tmp_path / "base", dtype="float32")
    shapes = {Q0: (32, 32), DOWN1: (32, 64, 2), "model.layers.1.self_attn.k_proj": (16, 32)}
    write_adapter(
        tmp_path / "lora",
        shapes,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.k_proj": 3},
        target_modules=[*shapes],
    )
    base = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    ours = open_model(f"{path}+{tmp_path / 'lora'}")
    assert len(ours.factors) == 3
    for name in ours.tensors:
        np.testing.assert_allclose(ours.read(name), expected[name].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("flag", [False, True])
def test_in_gpt2_only_conv1d_takes_the_transposed_product_whatever_the_flag_says(tmp_path, flag):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    # as many tokens as channels: the head is square too, and is no Conv1D
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, tie_word_embeddings=False, **small))
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["c_proj", "lm_head"], init_lora_weights="gaussian")
    adapted = get_peft_model(model, lora)
    for name, values in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["fan_in_fan_out"] is False  # the head's, which PEFT wrapped last
    file.write_text(json.dumps(config | {"fan_in_fan_out": flag}))
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(fresh, tmp_path / "lora").merge_and_unload().state_dict()
    ours = open_model(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    assert len(ours.factors) == 3
    for name in ours.factors:
        np.testing.assert_allclose(ours.read(name), expected[name].numpy(), rtol=1e-5, atol=1e-6)
