"""The evaluation of the StreamServe paper (arXiv 2604.09562) with the bundled pair: factors separated, devices equal.

COMMAND   python -m experiments.reproduce_paper --output=rows.jsonl \
              --workload=alpaca=FILE.jsonl --workload=gsm8k=FILE.jsonl --workload=humaneval=FILE.jsonl \
              --workload=sum=FILE.jsonl --num_prompts=12 --rate=6
          python -m experiments.paper_report --input=rows.jsonl --output=RESULTS.md
          (options: --routers=flowguard,flowguard_paper --policies=specustream,specustream_paper --repeats=8
          --modes=offline,open --fleets=colocated,disaggregated --max_tokens=64 ...)
DURATION  on two cores about a quarter of an hour for four workloads of 12 prompts, some minutes of it compilation; the
          rest in proportion to prompts, tokens and repeats. Fewer than five repeats tell nothing of a single workload.
EXPECTED  exit code 0: every arm gives the same tokens, and nothing is compiled while arms run. The bundled target has
          two key/value heads, so `tensor_parallel` over four devices cannot be built, which rows and report say.
"""

import ml_collections
from ml_collections import config_dict

from configs import tiny_cpu


def get_config() -> ml_collections.ConfigDict:
    """All fields of `tiny_cpu` without a prefix cache, and the fleets: how the same devices are divided.

    Fleets that draft are the two levels of the factor disaggregation; the others are baselines without speculation.
    Slots and prefills of a pair follow from --concurrency, pools from both.
    """
    config = tiny_cpu.get_config()
    config.update(
        {
            "pipeserve": {
                "enable_prefix_caching": False,
                "decode_batches": (),
                "rounds_per_tick": 1,  # tokens reach the host a tick at a time: more would blur TTFT and TPOT
                "prefill_pool_tokens": config_dict.placeholder(int),
                "decode_pool_tokens": config_dict.placeholder(int),
            },
            "speculation": {"policy": "specustream", "max_depth": 4},
            "scheduler": {"max_waiting": 1024},
        }
    )
    config.sampling = {"max_tokens": 24, "temperature": 0.0}
    config.fleets = {
        "disaggregated": _fleet("disaggregated", num_pairs=2, decode_devices=1, drafts=True),
        "colocated": _fleet("colocated", num_pairs=2, decode_devices=2, drafts=True),
        "tensor_parallel": _fleet("colocated", num_pairs=1, decode_devices=4, drafts=False),
        "tensor_parallel_pairs": _fleet("colocated", num_pairs=2, decode_devices=2, drafts=False),
        "replicas": _fleet("colocated", num_pairs=4, decode_devices=1, drafts=False),
    }
    return config


def _fleet(topology: str, *, num_pairs: int, decode_devices: int, drafts: bool) -> dict[str, str | int | bool]:
    return {
        "topology": topology,
        "num_pairs": num_pairs,
        "prefill_devices": 1,
        "decode_devices": decode_devices,
        "drafts": drafts,
    }
