"""mergekit's parameter settings: what they may look like, and which value a tensor gets.

    setting     scalar | [scalar, …] | {filter, value} | [{filter, value}, …]      value: scalar | [scalar, …]
    [v_0 … v_m] over depth t in [0, 1]: with s = t m and i = floor(s),  (1 - (s - i)) v_i + (s - i) v_(i+1)
    filter      substring of the tensor's name; absent or "*" matches all; the first that matches wins

Lists of words take v_floor(t m). t = layer / (layers - 1) within a stack (1 if it has one layer), 0 outside
layers. It knows one setting and one name at a time. Source: `mergekit.config.evaluate_setting` of 0.1.5,
re-implemented, held equal by tests/test_recipe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from arma_mergekit.errors import unknown

__all__ = [
    "CONDITION",
    "REST",
    "Setting",
    "check_setting",
    "conditions",
    "number",
    "number_or_word",
    "resolve",
]

Scalar: TypeAlias = bool | int | float | str
Setting: TypeAlias = Scalar | list[Any] | Mapping[str, Any]

REST = ("base", "finetuned")
CONDITION = ("filter", "value")


def number(value: Any) -> float:
    """A scalar as a number; YAML reads `1e-3` as text, so text counts. ValueError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def number_or_word(value: Any) -> float | str:
    """`number`, or one of the words that `rest` knows."""
    return value if isinstance(value, str) and value in REST else number(value)


def resolve(
    setting: Setting, tensor_name: str, t: float = 0.0, *, validate: Callable[[Any], Any] = number_or_word
) -> Any:
    """A tensor's value at depth ``t``, None if no filter matches; ``validate`` makes a scalar a value."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, bool | int | float | str):
        return validate(setting)
    if all(isinstance(e, bool | int | float | str) for e in setting):
        return _over_depth([validate(e) for e in setting], t, validate) if setting else None
    for condition in setting:
        wanted = condition.get("filter")
        if wanted is None or wanted == "*" or (tensor_name and wanted in tensor_name):
            return resolve(condition["value"], tensor_name, t, validate=validate)
    return None


def _over_depth(values: list[Any], t: float, validate: Callable[[Any], Any]) -> Any:
    scaled = t * (len(values) - 1)
    left = int(scaled)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[left]
    right = min(len(values) - 1, left + 1)
    part = scaled - left
    return validate((1 - part) * values[left] + part * values[right])


def conditions(setting: Setting) -> Iterator[tuple[str | None, Any]]:
    """(filter or None, value) of each part of a setting, in order of precedence."""
    parts: list[Any] = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(part, Mapping) for part in parts):
        yield None, setting
        return
    for part in parts:
        wanted = part.get("filter")
        yield (None if wanted == "*" else wanted), part["value"]


def check_setting(setting: Any, words: Sequence[str] = ()) -> Setting:
    """The setting itself; ValueError lists what is wrong, one a line. ``words`` may stand for numbers."""
    problems: list[str] = []
    parts = setting if isinstance(setting, list) else [setting]
    if any(isinstance(part, dict) for part in parts):
        for i, part in enumerate(parts):
            where = f"[{i}]" if isinstance(setting, list) else ""
            problems += [f"{where}{problem}" for problem in _condition_problems(part, words)]
    else:
        problems = list(_value_problems(setting, words))
    if problems:
        raise ValueError("\n".join(problems))
    checked: Setting = setting
    return checked


def _condition_problems(part: Any, words: Sequence[str]) -> Iterator[str]:
    """What is wrong with one {filter, value}."""
    if not isinstance(part, dict):
        yield f" must be {{filter, value}} like the entries beside it, but got {part!r}."
        return
    for key in part:
        if key not in CONDITION:
            yield f": {unknown('key', str(key), CONDITION)}"
    if not isinstance(part.get("filter"), str | None) or part.get("filter") == "":
        yield f".filter must be part of a tensor's name, but got {part['filter']!r}."
    if "value" not in part:
        yield " needs a value."
    else:
        yield from (f".value{problem}" for problem in _value_problems(part["value"], words))


def _value_problems(value: Any, words: Sequence[str]) -> Iterator[str]:
    """What is wrong with a scalar or a list of scalars."""
    scalars = value if isinstance(value, list) else [value]
    if not scalars:
        yield " is an empty list: give at least one number."
    for i, scalar in enumerate(scalars):
        where = f"[{i}]" if isinstance(value, list) else ""
        if not (isinstance(scalar, str) and scalar in words):
            yield from (f"{where}{problem}" for problem in _scalar_problems(scalar, words))


def _scalar_problems(scalar: Any, words: Sequence[str]) -> Iterator[str]:
    wanted = " or ".join([", ".join(words), "a number"]) if words else "a number"
    try:
        if not math.isfinite(number(scalar)):
            yield f" must be finite, but got {scalar}."
    except OverflowError:
        yield " must be finite, but got a number with hundreds of digits."
    except ValueError:
        near = f" {unknown('word', scalar, words)}" if words and isinstance(scalar, str) else ""
        yield f" must be {wanted}, but got {scalar!r}.{near}"
