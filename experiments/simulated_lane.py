"""A stream pair without devices: its pages and slots are real, and what its work takes passes on a virtual clock.

`SimulatedPair` stands where `pipeserve.StreamPair` does (`streamserve.pair_protocol`), below the real scheduler, lanes,
FlowGuard and SpecuStream. It computes nothing: tokens are all alike, a row ends at `max_tokens`, and what a draft has
accepted is drawn with the probabilities of the plan. A mesh and the way between two of them each do one piece of work
after the other, in the order of dispatch.
"""

from typing import Any

import numpy as np

from experiments.router_clock import InOrder, LaneCosts, VirtualClock
from experiments.router_prompts import Prompts, SimulatedCall, SimulatedItem, SimulatedKept, SimulatedTask
from experiments.router_rows import Rows, SimulatedTick
from streamserve.kv.pages import Owner, Stage
from streamserve.pipeserve.sizes import LaneSizes
from streamserve.pipeserve.store import Holding, PageStore
from streamserve.specustream import CostTable
from streamserve.types import Deferred, Job, StepOutput, StepPlan, TokenLogprobs

_NO_POOLS: Any = tuple  # allocates the pools of a mesh without devices


class SimulatedPair:
    """A `pair_protocol.Pair` in virtual time; what its methods mean is said at `pipeserve.StreamPair`."""

    is_broken = False
    is_up = True

    def __init__(
        self,
        index: int,
        sizes: LaneSizes,
        costs: LaneCosts,
        rounds: CostTable,
        clock: VirtualClock,
        *,
        colocated: bool,
        reuse_prefixes: bool,
        seed: int,
    ):
        """Begin empty.

        Args:
          index: of this lane.
          sizes: its shapes.
          costs: what its work takes,
          rounds: and a round of decoding, for every tier and batch of `sizes`.
          clock: tells the time, and passes it where a tick is waited for.
          colocated: one mesh for prefill and decode.
          reuse_prefixes: keep a prefix cache where prompts are computed.
          seed: of what is accepted.
        """
        self.index, self.sizes, self.colocated = index, sizes, colocated
        self._costs, self._rounds, self._clock = costs, rounds, clock
        self._row_tokens, self._luck = sizes.columns * sizes.page_size, np.random.default_rng([seed, index])
        self.decode_mesh, self.link = InOrder(clock), InOrder(clock)
        self.prefill_mesh = self.decode_mesh if colocated else InOrder(clock)
        decode_pages = sizes.decode_pages + (sizes.prefill_pages - 1 if colocated else 0)
        self.decode_store = self._store(decode_pages, reuse=reuse_prefixes and colocated)
        self.prefill_store = self.decode_store
        if not colocated:
            self.prefill_store = self._store(sizes.prefill_pages, reuse=reuse_prefixes)
        self._begin_empty()

    def _store(self, num_pages: int, *, reuse: bool) -> PageStore:
        return PageStore(_NO_POOLS, num_pages=num_pages, page_size=self.sizes.page_size, reuse_prefixes=reuse)

    def _begin_empty(self) -> None:
        self._prompts = Prompts(self.prefill_mesh, self.sizes, self._costs, local=False)
        self._local = Prompts(self.decode_mesh, self.sizes, self._costs, local=True)
        self._rows = Rows(self.sizes.slots)

    @property
    def num_slots(self) -> int:
        """Decode slots."""
        return self.sizes.slots

    @property
    def free_slots(self) -> int:
        """Decode slots that nobody holds."""
        return self.sizes.slots - len(self._rows.holdings)

    @property
    def free_pages(self) -> int:
        """Pages of the decode mesh that nobody owns."""
        return self.decode_store.num_free

    @property
    def num_pages(self) -> int:
        """Pages of the decode mesh that can be owned."""
        return self.decode_store.num_pages

    @property
    def waiting_tiles(self) -> int:
        """Tiles that no prefill call has taken yet."""
        return sum(task.num_waiting for task in self._prompts.tasks)

    @property
    def waiting_local_tiles(self) -> int:
        """Tiles that no prefill call on the decode mesh has taken."""
        return sum(task.num_waiting for task in self._local.tasks)

    @property
    def local_tokens(self) -> int:
        """Longest prompt that the decode mesh can compute, too; 0 for none."""
        return self.sizes.local_tokens

    # --- prefill

    def cached_tokens(self, tokens: tuple[int, ...]) -> int:
        """Count the tokens of a prompt that the prefix cache holds now."""
        return self.prefill_store.cached_tokens(tokens)

    def begin(self, job: Job) -> SimulatedTask | Deferred:
        """Reserve the pages of a prompt on the prefill mesh.

        Raises:
          ValueError: it fits no row.
        """
        ahead = self._ahead(job) if self.colocated else 0
        return self._begin(job, self.prefill_store, self._prompts, ahead=ahead, local=False)

    def begin_locally(self, job: Job) -> SimulatedTask | Deferred:
        """Reserve the pages of a prompt on the decode mesh, which then computes it, too.

        Raises:
          ValueError: it is longer than what the decode mesh computes.
        """
        if len(job.tokens) > self.local_tokens:
            raise ValueError(f"{len(job.tokens)} tokens are more than {self.local_tokens=} of the decode mesh")
        return self._begin(job, self.decode_store, self._local, ahead=self._ahead(job), local=True)

    def _begin(
        self, job: Job, store: PageStore, prompts: Prompts, *, ahead: int, local: bool
    ) -> SimulatedTask | Deferred:
        if len(job.tokens) > self._row_tokens:
            raise ValueError(f"{len(job.tokens)} tokens do not fit into a row of {self._row_tokens}")
        holding = store.begin(job.tokens, Owner(Stage.PREFILL, job.request.request_id), ahead=ahead)
        if isinstance(holding, Deferred):
            return holding
        task = SimulatedTask(job, holding, self.sizes.page_size, local=local)
        prompts.tasks.append(task)
        return task

    def prefill(self) -> SimulatedCall | None:
        """Dispatch one prefill call, if any prompt has tiles left."""
        return self._prompts.dispatch()

    def prefill_locally(self) -> SimulatedCall | None:
        """Dispatch one prefill call on the decode mesh, likewise."""
        return self._local.dispatch()

    def is_computed(self, call: SimulatedCall) -> bool:
        """Whether a prefill call is done."""
        return call.done_s <= self._clock()

    def is_prompt_computed(self, item: SimulatedItem) -> bool:
        """Whether the last prefill call of what travels is done."""
        return item.task is None or item.task.computed_s <= self._clock()

    def drop(self, task: SimulatedTask) -> None:
        """Forget a prompt that has begun, and free its pages."""
        prompts = self._local if task.local else self._prompts
        if task in prompts.tasks:
            prompts.tasks.remove(task)
        self._home(task).drop(task.holding)

    # --- hand-off

    def hand_off(self, task: SimulatedTask) -> SimulatedItem | Deferred:
        """Start the way of a prompt's pages, behind its last call, as soon as there are pages for them."""
        stays = self.colocated or task.local
        holding = task.holding if stays else self._reserve(task.job)
        if isinstance(holding, Deferred):
            return holding
        store = self._home(task)
        store.publish(task.holding, task.tokens[:-1] if self.colocated else task.tokens)
        if task.holding.owner.stage is Stage.PREFILL:
            store.hand_on(task.holding, Owner(Stage.TRANSFER, task.request_id))
        if stays:
            return SimulatedItem(task.job, task, None, holding, 0, 0, task.computed_s)
        pages, num_bytes = len(task.holding.pages), self._bytes(len(task.holding.pages))
        done_s = self.link.run(self._costs.transfer_s(num_bytes), after_s=task.computed_s)
        return SimulatedItem(task.job, task, None, holding, pages, num_bytes, done_s)

    def resume(self, kept: SimulatedKept) -> SimulatedItem | Deferred:
        """Start the way of rescued pages back to the decode mesh."""
        if not kept.at_home:
            return Deferred("its pages are on their way to the host's memory")
        holding = self._reserve(kept.job)
        if isinstance(holding, Deferred):
            return holding
        return SimulatedItem(kept.job, None, kept, holding, 0, 0, self._move(kept.job))

    def has_arrived(self, item: SimulatedItem) -> bool:
        """Whether everything is on the decode mesh."""
        return item.done_s <= self._clock()

    def abandon(self, item: SimulatedItem) -> None:
        """Give up a transfer: free the pages it was to fill."""
        if item.task is None or item.holding is not item.task.holding:
            self.decode_store.drop(item.holding)

    def insert(self, item: SimulatedItem) -> int:
        """Put an arrived request into a free slot, and free its pages on the prefill mesh; gives the slot.

        Raises:
          ValueError: no slot is free.
        """
        slot = self._rows.insert(item.job, item.holding)
        self.decode_store.hand_on(item.holding, Owner(Stage.SLOT, item.job.request.request_id))
        if item.task is not None and item.task.holding is not item.holding:
            self.prefill_store.drop(item.task.holding)
        return slot

    def read_prompt_logprobs(self, item: SimulatedItem) -> TokenLogprobs:
        """Refuse: nothing is computed.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(f"{item.job.request.request_id} wants log-probabilities, which nothing simulates")

    # --- decode

    def tokens_per_tick(self, tier: int) -> int:
        """Tokens that a tick at depth `tier` emits at most, for each slot."""
        return self.sizes.rounds * (tier + 1)

    def ensure(self, slot: int, num_tokens: int) -> Deferred | None:
        """Let a slot have pages for `num_tokens` tokens."""
        pages = min(self.sizes.pages(num_tokens), self.sizes.columns)
        return self.decode_store.extend(self._rows.holdings[slot], pages)

    def step(self, tier: int, plan: StepPlan) -> SimulatedTick:
        """Dispatch one tick over as few slots as are held."""
        batch = next(size for size in self.sizes.batches if size > max(self._rows.holdings))
        depth_B = np.minimum(np.asarray(plan.depth)[:batch], tier)
        lucky_BRK = self._luck.random((batch, self.sizes.rounds, tier)) < np.asarray(plan.acceptance)[:tier]
        run_BR = np.minimum(np.logical_and.accumulate(lucky_BRK, axis=2).sum(axis=2), depth_B[:, None])
        output, rounds, mean_length = self._rows.advance(batch, run_BR, depth_B, tier)
        cost_A, _ = self._rounds.lookup(batch, mean_length)
        seconds = self._costs.tick_fixed_s + rounds * cost_A[self._rounds.tiers.index(tier)]
        return SimulatedTick(output, self.decode_mesh.run(float(seconds)))

    def is_done(self, pending: SimulatedTick) -> bool:
        """Whether a tick is done."""
        return pending.done_s <= self._clock()

    def read(self, pending: SimulatedTick) -> StepOutput:
        """Let time pass until a tick is done, and give its output."""
        self._clock.wait_until(pending.done_s)
        return pending.output

    def release(self, slot: int) -> None:
        """Free a slot and its pages."""
        self.decode_store.drop(self._rows.release(slot))

    def rescue(self, slot: int, job: Job) -> SimulatedKept:
        """Free a slot, and start the way of its pages to the host's memory."""
        self.release(slot)
        return SimulatedKept(job, self._move(job))

    def bring_home(self, kept: SimulatedKept) -> SimulatedKept:
        """Note that rescued pages are in the host's memory, if they are."""
        return kept._replace(at_home=kept.done_s <= self._clock())

    def remember(self, tokens: tuple[int, ...]) -> None:
        """Learn nothing from an answered request."""
        del tokens

    def forget(self, job: Job) -> None:
        """Take a request out of the prefix cache."""
        self.prefill_store.forget(job.tokens)

    def reset(self) -> None:
        """Forget all requests, and what is under way."""
        self.decode_store.reset()
        if not self.colocated:
            self.prefill_store.reset()
        for work in (self.decode_mesh, self.prefill_mesh, self.link):
            work.clear()
        self._begin_empty()

    def _home(self, task: SimulatedTask) -> PageStore:
        return self.decode_store if task.local else self.prefill_store

    def _ahead(self, job: Job) -> int:
        """Tokens beyond its own that a request has pages for when it comes into a slot, as `StreamPair` has it."""
        longest = min(len(job.request.prompt_token_ids) + job.request.params.max_tokens, self._row_tokens)
        return max(0, min(2 + 2 * self.tokens_per_tick(self.sizes.tiers[-1]), longest - len(job.tokens)))

    def _reserve(self, job: Job) -> Holding | Deferred:
        """Reserve pages on the decode mesh for what is about to arrive there."""
        holding = Holding(Owner(Stage.TRANSFER, job.request.request_id), ())
        refusal = self.decode_store.extend(holding, self.sizes.pages(len(job.tokens) + self._ahead(job)))
        return holding if refusal is None else refusal

    def _bytes(self, pages: int) -> int:
        return pages * self.sizes.page_size * self._costs.token_bytes

    def _move(self, job: Job) -> float:
        """Move a preempted request's pages from or to the host's memory, by the same way as hand-offs."""
        return self.link.run(self._costs.transfer_s(self._bytes(self.sizes.pages(len(job.tokens)))))
