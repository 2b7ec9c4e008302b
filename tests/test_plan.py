import json
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import llama_shapes, write_safetensors, write_tiny_llama

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.errors import RecipeError
from arma_mergekit.plan import plan, plan_file
from arma_mergekit.recipe import Recipe

ATTENTION = re.compile(r"self_attn\.")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Directory, also the current one, with a base and a fine-tuned model `ft` of two layers."""
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "base", 0)
    write_tiny_llama(tmp_path / "ft", 1)
    return tmp_path


def recipe(alpha=0.5, rest="finetuned", models=("ft",), **more):
    parameters = {} if alpha is None else {"parameters": {"alpha": alpha}}
    content = {
        "merge_method": "arma",
        "base_model": "base",
        "models": [{"model": m} | parameters for m in models],
    }
    return content | {"parameters": {"rest": rest}} | more


@pytest.fixture
def planned(models):
    """The plan of a recipe given as data, or as keyword arguments of `recipe`."""

    def planned(content=None, **arguments):
        (models / "recipe.yml").write_text(yaml.safe_dump(content or recipe(**arguments)))
        return plan_file("recipe.yml")

    return planned


def by_name(found):
    return {tensor.name: tensor for tensor in found.tensors}


def rewrite(path, change=lambda tensors: tensors, dtype="bfloat16", config=None):
    """Change config.json and the tensors (float32 arrays by name) of a checkpoint."""
    checkpoint = Checkpoint.open(str(path))
    tensors = {n: (checkpoint.read(n).astype("<u4") << 16).view("<f4") for n in checkpoint.tensors}
    write_safetensors(path / "model.safetensors", change(tensors), dtype)
    (path / "config.json").write_text(json.dumps(dict(checkpoint.config) | (config or {})))


def without(*endings):
    return lambda tensors: {n: v for n, v in tensors.items() if not n.endswith(endings)}


def resized(ending, shape):
    return lambda tensors: {n: np.zeros(shape, "f4") if n.endswith(ending) else v for n, v in tensors.items()}


# ---- what happens to every tensor ----


def test_attention_is_averaged_and_the_rest_copied_from_the_finetuned_model(planned):
    found = planned(alpha=0.6)
    assert found.errors == found.warnings == ()
    assert set(by_name(found)) == set(Checkpoint.open("base").tensors)
    for tensor in found.tensors:
        averaged = bool(ATTENTION.search(tensor.name))
        assert tensor.role.attention == averaged
        assert tensor.action == ("average" if averaged else "copy")
        assert tensor.alphas == ((0.6,) if averaged else (1.0,))
        assert tensor.source == ("both" if averaged else "ft")


@pytest.mark.parametrize(
    ("alpha", "rest", "sources"),
    [(0, "base", {"base"}), (1, "finetuned", {"ft"}), (1, "base", {"base", "ft"}), (0, 1, {"base", "ft"})],
)
def test_alphas_of_zero_and_one_are_copies(planned, alpha, rest, sources):
    found = planned(alpha=alpha, rest=rest)
    assert {t.source for t in found.tensors} == sources
    assert all(t.action == "copy" for t in found.tensors)
    assert re.search("Nothing is averaged: every tensor is copied from", " ".join(found.warnings))


def test_lists_run_over_depth_and_filters_pick_projections(planned):
    tensors = by_name(
        planned(alpha=[{"filter": "q_proj", "value": [0.2, 0.8]}, {"value": 0.5}], rest=[0.1, 0.3])
    )
    alpha = {name: tensor.alphas[0] for name, tensor in tensors.items()}
    assert alpha["model.layers.0.self_attn.q_proj.weight"] == 0.2
    assert alpha["model.layers.1.self_attn.q_proj.weight"] == 0.8
    assert alpha["model.layers.1.self_attn.k_proj.weight"] == 0.5
    assert alpha["model.layers.1.mlp.up_proj.weight"] == 0.3
    assert alpha["model.embed_tokens.weight"] == alpha["lm_head.weight"] == 0.1  # outside layers: t = 0


def test_every_alpha_is_the_one_mergekit_would_use(planned, models):
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    import arma_mergekit.method  # noqa: F401  makes mergekit know the method

    alpha = [{"filter": "layers.0.self_attn.q", "value": 0.9}, {"filter": "_proj", "value": [0.1, 0.7, 0.4]}]
    found = planned(
        alpha=alpha, rest=[{"filter": "mlp", "value": [0.25, -0.5]}, {"filter": "lm_head", "value": "base"}]
    )
    config = MergeConfiguration.model_validate(yaml.safe_load((models / "recipe.yml").read_text()))
    options = MergeOptions()
    info = get_architecture_info(config, options)
    planner = MergePlanner(config, info, options=options, out_model_config=config.models[0].model.config())
    planner._plan()
    theirs = {weight.name: task for weight, task in planner._tensors}
    assert set(theirs) == set(by_name(found))
    for tensor in found.tensors:
        task = theirs[tensor.name]
        ((_, own),) = [(m, p) for m, p in task.input_parameters.items() if str(m) == "ft"]
        expected = own["alpha"] if tensor.role.attention else task.parameters["rest"]
        expected = {"base": 0.0, "finetuned": 1.0}.get(expected, expected)
        assert tensor.alphas == (pytest.approx(expected, abs=1e-7),)


def test_a_single_layer_is_at_depth_one(models, planned):
    for seed, name in enumerate(("base", "ft")):
        shutil.rmtree(models / name)
        write_tiny_llama(models / name, seed, num_hidden_layers=1)
    found = by_name(planned(alpha=[0.2, 0.8]))
    assert found["model.layers.0.self_attn.q_proj.weight"].alphas == (0.8,)


def test_several_finetuned_models_have_an_alpha_each(models, planned):
    write_tiny_llama(models / "ft2", 2)
    found = planned(recipe(models=("ft", "ft2"), alpha=0.25, rest="base"))
    tensors = by_name(found)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].alphas == (0.25, 0.25)
    assert tensors["lm_head.weight"].alphas == (0.0, 0.0)
    assert found.as_dict()["tensors"][0]["alpha"] == [0.0, 0.0]


def test_the_finetuned_rest_of_several_models_is_ambiguous(models, planned):
    write_tiny_llama(models / "ft2", 2)
    found = planned(recipe(models=("ft", "ft2")))
    assert found.errors == (
        "parameters.rest in recipe.yml is finetuned, but there are 2 fine-tuned models to take it from; give base, "
        "or a number as the alpha of each.",
    )


def test_integers_are_copied_from_the_base(models, planned):
    header = {"steps": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    for name in ("base", "ft"):
        checkpoint = Checkpoint.open(name)
        index = dict.fromkeys(checkpoint.tensors, "weights.safetensors") | {"steps": "steps.safetensors"}
        (models / name / "model.safetensors").rename(models / name / "weights.safetensors")
        (models / name / "steps.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        (models / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    steps = by_name(planned(rest=0.5))["steps"]
    assert (steps.action, steps.source, steps.dtype) == ("copy", "base", "I64")


# ---- what it costs ----


def test_bytes_are_those_of_the_tensors_that_are_needed(planned):
    tensors = Checkpoint.open("base").tensors
    attention = sum(t.nbytes for n, t in tensors.items() if ATTENTION.search(n))
    rest = sum(t.nbytes for n, t in tensors.items() if not ATTENTION.search(n))
    found = planned()
    assert found.bytes_read == 2 * attention + rest
    assert found.bytes_written == attention + rest
    assert found.peak_memory_bytes == attention


def test_another_output_dtype_is_counted_in_bytes_and_memory(planned):
    found = planned(recipe(out_dtype="float32"))
    assert found.bytes_written == sum(4 * t.numel for t in Checkpoint.open("base").tensors.values())
    assert found.peak_memory_bytes == found.bytes_written  # nothing is a plain copy any more
    assert {t.dtype for t in found.tensors} == {"F32"}


def test_models_of_alpha_zero_are_not_read(models, planned):
    write_tiny_llama(models / "ft2", 2)
    content = recipe(models=("ft", "ft2"), rest="base")
    content["models"][1]["parameters"] = {"alpha": 0}
    tensors = Checkpoint.open("base").tensors
    assert planned(content).bytes_read == sum(
        t.nbytes * (2 if ATTENTION.search(n) else 1) for n, t in tensors.items()
    )


def test_adapters_cost_their_factors_and_no_more(models, planned):
    (models / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (models / "lora" / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{module}.lora_A.weight": np.ones((2, 32), "f4"),
        f"{module}.lora_B.weight": np.ones((32, 2), "f4"),
    }
    write_safetensors(models / "lora" / "adapter_model.safetensors", factors)
    found = planned(models=("base+lora",))
    assert found.errors == ()
    tensor = by_name(found)["model.layers.0.self_attn.q_proj.weight"]
    assert tensor.bytes_read == 2 * (32 * 32 * 2) + 2 * 2 * 32 * 4
    assert tensor.bytes_written == 32 * 32 * 2
    assert {t.source for t in found.tensors if t.action == "copy"} == {"base+lora"}


def test_weights_are_never_read(models, planned, monkeypatch):
    before = planned().as_dict()
    for name in ("base", "ft"):  # sparse files of the right length: all zeros behind the header
        file = models / name / "model.safetensors"
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:header] + bytes(len(content) - header))
    monkeypatch.setattr(np, "memmap", None)
    assert planned().as_dict() == before


# ---- what is wrong ----


def only_error(found):
    assert len(found.errors) == 1, found.errors
    return found.errors[0]


def only_warning(found):
    assert found.errors == ()
    assert len(found.warnings) == 1, found.warnings
    return found.warnings[0]


def test_a_filter_that_matches_nothing_is_an_error_with_the_nearest_word(planned):
    error = only_error(planned(alpha=[{"filter": "self_attnn", "value": 0.3}, {"value": 0.5}]))
    assert error.startswith(
        "Filter 'self_attnn' of models[0].parameters.alpha in recipe.yml matches no tensor. Did you mean self_attn? "
    )
    error = only_error(planned(rest=[{"filter": "mpl.up_proj", "value": 0.3}, {"value": 0.5}]))
    assert "Did you mean mlp.up_proj?" in error


def test_a_filter_for_the_other_parameters_tensors_says_where_it_belongs(planned):
    error = only_error(planned(alpha=[{"filter": "up_proj", "value": 0.3}, {"value": 0.5}]))
    assert "matches only tensors outside attention (model.layers.0.mlp.up_proj.weight" in error
    assert error.endswith("which follow `rest`; put it there.")
    assert "which follow `alpha`" in only_error(
        planned(rest=[{"filter": "q_proj", "value": 1}, {"value": 0}])
    )


def test_filters_that_leave_attention_without_alpha_are_an_error(planned):
    error = only_error(planned(alpha=[{"filter": "q_proj", "value": 0.3}]))
    assert error.startswith("recipe.yml gives ft no alpha for model.layers.0.self_attn.k_proj.weight, ")
    assert "and 3 more; set parameters.alpha" in error


def test_the_alpha_of_all_models_fills_what_filters_leave(planned):
    content = recipe(alpha=[{"filter": "q_proj", "value": 0.3}])
    content["parameters"]["alpha"] = 0.6
    alphas = {n: t.alphas for n, t in by_name(planned(content)).items()}
    assert alphas["model.layers.0.self_attn.q_proj.weight"] == (0.3,)
    assert alphas["model.layers.0.self_attn.v_proj.weight"] == (0.6,)


def test_filters_that_leave_some_rest_take_it_from_the_finetuned_model(planned):
    tensors = by_name(planned(rest=[{"filter": "mlp", "value": 0.3}]))
    assert tensors["lm_head.weight"].alphas == (1.0,)
    assert tensors["model.layers.0.mlp.up_proj.weight"].alphas == (0.3,)


def test_an_entry_that_earlier_ones_shadow_is_a_warning(planned):
    warning = only_warning(planned(alpha=[{"value": 0.5}, {"filter": "q_proj", "value": 0.3}]))
    assert warning.startswith("Filter 'q_proj' of models[0].parameters.alpha in recipe.yml is never used")


def test_an_alpha_of_all_models_is_of_use_while_any_model_needs_it(models, planned):
    write_tiny_llama(models / "ft2", 2)
    content = recipe(models=("ft", "ft2"), rest="base")
    content["parameters"]["alpha"] = 0.3
    assert "parameters.alpha in recipe.yml is never used" in only_warning(planned(content))
    del content["models"][1]["parameters"]
    assert planned(content).warnings == ()


def test_lists_of_another_length_than_the_depth_are_warned_about(planned):
    warning = only_warning(planned(alpha=[0.1, 0.5, 0.9]))
    assert warning == (
        "models[0].parameters.alpha in recipe.yml has 3 values for 2 layers: mergekit interpolates over depth."
    )
    assert "outside layers only" in only_warning(planned(rest=[{"filter": "lm_head", "value": [0.1, 0.5]}]))
    assert planned(alpha=[0.4]).warnings == ()


def test_a_layer_number_that_also_begins_others_is_warned_about(models, planned):
    for seed, name in enumerate(("base", "ft")):
        shutil.rmtree(models / name)
        write_tiny_llama(models / name, seed, num_hidden_layers=12)
    warning = only_warning(planned(alpha=[{"filter": "layers.1", "value": 0.3}, {"value": 0.5}]))
    assert warning.endswith(
        "also matches layers.10, layers.11; end it with a dot to mean one layer: 'layers.1.'."
    )
    assert planned(alpha=[{"filter": "layers.1.", "value": 0.3}, {"value": 0.5}]).warnings == ()


@pytest.mark.parametrize(("alpha", "warned"), [(3, False), (-1.5, False), (3.01, True), (-1.6, True)])
def test_extrapolation_is_allowed_and_far_extrapolation_warned_about(planned, alpha, warned):
    found = planned(alpha=alpha)
    assert found.errors == ()
    assert [f"the furthest is {alpha:g}" in w for w in found.warnings] == [True] * warned


def test_shapes_that_differ_are_one_error(models, planned):
    rewrite(models / "ft", resized("up_proj.weight", (48, 32)))
    error = only_error(planned())
    assert "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in error
    assert "[64, 32] against [48, 32]" in error


def test_vocabularies_that_differ_are_called_that(models, planned):
    rewrite(
        models / "ft",
        resized(("embed_tokens.weight", "lm_head.weight"), (100, 32)),
        config={"vocab_size": 100},
    )
    error = only_error(planned())
    assert error.startswith(
        "The vocabularies differ: base has 96 rows in lm_head.weight, model.embed_tokens.weight, ft 100;"
    )


def test_what_is_not_read_of_a_model_may_have_any_shape(models, planned):
    rewrite(
        models / "ft",
        resized(("embed_tokens.weight", "lm_head.weight"), (100, 32)),
        config={"vocab_size": 100},
    )
    assert planned(rest="base").errors == ()
    assert "vocabularies differ" in only_error(planned(rest=0.1))


def test_depths_that_differ_are_one_error(models, planned):
    shutil.rmtree(models / "ft")
    write_tiny_llama(models / "ft", 1, num_hidden_layers=3)
    assert only_error(planned()) == "base has 2 layers, ft has 3; only equally deep models average."


def test_architectures_that_differ_are_one_error(models, planned):
    rewrite(models / "ft", config={"model_type": "qwen2"})
    assert "base is a llama, ft a qwen2" in only_error(planned())


def test_heads_that_differ_in_equal_shapes_are_an_error(models, planned):
    rewrite(models / "ft", config={"num_attention_heads": 2, "head_dim": 16})
    errors = planned().errors
    assert len(errors) == 2
    assert errors[0].startswith("num_attention_heads is 4 in base and 2 in ft")


def test_tensors_on_one_side_only_are_named(models, planned):
    rewrite(models / "ft", without("self_attn.q_proj.weight", "model.norm.weight"))
    error = only_error(planned())
    assert error.startswith(
        "ft lacks model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight, "
    )
    assert "model.norm.weight of base" in error


def test_a_head_that_only_one_model_ties_is_an_error(models, planned):
    rewrite(models / "ft", without("lm_head.weight"), config={"tie_word_embeddings": True})
    assert only_error(planned()).startswith(
        "ft ties its head to its embedding, base does not (lm_head.weight)"
    )


def test_a_tied_head_that_only_one_model_stores_is_left_out(models, planned):
    for name in ("base", "ft"):
        rewrite(models / name, config={"tie_word_embeddings": True})
    rewrite(models / "ft", without("lm_head.weight"))
    found = planned()
    assert (
        only_warning(found) == "Only base has lm_head.weight, tied to the embedding: left out of the result."
    )
    assert "lm_head.weight" not in by_name(found)


def test_a_head_that_is_not_tied_is_never_left_out(models, planned):
    for name in ("base", "ft"):
        rewrite(models / name, config={"tie_word_embeddings": False})
    rewrite(models / "ft", without("lm_head.weight"))
    assert only_error(planned()).startswith("ft lacks lm_head.weight of base;")


def test_buffers_that_models_compute_themselves_are_left_out(models, planned):
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")}
    rewrite(models / "ft", lambda tensors: tensors | inverse)
    found = planned()
    assert "computed by the model itself: left out" in only_warning(found)
    assert len(found.tensors) == len(llama_shapes(dict(Checkpoint.open("base").config)))


def test_dtypes_that_differ_are_warned_about(models, planned):
    rewrite(models / "ft", dtype="float32")
    warning = only_warning(planned())
    assert warning.startswith("21 tensors are BF16 in base and F32 in ft (")
    assert {t.name: t.dtype for t in planned().tensors}["lm_head.weight"] == "F32"
    assert by_name(planned())["model.layers.0.self_attn.q_proj.weight"].dtype == "BF16"


def test_another_rope_theta_is_warned_about_however_it_is_spelled(models, planned):
    rewrite(models / "ft", config={"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}})
    assert planned().warnings == ()
    rewrite(models / "ft", config={"rope_theta": None, "rope_parameters": {"rope_theta": 500000.0}})
    assert only_warning(planned()).startswith("rope_theta is 10000.0 in base and 500000.0 in ft;")


YARN = {"type": "yarn", "factor": 4.0}
NESTED = {
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({}, {"max_position_embeddings": 4096}, "max_position_embeddings is 128 in base and 4096 in ft"),
        ({}, {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in base and 1e-06 in ft"),
        ({}, {"hidden_act": "gelu"}, 'hidden_act is "silu" in base and "gelu" in ft'),
        ({"sliding_window": None}, {"sliding_window": 64}, "sliding_window is null in base and 64 in ft"),
        ({}, {"rope_scaling": YARN}, 'rope_type is "default" in base and "yarn" in ft'),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"factor": 8}}, "factor is 4.0 in base and 8 in ft"),
        (
            NESTED,
            {"rope_parameters": NESTED["rope_parameters"] | {"full_attention": {"rope_theta": 1e4}}},
            'rope_theta of "full_attention" is 1000000.0 in base and 10000.0 in ft',
        ),
    ],
)
def test_weights_that_the_config_uses_otherwise_are_warned_about(models, planned, ours, theirs, expected):
    rewrite(models / "base", config=ours)
    rewrite(models / "ft", config=theirs)
    assert only_warning(planned()).startswith(f"{expected}; the result gets the base's, so check that")


def test_settings_that_differ_are_one_sentence(models, planned):
    rewrite(models / "ft", config={"rms_norm_eps": 1e-6, "rope_theta": 5e5})
    found = only_warning(planned())
    assert (
        "rms_norm_eps is 1e-05 in base and 1e-06 in ft, rope_theta is 10000.0 in base and 500000.0" in found
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            {"rope_scaling": None},
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        ),
        (
            {"rope_scaling": YARN},
            {"rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}},
        ),
        ({"rope_scaling": {"type": "su"}}, {"rope_scaling": {"type": "longrope", "rope_type": "longrope"}}),
        ({"sliding_window": 64, "use_sliding_window": False}, {"sliding_window": None}),
        ({}, {"sliding_window": 64}),
        ({}, {"rms_norm_eps": None, "hidden_act": None, "rope_theta": None}),
        ({}, NESTED),
    ],
)
def test_settings_that_are_only_spelled_otherwise_are_no_warning(models, planned, ours, theirs):
    rewrite(models / "base", config=ours)
    rewrite(models / "ft", config=theirs)
    assert planned().warnings == ()


def test_quantised_models_are_refused(models, planned):
    rewrite(models / "ft", config={"quantization_config": {"quant_method": "gptq"}})
    assert only_error(planned()) == "ft is quantised (quant_method gptq); name the unquantised model."


def test_the_base_under_another_name_is_noticed(models, planned):
    (models / "link").symlink_to(models / "base")
    assert "same directory as the base" in only_warning(planned(models=("link",)))


def test_errors_of_all_kinds_are_reported_at_once(models):
    rewrite(models / "ft", resized("up_proj.weight", (48, 32)))
    (models / "base" / "config.json").write_text("{")
    content = recipe(alpha=float("nan"), models=("ft", "nowhere/at all")) | {"modles": 3}
    (models / "recipe.yml").write_text(yaml.safe_dump(content))
    found = plan_file("recipe.yml")
    text = "\n".join(found.errors)
    for part in (
        "alpha in recipe.yml must be finite",
        "'modles'",
        "config.json holds no valid JSON",
        "nowhere/at all",
    ):
        assert part in text
    rewritten = recipe(alpha=[{"filter": "q_prj", "value": 1}, {"value": 0}]) | {
        "base_model": "ft",
        "models": [{"model": "gone"}],
    }
    (models / "recipe.yml").write_text(yaml.safe_dump(rewritten))
    assert len(plan_file("recipe.yml").errors) == 1  # the missing model; parameters went with the entry


def test_filters_are_checked_against_the_base_when_the_finetuned_model_is_missing(models, planned):
    errors = planned(alpha=[{"filter": "q_prj", "value": 1}, {"value": 0}], models=("gone away",)).errors
    assert len(errors) == 2
    assert "No model directory gone away" in errors[0]
    assert "Did you mean q_proj?" in errors[1]


def test_a_recipe_for_the_tuner_needs_no_alpha_but_one_for_mergekit_does(models, planned):
    suites = {"evals": {"general": [{"kl": {"data": "x.jsonl"}}]}}
    found = planned(recipe(alpha=None) | suites)
    assert only_warning(found) == "recipe.yml does not give all alphas yet; arma-tune finds them."
    tensor = by_name(found)["model.layers.0.self_attn.q_proj.weight"]
    assert tensor.action == "average"
    assert math.isnan(tensor.alphas[0])
    assert tensor.as_dict()["alpha"] is None
    assert "gives ft no alpha" in only_error(planned(alpha=None))
    loaded = Recipe.load("recipe.yml")
    assert plan(loaded).errors
    assert plan(loaded, require_alpha=False).errors == ()


def test_check_raises_all_errors_or_returns_the_plan(models, planned):
    good = planned()
    assert good.check() is good
    with pytest.raises(RecipeError, match="matches no tensor"):
        planned(alpha=[{"filter": "xyz", "value": 1}, {"value": 0}]).check()


def test_files_that_are_no_recipe_are_refused(models):
    with pytest.raises(RecipeError, match=r"No recipe nowhere\.yml"):
        plan_file("nowhere.yml")
