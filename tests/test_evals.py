import json

import numpy as np
import pytest
import torch
import toy
import transformers
from tokenizers import Tokenizer, models

from arma_mergekit.errors import DataError
from arma_mergekit.evals import make_suites, tasks
from arma_mergekit.evals.base import Measured, held_back, parts
from arma_mergekit.evals.forward import batches, cost
from arma_mergekit.evals.rows import BATCH_TOKENS, Limits, continuation
from arma_mergekit.evals.sources import read_records
from arma_mergekit.recipe import Recipe


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
    rows = {i: item.rows for i, item in enumerate(task.items)}
    for share in (False, True):
        found = list(batches(rows, BATCH_TOKENS, share))
        assert sorted(i for batch, _ in found for i in batch) == sorted(rows)
        for batch, shared in found:
            assert cost([rows[i] for i in batch], shared) <= BATCH_TOKENS


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


def spoken(model, tokenizer, prompt, length):
    """What transformers' own greedy generation says."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return "".join(tokenizer.convert_ids_to_tokens(said[0, ids.shape[1] :].tolist()))


def regex_task(tokenizer, path, records, **options):
    toy.write_jsonl(path, records)
    items = tasks.answer_items(tokenizer, path)
    return tasks.GenerateTask("g", items, [1] * len(items), tokenizer=tokenizer, **options)


class Spaceless:
    """The tokenizer, decoding without spaces between tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.eos_token_id = None

    def __call__(self, *args, **options):
        return self.tokenizer(*args, **options)

    def decode(self, ids, **options):
        return "".join(self.tokenizer.convert_ids_to_tokens(list(ids)))


def test_a_regex_looks_for_the_answer_in_what_greedy_generation_says(tokenizer, model, tmp_path):
    tokenizer = Spaceless(tokenizer)
    prompts = ["ab", "q", "12+3", "lake moon", "xyz"]
    said = [spoken(model, tokenizer.tokenizer, p, 6) for p in prompts]
    late = [s[3:6] for s in said]  # said, but only after something else
    records = [
        {"prompt": p, "answer": a}
        for answers in (late, [a + "?" for a in late])
        for p, a in zip(prompts, answers, strict=True)
    ]
    task = regex_task(tokenizer, tmp_path / "g.jsonl", records, regex="^.{3}(.{3})", max_new_tokens=6)
    expected = [
        float(record["answer"].strip() == a.strip()) for record, a in zip(records, late * 2, strict=True)
    ]
    found = task.measure(model, range(10))
    assert list(found.value) == expected == [1.0] * 5 + [0.0] * 5
    short = regex_task(tokenizer, tmp_path / "g.jsonl", records, regex="^.{3}(.{3})", max_new_tokens=5)
    assert set(short.measure(model, range(10)).value) == {0.0}  # too short to hold it
    plain = tasks.GenerateTask("g", task.items, [1] * 10).measure(model, range(10))
    np.testing.assert_array_equal(found.loss, plain.loss)
    assert found.tokens > plain.tokens


def test_without_groups_a_regex_stands_for_its_whole_match_and_space_around_it_does_not_count(
    tokenizer, model, tmp_path
):
    said = spoken(model, tokenizer, "ab", 4)
    records = [{"prompt": "ab", "answer": f" {said[:2]} "}, {"prompt": "ab", "answer": f"{said[:2]}?"}]
    task = regex_task(Spaceless(tokenizer), tmp_path / "g.jsonl", records, regex="..", max_new_tokens=4)
    assert list(task.measure(model, [0, 1]).value) == [1.0, 0.0]


def test_a_group_that_matched_nothing_is_no_answer(tokenizer, model, tmp_path):
    task = regex_task(
        Spaceless(tokenizer), tmp_path / "g.jsonl", [{"prompt": "ab", "answer": "c"}], regex="(#)?"
    )
    assert list(task.measure(model, [0]).value) == [0.0]


def test_decoding_in_several_batches_says_the_same(monkeypatch, tokenizer, model, tmp_path):
    records = [{"prompt": "ab" * k, "answer": "c"} for k in range(1, 8)]
    task = regex_task(Spaceless(tokenizer), tmp_path / "g.jsonl", records, regex="(.*)", max_new_tokens=5)
    together, _ = task._decode(model, range(7))
    monkeypatch.setattr(tasks, "DECODE_TOKENS", 40)
    apart, _ = task._decode(model, range(7))
    assert apart == together


def test_a_prompt_must_leave_room_for_what_is_decoded(tokenizer, tmp_path):
    file = one_record(tmp_path / "d.jsonl", prompt="a" * 9, answer="b")
    assert tasks.answer_items(tokenizer, file, limits=Limits(positions=20), new_tokens=11)
    with pytest.raises(
        DataError, match=r"id row: has 9 tokens and max_new_tokens 12, but the model takes 20"
    ):
        tasks.answer_items(tokenizer, file, limits=Limits(positions=20), new_tokens=12)


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
        (["[1]"], "line 1: must be an object with text, but got [1]"),
        (["", '"text"'], "line 2: must be an object"),
        (["null"], "line 1: must be an object"),
        (["[" * 100_000], "line 1: not JSON"),
        ([r'{"text": "\ud800"}'], "line 1: not JSON"),
        (['{"text": "a", "id": 1.5}'], "line 1: id must be text or a whole number, but got 1.5"),
        (['{"text": "a", "id": true}'], "line 1: id must be text or a whole number, but got True"),
        (['{"text": "a", "id": ["x"]}'], "line 1: id must be text or a whole number"),
        (['{"text": "a"', ""], "line 1: not JSON"),
        ([""], "has no records"),
        (['{"text": "a", "id": "x"}', '{"text": "b", "id": "x"}'], "'x' occurs more than once"),
    ],
)
def test_broken_data_is_refused_naming_file_and_line(tmp_path, lines, message):
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"d\.jsonl") as error:
        read_records(tmp_path / "d.jsonl", ["text"])
    assert message in str(error.value)


def test_missing_and_binary_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="Cannot read"):
        read_records(tmp_path / "absent.jsonl", [])
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="Cannot read"):
        read_records(tmp_path / "b.jsonl", [])


def test_texts_of_which_nothing_fits_are_refused(tokenizer, data):
    with pytest.raises(DataError, match="max_tokens 1"):
        tasks.text_items(tokenizer, data / "general.jsonl", max_tokens=1)


def test_an_answer_that_indexes_no_choice_is_refused(tokenizer, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 2}))
    with pytest.raises(DataError, match="must index choices"):
        tasks.choice_items(tokenizer, tmp_path / "c.jsonl")


def test_losses_that_are_not_finite_are_refused_naming_the_item(model, tokenizer, data):
    broken = transformers.LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    task = tasks.NllTask("nll", tasks.text_items(tokenizer, data / "general.jsonl"))
    with pytest.raises(DataError, match=r"item g\d+ .* is not finite"):
        task.measure(broken, [0, 1])


# ---- records ----


def one_record(path, **record):
    toy.write_jsonl(path, [{"id": "row", **record}])
    return path


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": 5}, "answer must be text, but got 5"),
        ({"answer": None}, "answer must be text, but got None"),
        ({"answer": ""}, "answer is empty"),
        ({"prompt": None}, "prompt must be text, but got None"),
        ({"prompt": ""}, "leaves no token to predict"),
    ],
)
def test_a_question_that_is_not_text_is_refused_naming_file_and_id(tokenizer, tmp_path, record, message):
    file = one_record(tmp_path / "d.jsonl", **({"prompt": "a", "answer": "b"} | record))
    with pytest.raises(DataError, match=r"d\.jsonl, id row: .*; ") as error:
        tasks.answer_items(tokenizer, file)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": [1, 2]}, "choices must be two texts or more"),
        ({"choices": ["b"]}, "choices must be two texts or more"),
        ({"choices": ["b", ""]}, "choices must be two texts or more"),
        ({"choices": "bc"}, "choices must be two texts or more"),
        ({"answer": True}, "answer must index choices (0 to 1), but got True"),
        ({"answer": -1}, "answer must index choices"),
        ({"answer": "b"}, "answer must index choices"),
        ({"answer": None}, "answer must index choices"),
        ({"prompt": 3}, "prompt must be text, but got 3"),
    ],
)
def test_choices_that_cannot_be_chosen_from_are_refused_naming_file_and_id(
    tokenizer, tmp_path, record, message
):
    file = one_record(tmp_path / "d.jsonl", **({"prompt": "a", "choices": ["b", "c"], "answer": 0} | record))
    with pytest.raises(DataError, match=r"d\.jsonl, id row: .*; correct or remove") as error:
        tasks.choice_items(tokenizer, file)
    assert message in str(error.value)


def test_a_text_that_is_a_number_is_refused_naming_file_and_id(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"d\.jsonl, id row: text must be text, but got 3; "):
        tasks.text_items(tokenizer, one_record(tmp_path / "d.jsonl", text=3))


def test_a_line_separator_inside_a_string_does_not_end_the_record(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"text": "a\u2028b"}\r\n{"text": "c\x0cd"}'.replace("\x0c", "\x85"), "utf-8"
    )
    records = read_records(tmp_path / "d.jsonl", ["text"])
    assert [record.text("text") for record in records] == ["a\u2028b", "c\x85d"]


def test_an_id_may_be_absent_null_text_or_a_whole_number(tmp_path):
    toy.write_jsonl(tmp_path / "d.jsonl", [{}, {"id": None}, {"id": "x"}, {"id": 7}])
    assert [record.id for record in read_records(tmp_path / "d.jsonl", [])] == ["d-1", "d-2", "x", "7"]


# ---- limits of the model ----


def test_whole_texts_are_cut_to_the_positions_of_the_model(tokenizer, tmp_path):
    file = one_record(tmp_path / "d.jsonl", text="a" * 50)

    def length(**options):
        return len(tasks.text_items(tokenizer, file, **options)[0].rows[0].tokens)

    assert length() == 50
    assert length(max_length=30, limits=Limits(positions=40)) == 30
    assert length(max_length=45, limits=Limits(positions=40)) == 40


def test_questions_longer_than_the_model_are_refused_with_their_length(tokenizer, tmp_path):
    file = one_record(tmp_path / "d.jsonl", prompt="a" * 9, answer="bc")
    assert tasks.answer_items(tokenizer, file, limits=Limits(positions=11))
    with pytest.raises(DataError, match=r"d\.jsonl, id row: has 11 tokens, but the model takes 10; shorten"):
        tasks.answer_items(tokenizer, file, limits=Limits(positions=10))
    file = one_record(tmp_path / "c.jsonl", prompt="a" * 9, choices=["b", "bc"], answer=0)
    with pytest.raises(DataError, match=r"c\.jsonl, id row: has 11 tokens, but the model takes 10; shorten"):
        tasks.choice_items(tokenizer, file, limits=Limits(positions=10))


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    file = one_record(tmp_path / "d.jsonl", text="abc", prompt="abc", answer="d")
    assert tasks.text_items(tokenizer, file, limits=Limits(vocabulary=3))
    for make, size in ((tasks.text_items, 2), (tasks.answer_items, 3)):
        with pytest.raises(DataError, match=r"id row: token \d .* tokenizer does not belong to the model"):
            make(tokenizer, file, limits=Limits(vocabulary=size))


# ---- tokenizers without offsets ----


class Ignores:
    """A tokenizer that takes return_offsets_mapping and returns none."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, return_offsets_mapping=False, **options):
        return self.tokenizer(text, **options)


class Refuses(Ignores):
    """As tokenizers written in Python do."""

    def __call__(self, text, return_offsets_mapping=False, **options):
        if return_offsets_mapping:
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")
        return self.tokenizer(text, **options)


def merging():
    """A tokenizer in which "=?" is one token, so a boundary between the two is inside of it."""
    vocabulary = {c: i for i, c in enumerate(toy.ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"=?": len(vocabulary)}, [("=", "?")]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("without", [Ignores, Refuses])
def test_without_offsets_the_answer_begins_at_the_same_token(tokenizer, without):
    for made in (tokenizer, merging()):
        for prompt, answer in (("1+2=?", " 3."), ("1+2=", "? 3."), ("aa", "aa")):
            assert continuation(without(made), prompt, answer) == continuation(made, prompt, answer)
    assert continuation(without(merging()), "1=", "?").start == 1


# ---- from the recipe ----


@pytest.fixture
def suite(tokenizer, tmp_path):
    """The tasks of a suite with these entries."""

    def make(*entries, **limits):
        content = {"merge_method": "arma", "base_model": "b", "models": [{"model": "f"}]}
        recipe = Recipe.parse(content | {"evals": {"s": list(entries)}}, tmp_path / "recipe.yml")
        return make_suites(recipe, ["s"], tokenizer, **limits)["s"]

    return make


def targets(tokenizer, task):
    rows = [row for item in task.items for row in item.rows]
    return ["".join(tokenizer.convert_ids_to_tokens(list(row.targets))) for row in rows]


def test_fields_are_read_by_the_names_the_recipe_gives(suite, tokenizer, tmp_path):
    one_record(tmp_path / "d.jsonl", q="ab", a="cd", body="xyz", o=["c", "d"], right=1)
    names = {"data": "d.jsonl", "prompt": "q"}
    made = suite(
        {"generate": names | {"answer": "a"}},
        {"choice": names | {"choices": "o", "answer": "right", "weight": 2, "watch": True}},
        {"kl": {"data": "d.jsonl", "field": "body"}},
    )
    assert [targets(tokenizer, task) for task in made] == [["cd"], ["c", "d"], ["yz"]]
    assert made[1].items[0].answer == 1
    assert [(task.weight, task.watch) for task in made] == [(1, False), (2, True), (1, False)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "bcd"),
        ({"answer_only": False}, "bcd"),
        ({"answer_only": True}, "y"),
        ({"field": "body"}, "y"),
        ({"max_length": 3}, "bc"),
    ],
)
def test_what_nll_scores_follows_answer_only_and_else_the_data(suite, tokenizer, tmp_path, options, expected):
    one_record(tmp_path / "d.jsonl", text="abcd", prompt="x", answer="y")
    (task,) = suite({"nll": {"data": "d.jsonl"} | options})
    assert targets(tokenizer, task) == [expected]


def test_max_tokens_cuts_answers_as_it_cuts_texts(suite, data):
    (task,) = suite({"nll": {"data": "sums.jsonl", "max_tokens": 30}})
    lengths = [len(item.rows[0].tokens) for item in task.items]
    assert sum(lengths) <= 30 < sum(lengths) + 8
    with pytest.raises(DataError, match="max_tokens 3;"):
        suite({"nll": {"data": "sums.jsonl", "max_tokens": 3}})


@pytest.mark.parametrize("entry", [{"nll": {"data": "sums.jsonl"}}, {"choice": {"data": "choices.jsonl"}}])
def test_suites_know_the_limits_of_the_model(suite, data, entry):
    assert suite(entry, max_positions=8, vocabulary=len(toy.ALPHABET))
    with pytest.raises(DataError, match="but the model takes 7"):
        suite(entry, max_positions=7)
    with pytest.raises(DataError, match="does not belong to the model"):
        suite(entry, vocabulary=20)
