"""Reads a Hugging Face `config.json`: which families, keys and values are understood, and a refusal of all others.

A key that changes the mathematics and is not understood must never pass in silence, so keys are accepted only from
lists. Defaults are those of the transformers class of each family. Knows no weights and no layers.
"""

from collections.abc import Mapping
from typing import Any

from streamserve.models.config import AttentionOptions, ModelConfig, RopeConfig, RopeType

_COMMON_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "head_dim": None,
}
_QWEN_DEFAULTS: Mapping[str, Any] = {
    **_COMMON_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
# A family's keys that matter and what transformers takes where one is absent.
FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **_COMMON_DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
    },
    "mistral": {
        **_COMMON_DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
}
ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DEFAULT_THETA = 10_000.0  # of transformers, for every family here
_CHECKED_KEYS = frozenset({"model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters"})
# Keys that do not change logits: training, tokens, generation defaults, bookkeeping.
# fmt: off
_HARMLESS_KEYS = frozenset({
    "_attn_implementation", "_name_or_path", "attention_dropout", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "encoder_no_repeat_ngram_size", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
    "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tie_last_hidden_states", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "unk_token_id",
    "unsloth_fixed", "unsloth_version", "use_cache",
})
# fmt: on
_ROPE_KEYS: Mapping[RopeType, frozenset[str]] = {
    RopeType.DEFAULT: frozenset(),
    RopeType.LINEAR: frozenset({"factor"}),
    RopeType.LLAMA3: frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config of the families llama, mistral, qwen2 and qwen3.

    Both forms are read: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.

    Args:
      config: the parsed `config.json`.

    Returns:
      The model; absent keys take the defaults of transformers.

    Raises:
      ValueError: a family, key or value that is not understood; the message names it.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
        raise ValueError(f"model_type={family!r} is not supported; supported: {', '.join(FAMILY_DEFAULTS)}")
    _check_keys(config, family)
    values = {**FAMILY_DEFAULTS[family], **{k: v for k, v in config.items() if k in FAMILY_DEFAULTS[family]}}
    if values["hidden_act"] != "silu":
        raise ValueError(f"hidden_act={values['hidden_act']!r} is not supported; supported: 'silu'")
    heads = _integer(values, "num_attention_heads")
    has_bias = _flag(values, "attention_bias") if "attention_bias" in values else False
    return ModelConfig(
        model_type=family,
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=_integer(values, "hidden_size"),
        intermediate_size=_integer(values, "intermediate_size"),
        num_layers=_integer(values, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if values["num_key_value_heads"] is None else _integer(values, "num_key_value_heads"),
        head_dim=_head_dim(values, heads),
        rms_norm_eps=_number(values, "rms_norm_eps"),
        rope=_rope(config, _integer(values, "max_position_embeddings")),
        windows=_windows(values, family),
        tied_head=_flag(values, "tie_word_embeddings"),
        attention=AttentionOptions(
            qkv_bias=has_bias or family == "qwen2", output_bias=has_bias, qk_norm=family == "qwen3"
        ),
        max_position=_integer(values, "max_position_embeddings"),
    )


def _check_keys(config: Mapping[str, Any], family: str) -> None:
    architectures = config.get("architectures")
    if architectures is not None and architectures != [ARCHITECTURES[family]]:
        raise ValueError(f"architectures={architectures!r} is not supported for {family}: {[ARCHITECTURES[family]]}")
    known = _CHECKED_KEYS | _HARMLESS_KEYS | FAMILY_DEFAULTS[family].keys()
    for key, value in config.items():
        if key == "partial_rotary_factor" and value == 1.0:
            continue
        if key not in known and value is not None and value is not False:
            raise ValueError(f"{key}={value!r} in config.json is not supported for model_type={family!r}")


def _head_dim(values: Mapping[str, Any], heads: int) -> int:
    if values["head_dim"] is not None:
        return _integer(values, "head_dim")
    hidden = _integer(values, "hidden_size")
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    return hidden // heads


def _windows(values: Mapping[str, Any], family: str) -> tuple[int | None, ...]:
    layers = _integer(values, "num_hidden_layers")
    if family == "llama":
        return (None,) * layers
    window = None if values["sliding_window"] is None else _integer(values, "sliding_window")
    if family == "mistral":
        return (window,) * layers
    if not _flag(values, "use_sliding_window"):
        window = None
    kinds = values["layer_types"]
    if kinds is None:
        first = _integer(values, "max_window_layers", least=0)
        return tuple(window if index >= first else None for index in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise ValueError(f"layer_types={kinds!r} is not supported; one of {_LAYER_TYPES} for each of {layers} layers")
    if window is None and "sliding_attention" in kinds:
        raise ValueError(f"layer_types={kinds!r} needs a sliding_window and use_sliding_window=True")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Merge both forms as transformers does: the nested dict wins over the top level's `rope_theta`."""
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"rope_parameters={nested!r} must be a mapping")
    kind = nested.get("rope_type", nested.get("type", RopeType.DEFAULT.value))
    if kind not in {member.value for member in RopeType}:
        known = ", ".join(member.value for member in RopeType)
        raise ValueError(f"rope_type={kind!r} is not supported in {dict(nested)!r}; supported: {known}")
    rope_type = RopeType(kind)
    for key, value in nested.items():
        is_noop = key == "partial_rotary_factor" and value == 1.0
        if key not in {"rope_type", "type", "rope_theta"} | _ROPE_KEYS[rope_type] and value is not None and not is_noop:
            raise ValueError(f"{key}={value!r} is not supported in rope parameters of type {kind!r}")
    top_theta = config.get("rope_theta")
    theta = {"rope_theta": _DEFAULT_THETA if top_theta is None else top_theta, **nested}
    scaled = {"original_max_position_embeddings": max_position, **nested}
    return RopeConfig(
        rope_type=rope_type,
        theta=_number(theta, "rope_theta"),
        **({} if rope_type is RopeType.DEFAULT else {"factor": _number(scaled, "factor")}),
        **(_llama3(scaled) if rope_type is RopeType.LLAMA3 else {}),
    )


def _llama3(scaled: Mapping[str, Any]) -> dict[str, Any]:
    low, high = _number(scaled, "low_freq_factor"), _number(scaled, "high_freq_factor")
    if high <= low:
        raise ValueError(f"high_freq_factor={high} must be larger than low_freq_factor={low}")
    return {
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position": _integer(scaled, "original_max_position_embeddings"),
    }


def _integer(values: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}={value!r} must be an integer of at least {least}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{key}={value!r} must be a positive number")
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")
    return value
