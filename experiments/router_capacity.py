"""How many requests a second a simulated fleet can answer, from its costs and its state: what loads are fractions of.

An estimate for long queues and lanes that are each as busy as they can be, whoever routes. A lane is as fast as the
slowest of what a request needs of it, in turn: the prefill mesh, the way between meshes, a decode slot, a place before
the slots.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.router_clock import LaneCosts
from experiments.router_scenarios import Shape
from streamserve.config import Config
from streamserve.lane import HAND_OFFS_AHEAD
from streamserve.pipeserve import LaneSizes, lane_sizes
from streamserve.specustream import CostTable, synthetic
from streamserve.specustream.depth import expected_tokens

_TICKS = 2000  # of an acceptance process, for its mean


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneFacts:
    """One lane of a fleet, as its configuration has it.

    Attributes:
      sizes: its shapes.
      slowdown: times that its prefill calls and ticks take.
      delay_s: seconds that its hand-offs are held up.
      down_from_s: when it dies, seconds from its first request; negative for never.
      down_until_s: when it comes back.
      acceptance: of drafts; None where nothing is drafted.
    """

    sizes: LaneSizes
    slowdown: float
    delay_s: float
    down_from_s: float
    down_until_s: float
    acceptance: str | None

    def up(self, duration_s: float) -> float:
        """Fraction of a run in which it works."""
        if self.down_from_s < 0:
            return 1.0
        return 1.0 - max(0.0, min(self.down_until_s, duration_s) - self.down_from_s) / duration_s


def fleet(config: Config, max_model_len: int) -> list[LaneFacts]:
    """Read a fleet off its configuration.

    Raises:
      ValueError: a pool cannot hold one request of full length.
    """
    settings, lanes, facts = config.pipeserve, config.lanes, []
    local_tokens = 0 if config.topology.topology == "colocated" else config.routing.local_prefill_tokens
    for index in range(config.topology.num_pairs):
        own = dataclasses.replace(
            settings,
            max_num_seqs=_of(lanes.slots, index, settings.max_num_seqs),
            decode_pool_tokens=_of(lanes.decode_pool_tokens, index, settings.decode_pool_tokens),
        )
        tiers = config.speculation.depths
        facts.append(
            LaneFacts(
                sizes=lane_sizes(own, max_model_len=max_model_len, tiers=tiers, local_tokens=local_tokens),
                slowdown=_of(lanes.slowdown, index, 1.0),
                delay_s=_of(lanes.transfer_delay_s, index, 0.0),
                down_from_s=_of(lanes.down_from_s, index, -1.0),
                down_until_s=_of(lanes.down_until_s, index, -1.0),
                acceptance=_of(lanes.acceptance, index, config.speculation.acceptance),
            )
        )
    return facts


def capacity(
    config: Config,
    lanes: Sequence[LaneFacts],
    costs: LaneCosts,
    rounds: CostTable,
    drawn: Sequence[tuple[Shape, int]],
    *,
    duration_s: float,
) -> float:
    """Estimate what a fleet can answer, requests a second.

    A prompt finds its beginning in a prefix cache with the probability that it would have if any lane could get it:
    what a router gains by sending it where it is known comes on top.

    Args:
      config: of the fleet.
      lanes: of it.
      costs: what work takes,
      rounds: and a round of decoding.
      drawn: a sample of the requests, as `router_scenarios.shapes` draws it.
      duration_s: of a run, of which a lane that dies misses a part.
    """
    colocated = config.topology.topology == "colocated"
    shapes, total = [shape for shape, _ in drawn], 0.0
    for lane in lanes:
        size, hit = lane.sizes.page_size, _hit(config, lane.sizes, drawn)
        tiles = [lane.sizes.pages(shape.prompt) - hit * (shape.shared // size) for shape in shapes]
        call_tokens = lane.sizes.tiles[-1] * size
        prefill_s = lane.slowdown * costs.call_s(call_tokens) / call_tokens * size * float(np.mean(tiles))
        num_bytes = [lane.sizes.pages(shape.prompt) * size * costs.token_bytes for shape in shapes]
        moves_s = 0.0 if colocated else float(np.mean([costs.transfer_s(one) for one in num_bytes]))
        slots, slot_s = _decoding(lane, costs, rounds, shapes)
        before_s = prefill_s + moves_s + lane.delay_s
        if colocated:
            rate = 1 / (prefill_s + slot_s / slots)
        else:
            waits = (slots + HAND_OFFS_AHEAD) / (slot_s + moves_s + lane.delay_s)
            rate = min(1 / prefill_s, 1 / moves_s if moves_s else np.inf, slots / slot_s, waits)
        total += lane.up(duration_s) * min(rate, config.pipeserve.max_prefills / before_s)
    return float(total)


def _hit(config: Config, sizes: LaneSizes, drawn: Sequence[tuple[Shape, int]]) -> float:
    """Find the part of all beginnings that a lane's cache has room for, were there nothing else in it."""
    pages = {prefix: shape.shared // sizes.page_size for shape, prefix in drawn if prefix >= 0}
    if not config.pipeserve.enable_prefix_caching or not sum(pages.values()):
        return 0.0
    return min(1.0, (sizes.prefill_pages - 1) / sum(pages.values()))


def _decoding(lane: LaneFacts, costs: LaneCosts, rounds: CostTable, shapes: Sequence[Shape]) -> tuple[int, float]:
    """Find the slots that pages allow, and the mean seconds that a request holds one, at the best depth.

    A slot changes hands between the reading of a tick and the dispatch of the next but one, so a tick more than the
    request needs.
    """
    sizes = lane.sizes
    pages = float(np.mean([sizes.pages(shape.prompt + shape.output) for shape in shapes]))
    slots = max(1, min(sizes.slots, int((sizes.decode_pages - 1) / pages)))
    acceptance_K = _mean_acceptance(lane.acceptance, slots, max(sizes.tiers))
    tokens_A = sizes.rounds * expected_tokens(acceptance_K, np.array(sizes.tiers))
    batch = next(size for size in sizes.batches if size >= slots)
    cost_A, _ = rounds.lookup(batch, float(np.mean([shape.prompt + shape.output / 2 for shape in shapes])))
    arms = [rounds.tiers.index(tier) for tier in sizes.tiers]
    tick_A = costs.tick_fixed_s + sizes.rounds * cost_A[arms]
    outputs = np.array([shape.output for shape in shapes])
    ticks_A = [float(np.mean(np.maximum(1, np.ceil((outputs - 1) / tokens))) + 1) for tokens in tokens_A]
    return slots, lane.slowdown * float(np.min(tick_A * ticks_A))


def _mean_acceptance(told: str | None, batch: int, depth: int) -> np.ndarray:
    """Average an acceptance process over time, [K]."""
    if told is None or not depth:
        return np.zeros(depth)
    process, luck = synthetic.parse(told, depth), np.random.default_rng(0)
    state, total_K = process.init(), np.zeros(depth)
    for _ in range(_TICKS):
        acceptance_K, state = process.step(state, batch, luck.random(2))
        total_K += acceptance_K
    return total_K / _TICKS


def _of(entries: Sequence[Any], index: int, otherwise: Any) -> Any:
    """Give a lane's entry of a field of `LanesConfig`."""
    return entries[index] if entries else otherwise
