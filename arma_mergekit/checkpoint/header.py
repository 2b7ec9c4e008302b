"""The header of one safetensors file, believed only after every claim in it has been checked.

    byte 0     n, 8 bytes, little endian: length of the header
    byte 8     n bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [start, stop]}, …}
    byte 8+n   the tensors' bytes, without gaps or overlaps, to the end of the file

It knows one file; no models. Nothing is allocated because a header asks for it: at most `HEADER_LIMIT` bytes
are read, and only after the file has been found to be that long. Source: the format's description and limits
in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from arma_mergekit.errors import CheckpointError, unknown

__all__ = ["DTYPE_BITS", "FLOATS", "TensorInfo", "read_header", "read_json", "read_metadata"]

HEADER_LIMIT = 100_000_000  # the safetensors library's own
JSON_LIMIT = 20_000_000
MOST_LISTS = 2_000_000  # in a header: two for each tensor
LONGEST_NAME = 500
MOST_DIMENSIONS = 64
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
FLOATS = frozenset({"BF16", "F16", "F32", "F64"})  # what the kernel averages
LOOKALIKES = {
    b"version ": "it is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"PK\x03\x04": "it is a zip or pickled checkpoint, which is never opened; convert it to safetensors",
    b"\x80\x02": "it is a pickle, which is never opened; convert it to safetensors",
    b"<": "it is a web page; download the file again",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; ``start`` and ``stop`` are byte offsets in ``file``.

    ``dtype`` is spelled as safetensors does (``BF16``).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file, in the order of their bytes; CheckpointError at the first lie."""
    raw, size = _header_bytes(file)
    if raw.count(b"[") + raw.count(b"{") > MOST_LISTS:
        raise CheckpointError(f"{file} has a header of more parts than any model has; download it again.")
    header = _parse(raw, str(file), _no_constant)
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file} is not a safetensors file: its header is no JSON object; download it again."
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map names to strings; save the checkpoint again.")
    tensors = [_tensor(file, name, entry, 8 + len(raw)) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_layout(file, tensors, 8 + len(raw), size)
    return {t.name: t for t in tensors}


def read_metadata(file: Path) -> tuple[dict[str, str], bytes]:
    """`__metadata__` of a file whose header was read before, and the header's bytes."""
    raw, _ = _header_bytes(file)
    metadata: dict[str, str] = _parse(raw, str(file), _no_constant).get("__metadata__", {})
    return metadata, raw


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of moderate size; CheckpointError otherwise."""
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise CheckpointError(
                f"{file} is larger than {JSON_LIMIT:,} bytes, too large for what it should hold."
            )
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}.") from error
    content = _parse(raw, str(file))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object; download it again.")
    return content


def _header_bytes(file: Path) -> tuple[bytes, int]:
    """Header (n bytes) and size of the file."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(HEADER_LIMIT, size - 8):
                _refuse_length(file, first, length, size)
            return stream.read(length), size
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}.") from error


def _refuse_length(file: Path, first: bytes, length: int, size: int) -> NoReturn:
    reason = next((text for start, text in LOOKALIKES.items() if first.startswith(start)), None)
    if reason:
        raise CheckpointError(f"{file} is not a safetensors file: {reason}.")
    claim = f"its header claims {length:,} bytes" if len(first) == 8 else "it has no header"
    raise CheckpointError(
        f"{file} is truncated or not a safetensors file: {claim}, the file has {size:,}; download it again."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:LONGEST_NAME]!r} occurs twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _parse(raw: bytes, what: str, constant: Callable[[str], Any] = float) -> Any:
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what} holds no valid JSON ({reason}); download it again.") from error


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry, its own claims checked; ``data`` is where the tensors' bytes begin."""
    fault = _name_fault(name) or _entry_fault(entry)
    if fault:
        raise CheckpointError(f"{file}, tensor {name[:LONGEST_NAME]!r}: {fault}")
    start, stop = entry["data_offsets"]
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, data + start, data + stop)


def _name_fault(name: str) -> str:
    odd = len(name) > LONGEST_NAME or not name.isprintable()
    return "no name of a tensor; download the file again." if odd else ""


def _entry_fault(entry: Any) -> str:
    """What is wrong with a tensor's dtype, shape and offsets, "" if nothing."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        return "needs dtype, shape and data_offsets; save the checkpoint again."
    if dtype not in DTYPE_BITS:
        return unknown("dtype", dtype, DTYPE_BITS)
    if len(offsets) != 2 or len(shape) > MOST_DIMENSIONS or not all(map(_is_count, shape + offsets)):
        return "shape and offsets must be whole numbers >= 0 (below 2^63, and few)."
    bits, span = math.prod(shape) * DTYPE_BITS[dtype], offsets[1] - offsets[0]
    if bits == 8 * span:
        return ""
    return (
        f"{dtype} of shape {shape} takes {-(-bits // 8):,} bytes, but its offsets span {span:,}; "
        "download the file again."
    )


def _check_layout(file: Path, tensors: list[TensorInfo], data: int, size: int) -> None:
    """Tensors sorted by offset must follow each other from ``data`` to the end of the file."""
    end = data
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{file}, tensor {tensor.name!r}: its data {fault}; download the file again."
            )
        end = tensor.stop
        if end > size:
            raise CheckpointError(
                f"{file}, tensor {tensor.name!r}: its data ends at byte {end:,}, but the file has {size:,}; "
                "it is truncated, download it again."
            )
    if end != size:
        raise CheckpointError(
            f"{file} has {size - end:,} bytes that its header does not mention; download it again."
        )
