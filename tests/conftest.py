"""What all tests share: no network, one thread, and tiny checkpoints written byte by byte."""

import json
import os
import socket
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, also by subprocesses
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that share a busy core spin
os.environ["ARMA_CACHE"] = tempfile.mkdtemp(
    prefix="arma-test-"
)  # scores of earlier sessions would hide defects

import numpy as np
import pytest

LOOPBACK = ("127.", "::1", "localhost")


def pytest_configure(config):
    """Warnings are errors, but those that mergekit 0.1.5 gives while it is imported are its own."""
    config.addinivalue_line("filterwarnings", "ignore:numpy.core is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Sockets reach this machine only."""

    def guard(name):
        connect = getattr(socket.socket, name)

        def guarded(self, address, *rest):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
                raise RuntimeError(f"A test tried to reach the network at {address}.")
            return connect(self, address, *rest)

        monkeypatch.setattr(socket.socket, name, guarded)

    guard("connect")
    guard("connect_ex")


@pytest.fixture(scope="session")
def tiny_llama():
    """The function `write_tiny_llama`: (path, seed, **config) -> path of a checkpoint directory."""
    return write_tiny_llama


def write_tiny_llama(path, seed=0, **config):
    """Write config.json and model.safetensors of a random two-layer Llama (30 k parameters) to ``path``.

    ``config`` changes or adds keys of config.json; the weights follow it, also its ``dtype`` (bfloat16,
    float16, float32). Equal seeds give equal weights.
    """
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    } | config  # fmt: skip
    random = np.random.default_rng(seed)
    tensors = {
        name: (name.endswith("norm.weight") + 0.1 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in llama_shapes(config).items()
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    write_safetensors(path / "model.safetensors", tensors, config["dtype"])
    return path


def llama_shapes(config):
    """Name -> shape of every tensor of a Llama checkpoint."""
    hidden, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, pairs = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (heads, hidden),
                "self_attn.k_proj": (pairs, hidden),
                "self_attn.v_proj": (pairs, hidden),
                "self_attn.o_proj": (hidden, heads),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
            }.items()
        }
    return shapes


def write_safetensors(file, tensors, dtype="float32"):
    """Write float32 arrays as a safetensors file of that dtype (bfloat16 is rounded toward zero)."""
    header, blobs, start = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in tensors.items():
        if dtype == "bfloat16":
            blob = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            blob = values.astype({"float16": "<f2", "float32": "<f4"}[dtype]).tobytes()
        code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
        header[name] = {"dtype": code, "shape": values.shape, "data_offsets": [start, start + len(blob)]}
        blobs.append(blob)
        start += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
