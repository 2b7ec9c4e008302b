"""`arma-tune recipe.yml --eval general,domain`: find the alphas."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arma_mergekit.errors import UsageError

if TYPE_CHECKING:
    from arma_mergekit.cli.publish import Publisher
    from arma_mergekit.recipe import Recipe
    from arma_mergekit.run import MakeEngine
    from arma_mergekit.tune import Progress, Result

__all__ = ["Names", "adjust", "cache_option", "cache_path", "command", "quiet_libraries", "recipe_name"]

INFEASIBLE = 5  # exit code: no candidate keeps what was asked
WAYS = ("balance", "maximize", "sum", "pareto")


class Names(click.ParamType[list[str]]):
    """Comma-separated words."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """`a,b` to ["a", "b"]."""
        if isinstance(value, list):
            return value
        return [word.strip() for word in str(value).split(",") if word.strip()]


class Pairs(Names):
    """`general=95%,domain=2 se` as a dictionary; texts that are numbers become numbers."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split at commas, then at the equals sign."""
        if isinstance(value, dict):
            return value
        pairs = [word.partition("=") for word in super().convert(value, param, ctx)]
        for name, _, text in pairs:
            if not name.strip() or not text.strip():
                self.fail(f"takes suite=value, as in domain=95%, but got {value!r}.", param, ctx)
        return {name.strip(): number(text.strip()) for name, _, text in pairs}


def number(text: str) -> float | str:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


cache_option = click.option(
    "--cache",
    default="default",
    metavar="FILE|none",
    help="Scores shared between runs.  [default: $ARMA_CACHE or ~/.cache/arma_mergekit]",
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--eval", "suites", type=Names(), required=True, help="Suites of the recipe to steer by: general,domain."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory of the run.  [default: runs/<recipe>]"
)
@click.option(
    "--searchers", type=Names(), help="random, grid, bayes, cmaes, rl, gradient, ...  [default: the recipe's]"
)
@click.option("--trials", type=click.IntRange(1), help="Budget of each arm, in full evaluations.")
@click.option(
    "--more-trials", type=click.IntRange(1), help="Give every arm of a finished run this many more."
)
@click.option("--seeds", type=Names(), help="One arm per searcher and seed: 0,1,2.")
@click.option("--balance", type=Names(), help="Balance these suites (default: all of --eval).")
@click.option("--maximize", metavar="SUITE", help="Raise this suite ...")
@click.option(
    "--keep", type=Pairs(), metavar="SUITE=BOUND", help="... and keep another: domain=95%, domain=2 se, ..."
)
@click.option(
    "--sum", type=Pairs(), metavar="SUITE=WEIGHT", help="A weighted sum of shares: general=1,domain=2."
)
@click.option("--pareto", type=Names(), help="Search the front of these suites, and name picks of it.")
@click.option(
    "--groups", help="Space of attention: global, kind, block:6, layer, kernel, tensor, everything."
)
@click.option("--rest", help="Space of everything else: the same words, base, finetuned or a number.")
@click.option("--bounds", type=(float, float), metavar="LOW HIGH", help="Range of every alpha.")
@click.option(
    "--compare",
    multiple=True,
    metavar="NAME=MODEL",
    help="Score another model too, beside the merges; again for each.",
)
@click.option("--allow-test-sets", is_flag=True, default=None, help="Steer by well-known test sets too.")
@cache_option
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Score candidates in this process, or on a Ray cluster.",
)
@click.option("--workers", type=click.IntRange(1), help="Of ray: models at a time.  [default: one per GPU]")
@click.option(
    "--ray-address",
    metavar="HOST:PORT|auto",
    help="Of ray: the cluster to join.  [default: $RAY_ADDRESS, or one of its own]",
)
@click.option(
    "--ci",
    is_flag=True,
    help="For a build server: plain log, junit.xml and summary.md too, exit code 6 if one knob does as well.",
)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of tables.")
def command(
    recipe: Path,
    suites: list[str],
    out: Path | None,
    ci: bool,
    as_json: bool,
    cache: str,
    more_trials: int | None,
    engine: str,
    workers: int | None,
    ray_address: str | None,
    **overrides: Any,
) -> int:
    """Find the alphas of RECIPE on real evaluations, and say whether they beat one-knob averaging.

    Writes tuned.yml (run it with mergekit-yaml), stock.yml (the same for a mergekit without this package),
    report.html, summary.json and trials.jsonl. Start it again with the same recipe and it goes on where it stopped.
    """
    quiet_libraries()
    from arma_mergekit.cli.log import Log
    from arma_mergekit.cli.publish import Publisher
    from arma_mergekit.cli.tables import render
    from arma_mergekit.recipe import Recipe

    out, log = out or Path("runs") / recipe_name(recipe), Log(quiet=as_json)
    log.live = log.live and not ci
    publisher = Publisher("arma-tune", out / "junit.xml", out / "summary.md")
    with publisher.errors() if ci else contextlib.nullcontext():
        loaded = adjust(Recipe.load(recipe), overrides)
        check_suites(suites)
        place = cache_path(cache), engine_maker(engine, workers, ray_address)
        typed = command_line("arma-tune", recipe, suites, out)
        result, summary = search(loaded, suites, out, log, place, more_trials, typed)
    click.echo(json.dumps(summary, indent=2) if as_json else render(result, summary))
    if not as_json:
        click.echo(f"Report: {out / 'report.html'}")
    if ci:
        return publish(publisher, summary, out)
    return 0 if result.best.feasible else INFEASIBLE


def search(
    recipe: Recipe,
    suites: list[str],
    out: Path,
    log: Progress,
    place: tuple[Path | None, MakeEngine | None],
    more_trials: int | None,
    typed: str,
) -> tuple[Result, dict[str, Any]]:
    """A whole run, and its summary; ``place``: cache and engine, ``typed``: the command that made it."""
    from arma_mergekit.results import write_best, write_results
    from arma_mergekit.run import open_run

    with open_run(recipe, suites, out, log, *place) as tuner:
        try:
            result = tuner.run(more_trials)
        except KeyboardInterrupt:
            best = tuner.best_so_far()
            if best is not None:
                path = write_best(recipe, best, out)
                click.echo(f"\nInterrupted. Best so far: {best.name}, in {path}; no verdict yet.", err=True)
            click.echo("The same command goes on where this one stopped.", err=True)
            raise
        return result, write_results(tuner, result, out, typed)


def publish(publisher: Publisher, summary: Mapping[str, Any], out: Path) -> int:
    """Tell a build server; returns the exit code. The output `recipe` is what to merge."""
    from arma_mergekit.ci import tradeoff
    from arma_mergekit.gate import check_tuning
    from arma_mergekit.report import markdown

    checks = check_tuning(summary)
    shares = {candidate["name"]: candidate["share_kept"] for candidate in summary["candidates"]}
    recipe = out / ("tuned.yml" if checks[-1].outcome == "passed" else "one-knob.yml")
    more = f"{markdown(summary)}\n{tradeoff(shares, summary['best'])}"
    return publisher.publish(checks, more, {"recipe": recipe, "best": summary["best"]})


def quiet_libraries() -> None:
    """Before torch is imported: idle OpenMP threads that spin cost more than they give on few cores; and no chatter."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PEFT 0.21 asks transformers for what it renamed
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)


def engine_maker(name: str, workers: int | None, address: str | None) -> MakeEngine | None:
    """Where candidates are scored; None for this process."""
    if name == "ray":
        from arma_mergekit.engines.ray import RayEngine

        return partial(RayEngine, workers=workers, address=address)
    if workers is not None or address is not None:
        raise UsageError("--workers and --ray-address need --engine ray.")
    return None


def command_line(program: str, recipe: Path, suites: list[str], out: Path) -> str:
    """What started the run, as it is typed; without the options if it was not typed."""
    words = sys.argv[1:]
    if str(recipe) in words:
        return shlex.join([program, *words[words.index(str(recipe)) :]])
    return shlex.join([program, str(recipe), "--eval", ",".join(suites), "--out", str(out)])


def cache_path(text: str) -> Path | None:
    """Where scores are shared; None for `none`."""
    from arma_mergekit.cache import default_path

    return {"none": None, "default": default_path()}.get(text, Path(text))


def check_suites(suites: list[str]) -> None:
    """UsageError unless there are some, each once."""
    if not suites or len(set(suites)) != len(suites):
        raise UsageError(
            f"--eval takes suites of the recipe, each once, but got {','.join(suites) or 'none'}."
        )


def recipe_name(path: Path) -> str:
    """`recipes/icd10/recipe.yml` is `icd10`, `mine.yml` is `mine`."""
    return path.resolve().parent.name if path.stem == "recipe" else path.stem


def adjust(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with what the command line says instead."""
    given = {key: value for key, value in overrides.items() if value not in (None, ())}
    changes: dict[str, Any] = {k: given[k] for k in ("searchers", "trials", "allow_test_sets") if k in given}
    if "seeds" in given:
        changes["seeds"] = [whole_number(seed) for seed in given["seeds"]]
    if [] in changes.values():
        raise UsageError("--searchers and --seeds take at least one entry.")
    ways = {way: given[way] for way in WAYS if way in given}
    if len(ways) > 1:
        raise UsageError(f"Give one of {', '.join(f'--{way}' for way in ways)}.")
    if "keep" in given and "maximize" not in given:
        raise UsageError("--keep needs --maximize: which suite should rise while the other is kept?")
    if ways:
        changes["objective"] = ways | ({"keep": given["keep"]} if "keep" in given else {})
    if "compare" in given:
        changes["compare"] = {**recipe.tune.compare, **named_models(given["compare"])}
    space = {key: given[key] for key in ("groups", "rest", "bounds") if key in given}
    if space:
        before = (recipe.raw.get("tune") or {}).get("space") or {}
        changes["space"] = before | {k: list(v) if isinstance(v, tuple) else v for k, v in space.items()}
        if "rest" in space:
            changes["space"]["rest"] = number(space["rest"])
    return recipe.with_tune(changes)


def named_models(texts: Sequence[str]) -> dict[str, str]:
    """`NAME=MODEL` of each."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, ref) in zip(texts, pairs, strict=True) if not (name and ref)]:
        raise UsageError(f"--compare takes NAME=MODEL, as in siamese=path/to/model, but got {wrong[0]!r}.")
    return {name: ref for name, _, ref in pairs}


def whole_number(text: str) -> int:
    """A seed."""
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"--seeds takes whole numbers, but got {text!r}.")
    return int(text)
