"""Forgetting over four tasks in sequence: AIMMerging against its baselines, at equal optimiser steps.

    python benchmarks/continual.py --data CL_Benchmark                     # two hours of one core; in two processes:
    python benchmarks/continual.py --data CL_Benchmark --order 0 & python benchmarks/continual.py --data ... --order 1
    python benchmarks/continual.py --data CL_Benchmark --seeds 0,1,2       # more seeds add to what is there
    python benchmarks/continual.py --data CL_Benchmark --alone             # trains each task alone too, for FWT
    python benchmarks/continual.py --table                                 # what is there, as Markdown; at any time

The data are O-LoRA's CL_Benchmark (github cmnfriend/O-LoRA), or a sample of it in its layout: folders
`<group>/<task>` with train.json, test.json and labels.json. They have terms of their own and are not part of this
repository. The model is SmolLM2-135M (recipes/icd10/build_base.py), LoRA on all linear layers, at most 96 tokens; rank,
alpha and the constant learning rate are those of O-LoRA's scripts. Every method takes the same number of optimiser
steps per task, replay included. Each order is a run of `arma continual` in runs/continual/order-<k>, started again
where it stopped; the table takes in every method that is finished.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads must not spin

import yaml
from transformers.utils import logging

from arma_mergekit.continual.plan import Plan
from arma_mergekit.continual.run import ContinualRun, overall
from arma_mergekit.report.continual import render, standalone
from arma_mergekit.results import write_files

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "continual"
FOLDERS = ("TC/dbpedia", "SC/amazon", "TC/agnews", "SC/SST-2")
ORDERS = (("dbpedia", "amazon", "agnews", "SST-2"), ("SST-2", "agnews", "amazon", "dbpedia"))
METHODS: tuple[Any, ...] = (  # those that the question is about first
    "sequential",
    "replay",
    {"name": "AIMMerging", "aimmerging": {}},
    {"name": "AIMMerging published", "aimmerging": {"controller": "published"}},
    {"name": "AIMMerging attention only", "aimmerging": {"scope": "attention"}},
    {"ewc": {"examples": 32}},
    "sfa",
)
METRICS = ("OP", "BWT", "FWT", "forgetting", "learning accuracy")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def content(args: argparse.Namespace, order: int, methods: Sequence[Any]) -> dict[str, Any]:
    """The plan of one order."""
    return {
        "model": str(ROOT / "recipes" / "icd10" / "models" / "base"),
        "dtype": "bfloat16",
        "adapter": {"rank": 8, "alpha": 32, "targets": LINEAR},
        "tasks": [
            {"folder": str(args.data.resolve() / folder), "limit_test": args.test} for folder in FOLDERS
        ],
        "train": {
            "steps": args.steps,
            "batch": 2,
            "lr": 1e-3,
            "schedule": "constant",
            "max_length": 96,
            "save_steps": 40,
        },
        "methods": list(methods),
        "orders": [list(ORDERS[order])],
        "seeds": [int(seed) for seed in args.seeds.split(",")],
        "alone": args.alone,
        "evaluate": "seen",
        "save_model": False,
    }


def carry_out(out: Path, plan: dict[str, Any]) -> None:
    """Run or go on, and write plan, summary and report."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plan.yml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    found = ContinualRun(Plan.load(path), out, lambda text: print(text, flush=True)).run()
    texts = {"summary.json": json.dumps(found, indent=2) + "\n"}
    write_files(out, texts | {"report.html": render(found), "matrices.svg": standalone(found)})


def table(out: Path) -> str:
    """Mean ± standard deviation over orders and seeds, of all finished orders."""
    summaries = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("order-*/summary.json"))
    ]
    runs = [run for summary in summaries for run in summary["runs"]]
    lines = [
        f"| method | {' | '.join(METRICS)} | merges | callback | runs |",
        "|---|" + "---|" * (len(METRICS) + 3),
    ]
    for name in dict.fromkeys(run["method"] for run in runs):
        row = overall(name, [run for run in runs if run["method"] == name])
        cells = [cell(row, metric) for metric in METRICS]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {row['merges']:g} | {row['overhead']:.1%} | {row['runs']} |"
        )
    return "\n".join(lines)


def cell(row: Mapping[str, Any], metric: str) -> str:
    """`0.713 ± 0.020`; a dash where it was not measured."""
    if metric not in row["mean"]:
        return "-"
    std = row["std"][metric]
    return f"{row['mean'][metric]:.3f}" + ("" if std is None else f" ± {std:.3f}")


def main() -> None:
    """Run the orders asked for, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CL_Benchmark")
    parser.add_argument("--order", type=int, choices=range(len(ORDERS)), help="one order only")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps a task")
    parser.add_argument("--test", type=int, default=40, help="test items a task")
    parser.add_argument("--alone", action="store_true", help="train each task alone too, for FWT")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    if not args.table and args.data is None:
        parser.error("--data is needed, or --table")
    logging.disable_progress_bar()
    orders = [] if args.table else range(len(ORDERS)) if args.order is None else [args.order]
    for order in orders:
        for count in range(1, len(METHODS) + 1):  # a method at a time, so that the table grows as they finish
            carry_out(args.out / f"order-{order}", content(args, order, METHODS[:count]))
    print(table(args.out))


if __name__ == "__main__":
    main()
