"""What does comparing attention cost? Divergence of two models in lock-step against their forward passes alone.

    python benchmarks/attention.py --tokens 16384

Processor time, which other programs do not change; texts of 512 tokens; medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import ICD10, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from arma_mergekit.attention import divergences


def texts(tokens: int, length: int) -> list[torch.Tensor]:
    """Prose as texts (1, length) of so many tokens, from the start again where it ends."""
    tokenizer = AutoTokenizer.from_pretrained(ICD10 / "models" / "base")
    lines = (ICD10 / "data" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenizer("\n\n".join(json.loads(line)["text"] for line in lines))["input_ids"]
    stream = (ids * (tokens // len(ids) + 1))[:tokens]
    return [torch.tensor(stream[start : start + length]) for start in range(0, tokens, length)]


def seconds(work: Callable[[], Any]) -> float:
    """Processor time."""
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.no_grad()
def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--models", nargs=2, default=[str(ICD10 / "models" / n) for n in ("base", "finetuned")]
    )
    args = parser.parse_args()
    one, other = (
        AutoModelForCausalLM.from_pretrained(ROOT / path, dtype=torch.float32).eval() for path in args.models
    )
    batches = [ids[None] for ids in texts(args.tokens, args.length)]

    def alone() -> None:
        for ids in batches:
            for model in (one, other):
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def compared() -> None:
        for ids in batches:
            divergences(one, {"input_ids": ids}, other)

    rounds = np.array([(seconds(alone), seconds(compared)) for _ in range(args.rounds)])
    forward, divergence = np.median(rounds, 0)
    print(f"{args.tokens} tokens: two forward passes {forward:.1f} s, with divergence {divergence:.1f} s")
    print(
        f"ratio {np.median(rounds[:, 1] / rounds[:, 0]):.2f} ({(rounds[:, 1] / rounds[:, 0]).round(2).tolist()})"
    )


if __name__ == "__main__":
    main()
