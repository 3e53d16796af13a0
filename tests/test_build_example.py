"""What BUILD.md tells a reader to write works as it stands there."""

import pathlib

import numpy as np

from streamserve.flowguard import RouteOutcome
from streamserve.specustream import CostTable, nominal, synthetic
from streamserve.specustream.simulate import simulate
from tests.flowguard.lane_states import lane, seen

TIERS = (0, 1, 2, 4)


def _example(file: str) -> dict:
    text = (pathlib.Path(__file__).parent.parent / "BUILD.md").read_text()
    (code,) = (part.split("```")[0] for part in text.split(f"```python\n# {file}\n")[1:])
    names: dict = {}
    exec(compile(code, file, "exec"), names)
    return names


def _mean_depth(make, acceptance: str, costs: CostTable) -> float:
    process = synthetic.parse(acceptance, TIERS[-1])
    trace = simulate(make, process, costs, tiers=TIERS, slots=4, batch=2, rounds=4, ticks=300, seed=1)
    return sum(TIERS[arm] for arm in trace.arm_T) / len(trace.arm_T)


def test_the_policy_of_twenty_lines_follows_acceptance():
    make = _example("my_policies.py")["follow"]
    costs = nominal(TIERS, (4,))
    assert _mean_depth(make, "iid:0.95", costs) > 3
    assert 0.9 < _mean_depth(make, "iid:0.1", costs) < 1.5


def test_the_router_of_twenty_lines_leaves_a_lane_that_is_late_or_full():
    policy, noise = _example("my_routers.py")["loyal"](3), np.full((3, 2), 0.5)
    lanes = [lane(index) for index in range(3)]
    route, state = policy.choose(policy.init(), seen(lanes), noise)
    assert route.arm == 0
    state = policy.update(state, seen(lanes), route, RouteOutcome(True, ttft_s=0.5, tpot_s=9.0))
    assert policy.choose(state, seen(lanes), noise)[0].arm == 0
    for late in (RouteOutcome(True, ttft_s=1.5), RouteOutcome(False)):
        assert policy.choose(policy.update(state, seen(lanes), route, late), seen(lanes), noise)[0].arm == 1
    full = seen(lanes, eligible=[False, False, True])
    assert policy.choose(state, full, noise)[0].arm == 2
