"""The records that travel along the conveyor, and the dimension key of the whole package.

Dimension key (a suffix of every array name that lives more than five lines, as in `logits_BTV`):
  A arms, B decode slots (rows), C cache tokens, D head size, E model size, F context features, G key/value heads,
  H query heads, K draft depth, L layers, M pages of a row (in layers.py: query heads per key/value head), N pages of
  a pool (in StepOutput: emission columns), P positions of a page, R rounds a tick, T = K + 1 verified tokens,
  V vocabulary, X tiles of a prefill call (elsewhere: any leading dimensions).

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
    INVALID = 3  # the model gave a number that is not finite; nothing of that round was emitted


# --- device records ---------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class LayerKV:
    """Pages of keys and values of one layer, `P` positions each.

    Heads come before positions so that a page's head lies in one piece: both products of attention then read the cache
    as it lies, on CPU and on GPU.
    """

    k: jax.Array  # [N, G, P, D], rotated keys
    v: jax.Array  # [N, G, P, D]


@flax.struct.dataclass
class KVPool:
    """Pages of a model: a tuple with one entry a layer, never a stacked array.

    Stacked caches inside a device loop are copied whole in every step on GPU. A page has the same number in every
    layer. Page 0 is scratch: what nobody needs is written there.
    """

    layers: tuple[LayerKV, ...]


@flax.struct.dataclass
class KVCache:
    """A pool as a batch of rows sees it: position c of row b lies in page `table[b, c // P]`, at place `c % P`."""

    pool: KVPool
    table: jax.Array  # [B, M] int32


@flax.struct.dataclass
class Pools:
    """Pages of target and drafter on one mesh. Page n of both belongs to the same positions of the same request."""

    target: KVPool
    draft: Any  # the drafter's paged state: a KVPool for a draft model, () for none


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
class KVPages:
    """Some pages of all layers of a pool in one array, as they travel."""

    pages: jax.Array  # [2L, n, G, P, D]; keys and values of one layer after the other


@flax.struct.dataclass
class Prefix:
    """What decode needs to know of a request besides its pages. The leading dimension is 1."""

    length: jax.Array  # [1] int32, tokens whose keys and values are in the pages
    prev_token: jax.Array  # [1] int32, the token at position length - 1
    last_token: jax.Array  # [1] int32, emitted and in no page yet: the first token, or the latest before a preemption
    emitted: jax.Array  # [1] int32, tokens emitted so far, `last_token` included
    first_pending: jax.Array  # [1] bool, `last_token` has not been reported to the host
    finite: jax.Array  # [1] bool, the logits behind `last_token` were finite
    first_logprobs: TokenLogprobs  # of `last_token` where it is pending
    draft_length: jax.Array  # [1] int32, tokens that the drafter has read into its pages
    history: jax.Array  # [1, C] int32, all tokens up to `last_token`; C = 0 where no program reads it
    prompt_seen: jax.Array  # [1, V] bool, tokens that occur in the prompt
    output_counts: jax.Array  # [1, V] int32, occurrences among the emitted tokens
    row: RowParams


@flax.struct.dataclass
class PrefillBatch:
    """Tiles of prompts for one prefill call: a tile is a page's worth of consecutive tokens of one prompt.

    Tiles of one prompt and of several go into a call in any mixture, because keys and values of all of them are written
    before any attends. A tile that pads the call writes to the scratch page.
    """

    tokens: jax.Array  # [X, P] int32
    next_tokens: jax.Array  # [X, P] int32, the prompt's token after each, for its log-probabilities
    table: jax.Array  # [X, M] int32, pages of the tile's prompt
    start: jax.Array  # [X] int32, position of the tile's first token
    tail: jax.Array  # [X] int32, place in the tile of the prompt's last token; 0 where it is not in this tile
    wants_logprobs: jax.Array  # [] bool, whether any prompt's log-probabilities are wanted


@flax.struct.dataclass
class PrefillOutput:
    """What a prefill call computes besides pages."""

    tail_hidden: jax.Array  # [Y, E] hidden state at each tile's `tail`, padded to the largest call
    prompt_logprobs: TokenLogprobs  # [X, P]; about `next_tokens`; zeros unless asked for


@flax.struct.dataclass
class DecodeState:
    """What a decode mesh knows of its rows between ticks; their pages are in `Pools`. DONATED to every operation."""

    active: jax.Array  # [B] bool, rows that still generate
    length: jax.Array  # [B] int32, tokens in the target's pages
    prev_token: jax.Array  # [B] int32, the token at position length - 1
    last_token: jax.Array  # [B] int32, emitted but not yet in a page
    finish: jax.Array  # [B] int32, FinishCode
    first_pending: jax.Array  # [B] bool, the first token waits for the next StepOutput
    first_logprobs: TokenLogprobs  # leading dimension B
    draft_length: jax.Array  # [B] int32, tokens that the drafter has read into its pages
    history: jax.Array  # [B, C] int32, token at each position up to `length`; C = 0 where no program reads it
    context: RowContext  # of B rows


@flax.struct.dataclass
class Draft:
    """Tokens proposed for verification.

    A decision about position k may depend on `logits` up to k and on tokens before k, never on `tokens[:, k]` itself:
    dropping a token because of what it is would bias the output.
    """

    tokens: jax.Array  # [B, K] int32
    logits: jax.Array  # [B, K, V] float32, adjusted; each token was drawn from `sampling.probabilities` of them
    length: jax.Array  # [B] int32 in [0, K], positions that count


@flax.struct.dataclass
class StepPlan:
    """How a tick drafts, as its program takes it. Arrays, so that a change of plan needs no other program."""

    depth: jax.Array  # [B] int32, most tokens that each row drafts a round; what exceeds the program's depth is cut
    rule: jax.Array  # [] int32, `specustream.depth.StopRule`
    threshold: jax.Array  # [] float32, of the rule
    wants_divergence: jax.Array  # [] bool, whether `StepOutput.divergence` is measured
    acceptance: jax.Array  # [K] float32, probability of each acceptance; read by the synthetic verifier alone


@flax.struct.dataclass
class Verdict:
    """Outcome of a verification."""

    num_accepted: jax.Array  # [B] int32 in [0, K]
    next_token: jax.Array  # [B] int32, the correction or the bonus


@flax.struct.dataclass
class StepOutput:
    """What one tick emitted. On the device it lies packed in two int32 arrays; log-probabilities come on demand."""

    tokens: jax.Array  # [B, N] int32, EMPTY_TOKEN where none; N = 1 + R * T, column 0 is a pending first token
    accepted: jax.Array  # [B, R] int32, accepted draft tokens a round
    drafted: jax.Array  # [B, R] int32, proposed draft tokens a round; EMPTY_TOKEN where the row did not run
    divergence: jax.Array  # [B, R] float32, mean KL(p || q) over the drafted positions, nats; 0 unless it is wanted
    finish: jax.Array  # [B] int32, FinishCode after the tick
    logprobs: TokenLogprobs | None  # leading dimensions [B, N]; None on the host where nobody asked for them


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
      priority: lower is served first, as in vLLM; equal priorities are served fairly.
      tenant: whom the work is counted for when tenants are served fairly: a user, an input file.
      timeout_s: seconds from arrival after which it ends as timed out, wherever it is; None for never.
    """

    request_id: str
    params: SamplingParams
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    priority: int = 0
    tenant: str = ""
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. `n` completions of a prompt are `n` requests.

    Attributes:
      request_id: unique among the requests of an engine.
      prompt_token_ids: at least one token.
      params: how to sample.
      seed: of the request's own random stream, already derived.
      stop_ids: token ids that end it: `params.stop_token_ids`, and end-of-sequence unless it is ignored.
      priority: lower is served first.
      tenant: whom the work is counted for.
      timeout_s: seconds from arrival after which it ends as timed out; None for never.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    priority: int = 0
    tenant: str = ""
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request as a stream pair takes it: from its beginning, or from where a preemption left it.

    Attributes:
      request: what is asked for.
      output: tokens emitted before the preemption; empty at the beginning.
    """

    request: Request
    output: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens whose keys and values decoding needs: all but the latest emitted one."""
        return (*self.request.prompt_token_ids, *self.output[:-1])


class Deferred(NamedTuple):
    """Why something cannot be done now. It may be later."""

    reason: str


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
    """Times and counts of one request. Clock readings are seconds of one monotonic clock, in the order listed.

    What happens on a device is stamped when the loop first sees it done, at most one tick later. A request that was
    preempted keeps the stamps of its first prefill and hand-off.

    Attributes:
      arrival_s: when the scheduler took it.
      scheduled_s: when its first prefill call was dispatched.
      prefilled_s: when the last prefill call of its prompt was done.
      handed_off_s: when its pages started for the decode mesh: at once, unless there was no room for them there.
      transferred_s: when its pages had arrived on the decode mesh.
      first_token_s: when the host held its first token.
      finished_s: when the host held its last token.
      itls_s: gaps between the moments at which the host received tokens of it, seconds; several tokens come at once.
      lane: the stream pair that served it.
      cached_tokens: prompt tokens whose keys and values came from the prefix cache.
      num_preemptions: how often it lost its decode slot to another.
      drafted_per_step: proposed draft tokens of each verification step.
      accepted_per_step: accepted ones of each step.
      transfer_pages: pages of the target's cache that went from prefill to decode mesh.
      transfer_bytes: bytes that went with them, the draft's pages and the request's state included.
    """

    arrival_s: float
    scheduled_s: float
    prefilled_s: float
    handed_off_s: float
    transferred_s: float
    first_token_s: float
    finished_s: float
    itls_s: tuple[float, ...]
    lane: int
    cached_tokens: int
    num_preemptions: int
    drafted_per_step: tuple[int, ...]
    accepted_per_step: tuple[int, ...]
    transfer_pages: int
    transfer_bytes: int

    @property
    def queue_s(self) -> float:
        """Seconds from arrival to the first prefill call."""
        return self.scheduled_s - self.arrival_s

    @property
    def prefill_s(self) -> float:
        """Seconds from the first prefill call to the end of prefill."""
        return self.prefilled_s - self.scheduled_s

    @property
    def page_wait_s(self) -> float:
        """Seconds from the end of prefill to the start for the decode mesh, waiting for pages or slots there."""
        return self.handed_off_s - self.prefilled_s

    @property
    def transfer_s(self) -> float:
        """Seconds from the start for the decode mesh to the arrival there."""
        return self.transferred_s - self.handed_off_s

    @property
    def decode_s(self) -> float:
        """Seconds from the arrival on the decode mesh to the last token, waiting for a slot included."""
        return self.finished_s - self.transferred_s


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
class LanePace:
    """How fast a stream pair has been of late. Exponential averages over its last ten or so events, 0 before the first.

    Attributes:
      prefill_s_per_token: seconds of the prefill mesh a prompt token, padding included.
      transfer_s_per_byte: seconds of a hand-off a byte; 0 where nothing moves.
      transfer_bytes_per_token: bytes that a hand-off moves for each prompt token, pages being whole.
      tick_s: seconds of a tick.
      tokens_per_tick: tokens that a row emits in a tick, without its first one, which prefill has computed.
      accepted_per_step: accepted draft tokens of a verification step, those that drafted nothing included.
      drafted_per_step: drafted ones: the depth.
      decode_s: seconds that a request holds a decode slot.
      ttft_s: time to first token of the requests that were served here, seconds from arrival.
      tpot_s: time per output token after the first, seconds.
      idle_s: seconds since a tick was read here, which is the age of `tick_s` to `drafted_per_step`; never negative.
    """

    prefill_s_per_token: float = 0.0
    transfer_s_per_byte: float = 0.0
    transfer_bytes_per_token: float = 0.0
    tick_s: float = 0.0
    tokens_per_tick: float = 0.0
    accepted_per_step: float = 0.0
    drafted_per_step: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    idle_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """A snapshot of one stream pair, taken when a request is routed: counts are of this moment.

    Attributes:
      lane: index of the stream pair.
      is_up: it can work; false from a fault of its machine until that is over.
      num_slots: decode slots in all.
      free_slots: of them, those that nobody holds.
      num_pages: pages of the decode mesh that can be owned.
      free_pages: of them, those that nobody owns; the prefix cache of a colocated lane owns its own.
      waiting: requests whose prompt no prefill call has taken wholly.
      in_transit: requests between admission and a decode slot, the waiting ones included.
      running: requests in decode slots.
      queued_prefill_tokens: prompt tokens, in whole tiles, that no prefill call has taken or whose call has not ended.
      queued_local_tokens: the same of prompts that are computed where they are decoded.
      transfer_backlog_bytes: bytes of the hand-offs under way.
      local_tokens: longest prompt that it can compute where it decodes, though it has a prefill mesh; 0 for none.
      page_tokens: positions of a page.
      pace: what it has measured of late.
    """

    lane: int
    is_up: bool = True
    num_slots: int
    free_slots: int
    num_pages: int
    free_pages: int
    waiting: int = 0
    in_transit: int = 0
    running: int = 0
    queued_prefill_tokens: int = 0
    queued_local_tokens: int = 0
    transfer_backlog_bytes: int = 0
    local_tokens: int = 0
    page_tokens: int = 64
    pace: LanePace = LanePace()
