"""`arma chat SOURCE`: the same prompt to several models, and their answers side by side."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from arma_mergekit.cli.columns import GAP, NARROWEST, Columns, plain
from arma_mergekit.cli.tune import Names, named_models, quiet_libraries
from arma_mergekit.errors import UsageError, unknown

if TYPE_CHECKING:
    from arma_mergekit.chat import Answer, Settings, Voice

__all__ = ["command"]

FRAME = 0.05  # seconds between two drawings
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/raw": "switch the chat template off, or on again",
    "/quit": "leave, as Ctrl-D does",
}
NOTES = {"end": "", "length": ", at the limit", "interrupted": ", stopped"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.option(
    "--compare",
    "wanted",
    type=Names(),
    help="Who answers: base, finetuned, merged, ..., or NAME=MODEL.  [default: all there are]",
)
@click.option("--prompt", metavar="TEXT", help="Ask this and leave.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of an answer, at most."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 answers greedily."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt.")
def command(source: str, wanted: list[str] | None, prompt: str | None, as_json: bool, **options: Any) -> None:
    """Ask several models the same, and read their answers side by side.

    SOURCE is a recipe (its base, fine-tuned and merged model), the directory of an arma-tune run (the same, and
    one-knob), or a model: a directory, siamese or not, a hub id in the local cache, or base+adapter. Merges are made
    in memory.

    Answers grow in columns, one below the other where the terminal is narrow, and as lines with names where the output
    is no terminal: echo "..." | arma chat SOURCE. Ctrl-C ends an answer, Ctrl-D the chat; /help lists the commands.
    """
    quiet_libraries()
    from arma_mergekit.chat import Settings, open_cast
    from arma_mergekit.cli.log import Log

    settings = Settings(**options)
    names = [name.partition("=")[0] for name in wanted or []]
    if len(set(names)) < len(names):
        raise UsageError(f"--compare takes each voice once, but got {','.join(names)}.")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None and not prompt.strip():
        raise UsageError("The prompt is empty.")
    cast = open_cast(source, named_models([name for name in wanted or [] if "=" in name]))
    names = names or list(cast.usual)
    log = Log(quiet=as_json or not sys.stderr.isatty())
    if not log.quiet:
        log.line(f"Loading {', '.join(names)}", passing=True)
    chat = Chat(cast.load(names), settings, as_json)
    if not log.quiet:
        log.line("", passing=True)
    if prompt is None:
        chat.converse()
    elif not chat.answer(prompt):
        raise click.Abort


class Chat:
    """Asks, and prints what is answered."""

    def __init__(self, voices: Sequence[Voice], settings: Settings, as_json: bool) -> None:
        self.voices, self.settings, self.as_json = voices, settings, as_json
        self.terminal = sys.stdout.isatty() and not as_json

    def converse(self) -> None:
        """Until the end of the input."""
        click.echo("/help lists the commands, Ctrl-D leaves.", err=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # `input` edits lines with it
        while (text := self._read()) is not None:
            try:
                if text.startswith("/"):
                    if not self._obey(text.strip()):
                        return
                elif text.strip():
                    self.answer(text)
            except UsageError as error:
                click.echo(str(error), err=True)

    def _read(self) -> str | None:
        """What is typed, lines that end with a backslash joined; None at the end."""
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(_line("… " if lines else "> "))
            except EOFError:
                click.echo(err=not self.terminal)
                return None
            except KeyboardInterrupt:
                click.echo(" Ctrl-D leaves.", err=not self.terminal)
                lines = []
        return "\n".join([*(line.removesuffix("\\") for line in lines[:-1]), lines[-1]])

    def _obey(self, text: str) -> bool:
        """Whether to go on after a command; UsageError for an unknown one."""
        if text not in COMMANDS:
            raise UsageError(
                f"{unknown('command', text, COMMANDS)} A text that begins with /: put a space before."
            )
        if text == "/help":
            click.echo("\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items()))
            click.echo("  A line that ends with \\ goes on.")
        elif text == "/reset":
            for voice in self.voices:
                voice.turns.clear()
        elif text == "/raw":
            from dataclasses import replace

            self.settings = replace(self.settings, raw=not self.settings.raw)
            click.echo("Texts are continued as they are." if self.settings.raw else "Chat template.")
        return text != "/quit"

    def answer(self, prompt: str) -> bool:
        """Ask everybody; False if it was interrupted."""
        size = shutil.get_terminal_size()
        side_by_side = size.columns >= len(self.voices) * (NARROWEST + len(GAP)) - len(GAP)
        with interruptible() as interrupted:
            if self.terminal and side_by_side and len(self.voices) > 1:
                answers = self._columns(prompt, interrupted)
            else:
                answers = self._one_by_one(prompt, interrupted)
        for voice, answer in zip(self.voices, answers, strict=True):
            voice.remember(prompt, answer)
        if self.as_json:
            found = {v.name: facts(a) for v, a in zip(self.voices, answers, strict=True)}
            click.echo(json.dumps({"prompt": prompt, "answers": found}, ensure_ascii=False))
        return not any(answer.stopped == "interrupted" for answer in answers)

    def _columns(self, prompt: str, interrupted: Callable[[], bool]) -> list[Answer]:
        """A token of each in turn, drawn side by side."""
        answers = [voice.ask(prompt, self.settings) for voice in self.voices]
        size = shutil.get_terminal_size()
        columns = Columns([voice.name for voice in self.voices], size.columns, size.lines, _write)
        shown = 0.0
        while growing := [answer for answer in answers if not answer.stopped]:
            for answer in growing:
                if interrupted():
                    answer.stopped = "interrupted"
                else:
                    answer.step()
                if time.monotonic() - shown > FRAME:
                    columns.show([a.text for a in answers], [bool(a.stopped) for a in answers])
                    shown = time.monotonic()
        columns.show([a.text for a in answers], [True] * len(answers))
        columns.foot([note(answer) for answer in answers])
        return answers

    def _one_by_one(self, prompt: str, interrupted: Callable[[], bool]) -> list[Answer]:
        """Each to its end: as it grows on a terminal, else line by line."""
        return [self._alone(voice, prompt, interrupted) for voice in self.voices]

    def _alone(self, voice: Voice, prompt: str, interrupted: Callable[[], bool]) -> Answer:
        answer = voice.ask(prompt, self.settings)
        several = len(self.voices) > 1
        label = f"{voice.name}: " if several and not self.terminal else ""
        if several and self.terminal:
            click.secho(voice.name, bold=True)
        written = 0
        while not answer.stopped:
            if interrupted():
                answer.stopped = "interrupted"
            else:
                answer.step()
            # whole lines where each begins with a name; the last one at the end
            ready = len(answer.text) if self.terminal or answer.stopped else answer.text.rfind("\n") + 1
            if not self.as_json and ready > written:
                _write("".join(_labelled(answer.text[written:ready], label, written == 0)))
                written = ready
        if not self.as_json:
            _write("\n" if written else f"{label}\n")
        if self.terminal:
            click.secho(note(answer), dim=True)
        return answer


def _labelled(text: str, label: str, first: bool) -> Iterator[str]:
    """Lines of a text, each with the label at its beginning."""
    yield label if first else ""
    yield plain(text).replace("\n", f"\n{label}") if label else plain(text)


def _line(mark: str) -> str:
    """A line of input; the mark before it is never part of the output."""
    if sys.stdout.isatty():
        return input(mark)
    click.echo(mark, nl=False, err=True)
    return input()


def _write(text: str) -> None:
    click.echo(text, nl=False)


def note(answer: Answer) -> str:
    """`12 tokens, 31.2/s`."""
    return f"{answer.tokens} tokens, {answer.tokens_per_second:.1f}/s{NOTES[answer.stopped or 'end']}"


def facts(answer: Answer) -> dict[str, Any]:
    """An answer for JSON."""
    return {
        "text": answer.text, "tokens": answer.tokens, "seconds": round(answer.seconds, 3),
        "tokens_per_second": round(answer.tokens_per_second, 2), "stopped": answer.stopped,
    }  # fmt: skip


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C only sets what the function tells; pressed again, it interrupts as ever."""
    pressed: list[bool] = []

    def handle(*_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
