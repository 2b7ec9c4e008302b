"""A plan carried out: every method trains the tasks in order and is tested on every task after each.

It knows trainers, models and files; no command line and no pages. What was finished is in the journal (trials.jsonl)
and never done again; a task that was killed goes on from its last checkpoint. On disk, for each method, order and seed:

    <sequence>/after-<i>/   trainable parameters, the method's state and the memory after task i; the last one only
    <sequence>/task-<i>/    checkpoints inside task i, until it is over
    <sequence>/model/       what the method hands over in the end
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from arma_mergekit.continual import metrics
from arma_mergekit.continual.data import Task, collator, encode, paths, read_task
from arma_mergekit.continual.memory import Memory
from arma_mergekit.continual.plan import Method, Plan, slug
from arma_mergekit.continual.settings import Settings
from arma_mergekit.digest import DigestMemo, sha256_of
from arma_mergekit.errors import RunError
from arma_mergekit.fingerprint import files, flat
from arma_mergekit.trials import Journal

__all__ = ["ContinualRun", "Progress", "summary"]

Record: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[str], None]

FREE = ("methods", "seeds", "orders", "alone", "save_model")  # may grow from one start of a run to the next
IN_RECORDS = ("dataset", "prompt", "answer", "splits")  # of a task; what they lead to is compared instead
ALONE = Method(name="alone", kind="sequential", settings=Settings())


@dataclass(frozen=True)
class Course:
    """One method on one order with one seed."""

    method: Method
    order: tuple[str, ...]
    number: int  # of the order
    seed: int

    @property
    def key(self) -> str:
        """Its name in the journal and on disk."""
        return f"{slug(self.method.name)}-order{self.number}-seed{self.seed}"


class ContinualRun:
    """A run in ``out``. ``progress`` is told a line at a time."""

    def __init__(self, plan: Plan, out: Path, progress: Progress) -> None:
        self.plan, self.out, self.progress = plan, out, progress
        self.tasks = {spec.name: read_task(plan, spec) for spec in plan.tasks}

    def run(self) -> Record:
        """All sequences; returns the summary."""
        with closing(Journal(self.out / "trials.jsonl", self._facts())) as self.journal:
            self._load_tokenizer()
            for seed in self.plan.seeds:
                if self.plan.alone:
                    for number, name in enumerate(self.tasks):
                        self._sequence(Course(ALONE, (name,), number, seed))
                for method in self.plan.methods:
                    for number, order in enumerate(self.plan.sequences):
                        self._sequence(Course(method, order, number, seed))
            if self.plan.evaluate == "all":
                self.journal.once("before", self._before)
            return summary(self.plan, self.journal)

    def _facts(self) -> Record:
        free = dict.fromkeys(FREE, True) | {"tasks": {"__all__": set(IN_RECORDS)}}
        content = self.plan.model_dump(mode="json", exclude=free)
        facts: Record = {f"plan: {name}": value for name, value in flat(content)}
        for spec in self.plan.tasks:
            for path in paths(self.plan, spec):
                facts[f"data {spec.name}: {path.name}"] = sha256_of(path)
            if spec.dataset is not None:
                task = self.tasks[spec.name]
                text = json.dumps([list(task.train), list(task.test)], sort_keys=True)
                facts[f"data {spec.name}: records"] = hashlib.sha256(text.encode()).hexdigest()
        directory = self.plan.place(self.plan.model)
        if not (directory / "config.json").exists():
            raise RunError(
                f"{directory} is no model directory (no config.json); give one as `model` in {self.plan._path}."
            )
        with closing(DigestMemo.default()) as memo:
            return facts | {f"model: {p.name}": memo.digest(p) for p in files(directory)}

    def _load_tokenizer(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from arma_mergekit.load import LOCAL, readable

        path = self.plan.place(self.plan.model)
        with readable(f"The tokenizer of {path}", "copy its files from the model it belongs to"):
            self.tokenizer = AutoTokenizer.from_pretrained(str(path), **LOCAL)
            self.encoder_decoder = bool(AutoConfig.from_pretrained(str(path), **LOCAL).is_encoder_decoder)
        self.encode = partial(
            encode,
            self.tokenizer,
            max_length=self.plan.train.max_length,
            encoder_decoder=self.encoder_decoder,
        )
        self.collate = collator(self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)

    def _sequence(self, sequence: Course) -> None:
        """Train and test one task after another, from where the journal ends."""
        self._check_settings(sequence)
        done = self.journal.under(sequence.key)
        if len(done) < len(sequence.order):
            live = Live(self, sequence)
            for i in range(len(done), len(sequence.order)):
                self.journal.append(f"{sequence.key}/{i}", live.task(i))

    def _check_settings(self, sequence: Course) -> None:
        told: Record = {"order": list(sequence.order), "kind": sequence.method.kind}
        told |= {"settings": sequence.method.settings.model_dump(mode="json")}
        found = self.journal.once(f"{sequence.key}/settings", lambda: told)
        if {key: found[key] for key in told} != told:
            raise RunError(
                f"{self.out} holds {sequence.key} with other settings or another order; give the method another name, "
                "or another --out."
            )

    def _before(self) -> Record:
        self.progress("Testing the model as it is")
        model = build(self.plan, self.encoder_decoder, 0)
        return {"scores": {name: self.test(model, name)["score"] for name in self.tasks}}

    def test(self, model: Any, name: str) -> Record:
        """Score of a task's test records, with its standard error."""
        from arma_mergekit.continual.score import score

        return score(
            model, self.tokenizer, self.tasks[name], self.plan.train.max_length, self.encoder_decoder
        )


class Live:
    """A sequence with its model in memory."""

    def __init__(self, run: ContinualRun, sequence: Course) -> None:
        self.run, self.sequence, self.plan = run, sequence, run.plan
        self.directory = run.out / sequence.key
        self.memory = Memory(run.plan.memory_share, sequence.seed)
        self.model = build(run.plan, run.encoder_decoder, sequence.seed)
        self.callback = make_callback(sequence.method, self.memory, self._collate, run.plan)

    def _collate(self, records: Sequence[Record]) -> Any:
        return self.run.collate([self.run.encode(record) for record in records])

    def task(self, i: int) -> Record:
        """Train task i (unless that was done) and test; returns the record."""
        name, after = self.sequence.order[i], self.directory / f"after-{i}"
        if after.exists():
            self._load(after)
        else:
            before = self.directory / f"after-{i - 1}"
            if before.exists():
                self._load(before)
            self.run.progress(f"{self.sequence.key}: training {name} ({i + 1} of {len(self.sequence.order)})")
            facts = self._train(i, self.run.tasks[name])
            self.memory.add(name, self.run.tasks[name].train)
            self._save(after, facts)
            shutil.rmtree(before, ignore_errors=True)
            shutil.rmtree(self.directory / f"task-{i}", ignore_errors=True)
        facts = json.loads((after / "facts.json").read_text(encoding="utf-8"))
        record: Record = facts | {"task": name, **self._test(i)}
        if i == len(self.sequence.order) - 1:
            self._hand_over()
        return record

    def _train(self, i: int, task: Task) -> Record:
        """Train one task, from its last checkpoint if there is one."""
        from transformers import Trainer
        from transformers.trainer_callback import PrinterCallback

        started, out = time.perf_counter(), self.directory / f"task-{i}"
        trainer = Trainer(
            self.model,
            arguments(self.plan, out, self.sequence.seed),
            data_collator=self.run.collate,
            train_dataset=[self.run.encode(record) for record in task.train],
            callbacks=[self.callback],
        )
        trainer.remove_callback(PrinterCallback)
        self.callback.seconds = self.callback.replay_seconds = 0.0
        trainer.train(resume_from_checkpoint=last_checkpoint(out))
        spent = time.perf_counter() - started
        return {
            "steps": trainer.state.global_step,
            "replayed": self.callback.facts.get("replayed", 0),
            "merges": self.callback.facts.get("merges", []),
            "seconds": round(spent, 3),
            "callback_seconds": round(self.callback.seconds, 3),
            "replay_seconds": round(self.callback.replay_seconds, 3),
            "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }

    def _test(self, i: int) -> Record:
        seen = self.sequence.order[: i + 1]
        names = self.sequence.order if self.plan.evaluate == "all" else seen
        started = time.perf_counter()
        with self.callback.evaluating(self.model):
            found = {name: self.run.test(self.model, name) for name in names}
        shown = ", ".join(f"{name} {found[name]['score']:.3f}" for name in seen)
        self.run.progress(f"{self.sequence.key}: {shown}")
        return {
            "scores": {name: f["score"] for name, f in found.items()},
            "stderr": {name: f["stderr"] for name, f in found.items()},
            "test_seconds": round(time.perf_counter() - started, 3),
        }

    def _save(self, directory: Path, facts: Record) -> None:
        """Everything the next task needs, whole or not at all."""
        from arma_mergekit.continual.weights import save, trainable

        draft = directory.with_name(f".{directory.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save(draft / "weights.safetensors", trainable(self.model))
        self.callback.save(draft)
        self.memory.save(draft / "memory.jsonl")
        (draft / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        draft.rename(directory)

    def _load(self, directory: Path) -> None:
        from arma_mergekit.continual.weights import load, overwrite, trainable

        overwrite(trainable(self.model), load(directory / "weights.safetensors"))
        self.callback.load(directory)
        self.memory.load(directory / "memory.jsonl")

    def _hand_over(self) -> None:
        if self.plan.save_model and self.sequence.method is not ALONE:
            with self.callback.evaluating(self.model):
                self.model.save_pretrained(self.directory / "model")
            self.run.tokenizer.save_pretrained(self.directory / "model")


def build(plan: Plan, encoder_decoder: bool, seed: int) -> Any:
    """The plan's model in its dtype, with a fresh adapter if it asks for one."""
    import torch

    from arma_mergekit.load import LOCAL, build_model, readable

    path = plan.place(plan.model)
    torch.manual_seed(seed)
    dtype = getattr(torch, plan.dtype)
    if encoder_decoder:
        from transformers import AutoModelForSeq2SeqLM

        with readable(f"The model {path}", "correct its config.json"):
            model = AutoModelForSeq2SeqLM.from_pretrained(
                str(path), dtype=dtype, use_safetensors=True, **LOCAL
            )
    else:
        model = build_model(path, dtype)
    if torch.cuda.is_available():
        model.to("cuda")
    return model if plan.adapter is None else with_lora(model, plan)


def with_lora(model: Any, plan: Plan) -> Any:
    """The model with a fresh LoRA adapter; nothing else trains."""
    from peft import LoraConfig

    from arma_mergekit.load import adapted

    adapter = plan.adapter
    assert adapter is not None
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    return adapted(model, config, plan.model)


def make_callback(method: Method, memory: Memory, collate: Any, plan: Plan) -> Any:
    """The method's callback; sequential training has one that only keeps count."""
    from arma_mergekit.continual.baselines import EMACallback, EWCCallback, MagMaxCallback, SFACallback
    from arma_mergekit.continual.callback import AIMMergingCallback, MergingCallback, ReplayCallback

    plain = {
        "sequential": MergingCallback,
        "sfa": SFACallback,
        "ema": EMACallback,
        "magmax": MagMaxCallback,
        "ewc": EWCCallback,
    }
    if method.kind in plain:
        return plain[method.kind](method.settings)
    budget = plan.train.steps if plan.train.count_replay else None
    rehearsing = {"replay": ReplayCallback, "aimmerging": AIMMergingCallback}[method.kind]
    return rehearsing(memory, method.settings, collate=collate, budget_steps=budget)


def arguments(plan: Plan, out: Path, seed: int) -> Any:
    """The trainer's arguments for one task."""
    from transformers import TrainingArguments

    train = plan.train
    return TrainingArguments(
        str(out),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        seed=seed,
        save_steps=train.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def last_checkpoint(out: Path) -> str | None:
    """The last checkpoint of a task that was written whole (the method's state comes last)."""
    whole = [p.parent for p in out.glob("checkpoint-*/merging.json")]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


# --- what came out


def summary(plan: Plan, journal: Journal) -> Record:
    """The result as JSON: matrices, metrics with their definitions, merges, times."""
    runs = [
        described(plan, journal, Course(method, order, number, seed))
        for method in plan.methods
        for number, order in enumerate(plan.sequences)
        for seed in plan.seeds
    ]
    return {
        "plan": str(plan._path),
        "model": plan.model,
        "tasks": [task.name for task in plan.tasks],
        "orders": [list(order) for order in plan.sequences],
        "seeds": list(plan.seeds),
        "steps": plan.train.steps,
        "memory_share": plan.memory_share,
        "before": journal["before"]["scores"] if "before" in journal else None,
        "definitions": metrics.DEFINITIONS,
        "methods": [
            overall(method.name, [r for r in runs if r["method"] == method.name]) for method in plan.methods
        ],
        "runs": runs,
    }


def described(plan: Plan, journal: Journal, sequence: Course) -> Record:
    """One sequence: its matrix (rows: after each task; columns: the tasks in its order), metrics and merges."""
    order, found = sequence.order, journal.under(sequence.key)
    records = [found[i] for i in range(len(order))]
    matrix = [[record["scores"].get(name) for name in order] for record in records]
    return {
        "method": sequence.method.name,
        "order": sequence.number,
        "seed": sequence.seed,
        "tasks": list(order),
        "matrix": matrix,
        "stderr": [[record["stderr"].get(name) for name in order] for record in records],
        "metrics": measured(matrix, *references(plan, journal, sequence)),
        "merges": [record["merges"] for record in records],
        "steps": [record["steps"] for record in records],
        "replayed": [record["replayed"] for record in records],
        "overhead": overhead(records),
        "seconds": round(sum(r["seconds"] + r["test_seconds"] for r in records), 1),
    }


def references(
    plan: Plan, journal: Journal, sequence: Course
) -> tuple[list[float] | None, list[float] | None]:
    """Scores of each task trained alone, and before training; None if they were not measured."""
    numbers = {task.name: k for k, task in enumerate(plan.tasks)}
    keys = {name: f"{Course(ALONE, (name,), numbers[name], sequence.seed).key}/0" for name in sequence.order}
    known = all(key in journal for key in keys.values())
    alone = [journal[keys[name]]["scores"][name] for name in sequence.order] if known else None
    before = [journal["before"]["scores"][name] for name in sequence.order] if "before" in journal else None
    return alone, before


def measured(
    matrix: metrics.Matrix, alone: list[float] | None, before: list[float] | None
) -> dict[str, float]:
    """Every metric that the scores allow, by its name in `metrics.DEFINITIONS`."""
    found = {
        "OP": metrics.overall_performance(matrix),
        "BWT": metrics.backward_transfer(matrix),
        "forgetting": metrics.forgetting(matrix),
        "learning accuracy": metrics.learning_accuracy(matrix),
        "average accuracy": metrics.average_accuracy(matrix),
    }
    if alone is not None:
        found["FWT"] = metrics.forward_transfer(matrix, alone)
    if before is not None:
        found["zero-shot transfer"] = metrics.zero_shot_transfer(matrix, before)
    return found


def overhead(records: Sequence[Mapping[str, Any]]) -> float:
    """The callback's share of training time, replay excluded, over the tasks after the first."""
    later = records[1:] or records
    own = sum(r["callback_seconds"] for r in later)
    rest = sum(r["seconds"] - r["replay_seconds"] for r in later) - own
    return round(own / rest, 4) if rest > 0 else 0.0


def overall(name: str, runs: Sequence[Mapping[str, Any]]) -> Record:
    """Mean and standard deviation of each metric over orders and seeds."""
    known = [key for key in runs[0]["metrics"] if all(key in run["metrics"] for run in runs)]
    columns = {key: [run["metrics"][key] for run in runs] for key in known}
    return {
        "name": name,
        "runs": len(runs),
        "mean": {key: fmean(values) for key, values in columns.items()},
        "std": {key: stdev(values) if len(values) > 1 else None for key, values in columns.items()},
        "overhead": fmean(run["overhead"] for run in runs),
        "merges": fmean(sum(map(len, run["merges"])) for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
    }
