"""A YAML file read so that nothing in it can run, grow or hide: plain data, or RecipeError.

Refused: files over a megabyte, tags, merge keys, deep nesting, aliases that multiply, keys given twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from arma_mergekit.errors import RecipeError

__all__ = ["read_yaml"]

SIZE_LIMIT = 1_000_000  # bytes
DEPTH_LIMIT = 30
ALIAS_LIMIT = 64
NODE_LIMIT = 200_000  # with every alias written out
LONGEST_NUMBER = 1000  # characters
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# libyaml is ten times faster than the parser in Python, which is there where libyaml is not
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds, of plain data only."""
    text = _text(path)
    try:
        _check_events(yaml.parse(text, Loader), path)
        loader = Loader(text)
        node = loader.get_single_node()
        _check_nodes(node, path)
        content = loader.construct_document(node)
    except yaml.YAMLError as error:
        if "nesting depth" in _reason(error):  # libyaml's own limit, which it meets while it looks ahead
            raise _too_deep(path, _place(error)) from error
        raise RecipeError(f"{path} is no valid YAML{_place(error)}: {_reason(error)}.") from error
    except (ValueError, OverflowError) as error:  # a date or number that no Python value can hold
        raise RecipeError(f"{path} holds a value that cannot be read: {error}.") from error
    assert isinstance(content, dict)
    return content


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(SIZE_LIMIT + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"No recipe {path}.") from error
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    if len(raw) > SIZE_LIMIT:
        raise RecipeError(f"{path} is larger than {SIZE_LIMIT:,} bytes, which no recipe is.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def _check_events(events: Iterator[yaml.Event], path: Path) -> None:
    """Before anything is built: one document, no tags, few aliases, no deep nesting."""
    depth = aliases = documents = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if tag := getattr(event, "tag", None):
            raise RecipeError(f"{path}, line {line}: tag {tag} is refused; a recipe is plain data.")
        documents += isinstance(event, yaml.DocumentStartEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if documents > 1:
            raise RecipeError(
                f"{path}, line {line}: a second document begins; give each recipe its own file."
            )
        if aliases > ALIAS_LIMIT:
            raise RecipeError(f"{path}, line {line}: more than {ALIAS_LIMIT} aliases; write the values out.")
        if depth > DEPTH_LIMIT:
            raise _too_deep(path, f", line {line}")


def _too_deep(path: Path, place: str) -> RecipeError:
    return RecipeError(f"{path}{place}: nested deeper than {DEPTH_LIMIT} levels, which no recipe is.")


def _check_nodes(node: yaml.Node | None, path: Path) -> None:
    """Before values are made of it: a mapping, of bounded size, without keys that hide others."""
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path} must hold a mapping, such as `merge_method: arma`.")
    if _count(node, {}) > NODE_LIMIT:
        raise RecipeError(f"{path}: its aliases multiply to over {NODE_LIMIT:,} values; write them out.")
    problems = list(_node_problems(node, path))
    if problems:
        raise RecipeError("\n".join(problems))


def _node_problems(node: yaml.Node, path: Path) -> Iterator[str]:
    """Keys given twice, of which YAML would keep the last, keys that are not text, and endless numbers."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
            yield f"{path}, line {node.start_mark.line + 1}: a number of {len(node.value):,} characters is refused."
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _node_problems(item, path)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                yield f"{path}, line {line}: merge keys (<<) are refused; write the keys out."
            elif not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                yield f"{path}, line {line}: key {shown!r} must be text; put it in quotes."
            elif key.value in seen:
                yield f"{path}, line {line}: key {key.value!r} is given twice; keep one."
            else:
                seen.add(key.value)
            yield from _node_problems(value, path)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below and including this one, every alias counted as if written out."""
    if id(node) not in known:
        known[id(node)] = NODE_LIMIT + 1  # what an alias of an ancestor counts for
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).rstrip(".")
