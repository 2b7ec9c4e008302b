"""Time mergekit-yaml with `arma` against `linear`: whole processes, on synthetic checkpoints.

    python benchmarks/mergekit_linear.py          # 1.1 B parameters, 7 GB of disk
    python benchmarks/mergekit_linear.py --options "-j 1 --out-shard-size 500M"

Two Llama checkpoints in bf16, five shards each, 19 % of the parameters in attention, no tokenizer. Recipes
run in turn, so that a busy machine slows all of them alike. Prints a markdown table: seconds (smallest and
median), both as a share of linear's, and peak memory; then how many merged tensors have the kernel's bits.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from arma_mergekit.kernel import average
from arma_mergekit.roles import role

SHARDS = 5
ALPHA = 0.3
# In a process of its own: on Linux a child's peak memory starts at that of the process that spawned it.
STOPWATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    peak_gib: float


def llama(params: float) -> dict[str, Any]:
    """config.json of a Llama of about that many parameters, in the proportions of TinyLlama."""
    scale = (params / 1.1e9) ** (1 / 3)
    hidden = max(1, round(4 * scale)) * 512
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "vocab_size": round(32000 * scale),
        "num_hidden_layers": max(2, round(22 * scale)), "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 512, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, layer by layer."""
    hidden, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 8, hidden),
        "self_attn.v_proj": (hidden // 8, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    found = {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    return ends | found | {"model.norm.weight": (hidden,)}


def write_checkpoint(path: Path, config: dict[str, Any], seed: int) -> None:
    """Random weights in `SHARDS` shards of about equal size; the tensors are cut from one pool of numbers."""
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    sizes = shapes(config)
    total = sum(torch.Size(shape).numel() for shape in sizes.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    path.mkdir()
    done = 0
    for name, shape in sizes.items():
        size = torch.Size(shape).numel()
        values = pool.roll(done % 9973).repeat(size // len(pool) + 1)[:size]
        shards[min(SHARDS - 1, done * SHARDS // total)][name] = values.view(shape)
        done += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{SHARDS:05}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config))


def recipes(base: Path, tuned: Path) -> dict[str, dict[str, Any]]:
    """The recipes to compare; the first is the yardstick."""
    weighted = [
        {"model": str(m), "parameters": {"weight": w}} for m, w in ((base, 1 - ALPHA), (tuned, ALPHA))
    ]
    arma = {"merge_method": "arma", "base_model": str(base)}
    models = [{"model": str(tuned), "parameters": {"alpha": ALPHA}}]
    return {
        "linear": {"merge_method": "linear", "models": weighted},
        "arma, attention": {**arma, "models": models, "parameters": {"rest": "finetuned"}},
        "arma, everything": {**arma, "models": models, "parameters": {"rest": ALPHA}},
    }


def run(recipe: Path, out: Path, options: list[str]) -> Run:
    """One mergekit-yaml process, start to end, with nothing left to write back from the one before."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    options = ["--quiet", "--no-copy-tokenizer", *options]
    mergekit = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(recipe), str(out), *options]
    command = [sys.executable, "-c", STOPWATCH, *mergekit]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak_kib = report.splitlines()[-1].split()
    return Run(float(seconds), int(peak_kib) / 2**20)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, memory-mapped."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def identical(base: Path, tuned: Path, out: Path, rest: float) -> str:
    """How many tensors of ``out`` have the bits of the kernel's average."""
    left, right, merged = tensors(base), tensors(tuned), tensors(out)
    torch.set_num_threads(1)
    equal = sum(
        torch.equal(
            average(left[name], [right[name]], [ALPHA if role(name).attention else rest]), merged[name]
        )
        for name in left
    )
    return f"{equal} of {len(left)}"


def table(runs: dict[str, list[Run]]) -> str:
    """Markdown; shares are of the first row."""
    lines = [
        "| recipe | min s | median s | min / linear | median / linear | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    first: tuple[float, float] | None = None
    for name, results in runs.items():
        seconds = [r.seconds for r in results]
        low, middle = min(seconds), statistics.median(seconds)
        first = first or (low, middle)
        peak = max(r.peak_gib for r in results)
        shares = f"{low / first[0]:.2f} | {middle / first[1]:.2f}"
        lines.append(f"| {name} | {low:.1f} | {middle:.1f} | {shares} | {peak:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=float, default=1.1e9, help="parameters of each checkpoint")
    parser.add_argument("--runs", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--options", default="", help="more options for mergekit-yaml")
    parser.add_argument("--dir", type=Path, help="where to make the temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        base, tuned, out = (Path(root, name) for name in ("base", "tuned", "out"))
        config = llama(args.params)
        for seed, path in enumerate((base, tuned)):
            write_checkpoint(path, config, seed)
        results: dict[str, list[Run]] = {}
        checks = []
        for turn in range(args.runs):
            for name, recipe in recipes(base, tuned).items():
                file = Path(root, "recipe.yml")
                file.write_text(yaml.safe_dump(recipe))
                results.setdefault(name, []).append(run(file, out, shlex.split(args.options)))
                print(f"{name}: {results[name][-1].seconds:.1f} s", file=sys.stderr)
                if turn == 0 and name.startswith("arma"):
                    rest = recipe["parameters"]["rest"]
                    checks.append(
                        f"{name}: {identical(base, tuned, out, 1.0 if rest == 'finetuned' else rest)}"
                    )
        count = sum(torch.Size(shape).numel() for shape in shapes(config).values())
        print(f"{count / 1e9:.2f} B parameters, mergekit-yaml {args.options}\n\n{table(results)}\n")
        print(f"Tensors with the kernel's bits: {'; '.join(checks)}.")


if __name__ == "__main__":
    main()
