import copy

import numpy as np
import pytest
import torch
import transformers

from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import average
from arma_mergekit.live import LiveModel

TINY = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def llama(**extra):
    return transformers.LlamaConfig(
        **TINY, intermediate_size=48, num_key_value_heads=2, attention_bias=True, **extra
    )


def gemma(**extra):
    return transformers.Gemma2Config(**TINY, intermediate_size=48, num_key_value_heads=2, head_dim=8, **extra)


def gpt2(**extra):
    return transformers.GPT2Config(vocab_size=61, n_layer=2, n_head=4, n_embd=32, **extra)


def mixtral(**extra):
    return transformers.MixtralConfig(
        **TINY, intermediate_size=24, num_key_value_heads=2, num_local_experts=3, **extra
    )


def neox(**extra):
    return transformers.GPTNeoXConfig(**TINY, intermediate_size=48, **extra)


FAMILIES = {
    "llama, tied": llama(tie_word_embeddings=True),
    "llama": llama(),
    "gemma2": gemma(),
    "gpt2": gpt2(),
    "mixtral": mixtral(),
    "neox": neox(),
}


def build(config, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_live(config, dtype=torch.float32):
    base, tuned = (
        {name: p.detach().clone() for name, p in build(config, seed, dtype).named_parameters()}
        for seed in (0, 1)
    )
    return LiveModel(build(config, 0, dtype), base, tuned), base, tuned


def loss_of(model):
    ids = torch.arange(40).view(4, 10) % 61
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_group_gradients_equal_autograds_weight_gradients_projected_on_the_deltas(family):
    config = FAMILIES[family]
    live, base, tuned = make_live(config)
    live.set(np.linspace(-0.3, 1.4, len(live.tensors)))
    plain = copy.deepcopy(live.model).requires_grad_(True)
    loss_of(plain).backward()
    expected = [
        float((p.grad.double() * (tuned[n].double() - base[n].double())).sum())
        for n, p in plain.named_parameters()
    ]
    with live.differentiable() as gradient:
        loss_of(live).backward()
        ours = gradient()
    assert live.tensors == tuple(n for n, _ in plain.named_parameters())
    np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-5)


def test_gradients_of_several_backward_passes_add_up():
    live, _, _ = make_live(FAMILIES["llama"])
    with live.differentiable() as gradient:
        loss_of(live).backward()
        once = gradient()
        loss_of(live).backward()
        np.testing.assert_allclose(gradient(), 2 * once, rtol=1e-5)


def test_a_tensor_that_no_token_reached_has_gradient_zero():
    live, _, _ = make_live(FAMILIES["llama"])
    with live.differentiable() as gradient:
        live.model.model.embed_tokens(torch.arange(5)).square().sum().backward()
        found = dict(zip(live.tensors, gradient(), strict=True))
    assert found.pop("model.embed_tokens.weight") != 0
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("family", ["llama, tied", "gpt2", "mixtral"])
def test_the_model_is_whole_again_after_taking_gradients(family):
    live, _, _ = make_live(FAMILIES[family])
    before = {n: p.detach().clone() for n, p in live.model.named_parameters()}
    loss = float(loss_of(live))
    with live.differentiable() as gradient:
        loss_of(live).backward()
        gradient()
    after = dict(live.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) and not after[n].requires_grad for n in before)
    assert float(loss_of(live)) == loss


def test_a_set_candidate_has_the_bits_of_the_kernel():
    live, base, tuned = make_live(FAMILIES["llama"], torch.bfloat16)
    alphas = np.linspace(-0.5, 1.5, len(live.tensors))
    live.set(alphas)
    for name, alpha in zip(live.tensors, alphas, strict=True):
        parameter = dict(live.model.named_parameters())[name]
        assert torch.equal(parameter, average(base[name], [tuned[name]], [alpha]))


def test_setting_back_and_forth_returns_the_exact_ends():
    live, base, tuned = make_live(FAMILIES["llama"], torch.bfloat16)
    live.set_all(0.37)
    live.set_all(1)
    assert all(torch.equal(p, tuned[n]) for n, p in live.model.named_parameters())
    live.set_all(0)
    assert all(torch.equal(p, base[n]) for n, p in live.model.named_parameters())


def test_only_tensors_that_differ_have_an_alpha():
    base = {n: p.detach() for n, p in build(FAMILIES["llama"], 0).named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    live = LiveModel(build(FAMILIES["llama"], 0), base, base | {name: base[name] + 1})
    assert live.tensors == (name,)


def test_two_equal_models_are_refused():
    model = build(FAMILIES["llama"], 0)
    base = {n: p.detach() for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match="nothing to average"):
        LiveModel(model, base, base)


def test_a_tensor_the_loaded_model_does_not_have_is_refused_by_name():
    model = build(FAMILIES["llama"], 0)
    with pytest.raises(CheckpointError, match="expert_7"):
        LiveModel(model, {"expert_7": torch.zeros(1)}, {"expert_7": torch.ones(1)})
