"""Operations on the decode state, and its way to the host: insert, release, and the packing of a tick's output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamserve import sampling
from streamserve.kv import cache
from streamserve.specustream.drafters import Drafter
from streamserve.types import DecodeState, FinishCode, KVShape, Prefix, RowContext, RowParams, StepOutput


def empty_state(kv_shape: KVShape, drafter: Drafter, prefix: Prefix, *, slots: int, capacity: int) -> DecodeState:
    """Allocate a decode state of free slots.

    Args:
      kv_shape: of the target's cache.
      drafter: allocates its own state.
      prefix: shapes of any prefix; fixes the vocabulary and the width of the sampling parameters.
      slots: B.
      capacity: C, tokens a row.
    """
    widen = lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
    zeros = jnp.zeros((slots,), jnp.int32)
    row: RowParams = jax.tree.map(widen, prefix.row)
    seen_BV = widen(prefix.prompt_seen)
    counts_BV = jnp.zeros(seen_BV.shape, jnp.int32)
    # A free row must not switch costly branches of sampling on: it is greedy and has neutral penalties.
    row = dataclasses.replace(
        row, bias_ids=jnp.full_like(row.bias_ids, -1), repetition_penalty=jnp.ones((slots,)), top_p=jnp.ones((slots,))
    )
    return DecodeState(
        target=cache.zeros(kv_shape, slots, capacity),
        draft=drafter.empty(slots, capacity),
        active=jnp.zeros((slots,), bool),
        length=zeros + 1,
        prev_token=zeros,
        last_token=zeros,
        finish=zeros,
        first_pending=jnp.zeros((slots,), bool),
        first_logprobs=jax.tree.map(widen, prefix.first_logprobs),
        context=RowContext(row=row, prompt_seen=seen_BV, output_counts=counts_BV, emitted=zeros),
    )


def insert(drafter: Drafter, state: DecodeState, prefix: Prefix, slot: jax.Array) -> DecodeState:
    """Put a prefix into a free slot; its first token goes out with the next `StepOutput`.

    DONATES state.
    """
    row = prefix.row
    first = prefix.first_token[0]
    stops = jnp.any(first == row.stop_ids[0])
    full = row.max_tokens[0] <= 1
    code = jnp.where(stops, FinishCode.STOP, jnp.where(full, FinishCode.LENGTH, FinishCode.RUNNING))
    put = lambda whole, part: whole.at[slot].set(part[0])  # noqa: E731
    old = state.context
    counts_1V = sampling.count_tokens(
        jnp.zeros((1, old.output_counts.shape[1]), jnp.int32), prefix.first_token[:, None]
    )
    return dataclasses.replace(
        state,
        target=cache.insert_row(state.target, prefix.target, slot),
        draft=drafter.insert(state.draft, prefix.draft, slot),
        active=state.active.at[slot].set(code == FinishCode.RUNNING),
        length=put(state.length, prefix.length),
        prev_token=put(state.prev_token, prefix.prompt_tail),
        last_token=put(state.last_token, prefix.first_token),
        finish=state.finish.at[slot].set(code.astype(jnp.int32)),
        first_pending=state.first_pending.at[slot].set(True),
        first_logprobs=jax.tree.map(put, state.first_logprobs, prefix.first_logprobs),
        context=RowContext(
            row=jax.tree.map(put, old.row, row),
            prompt_seen=put(old.prompt_seen, prefix.prompt_seen),
            output_counts=put(old.output_counts, counts_1V),
            emitted=old.emitted.at[slot].set(1),
        ),
    )


def release(state: DecodeState, slot: jax.Array) -> DecodeState:
    """Stop a row and make it neutral, so that it costs the others nothing.

    DONATES state.
    """
    context = state.context
    row = context.row
    set_to = lambda leaf, value: leaf.at[slot].set(value)  # noqa: E731
    row = dataclasses.replace(
        row,
        temperature=set_to(row.temperature, 0.0),
        bias_ids=set_to(row.bias_ids, -1),
        presence_penalty=set_to(row.presence_penalty, 0.0),
        frequency_penalty=set_to(row.frequency_penalty, 0.0),
        repetition_penalty=set_to(row.repetition_penalty, 1.0),
        min_tokens=set_to(row.min_tokens, 0),
    )
    return dataclasses.replace(
        state,
        active=set_to(state.active, False),
        first_pending=set_to(state.first_pending, False),
        context=dataclasses.replace(context, row=row),
    )


def pack(output: StepOutput) -> jax.Array:
    """Lay a tick's output out in one int32 array [B, W], bits of floats included: one copy brings it to the host."""
    parts = [_as_int32(leaf).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(output)]
    return jnp.concatenate(parts, axis=1)


def unpack(packed: np.ndarray, shapes: StepOutput) -> StepOutput:
    """Undo `pack` on the host.

    Args:
      packed: int32 [B, W].
      shapes: `jax.ShapeDtypeStruct` leaves of the output that was packed.
    """
    leaves, cursor = [], 0
    for shape in jax.tree.leaves(shapes):
        width = int(np.prod(shape.shape[1:], dtype=np.int64))
        part = np.ascontiguousarray(packed[:, cursor : cursor + width])
        leaves.append(part.view(shape.dtype).reshape(shape.shape))
        cursor += width
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _as_int32(leaf: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, jnp.int32) if leaf.dtype == jnp.float32 else leaf.astype(jnp.int32)
