"""Does it work? The real case on several fine-tunes: every arm, and WiSE-FT's whole curve, on held-back items.

    python benchmarks/icd10.py --seeds 0 1 2 --trials 16 --out runs/icd10-bench

Trains the adapters it does not find (about 15 minutes each on one core), then tunes on each; resumable: started
again it scores nothing twice. Prints the tables quoted in README and docs/log; --figure draws the picture.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads must not spin

import numpy as np

from arma_mergekit.cli.tune import Log
from arma_mergekit.recipe import Recipe
from arma_mergekit.results import write_results
from arma_mergekit.tune import Candidate, Result, Tuner
from arma_mergekit.verdict import suite_shares

CASE = Path(__file__).resolve().parent.parent / "recipes" / "icd10"
CURVE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
SCOPES = ((0.2, 1.0), (0.4, 1.0), (0.5, 0.0), (1.0, 0.0))  # attention, rest; the published script: rest base
SUITES = ("general", "domain")
Shares = Mapping[str, float]


def fine_tune(seed: int, out: Path) -> Path:
    """The fine-tuned checkpoint of a seed, trained and folded if it is not there; seed 0 is the committed adapter."""
    adapter = CASE / "adapter" if seed == 0 else out / f"adapter-{seed}"
    if not adapter.exists():
        train = [sys.executable, str(CASE / "train.py"), "--seed", str(seed), "--out", str(adapter)]
        subprocess.run(train, check=True)
    merged = CASE / "models" / ("finetuned" if seed == 0 else f"finetuned-{seed}")
    if not merged.exists():
        build = [
            sys.executable,
            str(CASE / "build_finetuned.py"),
            "--adapter",
            str(adapter),
            "--out",
            str(merged),
        ]
        subprocess.run(build, check=True)
    return merged


def recipe_for(seed: int, model: Path, arguments: argparse.Namespace) -> Recipe:
    """The case's recipe with this fine-tuned model, searchers and budget."""
    text = (CASE / "recipe.yml").read_text()
    text = text.replace("recipes/icd10/models/finetuned", str(model))
    text = text.replace("recipes/icd10/models/base", str(CASE / "models" / "base"))
    text = text.replace("data: data/", f"data: {CASE}/data/")
    path = arguments.out / f"recipe-{seed}.yml"
    path.write_text(text)
    changes = {"searchers": arguments.searchers, "trials": arguments.trials, "seeds": arguments.search_seeds}
    return Recipe.load(path).with_tune(changes)


def curve(tuner: Tuner, result: Result) -> list[tuple[str, Shares]]:
    """WiSE-FT (one alpha for every tensor), and attention apart from the rest, on held-back items."""
    named = {f"WiSE-FT {a:g}": (a, a) for a in CURVE}
    named |= {f"attention {a:g}, rest {'fine-tuned' if r else 'base'}": (a, r) for a, r in SCOPES}
    base, tuned = (c.held for c in result.candidates[:2])
    weights = dict.fromkeys(base, 1.0)
    points: list[tuple[str, Shares]] = []
    for name, (attention, rest) in named.items():
        alphas = {t: attention if role.attention else rest for t, role in tuner.roles.items()}
        held = tuner.held(Candidate(name, alphas, None))
        points.append((name, suite_shares(held, base, tuned, weights)))
    return points


def tune(seed: int, arguments: argparse.Namespace) -> tuple[Result, list[tuple[str, Shares]]]:
    """Run one seed (or read its journal)."""
    recipe = recipe_for(seed, fine_tune(seed, arguments.out), arguments)
    out = arguments.out / f"seed-{seed}"
    tuner = Tuner(recipe, SUITES, out, Log())
    result = tuner.run()
    write_results(recipe, result, out)
    return result, curve(tuner, result)


def scores_table(result: Result) -> str:
    """Held-back headline scores of one seed."""
    keys = list(result.candidates[0].held)
    lines = [
        "| merge | " + " | ".join(k.partition("/")[2] for k in keys) + " |",
        "|---" * (len(keys) + 1) + "|",
    ]
    for c in result.candidates:
        cells = [f"{m.score:.3f} ± {m.stderr:.3f}" for m in c.held.values()]
        lines.append(f"| {c.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares_table(rows: Mapping[str, Sequence[Shares]]) -> str:
    """Share kept of each suite: median over the fine-tunes, and their range."""
    lines = ["| merge | general kept | domain kept | harmonic mean |", "|---|---|---|---|"]
    for name, shares in rows.items():
        columns = [[s[suite] for s in shares] for suite in SUITES]
        columns.append([2 * g * d / (g + d) if min(g, d) > 0 else 0.0 for g, d in zip(*columns, strict=True)])
        cells = [f"{np.median(c):.0%} ({min(c):.0%} to {max(c):.0%})" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Mapping[str, Sequence[Shares]], path: Path) -> None:
    """General against domain: WiSE-FT as a curve, what was found as points, one colour a searcher."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "arma", "font.family": "sans-serif", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    middle = {
        name: [100 * float(np.median([s[x] for s in shares])) for x in SUITES]
        for name, shares in rows.items()
    }
    wise = [middle[n] for n in ("fine-tuned", *(f"WiSE-FT {a:g}" for a in reversed(CURVE)), "base")]
    axes.plot(
        *zip(*[(d, g) for g, d in wise], strict=True),
        "o-",
        color="0.6",
        ms=4,
        label="one alpha for everything (WiSE-FT)",
    )
    for name, colour in (("one knob, attention", "C1"), ("bayes", "C0"), ("rl", "C4"), ("gradient", "C2")):
        points = [
            (100 * s["domain"], 100 * s["general"])
            for n, ss in rows.items()
            if n.startswith(name)
            for s in ss
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                "*" if name == "gradient" else "s",
                color=colour,
                ms=13 if name == "gradient" else 6,
                label=name,
                ls="",
            )
    for name, place in (("base", (0, -14)), ("fine-tuned", (-62, 2))):
        general, domain = middle[name]
        axes.annotate(name, (domain, general), xytext=place, textcoords="offset points")
    axes.set(
        xlabel="domain kept, %",
        ylabel="general ability kept, %",
        title="SmolLM2-135M, ICD-10 fine-tune: held-back items",
    )
    axes.legend(loc="lower left", frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run every seed, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tune")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--searchers", nargs="+", default=["bayes", "rl", "gradient"])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/icd10-bench"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Shares]] = {}
    for seed in arguments.seeds:
        result, points = tune(seed, arguments)
        print(f"\n### fine-tune seed {seed}\n\n{scores_table(result)}\n")
        for verdict in result.verdicts:
            print(f"- {verdict.sentence}")
        for name, shares in [*result.shares.items(), *points]:
            rows.setdefault(name.rstrip(" 0.123456789") if name.startswith("one knob") else name, []).append(
                shares
            )
    count = len(arguments.seeds)
    print(
        f"\n### share kept, held-back items: median (range) over {count} fine-tunes\n\n{shares_table(rows)}"
    )
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
