"""Measures what a round costs on a stream pair: its own programs, on rows made up for it, before the first request."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from streamserve.pipeserve.pair import StreamPair
from streamserve.specustream.costs import CostTable
from streamserve.types import DecodeState, StepPlan

REPEATS = 5  # of which the median counts, after one more that does not
_TICKS = 2  # timed together, so that the dispatch of one is hidden by the other, as in serving
_ENDLESS = 2**30  # tokens that a made-up row may emit


def context_lengths(max_model_len: int) -> tuple[int, ...]:
    """Choose the context lengths to measure at, tokens: an eighth and three quarters of the longest."""
    return tuple(sorted({max(1, max_model_len // 8), max(1, max_model_len * 3 // 4)}))


def measure_costs(
    pair: StreamPair,
    lengths: tuple[int, ...],
    *,
    fingerprint: dict[str, str],
    clock: Callable[[], float] = time.perf_counter,
    use_tqdm: bool = False,
) -> CostTable:
    """Time every decode program at every context length, round by round through all of them.

    What drafting takes is the difference to the same program told to draft nothing.

    Args:
      pair: compiled, and serving nobody; it is reset.
      lengths: tokens in the cache of every row.
      fingerprint: where the table will hold.
      clock: seconds.
      use_tqdm: show a progress bar.
    """
    sizes = pair.sizes
    shape = (len(sizes.batches), len(lengths), len(sizes.tiers))
    times: dict[tuple[int, int, int, bool], list[float]] = {}
    for _ in tqdm.tqdm(range(1 + REPEATS), desc="Measuring", disable=not use_tqdm):
        for n, batch in enumerate(sizes.batches):
            for c, length in enumerate(lengths):
                for a, tier in enumerate(sizes.tiers):
                    for drafts in (True, False)[: 2 if tier else 1]:
                        seconds = _time(pair, batch, tier, length, drafts=drafts, clock=clock)
                        times.setdefault((n, c, a, drafts), []).append(seconds)
    pair.reset()
    whole, draft = np.zeros(shape), np.zeros(shape)
    for (n, c, a, drafts), seconds in times.items():
        median = statistics.median(seconds[1:]) / (_TICKS * sizes.rounds)
        if drafts:
            whole[n, c, a] = median
        else:
            draft[n, c, a] = median
    draft = np.where(draft > 0, np.clip(whole - draft, 0.0, whole), 0.0)
    return CostTable(
        tiers=sizes.tiers,
        batches=sizes.batches,
        contexts=lengths,
        seconds_NCA=whole,
        draft_NCA=draft,
        fingerprint=fingerprint,
    )


def _time(pair: StreamPair, batch: int, tier: int, length: int, *, drafts: bool, clock: Callable[[], float]) -> float:
    """Run a few ticks of a program; gives the seconds of all of them."""
    programs, store = pair.programs, pair.decode_store
    pages = np.arange(batch * pair.sizes.columns) % store.num_pages + 1
    table = programs.to_decode(pages.reshape(batch, -1).astype(np.int32))
    plan = programs.to_decode(_plan(batch, tier if drafts else 0, max(pair.sizes.tiers)))
    state = programs.to_decode(_busy(jax.device_get(programs.allocate_state()), batch, length))
    jax.block_until_ready((table, plan, state, store.pools))
    begin_s = clock()
    for _ in range(_TICKS):
        step = programs.step[batch, tier]
        store.pools, state, *_ = step(*programs.decode_params, store.pools, state, table, plan)
    jax.block_until_ready(state)
    return clock() - begin_s


def _busy(state: DecodeState, batch: int, length: int) -> DecodeState:
    """Make the first rows run, with `length` tokens each, and never end."""
    slots = len(state.active)
    fill: Callable[[int], Any] = lambda value: np.full(slots, value, np.int32)  # noqa: E731
    row = dataclasses.replace(state.context.row, max_tokens=fill(_ENDLESS), stop_ids=state.context.row.stop_ids * 0 - 1)
    active: Any = np.arange(slots) < batch
    return dataclasses.replace(
        state,
        active=active,
        length=fill(length),
        draft_length=fill(length),
        context=dataclasses.replace(state.context, row=row),
    )


def _plan(batch: int, depth: int, deepest: int) -> StepPlan:
    array: Callable[..., Any] = np.asarray
    return StepPlan(
        depth=array(np.full(batch, depth), np.int32),
        rule=array(0, np.int32),
        threshold=array(0.0, np.float32),
        wants_divergence=array(False),
        acceptance=array(np.ones(deepest), np.float32),
    )
