import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_live import FAMILIES, TINY, build, make_live
from torch.overrides import TorchFunctionMode

from arma_mergekit.evals import forward
from arma_mergekit.evals.forward import CausalLM, batches, by_chunk, cost
from arma_mergekit.evals.rows import Item, Row
from arma_mergekit.evals.tasks import ChoiceTask, KlTask, NllTask

SMALL = TINY | {"intermediate_size": 48, "num_key_value_heads": 2}
APART = (
    FAMILIES
    | {  # heads with scaling, capping or a bias; positions by ALiBi; a window shorter than the rows
        "cohere": transformers.CohereConfig(**SMALL, logit_scale=0.3),
        "granite": transformers.GraniteConfig(**SMALL, logits_scaling=7.0),
        "gemma2, window": transformers.Gemma2Config(
            **SMALL, head_dim=8, sliding_window=6, final_logit_softcapping=2.0
        ),
        "phi": transformers.PhiConfig(**TINY, intermediate_size=48),
        "falcon, alibi": transformers.FalconConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
        "bloom": transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
    }
)
NO_CACHE = {
    "mamba": transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
    "lfm2": transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "opt": transformers.OPTConfig(  # its forward bypasses the body, so it does not come apart
        vocab_size=61, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16
    ),
}  # fmt: skip
PROMPTS = [[5, 9, 2, 30, 41, 7, 7, 18, 3], [11, 3, 3, 60, 2, 9, 1, 4, 4, 8, 52, 20]]
ITEMS = [[Row((*p, *c), len(p)) for c in ([4, 6], [4, 1, 9, 2], [33])] for p in PROMPTS]


def alone(model, row):
    """Logits (targets, V) of a row that passes by itself through the whole model."""
    return model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, row.start - 1 : -1]


def gradients(model, logits):
    model.zero_grad()
    logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", [*APART, *NO_CACHE])
def test_shared_prompts_and_heads_apart_give_the_logits_and_gradients_of_rows_alone(family):
    model = build((APART | NO_CACHE)[family], 0)
    lm = CausalLM(model)
    assert lm.caches == (family in APART)
    ((batch, shared),) = batches(dict(enumerate(ITEMS)), 90, lm.caches)
    h, tokens = lm.hidden([ITEMS[i] for i in batch], shared)
    expected = torch.cat([alone(model, row) for rows in ITEMS for row in rows])
    torch.testing.assert_close(lm.head(h), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, lm.head(h)), gradients(model, expected), rtol=1e-4, atol=1e-6)
    # shared: 8 of 9 and of 12 prompt tokens once, then at most 7; else six rows of 15 that see all but their last token
    assert tokens == (2 * 8 + 6 * 7 if lm.caches else 6 * 15)


@pytest.mark.parametrize("family", ["llama", "gemma2, window", "bloom", *NO_CACHE])
def test_greedy_says_what_argmax_over_whole_sequences_says(family):
    model = build((APART | NO_CACHE)[family], 0)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    found, spent = CausalLM(model).greedy(PROMPTS, 5, set())
    assert found == expected
    # the longer prompt catches up in 3 steps, and the last token said is never fed
    assert spent == (2 * (9 + 3 + 4) if family in APART else 2 * sum(range(9, 17)))
    stop = expected[0][2]
    stopped, _ = CausalLM(model).greedy(PROMPTS, 5, {stop})
    assert stopped == [said[: said.index(stop)] if stop in said else said for said in expected]


def test_a_row_that_sees_what_another_sees_passes_once():
    letters = [[Row((*PROMPTS[0], letter), 9) for letter in (4, 5, 6, 7)]]
    model = build(FAMILIES["llama"], 0)
    ((_, shared),) = batches(dict(enumerate(letters)), 90)
    assert shared == 0  # nothing to save
    h, tokens = CausalLM(model).hidden(letters, shared)
    assert tokens == 9
    torch.testing.assert_close(CausalLM(model).head(h), torch.cat([alone(model, r) for r in letters[0]]))


def test_a_patched_model_is_whole_again_after_its_head_ran():
    model = build(FAMILIES["llama"], 0)
    before = model.model.forward
    CausalLM(model).head(torch.zeros(3, 32))
    assert "forward" not in vars(model.model)
    model.model.forward = before  # as accelerate's hooks do
    CausalLM(model).head(torch.zeros(3, 32))
    assert model.model.forward is before


@pytest.mark.parametrize("family", ["llama, tied", "llama", "phi", "cohere"])
def test_the_bases_head_stays_the_bases_also_while_gradients_are_taken(family):
    live, _, _ = make_live(APART[family])
    lm, h = CausalLM(live), torch.randn(7, 32)
    expected, head = lm.head(h), lm.base_head()
    live.set(np.linspace(-0.3, 1.4, len(live.tensors)))
    assert torch.equal(head(h), expected)
    assert not torch.equal(lm.head(h), expected)
    with live.differentiable():
        assert torch.equal(head(h), expected)
        assert not head(h).requires_grad


@pytest.mark.parametrize("kind", [NllTask, KlTask, ChoiceTask])
@pytest.mark.parametrize("family", ["llama, tied", "phi", "gemma2"])
def test_chunks_of_logits_give_the_loss_and_the_alpha_gradients_of_the_whole(monkeypatch, kind, family):
    live, _, _ = make_live(APART[family])
    items = [Item(str(k), tuple(rows) if kind is ChoiceTask else (rows[1],)) for k, rows in enumerate(ITEMS)]
    task = kind("t", items)
    task.prepare(live)
    live.set(np.linspace(-0.3, 1.4, len(live.tensors)))
    found = []
    for size in (1 << 22, 61):  # all positions at once, and one by one
        monkeypatch.setattr(forward, "CHUNK_LOGITS", size)
        with live.differentiable() as gradient:
            loss = task.measure(live, [0, 1], lambda part: part.backward()).mean_loss
            found.append((loss, gradient()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    step = 1e-3 * found[0][1] / np.linalg.norm(found[0][1])
    here, losses = live.alphas, []
    for sign in (1, -1):
        live.set(here + sign * step)
        losses.append(task.measure(live, [0, 1]).mean_loss)
    assert losses[0] - losses[1] == pytest.approx(2 * found[0][1] @ step, rel=0.05)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 5 * 61)
    seen = []

    def loss(h):
        seen.append(len(h))
        return h.square().sum(-1)

    h = torch.randn(23, 4, requires_grad=True)
    by_chunk(loss, 61, h).sum().backward()
    assert seen == [5, 5, 5, 5, 3, *seen[5:]]
    assert sorted(seen[5:]) == [3, 5, 5, 5, 5]  # once more each, in the backward pass
    torch.testing.assert_close(h.grad, 2 * h.detach())


def test_the_base_has_divergence_zero_from_itself():
    live, _, _ = make_live(FAMILIES["llama"], torch.bfloat16)
    task = KlTask("kl", [Item(str(k), (rows[1],)) for k, rows in enumerate(ITEMS)])
    task.prepare(live)
    assert list(task.measure(live, [0, 1]).loss) == [0.0, 0.0]


class Spy(TorchFunctionMode):
    """Dtypes that attention is computed in."""

    def __init__(self):
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "falcon, alibi"])
def test_attention_in_16_bits_is_computed_in_float32_on_a_cpu(family):
    model = build(APART[family], 0, torch.bfloat16)
    lm = CausalLM(model)
    with Spy() as spy:
        h, _ = lm.hidden(ITEMS, 8)
    assert spy.seen == {torch.float32}
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(
        h.float(), CausalLM(copy.deepcopy(model).float()).hidden(ITEMS, 8)[0], rtol=0.1, atol=0.1
    )


rows_of_an_item = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=9).flatmap(
        lambda tokens: st.integers(1, len(tokens) - 1).map(lambda start: Row(tuple(tokens), start))
    ),
    min_size=1,
    max_size=4,
).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows_of_an_item, min_size=1, max_size=12), st.booleans(), st.integers(1, 60))
def test_batches_keep_to_the_limit_hold_every_item_once_and_share_only_what_is_equal(items, share, limit):
    found = list(batches(dict(enumerate(items)), limit, share))
    assert sorted(i for batch, _ in found for i in batch) == list(range(len(items)))
    for batch, shared in found:
        assert share or shared == 0
        assert len(batch) == 1 or cost([items[i] for i in batch], shared) <= limit
        for i in batch:
            assert len({row.tokens[:shared] for row in items[i]}) == 1
            assert all(row.places[0] >= shared for row in items[i])


def test_prompts_are_shared_where_that_saves_a_third_of_the_tokens():
    long, short = [[Row((*range(n), k), n) for k in (1, 2)] + [Row((*range(n), 1, 2), n)] for n in (20, 3)]
    assert [shared for _, shared in batches({0: long}, 512)] == [19]
    assert [shared for _, shared in batches({0: short}, 512)] == [0]
    assert [shared for _, shared in batches({0: long, 1: short}, 512)] == [2]
    assert [shared for _, shared in batches({0: long[:1]}, 512)] == [0]  # a single row


def test_a_model_without_a_cache_is_scored_as_one_with():
    live, _, _ = make_live(FAMILIES["llama"])
    task = ChoiceTask("c", [Item(str(k), tuple(rows), 1) for k, rows in enumerate(ITEMS)])
    shared = task.measure(live, [0, 1])
    known = forward._known[live.model]
    forward._known[live.model] = replace(known, caches=False)
    plain = task.measure(live, [0, 1])
    np.testing.assert_allclose(shared.loss, plain.loss, rtol=1e-5)
    assert shared.tokens < plain.tokens
