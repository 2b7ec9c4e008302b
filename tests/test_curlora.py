"""CURLoRA as a method of PEFT, and as an adapter of a merge."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.peft_types import PeftType, register_peft_method
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from arma_mergekit.checkpoint import open_model
from arma_mergekit.continual.curlora import (
    CURLoRAConfig,
    CURLoRALinear,
    CURLoRAModel,
    CURLoRAType,
    register,
    save_as_lora,
)
from arma_mergekit.continual.curlora.draw import draw, shares
from arma_mergekit.errors import ArmaError, CheckpointError

# PEFT 0.21 asks transformers for what it renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS = torch.arange(24).view(2, 12)


class Net(nn.Module):
    """Linear and Conv1D, square and not, with and without bias, fused."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.square = nn.Linear(12, 12, bias=False)
        self.wide = nn.Linear(12, 20)
        self.turned = Conv1D(20, 20)
        self.fused = Conv1D(36, 20)
        for p in self.parameters():
            nn.init.normal_(p)
        self.to(dtype)

    def forward(self, x):
        return self.fused(torch.tanh(self.turned(torch.tanh(self.wide(self.square(x))))))


ALL = ["square", "wide", "turned", "fused"]


def trained(model, scale=1.0, **config):
    """The model with an adapter whose U is not zero."""
    adapted = get_peft_model(model, CURLoRAConfig(**{"r": 4} | config))
    generator = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "curlora_U" in name:
            p.data.copy_(scale * torch.randn(p.shape, generator=generator))
    return adapted


def llama(path):
    return LlamaForCausalLM.from_pretrained(path, dtype="auto")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", dtype="float32")


@pytest.fixture
def saved(base, tmp_path):
    """(base, adapter): directories."""
    trained(llama(base), scale=10.0).save_pretrained(tmp_path / "cur")
    return base, tmp_path / "cur"


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- PEFT's side ----


def test_the_installed_peft_still_needs_and_takes_our_registration():
    """Fails when an upgrade of PEFT changes what register.py relies on; then read its docstring."""
    assert "CURLORA" not in list(PeftType), "PEFT has a CURLORA of its own: retire ours"
    with pytest.raises(ValueError, match="Unknown PEFT type CURLORA, please add an entry"):
        register_peft_method(name="curlora", config_cls=CURLoRAConfig, model_cls=CURLoRAModel)
    tables = (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
    )
    assert [getattr(peft.mapping, t)["CURLORA"] for t in tables] == [CURLoRAConfig, CURLoRAModel, "curlora_"]
    assert hash(CURLoRAType.CURLORA) == hash("CURLORA")
    assert CURLoRAType.CURLORA == "CURLORA"
    assert {type(key) for key in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING} == {PeftType, CURLoRAType}
    assert CURLoRAType.CURLORA.value.lower() + "_" == CURLoRAModel.prefix  # transformers builds it so


def test_registering_twice_changes_nothing_and_another_method_of_that_name_is_an_error(monkeypatch):
    before = dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    assert before == peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "CURLORA", LoraConfig)
    with pytest.raises(ArmaError, match="already has a method CURLORA"):
        register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_before_training_outputs_are_the_bases_bit_for_bit(dtype):
    net, x = Net(dtype), torch.randn(3, 12, dtype=dtype)
    expected = net(x)
    adapted = get_peft_model(net, CURLoRAConfig(r=4, target_modules=ALL))
    assert torch.equal(adapted(x), expected)
    assert adapted(x).dtype == dtype


def test_queries_keys_and_values_are_the_default_and_r_squared_numbers_each_are_trained(base):
    adapted = get_peft_model(llama(base), CURLoRAConfig(r=4))
    layers = [m for m in adapted.modules() if isinstance(m, CURLoRALinear)]
    assert adapted.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj"}
    assert adapted.get_nb_trainable_parameters()[0] == len(layers) * 4**2 == 6 * 16
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    assert get_peft_model(gpt, CURLoRAConfig(r=4)).peft_config["default"].target_modules == {"c_attn"}


def test_the_forward_pass_is_the_formula_for_linear_and_conv1d():
    net, x = Net(torch.float64), torch.randn(3, 12, dtype=torch.float64)
    weights = {name: getattr(net, name).weight.detach().clone() for name in ALL}
    adapted = trained(net, target_modules=ALL, curlora_alpha=0.3)
    dense = Net(torch.float64)
    for name in ALL:
        layer, w = getattr(adapted.base_model.model, name), weights[name]
        cross, u = layer.curlora_cross["default"], layer.curlora_U["default"]
        delta = 0.3 * w[:, cross.columns] @ u @ w[cross.rows, :]
        getattr(dense, name).weight.data += delta.detach()
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.detach())
    torch.testing.assert_close(adapted(x), dense(x))


@pytest.mark.parametrize("targets", [[name] for name in ALL])
def test_merged_and_adapted_forward_agree_and_unmerging_undoes_it(targets):
    net, x = Net(), torch.randn(50, 12)
    plain = net(x).detach()
    adapted = trained(net, target_modules=targets, scale=0.1)
    expected = adapted(x).detach()
    assert distance(plain, expected) > 1e-2
    adapted.merge_adapter()
    assert distance(adapted(x), expected) < 1e-5
    with adapted.disable_adapter():
        assert distance(adapted(x), plain) < 1e-5
    assert distance(adapted(x), expected) < 1e-5
    assert distance(adapted.merge_and_unload(safe_merge=True)(x), expected) < 1e-5


def test_the_gradient_of_u_is_right_and_nothing_else_is_trained():
    net = Net(torch.float64)
    adapted = trained(net, target_modules=ALL, scale=0.1)
    x = torch.randn(5, 12, dtype=torch.float64)
    adapted(x).square().sum().backward()
    with_gradient = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient == {f"base_model.model.{name}.curlora_U.default" for name in ALL}
    u = adapted.base_model.model.turned.curlora_U["default"]
    step, losses = 1e-6, []
    for sign in (1, -1):
        u.data[1, 2] += sign * step
        losses.append(adapted(x).square().sum().item())
        u.data[1, 2] -= sign * step
    assert u.grad[1, 2].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


def test_c_u_r_is_never_whole_and_backward_keeps_r_channels():
    layer = nn.Linear(64, 64, bias=False)
    adapted = trained(nn.Sequential(layer), target_modules=["0"], r=2)
    kept, shapes = [], []
    real = torch.nn.functional.linear

    def spy(x, w, b=None):
        shapes.append(tuple(w.shape))
        return real(x, w, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arma_mergekit.continual.curlora.layer.functional.linear", spy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            adapted(torch.randn(100, 64))
    assert (64, 64) not in shapes[-3:]
    assert shapes[-3:] == [(2, 64), (2, 2), (64, 2)]
    assert 100 * 64 not in kept  # x itself, which LoRA keeps


def test_several_adapters_add_up_and_can_be_switched_and_deleted():
    net, x = Net(), torch.randn(4, 12)
    adapted = trained(net, target_modules=["wide"], scale=0.1)
    one = adapted(x)
    adapted.add_adapter("other", CURLoRAConfig(r=3, target_modules=["wide", "fused"], seed=7))
    torch.testing.assert_close(adapted(x), one)
    adapted.set_adapter("other")
    assert torch.equal(adapted(x), Net()(x))
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".other" in name for name in trainable)
    assert len(trainable) == 2
    adapted.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(adapted(x), one)
    adapted.delete_adapter("default")
    assert torch.equal(adapted(x), Net()(x))


def test_an_adapter_cannot_be_added_to_a_merged_base():
    adapted = trained(Net(), target_modules=["wide"])
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="unmerge before adding"):
        adapted.add_adapter("other", CURLoRAConfig(r=3, target_modules=["wide"]))


def test_a_copied_model_has_its_own_factors():
    adapted = trained(Net(), target_modules=["wide"])
    twin, x = copy.deepcopy(adapted), torch.randn(2, 12)
    expected = adapted(x)
    twin.base_model.model.wide.curlora_U["default"].data.zero_()
    assert torch.equal(adapted(x), expected)
    assert not torch.equal(twin(x), expected)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (nn.Embedding(4, 4), "is Embedding"),
        (nn.Conv2d(4, 4, 1), "is Conv2d"),
    ],
)
def test_other_modules_are_refused_by_name(target, says):
    with pytest.raises(TypeError, match=f"a {says}"):
        get_peft_model(nn.ModuleDict({"a": target}), CURLoRAConfig(r=2, target_modules=["a"]))


def test_a_quantised_or_empty_base_is_refused():
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="is quantised; load the base in bfloat16, or use LoRA"):
        get_peft_model(nn.ModuleDict({"a": layer}), CURLoRAConfig(r=2, target_modules=["a"]))
    empty = nn.ModuleDict({"a": nn.Linear(8, 8, device="meta")})
    with pytest.raises(ValueError, match="no values yet"):
        get_peft_model(empty, CURLoRAConfig(r=2, target_modules=["a"]))


def test_settings_that_make_no_sense_are_refused():
    for config, says in (
        ({"r": 0}, "r >= 1"),
        ({"sampling": "invert"}, "Did you mean inverted"),
        ({"legacy": True, "sampling": "normal"}, "legacy draws"),
        ({"target_modules": ".*q", "layers_pattern": "h"}, "list of names"),
    ):
        with pytest.raises(ValueError, match=says):
            CURLoRAConfig(**config)
    with pytest.raises(ValueError, match=r"a has only 8 columns that are finite and not zero"):
        get_peft_model(nn.ModuleDict({"a": nn.Linear(8, 16)}), CURLoRAConfig(r=9, target_modules=["a"]))


# ---- the draw ----


def test_probabilities_are_the_papers():
    w = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 2.0]])
    np.testing.assert_allclose(shares(w, 0), [25 / 30, 0, 5 / 30], rtol=1e-6)
    np.testing.assert_allclose(shares(w, 1), [10 / 30, 20 / 30], rtol=1e-6)
    counts = np.zeros(3)
    for seed in range(2000):
        counts[draw(w, 1, "inverted", False, seed, "m")[1]] += 1
    # 1/p: 1.2 and 6, so 1 in 6; the zero column never
    assert counts[1] == 0
    assert counts[0] / 2000 == pytest.approx(1 / 6, abs=0.03)
    plain = [draw(w, 1, "normal", False, seed, "m")[1][0] for seed in range(600)]
    assert plain.count(0) / 600 == pytest.approx(5 / 6, abs=0.06)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 30),
    st.integers(2, 30),
    st.integers(0, 2**31),
    st.sampled_from(["inverted", "uniform", "normal"]),
)
def test_a_draw_is_repeatable_without_repetition_and_never_of_zeros(m, n, seed, sampling):
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    w[0], w[:, -1] = 0, 0
    r = min(m, n) - 1
    rows, columns = draw(w, r, sampling, False, seed, "m")
    assert len(set(rows)) == len(set(columns)) == r
    assert 0 not in rows
    assert n - 1 not in columns
    assert rows.max() < m
    assert columns.max() < n
    again = draw(w, r, sampling, False, seed, "m")
    assert np.array_equal(again[0], rows)
    assert np.array_equal(again[1], columns)


def test_modules_draw_on_their_own_and_a_small_epsilon_keeps_the_inversion():
    w = torch.randn(50, 60)
    a, b = (draw(w, 8, "inverted", False, 0, name)[0] for name in ("a", "b"))
    assert not np.array_equal(a, b)
    p = np.array([1.0, 92.0]) / (4096 * 46.5)
    odds = [(p[1] + e) / (p[0] + e) for e in (1e-3 / 4096, 1e-3)]
    assert odds[0] > 85
    assert odds[1] < 3


def test_legacy_draws_as_the_released_code_does():
    """Its formulas, on numpy's global generator: with replacement, 1 / (p + 0.001), columns first."""
    w = torch.randn(30, 20)
    w[:, 3] = 0
    import zlib

    np.random.seed([5, zlib.crc32(b"m")])
    expected = []
    for dim in (0, 1):
        squared = torch.sum(w**2, dim)
        inverted = (1 / (squared / squared.sum() + 0.001)).float()
        q = (inverted / inverted.sum()).numpy()
        expected.append(np.random.choice(len(q), size=16, replace=True, p=q))
    rows, columns = draw(w, 16, "inverted", True, 5, "m")
    assert np.array_equal(columns, expected[0])
    assert np.array_equal(rows, expected[1])
    assert len(set(columns)) < 16


# ---- files ----


def test_a_file_holds_r_squared_and_2_r_numbers_and_a_digest_per_matrix(saved):
    _, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    kinds = {}
    for name, tensor in tensors.items():
        kinds.setdefault(name.partition("curlora_")[2], []).append(tensor.numel())
    assert kinds == {"U": [16] * 6, "cross.rows": [4] * 6, "cross.columns": [4] * 6, "cross.digest": [16] * 6}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "CURLORA"
    assert config["seed"] == 0


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_loaded_adapter_gives_the_same_logits_whatever_would_be_drawn_now(saved, low_memory):
    base, adapter = saved
    expected = trained(llama(base), scale=10.0)(IDS).logits
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"seed": 99}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(llama(base), adapter, low_cpu_mem_usage=low_memory)
    assert torch.equal(loaded(IDS).logits, expected)
    assert not torch.equal(expected, llama(base)(IDS).logits)


def test_a_fresh_process_gives_the_same_logits_bit_for_bit(saved, tmp_path):
    base, adapter = saved
    expected = PeftModel.from_pretrained(llama(base), adapter)(IDS).logits
    code = """
import sys, torch, numpy as np
from peft import PeftModel
from transformers import LlamaForCausalLM
import arma_mergekit.continual.curlora
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[1], dtype="auto"), sys.argv[2])
np.save(sys.argv[3], model(torch.arange(24).view(2, 12)).logits.detach().numpy())
"""
    out = tmp_path / "logits.npy"
    subprocess.run(
        [sys.executable, "-c", code, str(base), str(adapter), str(out)], check=True, capture_output=True
    )
    assert np.array_equal(np.load(out), expected.detach().numpy())


def test_another_base_is_refused_by_peft_and_by_the_fold(saved, tmp_path, tiny_llama):
    _, adapter = saved
    other = tiny_llama(tmp_path / "other", seed=1, dtype="float32")
    with pytest.raises(CheckpointError, match="use the base it was trained on"):
        PeftModel.from_pretrained(llama(other), adapter)
    folded = open_model(f"{other}+{adapter}")
    with pytest.raises(CheckpointError, match=r"q_proj.*use the base it was trained on"):
        folded.read("model.layers.0.self_attn.q_proj.weight")


def test_the_base_may_be_loaded_in_bfloat16(saved):
    base, adapter = saved
    narrow = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    full = PeftModel.from_pretrained(llama(base), adapter)
    assert distance(narrow(IDS).logits.float(), full(IDS).logits) < 0.05


def hostile(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    start = "base_model.model.model.layers.0.self_attn.q_proj.curlora_"
    change(tensors, start)
    save_file(tensors, file)


def set_(part, value):
    return lambda tensors, start: tensors.__setitem__(start + part, value)


HOSTILE = {
    "row beyond the end": (set_("cross.rows", torch.tensor([0, 1, 2, 9999], dtype=torch.int32)), "indices must be"),
    "negative column": (set_("cross.columns", torch.tensor([0, -1, 2, 3], dtype=torch.int32)), "indices must be"),
    "floats for indices": (set_("cross.rows", torch.zeros(4)), "whole numbers"),
    "other rows": (set_("cross.rows", torch.arange(4, dtype=torch.int32)), "have other values here"),
    "other digest": (set_("cross.digest", torch.zeros(16, dtype=torch.uint8)), "have other values here"),
    "no digest": (lambda tensors, start: tensors.pop(start + "cross.digest"), "digest"),
    "no rows": (lambda tensors, start: tensors.pop(start + "cross.rows"), "rows"),
    "wrong rank": (set_("U", torch.zeros(5, 5)), "U"),
    "U not square": (set_("U", torch.zeros(4, 5)), "U"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_adapters_are_refused_by_peft_and_by_the_fold(saved, case):
    base, adapter = saved
    change, says = HOSTILE[case]
    hostile(adapter, change)
    with pytest.raises(CheckpointError, match=says):
        open_model(f"{base}+{adapter}").read("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match=r"q_proj"):
        PeftModel.from_pretrained(llama(base), adapter)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t, s: t.__setitem__("base_model.model.lm_head.weight", torch.zeros(2)),
            "more than CURLoRA's",
        ),
        (lambda t, s: t.clear(), "adapts nothing"),
        (
            lambda t, s: t.update({k.replace("layers.1", "layers.7"): v.clone() for k, v in t.items()}),
            r"layers\.7",
        ),
        (lambda t, s: t.__setitem__(s + "U", torch.full((4, 4), torch.inf)), "not finite"),
        (lambda t, s: t.__setitem__(s + "U", torch.zeros(4, 4, dtype=torch.int32)), "U of I32"),
    ],
)
def test_files_that_are_not_an_adapter_of_this_base_are_not_folded(saved, change, says):
    base, adapter = saved
    hostile(adapter, change)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(CheckpointError, match=says),
    ):
        open_model(f"{base}+{adapter}").read("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("key", "value"), [("modules_to_save", ["lm_head"]), ("curlora_alpha", "1"), ("peft_type", "X")]
)
def test_configs_that_are_more_than_the_product_are_refused(saved, key, value):
    base, adapter = saved
    config = json.loads((adapter / "adapter_config.json").read_text()) | {key: value}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=key):
        open_model(f"{base}+{adapter}")


# ---- the fold ----


def one_layer(path, weight, bits, dtype):
    """A directory with one weight, as a checkpoint."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    write_safetensors(path / "model.safetensors", {"a.weight": weight}, bits)
    stored = load_file(path / "model.safetensors")["a.weight"]
    assert stored.dtype == dtype
    return stored


def tensor_of(array):
    """bf16 comes as its bits."""
    if array.dtype != np.uint16:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31), st.booleans(), st.booleans(),
    st.sampled_from([("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]),
    st.floats(-2, 2),
)  # fmt: skip
def test_the_fold_is_what_merge_and_unload_gives(tmp_path_factory, m, n, seed, turned, legacy, kind, alpha):
    root = tmp_path_factory.mktemp("fold")
    random = np.random.default_rng(seed)
    weight = one_layer(root / "base", random.standard_normal((m, n)).astype(np.float32), *kind)
    layer = Conv1D(n, m) if turned else nn.Linear(n, m)
    layer.weight = nn.Parameter(weight)
    adapted = trained(
        nn.ModuleDict({"a": layer}), r=min(m, n, 5), target_modules=["a"], scale=0.1, legacy=legacy,
        curlora_alpha=alpha, seed=seed,
    )  # fmt: skip
    adapted.save_pretrained(root / "cur")
    cross, u = (
        getattr(adapted.base_model.model["a"], part)["default"] for part in ("curlora_cross", "curlora_U")
    )
    folded = open_model(f"{root / 'base'}+{root / 'cur'}")
    ours = tensor_of(folded.read("a.weight")).double()
    theirs = adapted.merge_and_unload()["a"].weight.detach().double()
    sums = (
        weight.double().abs()
        + abs(alpha) * cross.C.double().abs() @ u.double().abs() @ cross.R.double().abs()
    )
    bound = torch.finfo(kind[1]).eps * theirs.abs() + 2e-6 * sums + torch.finfo(kind[1]).smallest_normal
    assert ((ours - theirs).abs() <= bound).all()
    assert folded.bytes_read("a.weight") > weight.nbytes
    assert len(folded.files) == 4


def test_folding_in_blocks_of_rows_changes_nothing(saved, monkeypatch):
    base, adapter = saved
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = open_model(f"{base}+{adapter}").read(name).tobytes()
    monkeypatch.setattr("arma_mergekit.checkpoint.adapter.CHUNK", 100)
    monkeypatch.setattr("arma_mergekit.checkpoint.curlora.CHUNK", 100)
    assert open_model(f"{base}+{adapter}").read(name).tobytes() == whole


def test_a_recipe_merges_base_plus_curlora_as_it_merges_the_folded_model(saved, tmp_path):
    from arma_mergekit.merge import merge
    from arma_mergekit.recipe import Recipe

    base, adapter = saved
    PeftModel.from_pretrained(llama(base), adapter).merge_and_unload().save_pretrained(tmp_path / "whole")
    results = {}
    for name, model in (("adapter", f"{base}+{adapter}"), ("whole", tmp_path / "whole")):
        recipe = {
            "merge_method": "arma", "base_model": str(base), "parameters": {"rest": "finetuned"},
            "models": [{"model": str(model), "parameters": {"alpha": 0.5}}],
        }  # fmt: skip
        merge(Recipe.parse(recipe, tmp_path / "recipe.yml"), tmp_path / f"out-{name}")
        results[name] = load_file(tmp_path / f"out-{name}" / "model.safetensors")
    for name, tensor in results["whole"].items():
        torch.testing.assert_close(results["adapter"][name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        *(
            r["model.layers.0.self_attn.q_proj.weight"]
            for r in (results["whole"], load_file(base / "model.safetensors"))
        )
    )


def test_mergekits_own_command_takes_base_plus_curlora(saved, tmp_path):
    base, adapter = saved
    recipe = {
        "merge_method": "arma", "base_model": str(base), "parameters": {"rest": "finetuned"},
        "models": [{"model": f"{base}+{adapter}", "parameters": {"alpha": 1}}],
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    options = ["--quiet", "--no-copy-tokenizer", "--lora-merge-cache", str(tmp_path / "cache")]
    subprocess.run(  # an interpreter of its own, since this one knows CURLoRA already
        [sys.executable, "-m", "mergekit.scripts.run_yaml", "recipe.yml", "out", *options],
        cwd=tmp_path,
        check=True,
    )
    found, folded = load_file(tmp_path / "out" / "model.safetensors"), open_model(f"{base}+{adapter}")
    for name in folded.tensors:
        torch.testing.assert_close(found[name], torch.tensor(folded.read(name)), rtol=1e-5, atol=1e-6)
    assert len(folded.factors) == 6


# ---- as LoRA ----


@pytest.mark.parametrize("name", ALL)
def test_as_lora_it_gives_the_same_outputs(name, tmp_path):
    net, x = Net(), torch.randn(20, 12)
    adapted = trained(net, target_modules=[name], scale=0.1, curlora_alpha=0.7)
    expected = adapted(x).detach()
    save_as_lora(tmp_path, adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert distance(loaded(x), expected) < 1e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_as_lora_it_folds_into_the_same_weights(saved, tmp_path):
    base, adapter = saved
    save_as_lora(tmp_path / "lora", PeftModel.from_pretrained(llama(base), adapter))
    ours, lora = (open_model(f"{base}+{path}") for path in (adapter, tmp_path / "lora"))
    for name in ours.factors:
        np.testing.assert_allclose(ours.read(name), lora.read(name), rtol=1e-4, atol=1e-6)


def test_conversion_needs_a_curlora_adapter(base):
    with pytest.raises(ValueError, match="no CURLoRA adapter 'default'"):
        save_as_lora(Path("x"), get_peft_model(llama(base), LoraConfig(target_modules=["q_proj"])))
