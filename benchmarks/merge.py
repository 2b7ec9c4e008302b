"""How fast is `arma merge`? Whole processes against `cp -r` and mergekit-yaml's `linear`, in turn.

    python benchmarks/merge.py                    # 1.1 B parameters in bf16, 9 GB of disk
    python benchmarks/merge.py --params 4.4e9 --no-linear

Two Llama checkpoints of five shards each, 19 % of the parameters in attention, in the page cache. `digests known`: the
inputs' sha256 are remembered from an earlier merge, the result's are computed; `first time`: all are; `none`: neither.
Prints a markdown table: seconds (smallest and median), both as a multiple of `cp -r`, and peak memory, resident and
anonymous.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml
from common import table
from mergekit_linear import llama, recipes, write_checkpoint

# In a process of its own, which samples the anonymous memory of its child.
STOPWATCH = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
peak = 0
while child.poll() is None:
    try:
        lines = open(f"/proc/{child.pid}/status").read().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
    except OSError:
        pass
    time.sleep(0.005)
assert child.returncode == 0, child.returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, peak)
"""


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    resident_mb: float
    anonymous_mb: float


def run(command: list[str], out: Path | None, cache: Path, known: bool = True) -> Run:
    """One process, with nothing left to write back from the one before."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    if not known:
        shutil.rmtree(cache, ignore_errors=True)
    os.sync()
    watch = [sys.executable, "-c", STOPWATCH, *command]
    # compiled once, as an installed package is
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache.with_name("compiled"))}
    environment = {**os.environ, **compiled, "ARMA_CACHE": str(cache)}
    found = subprocess.run(watch, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    seconds, resident, anonymous = map(float, found.split())
    return Run(seconds, resident / 1000, anonymous / 1000)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=float, default=1.1e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--linear", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; default a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        for k, side in enumerate(("base", "tuned")):
            write_checkpoint(root / side, llama(args.params), seed=k)
        made = recipes(root / "base", root / "tuned")
        for name, recipe in made.items():
            (root / f"{name.split(', ')[-1]}.yml").write_text(yaml.safe_dump(recipe))
        print(f"{args.params:.3g} parameters, {args.rounds} rounds\n")
        print(
            table(
                ["", "seconds, least", "median", "of cp -r, least", "median", "resident", "anonymous"],
                rows(root, args),
            )
        )


def rows(root: Path, args: argparse.Namespace) -> list[list[str]]:
    """A row for each command; rounds go through all of them, so that a busy machine slows all alike."""
    out, cache = root / "out", root / "cache"
    arma = [sys.executable, "-m", "arma_mergekit"]
    merges = {
        kind: [*arma, "merge", str(root / f"{kind}.yml"), str(out)] for kind in ("attention", "everything")
    }
    linear = [
        sys.executable,
        "-m",
        "mergekit.scripts.run_yaml",
        str(root / "linear.yml"),
        str(out),
        "--quiet",
    ]
    found: dict[str, list[Run]] = {}

    def note(name: str, *arguments: object) -> None:
        found.setdefault(name, []).append(run(*arguments))  # type: ignore[arg-type]
        print(f"{found[name][-1].seconds:7.2f} s  {name}", file=sys.stderr, flush=True)

    run([*arma, "merge", str(root / "attention.yml"), str(out)], out, cache)  # compiles
    for k in range(args.rounds):
        note("cp -r", ["cp", "-r", str(root / "tuned"), str(out)], out, cache)
        note("cp -r, synced", ["sh", "-c", f"cp -r {root}/tuned {out} && sync {out}/*"], out, cache)
        sums = f"cp -r {root}/tuned {out} && sync {out}/* && sha256sum {out}/*"
        note("cp -r, synced, sha256sum", ["sh", "-c", sums], out, cache)
        for kind, merge in merges.items():
            note(f"{kind}, first time", merge, out, cache, False)
            note(f"{kind}, digests known", merge, out, cache)
            note(f"{kind}, no digests", [*merge, "--no-digests"], out, cache)
            note(f"{kind}, no digests, no sync", [*merge, "--no-digests", "--no-sync"], out, cache)
            files = [
                str(f) for d in ("base", "tuned", "out") for f in sorted((root / d).glob("*.safetensors"))
            ]
            note(f"reading all files of {kind}", ["cat", *files], None, cache)
            note(f"verify {kind}", [*arma, "verify", str(out)], None, cache)
        if args.linear and k < 2:
            note("mergekit-yaml, linear", [*linear, "--no-copy-tokenizer"], out, cache)
    yardstick = [f([r.seconds for r in found["cp -r"]]) for f in (min, statistics.median)]
    return [row(name, runs, yardstick) for name, runs in found.items()]


def row(name: str, runs: list[Run], yardstick: list[float]) -> list[str]:
    """Cells of one command."""
    seconds = [f([r.seconds for r in runs]) for f in (min, statistics.median)]
    shares = [f"{s / y:.2f}" for s, y in zip(seconds, yardstick, strict=True)]
    memory = [f"{max(getattr(r, key) for r in runs):,.0f} MB" for key in ("resident_mb", "anonymous_mb")]
    return [name, *(f"{s:.2f}" for s in seconds), *shares, *memory]


if __name__ == "__main__":
    main()
