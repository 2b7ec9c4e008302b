import json

import numpy as np
import pytest
import torch
import toy
import transformers

from arma_mergekit.errors import DataError
from arma_mergekit.evals import tasks
from arma_mergekit.evals.base import Measured, held_back, parts
from arma_mergekit.evals.rows import BATCH_TOKENS, continuation, read_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(toy.ALPHABET), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def data(tmp_path):
    toy.write_data(tmp_path)
    return tmp_path


def reference_nll(model, tokens, start):
    """Negative log-likelihood of tokens[start:], one sequence alone, by transformers' own loss."""
    ids = torch.tensor([tokens])
    labels = ids.clone()
    labels[0, :start] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * (len(tokens) - start)


def test_nll_of_texts_equals_transformers_own_loss(model, tokenizer, data):
    task = tasks.NllTask("nll", tasks.text_items(tokenizer, data / "general.jsonl"))
    found = task.measure(model, range(len(task.ids)))
    expected = [reference_nll(model, item.rows[0].tokens, 1) for item in task.items]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4)
    assert found.mean_loss == pytest.approx(
        sum(expected) / sum(len(i.rows[0].tokens) - 1 for i in task.items)
    )
    assert found.score == -found.mean_loss


def test_nll_of_answers_scores_the_answer_only(model, tokenizer, data):
    task = tasks.NllTask("nll", tasks.answer_items(tokenizer, data / "sums.jsonl", limit=7))
    found = task.measure(model, range(7))
    assert set(found.weight) == {3.0}  # space, digit, full stop
    expected = [reference_nll(model, i.rows[0].tokens, len(i.rows[0].tokens) - 3) for i in task.items]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4)


def test_scores_do_not_depend_on_what_shares_the_batch(model, tokenizer, data):
    task = tasks.NllTask("nll", tasks.answer_items(tokenizer, data / "sums.jsonl"))
    together = task.measure(model, range(len(task.ids)))
    alone = [task.measure(model, [i]).mean_loss for i in range(5)]
    np.testing.assert_allclose(together.loss[:5] / together.weight[:5], alone, rtol=1e-5)


def test_batches_hold_every_item_once_within_the_limit(tokenizer, data):
    task = tasks.ChoiceTask("c", tasks.choice_items(tokenizer, data / "choices.jsonl"))
    batches = list(task._batches(range(len(task.ids))))
    assert sorted(i for b in batches for i in b) == list(range(len(task.ids)))
    for batch in batches:
        rows = [row for i in batch for row in task.items[i].rows]
        assert len(rows) * max(len(r.tokens) for r in rows) <= BATCH_TOKENS


def test_kl_is_zero_for_the_base_itself_and_equals_the_definition_elsewhere(model, tokenizer, data):
    task = tasks.KlTask("kl", tasks.text_items(tokenizer, data / "general.jsonl"))
    task.prepare(model)
    assert task.measure(model, range(len(task.ids))).mean_loss == pytest.approx(0, abs=1e-6)
    torch.manual_seed(1)
    other = transformers.LlamaForCausalLM(model.config).eval()
    found = task.measure(other, [3])
    ids = torch.tensor([task.items[3].rows[0].tokens])
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
    assert found.loss[0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_a_choice_is_right_when_its_likelihood_per_token_is_highest(model, tokenizer, tmp_path):
    toy.write_jsonl(
        tmp_path / "c.jsonl",
        [{"prompt": "a", "choices": [" bc", " d", " efgh"], "answer": k} for k in range(3)],
    )
    task = tasks.ChoiceTask("c", tasks.choice_items(tokenizer, tmp_path / "c.jsonl"))
    each = [reference_nll(model, r.tokens, 1) / len(r.targets) for r in task.items[0].rows]
    found = task.measure(model, range(3))
    assert list(found.value) == [float(k == int(np.argmin(each))) for k in range(3)]
    scores = -np.array(each) * np.mean([3, 2, 5])
    np.testing.assert_allclose(found.loss, np.log(np.exp(scores).sum()) - scores, rtol=1e-4)


def test_generate_agrees_with_greedy_generation(tokenizer, model, tmp_path):
    prompts = ["ab", "q", "12+3", "lake moon", "xyz"]
    said = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        said.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    greedy = ["".join(tokenizer.convert_ids_to_tokens(s[0, -3:].tolist())) for s in said]
    wrong = ["?" + g[1:] if g[0] != "?" else "!" for g in greedy]
    late = [g[:2] + ("a" if g[2] != "a" else "b") for g in greedy]
    records = [
        {"prompt": p, "answer": a}
        for answers in (greedy, wrong, late)
        for p, a in zip(prompts, answers, strict=True)
    ]
    toy.write_jsonl(tmp_path / "g.jsonl", records)
    items = tasks.answer_items(tokenizer, tmp_path / "g.jsonl")
    whole = tasks.GenerateTask("g", items, [tasks.needed_tokens(tokenizer, i, None) for i in items])
    assert list(whole.measure(model, range(15)).value) == [1.0] * 5 + [0.0] * 10
    first_two = tasks.GenerateTask("g", items, [2] * len(items))
    assert list(first_two.measure(model, range(15)).value) == [1.0] * 5 + [0.0] * 5 + [1.0] * 5


def test_backward_receives_parts_that_add_up_to_the_mean_loss(model, tokenizer, data):
    task = tasks.NllTask("nll", tasks.text_items(tokenizer, data / "general.jsonl"))
    received = []
    found = task.measure(
        model, range(len(task.ids)), backward=lambda loss: received.append(float(loss.detach()))
    )
    assert sum(received) == pytest.approx(found.mean_loss, rel=1e-5)


def test_standard_error_matches_repeated_sampling():
    rng = np.random.default_rng(0)

    def draw():
        weight = rng.integers(1, 20, 60).astype(float)
        loss = weight * rng.normal(3, 0.5, 60)
        return Measured(tuple(map(str, range(60))), loss, -loss, weight, 0)

    samples = [draw() for _ in range(3000)]
    spread = np.std([s.mean_loss for s in samples])
    assert np.mean([s.loss_stderr for s in samples]) == pytest.approx(spread, rel=0.05)


def test_an_item_stays_on_its_side_whatever_else_is_in_the_file():
    ids = [f"item-{i}" for i in range(200)]
    search, kept = held_back(ids, 0.5)
    assert 70 < len(kept) < 130
    few_search, _ = held_back(ids[50:120], 0.5)
    assert [ids[50:120][i] for i in few_search] == [ids[i] for i in search if 50 <= i < 120]
    assert set(held_back(ids, 0.3)[1]) < set(kept)


def test_parts_share_out_every_item_evenly():
    ids = [f"item-{i}" for i in range(50)]
    cut = parts(ids, range(10, 47), 8)
    assert sorted(i for part in cut for i in part) == list(range(10, 47))
    assert {len(part) for part in cut} == {4, 5}


def test_answer_begins_where_the_prompt_ends(tokenizer):
    row = continuation(tokenizer, "1+2=?", " 3.")
    assert tokenizer.convert_ids_to_tokens(list(row.targets)) == [" ", "3", "."]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], "line 1: needs text, but text is missing"),
        (["[1]"], "line 1: needs text"),
        (['{"text": "a"', ""], "line 1: not JSON"),
        ([""], "has no records"),
        (['{"text": "a", "id": "x"}', '{"text": "b", "id": "x"}'], "'x' occurs more than once"),
    ],
)
def test_broken_data_is_refused_naming_file_and_line(tmp_path, lines, message):
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"d\.jsonl") as error:
        read_jsonl(tmp_path / "d.jsonl", ["text"])
    assert message in str(error.value)


def test_missing_and_binary_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="Cannot read"):
        read_jsonl(tmp_path / "absent.jsonl", [])
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="Cannot read"):
        read_jsonl(tmp_path / "b.jsonl", [])


def test_texts_of_which_nothing_fits_are_refused(tokenizer, data):
    with pytest.raises(DataError, match="max_tokens 1"):
        tasks.text_items(tokenizer, data / "general.jsonl", max_tokens=1)


def test_an_answer_that_indexes_no_choice_is_refused(tokenizer, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b"], "answer": 1}))
    with pytest.raises(DataError, match="must index choices"):
        tasks.choice_items(tokenizer, tmp_path / "c.jsonl")


def test_losses_that_are_not_finite_are_refused_naming_the_item(model, tokenizer, data):
    broken = transformers.LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    task = tasks.NllTask("nll", tasks.text_items(tokenizer, data / "general.jsonl"))
    with pytest.raises(DataError, match=r"item g\d+ .* is not finite"):
        task.measure(broken, [0, 1])
