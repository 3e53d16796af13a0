"""Operations on the decode state, and its way to the host: insert, release, narrowing, and the layout of an output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamserve.pipeserve import packing
from streamserve.types import DecodeState, FinishCode, Prefix, RowContext, RowParams, StepOutput, TokenLogprobs


def empty_state(prefix: Prefix, slots: int) -> DecodeState:
    """Allocate a decode state of free slots.

    Args:
      prefix: shapes of any prefix; fixes the vocabulary and the width of the sampling parameters.
      slots: B.
    """
    widen = lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
    zeros = jnp.zeros((slots,), jnp.int32)
    row: RowParams = jax.tree.map(widen, prefix.row)
    # A free row must not switch costly branches of sampling on: it is greedy and has neutral penalties.
    row = dataclasses.replace(
        row, bias_ids=jnp.full_like(row.bias_ids, -1), repetition_penalty=jnp.ones((slots,)), top_p=jnp.ones((slots,))
    )
    return DecodeState(
        active=jnp.zeros((slots,), bool),
        length=zeros + 1,
        prev_token=zeros,
        last_token=zeros,
        finish=zeros,
        first_pending=jnp.zeros((slots,), bool),
        first_logprobs=jax.tree.map(widen, prefix.first_logprobs),
        draft_length=zeros,
        history=widen(prefix.history),
        context=RowContext(
            row=row, prompt_seen=widen(prefix.prompt_seen), output_counts=widen(prefix.output_counts), emitted=zeros
        ),
    )


def insert(state: DecodeState, prefix: Prefix, slot: jax.Array) -> DecodeState:
    """Put a request into a free slot; a pending first token goes out with the next `StepOutput`.

    DONATES state.
    """
    row = prefix.row
    stops = jnp.any(prefix.last_token[0] == row.stop_ids[0])
    full = row.max_tokens[0] <= prefix.emitted[0]
    ended = jnp.where(stops, FinishCode.STOP, jnp.where(full, FinishCode.LENGTH, FinishCode.RUNNING))
    code = jnp.where(prefix.finite[0], ended, FinishCode.INVALID).astype(jnp.int32)
    put = lambda whole, part: whole.at[slot].set(part[0])  # noqa: E731
    old = state.context
    return DecodeState(
        active=state.active.at[slot].set(code == FinishCode.RUNNING),
        length=put(state.length, prefix.length),
        prev_token=put(state.prev_token, prefix.prev_token),
        last_token=put(state.last_token, prefix.last_token),
        finish=state.finish.at[slot].set(code),
        first_pending=put(state.first_pending, prefix.first_pending & prefix.finite),
        first_logprobs=jax.tree.map(put, state.first_logprobs, prefix.first_logprobs),
        draft_length=put(state.draft_length, prefix.draft_length),
        history=put(state.history, prefix.history),
        context=RowContext(
            row=jax.tree.map(put, old.row, row),
            prompt_seen=put(old.prompt_seen, prefix.prompt_seen),
            output_counts=put(old.output_counts, prefix.output_counts),
            emitted=put(old.emitted, prefix.emitted),
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


def narrow(state: DecodeState, batch: int) -> DecodeState:
    """Take the first `batch` rows."""
    return jax.tree.map(lambda leaf: leaf[:batch], state)


def widen(state: DecodeState, part: DecodeState) -> DecodeState:
    """Put the first rows back. DONATES state."""
    return jax.tree.map(lambda whole, rows: whole.at[: rows.shape[0]].set(rows), state, part)


def pack(output: StepOutput) -> tuple[jax.Array, jax.Array]:
    """Lay a tick's output out in two int32 arrays [B, W], bits of floats included: tokens, and log-probabilities."""
    tokens, logprobs = packing.pack(dataclasses.replace(output, logprobs=None)), packing.pack(output.logprobs)
    assert tokens.flags.shape[1] == logprobs.flags.shape[1] == 0, "a tick's output has no room for booleans"
    return tokens.words, logprobs.words


def unpack(packed: np.ndarray, packed_logprobs: np.ndarray | None, shapes: StepOutput) -> StepOutput:
    """Undo `pack` on the host.

    Args:
      packed: int32 [B, W].
      packed_logprobs: int32 [B, W], or None where nobody asked.
      shapes: `jax.ShapeDtypeStruct` leaves of the output that was packed.
    """
    output: StepOutput = _unpacked(packed, dataclasses.replace(shapes, logprobs=None))
    if packed_logprobs is None:
        return output
    logprobs: TokenLogprobs = _unpacked(packed_logprobs, shapes.logprobs)
    return dataclasses.replace(output, logprobs=logprobs)


def _unpacked(words: np.ndarray, shapes: Any) -> Any:
    return packing.unpack(packing.Packed(words, np.zeros((len(words), 0), bool)), shapes)
