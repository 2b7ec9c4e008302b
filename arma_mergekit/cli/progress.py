"""Progress in bytes on stderr: a line that updates itself on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import click

from arma_mergekit.cli.plan import size

__all__ = ["Progress"]

EVERY = 0.2  # seconds between two updates


class Progress:
    """Counts bytes from any thread and shows their rate and what is left."""

    def __init__(self, quiet: bool = False) -> None:
        self._live = sys.stderr.isatty() and not quiet
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._since = self._shown = 0.0

    def start(self, total: int) -> Callable[[int], None]:
        """Expect that many bytes; returns what is called as they are done."""
        self._total, self._since = total, time.monotonic()
        return self.advance

    def advance(self, count: int) -> None:
        """Some more bytes are done."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._live and now - self._shown > EVERY:
                self._shown = now
                click.echo(f"\r\x1b[2K{self.text(now - self._since)}", err=True, nl=False)

    def text(self, seconds: float) -> str:
        """`1.2 GB of 2.2 GB   1.9 GB/s   0:01 left`."""
        rate = self._done / max(seconds, 1e-9)
        left = int((self._total - self._done) / max(rate, 1e-9) + 0.5)
        return f"{size(self._done)} of {size(self._total)}   {size(round(rate))}/s   {left // 60}:{left % 60:02d} left"

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._since

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live and self._shown:
            click.echo("\r\x1b[2K", err=True, nl=False)
