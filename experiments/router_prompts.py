"""Prompts of a simulated stream pair: which tiles of which go into the next call, when it is done, and what follows.

The rule is that of `pipeserve.prefiller`, and the records have the names that those of `pipeserve` have.
"""

import math
from typing import NamedTuple

from experiments.router_clock import InOrder, LaneCosts
from streamserve.pipeserve.sizes import LaneSizes
from streamserve.pipeserve.store import Holding
from streamserve.types import Job


class SimulatedTask:
    """A prompt on the mesh that computes it."""

    __slots__ = ("cached_tokens", "computed_s", "holding", "job", "local", "next_tile", "num_tiles", "row", "tokens")

    def __init__(self, job: Job, holding: Holding, page_size: int, *, local: bool):
        self.job, self.holding, self.local, self.row = job, holding, local, None
        self.tokens = job.tokens
        self.cached_tokens = len(holding.shared) * page_size
        self.next_tile = len(holding.shared)
        self.num_tiles = -(-len(self.tokens) // page_size)
        self.computed_s = math.inf  # when its last call is done

    @property
    def request_id(self) -> str:
        """Whose prompt it is."""
        return self.job.request.request_id

    @property
    def num_waiting(self) -> int:
        """Tiles that no call has taken yet."""
        return self.num_tiles - self.next_tile


class SimulatedCall(NamedTuple):
    """A prefill call."""

    parts: tuple[tuple[SimulatedTask, int], ...]
    done: tuple[SimulatedTask, ...]
    local: bool
    done_s: float


class SimulatedKept(NamedTuple):
    """A preempted request whose pages are in the host's memory from `done_s` on."""

    job: Job
    done_s: float
    at_home: bool = False


class SimulatedItem(NamedTuple):
    """A request between prefill and a decode slot."""

    job: Job
    task: SimulatedTask | None
    kept: SimulatedKept | None
    holding: Holding
    transfer_pages: int
    transfer_bytes: int
    done_s: float


class Prompts:
    """Prompts on one mesh that computes them."""

    def __init__(self, mesh: InOrder, sizes: LaneSizes, costs: LaneCosts, *, local: bool):
        self._mesh, self._costs, self._page_size, self._local = mesh, costs, sizes.page_size, local
        self._tiles = sizes.local_tiles if local else sizes.tiles
        self.tasks: list[SimulatedTask] = []  # with tiles that no call has taken, the oldest first

    def dispatch(self) -> SimulatedCall | None:
        """Dispatch a call, if any tile waits."""
        counts = self._pick()
        if not counts:
            return None
        tiles = next(size for size in self._tiles if size >= sum(counts.values()))
        done_s = self._mesh.run(self._costs.call_s(tiles * self._page_size))
        for task, count in counts.items():
            task.next_tile += count
        done = tuple(task for task in counts if not task.num_waiting)
        for task in done:
            task.computed_s = done_s
        self.tasks = [task for task in self.tasks if task.num_waiting]
        return SimulatedCall(tuple(counts.items()), done, self._local, done_s)

    def _pick(self) -> dict[SimulatedTask, int]:
        """Choose tiles as `pipeserve.prefiller` does: one for the oldest, the rest for those that need the fewest."""
        if not self.tasks:
            return {}
        urgency = lambda task: task.job.request.priority  # noqa: E731
        granted, room = {min(self.tasks, key=urgency): 1}, self._tiles[-1] - 1
        for task in sorted(self.tasks, key=lambda task: (urgency(task), task.num_waiting)):
            more = min(task.num_waiting - granted.get(task, 0), room)
            granted[task], room = granted.get(task, 0) + more, room - more
        return {task: granted[task] for task in self.tasks if granted[task]}
