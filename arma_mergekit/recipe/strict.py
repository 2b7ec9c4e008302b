"""Pydantic models that are frozen and take no key they do not know, and their errors as sentences.

A validator of ours raises ValueError with one problem a line, each a continuation of the place it is about:
`.value[1] must be a number, but got 'x'.` or `: Unknown searcher …`; anything else is a sentence of its own.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from arma_mergekit.errors import unknown

__all__ = ["Strict", "listed", "sentences"]

Place: TypeAlias = Sequence[int | str]
MOST_FAULTS = 40  # told of one file
CONTINUATION = re.compile(r"(?P<deeper>(?:\.\w+|\[\d+\])*)(?P<rest>:? .*)", re.DOTALL)
PYDANTIC_WORDS = {" valid ": " ", "tuple": "list", "dictionary": "mapping"}
UNKNOWN_KEY = re.compile(r": (?P<fact>Unknown key .+?)\.(?P<hint> (?:Did you|Known).*)", re.DOTALL)


class Strict(BaseModel):
    """Frozen; an unknown key is an error; so are NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def listed(value: Any) -> Any:
    """A single value as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def sentences(error: ValidationError, model: type[BaseModel], file: str) -> list[str]:
    """One sentence for each thing wrong in ``file``, whose content ``model`` describes; the first of very many."""
    faults = error.errors(include_url=False)
    empty = [f["loc"] for f in faults if f["type"] == "too_short"]
    # a list whose entries are all wrong counts as empty too, which says nothing new
    hidden = [e for e in empty if any(f["loc"][: len(e)] == e and f["type"] != "too_short" for f in faults)]
    told = [f for f in faults if f["loc"] not in hidden]
    found = [s for f in told[:MOST_FAULTS] for s in _sentences(f, model, file)]
    more = len(told) - MOST_FAULTS
    return [*dict.fromkeys(found), *([f"{more:,} more places in {file} are wrong."] if more > 0 else [])]


def _sentences(fault: Mapping[str, Any], model: type[BaseModel], file: str) -> list[str]:
    place = fault["loc"]
    if fault["type"] == "extra_forbidden":
        problem = unknown("key", str(place[-1]), _fields(model, place[:-1]))
        return [_sentence(place[:-1], f": {problem}", file)]
    if fault["type"] == "missing":
        return [_sentence(place[:-1], f" needs `{place[-1]}`.", file)]
    if fault["type"] == "too_short":
        return [_sentence(place, " needs at least one entry.", file)]
    if fault["type"] == "value_error":
        return [_sentence(place, line, file) for line in str(fault["ctx"]["error"]).splitlines()]
    wanted = fault["msg"].removeprefix("Input ")
    for theirs, ours in PYDANTIC_WORDS.items():
        wanted = wanted.replace(theirs, ours)
    return [_sentence(place, f" {wanted}, but got {_short(fault['input'])}.", file)]


def _sentence(place: Place, problem: str, file: str) -> str:
    """Place, file and problem as one sentence."""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    match = CONTINUATION.fullmatch(problem)
    deeper, rest = match.group("deeper", "rest") if match else ("", f": {problem}")
    where = ("".join(words) + deeper).removeprefix(".")
    missing_key = UNKNOWN_KEY.fullmatch(rest)
    if missing_key:
        at = f"{file} at {where}" if where else file
        return f"{missing_key['fact']} in {at}.{missing_key['hint']}"
    return f"{where} in {file}{rest}" if where else f"{file}{rest}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(model: type[BaseModel], place: Place) -> list[str]:
    """Keys known at a place that takes only known keys."""
    here: Any = model
    for part in place:
        here = _inside(here, part)
    return list(_unwrapped(here).model_fields)


def _inside(annotation: Any, part: int | str) -> Any:
    """The annotation of an item of a tuple, a value of a dict, or a field of a model."""
    plain = _unwrapped(annotation)
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        return plain.model_fields[str(part)].annotation
    return typing.get_args(plain)[0 if isinstance(part, int) else 1]


def _unwrapped(annotation: Any) -> Any:
    """``X`` of ``Annotated[X, …]`` and of ``X | None``."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _unwrapped(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _unwrapped(next(a for a in typing.get_args(annotation) if a is not types.NoneType))
    return annotation
