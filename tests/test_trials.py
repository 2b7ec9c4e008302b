from contextlib import closing

import pytest

from arma_mergekit.errors import RunError
from arma_mergekit.trials import Journal


def test_a_record_is_computed_once_and_survives_reopening(tmp_path):
    path = tmp_path / "trials.jsonl"
    with closing(Journal(path, {"recipe": "a"})) as journal:
        assert journal.once("x/0", lambda: {"reward": 0.1})["reward"] == 0.1
    with closing(Journal(path, {"recipe": "a"})) as journal:
        assert journal.once("x/0", lambda: pytest.fail("computed twice"))["reward"] == 0.1
        assert len(journal) == 1


def test_a_kill_at_any_byte_loses_at_most_the_record_being_written(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {"recipe": "a"})
    for i in range(3):
        journal.append(f"x/{i}", {"reward": i / 3})
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        recovered = Journal(path, {"recipe": "a"})
        complete = whole[:cut].count(b"\n")
        assert len(recovered) == max(complete - 1, 0)
        recovered.append("x/new", {"reward": 1.0})
        recovered.close()
        with closing(Journal(path, {"recipe": "a"})) as again:
            assert "x/new" in again


def test_a_journal_of_another_run_is_refused_naming_what_changed(tmp_path):
    path = tmp_path / "trials.jsonl"
    with closing(Journal(path, {"recipe": "a", "seed": 0})) as journal:
        journal.append("x", {})
    with pytest.raises(RunError, match=r"seed was 0 and is 1.*another --out"):
        Journal(path, {"recipe": "a", "seed": 1})


def test_a_journal_that_holds_no_score_yet_takes_another_run(tmp_path):
    path = tmp_path / "trials.jsonl"
    Journal(path, {"seed": 0}).close()
    Journal(path, {"seed": 1}).close()
    assert path.read_text().count("fingerprint") == 1


@pytest.mark.parametrize("line", ["{garbage}", "[1]", "{}", '{"key": 3}'])
def test_a_damaged_journal_is_refused(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    with closing(Journal(path, {"recipe": "a"})) as journal:
        journal.append("x", {})
    path.write_bytes(path.read_bytes() + f"{line}\n".encode())
    with pytest.raises(RunError, match="damaged"):
        Journal(path, {"recipe": "a"})


def test_a_journal_without_its_first_line_is_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"key": "x"}\n')
    with pytest.raises(RunError, match="first line"):
        Journal(path, {})


def test_a_directory_in_use_is_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    with closing(Journal(path, {})), pytest.raises(RunError, match="in use by another run"):
        Journal(path, {})


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write"):
        Journal(tmp_path / "file" / "trials.jsonl", {})


def test_what_the_caller_gets_is_what_a_resumed_run_reads(tmp_path):
    path = tmp_path / "trials.jsonl"
    with closing(Journal(path, {})) as journal:
        first = journal.once("k", lambda: {"values": (0.1, 1 / 3), "none": None})
    with closing(Journal(path, {})) as journal:
        assert journal.once("k", dict) == first
