"""From a recipe to an open run: plan checked, models loaded, engine and journal ready; all closed at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from arma_mergekit.cache import EvalCache
from arma_mergekit.digest import DigestMemo
from arma_mergekit.engines import Engine
from arma_mergekit.evals import check_test_sets
from arma_mergekit.fingerprint import digest_of, fingerprint
from arma_mergekit.models import open_named
from arma_mergekit.plan import plan
from arma_mergekit.recipe import Recipe
from arma_mergekit.trials import Journal
from arma_mergekit.tune import Guest, Progress, Tuner
from arma_mergekit.worker import Worker

__all__ = ["MakeEngine", "open_run"]

MakeEngine = Callable[[Recipe, Sequence[str], EvalCache | None], Engine]


@contextlib.contextmanager
def open_run(
    recipe: Recipe,
    suites: Sequence[str],
    out: Path,
    progress: Progress,
    cache: Path | None = None,
    make_engine: MakeEngine | None = None,
) -> Iterator[Tuner]:
    """A tuner whose journal is ``out``/trials.jsonl; what cannot start leaves no run behind.

    ``cache``: the evaluation cache's file, None for none; ``make_engine``: default, this process.
    """
    check_test_sets(recipe, suites, recipe.tune.allow_test_sets)
    planned = plan(recipe, require_alpha=False).check()
    for warning in planned.warnings:
        progress("warning", {"text": warning})
    progress("load", {"base": recipe.base_model, "tuned": recipe.finetuned[0].model})
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(EvalCache(cache))) if cache else None
        memo = stack.enter_context(contextlib.closing(DigestMemo.default() if cache else DigestMemo()))
        facts = fingerprint(recipe, suites, planned, memo)
        if store is not None:
            store.describe({k: v for k, v in facts.items() if k.startswith("model ")})
        guests = [
            Guest(name, ref, named.kind, digest_of(named.files, memo))
            for name, ref in recipe.tune.compare.items()
            for named in [open_named(ref)]
        ]
        engine = (make_engine or local_engine)(recipe, suites, store)
        stack.callback(engine.close)
        tuner = Tuner(recipe, suites, engine, progress, guests)
        facts |= {f"items of {key}": task.content for key, task in tuner.about.tasks.items() if task.content}
        # last: what cannot start leaves no run behind
        tuner.journal = stack.enter_context(contextlib.closing(Journal(out / "trials.jsonl", facts)))
        yield tuner


def local_engine(recipe: Recipe, suites: Sequence[str], cache: EvalCache | None) -> Engine:
    """One worker in this process."""
    from arma_mergekit.engines.local import LocalEngine

    return LocalEngine(Worker(recipe, suites, cache))
