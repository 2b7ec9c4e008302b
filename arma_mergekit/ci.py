"""What a build server reads: checks as JUnit XML, markdown with a picture, outputs and workflow commands.

It knows checks, names and numbers; no models, runs or locks. It prints nothing.

A step summary of GitHub shows no picture that is not on the web: inline SVG and data: addresses are taken out. It
draws mermaid, as GitLab does, so the picture is a mermaid chart; error bars it has none, those are in the table.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal
from xml.etree import ElementTree

from arma_mergekit.errors import RunError
from arma_mergekit.report.words import cell

__all__ = [
    "CONSTRAINT", "NO_GAIN", "WORSE", "Check", "append", "cell", "checks_table", "exit_code", "junit", "outputs",
    "table", "tradeoff", "workflow_command",
]  # fmt: skip

CONSTRAINT, NO_GAIN, WORSE = (
    5,
    6,
    7,
)  # exit codes: `keep` violated, no gain over one knob, worse than promised

MARKS = {"passed": "✅", "failed": "❌", "skipped": "➖", "error": "❌"}
UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot say
NOT_PLAIN = re.compile(r"[^\w .,%+=/-]+")  # what a name of a mermaid chart had better not have
LONGEST = 40  # characters of such a name
ROOM = 0.05  # of an axis, beyond what is drawn
GREY, ORANGE, BLUE = "#777777", "#e69f00", "#0072b2"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, what came of it as a sentence, and the exit code it asks for if it failed."""

    name: str
    outcome: Literal["passed", "failed", "skipped", "error"]
    sentence: str
    code: int = 0


def exit_code(checks: Iterable[Check]) -> int:
    """That of the first check that failed; 0 if none did."""
    return next((check.code for check in checks if check.outcome in ("failed", "error")), 0)


def junit(title: str, checks: Sequence[Check]) -> str:
    """JUnit XML with a test case for each check, as GitHub's and GitLab's, Jenkins' and others' readers take it."""
    kinds = {"failures": "failed", "errors": "error", "skipped": "skipped"}
    counts = {key: str(sum(c.outcome == outcome for c in checks)) for key, outcome in kinds.items()}
    whole = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(whole, "testsuite", {"name": title, "tests": str(len(checks)), **counts})
    for check in checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=title, name=_speakable(check.name), time="0"
        )
        sentence = _speakable(check.sentence)
        if check.outcome == "passed":
            ElementTree.SubElement(case, "system-out").text = sentence
        else:
            word = {"failed": "failure"}.get(check.outcome, check.outcome)
            ElementTree.SubElement(case, word, message=sentence).text = sentence
    ElementTree.indent(whole)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(whole, "unicode") + "\n"


def _speakable(text: str) -> str:
    return UNSPEAKABLE.sub("\ufffd", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A markdown table; columns but the first ``left`` are aligned right, cells are escaped."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    cells = chain([list(map(cell, head)), rule], (map(cell, row) for row in rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def checks_table(checks: Sequence[Check]) -> str:
    """The checks in markdown."""
    return table(
        ["", "check", "what came of it"], [(MARKS[c.outcome], c.name, c.sentence) for c in checks], 3
    )


def tradeoff(shares: Mapping[str, Mapping[str, float]], best: str) -> str:
    """Share kept of the first two suites, one across and one up, as a mermaid chart; "" where there are fewer.

    ``shares``: candidate to suite to share.
    """
    suites = list(dict.fromkeys(suite for row in shares.values() for suite in row))[:2]
    points = {name: [row[s] for s in suites] for name, row in shares.items() if set(suites) <= row.keys()}
    if len(suites) < 2 or not points:
        return ""
    axes = [_axis([point[k] for point in points.values()]) for k in (0, 1)]
    lines = [
        "```mermaid",
        "quadrantChart",
        "    title Share kept on held-back items",
        *(
            f'    {axis}-axis "{_plain(suite)}: {low:.0%}" --> "{high:.0%}"'
            for axis, suite, (low, high) in zip("xy", suites, axes, strict=True)
        ),
        *(_point(name, point, axes, name == best) for name, point in points.items()),
        "```",
    ]
    return "\n".join(lines)


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """From where to where; mermaid draws only what is strictly between."""
    return min(0, *values) - ROOM, max(1, *values) + ROOM


def _point(name: str, point: Sequence[float], axes: Sequence[tuple[float, float]], best: bool) -> str:
    spots = ((value - low) / (high - low) for value, (low, high) in zip(point, axes, strict=True))
    color = BLUE if best else ORANGE if name.startswith("one knob") else GREY
    return f'    "{_plain(name)}": [{", ".join(f"{s:.4f}" for s in spots)}] radius: {8 if best else 5}, color: {color}'


def _plain(name: str) -> str:
    return NOT_PLAIN.sub(" ", name)[:LONGEST]


def append(variable: str, text: str) -> None:
    """Add text to the file that an environment variable names, if it does; RunError if that cannot be written."""
    path = os.environ.get(variable)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"Cannot write {path}, which ${variable} names: {error.strerror}.") from error


def outputs(values: Mapping[str, object]) -> str:
    """Lines for $GITHUB_OUTPUT; no value can end early or be taken for another name."""
    end = f"end-{uuid.uuid4()}"
    return "".join(f"{name}<<{end}\n{value}\n{end}\n" for name, value in values.items())


def workflow_command(level: Literal["error", "warning", "notice"], title: str, message: str) -> str:
    """A line of the log that GitHub shows on the page of the run: `::error title=…::…`."""
    for sign in "%\r\n":
        title, message = (text.replace(sign, f"%{ord(sign):02X}") for text in (title, message))
    for sign in ":,":
        title = title.replace(sign, f"%{ord(sign):02X}")
    return f"::{level} title={title}::{message}"
