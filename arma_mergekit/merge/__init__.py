"""From a recipe to a directory at copy speed, and back: is this directory what its recipe says?

    plan -> lay_out -> draft directory <- fill (weights), beside (config, tokenizer), lock, card -> rename

It knows plans and checkpoints; no torch, transformers, command lines or tuning.
"""

from arma_mergekit.merge.lock import LOCK, pinned, read_lock
from arma_mergekit.merge.reproduce import Mismatch, compare_locks
from arma_mergekit.merge.run import Merged, merge
from arma_mergekit.merge.verify import Report, verify

__all__ = ["LOCK", "Merged", "Mismatch", "Report", "compare_locks", "merge", "pinned", "read_lock", "verify"]
