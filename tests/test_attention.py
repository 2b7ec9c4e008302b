import contextlib
import copy
import gc
import math
import threading
import time
import weakref

import numpy as np
import pytest
import torch
import toy
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arma_mergekit.attention import (
    DIVERGENCES,
    LEGACY,
    compare,
    divergence_by_head,
    divergences,
    formulas,
    head_importance,
    head_weights,
    observed,
    over_heads,
    record,
    stream,
)
from arma_mergekit.errors import CheckpointError, RecipeError
from arma_mergekit.evals import tasks
from arma_mergekit.evals.base import Task
from arma_mergekit.evals.divergence import DivergenceTask
from arma_mergekit.live import LiveModel

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = GQA | {
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
WINDOW["layer_types"] = WINDOW["layer_types"][:3]
MLA = TINY | {
    "intermediate_size": 48, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2,
}  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**GQA),
    "llama, no groups": transformers.LlamaConfig(**GQA | {"num_key_value_heads": 4}),
    "qwen3": transformers.Qwen3Config(**GQA),
    "gemma2": transformers.Gemma2Config(**WINDOW, attn_logit_softcapping=0.5, query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**WINDOW, query_pre_attn_scalar=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=61, n_layer=2, n_head=4, n_embd=32, reorder_and_upcast_attn=True
    ),
    "phi3": transformers.Phi3Config(**GQA, pad_token_id=0),
    "neox": transformers.GPTNeoXConfig(**TINY, intermediate_size=48),
    "gpt_oss": transformers.GptOssConfig(**WINDOW, num_local_experts=2, num_experts_per_tok=1),
    "deepseek_v3": transformers.DeepseekV3Config(**MLA),
}
HYBRIDS = {
    "jamba": (transformers.JambaConfig(**GQA, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
                                       use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4), (1,), (0,)),
    "qwen3_next": (transformers.Qwen3NextConfig(**GQA | {"num_hidden_layers": 4}, num_experts=2, num_experts_per_tok=1,
                                                moe_intermediate_size=16, linear_num_value_heads=2,
                                                linear_num_key_heads=2, linear_key_head_dim=8,
                                                linear_value_head_dim=8), (3,), (0, 1, 2)),
    "one block shared": (transformers.Zamba2Config(**GQA | {"num_key_value_heads": 4, "num_hidden_layers": 4},
                                                   layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1,
                                                   mamba_d_state=4, n_mamba_heads=8, mamba_headdim=8), (-1,), ()),
}  # fmt: skip
LEFT_PADDED = {
    "input_ids": torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.tensor([[1] * 11, [0] * 3 + [1] * 8]),
}
RIGHT_PADDED = LEFT_PADDED | {"attention_mask": LEFT_PADDED["attention_mask"].flip(1)}


def build(config, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def eager_attentions(model, inputs):
    """What transformers itself returns: one (B, H, T, S) per layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(**inputs, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)


def counted(inputs):
    """Query positions (B, T), spelt out."""
    mask = inputs["attention_mask"]
    first = mask.argmax(1)
    return mask.bool() & (torch.arange(mask.shape[1]) != first[:, None])


# --- probabilities


@pytest.mark.parametrize("padding", [LEFT_PADDED, RIGHT_PADDED], ids=["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_probabilities_are_those_of_eager_attention(family, padding):
    model = build(FAMILIES[family])
    found = [(layer.index, layer.probabilities()) for layer in stream(model, padding)]
    expected = eager_attentions(model, padding)
    assert [index for index, _ in found] == list(range(len(expected)))
    real = counted(padding)
    for (_, ours), theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=2e-6, rtol=1e-5
        )


@torch.no_grad()
def test_probabilities_of_a_bfloat16_model_are_computed_in_float32():
    model = build(FAMILIES["llama"], dtype=torch.bfloat16)
    for layer in stream(model, RIGHT_PADDED):
        rows = layer.probabilities()
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_watching_changes_nothing(implementation):
    model = build(FAMILIES["llama"], attn_implementation=implementation)
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    before = model(**LEFT_PADDED).logits
    with pytest.raises(ZeroDivisionError), observed(lambda layer: 1 / 0):
        model(**LEFT_PADDED)
    with observed(lambda layer: layer.probabilities()):
        assert torch.equal(model(**LEFT_PADDED).logits, before)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "inputs", [LEFT_PADDED, {"input_ids": LEFT_PADDED["input_ids"]}], ids=["mask", "no mask"]
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_of_rows_is_that_of_the_whole_without_keys_that_nobody_sees(family, inputs):
    for layer in record(build(FAMILIES[family]), inputs):
        whole, part = layer.probabilities(), layer.rows(3, 7)
        assert part.shape[-1] == 7
        torch.testing.assert_close(part, whole[:, :, 3:7, :7])
        assert not whole[inputs.get("attention_mask", torch.ones(2, 1))[:, -1] == 1][:, :, 3:7, 7:].any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_keys_that_a_mask_of_ones_own_shows_are_not_dropped(implementation):
    model = build(FAMILIES["llama"], attn_implementation=implementation)
    seen = torch.ones(11, 11, dtype=torch.bool).tril(2)[None, None]
    mask = seen if implementation == "sdpa" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for layer in record(model, LEFT_PADDED | {"attention_mask": mask}):
        whole, part = layer.probabilities(), layer.rows(3, 7)
        torch.testing.assert_close(part, whole[:, :, 3:7])
        assert torch.equal(whole > 0, seen.expand_as(whole))


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_without_softmax_attention_are_skipped_not_zero(family):
    config, layers, skipped = HYBRIDS[family]
    model, other = build(config), build(config, seed=1)
    found = divergence_by_head(model, other, [{"input_ids": LEFT_PADDED["input_ids"]}])
    assert (found.layers, found.skipped) == (layers, skipped)
    assert found.values.shape == (len(layers), 8 if layers == (-1,) else 4)  # shared: its heads once per run
    assert (found.values > 0).all()


def test_a_block_without_a_depth_of_its_own_is_one_that_layers_share():
    models = [build(FAMILIES["llama"], seed) for seed in (0, 1)]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.layer_idx = None  # as Zamba's
    found = divergence_by_head(*models, [LEFT_PADDED])
    assert (found.layers, found.skipped) == ((-1,), ())
    assert found.values.shape == (1, 8)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1),
        transformers.BloomConfig(vocab_size=61, hidden_size=16, n_head=2, n_layer=1),
    ],
    ids=["none", "its own"],
)
def test_a_model_whose_attention_cannot_be_seen_is_refused(config):
    with pytest.raises(CheckpointError, match="No softmax attention was seen"):
        divergence_by_head(build(config), build(config), [{"input_ids": LEFT_PADDED["input_ids"]}])


# --- divergences


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


A, M = rows([1, 0], [0.5, 0.5]), rows([0.5, 0.5], [0.5, 0.5])
LN = math.log


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("js", (LN(1 / 0.75) + 0.5 * LN(0.5 / 0.75) + 0.5 * LN(0.5 / 0.25)) / 2),
        ("mse", 0.5),
        ("cosine", 1 - 0.5 / math.sqrt(0.5)),
        ("emd", 0.5),
    ],
)
def test_divergences_by_hand(name, expected):
    np.testing.assert_allclose(DIVERGENCES[name](A, M), [expected, 0], atol=1e-7)
    np.testing.assert_allclose(DIVERGENCES[name](M, A), [expected, 0], atol=1e-7)


def test_kl_by_hand_is_that_of_the_teacher_to_the_student():
    found = formulas.kl(rows([0.75, 0.25], [0.5, 0.5]), rows([0.5, 0.5], [1, 0]))
    np.testing.assert_allclose(found, [0.5 * LN(0.5 / 0.75) + 0.5 * LN(0.5 / 0.25), LN(2)], rtol=1e-6)


def test_emd_counts_how_far_attention_moved():
    here, near, far = rows([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]).unbind(0)
    assert [float(formulas.emd(here, other)) for other in (near, far)] == [1, 3]
    assert float(formulas.js(here, near)) == pytest.approx(float(formulas.js(here, far)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # batch means: [[.75, .25], [.5, .5]] and [[.5, .5], [.5, .5]]
        ("legacy_mse", 2 * 0.25**2 / 4),
        ("legacy_cosine", 1 - 1 / math.sqrt(0.75**2 + 0.25**2 + 0.5)),
        ("legacy_emd", (0.25 + 0 + 0 + 0.25) / 4),
        ("legacy_kl", 0.5 * (LN(0.5 / (1 / (1 + math.exp(-0.5)))) + LN(0.5 / (1 / (1 + math.exp(0.5)))))),
    ],
)
def test_the_scripts_formulas_by_hand(name, expected):
    a, m = torch.stack([A, M])[:, None], torch.stack([M, M])[:, None]
    assert float(LEGACY[name](a, m)) == pytest.approx(expected, abs=1e-7)


@st.composite
def distributions(draw, keys=6):
    """Rows (3, keys) that sum to 1 or, as with a sink, to less; some with zeros, or nearly all on one key."""
    weights = draw(hnp.arrays(np.float32, (3, keys), elements=st.floats(0, 1, width=32)))
    sharp = draw(st.sampled_from([1.0, 8.0]))
    weights = torch.from_numpy(weights) ** sharp + torch.eye(3, keys) * 1e-3
    return draw(st.sampled_from([1.0, 0.5])) * weights / weights.sum(-1, keepdim=True)


UPPER = {"js": LN(2), "mse": 2, "cosine": 1, "emd": 5, "kl": math.inf}


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=60)
@given(a=distributions(), m=distributions())
def test_divergences_are_bounded_zero_on_equal_rows_and_symmetric_where_claimed(name, a, m):
    distance = DIVERGENCES[name]
    found = distance(a, m)
    assert (found >= -1e-6).all()
    assert (found <= UPPER[name] + 1e-5).all()
    assert not distance(a, a).any()
    if name != "kl":
        torch.testing.assert_close(distance(m, a), found)


@pytest.mark.parametrize("name", LEGACY)
@settings(deadline=None, max_examples=30)
@given(a=distributions(), m=distributions())
def test_the_scripts_formulas_are_bounded_and_zero_on_equal_layers(name, a, m):
    distance, (a, m) = LEGACY[name], (rows.reshape(3, 1, 1, 6).expand(3, 2, 1, 6) for rows in (a, m))
    assert -1e-6 <= distance(a, m) <= (math.inf if name == "legacy_kl" else 1)
    assert abs(distance(a, a)) < 1e-6
    if name != "legacy_kl":
        torch.testing.assert_close(distance(m, a), distance(a, m))


def test_the_scripts_distance_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, m = (build(FAMILIES["llama"], seed) for seed in (0, 1))
    with torch.no_grad():
        a, m = (eager_attentions(model, LEFT_PADDED)[0] for model in (a, m))
    expected = stats.wasserstein_distance(a.mean(0).flatten().numpy(), m.mean(0).flatten().numpy())
    assert float(formulas.legacy_emd(a, m)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=30)
@given(a=distributions(), m=distributions())
def test_keys_that_nobody_sees_change_nothing(name, a, m):
    wide = [torch.nn.functional.pad(rows, (0, 4)) for rows in (a, m)]
    torch.testing.assert_close(DIVERGENCES[name](*wide), DIVERGENCES[name](a, m), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=30)
@given(logits=hnp.arrays(np.float32, (3, 6), elements=st.floats(-200, 200, width=32)), m=distributions())
def test_gradients_stay_finite_where_probabilities_underflow(name, logits, m):
    scores = torch.from_numpy(logits).requires_grad_(True)
    DIVERGENCES[name](scores.softmax(-1), m).sum().backward()
    assert scores.grad.isfinite().all()


def test_js_is_exact_for_rows_that_nearly_agree():
    torch.manual_seed(0)
    a = torch.rand(5, 40, dtype=torch.float64).softmax(-1)
    m = (a.log() + 1e-4 * torch.randn(5, 40, dtype=torch.float64)).softmax(-1)
    a, m = a.float(), m.float()
    c = (a.double() + m.double()) / 2
    exact = (a.double() * (a.double() / c).log() + m.double() * (m.double() / c).log()).sum(-1) / 2
    np.testing.assert_allclose(formulas.js(a, m), exact, rtol=1e-3)


def test_an_unknown_divergence_is_named_with_its_neighbour():
    with pytest.raises(RecipeError, match="Did you mean cosine"):
        formulas.divergence("cosin")


# --- comparing models


@pytest.mark.parametrize("metric", DIVERGENCES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_divergence_by_head_is_the_mean_over_real_positions_but_the_first(family, metric, monkeypatch):
    monkeypatch.setattr(compare, "BLOCK", 3)
    student, teacher = build(FAMILIES[family]), build(FAMILIES[family], seed=1)
    short = {
        "input_ids": LEFT_PADDED["input_ids"][:, :5],
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }
    batches = [LEFT_PADDED, short, RIGHT_PADDED]
    found = divergence_by_head(student, teacher, batches, metric)
    kept = []
    for inputs in batches:
        pair = zip(eager_attentions(student, inputs), eager_attentions(teacher, inputs), strict=True)
        by_layer = torch.stack([DIVERGENCES[metric](a.double(), m.double()) for a, m in pair])
        kept.append(by_layer.permute(1, 3, 0, 2)[counted(inputs)])  # positions, layers, heads
    np.testing.assert_allclose(found.values, torch.cat(kept).mean(0).detach(), rtol=2e-4, atol=1e-7)
    assert found.layers == tuple(range(len(found.values)))
    assert found.skipped == ()


@torch.no_grad()
def test_a_model_does_not_differ_from_itself():
    model = build(FAMILIES["llama"])
    assert not divergence_by_head(model, model, [LEFT_PADDED]).values.any()


@torch.no_grad()
def test_kept_layers_serve_as_a_teacher_after_the_weights_changed():
    config = FAMILIES["gpt_oss"]  # its sinks are weights too
    model, base = build(config), build(config)
    kept = [record(model, LEFT_PADDED)]
    changed = build(config, seed=1)
    model.load_state_dict(changed.state_dict())
    np.testing.assert_array_equal(
        divergence_by_head(model, kept, [LEFT_PADDED]).values,
        divergence_by_head(changed, base, [LEFT_PADDED]).values,
    )


@torch.no_grad()
def test_models_of_different_shapes_are_refused():
    before = threading.active_count()
    wide = build(transformers.LlamaConfig(**GQA | {"num_attention_heads": 2}))
    deep = build(transformers.LlamaConfig(**GQA | {"num_hidden_layers": 3}))
    for student, teacher in [(build(FAMILIES["llama"]), wide), (deep, build(FAMILIES["llama"]))]:
        with pytest.raises(CheckpointError, match="no counterpart of its shape"):
            divergence_by_head(student, teacher, [LEFT_PADDED])
    assert threading.active_count() == before


@torch.no_grad()
def test_two_models_run_in_lock_step():
    student, teacher = (
        build(transformers.LlamaConfig(**GQA | {"num_hidden_layers": 6}), seed) for seed in (0, 1)
    )
    order = []
    for layer in student.model.layers:
        layer.register_forward_hook(lambda *_: order.append("student"))
        layer.register_forward_hook(lambda *_: time.sleep(0.01))  # time for the teacher to run ahead
    for layer in teacher.model.layers:
        layer.register_forward_hook(lambda *_: order.append("teacher"))
    divergences(student, LEFT_PADDED, teacher)
    ahead = np.cumsum([1 if name == "teacher" else -1 for name in order])
    assert len(order) == 12
    assert abs(ahead).max() <= 1


@pytest.mark.parametrize("depth", [2, 6])
@torch.no_grad()
def test_no_more_than_one_layer_of_each_model_is_alive_whatever_the_depth(depth):
    student, teacher = (
        build(transformers.LlamaConfig(**GQA | {"num_hidden_layers": depth}), seed) for seed in (0, 1)
    )
    alive, most = weakref.WeakSet(), []

    def consume(*layers):
        for layer in layers:
            alive.add(layer.key)
        del layers
        gc.collect()
        most.append(len(alive))

    compare.visit(student, LEFT_PADDED, [teacher], consume)
    assert len(most) == depth
    assert max(most) <= 4  # one of each, and one that its model is still done with


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("gradients", [False, True])
def test_no_more_than_a_block_of_probabilities_is_ever_made(gradients):
    student, teacher = build(FAMILIES["llama"]), build(FAMILIES["llama"], seed=1)
    inputs = {"input_ids": torch.arange(120)[None] % 61}
    kept = record(teacher, inputs)
    with torch.set_grad_enabled(gradients), Largest() as largest:
        loss = sum(found.sum() for found in divergences(student, inputs, kept).values())
        if gradients:
            loss.backward()
    assert largest.elements <= 4 * compare.BLOCK * 120  # all rows of a layer: 4 * 120 * 120


@torch.no_grad()
def test_a_stream_may_be_left_early_and_passes_errors_on():
    model, before = build(FAMILIES["llama"]), threading.active_count()
    with contextlib.closing(stream(model, LEFT_PADDED)) as layers:
        next(layers)
    with pytest.raises(IndexError):
        list(stream(model, {"input_ids": torch.tensor([[999]])}))
    assert threading.active_count() == before


# --- gradients


def make_live(config):
    base, tuned = ({n: p.detach() for n, p in build(config, seed).named_parameters()} for seed in (0, 1))
    return LiveModel(build(config), base, tuned), base, tuned


@pytest.mark.parametrize("metric", DIVERGENCES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_gradients_reach_alpha_through_the_attention(family, metric, monkeypatch):
    monkeypatch.setattr(compare, "BLOCK", 3)
    live, base, tuned = make_live(FAMILIES[family])
    kept = record(live, LEFT_PADDED)
    live.set(np.linspace(0.2, 0.9, len(live.tensors)))
    plain = copy.deepcopy(live.model).requires_grad_(True)
    pairs = zip(eager_attentions(plain, LEFT_PADDED), (layer.probabilities() for layer in kept), strict=True)
    real = counted(LEFT_PADDED)
    expected_loss = sum(DIVERGENCES[metric](a, m).transpose(1, 2)[real].sum() for a, m in pairs)
    weights = dict(plain.named_parameters())
    slopes = torch.autograd.grad(expected_loss, [weights[n] for n in live.tensors], allow_unused=True)
    pairs = zip(live.tensors, slopes, strict=True)
    expected = [0 if slope is None else float((slope * (tuned[n] - base[n])).sum()) for n, slope in pairs]
    with live.differentiable() as gradient:
        loss = sum(found.sum() for found in divergences(live, LEFT_PADDED, kept, metric).values())
        loss.backward()
        found = gradient()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=2e-4 * np.abs(expected).max())
    assert np.abs(found).max() > 1e-3


# --- which heads matter


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_change_of_attention_times_the_squared_gradient_of_the_loss(family):
    base, tuned = build(FAMILIES[family]), build(FAMILIES[family], seed=1)
    found = head_importance(base, tuned, [RIGHT_PADDED, LEFT_PADDED])
    assert all(p.grad is None for p in base.parameters())
    moved, felt, positions = 0, 0, 0
    for inputs in (RIGHT_PADDED, LEFT_PADDED):
        real = counted(inputs)
        labels = inputs["input_ids"].masked_fill(~real, -100)
        base.set_attn_implementation("eager")
        out = base(**inputs, labels=labels, use_cache=False, output_attentions=True)
        slopes = torch.autograd.grad(out.loss * (labels[:, 1:] != -100).sum(), out.attentions)
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        a, m, slope = (
            torch.stack(x).detach() for x in (out.attentions, eager_attentions(tuned, inputs), slopes)
        )
        moved += (a - m).square().sum(-1).masked_fill(~real[:, None], 0).sum((1, 3))
        felt += (slope.square() * (a > 0)).sum(-1).masked_fill(~real[:, None], 0).sum((1, 3))
        positions += real.sum()
    expected = moved * felt / positions**2
    torch.testing.assert_close(torch.stack(list(found.values())).float(), expected, rtol=2e-3, atol=1e-9)


def test_the_heads_with_the_largest_importance_are_kept_whatever_is_frozen():
    base, tuned = (build(FAMILIES["llama"], seed).requires_grad_(False) for seed in (0, 1))
    importance = torch.cat(list(head_importance(base, tuned, [LEFT_PADDED]).values()))
    kept = torch.cat(list(head_weights(base, tuned, [LEFT_PADDED], share=0.3).values()))
    assert kept.sum() == 3  # of eight
    assert importance[kept == 1].min() > importance[kept == 0].max()
    recorded = torch.cat(list(head_importance(base, [record(tuned, LEFT_PADDED)], [LEFT_PADDED]).values()))
    assert torch.equal(recorded, importance)


def test_a_mean_over_heads_is_weighted():
    by_layer = {0: torch.tensor([[1.0, 2.0]]), 3: torch.tensor([[3.0, 6.0]])}
    assert over_heads(by_layer).tolist() == [3]
    weights = {0: torch.tensor([1.0, 0.0]), 3: torch.tensor([0.0, 3.0]), 1: torch.tensor([7.0])}
    assert over_heads(by_layer, weights).tolist() == [(1 + 18) / 4]


# --- the task


@pytest.fixture(scope="module")
def live():
    config = transformers.LlamaConfig(**GQA | {"vocab_size": len(toy.ALPHABET), "num_hidden_layers": 3})
    return make_live(config)[0]


@pytest.fixture
def items(tmp_path):
    toy.write_data(tmp_path)
    return tasks.text_items(toy.make_tokenizer(), tmp_path / "general.jsonl", limit=4, max_length=20)


@pytest.mark.parametrize(("teacher", "zero", "other"), [("base", 0.0, 1.0), ("finetuned", 1.0, 0.0)])
def test_the_task_scores_the_mean_over_positions_heads_and_layers(live, items, teacher, zero, other):
    task = DivergenceTask("d", items, teacher=teacher)
    assert isinstance(task, Task)
    live.set_all(0)
    assert task.prepare(live) == sum(len(item.rows[0].tokens) for item in items)
    assert not live.alphas.any()
    live.set_all(zero)
    assert not task.measure(live, range(4)).loss.any()
    kept = [record(live.model, {"input_ids": torch.tensor([item.rows[0].tokens])}) for item in items]
    live.set_all(other)
    found = task.measure(live, range(4))
    batches = [{"input_ids": torch.tensor([item.rows[0].tokens])} for item in items]
    assert found.mean_loss == pytest.approx(
        divergence_by_head(live.model, kept, batches).values.mean(), rel=1e-5
    )
    assert 0 < found.mean_loss < LN(2)
    assert found.score == -found.mean_loss
    assert found.tokens == sum(map(int, found.weight + 1))
    np.testing.assert_array_equal(task.measure(live, [2, 0]).loss, found.loss[[2, 0]])


def test_what_the_task_hands_to_backward_adds_up_to_its_mean_loss(live, items):
    task = DivergenceTask("d", items, metric="kl")
    live.set_all(0)
    task.prepare(live)
    live.set_all(0.5)
    losses = []
    with live.differentiable() as gradient:
        found = task.measure(
            live, range(4), backward=lambda loss: (losses.append(loss.item()), loss.backward())
        )
        slopes = gradient()
    assert sum(losses) == pytest.approx(found.mean_loss, rel=1e-5)
    step = 0.02
    ends = []
    for alpha in (0.5 - step, 0.5 + step):
        live.set_all(alpha)
        ends.append(task.measure(live, range(4)).mean_loss)
    assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(slopes.sum(), rel=2e-2)


def test_the_digest_of_a_task_changes_with_metric_teacher_and_texts(items):
    made = [
        DivergenceTask("d", items),
        DivergenceTask("d", items, metric="kl"),
        DivergenceTask("d", items, teacher="finetuned"),
        DivergenceTask("d", items[1:]),
    ]
    assert len({task.content for task in made}) == 4
    assert made[0].content == DivergenceTask("another name", items).content
