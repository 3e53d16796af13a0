"""The host side of a decode mesh: who holds which slot and which pages, and the ticks over them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from streamserve.kv.pages import SCRATCH_PAGE, Owner, Stage
from streamserve.pipeserve import decode
from streamserve.pipeserve.packing import Packed
from streamserve.pipeserve.programs import Programs
from streamserve.pipeserve.store import Holding, PageStore
from streamserve.types import Deferred, PrefillBatch, Request, RowParams, StepOutput, StepPlan

_MAX_PLANS = 64  # plans kept on the device


class PendingStep(NamedTuple):
    """A tick that was dispatched and not yet read."""

    shape: tuple[int, int]  # slots and depth
    packed: Any  # on the device: tokens, and log-probabilities where a request wants them


class PageGroup(NamedTuple):
    """Pages on their way between meshes, as many as one program carries."""

    pages: Any  # `KVPages` [2L, size, ...], or `PageParts` of them
    first: int  # place of the first of them in its holding
    size: int


class Holder(NamedTuple):
    """Who holds a slot."""

    request: Request
    row: RowParams
    holding: Holding


class Decoder:
    """Slots and pages of one decode mesh."""

    def __init__(self, programs: Programs, store: PageStore):
        self._programs, self._store, self._sizes = programs, store, programs.sizes
        self._memory = programs.draft_memory  # what the drafter has learnt, on the host
        self._draft_params: Any = programs.decode_params[1]  # and all that it knows, on the device
        self._start_over()

    def _start_over(self) -> None:
        sizes = self._sizes
        self._state = self._programs.allocate_state()
        self._holders: dict[int, Holder] = {}
        self._table = np.full((sizes.slots, sizes.columns), SCRATCH_PAGE, np.int32)
        self._placed: dict[int, Any] = {}  # the table on the device, by slots; emptied when it changes
        self._plans: dict[tuple[int, bytes], Any] = {}  # plans on the device, by slots and content

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return self._sizes.slots - len(self._holders)

    @property
    def is_lost(self) -> bool:
        """Whether a program took the state and did not give it back."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))

    def reserve(self, request_id: str, num_tokens: int) -> Holding | Deferred:
        """Reserve pages for what is about to arrive."""
        holding = Holding(Owner(Stage.TRANSFER, request_id), ())
        refusal = self._store.extend(holding, self._sizes.pages(num_tokens))
        return holding if refusal is None else refusal

    def put(self, holding: Holding, groups: Sequence[PageGroup], *, restore: bool = False) -> None:
        """Copy arrived pages into the pools.

        Args:
          holding: the pages' new places.
          groups: the pages.
          restore: they come from this mesh's own pools.
        """
        programs = self._programs.restore if restore else self._programs.put
        for pages, first, size in groups:
            page_n = np.asarray(holding.pages[first : first + size], np.int32)
            self._store.pools = programs[size](self._store.pools, pages, self._programs.to_decode(page_n))

    def read_by_draft(self, holding: Holding, tokens: tuple[int, ...]) -> None:
        """Let the draft read a prompt whose pages of the draft did not travel."""
        sizes = self._sizes
        for first in range(0, sizes.pages(len(tokens)), sizes.tiles[-1]):
            count = min(sizes.pages(len(tokens)) - first, sizes.tiles[-1])
            size = next(size for size in sizes.tiles if size >= count)
            batch = self._draft_batch(holding, tokens, first, count, size)
            draft_params = self._draft_params
            placed = self._programs.to_decode(batch)
            self._store.pools = self._programs.draft_prefill[size](draft_params, self._store.pools, placed)

    def _draft_batch(
        self, holding: Holding, tokens: tuple[int, ...], first: int, count: int, size: int
    ) -> PrefillBatch:
        """Lay out `count` tiles of a prompt from tile `first` on, in a call of `size`."""
        page_size = self._sizes.page_size
        tiles: Any = np.zeros((size, page_size), np.int32)
        part = tokens[first * page_size : (first + count) * page_size]
        tiles.reshape(-1)[: len(part)] = part
        table: Any = np.full((size, self._sizes.columns), SCRATCH_PAGE, np.int32)
        table[:count, : len(holding.pages)] = holding.pages
        start: Any = np.zeros(size, np.int32)
        start[:count] = (first + np.arange(count)) * page_size
        wants: Any = np.bool_(False)
        return PrefillBatch(
            tokens=tiles, next_tokens=tiles, table=table, start=start, tail=np.zeros_like(start), wants_logprobs=wants
        )

    def insert(self, holder: Holder, prefix: Packed) -> int:
        """Give a request whose pages are in the pools the lowest free slot.

        Raises:
          ValueError: no slot is free.
        """
        slot = next((slot for slot in range(self._sizes.slots) if slot not in self._holders), None)
        if slot is None:
            raise ValueError(f"no free slot for {holder.request.request_id}: all {self._sizes.slots} are held")
        self._state = self._programs.insert(self._state, prefix, self._programs.to_decode(np.int32(slot)))
        self._store.hand_on(holder.holding, Owner(Stage.SLOT, holder.request.request_id))
        self._holders[slot] = holder
        self._show(slot, holder.holding)
        return slot

    def ensure(self, slot: int, num_tokens: int) -> Deferred | None:
        """Let a slot have pages for `num_tokens` tokens."""
        holding = self._holders[slot].holding
        before = len(holding.pages)
        refusal = self._store.extend(holding, min(self._sizes.pages(num_tokens), self._sizes.columns))
        if len(holding.pages) > before:
            self._show(slot, holding)
        return refusal

    def step(self, tier: int, plan: StepPlan) -> PendingStep:
        """Dispatch one tick over as few slots as are held, and the copy of its output to the host.

        Args:
          tier: depth of the program.
          plan: how it drafts, numpy arrays of all slots.
        """
        batch = next(size for size in self._sizes.batches if size > max(self._holders))
        if batch not in self._placed:
            self._placed[batch] = self._programs.to_decode(self._table[:batch].copy())
        program, placed = self._programs.step[batch, tier], (self._placed[batch], self._place_plan(plan, batch))
        params = (self._programs.decode_params[0], self._draft_params)
        self._store.pools, self._state, *packed = program(*params, self._store.pools, self._state, *placed)
        wants = any(holder.request.params.logprobs is not None for holder in self._holders.values())
        wanted = tuple(packed if wants else packed[:1])
        self._programs.start_read(wanted)
        return PendingStep((batch, tier), wanted)

    def forget_answers(self) -> None:
        """Let a drafter that learns from answered requests begin anew."""
        self._memory, self._draft_params = self._programs.draft_memory, self._programs.decode_params[1]

    def _place_plan(self, plan: StepPlan, batch: int) -> StepPlan:
        """Copy a plan to the device, unless it is there: most ticks have the plan of an earlier one."""
        plan = dataclasses.replace(plan, depth=plan.depth[:batch])
        key = (batch, b"".join(leaf.tobytes() for leaf in jax.tree.leaves(plan)))
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = self._programs.to_decode(plan)
        return self._plans[key]

    def remember(self, tokens: tuple[int, ...]) -> None:
        """Let a drafter that learns from answered requests learn from one."""
        if self._programs.remember is not None:
            self._memory = self._programs.remember(self._memory, tokens)
            self._draft_params = self._programs.to_decode(self._memory)

    def read(self, pending: PendingStep) -> StepOutput:
        """Wait for a tick's output: the one device-to-host copy of a tick."""
        packed, *logprobs = self._programs.read(pending.packed)
        shapes = self._programs.step_shapes[pending.shape]
        return decode.unpack(packed, logprobs[0] if logprobs else None, shapes)

    def release(self, slot: int) -> None:
        """Free a slot and its pages, whether its row has finished or not."""
        self._store.drop(self._holders.pop(slot).holding)
        self._table[slot] = SCRATCH_PAGE
        self._placed.clear()
        self._state = self._programs.release(self._state, self._programs.to_decode(np.int32(slot)))

    def rescue(self, slot: int, num_tokens: int) -> tuple[RowParams, list[PageGroup]]:
        """Copy a slot's first `num_tokens` tokens out of the pools, and start their way to the host's memory.

        Returns:
          The request's sampling parameters, and its pages.
        """
        _, row, holding = self._holders[slot]
        groups, first = [], 0
        for size in self._sizes.groups(self._sizes.pages(num_tokens)):
            page_n = np.asarray(holding.pages[first : first + size], np.int32)
            pages = self._programs.keep[size](self._store.pools, self._programs.to_decode(page_n))
            self._programs.start_read(pages)
            groups.append(PageGroup(pages, first, size))
            first += size
        return row, groups

    def reset(self) -> None:
        """Begin anew with free slots; the store is reset by whom it belongs to."""
        del self._state
        self._start_over()

    def _show(self, slot: int, holding: Holding) -> None:
        """Enter a holding into the table."""
        self._table[slot] = SCRATCH_PAGE
        self._table[slot, : len(holding.pages)] = holding.pages
        self._placed.clear()
