"""What two passes cost: decoding speed of a siamese model against its adapter model, memory, and one batched pass.

    OMP_NUM_THREADS=1 python benchmarks/siamese_passes.py recipes/icd10/models/base recipes/icd10/adapter

Processor time, not wall time; both models in one process in turn, so their ratio means something on a busy machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from arma_mergekit.siamese import SiameseForCausalLM

ROUNDS, TOKENS, PROMPT = 5, 24, 20


def main(base: str, adapter: str) -> None:
    model = SiameseForCausalLM.from_parts(base, adapter)
    ids = torch.arange(100, 100 + PROMPT)[None]
    rows = [one_round(model, ids) for _ in range(ROUNDS + 1)][1:]  # the first one warms up
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:58} {statistics.median(values):8.2f}   {min(values):.2f} to {max(values):.2f}")
    print(f"{'same bits: one batched pass against the base alone':58} {same_bits(model, ids)}")
    both, one = cache_bytes(model, ids)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gate = sum(p.numel() * p.element_size() for p in model.body.parameters())
    print(
        f"MiB: weights {weights / 2**20:.1f}, of them the gate {gate / 2**20:.2f}; caches {both} and {one} bytes"
    )


def one_round(model: SiameseForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Milliseconds a token of either model and of the batched pass, and of what is done beside."""
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    mask = torch.ones_like(ids)
    siamese = milliseconds(lambda: model.generate(ids, attention_mask=mask, **options)) / TOKENS
    with model.only("tuned") as lm:
        tuned = milliseconds(lambda: lm.generate(ids, attention_mask=mask, **options)) / TOKENS
    with model.only("base") as lm:
        base = milliseconds(lambda: lm.generate(ids, attention_mask=mask, **options)) / TOKENS
    return {
        "ms a token: siamese": siamese,
        "ms a token: adapter model": tuned,
        "ms a token: base": base,
        "speed: siamese / adapter model": tuned / siamese,
        "ms a token: one batched pass (PEFT's mixed batch)": milliseconds(lambda: batched(model, ids))
        / TOKENS,
        "ms: adapter off and on again": milliseconds(lambda: switch(model), 20),
        "ms: the same by PEFT's disable_adapter": milliseconds(lambda: switch_by_peft(model), 2),
    }


def milliseconds(run: Callable[[], Any], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        run()
    return 1000 * (time.process_time() - start) / times


@torch.no_grad()
def batched(model: SiameseForCausalLM, ids: torch.Tensor, tokens: int = TOKENS) -> Any:
    """Base and adapter as two rows of one batch; the logits of the last step."""
    cache, names = DynamicCache(config=model.config), ["__base__", "default"]
    given = ids.repeat(2, 1)
    for _ in range(tokens):
        output = model.tuned(
            input_ids=given, past_key_values=cache, use_cache=True, adapter_names=names, logits_to_keep=1
        )
        given = output.logits[:1].argmax(-1).repeat(2, 1)
    return output.logits


@torch.no_grad()
def same_bits(model: SiameseForCausalLM, ids: torch.Tensor) -> bool:
    cache = DynamicCache(config=model.config)
    with model.only("base") as lm:
        given = ids
        for _ in range(4):
            logits = lm(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            given = logits.argmax(-1)
    return bool(torch.equal(batched(model, ids, 4)[:1], logits))


def switch(model: SiameseForCausalLM) -> None:
    with model.body.off():
        pass


def switch_by_peft(model: SiameseForCausalLM) -> None:
    with model.tuned.disable_adapter():
        pass


@torch.no_grad()
def cache_bytes(model: SiameseForCausalLM, ids: torch.Tensor) -> tuple[int, int]:
    caches = model(ids, use_cache=True).past_key_values, model.lm(ids, use_cache=True).past_key_values
    both, one = (
        sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        for cache in caches
    )
    return both, one


if __name__ == "__main__":
    main(*sys.argv[1:])
