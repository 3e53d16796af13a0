"""The bundled pair on CPU, SpecuStream choosing the depth of speculation between plain decoding and 4.

COMMAND   python -m experiments.generate --config=configs/adaptive_cpu.py
          (--config.speculation.policy=NAME for another policy, --config.speculation.method=ngram for another drafter,
          --config.speculation.verifier=block for another rule, --config.speculation.audit=True for the audit)
DURATION  about three minutes on two cores, nearly all of it compilation and the measurement of what a round costs.
EXPECTED  every bundled prompt answered with the tokens that `plain_cpu` gives, `compilations_after_warmup` 0, and in
          the workdir decisions.jsonl with every choice of a depth.
"""

import ml_collections

from configs import tiny_cpu


def get_config() -> ml_collections.ConfigDict:
    """All fields of `tiny_cpu`: one pair, so that two cores have two devices, and several depths."""
    config = tiny_cpu.get_config()
    config.update(
        {
            "topology": {"num_pairs": 1},
            "pipeserve": {"decode_batches": ()},
            "speculation": {"policy": "specustream", "max_depth": 4},
        }
    )
    return config
