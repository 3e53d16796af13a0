"""The records that travel along the conveyor, and the dimension key of the whole package.

Dimension key (a suffix of every array name that lives more than five lines, as in `logits_BTV`):
  A arms, B decode slots (rows), C cache tokens, D head size, E model size, F context features, G key/value heads,
  H query heads, K draft depth, L layers, M query heads per key/value head, N emission columns, R rounds a tick,
  S prompt tokens (bucketed), T = K + 1 verified tokens, V vocabulary.

Three kinds of record exist: `flax.struct.dataclass` for what lives on devices, `NamedTuple` for bundles of functions
and loop carries, frozen dataclasses for what lives on the host. This module knows no component.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from streamserve.sampling_params import SamplingParams

Device = Any  # a jax.Device, whose name JAX's stubs give as a variable, not as a type
Params = Any  # a pytree of parameters, one subtree a layer; opaque to everything but `streamserve.models`

EMPTY_TOKEN = -1  # an emission column that holds no token


class FinishCode(enum.IntEnum):
    """Why a row stopped, as the device says it. Zero while it runs."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2


# --- device records ---------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class LayerKV:
    """Keys and values of one layer, one contiguous stretch of `C` tokens a row.

    Heads come before tokens so that a row's head is contiguous: both products of attention then read the cache as it
    lies, on CPU and on GPU.
    """

    k: jax.Array  # [B, G, C, D], rotated keys
    v: jax.Array  # [B, G, C, D]


@flax.struct.dataclass
class KVCache:
    """Keys and values of a model: a tuple with one entry a layer, never a stacked array.

    Stacked caches inside a device loop are copied whole in every step on GPU.
    """

    layers: tuple[LayerKV, ...]


@flax.struct.dataclass
class RowParams:
    """Sampling parameters of `B` rows, as arrays."""

    key: jax.Array  # [B, 2] uint32, key data of the request's own stream of random numbers
    temperature: jax.Array  # [B] float32, 0 is greedy
    top_p: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32, 0 keeps all
    min_p: jax.Array  # [B] float32
    presence_penalty: jax.Array  # [B] float32
    frequency_penalty: jax.Array  # [B] float32
    repetition_penalty: jax.Array  # [B] float32
    bias_ids: jax.Array  # [B, max_logit_bias] int32, EMPTY_TOKEN where unused
    bias: jax.Array  # [B, max_logit_bias] float32, added to the logits of `bias_ids`
    stop_ids: jax.Array  # [B, max_stop_ids] int32, EMPTY_TOKEN where unused
    min_tokens: jax.Array  # [B] int32
    max_tokens: jax.Array  # [B] int32
    wants_logprobs: jax.Array  # [B] bool


@flax.struct.dataclass
class RowContext:
    """What the sampling of `B` rows depends on besides logits. `drafted` positions come on top, see `sampling`."""

    row: RowParams
    prompt_seen: jax.Array  # [B, V] bool, tokens that occur in the prompt
    output_counts: jax.Array  # [B, V] int32, occurrences in the output
    emitted: jax.Array  # [B] int32, tokens emitted so far


@flax.struct.dataclass
class TokenLogprobs:
    """Log-probabilities of the unmodified target distribution; zeros where nobody asked. X: any leading dimensions."""

    chosen: jax.Array  # [X] float32, of the token itself
    rank: jax.Array  # [X] int32, 1 for the most likely token
    top_ids: jax.Array  # [X, max_logprobs] int32
    top: jax.Array  # [X, max_logprobs] float32, descending


@flax.struct.dataclass
class Prefix:
    """What prefill hands to decode: everything that one request needs to go on. The leading dimension is 1."""

    target: KVCache  # [1, G, S, D] a layer
    draft: Any  # the drafter's own prefix: a KVCache for a draft model, () for none
    length: jax.Array  # [1] int32, prompt tokens in the caches
    prompt_tail: jax.Array  # [1] int32, the prompt's last token
    first_token: jax.Array  # [1] int32, sampled from the prompt's last position
    first_logprobs: TokenLogprobs  # of `first_token`
    prompt_seen: jax.Array  # [1, V] bool
    row: RowParams


@flax.struct.dataclass
class PrefillOutput:
    """What the models make of a prompt, before anything is sampled."""

    target: KVCache  # [1, G, S, D] a layer
    draft: Any  # as in Prefix
    tail_logits: jax.Array  # [1, 1, V] float32, after the prompt's last token
    prompt_seen: jax.Array  # [1, V] bool
    prompt_logprobs: TokenLogprobs  # [S]; entry s is about prompt token s + 1; zeros unless asked for


@flax.struct.dataclass
class DecodeState:
    """Everything a decode mesh keeps between ticks. DONATED to every operation on it."""

    target: KVCache  # [B, G, C, D] a layer
    draft: Any  # the drafter's state
    active: jax.Array  # [B] bool, rows that still generate
    length: jax.Array  # [B] int32, tokens in the target's cache
    prev_token: jax.Array  # [B] int32, the token at cache position length - 1
    last_token: jax.Array  # [B] int32, emitted but not yet in the cache
    finish: jax.Array  # [B] int32, FinishCode
    first_pending: jax.Array  # [B] bool, the first token waits for the next StepOutput
    first_logprobs: TokenLogprobs  # leading dimension B
    context: RowContext  # of B rows


@flax.struct.dataclass
class Draft:
    """Tokens proposed for verification.

    A decision about position k may depend on `probs` up to k, never on `tokens[:, k]` itself: dropping a token because
    of what it is would bias the output.
    """

    tokens: jax.Array  # [B, K] int32
    probs: jax.Array  # [B, K, V] float32, the distribution that each token was drawn from
    length: jax.Array  # [B] int32 in [0, K], positions that count


@flax.struct.dataclass
class Verdict:
    """Outcome of a verification."""

    num_accepted: jax.Array  # [B] int32 in [0, K]
    next_token: jax.Array  # [B] int32, the correction or the bonus


@flax.struct.dataclass
class StepOutput:
    """What one tick emitted. It lies packed in one int32 array on the device, so that one copy brings it over."""

    tokens: jax.Array  # [B, N] int32, EMPTY_TOKEN where none; N = 1 + R * T, column 0 is a pending first token
    accepted: jax.Array  # [B, R] int32, accepted draft tokens a round
    drafted: jax.Array  # [B, R] int32, proposed draft tokens a round; EMPTY_TOKEN where the row did not run
    finish: jax.Array  # [B] int32, FinishCode after the tick
    logprobs: TokenLogprobs  # leading dimensions [B, N]


# --- bundles of functions ---------------------------------------------------------------------------------------------


class ForwardFns(NamedTuple):
    """A model as two pure functions, all that PipeServe and SpecuStream see of it.

    Attributes:
      forward: `(params, tokens_BT, cache, start_B) -> (hidden_BTE, cache)`. Row b's token t sits at position
        `start_B[b] + t`; its key and value are written there, and it attends to positions up to its own.
      logits: `(params, hidden_XE) -> logits_XV` in float32, any leading dimensions X.
    """

    forward: Callable[..., tuple[jax.Array, KVCache]]
    logits: Callable[..., jax.Array]


# --- host records -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What must be known to allocate a model's cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a caller asks for: text or token ids, and how to sample.

    Attributes:
      request_id: comes back in the `RequestOutput`.
      params: sampling parameters.
      text: the prompt as text; tokenized unless `token_ids` are given too.
      token_ids: the prompt as tokens.
    """

    request_id: str
    params: SamplingParams
    text: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. `n` completions of a prompt are `n` requests.

    Attributes:
      request_id: unique among the requests of an engine.
      prompt_token_ids: at least one token.
      params: how to sample.
      seed: of the request's own random stream, already derived.
      stop_ids: token ids that end it: `params.stop_token_ids`, and end-of-sequence unless it is ignored.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Log-probability of one token under the unmodified model distribution."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One finished completion.

    Attributes:
      index: among the `n` of its request.
      text: decoded output; empty without a tokenizer.
      token_ids: emitted tokens, a stop token included.
      cumulative_logprob: sum over emitted tokens; None unless `logprobs` was asked for.
      logprobs: per emitted token, token id to `Logprob`; None unless asked for.
      finish_reason: "stop" or "length".
      stop_reason: the stop string or stop token id that matched; None for end-of-sequence and length.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str
    stop_reason: str | int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times and counts of one request. Clock readings are seconds of one monotonic clock.

    Attributes:
      arrival_s: when the scheduler took it.
      scheduled_s: when prefill was dispatched.
      first_token_s: when the host held its first token.
      finished_s: when the host held its last token.
      lane: the stream pair that served it.
      drafted_per_step: proposed draft tokens of each verification step.
      accepted_per_step: accepted ones of each step.
      transfer_bytes: bytes of KV and request state that went from prefill to decode mesh.
    """

    arrival_s: float
    scheduled_s: float
    first_token_s: float
    finished_s: float
    lane: int
    drafted_per_step: tuple[int, ...]
    accepted_per_step: tuple[int, ...]
    transfer_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What a caller gets back, exactly once per request.

    Attributes:
      request_id: the caller's id, or the order of arrival.
      prompt: text, None when token ids were given.
      prompt_token_ids: tokens of the prompt.
      prompt_logprobs: per prompt token (None for the first), token id to `Logprob`; None unless asked for.
      outputs: `n` completions; empty when `error` is set.
      finished: always true: outputs are handed over when complete.
      metrics: of each completion, in the order of `outputs`.
      error: why the request was refused or failed; None when it was answered.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: tuple[RequestMetrics, ...]
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """A snapshot of one stream pair, taken when a request is routed.

    Attributes:
      lane: index of the stream pair.
      free_slots: decode slots that a new request could take.
      num_slots: decode slots in all.
      running: requests in decode slots.
      in_transit: requests between prefill and a decode slot.
      queued_prefill_tokens: prompt tokens whose prefill was dispatched and not seen to end.
      accepted_per_step: mean accepted draft tokens a verification step over the last ticks; 0 without speculation.
    """

    lane: int
    free_slots: int
    num_slots: int
    running: int
    in_transit: int
    queued_prefill_tokens: int
    accepted_per_step: float
