"""Build `models/finetuned`: the base with the committed adapter folded into its weights.

    python recipes/icd10/build_finetuned.py [--adapter DIR] [--out DIR]

W + scale * B @ A is computed in float32 and rounded once to bfloat16; every other file is the base's, byte
for byte. `made_of.json` names the base and the adapter by sha256, so that a second run has nothing to do.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from build_base import BASE, sha256, whole

HERE = Path(__file__).resolve().parent
PREFIX = "base_model.model."


def build(adapter: Path = HERE / "adapter", out: Path = HERE / "models" / "finetuned") -> Path:
    """Make `out` unless it is there already, from this base and this adapter."""
    sources = {"base": BASE / "model.safetensors", "adapter": adapter / "adapter_model.safetensors"}
    made_of = {name: sha256(path) for name, path in sources.items()}
    stamp = out / "made_of.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == made_of:
        print(f"{out}: already there")
        return out
    import torch
    from safetensors.torch import load_file, save_file

    print("folding the adapter into the base", flush=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    low_rank = load_file(sources["adapter"])
    weights = load_file(sources["base"])
    for name, a in low_rank.items():
        if name.endswith(".lora_A.weight"):
            b = low_rank[name.replace("lora_A", "lora_B")]
            target = name.removeprefix(PREFIX).replace(".lora_A", "")
            weights[target] = (weights[target].float() + scale * (b.float() @ a.float())).to(torch.bfloat16)

    with whole(out) as tmp:
        save_file(weights, tmp / "model.safetensors", metadata={"format": "pt"})
        for file in BASE.iterdir():
            if file.name != "model.safetensors":
                shutil.copyfile(file, tmp / file.name)
        (tmp / stamp.name).write_text(json.dumps(made_of, indent=2) + "\n")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--out", type=Path, default=HERE / "models" / "finetuned")
    args = parser.parse_args()
    build(args.adapter, args.out)
