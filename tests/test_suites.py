import builtins
import functools
import math
import random
import sys

import numpy as np
import pytest
import torch
import toy
import transformers
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.errors import DataError, RecipeError
from arma_mergekit.evals import check_test_sets, make_suites, sources, suite_specs
from arma_mergekit.evals.base import Task
from arma_mergekit.evals.python import load_function
from arma_mergekit.evals.sources import read_records
from arma_mergekit.live import LiveModel
from arma_mergekit.recipe import Recipe

POSITIONS = 128


@pytest.fixture(scope="module")
def tokenizer():
    made = toy.make_tokenizer()
    made.eos_token = "."
    made.chat_template = "{% for m in messages %}={{ m['content'] }}+{% endfor %}"
    return made


def make_model(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(toy.ALPHABET), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.15,
        bos_token_id=None, eos_token_id=toy.ALPHABET.index("."),
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def recipe_of(folder, **evals):
    content = {"merge_method": "arma", "base_model": "b", "models": [{"model": "f"}]}
    return Recipe.parse(content | {"evals": evals}, folder / "recipe.yml")


@pytest.fixture
def suite(tokenizer, folder):
    """The tasks of a suite with these entries."""

    def make(*entries, tokenizer=tokenizer, positions=POSITIONS):
        limits = {"max_positions": positions, "vocabulary": len(toy.ALPHABET)}
        return make_suites(recipe_of(folder, s=list(entries)), ["s"], tokenizer, **limits)["s"]

    return make


# ---- a folder of lm-eval tasks ----

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{c}}"
doc_to_target: a
"""
TASKS = {
    "choose": CHOICE
    + "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}, {metric: brier_score},"
    " {metric: mcc}]",
    "informed": CHOICE + "metric_list: [{metric: acc_mutual_info}]",
    "either": CHOICE.replace("doc_to_target: a", 'doc_to_target: "{{both}}"'),
    "blank": CHOICE.replace('"{{q}}"', "!function code.which").replace(
        "doc_to_target: a", 'doc_to_target: "{{q}}"'
    ),
    "empty": CHOICE.replace('"{{q}}"', '""').replace('target_delimiter: " "', ""),
    "cloze": 'output_type: loglikelihood\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{said[0]}}"\n'
    "metric_list: [{metric: acc}, {metric: perplexity}]",
    "roll": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
    "say": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{said}}"\n'
    "generation_kwargs: {until: ['.'], max_gen_toks: 3, do_sample: false}\n"
    "metric_list: [{metric: exact_match}, {metric: bleu}]\n"
    "filter_list:\n"
    "  - {name: whole, filter: [{function: take_first}]}\n"
    "  - {name: first, filter: [{function: regex, regex_pattern: '(.)'}, {function: take_first}]}",
    "wrong": CHOICE + "process_results: !function code.distance\n"
    "metric_list: [{metric: far, aggregation: mean, higher_is_better: false}]",
    "vague": CHOICE
    + "process_results: !function code.distance\nmetric_list: [{metric: far, aggregation: mean}]",
    "shotless": CHOICE + "num_fewshot: 0",
    "code": CHOICE + "unsafe_code: true",
    "remote": CHOICE + "metric_list: [{metric: rouge}]",
    "fetched": CHOICE + "metric_list: [{metric: exact_match, hf_evaluate: true}]",
    "broken": CHOICE.replace("{{q}}", "{{q"),
    "lost": CHOICE,
}
CODE = """
def which(doc): return doc["a"]
def distance(doc, results): return {"far": abs(doc["a"] - max(range(3), key=lambda k: results[k][0]))}
"""


def docs(says=lambda question: "abc"):
    """Questions with three short choices of different lengths, the right one anywhere, and what a model says."""
    draw = random.Random(0)
    for k, (question, _) in enumerate(toy.sums()[:24]):
        choices = ["".join(draw.choices(toy.ALPHABET[:26], k=draw.randint(2, 4))) for _ in range(3)]
        text = " ".join(toy.WORDS[k % 13 :] + [question] * (1 + k % 5) + toy.WORDS)[: 20 + 11 * k]
        said = (says(question), says(question)[0], "??")[k % 3]
        yield {"q": question, "c": choices, "a": k % 3, "both": [0, k % 3], "text": text, "said": said}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    def says(question):
        ids = tokenizer(question, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        return tokenizer.decode(said).partition(".")[0]

    root = tmp_path_factory.mktemp("suites")
    (root / "tasks").mkdir()
    (root / "tasks" / "code.py").write_text(CODE)
    toy.write_jsonl(root / "docs.jsonl", docs(says))
    for name, body in TASKS.items():
        data = root / ("nowhere" if name == "lost" else "") / "docs.jsonl"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}\n"
        (root / "tasks" / f"{name}.yaml").write_text(
            head + 'test_split: test\ntraining_split: train\ntarget_delimiter: " "\n' + body
        )
    (root / "tasks" / "pair.yaml").write_text("group: pair\ntask: [choose, cloze]\n")
    (root / "tasks" / "hole.yaml").write_text("group: hole\ntask: [choose, nothing_of_that_name]\n")
    (root / "tasks" / "unsafe.yaml").write_text(
        "group: unsafe\ntask: [{group: inner, task: [choose, code]}]\n"
    )
    return root


def entry(tasks, **options):
    return {"lm_eval": {"tasks": tasks, "include_path": "tasks", **options}}


@pytest.fixture(scope="module")
def reference(folder, model, tokenizer):
    """What lm-eval itself makes of a task: by filter, samples by document number; and its results."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)

    def evaluate(name, **options):
        found = evaluator.simple_evaluate(
            lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
        )
        by_filter = {}
        for sample in found["samples"][name]:
            by_filter.setdefault(sample["filter"], {})[sample["doc_id"]] = sample
        return by_filter, found["results"][name]

    plain = functools.lru_cache(evaluate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # asks the machine for 3 s
        yield lambda name, **options: evaluate(name, **options) if options else plain(name)


def same_documents(task, name, theirs):
    assert [int(i.removeprefix(f"{name}-")) for i in task.ids] == sorted(theirs)


# ---- the headline is lm-eval's, document by document ----


@pytest.mark.parametrize(
    ("name", "metric", "sign"),
    [
        ("choose", "acc", 1), ("choose", "acc_norm", 1), ("choose", "acc_bytes", 1),
        ("informed", "acc_mutual_info", 1), ("either", "acc", 1), ("blank", "acc", 1), ("empty", "acc", 1),
        ("cloze", "acc", 1), ("cloze", "perplexity", 1), ("wrong", "far", -1),
    ],
)  # fmt: skip
def test_likelihood_tasks_score_as_lm_eval_does(suite, reference, model, name, metric, sign):
    (task,) = suite(entry(name, metric=metric))
    found = task.measure(model, range(len(task.ids)))
    theirs, _ = reference(name)
    same_documents(task, name, theirs["none"])
    expected = [theirs["none"][k][metric] for k in sorted(theirs["none"])]
    np.testing.assert_allclose(found.value, sign * np.array(expected, float), rtol=1e-4)
    assert len(set(found.value)) > 1, "scores that are all alike prove nothing"
    assert isinstance(task, Task)
    assert task.differentiable


@pytest.mark.parametrize(
    "options",
    [
        {"num_fewshot": 2},
        {"num_fewshot": 1, "apply_chat_template": True},
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False},
        {"samples": {"choose": [3, 17, 5]}},
        {"limit": 5},
    ],
)
def test_prompts_and_selections_are_lm_evals(suite, reference, model, options):
    (task,) = suite(entry("choose", metric="brier_score", **options))
    multiturn = {"fewshot_as_multiturn": bool(options.get("apply_chat_template"))}
    samples = (
        {"samples": {k: sorted(v) for k, v in options["samples"].items()}} if "samples" in options else {}
    )
    theirs, results = reference("choose", **(multiturn | options | samples))
    same_documents(task, "choose", theirs["none"])
    for key, requests in zip(task.ids, task._requests, strict=True):
        sample = theirs["none"][int(key.removeprefix("choose-"))]
        assert [r.args for r in requests] == sample["arguments"]
    found = task.measure(model, range(len(task.ids)))
    assert found.score == pytest.approx(-results["brier_score,none"], rel=1e-4)
    assert task.unit == "-brier_score"


@pytest.mark.parametrize("name", ["choose", "informed", "blank", "empty", "cloze"])
def test_rows_hold_the_tokens_that_hflm_scores(suite, reference, monkeypatch, name):
    from lm_eval.models.huggingface import HFLM

    seen, plain = set(), HFLM._loglikelihood_tokens

    def spy(self, requests, **options):
        seen.update(((*before, *scored), len(before)) for _, before, scored in requests)
        return plain(self, requests, **options)

    (task,) = suite(entry(name))
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", spy)
    reference(name, limit=None)
    assert {(row.tokens, row.start) for item in task.items for row in item.rows} == seen


@pytest.mark.parametrize(
    ("metric", "headline"),
    [("word_perplexity", math.log), ("byte_perplexity", math.log), ("bits_per_byte", lambda bits: bits)],
)
def test_perplexities_are_scored_by_their_logarithm(suite, reference, model, metric, headline):
    (task,) = suite(entry("roll", metric=metric))
    found = task.measure(model, range(len(task.ids)))
    _, results = reference("roll")
    assert found.score == pytest.approx(-headline(results[f"{metric},none"]), rel=1e-4)
    assert max(len(item.rows) for item in task.items) > 1, (
        "texts longer than the model should take several windows"
    )
    assert len(set(found.weight)) > 1
    assert found.stderr > 0


@pytest.mark.parametrize(("metric", "used"), [(None, "whole"), ("exact_match,first", "first")])
def test_generation_scores_as_lm_eval_does_with_any_filter(suite, reference, model, tokenizer, metric, used):
    (task,) = suite(entry("say", **({"metric": metric} if metric else {})))
    found = task.measure(model, range(len(task.ids)))
    theirs, _ = reference("say")
    expected = [theirs[used][k]["exact_match"] for k in sorted(theirs[used])]
    np.testing.assert_array_equal(found.value, expected)
    assert len(set(expected)) == 2
    np.testing.assert_array_equal(found.loss, -found.value)
    assert not task.differentiable
    prompts = sum(len(tokenizer(d["q"])["input_ids"]) for d in docs())
    assert prompts < found.tokens <= prompts + 3 * len(task.ids) + 60


def test_generation_options_reach_lm_eval(suite, model):
    long, short = (suite(entry("say", gen_kwargs={"max_gen_toks": n}))[0] for n in (9, 2))
    items = range(6)
    assert long.measure(model, items).tokens > short.measure(model, items).tokens
    assert long.content != short.content
    assert suite(entry("say", gen_kwargs={"do_sample": True, "temperature": 1.0}))[0].content is None


def test_weights_set_in_place_are_seen_and_items_are_scored_the_same_alone(suite, tokenizer):
    base, tuned = make_model(0), make_model(1)
    sides = [{k: v.detach().clone() for k, v in m.named_parameters()} for m in (base, tuned)]
    live = LiveModel(make_model(0), *sides)
    for task in suite(entry("say"), entry("choose")):
        together = task.measure(live, range(12))
        np.testing.assert_array_equal(together.value, task.measure(base, range(12)).value)
        np.testing.assert_array_equal(task.measure(live, [7]).value, together.value[7:8])
        live.set_all(1.0)
        np.testing.assert_array_equal(
            task.measure(live, range(12)).value, task.measure(tuned, range(12)).value
        )
        assert list(task.measure(live, range(12)).loss) != list(together.loss)
        live.set_all(0.0)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes"])
def test_the_loss_of_a_choice_orders_as_its_metric_does(suite, model, metric):
    (task,) = suite(entry("choose", metric=metric))
    found = task.measure(model, range(len(task.ids)))
    # at most three choices: right ones have a probability of at least a third, wrong ones of at most a half
    assert found.loss[found.value == 1].max() <= math.log(3) + 1e-6
    assert found.loss[found.value == 0].min() >= math.log(2) - 1e-6


def test_plain_accuracy_has_the_plain_cross_entropy(suite, reference, model):
    (task,) = suite(entry("choose", metric="acc"))
    found = task.measure(model, range(len(task.ids)))
    theirs, _ = reference("choose")
    for k, sample in theirs["none"].items():
        likelihoods = np.array([r[0][0] for r in sample["resps"]])
        expected = np.log(np.exp(likelihoods).sum()) - likelihoods[sample["target"]]
        assert found.loss[k] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_lm_eval_tasks_steer_gradients(suite):
    sides = [{k: v.detach().clone() for k, v in make_model(s).named_parameters()} for s in (0, 1)]
    live = LiveModel(make_model(0), *sides)
    live.set_all(0.5)
    for task in suite(entry(["choose", "cloze", "roll"])):
        with live.differentiable() as gradient:
            task.measure(live, range(8), backward=lambda loss: loss.backward())
            slope = gradient().sum()
        losses = []
        for alpha in (0.495, 0.505):
            live.set_all(alpha)
            losses.append(task.measure(live, range(8)).mean_loss)
        live.set_all(0.5)
        assert slope == pytest.approx((losses[1] - losses[0]) / 0.01, rel=0.02)


# ---- names ----


def test_groups_stand_for_their_tasks_which_share_the_weight(suite):
    made = suite(entry("pair", weight=3, watch=True))
    assert [(t.name, t.weight, t.watch) for t in made] == [
        ("lm_eval:choose", 1.5, True),
        ("lm_eval:cloze", 1.5, True),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": "chose"},
            r"Unknown lm-eval task 'chose'.*Did you mean choose\? .lm-eval ls tasks. lists them",
        ),
        ({"tasks": "hole"}, "lm-eval's hole lists tasks that are not there"),
        ({"tasks": "choose", "metric": "bleu"}, "has no metric 'bleu'; it has acc, acc_norm"),
        ({"tasks": "choose", "metric": "mcc"}, "mcc is no mean over documents.*another `metric`"),
        ({"tasks": "say", "metric": "bleu"}, "bleu is no mean over documents"),
        ({"tasks": "say", "metric": "exact_match,last"}, "has no filter 'last'; it has whole, first"),
        ({"tasks": "vague"}, "does not say whether far is better high or low"),
        ({"tasks": "code"}, "code runs code that the model writes"),
        ({"tasks": "unsafe"}, "code runs code that the model writes"),
        ({"tasks": "remote"}, "metric rouge is code of the hub's"),
        ({"tasks": "fetched"}, "metric exact_match is code of the hub's"),
        ({"tasks": "say", "gen_kwargs": {"max_gen_toks": 125}}, "no prompt leaves room .* in the 128 tokens"),
        ({"tasks": "lost"}, r"lm-eval task lost cannot be used \(.*nowhere"),
        (
            {"tasks": "broken"},
            r"lm-eval task broken cannot be used \(TemplateSyntaxError.*; correct its definition",
        ),
        ({"tasks": "shotless", "num_fewshot": 3}, "fixes num_fewshot at 0"),
        (
            {"tasks": "choose", "samples": {"cloze": [1]}},
            "`samples` names cloze, but the lm-eval tasks are choose",
        ),
        ({"tasks": "choose", "samples": {"choose": [1, 99]}}, "has 24 documents, so none has number 99"),
        ({"tasks": "choose", "include_path": "taks"}, "No directory .*taks; `include_path`"),
        ({"tasks": ["choose", "pair"]}, r"cannot be used \(ValueError: Duplicate task 'choose'"),
    ],
)
def test_what_lm_eval_cannot_do_is_one_sentence(suite, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(
        "arma_mergekit.evals.lm_eval.load._root", lambda: tmp_path
    )  # the whole index takes 12 s
    with pytest.raises(DataError, match=message) as error:
        suite(entry(**options))
    assert "\n" not in str(error.value)


def test_a_model_without_chat_template_is_told_so(suite):
    plain = toy.make_tokenizer()
    plain.eos_token = "."
    with pytest.raises(DataError, match="no chat template; leave it out"):
        suite(entry("choose", apply_chat_template=True), tokenizer=plain)


def test_documents_longer_than_the_model_are_cut_from_the_left_and_all_of_them_are_refused(suite):
    (task,) = suite(entry("choose", num_fewshot=2), positions=28)
    assert max(len(row.tokens) for item in task.items for row in item.rows) == 29
    with pytest.raises(DataError, match="every document is longer than the 9 tokens"):
        suite(entry("choose", num_fewshot=2), positions=9)
    with pytest.raises(DataError, match="its continuation has 5 tokens, the model takes 4"):
        suite(entry("choose"), positions=4)


def test_without_lm_eval_the_remedy_is_said(suite, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(DataError, match=r"pip install 'arma-mergekit\[lm-eval\]'"):
        suite(entry("choose"))


def test_names_of_lm_eval_are_suites_and_entries_of_suites(folder, monkeypatch):
    monkeypatch.setattr("arma_mergekit.evals.lm_eval.load._root", lambda: folder / "tasks")
    recipe = recipe_of(folder, general=["choose", {"kl": {"data": "x"}}])
    specs = suite_specs(recipe, ["general", "choose", "pair"])
    assert specs["general"][0] == specs["choose"][0]
    assert specs["pair"][0].tasks == ("pair",)
    with pytest.raises(
        RecipeError, match=r"Unknown suite 'generl'\. Did you mean general\? Known: general\."
    ):
        suite_specs(recipe, ["generl"])
    with pytest.raises(RecipeError, match=r"Unknown suite 'hole'"):
        suite_specs(recipe, ["hole"])
    with pytest.raises(RecipeError, match=r"recipe\.yml: no `evals`, and lm-eval has no task 'x'"):
        suite_specs(recipe_of(folder), ["x"])


@pytest.mark.slow
def test_the_small_index_agrees_with_lm_evals_own():
    from lm_eval.tasks import TaskManager

    from arma_mergekit.evals.lm_eval.load import _manager

    whole = TaskManager().task_index
    for name in ("arc_easy", "mmlu", "ai2_arc", "gsm8k", "leaderboard_bbh"):
        small = _manager((name,), None).task_index
        assert len(small) < len(whole) / 2
        # every member: a tag's tasks, a group's list (and so on), down to the files that define them
        for entry in members(small, name):
            assert (small[entry].yaml_path, small[entry].tags) == (whole[entry].yaml_path, whole[entry].tags)


def members(index, name):
    below = (index[name].cfg or {}).get("task")
    listed = below if isinstance(below, list) else index[name].tags
    yield name
    for entry in listed if index[name].kind.name in ("GROUP", "TAG") else ():
        yield from members(index, entry)


def test_hub_data_that_was_never_downloaded_is_one_sentence(suite):
    with pytest.raises(DataError, match=r"lm-eval task arc_easy cannot be used .*download its data set"):
        suite("arc_easy")


# ---- test sets ----


@pytest.mark.parametrize(
    "spec",
    [
        {"lm_eval": {"tasks": "mmlu_anatomy"}}, "arc_challenge", "leaderboard_gpqa_diamond", "tinyBenchmarks",
        {"choice": {"data": "data/hellaswag-dev.jsonl"}}, {"nll": {"data": "MATH_test.parquet"}},
        {"generate": {"data": "my_gsm8k.jsonl"}}, "math",
    ],
)  # fmt: skip
def test_steering_by_a_well_known_test_set_must_be_asked_for(tmp_path, spec):
    recipe = recipe_of(tmp_path, general=[{"kl": {"data": "x"}}, spec])
    with pytest.raises(RecipeError, match=r"Suite general would tune on .*--allow-test-sets"):
        check_test_sets(recipe, ["general"])
    check_test_sets(recipe, ["general"], allow=True)


@pytest.mark.parametrize(
    "spec",
    [
        {"lm_eval": {"tasks": "mmlu", "watch": True}}, {"nll": {"data": "arc_welding.jsonl"}},
        {"choice": {"data": "mathematics.jsonl"}}, {"kl": {"data": "builtin:prose"}}, {"nll": {"data": "mmlular.txt"}},
        {"choice": {"data": "data/icd10_choice.jsonl"}}, {"nll": {"data": "drop_in.jsonl"}},
    ],
)  # fmt: skip
def test_watching_a_test_set_and_other_names_are_fine(tmp_path, spec):
    check_test_sets(recipe_of(tmp_path, s=[spec]), ["s"])


# ---- functions of the user ----

SCORE = """
from dataclasses import dataclass
import torch

@dataclass
class Seen:
    grad: bool

def length(model, tokenizer, records, scale=1.0):
    assert not Seen(torch.is_grad_enabled()).grad and not model.training
    ids = [tokenizer(r["text"], return_tensors="pt")["input_ids"] for r in records]
    return [scale * float(model(input_ids=x).logits[0, -1].max()) for x in ids]

def short(model, tokenizer, records): return [1.0]
def words(model, tokenizer, records): return ["x"] * len(records)
def none(model, tokenizer, records): return None
def nan(model, tokenizer, records): return [float("nan")] * len(records)
def seeds(model, tokenizer, records): return [float(r["id"]) for r in records]
limit = 3
"""


@pytest.fixture
def scorer(folder):
    (folder / "my_eval.py").write_text(SCORE)
    toy.write_jsonl(folder / "texts.jsonl", [{"text": t} for t in toy.sentences(6)])
    return lambda name, **options: {
        "python": {"function": f"my_eval.py:{name}", "data": "texts.jsonl", **options}
    }


def test_a_function_scores_its_records_with_its_options(suite, scorer, model, tokenizer):
    (task,) = suite(scorer("length", options={"scale": 2.0}, weight=3))
    found = task.measure(model, [4, 1])
    assert (task.name, task.weight, task.differentiable) == ("python:length", 3, False)
    assert found.ids == ("texts-5", "texts-2")
    ids = [tokenizer(toy.sentences(6)[k], return_tensors="pt")["input_ids"] for k in (4, 1)]
    with torch.no_grad():
        expected = [2 * float(model(input_ids=x).logits[0, -1].max()) for x in ids]
    np.testing.assert_allclose(found.value, expected)
    np.testing.assert_array_equal(found.loss, -found.value)
    assert found.tokens == sum(x.numel() for x in ids)
    assert isinstance(task, Task)


def test_a_function_may_make_up_its_items(suite, scorer, model):
    (task,) = suite({"python": {"function": "my_eval.py:seeds", "limit": 4}})
    assert list(task.measure(model, [0, 3]).value) == [0.0, 3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"python:short: must return one number a record \(2\), but returned 1"),
        ("words", "must return one number a record, but could not convert"),
        ("none", "must return one number a record, but 'NoneType'"),
        ("nan", r"score of item texts-1 \(and 1 more\) is not finite"),
    ],
)
def test_what_is_no_number_a_record_is_refused(suite, scorer, model, name, message):
    (task,) = suite(scorer(name))
    with pytest.raises(DataError, match=message):
        task.measure(model, [0, 1])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_eval.py:lenght", "Unknown function 'lenght'. Did you mean length?"),
        ("my_eval.py:limit", "Unknown function 'limit'"),
        ("your_eval.py:score", "No file .*your_eval.py"),
        ("no_such_module.at_all:score", "No module 'no_such_module.at_all'; install it"),
        ("math:sqrd", "Unknown function 'sqrd'. Did you mean sqrt?"),
    ],
)
def test_functions_that_are_not_there_are_named(scorer, folder, reference, message):
    with pytest.raises(DataError, match=message):
        load_function(reference, folder)


def test_functions_may_be_importable_and_their_own_faults_are_theirs(folder):
    assert load_function("math:sqrt", folder) is math.sqrt
    (folder / "faulty.py").write_text("import no_such_module_either\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        load_function("faulty.py:score", folder)


# ---- readers ----


def test_parquet_reads_as_jsonl_does(suite, tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [
        {"id": k if k % 2 else None, "text": t, "n": {"a": [k]}} for k, t in enumerate(toy.sentences(2000))
    ]
    toy.write_jsonl(tmp_path / "d.jsonl", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    for limit in (None, 7):
        pair = [read_records(tmp_path / f"d.{kind}", ["text"], limit) for kind in ("jsonl", "parquet")]
        assert [r.fields for r in pair[0]] == [r.fields for r in pair[1]]
        assert [r.id for r in pair[0]] == [r.id for r in pair[1]]
    with pytest.raises(DataError, match=r"d\.parquet, row 1: needs body, but body is missing; add it"):
        read_records(tmp_path / "d.parquet", ["body"])


def test_parquet_that_is_none_or_empty_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"Cannot read evaluation data .*a\.parquet"):
        read_records(tmp_path / "a.parquet", [])
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no records"):
        read_records(tmp_path / "b.parquet", ["text"])


def test_without_pyarrow_the_remedy_is_said(tmp_path, monkeypatch):
    plain = builtins.__import__
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"d\.parquet: reading parquet needs pyarrow; pip install pyarrow"):
        read_records(tmp_path / "d.parquet", [])


def pieces(path, text):
    path.write_text(text, "utf-8")
    return [record.text("text") for record in read_records(path, ["text"])]


def test_a_text_is_cut_at_blank_lines_else_line_ends_else_spaces(tmp_path):
    paragraph, line, word = ("word " * 150).strip(), "word " * 40 + "\n", "word " * 2000
    assert pieces(tmp_path / "p.txt", "\n\n".join([paragraph] * 4)) == ["\n\n".join([paragraph] * 2)] * 2
    assert [p.count("\n") for p in pieces(tmp_path / "l.txt", line * 12)] == [4, 4, 2]
    assert [len(p) for p in pieces(tmp_path / "w.txt", word)] == [3999, 3999, 2000]
    assert [len(p) for p in pieces(tmp_path / "c.txt", "字" * 9000)] == [4000, 4000, 1000]


@given(
    st.lists(
        st.tuples(st.integers(1, 1500), st.sampled_from([" ", "\n", "\n\n", "\n \n"])),
        min_size=1,
        max_size=30,
    )
)
def test_cutting_a_text_loses_nothing_but_white_space(parts):
    text = "".join("a" * n + end for n, end in parts)
    found = [m[0] for m in sources.PIECE.finditer(text)]
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(len(piece) <= 4000 and piece[0] == "a" for piece in found)


def test_a_text_gives_items_whose_ids_stay_when_it_grows(suite, folder):
    text = "\n\n".join(" ".join(toy.sentences(40, seed=k)) for k in range(4))
    (folder / "book.txt").write_text(text)
    (before,) = suite({"nll": {"data": "book.txt", "max_length": 64}})
    (folder / "book.txt").write_text(text + "\n\n" + text)
    (after,) = suite({"nll": {"data": "book.txt", "max_length": 64}})
    assert before.ids[:-1] == after.ids[: len(before.ids) - 1] == ("book-1", "book-2", "book-3")
    with pytest.raises(
        DataError, match=r"book\.txt, piece 1: needs prompt, choices, answer, .* give JSONL or parquet"
    ):
        suite({"choice": {"data": "book.txt"}})
    (folder / "blank.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match=r"blank\.txt has no records"):
        suite({"nll": {"data": "blank.txt"}})


def test_generation_takes_its_regex_and_length_from_the_recipe(suite, folder, model, tokenizer):
    asked = list(docs())[:4]
    ids = [tokenizer(d["q"], return_tensors="pt")["input_ids"] for d in asked]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = [tokenizer.decode(model.generate(x, **options)[0, x.shape[1] :]).partition(".")[0] for x in ids]
    records = [{"prompt": d["q"], "answer": s[-2:]} for d, s in zip(asked, said, strict=True)]
    toy.write_jsonl(folder / "asked.jsonl", records)
    five, four = (
        suite({"generate": {"data": "asked.jsonl", "regex": "(..)$", "max_new_tokens": 5}}),
        suite({"generate": {"data": "asked.jsonl", "regex": "^(..)$", "max_new_tokens": 4}}),
    )
    assert list(five[0].measure(model, range(4)).value) == [1.0] * 4
    assert list(four[0].measure(model, range(4)).value) == [0.0] * 4
    with pytest.raises(DataError, match="id asked-1"):
        suite({"generate": {"data": "asked.jsonl", "regex": "x"}}, positions=8)


def test_divergences_are_built_with_their_options(suite, folder):
    toy.write_jsonl(folder / "d.jsonl", [{"body": t} for t in toy.sentences(6)])
    common = {"data": "d.jsonl", "field": "body", "weight": 2}
    plain, other = suite(
        {"divergence": common},
        {"divergence": {**common, "metric": "emd", "teacher": "finetuned", "limit": 3}},
    )
    assert (plain.name, plain.unit, plain.weight, len(plain.ids)) == ("divergence:d", "-js/token", 2, 6)
    assert (other.name, other.unit, other.teacher, len(other.ids)) == (
        "divergence:d-finetuned", "-emd/token", "finetuned", 3,
    )  # fmt: skip


# ---- the packaged sample ----


def test_prose_comes_with_the_package(suite, tmp_path):
    path = recipe_of(tmp_path).data_path("builtin:prose")
    records = read_records(path, ["text"])
    assert 20 <= len(records) <= 30
    assert not [r.id for r in records if r.id.startswith("brotli")]  # code, and not in the public domain
    (task,) = suite({"kl": {"data": "builtin:prose"}})
    assert (task.name, len(task.ids)) == ("kl:prose", len(records))
    with pytest.raises(RecipeError, match=r"Unknown data 'builtin:proze'\. Did you mean builtin:prose\?"):
        recipe_of(tmp_path).data_path("builtin:proze")
