"""Folders with the configuration of a known model and no weights: vLLM draws random ones (load_format dummy).

Speed depends on shapes, not on values: a model can be measured that is not there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.roofline import GEOMETRIES


@dataclass(frozen=True)
class Sizes:
    """What `GEOMETRIES` does not say of a model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


SIZES = {
    "llama-3.1-8b": Sizes(32, 4096, 14336, 128256),
    "qwen3-32b": Sizes(64, 5120, 25600, 151936),
    "mha-7b": Sizes(32, 4096, 11008, 32000),
}


def write_config(folder: Path, name: str, layers: int | None, max_model_len: int) -> None:
    """Writes ``config.json`` of `name` as a Llama.

    Fewer layers come with a vocabulary cut in proportion, so that the output layer keeps its share of a step.

    Args:
        folder: Exists.
        name: One of `SIZES`.
        layers: None for all.
        max_model_len: Tokens that positions are made for.

    Raises:
        ValueError: `layers` is not between 1 and the model's.
    """
    heads, sizes = GEOMETRIES[name], SIZES[name]
    layers = sizes.num_layers if layers is None else layers
    if not 1 <= layers <= sizes.num_layers:
        raise ValueError(f"--layers: {layers}; allowed for {name}: 1 to {sizes.num_layers}")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_size,
        "vocab_size": sizes.vocab_size * layers // sizes.num_layers // 64 * 64,
        "max_position_embeddings": max_model_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
