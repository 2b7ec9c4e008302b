"""From names to lm-eval's task objects: where they are defined, whether they are safe to load, and what went wrong.

It knows lm-eval's index of YAML files; no models, tokenizers or scores. lm-eval's index of all its 14,000 files takes
12 s, so only directories that mention the wanted names are indexed, unless those are not enough. What would run code of
a model's or of the hub's is refused before its modules are imported. Modules beside the YAML files of an `include_path`
do run: the recipe names them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from arma_mergekit.errors import DataError

__all__ = ["explained", "knows", "load", "quiet"]

CAUSES = (
    AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
NAMES = re.compile(
    rb"^(?:(?:task|group|tag)[ \t]*:|[ \t]*-)[ \t]*[\"']?([\w.:/-]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE
)


def knows(name: str) -> bool:
    """Whether the installed lm-eval has a task, group or tag of this name."""
    return name in _catalogue(_root()) and _manager((name,), None) is not None


def _root() -> Path | None:
    """Where lm-eval keeps its tasks; None if it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "tasks" if places else None


@lru_cache(maxsize=4)
def _catalogue(root: Path | None) -> Mapping[str, set[Path]]:
    """Directories of the files that mention a name where names are defined or listed; takes a second."""
    found: dict[str, set[Path]] = {}
    for file in root.rglob("*yaml*") if root else ():
        for match in NAMES.finditer(file.read_bytes() if file.is_file() else b""):
            found.setdefault(match[1].decode(), set()).add(file.parent)
    return found


@lru_cache(maxsize=8)
def _manager(names: tuple[str, ...], include_path: Path | None) -> Any:
    """A task manager that has all of the names and all that they stand for, or None; the smallest that will do."""
    own, catalogue = [include_path] if include_path else [], _catalogue(_root())
    near = {path for name in names for path in catalogue.get(name, ())}
    # of two definitions lm-eval takes the first by path, and its index the last it is given
    for paths in (own, [*sorted(near, reverse=True), *own], [*filter(None, [_root()]), *own]):
        index = (manager := _index(tuple(paths))).task_index
        if all(_complete(index, name) for name in names):
            return manager
        if any(name not in index and name not in catalogue for name in names):
            return None
    return None


@lru_cache(maxsize=8)
def _index(paths: tuple[Path, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=list(paths), include_defaults=False)


def _walk(index: Mapping[str, Any], entries: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Name and definition of entries (names, or definitions inside a group) and all below them; None: not there."""
    for entry in entries:
        inline = entry if isinstance(entry, Mapping) else {}
        name = str(inline.get("group") or inline.get("task")) if inline else str(entry)
        known = index.get(name)
        config = {**((known.cfg if known else None) or {}), **inline}
        members = config["task"] if isinstance(config.get("task"), list) else []
        yield name, config if known or members or "dataset_path" in config else None
        yield from _walk(index, [*members, *sorted(known.tags if known and known.kind.name == "TAG" else ())])


def _complete(index: Mapping[str, Any], name: str) -> bool:
    return all(config is not None for _, config in _walk(index, [name]))


def load(names: tuple[str, ...], include_path: Path | None) -> dict[str, Any]:
    """lm-eval's task objects by name; DataError for names, data and definitions that cannot be used."""
    if include_path is not None and not include_path.is_dir():
        raise DataError(f"No directory {include_path}; `include_path` holds lm-eval's YAML files.")
    _need_lm_eval()
    manager = _manager(names, include_path)
    if manager is None:
        raise DataError(_unknown(names, include_path))
    _check_safe(manager.task_index, names)
    with quiet(), explained(f"lm-eval task {', '.join(names)}"):
        loaded: dict[str, Any] = manager.load(list(names))["tasks"]
    return loaded


def _need_lm_eval() -> None:
    if _root() is None:
        raise DataError("lm_eval tasks need lm-eval; pip install 'arma-mergekit[lm-eval]'.")


def _unknown(names: Sequence[str], include_path: Path | None) -> str:
    known = {*_catalogue(_root()), *_index((include_path,) if include_path else ()).task_index}
    missing = next((name for name in names if name not in known), None)
    if missing is None:
        return f"lm-eval's {', '.join(names)} lists tasks that are not there; correct its YAML."
    near = difflib.get_close_matches(missing, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    where = f" nor in {include_path}" if include_path else ""
    return f"Unknown lm-eval task {missing!r}{where}.{hint} `lm-eval ls tasks` lists them."


def _check_safe(index: Mapping[str, Any], names: Sequence[str]) -> None:
    """DataError for tasks that run what the model writes or what the hub sends, before their modules are imported."""
    for name, config in _walk(index, names):
        if (config or {}).get("unsafe_code"):
            raise DataError(
                f"lm-eval task {name} runs code that the model writes, which is not done here; leave it out."
            )
        foreign = _foreign_metric(config or {})
        if foreign:
            raise DataError(
                f"lm-eval task {name}: metric {foreign} is code of the hub's, which is not run here; leave it out."
            )


def _foreign_metric(config: Mapping[str, Any]) -> str | None:
    """A metric that lm-eval would load from the hub."""
    from lm_eval.api.metrics import mean  # noqa: F401  registers the metrics
    from lm_eval.api.registry import metric_registry

    for metric in config.get("metric_list") or ():
        name = str(metric.get("metric"))
        registered = name in metric_registry and not metric.get("hf_evaluate")
        if not (registered or "/" in name or config.get("process_results")):  # a path is a `!function`
            return name
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's notes on what it was not asked."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """What lm-eval and datasets raise for a definition or data they cannot use, as one DataError."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    try:
        yield
    except (*CAUSES, DatasetsError, TemplateError, YAMLError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:")
        raise DataError(
            f"{what} cannot be used ({type(error).__name__}: {line}); {_remedy(error)}."
        ) from error


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what it needs"
    if isinstance(error, OSError):
        return "correct the path, or download its data set from the hub before working offline"
    return "correct its definition (`lm-eval validate` checks it)"
