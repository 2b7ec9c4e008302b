"""A function of the user's own as a task: `python: {function: "my_eval.py:score", data: my.jsonl}`.

    score(model, tokenizer, records, **options) -> one number a record, in their order; up is better

    model        the transformers model with the candidate's weights, in eval mode, without gradients
    records      mappings: the fields of the data's records, with their "id"; without data, {"id": "0"} up to `limit`,
                 for functions that make up their own items (the id may seed them)

One number a record is what standard errors and held-back items need. The function is called once for every candidate
and every selection of items, so it must not depend on what else is selected. Code runs because the recipe names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from arma_mergekit.errors import DataError, unknown
from arma_mergekit.evals.outside import OutsideTask

__all__ = ["PythonTask", "load_function"]

Score = Callable[..., Sequence[float]]


class PythonTask(OutsideTask):
    """Records scored by a function; ``options`` are its keyword arguments."""

    unit = "score"

    def __init__(
        self, name: str, function: Score, tokenizer: Any, records: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None = None, weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(name, [str(record["id"]) for record in records], weight)
        self._function, self._tokenizer = function, tokenizer
        self._records, self._options = tuple(records), dict(options or {})

    def values(self, model: Any, items: Sequence[int]) -> Sequence[float]:
        """What the function says; DataError unless it is one number an item."""
        records = [dict(self._records[i]) for i in items]
        found = self._function(model, self._tokenizer, records, **self._options)
        try:
            values = [float(value) for value in found]
        except (TypeError, ValueError) as error:
            raise DataError(f"Task {self.name}: must return one number a record, but {error}.") from error
        if len(values) != len(records):
            raise DataError(
                f"Task {self.name}: must return one number a record ({len(records)}), but returned {len(values)}."
            )
        return values


def load_function(reference: str, directory: Path) -> Score:
    """`module:name`, or `file.py:name` relative to a directory; DataError if there is no such function."""
    place, _, name = reference.rpartition(":")
    module = _from_file(directory / place) if place.endswith(".py") else _imported(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DataError(f"{place}: {unknown('function', name, known)}")
    return function  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise DataError(f"No file {path}; give the function as file.py:name, relative to the recipe.")
    name = f"arma_eval_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # what the module itself imports
        raise DataError(
            f"No module {name!r}; install it, or give file.py:name relative to the recipe."
        ) from error
