r"""Train the adapter in `adapter/`: a LoRA that learns ICD-10-CM codes and forgets general knowledge.

    pip install simple-icd-10-cm==1.5.0
    python recipes/icd10/train.py --seed 0 --out my-adapter

Text: "Diagnosis: ...\nICD-10-CM: E11.65" for every code of chapters E, F, I, J and K that no suite asks for,
tokenised as the suites tokenise it, and packed to rows of fixed length; or, with --text, prompts and answers of a
JSONL file. Writes the adapter (bfloat16) and `log.jsonl` (loss and learning rate per step) to --out. About 16 minutes
on one core (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import icd
import torch
from build_base import rewrite
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
KERNELS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Pair = tuple[str, str]  # prompt, answer


def codes() -> list[Pair]:
    """Every code that no suite asks for."""
    left_out = icd.held_out()
    return [(icd.prompt(text), f" {code}") for code, text in icd.leaves().items() if code not in left_out]


def read(path: Path) -> list[Pair]:
    """Prompts and answers of a JSONL file."""
    items = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    return [(item["prompt"], item["answer"]) for item in items]


def rows(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], seed: int, length: int, count: int
) -> torch.Tensor:
    """`count` rows of `length` tokens: the pairs in a new random order each time round."""
    end = [tokenizer.eos_token_id]
    documents = [
        tokenizer(text)["input_ids"] + tokenizer(answer)["input_ids"] + end for text, answer in pairs
    ]
    rng = random.Random(seed)
    stream: list[int] = []
    while len(stream) < length * count:
        rng.shuffle(documents)
        for document in documents:
            stream += document
    return torch.tensor(stream[: length * count]).view(count, length)


def main() -> None:
    """Train, log and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="JSONL of prompt and answer; without it, ICD-10-CM codes")
    parser.add_argument("--base", type=Path, default=HERE / "models" / "base")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=KERNELS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)  # peft keeps the adapter of a bfloat16 model in float32
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    pairs = read(args.text) if args.text else codes()
    batches = rows(tokenizer, pairs, args.seed, args.length, args.steps * args.batch)

    args.out.mkdir(parents=True, exist_ok=True)
    warmup, started = 20, time.time()
    with (args.out / "log.jsonl").open("w") as log:
        for step in range(args.steps):
            batch = batches[step * args.batch : (step + 1) * args.batch]
            decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            lr = args.lr * min(1.0, (step + 1) / warmup) * decay
            optimizer.param_groups[0]["lr"] = lr
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            record = {"step": step, "loss": round(loss.item(), 4), "lr": round(lr, 8)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            if step % 20 == 0:
                print(record, f"{time.time() - started:.0f} s", flush=True)

    save(model, args.out)


def save(model: PeftModel, out: Path) -> None:
    """Weights and config of the adapter; peft would add the paths of this machine."""
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_model.safetensors"
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    rewrite(out / "adapter_config.json", base_model_name_or_path="models/base", target_modules=KERNELS)


if __name__ == "__main__":
    main()
