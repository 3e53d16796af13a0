"""As `tiny_cpu`, without speculation: the yardstick that speculation is measured against.

COMMAND   python -m experiments.generate --config=configs/plain_cpu.py
DURATION  under three minutes on two cores, most of it compilation.
EXPECTED  every bundled prompt answered with the same tokens as `tiny_cpu` gives, and no `spec_decode_*` keys in
          results.json.
"""

import ml_collections

from configs import tiny_cpu


def get_config() -> ml_collections.ConfigDict:
    """All fields of `tiny_cpu`, drafting turned off."""
    config = tiny_cpu.get_config()
    config.update({"speculation": {"method": "none"}})
    return config
