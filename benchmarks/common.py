"""What the benchmarks share: two real cases, the tuner run on them, and tables in markdown.

case     base                    fine-tuned on (LoRA r 8, all linear layers)   forgets
icd10    SmolLM2-135M-Instruct   diagnosis to ICD-10-CM code                   words, capitals, prose
topics   the same                text to topic (DBpedia, AG News)              words, prose
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads must not spin

import numpy as np
import yaml

from arma_mergekit.cli.log import Log
from arma_mergekit.recipe import Recipe
from arma_mergekit.results import write_results
from arma_mergekit.run import open_run
from arma_mergekit.tune import Result, Tuner

__all__ = ["CASES", "SUITES", "Case", "Shares", "label", "shares", "shares_cells", "spread", "table", "tuned"]

ROOT = Path(__file__).resolve().parent.parent
ICD10 = ROOT / "recipes" / "icd10"
SUITES = ("general", "domain")
Shares = Mapping[
    str, float
]  # suite to share kept on held-back items: 0 the worse of base and fine-tuned, 1 the better


@dataclass(frozen=True)
class Case:
    """A domain that was learned at the price of other abilities.

    ``recipe``: names the suites, and the fine-tune of seed 0; ``models`` holds the checkpoints, ``adapters`` what was
    trained here; ``train``: options of recipes/icd10/train.py; ``small``: options of tasks, by the name of their data,
    with which one evaluation takes about 2,700 forward tokens.
    """

    recipe: Path
    models: Path
    adapters: Path
    train: tuple[str, ...]
    small: Mapping[str, Mapping[str, int]]

    def fine_tune(self, seed: int) -> Path:
        """The fine-tuned checkpoint of a seed, trained and folded if it is not there."""
        committed = self.recipe.parent / "adapter"
        adapter = committed if seed == 0 and committed.exists() else self.adapters / f"adapter-{seed}"
        merged = self.models / (f"finetuned-{seed}" if seed else "finetuned")
        if not adapter.exists():
            script("train.py", "--seed", str(seed), "--out", str(adapter), *self.train)
        if not merged.exists():
            script("build_finetuned.py", "--adapter", str(adapter), "--out", str(merged))
        return merged

    def load(self, seed: int, small: bool = False, **tune: Any) -> Recipe:
        """The recipe with the fine-tune of this seed and these keys of `tune`; ``small``: with fewer items."""
        content = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        content["base_model"] = str(ROOT / content["base_model"])
        content["models"][0]["model"] = str(self.fine_tune(seed))
        if small:
            for (options,) in (task.values() for suite in content["evals"].values() for task in suite):
                options.update(self.small.get(Path(options["data"]).stem, {}))
            tune = {"holdout": HOLDOUT, **tune}
        return Recipe.parse(content, self.recipe).with_tune(tune)


TOPICS = ROOT / "runs" / "topics"
HOLDOUT = 0.67  # of small runs: few items to search on leave many for the verdict
SHORT = {"general": {"max_length": 96}}
CASES = {
    "icd10": Case(
        ICD10 / "recipe.yml", ICD10 / "models", ROOT / "runs" / "icd10-bench", (),
        {**SHORT, "icd10": {"limit": 190}, "icd10_choice": {"limit": 150}},
    ),
    "topics": Case(
        ROOT / "benchmarks" / "topics" / "recipe.yml", TOPICS / "models", TOPICS,
        ("--text", str(TOPICS / "data" / "train.jsonl")),
        {**SHORT, "topics": {"limit": 110}, "topics_choice": {"limit": 120}},
    ),
}  # fmt: skip


def script(name: str, *options: str) -> None:
    """Run a script of recipes/icd10."""
    subprocess.run([sys.executable, str(ICD10 / name), *options], check=True)


@contextlib.contextmanager
def tuned(recipe: Recipe, out: Path) -> Iterator[tuple[Tuner, Result]]:
    """A finished run: tuned now, or what its journal says. Runs beside it share its evaluation cache."""
    with open_run(recipe, SUITES, out, Log(), out.parent / "evals.sqlite") as tuner:
        result = tuner.run()
        write_results(tuner, result, out)
        yield tuner, result


def shares(result: Result) -> dict[str, Shares]:
    """Shares kept of every candidate."""
    return {name: {suite: d.mean for suite, d in row.items()} for name, row in result.shares.items()}


def label(name: str) -> str:
    """What a candidate is a repetition of: `bayes seed 1` of bayes, `one knob, everything 0.5` of the knob."""
    return re.sub(r"^(one knob, \w+) .*|(.*) seed \d+$", r"\1\2", name)


def shares_cells(found: Sequence[Shares]) -> list[str]:
    """Cells of a row: share kept of each suite, and their harmonic mean."""
    columns = [[s[suite] for s in found] for suite in SUITES]
    columns.append([2 * g * d / (g + d) if min(g, d) > 0 else 0.0 for g, d in zip(*columns, strict=True)])
    return [spread(column, ".0%") for column in columns]


def spread(values: Sequence[float], form: str) -> str:
    """Median and range: `82% (79% to 86%)`; a single value as it is."""
    low, middle, high = (format(float(f(values)), form) for f in (np.min, np.median, np.max))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
