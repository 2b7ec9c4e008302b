"""What do adapters forget? Two tasks in sequence on SmolLM2-135M: every weight, LoRA, CURLoRA, CorDA, OSF.

    git clone https://github.com/cmnfriend/O-LoRA
    python benchmarks/continual_adapters.py --data O-LoRA/CL_Benchmark
    python benchmarks/continual_adapters.py --data O-LoRA/CL_Benchmark --table      # what is there, at any time

For each method and seed: train on the first task, score both and general prose, train on the second (the same adapter
goes on; OSF protects what it learned by a new decomposition), score again. Accuracy is of the likeliest label;
general NLL that of recipes/icd10/data/general.jsonl. A line of results.jsonl per method and seed: started again, it
computes only what is missing. Sized for an hour of one core's time; --only and --steps for less. Seconds a step
are of the processor's time, so that what else runs on the machine does not count. Weights are float32, products
bfloat16 (the processor has instructions for them), for every method.

    method    trained                                                                 source
    full      every weight
    lora      A, B of rank r                                                          arXiv 2106.09685
    curlora   U (r, r), at the paper's learning rate and at ten times it              arXiv 2408.14572
    corda     A, B along what general texts use least (knowledge-preserving mode)     arXiv 2406.05223
    osf       the lower half of the singular directions, then the lower quarter       arXiv 2504.07097
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads must not spin

import numpy as np
import torch
from common import ICD10, spread, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from arma_mergekit.continual.data import Task, collator, encode, read_task
from arma_mergekit.continual.plan import Plan
from arma_mergekit.continual.score import score
from arma_mergekit.evals.tasks import NllTask, text_items

TARGETS = ["q_proj", "k_proj", "v_proj"]  # the paper's; the same for every adapter
RANK = 16
TEXTS = 12  # of general prose that are scored; the others are for CorDA
KEPT = (0.5, 0.75)  # share of OSF's singular directions that is protected, per task
Row = Mapping[str, Any]


def half() -> torch.autocast:
    """Matrix products in bfloat16, weights in float32: the same for every method."""
    return torch.autocast("cpu", torch.bfloat16)


@dataclass(frozen=True)
class Method:
    """``begin``: model, task number, texts to what is trained; ``lr``: Adam's."""

    begin: Callable[[Any, int, Sequence[torch.Tensor]], Any]
    lr: float


def full(model: Any, task: int, texts: Sequence[torch.Tensor]) -> Any:
    return model.requires_grad_(True)


def lora(model: Any, task: int, texts: Sequence[torch.Tensor]) -> Any:
    from peft import LoraConfig, get_peft_model

    return (
        model
        if task
        else get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    )


def curlora(model: Any, task: int, texts: Sequence[torch.Tensor]) -> Any:
    from peft import get_peft_model

    from arma_mergekit.continual.curlora import CURLoRAConfig

    seed = torch.initial_seed()
    return model if task else get_peft_model(model, CURLoRAConfig(r=RANK, target_modules=TARGETS, seed=seed))


def corda(model: Any, task: int, texts: Sequence[torch.Tensor]) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    if task:
        return model
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )  # fmt: skip

    @torch.no_grad()
    def run() -> None:
        for tokens in texts:
            model(input_ids=tokens)

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def osf(model: Any, task: int, texts: Sequence[torch.Tensor]) -> Any:
    from peft import OSFConfig, get_peft_model

    plain = model.merge_and_unload() if task else model
    return get_peft_model(plain, OSFConfig(target_modules=TARGETS, effective_rank=KEPT[task]))


METHODS = {  # rates several times the usual, since there are few steps
    "full": Method(full, 1e-4),
    "lora": Method(lora, 1e-3),
    "curlora": Method(curlora, 2.5e-4),
    "curlora x10": Method(curlora, 2.5e-3),
    "corda": Method(corda, 1e-3),
    "osf": Method(osf, 1e-4),
}


@dataclass(frozen=True)
class Bench:
    """What is the same for every method and seed. ``general``: scored; ``texts``: other ones, for CorDA (1, tokens)."""

    base: Path
    tokenizer: Any
    tasks: tuple[Task, ...]
    general: NllTask
    texts: Sequence[torch.Tensor]
    steps: int
    batch: int
    length: int

    @classmethod
    def read(cls, args: argparse.Namespace) -> Bench:
        """From the command line."""
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        folders = [
            {"folder": str(args.data.resolve() / name), "limit_test": args.items} for name in args.tasks
        ]
        plan = Plan.parse(
            {"model": str(args.base), "tasks": folders, "train": {"steps": args.steps}}, Path("plan.yml")
        )
        tasks = tuple(read_task(plan, spec) for spec in plan.tasks)
        prose = text_items(tokenizer, ICD10 / "data" / "general.jsonl", max_length=200)
        texts = [torch.tensor([item.rows[0].tokens]) for item in prose[TEXTS:]]
        general = NllTask("general", prose[:TEXTS])
        return cls(args.base, tokenizer, tasks, general, texts, args.steps, args.batch, args.length)

    def load(self) -> Any:
        """The base."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    @cached_property
    def untouched(self) -> dict[str, float]:
        """The base's scores."""
        return self.scores(self.load())

    def run(self, method: Method, seed: int) -> Row:
        """Scores after each task, what was trained, and seconds a step."""
        model = self.load()
        stages, seconds, trained = [self.untouched], [], []
        for number, task in enumerate(self.tasks):
            torch.manual_seed(seed)
            model = method.begin(model, number, self.texts)
            weights = [p for p in model.parameters() if p.requires_grad]
            trained.append(sum(p.numel() for p in weights))
            seconds.append(self.train(model, weights, task, method.lr, seed))
            stages.append(self.scores(model))
        return {"stages": stages, "trained": trained, "seconds_per_step": seconds}

    def train(self, model: Any, weights: Sequence[Any], task: Task, lr: float, seed: int) -> float:
        """AdamW with a cosine; returns seconds of processor time a step."""
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        model.train()
        started = time.process_time()
        for features in self.batches(task, seed):
            with half():
                loss = model(**features).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return (time.process_time() - started) / self.steps

    def batches(self, task: Task, seed: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """One for every step, in an order of the seed."""
        collate = collator(0)
        order = np.random.default_rng(seed).permutation(len(task.train))
        for step in range(self.steps):
            picked = np.take(order, range(step * self.batch, (step + 1) * self.batch), mode="wrap")
            yield collate([encode(self.tokenizer, task.train[k], self.length, False) for k in picked])

    def scores(self, model: Any) -> dict[str, float]:
        """Accuracy on every task, and nats per token of general prose."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        with half():
            found = {t.name: score(model, self.tokenizer, t, self.length, False)["score"] for t in self.tasks}
            return {**found, "general": -self.general.measure(plain.eval(), range(TEXTS)).score}


def rows(results: Mapping[str, Sequence[Row]], tasks: Sequence[Task]) -> Iterator[list[str]]:
    """A line a method: median (range) over the seeds."""
    first, second = (task.name for task in tasks)
    for name, found in results.items():
        stages = list(zip(*(row["stages"] for row in found), strict=True))

        def cell(stage: int, key: str, form: str, stages: Any = stages) -> str:
            return spread([scores[key] for scores in stages[stage]], form)

        yield [
            name, f"{found[0]['trained'][0]:,}", f"{len(found)}",
            cell(1, first, ".0%"), cell(2, first, ".0%"), cell(2, second, ".0%"),
            cell(1, "general", ".3f"), cell(2, "general", ".3f"),
            spread([s for row in found for s in row["seconds_per_step"]], ".2f"),
        ]  # fmt: skip


def main() -> None:
    """Compute what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder CL_Benchmark")
    parser.add_argument("--tasks", nargs=2, default=["TC/agnews", "TC/dbpedia"])
    parser.add_argument("--base", type=Path, default=ICD10 / "models" / "base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40, help="of each task")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=96, help="tokens of an example")
    parser.add_argument("--items", type=int, default=40, help="test items of each task")
    parser.add_argument("--out", type=Path, default=Path("runs/continual-adapters"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    bench, journal = Bench.read(args), args.out / "results.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = [args.tasks, str(args.base), args.steps, args.batch, args.length, args.items]
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {
        (row["method"], row["seed"]): row
        for row in known
        if row["sizes"] == sizes and row["lr"] == METHODS[row["method"]].lr
    }
    for seed in [] if args.table else args.seeds:
        for name in args.only:
            if (name, seed) not in done:
                asked = {"method": name, "seed": seed, "lr": METHODS[name].lr, "sizes": sizes}
                made = {**asked, **bench.run(METHODS[name], seed)}
                done[name, seed] = made
                with journal.open("a") as file:
                    file.write(json.dumps(made) + "\n")
                print(name, seed, made["stages"], flush=True)
    first, second = (task.name for task in bench.tasks)
    head = [
        "method", "trained", "seeds", f"{first} after 1", f"{first} after 2", f"{second} after 2",
        "general NLL after 1", "general NLL after 2", "CPU s/step",
    ]  # fmt: skip
    if not done:
        parser.error(f"{journal} has no result of these sizes; leave --table out")
    base = next(iter(done.values()))["stages"][0]
    print(f"\nbase: {', '.join(f'{key} {value:.3f}' for key, value in base.items())}\n")
    results = {name: [row for (method, _), row in done.items() if method == name] for name in args.only}
    print(table(head, rows({name: found for name, found in results.items() if found}, bench.tasks)))


if __name__ == "__main__":
    main()
