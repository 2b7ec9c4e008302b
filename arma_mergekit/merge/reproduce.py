"""The same merge again from its lock, and every way in which it is not the same, graded.

    result         a file of weights, or config or tokenizer, has other bytes: not reproduced
    input          a file that was read has another sha256: the reason for it
    environment    other versions or another platform: no reason, the arithmetic does not depend on them

It compares two locks; it merges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Mismatch", "compare_locks"]

Grade = Literal["result", "input", "environment"]
CARD = "README.md"
WRITTEN_ANEW = (CARD, "alphas.svg")  # say when and with what the merge was made


@dataclass(frozen=True)
class Mismatch:
    """One way in which a merge is not what its lock says."""

    grade: Grade
    sentence: str


def compare_locks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Mismatch]:
    """What differs between the lock of a merge and that of its repetition, gravest first."""
    return [*_results(old, new), *_inputs(old, new), *_environment(old, new)]


def _results(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Mismatch]:
    theirs, ours = old["output"]["files"], new["output"]["files"]
    for name in sorted({*theirs, *ours}.difference(WRITTEN_ANEW)):
        if name not in ours or name not in theirs:
            side = "the first merge" if name in theirs else "this one"
            yield Mismatch("result", f"{name} is only in {side}.")
        elif theirs[name]["sha256"] is not None and theirs[name]["sha256"] != ours[name]["sha256"]:
            yield Mismatch(
                "result",
                f"{name} has sha256 {ours[name]['sha256'][:12]}…, the lock says {theirs[name]['sha256'][:12]}….",
            )


def _inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Mismatch]:
    for theirs, ours in zip(old["inputs"], new["inputs"], strict=False):
        if theirs["commit"] != ours["commit"]:
            yield Mismatch(
                "input", f"{theirs['ref']} is at commit {ours['commit']}, the lock says {theirs['commit']}."
            )
        for name in sorted({*theirs["files"], *ours["files"]}):
            pair = [side["files"].get(name, {}).get("sha256") for side in (theirs, ours)]
            if None not in pair and pair[0] != pair[1]:
                yield Mismatch("input", f"{name} of {theirs['ref']} is not the file that was merged then.")


def _environment(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Mismatch]:
    for name, value in old["tool"].items():
        if new["tool"].get(name) != value:
            yield Mismatch("environment", f"{name} is {new['tool'].get(name)}, then {value}.")
