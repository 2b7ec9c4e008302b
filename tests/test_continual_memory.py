"""The replay memory: balanced, uniform, reproducible, private."""

import random
import stat
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.continual.memory import Memory, balanced
from arma_mergekit.errors import DataError


def records(count, labels=("a", "b", "c")):
    return [{"prompt": f"p{k}", "label": labels[k % len(labels)]} for k in range(count)]


def test_two_percent_of_each_task_stay():
    memory = Memory()
    memory.add("one", records(300))
    memory.add("two", records(10))
    assert {task: len(kept) for task, kept in memory.tasks.items()} == {"one": 6, "two": 1}


def test_labels_are_balanced_where_there_are_labels():
    rare = [{"prompt": f"r{k}", "label": "rare"} for k in range(3)]
    kept = balanced([*records(300, ("x", "y")), *rare], 12, "0")
    assert Counter(r["label"] for r in kept) == {"x": 5, "y": 4, "rare": 3} or Counter(r["label"] for r in kept) == {
        "x": 4, "y": 5, "rare": 3,
    }  # fmt: skip
    assert len(balanced([{"prompt": str(k)} for k in range(50)], 7, "0")) == 7


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 20), st.randoms(use_true_random=False))
def test_what_stays_depends_on_the_set_and_the_seed_only(labels, size, rng):
    rows = [{"prompt": str(k), "label": label} for k, label in enumerate(labels)]
    mixed = list(rows)
    rng.shuffle(mixed)
    kept = balanced(rows, size, "s")
    assert kept == balanced(mixed, size, "s")
    assert len(kept) == min(size, len(rows))
    counts = Counter(r["label"] for r in kept)
    # no label could have one more while another has two more than it
    for label, count in Counter(labels).items():
        assert counts[label] == count or counts[label] >= max(counts.values()) - 1


def test_every_record_is_as_likely_as_any_other():
    seen = Counter(r["prompt"] for seed in range(2000) for r in balanced(records(10, ("x",)), 3, str(seed)))
    assert all(abs(count - 600) < 5 * 20.5 for count in seen.values())  # sd of a binomial (2000, .3)
    assert len(seen) == 10


def test_seeds_differ_and_draws_repeat():
    memories = [Memory(0.5, seed) for seed in (0, 0, 1)]
    for memory in memories:
        memory.add("t", records(60))
    assert memories[0].tasks == memories[1].tasks != memories[2].tasks
    assert memories[0].batch(3, 5) == memories[1].batch(3, 5) != memories[0].batch(4, 5)
    assert len({r["prompt"] for r in memories[0].batch(0, 30)}) == 30
    assert len(memories[0].batch(0, 1000)) == 30


def test_nothing_is_kept_at_share_zero():
    memory = Memory(0)
    memory.add("t", records(60))
    assert not memory
    with pytest.raises(ValueError, match="0 <= share <= 1"):
        Memory(2)


def test_a_task_is_added_once():
    memory = Memory()
    memory.add("t", records(60))
    with pytest.raises(ValueError, match="in the memory already"):
        memory.add("t", records(60))


def test_a_saved_memory_comes_back_and_only_its_owner_reads_it(tmp_path):
    memory, other = Memory(0.2), Memory(0.2)
    memory.add("τ", [{"prompt": f"line\n{k}\u2028", "label": None} for k in range(20)])
    memory.save(tmp_path / "memory.jsonl")
    memory.save(tmp_path / "memory.jsonl")
    other.load(tmp_path / "memory.jsonl")
    assert other.tasks == memory.tasks
    assert other.batch(1, 3) == memory.batch(1, 3)
    assert stat.S_IMODE((tmp_path / "memory.jsonl").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["memory.jsonl"]


@pytest.mark.parametrize("text", ["{", '{"task": "t"}\n', "[]\n", '{"task": "t", "record": 3}\n'])
def test_a_damaged_memory_is_refused(tmp_path, text):
    (tmp_path / "memory.jsonl").write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        Memory().load(tmp_path / "memory.jsonl")


def test_random_state_of_others_is_left_alone():
    random.seed(0)
    before = random.getstate()
    memory = Memory(1)
    memory.add("t", records(9))
    memory.batch(0, 3)
    assert random.getstate() == before
