"""Digests are those of sha256sum, and remembered only while the file is the same."""

import hashlib
import os
import threading

import pytest

from arma_mergekit.digest import DigestMemo, cache_directory, known_digest, sha256_of
from arma_mergekit.errors import DataError


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 7])
def test_a_digest_is_that_of_the_standard_library(tmp_path, size):
    (tmp_path / "file").write_bytes(os.urandom(size))
    expected = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert sha256_of(tmp_path / "file") == expected


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Cannot read .*nothing"):
        sha256_of(tmp_path / "nothing")


def test_hashing_stops_when_told(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    stop = threading.Event()
    stop.set()
    assert sha256_of(tmp_path / "file", stop) == ""


def test_files_are_hashed_again_when_they_change(tmp_path):
    memo, file = DigestMemo(tmp_path / "memo" / "digests.sqlite"), tmp_path / "weights"
    file.write_bytes(b"one")
    first = memo.digest(file)
    assert memo.get(file) == first == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"other")
    assert memo.get(file) is None
    assert memo.digest(file) == hashlib.sha256(b"other").hexdigest()
    memo.close()


def test_digests_outlive_the_process_that_took_them(tmp_path):
    (tmp_path / "weights").write_bytes(b"one")
    first = DigestMemo(tmp_path / "digests.sqlite")
    found = first.digest(tmp_path / "weights")
    first.close()
    again = DigestMemo(tmp_path / "digests.sqlite")
    assert again.get(tmp_path / "weights") == found
    again.close()


def test_a_file_that_changed_while_it_was_hashed_is_not_remembered(tmp_path):
    memo, file = DigestMemo(tmp_path / "digests.sqlite"), tmp_path / "weights"
    file.write_bytes(b"one")
    memo.put(file, "0" * 64, before="another state")
    assert memo.get(file) is None
    memo.close()


def test_a_memo_that_cannot_be_kept_does_not_stop_anybody(tmp_path):
    (tmp_path / "digests.sqlite").write_text("no database " * 100)
    (tmp_path / "weights").write_bytes(b"one")
    memo = DigestMemo(tmp_path / "digests.sqlite")
    assert memo.digest(tmp_path / "weights") == hashlib.sha256(b"one").hexdigest()
    memo.close()


def test_the_hubs_cache_needs_no_hashing(tmp_path):
    name = hashlib.sha256(b"content is not read").hexdigest()
    blob = tmp_path / "models--a--b" / "blobs" / name
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"whatever")
    link = tmp_path / "models--a--b" / "snapshots" / "1" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert known_digest(link) == name
    assert DigestMemo().digest(link) == name
    assert known_digest(blob.parent / "other") is None


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("ARMA_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
