"""A stream pair: one prefill mesh, one decode mesh, and the hand-off between them.

It owns pages and slots of its meshes and nothing else of a request: it does not order, route or detokenize. No method
waits for a device but `read` and `read_prompt_logprobs`. A colocated pair is one mesh: its pages
are handed from prefill to decode by a change of owner, and nothing moves.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from streamserve.kv.pages import Owner, Stage
from streamserve.pipeserve.decoder import Decoder, Holder, PageGroup, PendingStep
from streamserve.pipeserve.packing import Packed
from streamserve.pipeserve.prefiller import PrefillCall, Prefiller, PrefillTask, resumed_prefix
from streamserve.pipeserve.programs import Programs
from streamserve.pipeserve.store import Holding, PageStore
from streamserve.types import Deferred, Job, RowParams, StepOutput, StepPlan, TokenLogprobs


class Kept(NamedTuple):
    """Pages of a preempted request, in the host's memory or on their way there."""

    job: Job
    row: RowParams
    groups: tuple[PageGroup, ...]
    at_home: bool = False  # they are there


class InTransit(NamedTuple):
    """A request between prefill and a decode slot."""

    job: Job
    task: PrefillTask | None  # keeps the source pages until arrival; None where they come from a rescue
    row: RowParams
    prefix: Packed  # a `Prefix` on the decode mesh, or on its way there
    groups: tuple[PageGroup, ...]  # pages likewise
    holding: Holding  # their places on the decode mesh
    transfer_pages: int
    transfer_bytes: int
    kept: Kept | None = None  # the other source of pages


class HandOffError(RuntimeError):
    """A program of a hand-off or an insertion failed; `request_ids` were in it."""

    def __init__(self, message: str, request_ids: tuple[str, ...]):
        super().__init__(message)
        self.request_ids = request_ids


class StreamPair:
    """One lane of PipeServe."""

    def __init__(self, index: int, programs: Programs):
        """Allocate pools and state.

        Args:
          index: of this lane.
          programs: of its meshes; they need not be compiled yet.
        """
        self.index, self.programs = index, programs
        self.sizes = programs.sizes
        reuse = programs.config.enable_prefix_caching
        self.decode_store = PageStore(
            programs.allocate_decode,
            num_pages=programs.num_pages(decode_side=True),
            page_size=self.sizes.page_size,
            reuse_prefixes=reuse and programs.colocated,
        )
        self.prefill_store = self.decode_store
        if not programs.colocated:
            self.prefill_store = PageStore(
                programs.allocate_prefill,
                num_pages=programs.num_pages(decode_side=False),
                page_size=self.sizes.page_size,
                reuse_prefixes=reuse,
            )
        self._prefiller = Prefiller(programs, self.prefill_store)
        self._local = Prefiller(programs, self.decode_store, local=True)
        self._decoder = Decoder(programs, self.decode_store)

    @property
    def colocated(self) -> bool:
        """Whether prefill and decode share one mesh, and so one pool of pages."""
        return self.programs.colocated

    @property
    def is_up(self) -> bool:
        """Whether its machine works: this one knows of no other state."""
        return True

    @property
    def local_tokens(self) -> int:
        """Longest prompt that the decode mesh can compute, too; 0 for none."""
        return self.sizes.local_tokens

    @property
    def num_slots(self) -> int:
        """Decode slots."""
        return self.sizes.slots

    @property
    def free_slots(self) -> int:
        """Decode slots that nobody holds."""
        return self._decoder.num_free

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
        """Tiles of prompts that no prefill call has taken yet."""
        return sum(task.num_waiting for task in self._prefiller.tasks)

    @property
    def waiting_local_tiles(self) -> int:
        """Tiles of prompts that no prefill call on the decode mesh has taken yet."""
        return sum(task.num_waiting for task in self._local.tasks)

    def compilations(self) -> list[tuple[str, Callable[[], None]]]:
        """List every program by name, with a function that compiles it. All must have run before a request comes."""
        return self.programs.compilations()

    # --- prefill

    def cached_tokens(self, tokens: tuple[int, ...]) -> int:
        """Count the tokens of a prompt that the prefix cache holds now."""
        return self.prefill_store.cached_tokens(tokens)

    def begin(self, job: Job) -> PrefillTask | Deferred:
        """Reserve the pages of a prompt on the prefill mesh; `prefill` then works on it.

        Raises:
          ValueError: it can never be served here.
        """
        return self._prefiller.begin(job, ahead=self._ahead(job) if self.colocated else 0)

    def begin_locally(self, job: Job) -> PrefillTask | Deferred:
        """Reserve pages for a prompt on the decode mesh, which then computes it, too; `prefill_locally` works on it.

        Raises:
          ValueError: it can never be served here, or is longer than what the decode mesh computes.
        """
        if len(job.tokens) > self.local_tokens:
            raise ValueError(f"{len(job.tokens)} tokens are more than {self.local_tokens=} of the decode mesh")
        return self._local.begin(job, ahead=self._ahead(job))

    def prefill(self) -> PrefillCall | None:
        """Dispatch one prefill call over prompts that have begun, if any has tiles left."""
        return self._prefiller.dispatch()

    def prefill_locally(self) -> PrefillCall | None:
        """Dispatch one prefill call on the decode mesh, if prompts have begun there."""
        return self._local.dispatch()

    def is_prompt_computed(self, item: InTransit) -> bool:
        """Whether what a hand-off waits for first, the last prefill call of its prompt, is done."""
        return item.task is None or item.task.tail is None or self.programs.is_ready(item.task.tail[0])

    def is_computed(self, call: PrefillCall) -> bool:
        """Whether a prefill call is done, without waiting for it."""
        return self.programs.is_ready(call.tail_hidden)

    def drop(self, task: PrefillTask) -> None:
        """Forget a prompt that has begun, and free its pages."""
        self._prefiller_of(task).drop(task)

    # --- hand-off

    def hand_off(self, task: PrefillTask) -> InTransit | Deferred:
        """Sample the first token of a computed prompt and start the way of its pages to the decode mesh.

        The prompt's pages stay where they are until `insert`, so that a lost transfer can be begun again.

        Raises:
          HandOffError: a program failed; the prompt is to be dropped.
        """
        if self.colocated or task.local:
            holding: Holding | Deferred = task.holding
        else:
            holding = self._reserve(task.job)
        if isinstance(holding, Deferred):
            return holding
        # On one mesh the draft reads its latest two tokens anew, and so writes to the last page of the prompt.
        store = self.decode_store if task.local else self.prefill_store
        store.publish(task.holding, task.tokens[:-1] if self.colocated else task.tokens)
        if task.holding.owner.stage is Stage.PREFILL:
            store.hand_on(task.holding, Owner(Stage.TRANSFER, task.request_id))
        try:
            return self._send(task, holding)
        except RuntimeError as error:
            if holding is not task.holding:
                self.decode_store.drop(holding)
            raise HandOffError(str(error), (task.request_id,)) from error

    def resume(self, kept: Kept) -> InTransit | Deferred:
        """Start the way of rescued pages back to the decode mesh."""
        if not kept.at_home:
            return Deferred("its pages are on their way to the host's memory")
        holding = self._reserve(kept.job)
        if isinstance(holding, Deferred):
            return holding
        try:
            # The drafter may have fallen behind, and how far only the device knows; its prompt it has read.
            read = len(kept.job.request.prompt_token_ids)
            prefix = resumed_prefix(kept.job, kept.row, self.programs, draft_length=read)
            prefix = self.programs.to_decode(self.programs.pack(prefix))
            groups = tuple(group._replace(pages=self.programs.transfer(group.pages)[0]) for group in kept.groups)
        except RuntimeError as error:
            self.decode_store.drop(holding)
            raise HandOffError(str(error), (kept.job.request.request_id,)) from error
        return InTransit(kept.job, None, kept.row, prefix, groups, holding, 0, 0, kept)

    def has_arrived(self, item: InTransit) -> bool:
        """Whether pages and prefix are on the decode mesh, without waiting for them."""
        return self.programs.is_ready((item.prefix, [group.pages for group in item.groups]))

    def abandon(self, item: InTransit) -> None:
        """Give up a transfer: free the pages it was to fill. Those of the prompt remain; `drop` frees them."""
        if item.holding is not (item.task and item.task.holding):
            self.decode_store.drop(item.holding)

    def insert(self, item: InTransit) -> int:
        """Put an arrived request into a free slot, and free its pages on the prefill mesh.

        Returns:
          The slot.

        Raises:
          ValueError: no slot is free.
          HandOffError: a program failed.
        """
        if not self.free_slots:
            raise ValueError(f"no free slot for {item.job.request.request_id}")
        try:
            self._decoder.put(item.holding, item.groups, restore=item.task is None)
            if self.programs.recomputes_draft and item.task is not None:
                self._decoder.read_by_draft(item.holding, item.job.tokens)
            slot = self._decoder.insert(Holder(item.job.request, item.row, item.holding), item.prefix)
        except RuntimeError as error:
            raise HandOffError(str(error), (item.job.request.request_id,)) from error
        if item.task is not None and item.task.holding is not item.holding:
            self.prefill_store.drop(item.task.holding)
        return slot

    def read_prompt_logprobs(self, item: InTransit) -> TokenLogprobs:
        """Copy a prompt's log-probabilities to the host; only for requests that asked for them."""
        assert item.task is not None, "a request that was rescued has its log-probabilities already"
        return self._prefiller_of(item.task).read_prompt_logprobs(item.task)

    # --- decode

    def tokens_per_tick(self, tier: int) -> int:
        """Tokens that a tick at depth `tier` emits at most, for each slot."""
        return self.sizes.rounds * (tier + 1)

    def ensure(self, slot: int, num_tokens: int) -> Deferred | None:
        """Let a slot have pages for `num_tokens` tokens; a tick must not emit more than there are pages for."""
        return self._decoder.ensure(slot, num_tokens)

    def step(self, tier: int, plan: StepPlan) -> PendingStep:
        """Dispatch one tick by the program of depth `tier`, which drafts as `plan`, of all slots, says."""
        return self._decoder.step(tier, plan)

    def remember(self, tokens: tuple[int, ...]) -> None:
        """Let a drafter that learns from answered requests learn from one."""
        self._decoder.remember(tokens)

    def forget_answers(self) -> None:
        """Let a drafter that learns from answered requests begin anew."""
        self._decoder.forget_answers()

    def is_done(self, pending: PendingStep) -> bool:
        """Whether a tick is done, without waiting for it."""
        return self.programs.is_ready(pending.packed)

    def read(self, pending: PendingStep) -> StepOutput:
        """Wait for a tick's output and bring it to the host, as numpy arrays."""
        return self._decoder.read(pending)

    def release(self, slot: int) -> None:
        """Free a slot and its pages, whether its row has finished or not."""
        self._decoder.release(slot)

    def rescue(self, slot: int, job: Job) -> Kept:
        """Free a slot, and start the way of its pages to the host's memory.

        Args:
          slot: whose.
          job: the request and the tokens it has emitted, as far as the host knows them.
        """
        row, groups = self._decoder.rescue(slot, len(job.tokens))
        self._decoder.release(slot)
        return Kept(job, row, tuple(groups))

    def bring_home(self, kept: Kept) -> Kept:
        """Let rescued pages leave the decode mesh as soon as the host has them; does not wait for that."""
        if kept.at_home or not self.programs.is_ready([group.pages for group in kept.groups]):
            return kept
        groups = tuple(group._replace(pages=self.programs.to_host(group.pages)) for group in kept.groups)
        return kept._replace(groups=groups, at_home=True)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache; nothing may be under way."""
        self.prefill_store.tree.clear()

    # --- faults

    def forget(self, job: Job) -> None:
        """Take a request whose pages turned out to be corrupt out of the prefix cache."""
        self.prefill_store.forget(job.tokens)

    @property
    def is_broken(self) -> bool:
        """Whether a failed program has taken pages or slots with it, so that nothing but `reset` helps."""
        return self.prefill_store.is_lost or self.decode_store.is_lost or self._decoder.is_lost

    def reset(self) -> None:
        """Forget all requests and begin with empty pools, whatever became of the old ones."""
        self.decode_store.reset()
        if not self.programs.colocated:
            self.prefill_store.reset()
        self._prefiller.tasks, self._local.tasks = [], []
        self._decoder.reset()

    def _prefiller_of(self, task: PrefillTask) -> Prefiller:
        return self._local if task.local else self._prefiller

    def _ahead(self, job: Job) -> int:
        """Tokens beyond its own that a request has pages for when it comes into a slot.

        Two ticks' worth, since the first is read after the second is dispatched: so it gets further before it can lose
        its slot again. Without, requests that take turns at being handed off and preempted may do so for ever.
        """
        row = self.sizes.columns * self.sizes.page_size
        longest = min(len(job.request.prompt_token_ids) + job.request.params.max_tokens, row)
        return max(0, min(2 + 2 * self.tokens_per_tick(self.sizes.tiers[-1]), longest - len(job.tokens)))

    def _reserve(self, job: Job) -> Holding | Deferred:
        """Reserve pages on the decode mesh for what is about to arrive there."""
        return self._decoder.reserve(job.request.request_id, len(job.tokens) + self._ahead(job))

    def _send(self, task: PrefillTask, holding: Holding) -> InTransit:
        """Start the way of a computed prompt to its new pages."""
        if task.job.output:  # where it goes on is known here, and nothing is to be sampled
            prefix, moved_bytes = self._prefiller.resumed(task), 0
        else:
            prefix, moved_bytes = self.programs.transfer(self._prefiller_of(task).first(task))
        groups = []
        for group in () if holding is task.holding else self._take(task.holding):
            pages, page_bytes = self.programs.transfer(group.pages)
            groups.append(group._replace(pages=pages))
            moved_bytes += page_bytes
        return InTransit(
            job=task.job,
            task=task,
            row=task.row,
            prefix=prefix,
            groups=tuple(groups),
            holding=holding,
            transfer_pages=sum(group.size for group in groups),
            transfer_bytes=moved_bytes,
        )

    def _take(self, holding: Holding) -> list[PageGroup]:
        """Copy a prompt's pages out of the prefill pools, in groups."""
        groups, first = [], 0
        for size in self.sizes.groups(len(holding.pages)):
            page_n = self.programs.to_prefill(np.asarray(holding.pages[first : first + size], np.int32))
            groups.append(PageGroup(self.programs.take[size](self.prefill_store.pools, page_n), first, size))
            first += size
        return groups
