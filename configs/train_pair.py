"""The bundled pair: a target of 4.6 million parameters and a draft of 0.8 million, on GSM8K and Python's own library.

COMMAND   python -m experiments.train_pair --config=configs/train_pair.py --workdir=DIR --data_dir=DATA --output_dir=OUT
          DATA holds corpus/gsm8k_train.jsonl; OUT is streamserve/assets for the pair that the package ships. A killed
          run goes on from its last checkpoint when the same command is given again.
DURATION  about 50 minutes on two cores.
EXPECTED  the files and the numbers of streamserve/assets/MODEL_CARD.md.
"""

import ml_collections

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}


def get_config() -> ml_collections.ConfigDict:
    """All fields that exist, so that each can be overridden by --config.section.field=value."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.export_dtype = "bfloat16"
    config.corpus = {
        "held_out_share": 0.02,
        # Sources are long and half identifiers, worked problems are alike: whole, they would crowd out the rest.
        "shares": {"source": 0.3, "math": 0.7, "math_chat": 0.3, "instruction": 0.5},
        "tokenizer_source_share": 0.25,
        "eval_rows": 32,
        "eval_length": 512,
    }
    config.target = {**_LLAMA, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    config.draft = {**_LLAMA, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.target_phase = {
        "short": {"steps": 644, "rows": 8, "micro_rows": 2, "length": 512, "chunk": 128},
        "long": {"steps": 56, "rows": 2, "micro_rows": 1, "length": 2048, "chunk": 256},
        "learning_rate": 4e-3,
        "warmup_steps": 30,
        "decay_steps": 220,
        "weight_decay": 0.05,
        "clip": 1.0,
        "kl_weight": 0.0,
        "save_every": 50,
    }
    config.draft_phase = {
        "short": {"steps": 560, "rows": 8, "micro_rows": 2, "length": 512, "chunk": 128},
        "long": {"steps": 40, "rows": 2, "micro_rows": 1, "length": 2048, "chunk": 256},
        "learning_rate": 6e-3,
        "warmup_steps": 20,
        "decay_steps": 220,
        "weight_decay": 0.0,
        "clip": 1.0,
        "kl_weight": 1.0,
        "save_every": 50,
    }
    return config
