"""States of lanes for tests of routers: by hand, and any that hypothesis thinks of."""

import hypothesis.strategies as st

from streamserve.flowguard import Ask, Objective, RouteContext
from streamserve.flowguard.signals import context
from streamserve.types import LanePace, LaneStats

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.1)
BUSY = LanePace(
    prefill_s_per_token=0.001,
    transfer_s_per_byte=1e-9,
    transfer_bytes_per_token=1000.0,
    tick_s=0.02,
    tokens_per_tick=4.0,
    accepted_per_step=1.5,
    drafted_per_step=3.0,
    decode_s=1.0,
    ttft_s=0.2,
    tpot_s=0.005,
)


def lane(index: int, *, pace: LanePace = BUSY, **fields) -> LaneStats:
    """A lane that is neither idle nor full."""
    usual = {"num_slots": 4, "free_slots": 1, "num_pages": 40, "free_pages": 9, "in_transit": 0, "running": 3}
    return LaneStats(lane=index, pace=pace, **(usual | fields))


def ask(num_lanes: int, **fields) -> Ask:
    """A request of 100 tokens that has just come, and is known nowhere."""
    usual = {"request_id": "r", "prompt_tokens": 100, "max_tokens": 50, "waited_s": 0.0}
    return Ask(**({"hit_tokens": (0,) * num_lanes} | usual | fields))


def seen(lanes: list[LaneStats], *, eligible: list[bool] | None = None, **fields) -> RouteContext:
    """What a router sees of lanes and of such a request."""
    return context(lanes, eligible or [True] * len(lanes), ask(len(lanes), **fields), OBJECTIVE)


def _seconds(most: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | st.floats(1e-9, most)


@st.composite
def paces(draw: st.DrawFn) -> LanePace:
    """Any pace, that of a lane which has measured nothing included."""
    limits = {
        **{"prefill_s_per_token": 1.0, "transfer_s_per_byte": 1.0, "transfer_bytes_per_token": 1e7, "tick_s": 10.0},
        **{"tokens_per_tick": 40.0, "accepted_per_step": 8.0, "drafted_per_step": 8.0, "decode_s": 100.0},
        **{"ttft_s": 100.0, "tpot_s": 10.0, "idle_s": 1e4},
    }
    return LanePace(**{name: draw(_seconds(most)) for name, most in limits.items()})


@st.composite
def contexts(draw: st.DrawFn, num_lanes: int) -> RouteContext:
    """Any state of lanes of which at least one may take any request."""
    eligible = draw(st.lists(st.booleans(), min_size=num_lanes, max_size=num_lanes).filter(any))
    lanes = []
    for index in range(num_lanes):
        slots, pages = draw(st.integers(1, 64)), draw(st.integers(1, 1000))
        counts = {name: draw(st.integers(0, 500)) for name in ("waiting", "in_transit", "running")}
        lanes.append(
            LaneStats(
                lane=index,
                is_up=draw(st.booleans()),
                num_slots=slots,
                free_slots=draw(st.integers(0, slots)),
                num_pages=pages,
                free_pages=draw(st.integers(0, pages)),
                queued_prefill_tokens=draw(st.integers(0, 10**6)),
                transfer_backlog_bytes=draw(st.integers(0, 10**10)),
                local_tokens=draw(st.sampled_from((0, 64, 10**6))),
                pace=draw(paces()),
                **counts,
            )
        )
    prompt = draw(st.integers(1, 10**5))
    hits = draw(st.tuples(*[st.integers(0, prompt - 1)] * num_lanes))
    one = Ask("r", prompt, draw(st.integers(1, 10**4)), draw(_seconds(1e3)), hits, draw(st.integers(1, 100)))
    objective = Objective(draw(st.floats(1e-3, 100.0)), draw(st.floats(1e-4, 10.0)))
    return context(lanes, eligible, one, objective)
