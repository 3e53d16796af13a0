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
    config.topology = {
        "topology": "disaggregated",
        "num_pairs": 2,
        "prefill_devices": 1,
        "decode_devices": 1,
        "share_devices": False,
    }
    config.pipeserve = {
        "max_num_seqs": 8,
        "decode_batches": (2,),
        "max_prefills": 8,
        "prefill_buckets": (64, 512),
        "page_size": 64,
        "prefill_pool_tokens": 20480,
        "decode_pool_tokens": 20480,
        "transfer_buckets": (4, 16),
        "rounds_per_tick": 4,
        "enable_prefix_caching": True,
        "draft_kv": "transfer",
        "preemption": "recompute",
        "max_logprobs": 20,
        "max_stop_ids": 8,
        "max_logit_bias": 64,
    }
    config.speculation = {
        "method": "draft_model",
        "model": "bundled:draft",
        "policy": "fixed",
        "verifier": "rejection",
        "num_speculative_tokens": 3,
        "max_depth": config_dict.placeholder(int),
        "tiers": (),
        "acceptance": config_dict.placeholder(str),
        "audit": False,
        "specustream": {
            "horizons": (4.0, 25.0, 150.0),
            "prior": 0.6,
            "prior_weight": 3.0,
            "share": 0.02,
            "evidence": 32.0,
            "caution": 0.25,
            "likeness": 16.0,
            "clip": 0.25,
            "hysteresis": 0.01,
            "min_dwell": 2,
            "amortise": 64.0,
            "probe_budget": 0.02,
            "patience": 4.0,
            "explore": 0.01,
            "margin": 0.1,
        },
    }
    config.routing = {
        "policy": "round_robin",
        "ttft_s": 1.0,
        "tpot_s": 0.1,
        "local_prefill_tokens": 0,
        "flowguard": {
            "ttft": 0.5,
            "tpot": 0.3,
            "acceptance": 0.05,
            "prefix": 0.05,
            "slots": 0.05,
            "pages": 0.05,
            "learning": True,
            "prior_weight": 50.0,
            "forget": 500.0,
            "explore": 0.01,
            "margin": 0.0,
            "stale_s": 5.0,
            "local_gain": 0.2,
        },
    }
    config.lanes = {
        "slots": (),
        "decode_pool_tokens": (),
        "slowdown": (),
        "transfer_delay_s": (),
        "down_from_s": (),
        "down_until_s": (),
        "acceptance": (),
    }
    config.scheduler = {
        "max_waiting": 64,
        "prefill_calls": 2,
        "transfer_timeout_s": 30.0,
        "max_transfers": 3,
        "forbid_compilation": False,
    }
    config.seed = 0
    config.compilation_cache_dir = config_dict.placeholder(str)
    config.sampling = {"max_tokens": 64, "temperature": 0.0}
    return config
