import math
import re
import shutil

import pytest
import torch
import yaml
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors, registered_methods
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import arma_mergekit.method
from arma_mergekit.errors import CheckpointError, RecipeError
from arma_mergekit.kernel import average
from arma_mergekit.method import arma
from arma_mergekit.plan import plan
from arma_mergekit.recipe import Recipe

ATTENTION = "model.layers.1.self_attn.q_proj.weight"
REST = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama):
    root = tmp_path_factory.mktemp("models")
    return {
        "base": tiny_llama(root / "base", seed=0),
        "tuned": tiny_llama(root / "tuned", seed=1),
        "second": tiny_llama(root / "second", seed=2),
        "half": tiny_llama(root / "half", seed=3, dtype="float16"),
        "deep": tiny_llama(root / "deep", seed=4, num_hidden_layers=5),
        "deeper": tiny_llama(root / "deeper", seed=5, num_hidden_layers=5),
    }


def recipe(base, *tuned, alpha=0.3, rest=None, **keys):
    alphas = alpha if isinstance(alpha, tuple) else (alpha,) * len(tuned)
    return {
        "merge_method": "arma",
        "base_model": str(base),
        "models": [
            {"model": str(m), "parameters": {} if a is None else {"alpha": a}}
            for m, a in zip(tuned, alphas, strict=True)
        ],
        "parameters": {} if rest is None else {"rest": rest},
        **keys,
    }


@pytest.fixture
def merge(tmp_path):
    """Run mergekit on a recipe given as a dict and return its tensors."""

    def run(config):
        config = yaml.safe_load(yaml.safe_dump(config))  # as mergekit-yaml reads it
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(quiet=True))
        return load_file(tmp_path / "out/model.safetensors")

    return run


def weights(path):
    return load_file(path / "model.safetensors")


def is_attention(name):
    return ".self_attn." in name


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left, right)


def expected(base, tuned, alpha_of):
    base, tuned = weights(base), weights(tuned)
    return {name: average(base[name], [tuned[name]], [alpha_of(name)]) for name in base}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not same(left[name], right[name])] == []


# What is merged, through mergekit's executor


def test_attention_is_averaged_by_the_kernel_and_the_rest_is_the_finetuned_model(models, merge):
    merged = merge(recipe(models["base"], models["tuned"], alpha=0.3))
    assert_same(merged, expected(models["base"], models["tuned"], lambda n: 0.3 if is_attention(n) else 1))


def test_alpha_one_with_rest_finetuned_is_the_finetuned_model_and_alpha_zero_with_rest_base_the_base(
    models, merge
):
    assert_same(merge(recipe(models["base"], models["tuned"], alpha=1)), weights(models["tuned"]))
    assert_same(merge(recipe(models["base"], models["tuned"], alpha=0, rest="base")), weights(models["base"]))


def test_lists_run_over_depth_for_alpha_and_rest(models, merge):
    merged = merge(
        recipe(models["deep"], models["deeper"], alpha=[0.0, 0.5, 1.0], rest=[0.1, 0.2, 0.3, 0.4, 0.5])
    )

    def alpha_of(name):
        layer = re.search(r"layers\.(\d)", name)
        depth = int(layer[1]) if layer else 0  # tensors outside layers have mergekit's t = 0
        return depth * 0.25 if is_attention(name) else 0.1 + 0.1 * depth

    assert_same(merged, expected(models["deep"], models["deeper"], alpha_of))


def test_filters_need_not_match_tensors_outside_attention(models, merge):
    filters = [{"filter": ".self_attn.q_proj", "value": 0.25}, {"filter": ".self_attn", "value": [0.5, 1.5]}]
    merged = merge(
        recipe(models["base"], models["tuned"], alpha=filters, rest=[{"filter": "mlp", "value": 0.7}])
    )

    def alpha_of(name):
        if "q_proj" in name:
            return 0.25
        if is_attention(name):
            return 0.5 if "layers.0" in name else 1.5
        return 0.7 if "mlp" in name else 1

    assert_same(merged, expected(models["base"], models["tuned"], alpha_of))


def test_two_finetuned_models_each_bring_their_own_alpha_and_share_rest(models, merge):
    merged = merge(recipe(models["base"], models["tuned"], models["second"], alpha=(0.3, -0.2), rest=0.5))
    base, tuned, second = (weights(models[m]) for m in ("base", "tuned", "second"))
    alphas = {name: (0.3, -0.2) if is_attention(name) else (0.5, 0.5) for name in base}
    assert_same(merged, {n: average(base[n], [tuned[n], second[n]], alphas[n]) for n in base})


def test_base_listed_among_the_models_is_still_the_base(models, merge):
    config = recipe(models["base"], models["tuned"], models["base"], alpha=(0.3, None))
    assert_same(
        merge(config), expected(models["base"], models["tuned"], lambda n: 0.3 if is_attention(n) else 1)
    )


def test_same_alpha_everywhere_is_mergekits_linear_up_to_rounding(models, merge):
    ours = merge(recipe(models["base"], models["tuned"], alpha=0.4, rest=0.4))
    linear = {
        "merge_method": "linear",
        "models": [
            {"model": str(models["base"]), "parameters": {"weight": 0.6}},
            {"model": str(models["tuned"]), "parameters": {"weight": 0.4}},
        ],
    }
    theirs = merge(linear)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "rest"),
    [
        ([0.0, "2e-1", 0.9], "base"),
        ([1, 1, 0.5, -0.25, 1.5, 0.3, 0], [0.1, 0.7]),
        (
            [{"filter": "layers.1", "value": [0.2, 1.2]}, {"value": 0.4}],
            [{"filter": "mlp", "value": [1, 0, 0.5]}],
        ),
        ([{"filter": "o_proj.weight", "value": 1}, {"filter": "*", "value": 0}], ["base", "finetuned", 0.5]),
        (1.5, [{"filter": "norm", "value": "base"}, {"filter": "down", "value": 0.25}]),
    ],
)
def test_arma_plan_foretells_what_mergekit_does(models, merge, tmp_path, alpha, rest):
    config = recipe(models["deep"], models["deeper"], alpha=alpha, rest=rest)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(config))
    foretold = plan(Recipe.load(tmp_path / "recipe.yml"))
    assert foretold.errors == ()
    alphas = {tensor.name: tensor.alphas[0] for tensor in foretold.tensors}
    assert_same(merge(config), expected(models["deep"], models["deeper"], alphas.__getitem__))


# dtypes


def test_bf16_base_and_fp16_finetuned_give_bf16_averages_and_unconverted_copies(models, merge):
    merged = merge(recipe(models["base"], models["half"], alpha=0.3))
    assert_same(merged, expected(models["base"], models["half"], lambda n: 0.3 if is_attention(n) else 1))
    assert (merged[ATTENTION].dtype, merged[REST].dtype) == (torch.bfloat16, torch.float16)


def test_out_dtype_converts_the_result_and_dtype_the_inputs(models, merge):
    base, half = weights(models["base"])[ATTENTION], weights(models["half"])[ATTENTION]
    merged = merge(recipe(models["base"], models["half"], alpha=0.3, out_dtype="float32"))
    assert {t.dtype for t in merged.values()} == {torch.float32}
    assert same(merged[ATTENTION], average(base, [half], [0.3]).float())


def test_dtype_converts_the_inputs_first(models, merge):
    base, half = weights(models["base"])[ATTENTION], weights(models["half"])[ATTENTION]
    merged = merge(recipe(models["base"], models["half"], alpha=0.3, dtype="float32"))
    assert {t.dtype for t in merged.values()} == {torch.float32}
    assert same(merged[ATTENTION], average(base.float(), [half.float()], [0.3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_holds_in_memory_too_even_where_it_equals_the_promoted_one(dtype):
    base, tuned = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 2.0, dtype=torch.float16)
    options = {"base_index": 0, "name": ATTENTION, "parameters": {"alpha": 0.5}}
    assert merge_tensors([base, tuned], "arma", dtype=dtype, **options).dtype == dtype
    assert merge_tensors([base, tuned], "arma", **options).dtype == torch.bfloat16
    assert merge_tensors([base, tuned], "arma", out_dtype=dtype, **options).dtype == dtype


def test_dtype_that_is_not_floating_point_is_refused():
    with pytest.raises(ValueError, match=r"floating-point.*int64"):
        merge_tensors([torch.ones(1)] * 2, "arma", base_index=0, name=REST, dtype=torch.int64)


# Copies


@pytest.mark.parametrize(
    ("alpha", "rest", "name", "wanted"),
    [
        (1, "base", ATTENTION, "tuned"),
        (0, "finetuned", ATTENTION, "base"),
        (0.5, "finetuned", REST, "tuned"),
        (0.5, "base", REST, "base"),
        (0.5, 1.0, REST, "tuned"),
    ],
)
def test_copied_tensor_is_the_input_itself_and_its_other_side_is_never_read(alpha, rest, name, wanted):
    # A tensor on the meta device has no values: whoever reads or converts it fails.
    sides = {side: torch.empty(4, device="meta", dtype=torch.float16) for side in ("base", "tuned")}
    group = TensorGroup.from_tensors(list(sides.values()), ids=["b", "t"], base_index=0, name=name)
    (merged,) = arma([group], parameters={"alpha": {"t": alpha}, "rest": rest})
    assert merged is sides[wanted]


def test_base_may_stand_anywhere_among_the_inputs():
    tuned, base = torch.ones(2), torch.zeros(2)
    merged = merge_tensors([tuned, base], "arma", base_index=1, name=ATTENTION, parameters={"alpha": 0.25})
    assert merged.tolist() == [0.25, 0.25]


def test_inputs_are_not_written_to():
    base, tuned = torch.zeros(4), torch.ones(4)
    merge_tensors([base, tuned], "arma", base_index=0, name=ATTENTION, parameters={"alpha": 0.5})
    assert (base.sum(), tuned.sum()) == (0, 4)


def test_modules_that_require_gradients_can_be_merged():
    models = {side: torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict()}) for side in ("base", "tuned")}
    for model in models.values():
        model["self_attn"]["q_proj"] = torch.nn.Linear(3, 2)
    merged = merge_state_dicts(models, "arma", base="base", parameters={"alpha": 0.5})
    sides = [model.state_dict()["self_attn.q_proj.weight"] for model in models.values()]
    assert same(merged["self_attn.q_proj.weight"], average(sides[0], [sides[1]], [0.5]))


# Tensors that one side lacks, and buffers


def edited(source, path, **changes):
    shutil.copytree(source, path)
    tensors = weights(source)
    for name, tensor in changes.items():
        tensors.pop(name, None) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_head_that_only_the_finetuned_side_spells_out_is_taken_from_it(models, merge, tmp_path, tiny_llama):
    base = tiny_llama(tmp_path / "tied", seed=7, tie_word_embeddings=True)
    merged = merge(recipe(base, models["tuned"], alpha=0.3))
    assert same(merged["lm_head.weight"], weights(models["tuned"])["lm_head.weight"])


def test_optional_tensor_of_the_base_alone_is_kept_and_of_the_finetuned_alone_left_out(caplog):
    base, tuned = (ModelReference.parse(name) for name in ("base", "tuned"))
    weight = WeightInfo(name="lm_head.weight", optional=True)
    task = ExecuteMergeMethodTask(
        method_name="arma",
        gather_tensors=GatherTensors(weight_info={base: weight, tuned: weight}),
        model_order=(base, tuned),
        base_model=base,
        output_weight=weight,
        parameters={"rest": "finetuned"},
        input_parameters={base: {}, tuned: {"alpha": 0.5}},
    )
    head = torch.ones(2)
    assert task.execute({base: head}) is head
    assert task.execute({tuned: head}) is None
    assert "Skipping optional weight lm_head.weight" in caplog.text


def test_equal_buffers_are_kept_and_unequal_ones_refused_by_name():
    ids = torch.arange(4)
    name = "model.layers.0.self_attn.position_ids"
    parameters = {"alpha": 0.5}
    kept = merge_tensors([ids, ids.clone()], "arma", base_index=0, name=name, parameters=parameters)
    assert same(kept, ids)
    with pytest.raises(CheckpointError, match=rf"{name} \(int64, int64\).*differs"):
        merge_tensors([ids, ids + 1], "arma", base_index=0, name=name, parameters=parameters)
    with pytest.raises(CheckpointError, match=rf"{name} \(int64, int32\)"):
        merge_tensors([ids, ids.int()], "arma", base_index=0, name=name, parameters=parameters)


# Bad values


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, "0,5", "half", True, "nan", pytest.param(10**400, id="huge")]
)
def test_alpha_that_is_no_finite_number_is_refused_with_parameter_model_tensor_and_value(models, merge, bad):
    with pytest.raises(RecipeError) as caught:
        merge(recipe(models["base"], models["tuned"], alpha=bad))
    text = str(caught.value)
    assert "alpha" in text
    assert str(models["tuned"]) in text
    assert "model.layers.0.self_attn" in text
    assert str(bad) in text


@pytest.mark.parametrize("bad", [[0.1, "x", 0.3], [0.1, 0.2, math.inf], ["x", 0.2]])
def test_bad_entry_of_a_list_over_depth_is_refused_as_spelled(models, merge, bad):
    with pytest.raises(RecipeError, match=r"finite number for model.layers.\d.self_attn.*got ('x'|inf)"):
        merge(recipe(models["base"], models["tuned"], alpha=bad))


@pytest.mark.parametrize("good", ["3e-1", "0.3", " .3 "])
def test_numbers_that_yaml_reads_as_text_are_numbers(models, merge, good):
    merged = merge(recipe(models["base"], models["tuned"], alpha=good))
    assert_same(merged, expected(models["base"], models["tuned"], lambda n: 0.3 if is_attention(n) else 1))


def test_missing_alpha_is_reported_for_the_first_tensor_that_needs_it(models, merge):
    with pytest.raises(RecipeError, match=r"alpha of .*tuned is missing for model.layers.0.self_attn"):
        merge(recipe(models["base"], models["tuned"], alpha=None))


@pytest.mark.parametrize("bad", ["fintuned", math.nan, [0.1, math.inf]])
def test_bad_rest_is_refused_with_the_words_it_knows(models, merge, bad):
    with pytest.raises(
        RecipeError, match=r"rest must be base, finetuned or a finite number for \S+weight, but"
    ):
        merge(recipe(models["base"], models["tuned"], rest=bad))


def test_rest_finetuned_is_ambiguous_with_two_finetuned_models(models, merge):
    with pytest.raises(RecipeError, match=r"2 fine-tuned models to take \S+ from.*number"):
        merge(recipe(models["base"], models["tuned"], models["second"]))


def test_recipe_without_base_or_without_finetuned_model_is_refused(models, merge):
    config = recipe(models["base"], models["tuned"])
    with pytest.raises(ValueError, match="requires a base"):
        merge({k: v for k, v in config.items() if k != "base_model"})
    with pytest.raises(ValueError, match="at least 2 inputs"):
        merge(recipe(models["base"], models["base"]))


def test_weights_that_are_not_finite_are_refused_by_name_but_only_where_they_are_averaged(
    models, merge, tmp_path
):
    bad = torch.full((32, 32), math.nan, dtype=torch.bfloat16)
    broken = edited(models["tuned"], tmp_path / "broken", **{ATTENTION: bad})
    with pytest.raises(CheckpointError, match=rf"{re.escape(ATTENTION)}: .*not finite"):
        merge(recipe(models["base"], broken))
    assert same(merge(recipe(models["base"], broken, alpha=0))[ATTENTION], weights(models["base"])[ATTENTION])


def test_quantised_weights_are_copied_but_never_averaged():
    base, tuned = torch.zeros(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e4m3fn)
    options = {"base_index": 0, "parameters": {"alpha": 0.5}}
    assert merge_tensors([base, tuned], "arma", name=REST, **options) is tuned
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(ATTENTION)} is quantised \(torch.float8_e4m3fn\)"
    ):
        merge_tensors([base, tuned], "arma", name=ATTENTION, **options)


def test_tensor_without_a_name_is_refused_because_only_its_name_tells_what_it_is():
    with pytest.raises(RecipeError, match="name"):
        merge_tensors([torch.zeros(1), torch.ones(1)], "arma", base_index=0, parameters={"alpha": 0.5})


# The rest


def test_what_a_name_leaves_open_is_settled_by_the_checkpoint_mergekit_has_open(tmp_path, monkeypatch):
    # Kimi Linear calls its linear attention self_attn: the tensors beside the projection give it away.
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(
        {name: torch.ones(1), "model.layers.0.self_attn.A_log": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text('{"model_type": "kimi_linear"}')
    base = ModelReference.parse(str(tmp_path))
    group = TensorGroup.from_tensors(
        [torch.zeros(1), torch.ones(1)], ids=[base, "t"], base_index=0, name=name
    )
    parameters = {"alpha": {"t": 0.5}, "rest": "finetuned"}
    assert arma([group], parameters=parameters)[0].item() == 0.5
    LoaderCache().get(base)
    assert arma([group], parameters=parameters)[0].item() == 1


def test_average_runs_on_one_thread_and_gives_the_others_back_even_after_an_error(monkeypatch):
    seen = []

    def spy(*operands):
        seen.append(torch.get_num_threads())
        return average(*operands)

    monkeypatch.setattr(arma_mergekit.method, "average", spy)
    options = {"base_index": 0, "name": ATTENTION, "parameters": {"alpha": 0.5}}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge_tensors([torch.ones(1), torch.zeros(1)], "arma", **options)
        assert (seen, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(CheckpointError):
            merge_tensors([torch.ones(1), torch.tensor([math.nan])], "arma", **options)
        assert (seen, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_registering_again_changes_nothing_and_the_registry_gives_the_one_instance():
    arma_mergekit.method.register()
    assert [method for method in registered_methods() if method.spec.name == "arma"] == [arma]
    assert get("arma") is arma
