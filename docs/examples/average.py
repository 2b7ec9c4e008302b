"""Average two models in memory, with the alpha whose attention stays near both. In a notebook, the lines of `main`.

    python docs/examples/average.py recipes/icd10/models/base recipes/icd10/models/finetuned \\
        recipes/icd10/data/general.jsonl merged/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from arma_mergekit import find_optimal_alpha, merge_models, model_difference


def main(base: str, finetuned: str, texts: str, out: str) -> None:
    """Find the alpha on eight texts of a JSONL file, and write the average."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()[:8]]

    model_1, model_2 = (AutoModelForCausalLM.from_pretrained(path) for path in (base, finetuned))
    batches = [tokenizer(line, truncation=True, max_length=128, return_tensors="pt") for line in lines]
    print(model_difference(model_1, model_2, batches))
    found = find_optimal_alpha(model_1, model_2, batches)
    merge_models(model_1, model_2, found.alpha).save_pretrained(out)

    tokenizer.save_pretrained(out)
    print(f"alpha {found.alpha:.3f} after {len(found.alphas)} steps")
    for (alpha,), (to_base, to_finetuned) in zip(found.alphas, found.parts, strict=True):
        print(f"  {alpha:.3f}   {to_base:.4f} from the base   {to_finetuned:.4f} from the fine-tuned")


if __name__ == "__main__":
    main(*sys.argv[1:])
