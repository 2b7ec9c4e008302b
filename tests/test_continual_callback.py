"""Merging while training: real trainers on a tiny model, killed, resumed and compared."""

import gc
import json
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from arma_mergekit import continual
from arma_mergekit.continual import (
    AIMMergingCallback,
    AIMSettings,
    EMACallback,
    EMASettings,
    EWCCallback,
    EWCSettings,
    MagMaxCallback,
    Memory,
    ReplayCallback,
    ReplaySettings,
    SFACallback,
    SFASettings,
)
from arma_mergekit.continual.callback import scale_moments
from arma_mergekit.continual.settings import Settings
from arma_mergekit.continual.weights import copies, distance, pull, scoped, trainable
from arma_mergekit.errors import CheckpointError, RunError

# what peft asks of transformers is not ours
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every `train` collects garbage; what imports made is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_public_name_is_there():
    assert all(getattr(continual, name).__name__ == name for name in continual.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = continual.nothing


def llama(seed=0, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, **config,
        )
    )  # fmt: skip


def lora(seed=0, dropout=0.0):
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=dropout
    )
    return get_peft_model(llama(seed), config)


def rows(task, count=24):
    return [{"input_ids": [task, k % 5, k % 7, 20], "labels": [-100, k % 5, k % 7, 20]} for k in range(count)]


def collate(features):
    return {key: torch.tensor([f[key] for f in features]) for key in ("input_ids", "labels")}


def memory(share=1.0):
    kept = Memory(share=share)
    kept.add("past", rows(3))
    return kept


class Stop(TrainerCallback):
    """Kill the run after a step, before anything is saved for it."""

    def __init__(self, step):
        self.at = step

    def on_step_begin(self, args, state, control, **live):
        if state.global_step == self.at:
            raise KeyboardInterrupt


class Watch(TrainerCallback):
    """Parameters as they are after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **live):
        self.seen.append(copies(trainable(model)))


def trainer(model, out, *callbacks, steps=12, data=None, **options):
    given = {
        "per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, "logging_strategy": "no",
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return Trainer(
        model, TrainingArguments(str(out), **given), data_collator=collate, train_dataset=data or rows(5),
        callbacks=list(callbacks),
    )  # fmt: skip


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def settings(**given):
    return AIMSettings(**({"interval": 3, "replay_steps": 2, "interval_min": 2} | given))


def aim(**given):
    return AIMMergingCallback(memory(), settings(**given), collate=collate)


METHODS = {
    "aimmerging": aim,
    "published": lambda: aim(controller="published"),
    "attention": lambda: aim(scope="attention"),
    "replay": lambda: ReplayCallback(memory(), collate=collate),
    "sfa": SFACallback,
    "ema": lambda: EMACallback(EMASettings(decay=0.9)),
    "magmax": MagMaxCallback,
    "ewc": lambda: EWCCallback(EWCSettings(examples=4)),
}


# --- one merge, by hand


def test_a_merge_is_the_published_formula(tmp_path):
    """theta_t + w_in (theta_k - theta_t) + w_out (theta' - theta_k), from three snapshots."""
    model, seen = lora(), {}
    callback = aim(probe_rows="random")
    replay = callback.replay

    def watched(*given):
        seen["trained"] = copies(trainable(model))
        replay(*given)
        seen["replayed"] = copies(trainable(model))

    callback.replay = watched
    start = copies(trainable(model))
    after = Watch()
    trainer(model, tmp_path, callback, after, steps=6).train()
    merge = callback.facts["merges"][0]
    found = after.seen[merge["step"] - 1]
    assert len(callback.facts["merges"]) == 1
    for name, theta in start.items():
        inner, outer = seen["trained"][name] - theta, seen["replayed"][name] - seen["trained"][name]
        torch.testing.assert_close(found[name], theta + merge["inner"] * inner + merge["outer"] * outer)
    assert (merge["inner"], merge["outer"]) == (0.6, 0.4)
    assert not same(found, seen["replayed"])


@pytest.mark.parametrize(("inner", "outer"), [(0.5, 0.5), (0.6, 0.4), (0.4, 0.6), (1.0, 0.0), (0.9, 0.3)])
def test_one_copy_is_enough_for_any_pair_of_weights(inner, outer):
    before, now, later = (
        {"w": torch.randn(50, generator=torch.Generator().manual_seed(k))} for k in range(3)
    )
    kept = copies(before)
    pull(kept, now, (inner - outer) / (1 - outer))
    pull(kept, later, outer)
    wanted = before["w"] + inner * (now["w"] - before["w"]) + outer * (later["w"] - now["w"])
    torch.testing.assert_close(kept["w"], wanted)


def test_the_signal_is_the_mean_path_per_step(tmp_path):
    model, callback, after = lora(), aim(threshold_factor=100), Watch()
    start = copies(trainable(model))
    trainer(model, tmp_path, after, callback, steps=6).train()  # watches before the merge
    merge = callback.facts["merges"][0]
    assert merge["signal"] == distance(start, after.seen[merge["step"] - 1]) / merge["elapsed"]


def test_only_what_is_in_scope_is_merged(tmp_path):
    model = lora()
    callback, after = aim(scope="attention", replay_steps=0), Watch()
    assert {n.split(".")[-4] for n in scoped(trainable(model), "attention")} == {"q_proj", "v_proj"}
    plain, watched = lora(), Watch()
    trainer(plain, tmp_path, watched, steps=6).train()
    trainer(model, tmp_path, callback, after, steps=6).train()
    at = callback.facts["merges"][0]["step"] - 1
    changed = {n for n in after.seen[at] if not torch.equal(after.seen[at][n], watched.seen[at][n])}
    assert changed == {n for n in after.seen[at] if "self_attn" in n}


def test_nothing_in_scope_is_refused(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(RunError, match="scope attention has nothing to merge"):
        trainer(model, tmp_path, aim(scope="attention")).train()


def test_the_first_task_is_plain_training(tmp_path):
    models = [lora(dropout=0.1), lora(dropout=0.1)]
    trainer(models[0], tmp_path).train()
    callback = AIMMergingCallback(Memory())
    trainer(models[1], tmp_path, callback).train()
    assert same(*(copies(trainable(model)) for model in models))
    assert callback.facts["merges"] == []


def test_a_copy_of_the_trainable_parameters_is_all_that_is_kept(tmp_path):
    model, callback = lora(), aim()
    trainer(model, tmp_path, callback).train()
    gc.collect()
    kept = sum(t.numel() for group in callback.tensors.values() for t in group.values())
    assert kept == sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- switches


def test_dropout_is_off_while_the_loss_is_measured(tmp_path):
    modes = []

    def loss(model, batch):
        modes.append((torch.is_grad_enabled(), model.training))
        return model(**batch).loss

    for controller in ("default", "published"):
        callback = AIMMergingCallback(memory(), settings(controller=controller), collate=collate, loss=loss)
        trainer(lora(dropout=0.1), tmp_path, callback, steps=2).train()
        probes = {training for grad, training in modes if not grad}
        assert probes == {controller == "published"}
        modes.clear()


def test_the_learning_rate_of_a_replay_takes_effect_and_is_put_back(tmp_path):
    found = {}
    for lr in (None, 1e-2, 1e-9):
        model, callback = lora(), aim(replay_lr=lr, moments="keep")
        run = trainer(model, tmp_path, callback, steps=6)
        run.train()
        found[lr] = copies(trainable(model))
        assert [g["lr"] for g in run.optimizer.param_groups] == [1e-2] * len(run.optimizer.param_groups)
    assert same(found[None], found[1e-2])
    assert not same(found[None], found[1e-9])


@pytest.mark.parametrize(("moments", "factor"), [("damp", 0.4), ("keep", 1.0), ("reset", 0.0)])
def test_first_moments_follow_the_switch_and_second_ones_stay(moments, factor):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[weight].items()}
    if moments != "keep":
        scale_moments(optimizer, {"w": weight}, factor)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], factor * before["exp_avg"])
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], before["exp_avg_sq"])


@pytest.mark.parametrize("moments", ["damp", "keep"])
def test_the_switch_of_the_moments_reaches_the_optimiser(tmp_path, moments):
    model, callback = lora(), aim(moments=moments, merge_at_end=False)
    plain, other = lora(), aim(moments="keep", merge_at_end=False)
    trainer(model, tmp_path, callback, steps=8).train()
    trainer(plain, tmp_path, other, steps=8).train()
    assert same(copies(trainable(model)), copies(trainable(plain))) == (moments == "keep")


def test_the_last_steps_of_a_task_are_merged_unless_published(tmp_path):
    for controller, count in (("default", 2), ("published", 1)):
        callback = aim(controller=controller, threshold_factor=100)
        trainer(lora(), tmp_path, callback, steps=8).train()
        steps = [merge["step"] for merge in callback.facts["merges"]]
        assert len(steps) == count
        assert (steps[-1] == 8) == (controller == "default")


def test_a_small_probe_is_measured_only_every_few_steps(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(len(batch["labels"])) if not torch.is_grad_enabled() else None
        return model(**batch).loss

    callback = AIMMergingCallback(memory(), settings(interval=64), collate=collate, loss=loss)
    trainer(lora(), tmp_path, callback, steps=8, per_device_train_batch_size=2).train()
    assert calls == [1, 1]  # an eighth of two rows: one row at every fourth step


# --- replay


def test_accumulated_replay_equals_a_large_batch(tmp_path):
    found = []
    for size, accumulation in ((6, 1), (2, 3)):
        model = lora()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer(model, tmp_path, aim(), steps=6, **options).train()
        found.append(copies(trainable(model)))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["aimmerging", "published", "replay"])
def test_a_budget_counts_replay_and_schedule_ends_with_it(tmp_path, name):
    made = METHODS[name]()
    made.budget = 20
    run = trainer(lora(), tmp_path, made, steps=20, lr_scheduler_type="linear")
    run.train()
    assert run.state.global_step + made.facts["replayed"] == 20
    assert made.facts["replayed"] > 0
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_what_a_budget_leaves_for_the_last_interval_is_half_training_half_replay(tmp_path):
    callback = aim(interval=8, replay_steps=8, threshold_factor=100)
    callback.budget = 34  # 16 steps and 8 replayed, then 10 are left
    trainer(lora(), tmp_path, callback, steps=34).train()
    assert [(m["elapsed"], m["replayed"]) for m in callback.facts["merges"]] == [(16, 8), (5, 5)]


def test_replay_comes_after_every_so_many_steps(tmp_path):
    callback = ReplayCallback(memory(), ReplaySettings(every=3), collate=collate)
    trainer(lora(), tmp_path, callback, steps=12).train()
    assert callback.facts["replayed"] == 4


# --- kill and resume


FULL = [("aimmerging", True), ("sfa", True)]
KILLED = [(name, name == "aimmerging") for name in METHODS]


@pytest.mark.parametrize(
    ("name", "full"),
    [
        pytest.param(
            name, full, marks=[] if quick else pytest.mark.slow, id=f"{'full' if full else 'lora'}-{name}"
        )
        for (name, quick), full in [
            *((k, False) for k in KILLED),
            *(((n, n == "aimmerging"), f) for n, f in FULL),
        ]
    ],
)
def test_a_killed_run_goes_on_to_the_same_parameters(tmp_path, name, full):
    """Killed inside an interval, between two checkpoints; dropout, accumulation, schedule and all."""
    options = {
        "save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", "steps": 13,
    }  # fmt: skip
    model = (lambda: llama(attention_dropout=0.1)) if full else (lambda: lora(dropout=0.1))
    results, facts = [], []
    for out, killed in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        net, made = model(), METHODS[name]()
        if killed:
            with pytest.raises(KeyboardInterrupt):
                trainer(net, out, made, Stop(7), **options).train()
            net, made = model(), METHODS[name]()
        trainer(net, out, made, **options).train(resume_from_checkpoint=killed or None)
        with made.evaluating(net):
            results.append(copies(trainable(net)))
        facts.append(made.facts)
    assert facts[0] == facts[1]
    assert same(*results)
    assert not same(results[0], copies(trainable(model())))


def test_a_checkpoint_without_state_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "steps": 8}
    trainer(lora(), tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="has no state of the merging callback"):
        trainer(lora(), tmp_path, aim(), **options).train(resume_from_checkpoint=True)


def test_state_of_another_scope_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "steps": 8}
    trainer(lora(), tmp_path, aim(), **options).train()
    with pytest.raises(CheckpointError, match="does not fit the trainable parameters"):
        trainer(lora(), tmp_path, aim(scope="attention"), **options).train(resume_from_checkpoint=True)


# --- what it runs with


def test_mixed_precision_merges_float32_parameters(tmp_path):
    model, callback = lora(), aim()
    dtypes = set()
    model.get_base_model().model.layers[0].mlp.register_forward_hook(
        lambda *given: dtypes.add(given[2].dtype)
    )
    trainer(model, tmp_path, callback, bf16=True).train()
    assert len(callback.facts["merges"]) > 1
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_parameters_of_16_bits_are_merged_in_their_dtype(tmp_path):
    model, callback = llama().to(torch.bfloat16), aim()
    trainer(model, tmp_path, callback, steps=6).train()
    assert {t.dtype for t in callback.tensors["anchor"].values()} == {torch.bfloat16}
    assert same(callback.tensors["anchor"], copies(trainable(model)))


def test_encoder_decoder_models_are_merged_too(tmp_path):
    config = transformers.T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    callback = aim(scope="attention")
    trainer(model, tmp_path, callback, steps=6).train()
    assert callback.facts["merges"]
    names = set(callback.tensors["anchor"])
    assert any("EncDecAttention" in name for name in names)
    assert not any("DenseReluDense" in name for name in names)


@pytest.mark.parametrize(("option", "value", "named"), [
    ("deepspeed", {"zero_optimization": {"stage": 3}}, "DeepSpeed"),
    ("fsdp", "full_shard", "FSDP"),
    ("fsdp", True, "FSDP"),
    ("world_size", 2, "one process"),
    ("load_best_model_at_end", True, "load_best_model_at_end"),
])  # fmt: skip
def test_what_would_be_averaged_wrongly_is_refused_at_the_start(option, value, named):
    args = type("Args", (), {"deepspeed": None, "fsdp": None, "world_size": 1, option: value})()
    with pytest.raises(RunError, match=named):
        aim().on_train_begin(args, None, None, model=llama())


def test_a_diverged_run_says_so(tmp_path):
    def loss(model, batch):
        return model(**batch).loss * math.nan

    callback = AIMMergingCallback(memory(), settings(), collate=collate, loss=loss)
    with pytest.raises(ValueError, match="memory loss must be finite"):
        trainer(lora(), tmp_path, callback, steps=3).train()


# --- relatives


def test_sfa_averages_with_what_the_task_began_with(tmp_path):
    callback = SFACallback(SFASettings(period=0.5, back=0.25))
    callback.facts["tasks"] = 1
    model, plain, after, watched = lora(), lora(), Watch(), Watch()
    start = copies(trainable(model))
    trainer(model, tmp_path, callback, after, steps=4).train()
    trainer(plain, tmp_path, watched, steps=4).train()
    assert same(after.seen[0], watched.seen[0])
    for name, theta in start.items():
        torch.testing.assert_close(after.seen[1][name], 0.75 * watched.seen[1][name] + 0.25 * theta)
    assert not same(after.seen[3], watched.seen[3])


def test_sfa_leaves_the_first_task_alone(tmp_path):
    models = [lora(), lora()]
    trainer(models[0], tmp_path, SFACallback()).train()
    trainer(models[1], tmp_path).train()
    assert same(*(copies(trainable(model)) for model in models))


def test_ema_is_the_running_average_and_trains_on_undisturbed(tmp_path):
    callback = EMACallback(EMASettings(decay=0.9))
    model, after = lora(), Watch()
    expected = copies(trainable(model))
    trainer(model, tmp_path, callback, after, steps=5).train()
    for theta in after.seen:
        expected = {name: 0.9 * c + 0.1 * theta[name] for name, c in expected.items()}
    with callback.evaluating(model):
        for name, value in trainable(model).items():
            torch.testing.assert_close(value.detach(), expected[name])
    assert same(copies(trainable(model)), after.seen[-1])


def test_magmax_takes_the_largest_change_of_any_task(tmp_path):
    callback, model = MagMaxCallback(), lora()
    origin = copies(trainable(model))
    ends = []
    for task in (5, 9):
        trainer(model, tmp_path, callback, steps=5, data=rows(task)).train()
        ends.append(copies(trainable(model)))
    with callback.evaluating(model):
        found = copies(trainable(model))
    for name, theta in origin.items():
        first, second = (end[name] - theta for end in ends)
        vector = torch.where(second.abs() > first.abs(), second, first)
        torch.testing.assert_close(found[name], theta + vector)
        assert not torch.equal(found[name], ends[1][name]) or "lora_A" in name


def test_ewc_of_no_strength_is_sequential_and_of_great_strength_stands_still(tmp_path):
    moved, great = {}, 0.5 / 1e-3  # of the largest F below: half a step goes back
    for strength in (None, 0.0, great):
        model = lora()
        callbacks = [] if strength is None else [EWCCallback(EWCSettings(strength=strength, examples=4))]
        trainer(model, tmp_path, *callbacks, data=rows(3), steps=4, optim="sgd", learning_rate=1e-3).train()
        before = copies(trainable(model))
        if strength:
            fisher = callbacks[0].tensors["fisher"]
            assert all((f >= 0).all() for f in fisher.values())
            top = max(float(f.max()) for f in fisher.values())
            callbacks[0].settings = EWCSettings(strength=great / top)
        trainer(model, tmp_path, *callbacks, steps=4, data=rows(5), optim="sgd", learning_rate=1e-3).train()
        moved[strength] = copies(trainable(model)), distance(before, trainable(model))
    assert same(moved[None][0], moved[0.0][0])
    assert moved[great][1] < moved[0.0][1]


def test_the_fisher_is_the_mean_squared_gradient_of_single_examples(tmp_path):
    model, callback = lora(), EWCCallback(EWCSettings(examples=3))
    trainer(model, tmp_path, callback, steps=3, data=rows(5)).train()
    weights = trainable(model)
    name = next(n for n in weights if "lora_B" in n)
    model.eval()
    squares = [
        torch.autograd.grad(model(**collate([row])).loss, weights[name])[0] ** 2 for row in rows(5)[:3]
    ]
    torch.testing.assert_close(callback.tensors["fisher"][name], sum(squares) / 3)


def test_state_is_plain_json_and_safetensors(tmp_path):
    callback = aim()
    trainer(lora(), tmp_path, callback, save_strategy="steps", save_steps=5).train()
    files = {p.name for p in (tmp_path / "checkpoint-5").iterdir() if p.name.startswith("merging")}
    assert files == {"merging.json", "merging.safetensors"}
    assert json.loads((tmp_path / "checkpoint-5" / "merging.json").read_text())["controller"]["step"] == 5


def test_settings_reach_every_method():
    assert MagMaxCallback(Settings(scope="attention")).settings.scope == "attention"
