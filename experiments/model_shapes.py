"""Well-known models as Hugging Face configs without weights: for what needs their shapes and not their knowledge."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import common

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama3_8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "llama3_1b": {  # Llama-3.2-1B, a draft of it
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3_8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
    },
}


def write(folder: pathlib.Path, name: str, *, layers: int | None = None) -> pathlib.Path:
    """Write a model's `config.json` into a folder of its own; gives the folder, for `load_format="dummy"`.

    Args:
      folder: that exists.
      name: of `SHAPES`.
      layers: instead of the model's own number.

    Raises:
      RunError: the name is unknown.
    """
    if name not in SHAPES:
        raise common.RunError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    shape = dict(SHAPES[name])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    path = folder / f"{name}-{shape['num_hidden_layers']}"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape))
    return path
