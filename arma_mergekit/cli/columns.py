"""Texts that grow side by side on a terminal.

A row that no text can change any more is printed for good; the others are drawn again as the texts grow. It knows
texts and the size of a terminal; no models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import click

__all__ = ["GAP", "NARROWEST", "Columns", "cells", "plain", "wrap"]

GAP = " │ "
NARROWEST = 26  # cells of a column; with less, texts are better read one after the other
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """A text that cannot move the cursor, or do anything else to a terminal."""
    return CONTROL.sub("", text.replace("\t", "    "))


def cells(text: str) -> int:
    """How wide a terminal shows it."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells, broken at spaces where there are some."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\s+|\S+", paragraph):
            while cells(line + word) > width and word.strip():
                room = width if not line.strip() else 0
                cut = _fitting(word, room - cells(line)) if room else 0
                lines.append((line + word[:cut]).rstrip())
                line, word = "", word[cut:]
            line += word
        lines.append(line.rstrip())
    return lines


def _fitting(word: str, room: int) -> int:
    """How many characters of a word have room, at least one."""
    return max([1, *(k for k in range(len(word) + 1) if cells(word[:k]) <= room)])


class Columns:
    """Columns under their names. ``width``, ``height`` of the terminal; ``write`` prints text as it is."""

    def __init__(self, names: Sequence[str], width: int, height: int, write: Callable[[str], None]) -> None:
        self._width = (width - len(GAP) * (len(names) - 1)) // len(names)
        self._height, self._write = height, write
        self._printed = self._drawn = 0  # rows for good, and rows to be drawn again
        self._write(f"{self._row([click.style(name, bold=True) for name in names], names)}\n")

    def show(self, texts: Sequence[str], finished: Sequence[bool]) -> None:
        """Draw the texts as they are now."""
        lines = [wrap(plain(text), self._width) for text in texts]
        rows = [
            self._row([column[k] if k < len(column) else "" for column in lines])
            for k in range(max(map(len, lines)))
        ]
        sure = min(
            (len(column) - 1 for column, done in zip(lines, finished, strict=True) if not done),
            default=len(rows),
        )
        sure = max(self._printed, min(sure, len(rows)))
        growing = rows[sure:][: max(1, self._height - 2)]
        back = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._write(
            f"{back}\r\x1b[J" + "".join(f"{row}\n" for row in [*rows[self._printed : sure], *growing])
        )
        self._printed, self._drawn = sure, len(growing)

    def foot(self, notes: Sequence[str]) -> None:
        """A last row."""
        self._write(f"{self._row([click.style(note, dim=True) for note in notes], notes)}\n")

    def _row(self, columns: Sequence[str], seen: Sequence[str] | None = None) -> str:
        """Columns in a line; ``seen``: what of them is visible."""
        widths = [cells(text) for text in seen or columns]
        padded = [text + " " * (self._width - width) for text, width in zip(columns, widths, strict=True)]
        return GAP.join(padded).rstrip()
