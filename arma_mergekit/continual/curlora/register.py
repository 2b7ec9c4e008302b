"""How PEFT comes to know CURLoRA.

PEFT 0.21's `register_peft_method` accepts a name only if it is a member of the enumeration `PeftType`, and Python does
not let an enumeration that has members be extended: adding one would mean writing to its private tables. So we do not
touch `PeftType`. What PEFT looks methods up in are four public dictionaries, and it finds "CURLORA" in them the same
way whether the key is a string, a `PeftType` or our own `CURLoRAType`: all are strings that are equal and hash alike.
PEFT compares types with members of `PeftType` but never converts one. So we make the entries that
`register_peft_method` would make, and no more; tests/test_curlora.py says so by name when a later PEFT disagrees.
"""

from __future__ import annotations

from arma_mergekit.continual.curlora.config import CURLoRAConfig, CURLoRAType
from arma_mergekit.continual.curlora.model import CURLoRAModel
from arma_mergekit.errors import ArmaError

__all__ = ["register"]


def register() -> None:
    """Make PEFT know the method, once; ArmaError if a method of that name is there that is not ours."""
    from peft import mapping

    entries = (
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, CURLoRAConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, CURLoRAModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, CURLoRAModel.prefix),
    )
    for table, entry in entries:
        known = table.setdefault(CURLoRAType.CURLORA, entry)
        if known is not entry:
            raise ArmaError(f"PEFT already has a method CURLORA, {known!r}; use that one, or another PEFT.")
