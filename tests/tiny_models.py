"""Test doubles: tiny random checkpoints of every family, written by transformers itself."""

import json
import pathlib
from typing import Any

import torch
import transformers

VOCAB = 97
STD = 0.2  # large enough that greedy tokens vary and every mistake shows in the logits

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of D = 8: one wavelength is kept, one interpolated, two are divided
}
# Name of a test family to its model_type and the settings that set it apart.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3": ("llama", {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "num_attention_heads": 6}),
}


def tiny_config(family: str, **overrides: Any) -> transformers.PretrainedConfig:
    """Build the transformers config of a test family."""
    model_type, settings = FAMILIES[family]
    return transformers.AutoConfig.for_model(model_type, **{**_COMMON, **settings, **overrides})


def make_tiny(family: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """Build a random float32 model whose every parameter matters, biases and norms included."""
    config = tiny_config(family, **overrides)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * STD
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def save_tiny(folder: pathlib.Path, family: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """Write a random checkpoint in the Hugging Face layout, and return the model that it holds.

    Args:
      folder: where to; made if need be.
      family: a key of `FAMILIES`.
      seed: of the weights.
      **overrides: settings of the config.
    """
    model = make_tiny(family, seed=seed, **overrides)
    model.save_pretrained(folder)
    return model


def rewrite_in_older_form(folder: pathlib.Path) -> None:
    """Turn a folder's `rope_parameters` into `rope_theta` and `rope_scaling`, as older versions wrote them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))
