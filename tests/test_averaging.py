"""The Python API: averages in memory, the alpha by gradient descent, differences by layer."""

import copy
import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import transformers
from conftest import write_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import FAMILIES, GQA, HYBRIDS, LEFT_PADDED, build, eager_attentions

import arma_mergekit
from arma_mergekit import find_optimal_alpha, merge_models, model_difference
from arma_mergekit.attention import DIVERGENCES, LEGACY, divergence_by_head
from arma_mergekit.errors import CheckpointError, DataError, RecipeError
from arma_mergekit.roles import roles_from_model

LLAMA = transformers.LlamaConfig(**GQA | {"num_hidden_layers": 3})
BATCHES = [LEFT_PADDED, {"input_ids": torch.arange(3, 24).reshape(3, 7)}]


def pair(config=LLAMA, **kwargs):
    """A model and what might be a fine-tune of it: every tensor of its layers moved, no norm, no embedding."""
    base, tuned = build(config, **kwargs), build(config, **kwargs)
    roles = roles_from_model(tuned)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if roles[name].layer is not None and roles[name].kind != "norms":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return base, tuned


@pytest.fixture(scope="module")
def models():
    return pair()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_attention(model):
    return {name: role.attention for name, role in roles_from_model(model).items()}


# --- merge_models


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_averaged_and_the_rest_is_the_base(family):
    base, tuned = pair(FAMILIES[family])
    merged = merge_models(base, tuned, 0.3)
    ours, theirs, attention = weights(base), weights(tuned), is_attention(base)
    assert any(attention.values())
    assert not all(attention.values())
    for name, found in weights(merged).items():
        expected = (
            0.7 * ours[name].double() + 0.3 * theirs[name].double()
            if attention[name]
            else ours[name].double()
        )
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_both_models_stay_as_they_are_and_the_result_shares_nothing_with_them(models):
    before = [weights(model) for model in models]
    merged = merge_models(*models, 0.5, rest=0.5)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("alpha", "rest", "same"), [(0.0, "base", 0), (1.0, "finetuned", 1), (1.0, 1, 1)])
def test_the_ends_are_the_models_to_the_bit(alpha, rest, same):
    models = pair(dtype=torch.bfloat16)
    merged = merge_models(*models, alpha, rest)
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), models[same].parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(merged(**LEFT_PADDED).logits, models[same](**LEFT_PADDED).logits)


@pytest.mark.parametrize("make", [list, tuple, np.array])
def test_one_alpha_per_layer(models, make):
    merged = weights(merge_models(*models, make([0.0, 0.25, 1.0])))
    ours, theirs = map(weights, models)
    for layer, alpha in enumerate([0.0, 0.25, 1.0]):
        for part in ("q_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            torch.testing.assert_close(merged[name], torch.lerp(ours[name], theirs[name], alpha))
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(merged[name], ours[name])


def test_alphas_by_name_where_a_tensor_goes_before_its_projection(models):
    named = "model.layers.1.self_attn.q_proj.weight"
    merged = weights(merge_models(*models, {named: 1.0, "q": 0.5, "v_proj": 0.25, "gate": 0.75}, rest=0.125))
    ours, theirs = map(weights, models)
    expected = {
        named: 1.0, "model.layers.0.self_attn.q_proj.weight": 0.5, "model.layers.2.self_attn.v_proj.weight": 0.25,
        "model.layers.0.mlp.gate_proj.weight": 0.75, "model.layers.0.self_attn.k_proj.weight": 0.125,
        "model.norm.weight": 0.125,
    }  # fmt: skip
    for name, alpha in expected.items():
        torch.testing.assert_close(merged[name], torch.lerp(ours[name], theirs[name], alpha))


@pytest.mark.parametrize("make", [np.float32, torch.tensor, np.array])
def test_a_number_may_come_from_anywhere(models, make):
    found, expected = weights(merge_models(*models, make(0.5))), weights(merge_models(*models, 0.5))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_models_may_differ_in_dtype():
    base, tuned = pair(dtype=torch.bfloat16)[0], pair()[1]
    assert all(p.dtype == torch.bfloat16 for p in merge_models(base, tuned, 0.5).parameters())
    assert find_optimal_alpha(base, tuned, BATCHES, steps=1).objective > 0


def test_tied_embeddings_stay_tied():
    base, tuned = pair(transformers.LlamaConfig(**GQA, tie_word_embeddings=True))
    merged = merge_models(base, tuned, 0.5, rest=0.5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = (base.lm_head.weight + tuned.lm_head.weight) / 2
    torch.testing.assert_close(merged.lm_head.weight, expected)


def test_what_cannot_be_averaged_is_one_sentence(models):
    base, tuned = models
    wide = build(transformers.LlamaConfig(**GQA | {"num_hidden_layers": 3, "vocab_size": 64}))
    deep = build(transformers.LlamaConfig(**GQA | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shapes \(61, 32\) and \(64, 32\)"):
        merge_models(base, wide)
    with pytest.raises(CheckpointError, match=r"Only one of the two models has model.layers.3.*9 such"):
        merge_models(base, deep)
    with pytest.raises(RecipeError, match="is 3 numbers for this model, but got 2"):
        merge_models(base, tuned, [0.1, 0.2])
    with pytest.raises(RecipeError, match=r"Unknown tensor or projection 'qq'. Did you mean q"):
        merge_models(base, tuned, {"qq": 0.1})
    with pytest.raises(RecipeError, match=r"Unknown rest 'finetune'. Did you mean finetuned"):
        merge_models(base, tuned, 0.1, rest="finetune")


@pytest.mark.parametrize(
    ("alpha", "rest", "message"),
    [
        (math.nan, "base", "alpha must be a finite number or a sequence of them, but got nan"),
        ("half", "base", "alpha must be a finite number or a sequence of them, but got 'half'"),
        ([[0.1, 0.2, 0.3]], "base", "alpha must be a finite number or a sequence of them"),
        ([0.1, math.inf, 0.3], "base", "alpha must be a finite number or a sequence of them"),
        ({"q": None}, "base", "alpha of q must be a finite number, but got None"),
        ({1: 0.5}, "base", "Unknown tensor or projection '1'"),
        (0.5, math.nan, "rest must be a finite number, but got nan"),
        (0.5, None, "rest must be a finite number, but got None"),
    ],
)
def test_an_alpha_that_is_no_number_is_one_sentence(models, alpha, rest, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        merge_models(*models, alpha, rest)


def test_alphas_may_leave_the_range_between_the_models(models):
    merged = weights(merge_models(*models, {"q": -0.5, "v": 1.5}))
    ours, theirs = map(weights, models)
    for part, alpha in (("q_proj", -0.5), ("v_proj", 1.5)):
        name = f"model.layers.0.self_attn.{part}.weight"
        torch.testing.assert_close(merged[name], torch.lerp(ours[name], theirs[name], alpha))


def test_what_is_no_model_in_memory_is_one_sentence(models):
    base, tuned = models
    elsewhere = copy.deepcopy(tuned).to("meta")
    with pytest.raises(CheckpointError, match="'a/path' is no model; load it first"):
        merge_models(base, "a/path")
    with pytest.raises(CheckpointError, match=r"is torch.float32 on cpu and torch.float32 on meta"):
        merge_models(base, elsewhere)
    with pytest.raises(CheckpointError, match="'a/path' is no model; load it first"):
        model_difference("a/path", tuned, BATCHES)
    with pytest.raises(CheckpointError, match="The models are on cpu and meta; move both to one device"):
        model_difference(base, elsewhere, BATCHES)


# --- find_optimal_alpha


def apart(student, teacher, metric="js", batches=BATCHES):
    return divergence_by_head(student, teacher, batches, metric).values.mean()


def objective(models, alpha, rest="base", metric="js", rho=1.0, batches=BATCHES, ends=None):
    """J, spelt out."""
    base, tuned = models
    ends = ends or (apart(tuned, base, metric, batches), apart(base, tuned, metric, batches))
    merged = merge_models(base, tuned, alpha, rest)
    return (
        apart(merged, base, metric, batches) / ends[0] + rho * apart(merged, tuned, metric, batches) / ends[1]
    )


@pytest.mark.parametrize("metric", DIVERGENCES)
def test_the_alpha_is_that_of_a_fine_grid_from_wherever_it_starts(models, metric):
    ends = apart(*reversed(models), metric), apart(*models, metric)

    def score(alpha):
        return objective(models, alpha, metric=metric, ends=ends)

    coarse = min((k / 10 for k in range(11)), key=score)
    grid = min((min(max(coarse + k / 50, 0), 1) for k in range(-3, 4)), key=score)
    for start in (0.5, 0.05):
        found = find_optimal_alpha(*models, BATCHES, start, metric=metric)
        assert found.converged
        assert len(found.objective) < 60
        assert found.alpha == pytest.approx(grid, abs=0.02)
        assert 0.2 < found.alpha < 0.8 or metric == "emd"  # no square of a distance: its two sides cancel


def test_the_curve_is_the_objective_at_what_was_tried(models):
    found = find_optimal_alpha(*models, BATCHES, 0.2, rho=0.5, rest="finetuned", steps=3)
    assert found.alphas[0] == 0.2
    for (alpha,), value in zip(found.alphas, found.objective, strict=True):
        assert value == pytest.approx(objective(models, alpha, "finetuned", rho=0.5), rel=1e-4)
    np.testing.assert_allclose(found.parts.sum(1), found.objective)
    assert found.alpha == found.alphas[found.objective.argmin()]
    assert not found.converged


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "deepseek_v3"])
def test_it_finds_an_alpha_for_other_architectures(family):
    models = pair(FAMILIES[family])
    found = find_optimal_alpha(*models, BATCHES)
    near = [objective(models, np.clip(found.alpha + step, 0, 1)) for step in (-0.05, 0.05)]
    assert found.converged
    assert found.objective.min() <= min(near)


def test_without_the_second_side_the_base_is_best(models):
    assert find_optimal_alpha(*models, BATCHES, rho=0.0).alpha == pytest.approx(0, abs=0.01)


def test_each_side_may_have_texts_of_its_own(models):
    general, domain = BATCHES[:1], BATCHES[1:]
    found = find_optimal_alpha(*models, general, domain_loader=domain, steps=1)
    sides = [objective(models, 0.5, rho=0.0, batches=general)]
    sides.append(objective(models, 0.5, batches=domain) - objective(models, 0.5, rho=0.0, batches=domain))
    np.testing.assert_allclose(found.parts[0], sides, rtol=1e-4)


def test_alphas_of_several_groups_do_better_than_one_and_can_be_merged(models):
    single = find_optimal_alpha(*models, BATCHES)
    found = find_optimal_alpha(*models, BATCHES, groups="layer:qkvo")
    assert found.alphas.shape[1] == 3 * 4
    assert found.objective.min() < single.objective.min()
    assert objective(models, found.alpha) == pytest.approx(found.objective.min(), rel=1e-4)


def test_only_heads_with_a_weight_count(models):
    heads = {0: torch.zeros(4), 1: torch.tensor([0.0, 2.0, 0.0, 0.0]), 2: torch.zeros(4)}
    found = find_optimal_alpha(*models, BATCHES, heads=heads, steps=1)
    merged = merge_models(*models, 0.5)
    moved = [divergence_by_head(merged, model, BATCHES).values[1, 1] for model in models]
    end = divergence_by_head(*models, BATCHES).values[1, 1]
    np.testing.assert_allclose(found.parts[0], np.array(moved) / end, rtol=1e-4)


def test_dropout_modes_and_gradients_of_the_models_are_left_alone():
    models = pair(FAMILIES["gpt2"])
    expected = find_optimal_alpha(*models, BATCHES, steps=2)
    for model in models:
        model.train()
        model.transformer.h[0].eval()
    found = find_optimal_alpha(*models, BATCHES, steps=2)
    model_difference(*models, BATCHES)
    np.testing.assert_array_equal(found.objective, expected.objective)
    for model in models:
        assert model.training
        assert not model.transformer.h[0].training
        assert model.transformer.h[1].training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("metric", LEGACY)
def test_the_scripts_objective_is_the_first_layer_and_its_optimum_the_fine_tuned_model(models, metric):
    found = find_optimal_alpha(*models, BATCHES, 0.75, metric=metric, legacy=True)
    merged, tuned = merge_models(*models, 0.25), models[1]
    with torch.no_grad():
        first = [[eager_attentions(m, batch)[0] for m in (merged, tuned)] for batch in BATCHES]
    assert found.alphas[0] == 0.75  # of model_1
    assert found.objective[0] == pytest.approx(np.mean([LEGACY[metric](a, m) for a, m in first]), rel=1e-3)
    assert found.alpha < 0.2
    assert found.objective.min() < found.objective[0] / 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batch: batch["input_ids"],
        lambda batch: (batch["input_ids"],),
        lambda batch: [{**batch, "labels": batch["input_ids"]}, "y"],
        lambda batch: transformers.BatchEncoding({**batch}),
    ],
    ids=["tensors", "tuples", "inputs and labels", "encodings"],
)
def test_a_loader_may_yield_what_loaders_yield(models, wrap):
    batches = BATCHES[1:]
    expected = find_optimal_alpha(*models, batches, steps=1).objective
    loader = torch.utils.data.DataLoader(
        list(map(wrap, batches)), batch_size=None, collate_fn=lambda batch: batch
    )
    np.testing.assert_array_equal(find_optimal_alpha(*models, loader, steps=1).objective, expected)


def test_what_cannot_be_compared_is_one_sentence(models):
    with pytest.raises(DataError, match="yields str; make it yield dicts with a tensor input_ids"):
        find_optimal_alpha(*models, ["a text"])
    with pytest.raises(DataError, match="no text of at least two tokens"):
        model_difference(*models, [torch.tensor([[5]])])
    with pytest.raises(RecipeError, match="Unknown legacy metric 'mse'"):
        find_optimal_alpha(*models, BATCHES, metric="mse", legacy=True)
    with pytest.raises(RecipeError, match="Unknown divergence 'jss'"):
        find_optimal_alpha(*models, BATCHES, metric="jss")
    base = models[0]
    with pytest.raises(CheckpointError, match="same attention weights"):
        find_optimal_alpha(base, copy.deepcopy(base), BATCHES)
    louder = copy.deepcopy(base)
    with torch.no_grad():
        louder.model.layers[2].self_attn.v_proj.weight.mul_(2)  # after the last attention
    with pytest.raises(CheckpointError, match="same attention on these texts"):
        find_optimal_alpha(base, louder, BATCHES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_alpha": 1.2}, "initial_alpha must be from 0 to 1, but got 1.2"),
        ({"learning_rate": 0}, "learning_rate must be above 0, but got 0"),
        ({"steps": 0}, "steps must be 1 or more, but got 0"),
        ({"rho": -1}, "rho must be 0 or more, but got -1"),
        ({"rho": math.nan}, "rho must be a finite number, but got nan"),
        ({"legacy": True, "rho": 0.5}, "The script's objective has one side and no weights"),
        ({"legacy": True, "domain_loader": BATCHES}, "The script's objective has one side and no weights"),
        ({"heads": {0: torch.ones(4)}}, "Layer 1 needs weights for its 4 heads"),
        ({"heads": dict.fromkeys(range(3), torch.ones(3))}, "Layer 0 needs weights for its 4 heads"),
        ({"heads": dict.fromkeys(range(3), torch.zeros(4))}, "not all of them zero everywhere"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_sentence(models, options, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        find_optimal_alpha(*models, BATCHES, **options)


IDS = torch.arange(3, 9)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IDS, r"input_ids must be (B, T), of the shape of its input_ids, but is (6,)"),
        (torch.rand(2, 5), "input_ids must be whole numbers from 0 to 60"),
        (torch.tensor([[3, 999]]), "but they span 3 to 999; use the tokenizer of these models"),
        ({"input_ids": IDS[None], "attention_mask": torch.ones(1, 5)}, "attention_mask must be (B, T)"),
        ({"input_ids": IDS[None], "attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask must be (B, T)"),
        ({"input_ids": [[3, 4, 5]]}, "make it yield dicts with a tensor input_ids"),
    ],
)
def test_a_batch_that_no_model_can_read_is_one_sentence(models, batch, message):
    with pytest.raises(DataError, match=re.escape(message)):
        model_difference(*models, [batch])


@pytest.mark.parametrize("single", [BATCHES[1], BATCHES[1]["input_ids"]], ids=["dict", "tensor"])
def test_a_single_batch_is_a_loader_too(models, single):
    expected = model_difference(*models, BATCHES[1:]).by_layer["js"]
    np.testing.assert_array_equal(model_difference(*models, single).by_layer["js"], expected)
    absent = {"input_ids": BATCHES[1]["input_ids"], "attention_mask": None}
    np.testing.assert_array_equal(
        model_difference(*models, (absent for _ in range(1))).by_layer["js"], expected
    )


def test_packed_texts_count_as_texts_of_their_own(models):
    texts = [torch.arange(3, 9)[None], torch.arange(20, 25)[None]]
    packed = {"input_ids": torch.cat(texts, 1), "position_ids": torch.tensor([[*range(6), *range(5)]])}
    apart, together = (model_difference(*models, loader).by_head for loader in (texts, [packed]))
    for metric in DIVERGENCES:
        np.testing.assert_allclose(together[metric], apart[metric], rtol=1e-4, atol=1e-7)
    alphas = [find_optimal_alpha(*models, loader).alpha for loader in (texts, [packed])]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-4)


def test_weights_that_are_not_finite_are_one_sentence(models):
    base, broken = models[0], copy.deepcopy(models[1])
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="attention of layer 1 is not finite"):
        model_difference(base, broken, BATCHES)
    with pytest.raises(CheckpointError, match="attention of these models on these texts is not finite"):
        find_optimal_alpha(base, broken, BATCHES)
    with pytest.raises(CheckpointError, match="average is not finite"):
        merge_models(base, broken)


@settings(deadline=None, max_examples=200)
@given(st.floats(0.02, 0.98), st.floats(0, 1), st.floats(-3, 3), st.floats(1e-3, 0.2))
def test_the_descent_ends_at_the_minimum_of_a_parabola_of_any_scale(optimum, start, scale, first):
    from arma_mergekit.averaging import _descend
    from arma_mergekit.roles import Role
    from arma_mergekit.space import make_space

    space = make_space({"t": Role(0, "q", True)}, "global", "base", (0, 1))

    def evaluate(alphas):
        return 10**scale * (alphas - optimum) ** 2, 2 * 10**scale * (alphas - optimum)

    points, parts, converged = _descend(evaluate, space, start, first, 60)
    assert converged
    assert points[parts.sum(1).argmin(), 0] == pytest.approx(optimum, abs=0.005)


# --- model_difference


@torch.no_grad()
def test_every_metric_by_layer_is_that_of_eager_attention(models):
    found = model_difference(*models, BATCHES)
    assert list(found.by_layer) == [*DIVERGENCES, *LEGACY]
    for metric in DIVERGENCES:
        expected = divergence_by_head(*models, BATCHES, metric).values
        np.testing.assert_allclose(found.by_head[metric], expected, rtol=1e-5)
        np.testing.assert_allclose(found.by_layer[metric], expected.mean(1), rtol=1e-5)
    eager = [[eager_attentions(model, batch) for model in models] for batch in BATCHES]
    for metric, distance in LEGACY.items():
        expected = [[float(distance(a, m)) for a, m in zip(*both, strict=True)] for both in eager]
        np.testing.assert_allclose(found.by_layer[metric], np.mean(expected, 0), rtol=1e-3)


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_without_softmax_attention_are_reported(family):
    config, layers, skipped = HYBRIDS[family]
    found = model_difference(build(config), build(config, seed=1), BATCHES[1:])
    assert (found.layers, found.skipped) == (layers, skipped)
    assert all(values.shape == (len(layers),) and (values > 0).all() for values in found.by_layer.values())


def test_a_difference_prints_as_a_table(models):
    lines = str(model_difference(*models, BATCHES)).splitlines()
    assert lines[0].split() == ["layer", *DIVERGENCES, *LEGACY]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2"]
    assert all(math.isfinite(float(cell)) for line in lines[1:] for cell in line.split())


# --- as a user has it


def test_the_package_hands_out_the_functions_and_nothing_else():
    assert {"merge_models", "find_optimal_alpha", "model_difference"} <= set(arma_mergekit.__all__)
    assert all(getattr(arma_mergekit, name) for name in arma_mergekit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'merge_model'"):
        arma_mergekit.merge_model  # noqa: B018


def test_the_lines_in_the_docs_are_those_of_the_example():
    docs = Path(__file__).parent.parent / "docs"
    block = (docs / "attention.md").read_text().split("```py\n")[1].split("```")[0]
    example = (docs / "examples" / "average.py").read_text()
    assert all(line.strip() in example for line in block.splitlines())


def test_the_example_of_the_docs_runs(tmp_path, capsys):
    toy.write_data(tmp_path)
    for seed, name in enumerate(("base", "finetuned")):
        write_tiny_llama(tmp_path / name, seed, dtype="float32")
    toy.make_tokenizer().save_pretrained(tmp_path / "base")
    file = Path(__file__).parent.parent / "docs" / "examples" / "average.py"
    spec = importlib.util.spec_from_file_location("average", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(*(str(tmp_path / name) for name in ("base", "finetuned", "general.jsonl", "merged")))
    printed = capsys.readouterr().out
    assert printed.startswith("layer")
    alpha = float(printed.split("alpha ")[1].split()[0])
    assert 0 <= alpha <= 1
    ends = [
        weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n))
        for n in ("base", "finetuned")
    ]
    merged = weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.lerp(ends[0][name], ends[1][name], alpha)
    torch.testing.assert_close(
        merged[name], expected, atol=1e-3, rtol=0
    )  # alpha is printed with three digits
    assert torch.equal(merged["model.norm.weight"], ends[0]["model.norm.weight"])
