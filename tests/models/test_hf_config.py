"""What is read from a config.json, with which defaults, and what is refused by name."""

import pytest
import transformers

from streamserve.models import from_hf
from streamserve.models.config import ModelConfig, RopeConfig, RopeType

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 4}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_values_are_those_of_transformers(family):
    ours, theirs = from_hf({"model_type": family}), transformers.AutoConfig.for_model(family)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    window = theirs.sliding_window if family == "mistral" else None
    bias = getattr(theirs, "attention_bias", False)
    assert ours == ModelConfig(
        model_type=family,
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=theirs.rms_norm_eps,
        rope=RopeConfig(rope_type=RopeType.DEFAULT, theta=theirs.rope_parameters["rope_theta"]),
        windows=(window,) * theirs.num_hidden_layers,
        tied_head=theirs.tie_word_embeddings,
        attention=type(ours.attention)(qkv_bias=bias or family == "qwen2", output_bias=bias, qk_norm=family == "qwen3"),
        max_position=theirs.max_position_embeddings,
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_writes_is_accepted(family):
    written = transformers.AutoConfig.for_model(family).to_dict()
    assert from_hf(written) == from_hf({"model_type": family})


def test_both_forms_of_rotary_settings_mean_the_same():
    older = from_hf({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}})
    newer = from_hf({"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert older == newer
    assert newer.rope.theta == 5e5
    assert newer.rope.original_max_position == newer.max_position == 2048  # transformers falls back to it


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"sliding_window": 7}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, (None, None, None, 7)),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, (7,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (7, None, 7, None),
        ),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 9}, (9,) * 4),
    ],
)
def test_windows_are_one_a_layer(settings, windows):
    assert from_hf({**QWEN, **settings}).windows == windows


def test_unknown_keys_without_effect_are_accepted():
    plain = {"model_type": "llama"}
    extras = {"quantization_config": None, "mlp_bias": False, "torch_dtype": "float16", "use_mrope": False}
    assert from_hf({**plain, **extras, "partial_rotary_factor": 1.0, "architectures": ["LlamaForCausalLM"]}) == from_hf(
        plain
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.'LlamaForSequenceClassification'."),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True in config.json is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, r"mrope_section=\[1, 2\] is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention={'rope_theta'"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None must be a positive number"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be larger than low_freq_factor=1.0"),
        ({"rope_scaling": 3}, "rope_parameters=3 must be a mapping"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a positive number"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias=True in config.json is not supported"),
        ({"sliding_window": 4}, "sliding_window=4 in config.json is not supported for model_type='llama'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\] in config"),
        ({**QWEN, "layer_types": ["full_attention"]}, "for each of 4 layers"),
        ({**QWEN, "layer_types": ["chunked_attention"] * 4}, "chunked_attention.* is not supported"),
        ({**QWEN, "layer_types": ["sliding_attention"] * 4}, "needs a sliding_window and use_sliding_window=True"),
        ({"vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
        ({"vocab_size": True}, "vocab_size=True must be an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size=100 is not a multiple of num_attention_heads=3"),
        ({"num_key_value_heads": 5}, "32 query heads are not a multiple of 5 key/value heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_experts": 8}, "num_experts=8 in config.json is not supported"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        from_hf({"model_type": "llama", **settings})
