"""The errors this package raises on purpose, each with the exit code its command ends with.

    ArmaError                 1   anything below; also the code of an unexpected failure
    ├── UsageError            2   the command line does not make sense
    ├── InputError            3   a file, recipe or model cannot be used as it is
    │   ├── RecipeError           the YAML: unknown keys, bad values, filters that match nothing
    │   ├── CheckpointError       a model directory, its headers or its weights
    │   └── DataError             evaluation data
    └── RunError              4   a tuning run that cannot start, go on, or be found

Commands also end with 5 when nothing keeps what `keep` asks for, 6 when nothing beats averaging with one knob (`--ci`
and `gate`), 7 when a checkpoint scores less than its lock promises (`gate`), 130 when interrupted and 143 when ended.

Every message is one sentence (or a list of them) that names the file, the thing in it, and the remedy.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "ArmaError",
    "CheckpointError",
    "DataError",
    "InputError",
    "RecipeError",
    "RunError",
    "UsageError",
    "unknown",
]


class ArmaError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class UsageError(ArmaError):
    """The command line does not make sense."""

    exit_code = 2


class InputError(ArmaError):
    """A file, recipe or model cannot be used as it is."""

    exit_code = 3


class RecipeError(InputError):
    """The recipe is wrong; the message lists everything that is."""


class CheckpointError(InputError):
    """A model directory, its headers or its weights are wrong."""


class DataError(InputError):
    """Evaluation data cannot be used."""


class RunError(ArmaError):
    """A tuning run cannot start, go on, or be found."""

    exit_code = 4


def unknown(what: str, got: str, known: Iterable[str]) -> str:
    """Sentence for a word nobody knows: ``Unknown searcher 'bayess'. Did you mean bayes? Known: bayes, rl.``"""
    words = sorted(known)
    near = difflib.get_close_matches(got, words, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"Unknown {what} {got!r}.{hint} Known: {', '.join(words)}."
