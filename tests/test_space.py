import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.errors import RecipeError
from arma_mergekit.roles import role
from arma_mergekit.space import fixed_alpha, make_space

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{m}.weight"
        for i in range(LAYERS)
        for m in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
    "model.norm.weight",
]
ROLES = {name: role(name) for name in NAMES}
WORDS = ["global", "kind", "block:2", "block:3", "kernel", "layer", "tensor", "layer:qkvo"]


@pytest.mark.parametrize(
    ("groups", "rest", "size"),
    [
        ("everything", "finetuned", 1),
        ("global", "finetuned", 1),
        ("global", "global", 2),
        ("kind", "kind", 9),  # q k v o, gate up down, norms, embeddings
        ("block:2", "base", 2),
        ("block:3", 0.4, 2),
        ("layer", "finetuned", LAYERS),
        ("layer", "layer", 2 * LAYERS + 1),  # and one for what is outside the layers
        ("layer:qkvo", "finetuned", 4 * LAYERS),
        ("tensor", "tensor", 4 * LAYERS + 4 * LAYERS + 1),  # a layer's norms share one, so does the outside
        ("kernel", "finetuned", 4),
        ("kernel", "kernel", 9),
    ],
)
def test_a_space_has_as_many_values_as_its_words_say(groups, rest, size):
    space = make_space(ROLES, groups, rest)
    assert len(space.names) == len(set(space.names)) == len(space.low) == size


@pytest.mark.parametrize(("rest", "alpha"), [("base", 0.0), ("finetuned", 1.0), (0.4, 0.4)])
def test_a_fixed_rest_is_not_searched_and_keeps_its_alpha(rest, alpha):
    space = make_space(ROLES, "global", rest)
    alphas = dict(zip(space.tensors, space.alphas([0.3]), strict=True))
    assert {a for t, a in alphas.items() if ROLES[t].attention} == {0.3}
    assert {a for t, a in alphas.items() if not ROLES[t].attention} == {alpha}
    assert fixed_alpha(rest) == alpha


@pytest.mark.parametrize("word", WORDS)
def test_a_constant_point_gives_every_searched_tensor_that_alpha(word):
    space = make_space(ROLES, word, "finetuned", (0, 1))
    alphas = space.alphas(space.constant_point(0.7))
    searched = np.array([ROLES[t].attention for t in space.tensors])
    np.testing.assert_allclose(alphas[searched], 0.7)
    np.testing.assert_allclose(alphas[~searched], 1.0)


@given(st.sampled_from(WORDS), st.sampled_from([*WORDS, "base"]), st.integers(0, 2**32 - 1))
def test_pullback_is_the_gradient_of_the_alphas(groups, rest, seed):
    space = make_space(ROLES, groups, rest, (-1.0, 2.5))
    rng = np.random.default_rng(seed)
    values, slope = rng.uniform(space.low, space.high), rng.normal(size=len(space.tensors))
    step = 1e-6
    numeric = [
        (slope @ space.alphas(values + step * e) - slope @ space.alphas(values - step * e)) / (2 * step)
        for e in np.eye(len(values))
    ]
    np.testing.assert_allclose(space.pullback(values, slope), numeric, rtol=1e-4, atol=1e-5)


def test_members_partition_the_searched_tensors():
    members = make_space(ROLES, "layer", "kind").members()
    listed = [t for tensors in members.values() for t in tensors]
    assert sorted(listed) == sorted(NAMES)


def test_a_profile_peaks_where_it_says():
    space = make_space(ROLES, "kernel", "base")
    values = dict(zip(space.names, space.low, strict=True)) | {
        "attention.peak": 1.0, "attention.position": 1.0, "attention.floor": 0.0, "attention.width": 0.1,
    }  # fmt: skip
    alphas = dict(zip(space.tensors, space.alphas([values[n] for n in space.names]), strict=True))
    assert alphas["model.layers.3.self_attn.q_proj.weight"] == 1.0
    assert alphas["model.layers.0.self_attn.q_proj.weight"] < 1e-6


@pytest.mark.parametrize("word", ["layr", "block:0", "block:x", "layer:xyz"])
def test_an_unknown_word_is_refused(word):
    with pytest.raises(RecipeError):
        make_space(ROLES, word, "base")


def test_a_space_with_nothing_to_search_is_refused():
    with pytest.raises(RecipeError, match="empty"):
        make_space(ROLES, 0.3, "base")


def test_a_point_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="has 1 values"):
        make_space(ROLES, "global", "base").alphas([0.1, 0.2])


def test_one_number_freezes_a_group_and_a_pair_bounds_it():
    space = make_space(
        ROLES, "kind", "kind", (-1.0, 2.5), limits={"attention.*": (0.0, 1.0), "attention.q": (0.5, 0.5)}
    )
    bounds = {name: (low, high) for name, low, high in zip(space.names, space.low, space.high, strict=True)}
    assert bounds["attention.q"] == (0.5, 0.5)
    assert bounds["attention.k"] == (0.0, 1.0)
    assert bounds["rest.up"] == (-1.0, 2.5)


def test_tied_groups_share_one_value_and_their_gradients_add_up():
    apart = make_space(ROLES, "kind", "finetuned")
    tied = make_space(ROLES, "kind", "finetuned", tie=[["attention.q", "attention.k"]])
    assert set(apart.names) - set(tied.names) in ({"attention.q"}, {"attention.k"})
    point = np.full(len(tied.names), 0.3)
    assert np.allclose(tied.alphas(point), apart.alphas(np.full(len(apart.names), 0.3)))
    slopes = np.arange(len(apart.tensors), dtype=float)
    whole = dict(zip(apart.names, apart.pullback(np.full(len(apart.names), 0.3), slopes), strict=True))
    together = dict(zip(tied.names, tied.pullback(point, slopes), strict=True))
    (name,) = {"attention.q", "attention.k"} & set(tied.names)
    assert together[name] == pytest.approx(whole["attention.q"] + whole["attention.k"])


def test_a_profile_stays_whole_when_groups_before_it_are_tied():
    space = make_space(ROLES, "kernel", "kind", tie=[["rest.up", "rest.down"]])
    point = space.constant_point(0.4)
    assert np.allclose(space.alphas(point), 0.4)
    with pytest.raises(RecipeError, match="`kernel` profile cannot be tied"):
        make_space(ROLES, "kernel", "kind", tie=[["attention.peak", "attention.floor"]])


def test_an_unknown_group_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"Did you mean attention\.q"):
        make_space(ROLES, "kind", "kind", limits={"atention.q": (0.0, 0.0)})
