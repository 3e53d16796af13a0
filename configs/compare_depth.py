"""Depth policies against every fixed depth and against plain decoding, on the bundled pair or in simulation.

COMMAND   python -m experiments.compare_depth --mode=simulate --output=rows.jsonl
          python -m experiments.compare_depth --mode=engine --output=rows.jsonl
          python -m experiments.depth_report --input=rows.jsonl --output_dir=DIR
          (options: --policies=specustream,goodput --workload=NAME=FILE.jsonl --repeats=8 --costs=FILE.json ...)
DURATION  on two cores the simulation takes about ten minutes with all policies and four seeds, in proportion to
          policies, cells, costs and seeds. The engine runs every fixed depth and every policy in each repeat, each for
          as long as its tokens take, after some minutes of compilation.
EXPECTED  exit code 0. In simulation the oracle leads, and no policy beats the best fixed depth of a constant cell. On
          the engine every arm gives the tokens of plain decoding, and nothing is compiled while arms run.
"""

import ml_collections

from configs import tiny_cpu


def get_config() -> ml_collections.ConfigDict:
    """All fields of `tiny_cpu` with one pair, no prefix cache and every depth compiled; and what is simulated."""
    config = tiny_cpu.get_config()
    config.update(
        {
            "topology": {"num_pairs": 1},
            "pipeserve": {"enable_prefix_caching": False, "max_num_seqs": 4, "decode_batches": ()},
            "speculation": {
                "policy": "specustream",
                "num_speculative_tokens": 4,
                "max_depth": 8,
                "tiers": (0, 1, 2, 4, 6, 8),
            },
        }
    )
    config.simulation = {
        "cells": (
            *(f"iid:{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)),
            "positions:0.9,0.7,0.5,0.3",
            "regimes:0.9,0.2@200",
            "drift:0.9,0.3@1000",
            "load:0.9,0.3@8",
        ),
        "costs": ("cpu_like", "gpu_like"),
        "batches": (1, 8),
        "tiers": (0, 1, 2, 4, 6, 8),
        "ticks": 1000,
        "rounds": 4,
    }
    return config
