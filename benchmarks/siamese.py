"""One checkpoint or two memories? Base, fine-tuned, the best merge and IMSM with its ablations, on the ICD-10 case.

    python benchmarks/siamese.py --run runs/icd10 --out runs/siamese-bench

Gates are trained on the frozen adapter, on diagnosis codes that no suite asks for; rows "+ prose" on as many examples,
a third of them paragraphs of Python's manual, since codes alone give a gate no reason to keep anything else (the
packaged prose is what the suites score). Every row is
scored on the held-back items of the recipe's suites, with fewer of them (common.py), and decodes in turns with a
merge. Without --run the merge is tuned here (`gradient`, --trials evaluations). A line of results.jsonl per row and
seed: started again, it computes only what is missing. Sized for 25 minutes on one idle core.

    row               what is mixed                                  trained (arXiv 2412.17383)
    full              hidden states, gate that sees the prompt       W_A, W_B
    no query          hidden states, gate that does not              W_A, W_B
    hidden average    hidden states, each with weight one half       nothing
    logit average     logits, likewise                               nothing
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common import CASES, ICD10, SUITES, shares_cells, spread, table, tuned

from arma_mergekit.decode import footprints
from arma_mergekit.evals.base import Measured
from arma_mergekit.finetune import GateSettings, Settings, finetune
from arma_mergekit.plan import plan
from arma_mergekit.recipe import Recipe
from arma_mergekit.siamese import SiameseConfig, SiameseForCausalLM
from arma_mergekit.verdict import kept
from arma_mergekit.worker import Worker

PROSE = re.compile(r"[A-Z][^=<>_{}\[\]*`|]{150,600}\.")  # a paragraph that is no code
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Gate:
    """A siamese row: mode of its gate, and whether its data has prose too."""

    mode: str
    prose: bool = False

    @property
    def trained(self) -> bool:
        """Whether a seed makes a difference."""
        return SiameseConfig(self.mode).has_gate


GATES = {
    "full": Gate("full"),
    "full + prose": Gate("full", prose=True),
    "no query": Gate("no_query"),
    "hidden average": Gate("hidden_average"),
    "logit average": Gate("logit_average"),
}
ENDS = {"base": 0.0, "fine-tuned": 1.0}
MERGE = "best merge"


@dataclass(frozen=True)
class Bench:
    """What is the same for every row."""

    args: argparse.Namespace
    recipe: Recipe

    @classmethod
    def read(cls, args: argparse.Namespace) -> Bench:
        """From the command line."""
        recipe = CASES["icd10"].load(0, small=True)
        if args.limit is None:
            return cls(args, recipe)
        content = recipe.raw
        for (options,) in (task.values() for suite in content["evals"].values() for task in suite):
            options["limit"] = args.limit
        return cls(args, Recipe.parse(content, recipe.path))

    @property
    def adapter(self) -> str:
        """The fine-tuned side, as base+adapter."""
        return f"{self.recipe.base_model}+{ICD10 / 'adapter'}"

    @cached_property
    def worker(self) -> Worker:
        """The suites, and a live model for everything that is an average."""
        return Worker(self.recipe, SUITES)

    def run(self, name: str, seed: int) -> Row:
        """Held-back scores, mean gate by suite, and what answering costs."""
        model = self.model(name, seed)
        held: dict[str, Measured] = {}
        gates: dict[str, list[float]] = {suite: [] for suite in SUITES}
        for key, task in self.worker.tasks.items():
            watched = gates[key.partition("/")[0]]
            if isinstance(model, SiameseForCausalLM):
                model.body.watch = lambda gate, *_, to=watched: to.append(float(gate.mean()))
            held[key] = task.measure(model, self.worker.splits[key].held)
        if isinstance(model, SiameseForCausalLM):
            model.body.watch = None
        costs = footprints({"own": model, "merge": self.worker.live.model})
        return {
            "held": {key: m.to_json() for key, m in held.items()},
            "gates": {suite: sum(found) / len(found) for suite, found in gates.items() if found},
            "costs": {side: asdict(cost) for side, cost in costs.items()},
        }

    def model(self, name: str, seed: int) -> Any:
        """What a row is about, loaded or trained."""
        if name in GATES:
            return self.siamese(name, GATES[name], seed)
        live, tensors = self.worker.live, self.worker.loaded.tensors
        alphas = ENDS[name] if name in ENDS else self.merge()
        live.set([alphas[t] if isinstance(alphas, Mapping) else alphas for t in tensors])
        return live.model

    def merge(self) -> Mapping[str, float]:
        """Alphas of the best merge: of the run that was named, or found now."""
        if self.args.run is not None:
            planned = plan(Recipe.load(self.args.run / "tuned.yml")).check()
            return {tensor.name: tensor.alphas[0] for tensor in planned.tensors}
        recipe = self.recipe.with_tune(
            {"searchers": ["gradient"], "trials": self.args.trials, "keep_weak": self.args.limit is not None}
        )
        with tuned(recipe, self.args.out / "tune") as (_, result):
            return dict(result.best.alphas)

    def siamese(self, name: str, gate: Gate, seed: int) -> SiameseForCausalLM:
        """The siamese model of a row, its gate trained if it has one."""
        base, _, adapter = self.adapter.partition("+")
        if not gate.trained:
            return SiameseForCausalLM.from_parts(base, adapter, SiameseConfig(gate.mode))
        out = self.args.out / re.sub(r"\W+", "-", f"{name} {seed}")
        settings = Settings(
            self.adapter, self.data(gate.prose), "siamese", steps=self.args.steps, batch=self.args.batch,
            length=128, seed=seed, gate=GateSettings(gate.mode),
        )  # fmt: skip
        finetune(settings, out)
        return SiameseForCausalLM.from_pretrained(out).requires_grad_(False)

    def data(self, prose: bool) -> Path:
        """A file of as many examples as are trained on: codes, or two codes and then a passage."""
        count = self.args.steps * self.args.batch
        path = Path(self.args.out) / f"{'mixed' if prose else 'codes'}-{count}.jsonl"
        if not path.exists():
            sys.path.insert(0, str(ICD10))
            from train import codes

            examples = [{"prompt": asked, "answer": code} for asked, code in codes()[:count]]
            if prose:
                texts = [{"text": text} for text in passages()]
                mixed = random.Random(0)
                examples[2::3] = [mixed.choice(texts) for _ in examples[2::3]]
            path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return path


def passages() -> list[str]:
    """Paragraphs of Python's own manual, as the standard library has it: no suite has any of them."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    return [p for p in paragraphs if PROSE.fullmatch(p)]


def rows(results: Mapping[str, Sequence[Row]], weights: Mapping[str, float]) -> Iterator[list[str]]:
    """A line a row: median (range) over the seeds of its gate."""
    base, fine = ({k: Measured.from_json(m) for k, m in results[end][0]["held"].items()} for end in ENDS)
    for name, found in results.items():
        held = [{k: Measured.from_json(m) for k, m in row["held"].items()} for row in found]
        shares = [
            {suite: d.mean for suite, d in kept(scores, base, fine, weights).items()} for scores in held
        ]
        scores = [spread([one[key].score for one in held], ".3f") for key in base]
        costs = [row["costs"] for row in found]
        speed = [c["own"]["tokens_per_second"] / c["merge"]["tokens_per_second"] for c in costs]
        gates = [
            spread([row["gates"][s] for row in found], ".2f") if found[0]["gates"] else "" for s in SUITES
        ]
        yield [
            name, *shares_cells(shares), *scores, *gates,
            spread([c["own"]["tokens_per_second"] for c in costs], ".1f"), spread(speed, ".2f"),
            f"{costs[0]['own']['weight_bytes'] / 1e6:.0f}", f"{costs[0]['own']['cache_bytes'] / 1e3:.0f}",
        ]  # fmt: skip


def main() -> None:
    """Compute what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="of arma-tune, whose tuned.yml is the best merge")
    parser.add_argument("--trials", type=int, default=6, help="without --run: budget of the search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the gates")
    parser.add_argument("--only", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--steps", type=int, default=48, help="of training a gate")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int, help="items of each task, for a smaller run")
    parser.add_argument("--out", type=Path, default=Path("runs/siamese-bench"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench, journal = Bench.read(args), args.out / "results.jsonl"
    sizes = [str(args.run), args.trials, args.steps, args.batch, args.limit]
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {(row["name"], row["seed"]): row for row in known if row["sizes"] == sizes}
    seeds = {name: [0] for name in (*ENDS, MERGE)}
    seeds |= {name: args.seeds if GATES[name].trained else [0] for name in args.only}
    for name, seed in [(name, seed) for name, found in seeds.items() for seed in found]:
        if (name, seed) not in done:
            made = {"name": name, "seed": seed, "sizes": sizes, **bench.run(name, seed)}
            done[name, seed] = made
            with journal.open("a") as file:
                file.write(json.dumps(made) + "\n")
            print(name, seed, made["gates"], flush=True)
    results = {name: [done[name, seed] for seed in found] for name, found in seeds.items()}
    tasks = [key.partition("/")[2] for key in results["base"][0]["held"]]
    head = [
        "model", *(f"{suite} kept" for suite in SUITES), "harmonic mean", *tasks,
        *(f"mean gate, {suite}" for suite in SUITES), "tokens/s", "of a merge's", "weights, MB", "cache, kB/token",
    ]  # fmt: skip
    weights = {
        f"{suite}/{spec.type}:{spec.data.stem}": spec.weight
        for suite in SUITES
        for spec in bench.recipe.evals[suite]
    }
    print(f"\n{table(head, rows(results, weights))}")


if __name__ == "__main__":
    main()
