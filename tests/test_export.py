import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from arma_mergekit.export import stock_recipe, tuned_recipe
from arma_mergekit.recipe import resolve
from arma_mergekit.results import to_yaml
from arma_mergekit.roles import role
from arma_mergekit.space import make_space

RAW = {
    "merge_method": "arma", "base_model": "base", "models": [{"model": "ft", "parameters": {"alpha": 0.5}}],
    "dtype": "bfloat16", "evals": {}, "tune": {"trials": 3},
}  # fmt: skip
LAYERS = 12  # two digits: the filter `layers.1` would also match `layers.11`
MODULES = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.up_proj",
    "input_layernorm",
]
FAMILIES = {
    "llama": ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    + [f"model.layers.{i}.{m}.weight" for i in range(LAYERS) for m in MODULES],
    "biased": [f"model.layers.{i}.self_attn.q_proj.{p}" for i in range(3) for p in ("weight", "bias")]
    + [f"model.layers.{i}.mlp.fc1.weight" for i in range(3)],
    "gpt2": ["wte.weight", "wpe.weight", "ln_f.weight"]
    + [
        f"h.{i}.{m}.weight"
        for i in range(LAYERS)
        for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1")
    ],
}


def depth(tensor, roles):
    layers = 1 + max(r.layer for r in roles.values() if r.layer is not None)
    layer = roles[tensor].layer
    return 0.0 if layer is None else layer / (layers - 1)


@given(
    st.sampled_from(list(FAMILIES)), st.sampled_from(["global", "kind", "block:5", "layer", "tensor", "kernel"]),
    st.sampled_from(["global", "kind", "layer", "tensor", "finetuned", "base", 0.25]), st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_an_exported_recipe_gives_every_tensor_its_alpha_by_mergekits_rules(family, groups, rest, data):
    roles = {name: role(name) for name in FAMILIES[family]}
    space = make_space(roles, groups, rest, (-1, 2.5))
    values = data.draw(st.lists(st.floats(-1, 2.5), min_size=len(space.names), max_size=len(space.names)))
    values = [min(max(v, low), high) for v, low, high in zip(values, space.low, space.high, strict=True)]
    alphas = {t: round(float(a), 4) for t, a in zip(space.tensors, space.alphas(values), strict=True)}
    tuned = yaml.safe_load(to_yaml(tuned_recipe(RAW, roles, alphas)))
    stock = yaml.safe_load(to_yaml(stock_recipe(RAW, roles, alphas)))
    for tensor, wanted in alphas.items():
        t = depth(tensor, roles)
        parameter = (
            tuned["models"][0]["parameters"]["alpha"]
            if roles[tensor].attention
            else tuned["parameters"]["rest"]
        )
        assert resolve(parameter, tensor, t) == pytest.approx(wanted, abs=1e-9)
        weights = [resolve(m["parameters"]["weight"], tensor, t) for m in stock["models"]]
        assert weights == pytest.approx([1 - wanted, wanted], abs=1e-9)


def test_one_alpha_for_everything_is_written_as_one_number():
    roles = {name: role(name) for name in FAMILIES["llama"]}
    tuned = tuned_recipe(RAW, roles, dict.fromkeys(roles, 0.6))
    assert tuned["models"][0]["parameters"] == {"alpha": 0.6}
    assert tuned["parameters"] == {"rest": 0.6}


def test_one_alpha_per_layer_is_written_as_one_list():
    roles = {name: role(name) for name in FAMILIES["llama"]}
    alphas = {t: (r.layer if r.attention else 100) / 100 for t, r in roles.items()}
    tuned = tuned_recipe(RAW, roles, alphas)
    assert tuned["models"][0]["parameters"] == {"alpha": [i / 100 for i in range(LAYERS)]}


def test_tensors_equal_in_both_models_add_no_filter():
    roles = {name: role(name) for name in FAMILIES["llama"]}
    alphas = {t: 0.3 for t in roles if "mlp" in t}
    assert tuned_recipe(RAW, roles, alphas)["parameters"] == {"rest": 0.3}


def test_our_blocks_do_not_reach_the_exported_recipe_and_the_original_is_untouched():
    roles = {name: role(name) for name in FAMILIES["llama"]}
    before = yaml.dump(RAW)
    tuned = tuned_recipe(RAW, roles, dict.fromkeys(roles, 0.6))
    assert set(tuned) == {"merge_method", "base_model", "models", "dtype", "parameters"}
    assert yaml.dump(RAW) == before


def test_stacks_that_differ_in_nothing_after_the_layers_number_are_named_tensor_by_tensor():
    names = [
        f"{s}.block.{i}.layer.0.SelfAttention.q.weight" for s in ("encoder", "decoder") for i in range(2)
    ]
    roles = {name: role(name) for name in names}
    alphas = {name: i / 10 for i, name in enumerate(names)}
    setting = tuned_recipe(RAW, roles, alphas)["models"][0]["parameters"]["alpha"]
    assert [resolve(setting, name, float(roles[name].layer)) for name in names] == [0.0, 0.1, 0.2, 0.3]


def test_of_two_names_of_which_one_contains_the_other_each_gets_its_own():
    name = "model.layers.1.self_attn.q_proj.weight"
    twin = {name: role(name), f"x.{name}": role(name)}
    setting = tuned_recipe(RAW, twin, {name: 0.2, f"x.{name}": 0.8})["models"][0]["parameters"]["alpha"]
    assert [resolve(setting, n, 1.0) for n in twin] == [0.2, 0.8]
