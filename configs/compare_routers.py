"""Routers on fleets of stream pairs with something wrong, in virtual time or on the bundled model.

COMMAND   python -m experiments.compare_routers --mode=simulate --output=rows.jsonl
          python -m experiments.compare_routers --mode=engine --output=rows.jsonl
          python -m experiments.router_report --input=rows.jsonl --output=table.md
          (options: --routers=flowguard,my.module:router --scenarios=degraded,dies --loads=0.8 --repeats=8 ...)
DURATION  the simulation about four minutes on one core with all routers and scenarios, in proportion to both, to
          repeats and to `simulation.duration_s`. The engine needs `traffic` for `engine.duration_s` seconds a run, one
          run a router, load and repeat, after a minute or two of compilation a scenario.
EXPECTED  exit code 0. Where all lanes are alike, routers that look at the load lead and differ by little.
"""

import ml_collections

from configs import tiny_cpu


def get_config() -> ml_collections.ConfigDict:
    """All fields of `tiny_cpu`, plain decoding; traffic, troubles, and what a simulated stream pair takes."""
    config = tiny_cpu.get_config()
    config.update(
        {
            "pipeserve": {
                "enable_prefix_caching": False,
                "decode_batches": (1, 2, 4),
                "prefill_buckets": (64, 256, 512, 1024),
            },
            "speculation": {"method": "none"},
            "routing": {"policy": "flowguard", "ttft_s": 2.0, "tpot_s": 0.2, "local_prefill_tokens": 0},
        }
    )
    config.comparison = {
        "scenarios": ("alike", "degraded", "stalled", "small", "dies", "prefixes", "acceptance", "mixed"),
        "loads": (0.5, 0.8, 1.1),
    }
    config.traffic = {
        "burstiness": 0.5,
        "prompt_tokens": 384,
        "prompt_spread": 0.6,
        "output_tokens": 24,
        "output_spread": 0.5,
        "prefixes": 24,
        "prefix_tokens": 1024,
        "prefix_skew": 0.5,
        "short_tokens": 64,
        "long_tokens": 2048,
        "long_share": 0.15,
        "long_output_tokens": 96,
    }
    config.troubles = {
        "slowdown": 3.0,
        "delay": 0.6,
        "slots": 2,
        "pool_tokens": 2560,
        "down_from": 0.25,
        "down_until": 0.6,
        "cache_tokens": 8192,
        "local_tokens": 128,
        "acceptance": ("iid:0.9", "iid:0.3"),
        "policy": "specustream",
        "tiers": (0, 1, 2, 4),
    }
    config.simulation = {
        "num_pairs": 3,
        "duration_s": 1.0,
        "ttft_s": 0.08,
        "tpot_s": 0.004,
        "rounds": "gpu_like",
        "costs": {
            "prefill_fixed_s": 1e-3,
            "prefill_token_s": 1e-5,
            "tick_fixed_s": 2e-4,
            "transfer_fixed_s": 3e-4,
            "transfer_bytes_per_s": 1e10,
            "token_bytes": 16384,
        },
    }
    config.engine = {"duration_s": 20.0, "capacity_requests": 48}
    return config
