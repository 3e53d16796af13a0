"""The bundled pair on CPU: two stream pairs, a draft model at depth 3.

COMMAND   python -m experiments.generate --config=configs/tiny_cpu.py
          (options: --input=IN.jsonl --output=OUT.jsonl --workdir=DIR --config.sampling.max_tokens=128 ...)
DURATION  under three minutes on two cores, most of it compilation.
EXPECTED  every bundled prompt answered, exit code 0, `compilations_after_warmup` 0 and
          `spec_decode_acceptance_length` well above 1 in results.json.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """All fields that exist, so that each can be overridden by --config.section.field=value."""
    config = ml_collections.ConfigDict()
    config.model = {
        "model": "bundled:target",
        "tokenizer": config_dict.placeholder(str),
        "skip_tokenizer_init": False,
        "dtype": "float32",
        "load_format": "auto",
        "max_model_len": 2560,
    }
    config.topology = {"num_pairs": 2, "prefill_devices": 1, "decode_devices": 1, "share_devices": False}
    config.pipeserve = {
        "max_num_seqs": 8,
        "prefill_buckets": (64, 256, 1024),
        "rounds_per_tick": 4,
        "max_logprobs": 20,
        "max_stop_ids": 8,
        "max_logit_bias": 64,
    }
    config.speculation = {"method": "draft_model", "model": "bundled:draft", "num_speculative_tokens": 3}
    config.routing = {"policy": "round_robin"}
    config.scheduler = {"policy": "fcfs", "max_waiting": 64, "max_prefills": 2}
    config.seed = 0
    config.sampling = {"max_tokens": 64, "temperature": 0.0}
    return config
