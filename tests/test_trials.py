import pytest

from arma_mergekit.errors import RunError
from arma_mergekit.trials import Journal


def test_a_record_is_computed_once_and_survives_reopening(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {"recipe": "a"})
    assert journal.once("x/0", lambda: {"reward": 0.1})["reward"] == 0.1
    again = Journal(path, {"recipe": "a"})
    assert again.once("x/0", lambda: pytest.fail("computed twice"))["reward"] == 0.1
    assert len(again) == 1


def test_a_kill_at_any_byte_loses_at_most_the_record_being_written(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {"recipe": "a"})
    for i in range(3):
        journal.append(f"x/{i}", {"reward": i / 3})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        recovered = Journal(path, {"recipe": "a"})
        complete = whole[:cut].count(b"\n")
        assert len(recovered) == max(complete - 1, 0)
        recovered.append("x/new", {"reward": 1.0})
        assert "x/new" in Journal(path, {"recipe": "a"})


def test_a_journal_of_another_run_is_refused_naming_what_changed(tmp_path):
    path = tmp_path / "trials.jsonl"
    Journal(path, {"recipe": "a", "seed": 0})
    with pytest.raises(RunError, match=r"seed was 0 and is 1.*another --out"):
        Journal(path, {"recipe": "a", "seed": 1})


def test_a_damaged_journal_is_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    Journal(path, {"recipe": "a"})
    path.write_bytes(path.read_bytes() + b"{garbage}\n")
    with pytest.raises(RunError, match="damaged"):
        Journal(path, {"recipe": "a"})


def test_what_the_caller_gets_is_what_a_resumed_run_reads(tmp_path):
    path = tmp_path / "trials.jsonl"
    record = {"values": (0.1, 1 / 3), "none": None}
    first = Journal(path, {}).once("k", lambda: record)
    assert first == Journal(path, {}).once("k", dict)
