"""A model directory: config.json and the tensors of its safetensors files, headers only.

It knows one model; no adapters, other models or recipes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.checkpoint.header import TensorInfo, read_header, read_json
from arma_mergekit.checkpoint.locate import ModelReference, contained, locate, readable, refuse_siamese
from arma_mergekit.errors import CheckpointError

__all__ = ["Checkpoint", "read_tensor", "some", "tensors_of"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MOST_PROBLEMS = 40  # told of one model
NAMED = 3  # how many things of a kind an error names
# numpy has no bfloat16 or 8-bit floats: those come as their bits
NUMPY = {
    "BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8",
    "I64": "i8", "F16": "f2", "F32": "f4", "F64": "f8", "C64": "c8", "BF16": "u2", "F8_E4M3": "u1",
    "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A model seen through its headers; ``tensors`` maps names to where their bytes lie."""

    ref: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that says what the model is: weights, config, tokenizer."""
        weights = {tensor.file for tensor in self.tensors.values()}
        return tuple(
            sorted(weights | {p for n in ("config.json", "tokenizer.json") if (p := self.path / n).is_file()})
        )

    @property
    def directories(self) -> dict[str, Path]:
        """Where it is, by its reference."""
        return {self.ref: self.path}

    @classmethod
    def open(cls, ref: str, base_dir: Path | None = None) -> Checkpoint:
        """Read config and headers; CheckpointError with every file that is wrong, one sentence a line.

        ``ref`` is `path[@revision]`: local, relative to ``base_dir`` (by default the current directory), or a
        hub id in the local cache.
        """
        reference = ModelReference.parse(ref)
        if reference.adapter is not None:
            raise CheckpointError(f"{ref} has an adapter; open it with open_model.")
        with readable(ref):
            return cls.at(locate(reference.model, reference.revision, base_dir), ref)

    @classmethod
    def at(cls, path: Path, ref: str | None = None) -> Checkpoint:
        """The model in a directory, whatever characters are in its name."""
        return cls(ref or str(path), path, read_json(_existing(path, "config.json")), tensors_of(path))

    def bytes_read(self, name: str) -> int:
        """Bytes of files that reading this tensor touches."""
        return self.tensors[name].nbytes

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a read-only map of its file; bf16 as its bits (``uint16``), 8-bit floats likewise."""
        return read_tensor(self.tensors[name])


def read_tensor(tensor: TensorInfo) -> npt.NDArray[Any]:
    """Map a tensor read-only; CheckpointError if the file has become shorter than its header said."""
    if tensor.dtype not in NUMPY:
        raise CheckpointError(f"{tensor.file}, tensor {tensor.name!r}: numpy cannot hold {tensor.dtype}.")
    dtype = np.dtype(NUMPY[tensor.dtype]).newbyteorder("<")
    if tensor.numel == 0:
        return np.empty(tensor.shape, dtype)
    try:
        return np.memmap(tensor.file, dtype, "r", tensor.start, tensor.shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{tensor.file}, tensor {tensor.name!r}: the file changed while it was in use; start again."
        ) from error


def tensors_of(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a model directory, single file or sharded, by name; CheckpointError lists what is wrong."""
    single, index = (path / SINGLE).exists(), (path / INDEX).exists()
    if single and index:
        raise CheckpointError(
            f"{path} has both {SINGLE} and {INDEX}: mergekit reads the second, transformers the first; "
            "delete the stale one."
        )
    if index:
        return _sharded(path, read_json(_existing(path, INDEX)))
    return dict(sorted(read_header(_existing(path, SINGLE)).items()))


def _existing(path: Path, name: str) -> Path:
    file = contained(path, name)
    if file.is_file():
        return file
    if file.is_symlink():
        raise CheckpointError(f"{file} is a link to a file that does not exist; download the model again.")
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if name == SINGLE and pickles:
        raise CheckpointError(
            f"{path} holds only pickled weights ({pickles[0]}), which run code when opened and so never are; "
            "convert them to safetensors (save_pretrained of a trusted copy)."
        )
    refuse_siamese(path)
    wanted = f"{SINGLE} or {INDEX}" if name == SINGLE else name
    raise CheckpointError(f"{path} has no {wanted}; name a directory with a whole model.")


def _sharded(path: Path, index: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Tensors of all shards, the index and the shards agreeing on where each is."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{path / INDEX} needs weight_map, from tensor names to shard names; download it again."
        )
    problems: list[str] = []
    found: dict[str, TensorInfo] = {}
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    for shard, listed in sorted(shards.items()):
        try:
            header = _shard(path, shard)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += _disagreements(path / shard, listed, header, weight_map)
        found.update((name, info) for name, info in header.items() if name in listed)
    if problems:
        raise CheckpointError("\n".join(problems[:MOST_PROBLEMS]))
    return dict(sorted(found.items()))


def _shard(path: Path, shard: str) -> dict[str, TensorInfo]:
    if Path(shard).suffix in PICKLES:
        raise CheckpointError(
            f"{path / INDEX} lists the pickled shard {shard}, which is never opened; use safetensors."
        )
    odd = CheckpointError(f"{path / INDEX} lists the shard {shard[:60]!r}, which is no .safetensors file.")
    if not shard.isprintable():
        raise odd
    file = contained(path, shard)
    if not shard.endswith(".safetensors"):
        raise odd
    if not file.is_file():
        raise CheckpointError(f"Shard {file} is missing though {INDEX} lists it; download it again.")
    return read_header(file)


def _disagreements(
    file: Path, listed: set[str], header: Mapping[str, TensorInfo], weight_map: Mapping[str, str]
) -> list[str]:
    """Sentences on tensors that a shard lacks though the index lists them, or that two shards hold."""
    faults = {
        f"lacks {{}} though {INDEX} lists it there; download both again": listed - set(header),
        "also holds {}, which belongs to another shard; download it again": (set(header) - listed)
        & set(weight_map),
    }
    return [f"Shard {file} {fault.format(some(names))}." for fault, names in faults.items() if names]


def some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    shown = sorted(names)[:NAMED]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(shown) + more
