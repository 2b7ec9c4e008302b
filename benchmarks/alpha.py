"""Does `find_optimal_alpha` find the optimum? On the real case, against a fine grid of averages scored one by one.

    python benchmarks/alpha.py                 # 2,000 tokens of prose; ten minutes on one core

The grid shares nothing with the search but the attention of the two models: each of its points is an average of
`merge_models`, a forward pass without gradients, and the formula of J spelt out. A step of 0.1, then of 0.01.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import ICD10
from transformers import AutoModelForCausalLM, AutoTokenizer

from arma_mergekit import find_optimal_alpha, merge_models
from arma_mergekit.attention import Layer, divergence_by_head, record


def texts(tokens: int) -> list[torch.Tensor]:
    """Prose of at most 128 tokens each, (1, T)."""
    tokenizer = AutoTokenizer.from_pretrained(ICD10 / "models" / "base")
    lines = (ICD10 / "data" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    found, left = [], tokens
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=128, return_tensors="pt")[
            "input_ids"
        ]
        if ids.numel() <= left:
            found.append(ids)
            left -= ids.numel()
    return found


def on_grid(base: Any, tuned: Any, batches: Sequence[torch.Tensor], rest: str) -> tuple[float, int]:
    """Alpha of the best point, and how many there were."""
    inputs = [{"input_ids": ids} for ids in batches]
    kept: list[list[list[Layer]]] = [[record(model, one) for one in inputs] for model in (base, tuned)]

    def apart(student: Any, teacher: int) -> float:
        return float(divergence_by_head(student, kept[teacher], inputs).values.mean())

    ends = apart(tuned, 0), apart(base, 1)
    scores: dict[float, float] = {}

    def score(alpha: float) -> float:
        if alpha not in scores:
            merged = merge_models(base, tuned, alpha, rest).eval()
            scores[alpha] = sum(apart(merged, side) / ends[side] for side in (0, 1))
        return scores[alpha]

    coarse = min((round(0.1 * k, 2) for k in range(11)), key=score)
    near = [round(coarse + 0.01 * k, 2) for k in range(-10, 11)]
    best = min((alpha for alpha in near if 0 <= alpha <= 1), key=score)
    return best, len(scores)


def main() -> None:
    """One line for each `rest`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--start", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--rest", nargs="+", default=["base"])
    args = parser.parse_args()
    base, tuned = (
        AutoModelForCausalLM.from_pretrained(ICD10 / "models" / name, dtype=torch.float32).eval()
        for name in ("base", "finetuned")
    )
    batches = texts(args.tokens)
    print(f"{sum(ids.numel() for ids in batches)} tokens")
    for rest in args.rest:
        began = time.monotonic()
        grid, count = on_grid(base, tuned, batches, rest)
        print(f"rest {rest}: grid {grid:.2f}, {count} points, {time.monotonic() - began:.0f} s", flush=True)
        for start in args.start:
            began = time.monotonic()
            found = find_optimal_alpha(base, tuned, batches, start, rest=rest)
            assert isinstance(found.alpha, float)
            print(
                f"  from {start:g}: alpha {found.alpha:.4f}, {abs(found.alpha - grid):.4f} from the grid's; "
                f"{len(found.objective)} steps, converged {found.converged}, J {found.objective.min():.4f}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    found = find_optimal_alpha(base, tuned, batches, legacy=True)
    print(
        f"legacy: weight of the base {found.alpha:.4f}, {len(found.objective)} steps, converged {found.converged}"
    )


if __name__ == "__main__":
    main()
