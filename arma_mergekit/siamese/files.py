"""A siamese model as a directory, and from the directories of its parts.

    siamese.json                     settings, where the base is and the sha256 of its weights; written last
    gate.safetensors                 A.weight (r, 4d), B.weight (d, r), float32; not in the modes without a gate
    adapter/                         as PEFT saves it; so `base+DIR/adapter` is the tuned side alone, also in a recipe

With two checkpoints siamese.json names the second one too, and there is no adapter. The base's weights are never
copied: a directory is used with the base it was made with, or not at all. It knows files and PEFT's configs; what is
computed is model.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arma_mergekit import __version__
from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, ModelReference, open_model
from arma_mergekit.checkpoint.header import read_header, read_json
from arma_mergekit.checkpoint.locate import SIAMESE, contained, locate
from arma_mergekit.checkpoint.lora import PLAIN_INIT
from arma_mergekit.checkpoint.lowrank import CONFIG, shortened, tensors_in
from arma_mergekit.checkpoint.model import some
from arma_mergekit.digest import DigestMemo
from arma_mergekit.errors import CheckpointError, InputError, RunError, unknown
from arma_mergekit.load import as_dtype, build_model, is_finite, open_tokenizer, readable
from arma_mergekit.siamese.config import SiameseConfig
from arma_mergekit.whole import write_whole

__all__ = [
    "ADAPTER",
    "GATE",
    "Side",
    "Source",
    "from_parts",
    "from_pretrained",
    "load_adapter",
    "save_pretrained",
    "tokenizer_of",
]

GATE = "gate.safetensors"
ADAPTER = "adapter"
FORMAT = 1


@dataclass(frozen=True)
class Side:
    """A checkpoint: hub id or absolute path, and the sha256 of each of its weight files."""

    ref: str
    sha256: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Side:
        """This checkpoint, as it is now."""
        files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
        memo = DigestMemo.default()
        try:
            sha256 = {file.name: memo.digest(file) for file in files}
        finally:
            memo.close()
        local = Path(checkpoint.ref).is_dir()
        return cls(str(Path(checkpoint.ref).absolute()) if local else checkpoint.ref, sha256)

    @classmethod
    def from_json(cls, data: Any, where: Path) -> Side:
        """What `to_json` was made of; CheckpointError otherwise."""
        found = data if isinstance(data, dict) else {}
        ref, sha256 = found.get("model"), found.get("sha256")
        if not isinstance(ref, str) or not isinstance(sha256, dict):
            raise CheckpointError(f"{where} needs base with model and sha256; save the model again.")
        return cls(ref, sha256)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"model": self.ref, "sha256": dict(self.sha256)}


@dataclass(frozen=True)
class Source:
    """Where the weights are that are not saved: of the base, and of a second checkpoint if there is one."""

    base: Side
    second: Side | None = None


def from_parts(
    cls: Any, base: str, tuned: str, config: SiameseConfig, dtype: torch.dtype | None = None,
    device_map: Any = None, train_adapter: bool = False,
) -> Any:  # fmt: skip
    """See `SiameseForCausalLM.from_parts`."""
    checkpoint = _plain(base)
    reference = ModelReference.parse(tuned)
    path = locate(reference.model, reference.revision)
    lm = build_model(checkpoint.path, dtype or as_dtype(None, checkpoint), device_map)
    if (path / CONFIG).is_file():
        adapted = load_adapter(lm, path, train_adapter)
        return cls(adapted, config, source=Source(Side.of(checkpoint))).eval()
    second = _plain(tuned)
    other = build_model(second.path, lm.dtype, device_map)
    if other.config.get_text_config().vocab_size != lm.config.get_text_config().vocab_size:
        raise CheckpointError(
            f"{base} and {tuned} have different vocabularies, so their passes cannot be mixed."
        )
    return cls(other, config, lm, Source(Side.of(checkpoint), Side.of(second))).eval()


def from_pretrained(
    cls: Any, path: Path, base: str | None = None, dtype: torch.dtype | None = None, device_map: Any = None,
    train_adapter: bool = False,
) -> Any:  # fmt: skip
    """See `SiameseForCausalLM.from_pretrained`."""
    file = contained(path, SIAMESE)
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {SIAMESE}; name a directory that a siamese model was saved into."
        )
    record = read_json(file)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {shortened(record.get('format'))}, but this version of arma_mergekit reads {FORMAT}."
        )
    config = _settings(file, record.get("settings"))
    side = Side.from_json(record.get("base"), file)
    _check_same(file, side, base or side.ref)
    dtype = dtype or as_dtype(record.get("dtype"), _plain(base or side.ref))
    if "second" in record:
        second = Side.from_json(record["second"], file)
        _check_same(file, second, second.ref)
        tuned = second.ref
    else:
        tuned = str(contained(path, ADAPTER))
    model = from_parts(cls, base or side.ref, tuned, config, dtype, device_map, train_adapter)
    if model.body.gate is not None:
        _load_gate(contained(path, GATE), model.body.gate)
    return model


def save_pretrained(model: Any, path: Path) -> None:
    """See `SiameseForCausalLM.save_pretrained`; RunError if it was not made of files."""
    from safetensors.torch import save_file

    source = model.source
    if source is None:
        raise RunError("A siamese model is saved with the name of its base; make it with from_parts.")
    path.mkdir(parents=True, exist_ok=True)
    (path / SIAMESE).unlink(missing_ok=True)
    if source.second is None:
        model.tuned.save_pretrained(str(path / ADAPTER), save_embedding_layers=False)
        (path / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's card of blanks
    if model.body.gate is not None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in model.body.gate.named_parameters()}
        save_file(tensors, str(path / GATE), metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "arma_mergekit": __version__,
        "settings": model.siamese_config.to_json(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "base": source.base.to_json(),
        **({} if source.second is None else {"second": source.second.to_json()}),
    }
    write_whole({path / SIAMESE: json.dumps(record, indent=2) + "\n"})


def tokenizer_of(model: Any) -> Any:
    """See `SiameseForCausalLM.tokenizer`."""
    if model.source is None:
        raise RunError("A siamese model that was not made of files has no tokenizer; load that of its base.")
    return open_tokenizer(_plain(model.source.base.ref).path)


def load_adapter(lm: Any, path: Path, trainable: bool = False) -> Any:
    """The PeftModel of an adapter's directory; CheckpointError unless switching it off gives the base."""
    from peft import PeftModel, get_peft_model_state_dict

    import arma_mergekit.continual.curlora  # noqa: F401 - PEFT knows its adapters only then

    _check_adapter(path)
    _, stored = tensors_in(path)
    with readable(f"The adapter {path}", "is it an adapter of another base?"):
        model = PeftModel.from_pretrained(lm, str(path), is_trainable=trainable)
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if wanted != set(stored):
        raise CheckpointError(
            f"{path} has other tensors than its config asks for ({some(wanted ^ set(stored))}); is it of another base?"
        )
    return model


def _check_adapter(path: Path) -> None:
    """CheckpointError for an adapter that changes more than the layers it can be switched off in."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = contained(path, CONFIG)
    config = read_json(file)
    kinds = [str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    kind = config.get("peft_type")
    if kind not in kinds:
        raise CheckpointError(f"{file}: {unknown('peft_type', str(kind), kinds)}")
    used = [
        key
        for key in ("bias", "lora_bias", "layer_replication")
        if config.get(key) not in (None, False, "none")
    ]
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        used.append("init_lora_weights")
    if used:
        settings = ", ".join(f"{key} {shortened(config[key])}" for key in used)
        raise CheckpointError(
            f"{file}: with {settings} the base is not what is left when the adapter is off."
        )


def _plain(ref: str) -> Checkpoint:
    checkpoint = open_model(ref)
    if isinstance(checkpoint, AdaptedCheckpoint):
        raise CheckpointError(f"{ref} has an adapter; name base and adapter apart.")
    return checkpoint


def _settings(file: Path, data: Any) -> SiameseConfig:
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} needs settings; save the model again.")
    try:
        return SiameseConfig.from_json(data)
    except InputError as error:
        raise CheckpointError(f"{file}, settings: {error}") from error


def _check_same(file: Path, side: Side, ref: str) -> None:
    """CheckpointError if the checkpoint is not the one the gate was trained with."""
    found = Side.of(_plain(ref))
    if dict(found.sha256) != dict(side.sha256):
        raise CheckpointError(
            f"{file} belongs to other weights than those of {ref}; name the base it was made with ({side.ref})."
        )


def _load_gate(file: Path, gate: torch.nn.Module) -> None:
    """Fill the gate; CheckpointError unless the file holds just its tensors, finite."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(f"{file} is missing; save the model again.")
    header, wanted = read_header(file), gate.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if {name: info.shape for name, info in header.items()} != shapes or any(
        info.dtype != "F32" for info in header.values()
    ):
        found = ", ".join(f"{name} {info.dtype} {info.shape}" for name, info in header.items())
        raise CheckpointError(
            f"{file} must hold F32 tensors {shapes}, but has {shortened(found)}; wrong gate?"
        )
    tensors = load_file(str(file))
    if not all(map(is_finite, tensors.values())):
        raise CheckpointError(f"{file} has NaN or infinite values; train the gate again.")
    gate.load_state_dict(tensors)
