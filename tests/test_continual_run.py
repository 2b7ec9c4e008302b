"""`arma continual`: plans, data in both layouts, a whole run on a tiny model, killed and resumed."""

import gc
import json
import random
import re

import pytest
import torch
import toy
import transformers
from click.testing import CliRunner

from arma_mergekit.cli.continual import command
from arma_mergekit.continual import run as run_module
from arma_mergekit.continual.data import collator, encode, items, read_task, rows
from arma_mergekit.continual.plan import Plan, TaskSpec
from arma_mergekit.continual.run import ContinualRun
from arma_mergekit.continual.score import score
from arma_mergekit.errors import CheckpointError, DataError, RecipeError, RunError, UsageError

CHOICES = [f" {c}" for c in "abcdef"]
METHODS = ["replay", {"aimmerging": {"interval": 3, "replay_steps": 2}}]


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every `train` collects garbage; what imports made is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A random model and two tasks, one in each layout."""
    root = tmp_path_factory.mktemp("continual")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(toy.ALPHABET), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    ))  # fmt: skip
    model.save_pretrained(root / "base")
    toy.make_tokenizer().save_pretrained(root / "base")
    rng = random.Random(0)
    (root / "SC" / "moods").mkdir(parents=True)
    (root / "SC" / "moods" / "labels.json").write_text('["good", "bad"]')
    for side, count in (("train", 24), ("test", 6)):
        lines = [
            {"prompt": f"ab{rng.randrange(9)}=", "answer": f" {'ab'[k % 2]}", "choices": CHOICES}
            for k in range(count)
        ]
        toy.write_jsonl(root / f"ab-{side}.jsonl", lines)
        moods = [{"sentence": f"mood {k}", "label": ("good", "bad")[k % 2]} for k in range(count)]
        (root / "SC" / "moods" / f"{side}.json").write_text(json.dumps(moods))
    return root


def content(**changes):
    return {
        "model": "base",
        "adapter": {"rank": 2, "dropout": 0.1},
        "tasks": [{"name": "ab", "train": "ab-train.jsonl", "test": "ab-test.jsonl"}, {"folder": "SC/moods"}],
        "train": {"steps": 10, "batch": 4, "lr": 1e-2, "max_length": 48, "save_steps": 3},
        "memory_share": 0.5,
        "methods": METHODS,
    } | changes


def plan(root, **changes):
    return Plan.parse(content(**changes), root / "plan.yml")


def carry_out(root, out, **changes):
    return ContinualRun(plan(root, **changes), out, lambda _: None).run()


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    return out, carry_out(root, out)


def without_times(found):
    drop = ("seconds", "overhead")
    return {
        k: [{a: b for a, b in row.items() if a not in drop} for row in v] if k in ("runs", "methods") else v
        for k, v in found.items()
    }


# --- a run


def test_a_run_tests_every_task_after_every_task(whole):
    _, found = whole
    assert [run["method"] for run in found["runs"]] == ["replay", "aimmerging"]
    for run in found["runs"]:
        assert [len(row) for row in run["matrix"]] == [2, 2]
        assert all(0 <= value <= 1 for row in run["matrix"] for value in row)
        assert run["metrics"]["OP"] == pytest.approx(sum(run["matrix"][1]) / 2)
        assert run["metrics"]["BWT"] == pytest.approx(run["matrix"][1][0] - run["matrix"][0][0])
        assert [s + r for s, r in zip(run["steps"], run["replayed"], strict=True)] == [10, 10]
    assert found["runs"][1]["merges"][0] == []
    assert found["runs"][1]["merges"][1]
    assert set(found["before"]) == {"ab", "moods"}


def test_a_finished_run_computes_nothing_again(root, whole, monkeypatch):
    out, found = whole
    monkeypatch.setattr(run_module, "build", lambda *_: pytest.fail("a model was loaded"))
    assert carry_out(root, out) == found


def test_what_is_left_behind_is_the_model_and_the_last_state(whole):
    out, _ = whole
    assert {p.name for p in (out / "aimmerging-order0-seed0").iterdir()} == {"after-1", "model"}
    lines = (out / "aimmerging-order0-seed0" / "after-1" / "memory.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines].count("ab") == 12


@pytest.mark.parametrize(
    "killed_at",
    [pytest.param((0, 5), marks=pytest.mark.slow, id="first task"), pytest.param((1, 5), id="second task")],
)
def test_a_run_killed_inside_a_task_ends_as_if_nothing_had_happened(
    root, whole, tmp_path, monkeypatch, killed_at
):
    make, (task, at) = run_module.make_callback, killed_at

    def deadly(*given):
        callback = make(*given)
        step = callback.on_step_end

        def on_step_end(args, state, control, **live):
            if given[0].kind == "aimmerging" and callback.facts["tasks"] == task and state.global_step == at:
                raise KeyboardInterrupt
            step(args, state, control, **live)

        callback.on_step_end = on_step_end
        return callback

    monkeypatch.setattr(run_module, "make_callback", deadly)
    with pytest.raises(KeyboardInterrupt):
        carry_out(root, tmp_path)
    assert (tmp_path / "aimmerging-order0-seed0" / f"task-{task}" / "checkpoint-3").exists()
    monkeypatch.setattr(run_module, "make_callback", make)
    assert without_times(carry_out(root, tmp_path)) == without_times(whole[1])
    models = [
        p / "aimmerging-order0-seed0" / "model" / "adapter_model.safetensors" for p in (tmp_path, whole[0])
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_run_killed_while_it_tests_does_not_train_again(root, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ContinualRun, "test", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        carry_out(root, tmp_path)
    monkeypatch.undo()
    train, trained = run_module.Live._train, []
    monkeypatch.setattr(
        run_module.Live, "_train", lambda self, i, task: trained.append(task.name) or train(self, i, task)
    )
    assert without_times(carry_out(root, tmp_path)) == without_times(whole[1])
    assert trained == ["moods", "ab", "moods"]


def test_more_methods_and_seeds_add_to_a_run_and_other_settings_are_refused(root, whole):
    out, found = whole
    more = carry_out(root, out, methods=[*METHODS, "sequential"], seeds=[0])
    assert more["runs"][:2] == found["runs"]
    assert more["runs"][2]["method"] == "sequential"
    with pytest.raises(RunError, match="holds replay-order0-seed0 with other settings"):
        carry_out(root, out, methods=[{"replay": {"every": 3}}])
    with pytest.raises(RunError, match=r"holds another run: plan: train\.steps was 10 and is 11"):
        carry_out(root, out, train=content()["train"] | {"steps": 11})


def test_forward_transfer_needs_tasks_trained_alone(root, whole, tmp_path):
    assert "FWT" not in whole[1]["runs"][0]["metrics"]
    found = carry_out(root, tmp_path, alone=True, evaluate="seen", methods=["sequential"], save_model=False)
    # the first task of a sequence is a task alone, so its difference is 0
    assert found["runs"][0]["metrics"]["FWT"] * 2 == pytest.approx(
        found["runs"][0]["matrix"][1][1] - alone(tmp_path)
    )
    assert found["runs"][0]["matrix"][0][1] is None
    assert "zero-shot transfer" not in found["runs"][0]["metrics"]


def alone(out):
    records = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return next(r["scores"]["moods"] for r in records if r["key"] == "alone-order1-seed0/0")


def test_full_fine_tuning_in_another_order(root, tmp_path):
    orders = [["moods", "ab"]]
    found = carry_out(
        root, tmp_path, adapter=None, orders=orders, methods=["ema"], evaluate="seen", dtype="bfloat16"
    )
    assert found["runs"][0]["tasks"] == ["moods", "ab"]
    assert (tmp_path / "ema-order0-seed0" / "model" / "model.safetensors").exists()


# --- data


def test_both_layouts_are_records_of_one_kind(root):
    tasks = [read_task(plan(root), spec) for spec in plan(root).tasks]
    assert tasks[0].test[0] == {
        "prompt": tasks[0].test[0]["prompt"],
        "answer": " a",
        "choices": CHOICES,
        "label": " a",
    }
    assert tasks[1].train[0] == {
        "prompt": "mood 0\nWhat is the sentiment of the text? good, bad\nAnswer:",
        "answer": " good", "choices": [" good", " bad"], "label": "good",
    }  # fmt: skip


def test_a_dataset_is_a_task_through_its_columns(root, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=["good", "bad"])}
    )
    rows = {"text": [f"ab{k}" for k in range(8)], "mood": [0, 1] * 4}
    side = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": side, "test": side}).save_to_disk(tmp_path / "moods")
    given = {"name": "moods", "dataset": "moods", "prompt": "{text}=", "answer": "mood"}
    changes = {"tasks": [given, {"name": "x", "train": "x.jsonl", "test": "x.jsonl"}]}
    task = read_task(plan(tmp_path, **changes), plan(tmp_path, **changes).tasks[0])
    assert task.train[1] == {
        "prompt": "ab1=",
        "answer": " bad",
        "choices": [" good", " bad"],
        "label": " bad",
    }
    for wrong in (
        {"prompt": "{txt}"},
        {"answer": "mod"},
        {"splits": ["train", "dev"]},
        {"dataset": "nowhere/x"},
    ):
        changes["tasks"][0] = given | wrong
        with pytest.raises(DataError, match=r"Task moods: dataset .* cannot be used"):
            read_task(plan(tmp_path, **changes), plan(tmp_path, **changes).tasks[0])


def test_only_the_answer_is_learned_and_long_prompts_lose_their_beginning():
    tokenizer = toy.make_tokenizer()
    record = {"prompt": "abcdefgh", "answer": " b", "choices": [" b", " dcba"]}
    shortened = rows(tokenizer, record, 8)
    assert [tokenizer.decode(list(row.tokens)).replace(" ", "") for row in shortened] == ["fghb", "fghdcba"]
    assert {row.tokens[: row.start] for row in shortened} == {shortened[0].tokens[:3]}
    found = encode(tokenizer, record | {"choices": None}, 100, False)
    assert found["labels"] == [-100] * 8 + found["input_ids"][8:]


def test_a_start_token_survives_the_cut():
    tokenizer = toy.make_tokenizer()
    tokenizer.bos_token = "a"
    row = rows(tokenizer, {"prompt": "abcdefgh", "answer": " b", "choices": None}, 6)[0]
    assert tokenizer.decode(list(row.tokens)).replace(" ", "") == "afghb"


def test_batches_are_padded_on_the_right_and_padding_does_not_count():
    batch = collator(7)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_a_limit_takes_the_same_records_of_all_labels_each_time(root):
    spec = plan(root).tasks[1].model_copy(update={"limit_train": 5})
    first, second = read_task(plan(root), spec), read_task(plan(root), spec)
    assert first.train == second.train
    assert len(first.train) == 5


@pytest.mark.parametrize(("line", "named"), [
    ({"prompt": "a", "answer": "x", "choices": CHOICES}, "answer must be a text, one of the choices"),
    ({"prompt": "a", "answer": ""}, "answer must be a text"),
    ({"prompt": "a"}, "answer is missing"),
    ({"prompt": "a", "answer": " a", "choices": [" a"]}, "choices must be two or more different texts"),
    ({"prompt": "a", "answer": " a", "choices": [" a", " a"]}, "choices must be two or more different texts"),
    ({"prompt": "a", "answer": " a", "choices": [" a", 3]}, "choices must be two or more different texts"),
    ({"prompt": "a", "answer": " a", "choices": " abc"}, "choices must be two or more different texts"),
])  # fmt: skip
def test_bad_records_are_named(root, tmp_path, line, named):
    toy.write_jsonl(tmp_path / "x.jsonl", [line])
    spec = TaskSpec(name="x", train="x.jsonl", test="x.jsonl")
    with pytest.raises(DataError, match=rf"x\.jsonl.*{named}"):
        read_task(plan(tmp_path), spec)


@pytest.mark.parametrize("labels", ['["good"]', '["good", "good"]', '["good", 3]'])
def test_labels_that_do_not_tell_classes_apart_are_named(root, tmp_path, labels):
    folder = tmp_path / "SC" / "moods"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(labels)
    for side in ("train", "test"):
        (folder / f"{side}.json").write_text('[{"sentence": "s", "label": "good"}]')
    with pytest.raises(DataError, match=r"labels\.json must be two or more different texts"):
        read_task(plan(tmp_path), plan(tmp_path).tasks[1])


def test_encoder_decoder_models_are_scored_by_the_same_rules():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(toy.ALPHABET), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0,
    ))  # fmt: skip
    tokenizer = toy.make_tokenizer()
    record = {"prompt": "ab1=", "answer": " b", "choices": [" a", " b"], "label": "b"}
    losses = []
    for choice in record["choices"]:
        ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in ("ab1=", choice))
        losses.append(model(input_ids=ids, labels=labels).loss.item())
    task = type("T", (), {"name": "t", "test": [record, record]})()
    assert score(model, tokenizer, task, 32, True)["score"] == float(losses[1] < losses[0])


@torch.no_grad()
def test_the_likeliest_choice_counts_to_the_end_of_text_and_not_by_its_mean(root):
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    model.lm_head.weight.data *= 20  # decided
    tokenizer, choices = toy.make_tokenizer(), [" a", " ab", " bcdef"]
    tokenizer.eos_token = "z"
    likely, means = [], []
    prompts = [f"{a}{b}=" for a in "abcdef" for b in "123"]
    for prompt in prompts:
        each = []
        for choice in choices:
            ids = torch.tensor([[*tokenizer(prompt + choice)["input_ids"], tokenizer.eos_token_id]])
            start = len(tokenizer(prompt)["input_ids"])
            log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            each.append(log_p.gather(1, ids[0, start:, None])[:, 0])
        likely.append(max(range(3), key=lambda k: each[k].sum()))
        means.append(max(range(3), key=lambda k: each[k][:-1].mean()))
    assert likely != means
    task = type("T", (), {"name": "t"})()
    for found, wanted in ((likely, 1.0), (means, sum(map(int.__eq__, likely, means)) / len(likely))):
        task.test = [
            {"prompt": p, "answer": choices[k], "choices": choices, "label": None}
            for p, k in zip(prompts, found, strict=True)
        ]
        assert score(model, tokenizer, task, 32, False)["score"] == pytest.approx(wanted)


def test_free_answers_are_scored_by_exact_match(root):
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    tokenizer = toy.make_tokenizer()
    ids = torch.tensor([tokenizer("ab1=")["input_ids"]])
    said = tokenizer.decode(model(ids).logits[0, -1].argmax())
    task = type("T", (), {"name": "t"})()
    for answer, wanted in ((said, 1.0), ("z" if said != "z" else "y", 0.0)):
        task.test = [{"prompt": "ab1=", "answer": answer, "choices": None, "label": None}]
        assert score(model, tokenizer, task, 32, False) == {"score": wanted, "stderr": 0.0}
        assert items(tokenizer, task, 32)[0].text == answer


# --- plans


@pytest.mark.parametrize(("changes", "named"), [
    ({"methods": ["aimmergin"]}, "Unknown method 'aimmergin'. Did you mean aimmerging?"),
    ({"methods": [{"sfa": {"bak": 1}}]}, "Unknown key 'bak'"),
    ({"methods": [{"sfa": {}, "ema": {}}]}, "needs exactly one of"),
    ({"methods": ["replay", "replay"]}, "has 'replay' more than once"),
    ({"methods": [{"name": "a b", "sfa": {}}, {"name": "a-b", "ema": {}}]}, "has 'a-b' more than once"),
    ({"methods": [{"name": "alone", "sfa": {}}]}, "a method named 'alone'"),
    ({"seeds": [0, 1, 0]}, "has 0 more than once"),
    ({"methods": [{"aimmerging": {"controller": "window"}}]}, "needs window, shrink and grow"),
    ({"orders": [["ab", "ab"]]}, r"orders\[0\].*must name every task once: ab, moods"),
    ({"tasks": [{"name": "x", "train": "a"}, {"folder": "b"}]}, r"tasks\[0\].*needs either train and test, or folder"),
    ({"train": {"steps": 0}}, "train.steps"),
    ({"trian": 1}, "Unknown key 'trian'"),
])  # fmt: skip
def test_everything_wrong_with_a_plan_is_said(tmp_path, changes, named):
    with pytest.raises(RecipeError, match=named):
        plan(tmp_path, **changes)


def test_a_model_that_is_not_there_is_said_before_anything_runs(root, tmp_path):
    with pytest.raises(RunError, match="is no model directory"):
        carry_out(root, tmp_path, model="nowhere")


def test_an_adapter_that_fits_nothing_is_said(root, tmp_path):
    with pytest.raises(CheckpointError, match="The adapter does not fit the model base"):
        carry_out(root, tmp_path, adapter={"targets": ["nothing"]})


# --- the command


@pytest.fixture(scope="module")
def typed(root, whole):
    (root / "plan.yml").write_text(json.dumps(content()))
    return CliRunner().invoke(
        command,
        [str(root / "plan.yml"), "--out", str(whole[0]), "--methods", "aimmerging"],
        catch_exceptions=False,
    )


def test_the_command_prints_a_line_a_method_with_definitions(typed, whole):
    assert typed.exit_code == 0
    assert re.search(r"aimmerging +0\.\d{3}", typed.stdout)
    assert "BWT: mean over j < T-1" in typed.stdout
    assert json.loads((whole[0] / "summary.json").read_text())["methods"][0]["name"] == "aimmerging"


def test_the_page_is_whole_and_offline(typed, whole):
    text = (whole[0] / "report.html").read_text()
    assert "What was learned, and what was forgotten" in text
    assert "Steps since the last merge" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*http", text)
    assert (whole[0] / "matrices.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_names_nobody_knows_are_refused(root):
    (root / "plan.yml").write_text(json.dumps(content()))
    with pytest.raises(UsageError, match=r"Unknown method 'repla'\. Did you mean replay"):
        CliRunner().invoke(command, [str(root / "plan.yml"), "--methods", "repla"], catch_exceptions=False)
