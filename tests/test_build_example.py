"""What BUILD.md tells a reader to write works as it stands there."""

import pathlib

from streamserve.specustream import CostTable, nominal, synthetic
from streamserve.specustream.simulate import simulate

TIERS = (0, 1, 2, 4)


def _example() -> dict:
    text = (pathlib.Path(__file__).parent.parent / "BUILD.md").read_text()
    (code,) = (part.split("```")[0] for part in text.split("```python\n# my_policies.py\n")[1:])
    names: dict = {}
    exec(compile(code, "my_policies.py", "exec"), names)
    return names


def _mean_depth(make, acceptance: str, costs: CostTable) -> float:
    process = synthetic.parse(acceptance, TIERS[-1])
    trace = simulate(make, process, costs, tiers=TIERS, slots=4, batch=2, rounds=4, ticks=300, seed=1)
    return sum(TIERS[arm] for arm in trace.arm_T) / len(trace.arm_T)


def test_the_policy_of_twenty_lines_follows_acceptance():
    make = _example()["follow"]
    costs = nominal(TIERS, (4,))
    assert _mean_depth(make, "iid:0.95", costs) > 3
    assert 0.9 < _mean_depth(make, "iid:0.1", costs) < 1.5
