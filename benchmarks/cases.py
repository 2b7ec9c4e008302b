"""Does it work? A real case on several fine-tunes: every arm, and WiSE-FT's whole curve, on held-back items.

    python benchmarks/cases.py --case icd10 --seeds 0 1 2 --trials 16 --out runs/icd10-bench

Trains the adapters it does not find (about 15 minutes each on one core), then tunes on each; resumable: started
again it scores nothing twice. Prints the tables quoted in README and docs/log; --figure draws the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import CASES, SUITES, Shares, label, shares, shares_cells, table, tuned

from arma_mergekit.tune import Candidate, Result, Tuner
from arma_mergekit.verdict import kept

CURVE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
SCOPES = ((0.2, 1.0), (0.4, 1.0), (0.5, 0.0), (1.0, 0.0))  # attention, rest; the published script: rest base
COLOURS = {"one knob, attention": "C1", "bayes": "C0", "rl": "C4", "gradient": "C2"}


def curve(tuner: Tuner, result: Result) -> dict[str, Shares]:
    """Shares kept by WiSE-FT (one alpha for every tensor), and with attention apart from the rest."""
    named = {f"WiSE-FT {a:g}": (a, a) for a in CURVE}
    named |= {f"attention {a:g}, rest {'fine-tuned' if r else 'base'}": (a, r) for a, r in SCOPES}
    base, fine = (c.held for c in result.candidates[:2])
    weights = {key: task.weight for key, task in tuner.about.tasks.items()}
    found: dict[str, Shares] = {}
    for name, (attention, rest) in named.items():
        alphas = {t: attention if role.attention else rest for t, role in tuner.roles.items()}
        candidate = Candidate(name, alphas, None)
        tuner.hold([candidate])
        found[name] = {suite: d.mean for suite, d in kept(candidate.held, base, fine, weights).items()}
    return found


def scores_table(result: Result) -> str:
    """Held-back headline scores of one fine-tune."""
    head = ["merge", *(key.partition("/")[2] for key in result.candidates[0].held)]
    rows = (
        [c.name, *(f"{m.score:.3f} ± {m.stderr:.3f}" for m in c.held.values())] for c in result.candidates
    )
    return table(head, rows)


def draw(rows: Mapping[str, Sequence[Shares]], case: str, path: Path) -> None:
    """General against domain: WiSE-FT as a curve, what was found as points, one colour a searcher."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "arma", "font.family": "sans-serif", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    points = {
        name: np.array([[100 * s[suite] for suite in reversed(SUITES)] for s in found])
        for name, found in rows.items()
    }
    middle = {name: np.median(found, axis=0) for name, found in points.items()}
    wise = [middle[n] for n in ("fine-tuned", *(f"WiSE-FT {a:g}" for a in reversed(CURVE)), "base")]
    axes.plot(*np.transpose(wise), "o-", color="0.6", ms=4, label="one alpha for everything (WiSE-FT)")
    for name in (n for n in COLOURS if n in points):
        marker, size = ("*", 13) if name == "gradient" else ("s", 6)
        axes.plot(*points[name].T, marker, color=COLOURS[name], ms=size, label=name, ls="")
    for name, place in (("base", (0, -14)), ("fine-tuned", (-62, 2))):
        axes.annotate(name, middle[name], xytext=place, textcoords="offset points")
    title = f"SmolLM2-135M, fine-tune {case}: held-back items"
    axes.set(xlabel="domain kept, %", ylabel="general ability kept, %", title=title)
    axes.legend(loc="lower left", frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run every seed, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="icd10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tune")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--searchers", nargs="+", default=["bayes", "rl", "gradient"])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--out", type=Path, help="default: runs/<case>-bench")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    out = args.out or Path("runs") / f"{args.case}-bench"
    rows: dict[str, list[Shares]] = {}
    for seed in args.seeds:
        recipe = CASES[args.case].load(
            seed, searchers=args.searchers, trials=args.trials, seeds=args.search_seeds
        )
        with tuned(recipe, out / f"seed-{seed}") as (tuner, result):
            print(f"\n### fine-tune seed {seed}\n\n{scores_table(result)}\n")
            print("\n".join(f"- {verdict.sentence}" for verdict in result.verdicts))
            for name, found in {**shares(result), **curve(tuner, result)}.items():
                rows.setdefault(label(name), []).append(found)
    print(f"\n### share kept, held-back items: median (range) over {len(args.seeds)} fine-tunes\n")
    head = ["merge", "general kept", "domain kept", "harmonic mean"]
    print(table(head, ([name, *shares_cells(found)] for name, found in rows.items())))
    if args.figure:
        draw(rows, args.case, args.figure)


if __name__ == "__main__":
    main()
