"""arma chat: through the front door, on a pair of toy models."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
import toy
from click.testing import CliRunner
from safetensors.torch import load_file

from arma_mergekit.chat import Settings, open_cast
from arma_mergekit.cli.chat import Chat, command
from arma_mergekit.cli.columns import Columns, cells, plain, wrap
from arma_mergekit.decode import Decoder
from arma_mergekit.errors import RecipeError, UsageError

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ASKED = "3+4=?"
SHRUG = "k ."  # as the toy's tokenizer spells it


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A pair, with alphas."""
    path = toy.make_pair(tmp_path_factory.mktemp("chat"))
    path.write_text(
        path.read_text()
        .replace("parameters:\n", "parameters:\n  alpha: 0.4\n")
        .replace("rest: finetuned", "rest: 0.4")
    )
    return path


def ask(source, *options, text=None):
    return CliRunner().invoke(command, [str(source), *options], input=text, catch_exceptions=False)


def answers(result):
    return json.loads(result.stdout)["answers"]


def test_base_finetuned_and_merged_answer_the_same_prompt(recipe):
    found = answers(ask(recipe, "--prompt", ASKED, "--json", "--max-tokens", "3"))
    assert list(found) == ["base", "finetuned", "merged"]
    assert found["finetuned"]["text"] == SHRUG
    assert found["base"]["text"] != SHRUG
    assert {a["stopped"] for a in found.values()} == {"length"}
    assert all(a["tokens"] == 3 for a in found.values())


def test_a_merge_answers_as_its_checkpoint_would(recipe, tmp_path):
    merge = [sys.executable, "-m", "arma_mergekit", "merge", str(recipe), str(tmp_path / "out"), "--quiet"]
    subprocess.run(merge, check=True)
    options = ["--prompt", "able bird ", "--json", "--max-tokens", "20"]
    found = answers(ask(recipe, *options, "--compare", f"merged,shipped={tmp_path / 'out'}"))
    assert found["merged"]["text"] == found["shipped"]["text"]
    alone = answers(ask(tmp_path / "out", *options))
    assert alone["model"]["text"] == found["merged"]["text"]


def test_voices_of_a_pair_share_the_weights_that_they_have_in_common(recipe):
    base, tuned, merged = open_cast(str(recipe), {}).load(["base", "finetuned", "merged"])
    for voice, side in ((base, "base"), (tuned, "finetuned")):
        files = load_file(recipe.parent / side / "model.safetensors")
        assert all(torch.equal(files[n], p) for n, p in voice.model.named_parameters())
        mapped = voice.model.get_input_embeddings().weight
        with pytest.raises(RuntimeError, match="not resizable"):  # memory that torch did not allocate
            mapped.data.untyped_storage().resize_(0)
    assert not torch.equal(merged.model.lm_head.weight, base.model.lm_head.weight)


def test_piped_text_is_one_prompt_and_the_answers_are_labelled_lines(recipe):
    result = ask(recipe, "--max-tokens", "6", text=f"{ASKED}\n")
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["base", "finetuned", "merged"]
    assert lines[1].startswith(f"finetuned: {SHRUG}")
    alone = ask(recipe, "--compare", "finetuned", "--max-tokens", "3", text=ASKED)
    assert alone.stdout == f"{SHRUG}\n"


def test_the_same_seed_draws_the_same_and_another_does_not(recipe):
    def drawn(seed):
        options = ["--prompt", "able ", "--json", "--temperature", "3", "--seed", seed, "--max-tokens", "20"]
        return {name: a["text"] for name, a in answers(ask(recipe, *options)).items()}

    assert drawn("1") == drawn("1")
    assert drawn("1") != drawn("2")


def test_the_chat_template_is_used_unless_the_text_is_raw(recipe):
    voice = open_cast(str(recipe), {}).load(["base"])[0]
    voice.tokenizer.chat_template = TEMPLATE + "={% if add_generation_prompt %}?{% endif %}"
    voice.turns.append(("a", "b"))
    decoded = voice.tokenizer.decode(voice._ids("c", raw=False))
    assert decoded.replace(" ", "") == "abc=?"
    assert voice.tokenizer.decode(voice._ids("c", raw=True)).replace(" ", "") in ("abc", "ab\nc")


def test_only_the_finetuned_models_template_is_borrowed_by_the_pair(recipe, tmp_path):
    tuned = recipe.parent / "finetuned" / "chat_template.jinja"
    tuned.write_text(TEMPLATE)
    try:
        voices = open_cast(str(recipe), {}).load(["base", "finetuned"])
    finally:
        tuned.unlink()
    assert [voice.tokenizer.chat_template for voice in voices] == [TEMPLATE] * 2


def test_each_voice_remembers_its_own_answers(recipe):
    base, tuned = open_cast(str(recipe), {}).load(["base", "finetuned"])
    for voice in (base, tuned):
        answer = voice.ask(ASKED, Settings(max_tokens=3))
        while not answer.stopped:
            answer.step()
        voice.remember(ASKED, answer)
    assert tuned.turns == [(ASKED, SHRUG)]
    assert base.turns[0][1] != SHRUG


def test_a_conversation_longer_than_the_model_is_a_sentence(recipe):
    with pytest.raises(UsageError, match=r"has 130 tokens, and the model takes 128; .*/reset"):
        ask(recipe, "--prompt", "a" * 130)
    found = answers(ask(recipe, "--prompt", "a" * 120, "--json", "--compare", "base"))
    assert found["base"]["tokens"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "bass"], "Unknown voice 'bass'. Did you mean base?"),
        (["--compare", "base,base"], "each voice once"),
        (["--compare", "x="], "NAME=MODEL"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(recipe, options, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        ask(recipe, "--prompt", "a", *options)


def test_an_empty_prompt_is_refused(recipe):
    with pytest.raises(UsageError, match="empty"):
        ask(recipe, text="\n")


def test_a_recipe_without_alphas_has_no_merge_and_says_why(recipe, tmp_path):
    bare = tmp_path / "bare.yml"
    bare.write_text(recipe.read_text().replace("  alpha: 0.4\n", ""))
    assert open_cast(str(bare), {}).usual == ("base", "finetuned")
    with pytest.raises(RecipeError, match="gives no alpha"):
        ask(bare, "--prompt", "a", "--compare", "merged")


def test_a_run_offers_its_best_and_one_knob(recipe, tmp_path):
    for name, alpha in (("tuned", 1.0), ("one-knob", 0.0), ("tuned-knee", 1.0)):
        text = (
            recipe.read_text().replace("alpha: 0.4", f"alpha: {alpha}").replace("rest: 0.4", f"rest: {alpha}")
        )
        (tmp_path / f"{name}.yml").write_text(text)
    (tmp_path / "summary.json").write_text(
        json.dumps({"compared": [{"name": "other", "model": str(recipe.parent / "base")}]})
    )
    cast = open_cast(str(tmp_path), {})
    assert cast.usual == ("base", "finetuned", "merged", "other")
    found = answers(
        ask(
            tmp_path,
            "--prompt",
            ASKED,
            "--json",
            "--max-tokens",
            "3",
            "--compare",
            "base,merged,one-knob,knee,other",
        )
    )
    assert found["merged"]["text"] == found["knee"]["text"] == SHRUG
    assert found["base"]["text"] == found["one-knob"]["text"] == found["other"]["text"] != SHRUG


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C while the fifth token is made."""

    def step(decoder):
        if len(decoder.said) == 4:
            signal.raise_signal(signal.SIGINT)
        return plain_step(decoder)

    plain_step = Decoder.step
    monkeypatch.setattr(Decoder, "step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_an_answer_and_not_the_chat(recipe, ctrl_c, monkeypatch, capsys):
    typed = iter(["door ", "door \\", "east", "/reset", "/quit", "never asked"])
    monkeypatch.setattr("builtins.input", lambda mark="": next(typed))
    (voice,) = open_cast(str(recipe), {}).load(["base"])
    asked = []
    monkeypatch.setattr(voice, "remember", lambda prompt, answer: asked.append((prompt, answer)))
    Chat([voice], Settings(max_tokens=50, raw=True), as_json=False).converse()
    assert [prompt for prompt, _ in asked] == ["door ", "door \neast"]
    assert [(a.stopped, a.tokens) for _, a in asked] == [("interrupted", 5)] * 2
    assert capsys.readouterr().out.splitlines()[0] == asked[0][1].text
    assert next(typed) == "never asked"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_of_a_single_question_prints_what_there_is_and_fails(recipe, ctrl_c):
    result = ask(recipe, "--prompt", "door ", "--compare", "base,finetuned", "--raw")
    assert result.exit_code == 1
    assert result.stdout.startswith("base: ")
    assert result.stdout.splitlines()[1].startswith("finetuned: ")


def test_ctrl_d_leaves_and_an_unknown_command_is_answered(recipe, monkeypatch, capsys):
    typed = ["/rest", ""]

    def read(mark=""):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", read)
    Chat([], Settings(), as_json=False).converse()
    assert "Did you mean /reset?" in capsys.readouterr().err


# ------------------------------------------------------------------ on a terminal


class Terminal:
    """`arma chat` with a terminal of its own."""

    def __init__(self, columns, *arguments):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "COLUMNS": str(columns), "LINES": "30", "TERM": "xterm"}
        call = [sys.executable, "-m", "arma_mergekit", "chat", *arguments]
        self.process = subprocess.Popen(
            call, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def until(self, mark, timeout_s=60):
        """What is printed up to a mark, and no further."""
        deadline = time.monotonic() + timeout_s
        while mark not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode()
                except OSError:  # Linux says so where others give nothing
                    break
        found, _, self.text = self.text.partition(mark)
        return found

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        code = self.process.wait(30)
        os.close(self.master)
        return code


@pytest.mark.slow  # two processes, each of which imports torch
@pytest.mark.parametrize("columns", [120, 40])
def test_a_terminal_shows_columns_stacked_where_it_is_narrow(recipe, columns):
    chat = Terminal(columns, str(recipe), "--max-tokens", "6")
    chat.until("> ")
    chat.type(f"{ASKED}\n")
    shown = chat.until("merged").replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert (" │ " in shown) == (columns == 120)
    assert "base" in shown
    chat.until("/s")
    chat.type("/rest\n")
    chat.until("Did you mean /reset?")
    chat.type("/reset\n")
    chat.type("\x04")
    assert chat.end() == 0


# ------------------------------------------------------------------ drawing


def test_text_is_wrapped_at_spaces_by_the_width_it_is_shown_with():
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert wrap("a\n\n  b", 8) == ["a", "", "  b"]
    assert wrap("日本語日本語", 6) == ["日本語", "日本語"]
    assert cells("e\u0301") == 1


def test_a_model_cannot_steer_the_terminal():
    assert plain("a\x1b[2Jb\x07\r\tc\x9b") == "a[2Jb    c"


def emulate(written):
    """What a terminal shows."""
    rows, y = [""], 0
    for part in written.replace("\x1b", "\0\x1b").split("\0"):
        body = part
        if part.startswith("\x1b["):
            code = next(i for i, c in enumerate(part) if c.isalpha())
            count, kind, body = part[2:code], part[code], part[code + 1 :]
            if kind == "A":
                y -= int(count)
            elif kind == "J":
                del rows[y + 1 :]
                rows[y] = ""
        for k, line in enumerate(body.replace("\r", "").split("\n")):
            if k:
                y += 1
                rows += [""] * (y + 1 - len(rows))
            rows[y] += line
    return [row.rstrip() for row in rows]


def test_columns_grow_and_end_as_if_printed_at_once():
    texts = ["one two three four five six seven", "1\n2\n3\n4\n5\n6", "short"]
    written = []
    columns = Columns(["a", "b", "c"], 36, 6, written.append)
    for n in range(1, 34):
        columns.show([t[:n] for t in texts], [n >= len(t) for t in texts])
    columns.foot(["x", "y", "z"])
    shown = emulate("".join(written))
    wrapped = [wrap(t, 10) for t in texts]
    wanted = [" │ ".join((w[k] if k < len(w) else "").ljust(10) for w in wrapped).rstrip() for k in range(6)]
    assert shown[1:7] == wanted
    assert [cell.strip() for cell in shown[7].split("│")] == ["x", "y", "z"]
