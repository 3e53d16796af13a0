"""An open loop on the bundled pair: two stream pairs, FlowGuard routes, SpecuStream chooses the depth.

COMMAND   python -m experiments.serve_trace --config=configs/serve_trace.py --request_rate=2
          python -m experiments.serve_trace --trace=FILE --num_prompts=200 --time_scale=S --length_scale=S
          (options: --burstiness=0.25 --ramp_up=linear --goodput=ttft:1000,tpot:100 --check_offline ...)
DURATION  on two cores about four minutes of compilation and measurement, then as long as the arrivals take.
EXPECTED  exit code 0: every request answered once, `compilations_after_warmup` 0, with --check_offline
          `offline_identical` equal to `offline_compared`; and routes.jsonl with every choice of a stream pair.
"""

import ml_collections

from configs import tiny_cpu


def get_config() -> ml_collections.ConfigDict:
    """All fields of `tiny_cpu`, policies that adapt, and room for an overload to wait in."""
    config = tiny_cpu.get_config()
    config.update(
        {
            "speculation": {"policy": "specustream", "max_depth": 4},
            "routing": {"policy": "flowguard"},
            "scheduler": {"max_waiting": 4096},
        }
    )
    return config
