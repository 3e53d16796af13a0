"""Compilation: every program that a stream pair may run, for declared shapes, ahead of time.

A compiled program refuses other shapes and shardings with an error. So nothing can compile after warm-up by accident.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from streamserve import sampling
from streamserve.config import PipeServeConfig
from streamserve.mesh import PairMeshes, replicated
from streamserve.pipeserve import decode
from streamserve.pipeserve.prefill import make_prefill, sample_first
from streamserve.pipeserve.transfer import shardings
from streamserve.sampling_params import SamplingParams
from streamserve.specustream.drafters import Drafter
from streamserve.specustream.step import make_step
from streamserve.specustream.verify import VerifyFn
from streamserve.types import (
    DecodeState,
    ForwardFns,
    KVShape,
    PrefillOutput,
    Prefix,
    Request,
    RowParams,
    StepOutput,
    TokenLogprobs,
)

_CAPACITY_MULTIPLE = 64  # tokens; keeps the rows of the cache aligned


_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring, once per compilation


class CompilationCounter:
    """Counts the compilations of the process while it is switched on."""

    def __init__(self) -> None:
        self.count = 0
        self.on = False
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self.count += self.on and event == _COMPILE_EVENT


class PairModels(NamedTuple):
    """Models as a stream pair sees them: pure functions, shapes, and parameters on both meshes."""

    target: ForwardFns
    kv_shape: KVShape
    vocab_size: int
    drafter: Drafter
    verify: VerifyFn
    prefill_params: tuple[Any, Any]  # of target and drafter, on the prefill mesh
    decode_params: tuple[Any, Any]  # of target and drafter, on the decode mesh


def prefill_buckets(declared: tuple[int, ...], max_model_len: int) -> tuple[int, ...]:
    """Prompt lengths to compile for: the declared ones, cut off at the longest prompt that can be served."""
    longest = max_model_len - 1  # one token at least is generated
    return (*(size for size in declared if size < longest), min((s for s in declared if s >= longest), default=longest))


class Programs:
    """The compiled programs of one stream pair."""

    def __init__(
        self,
        meshes: PairMeshes,
        models: PairModels,
        config: PipeServeConfig,
        *,
        max_model_len: int,
        tiers: tuple[int, ...],
    ):
        """Declare the programs; `compilations` compiles them.

        Args:
          meshes: of the pair.
          models: what it runs.
          config: sizes.
          max_model_len: most tokens of prompt and output together.
          tiers: draft depths, one decode program each.
        """
        self.buckets = prefill_buckets(config.prefill_buckets, max_model_len)
        self.tiers = tiers
        self.prefill: dict[int, Callable[..., PrefillOutput]] = {}
        self.first: Callable[..., tuple[jax.Array, TokenLogprobs]] | None = None
        self.insert: dict[int, Callable[..., DecodeState]] = {}
        self.step: dict[int, Callable[..., tuple[DecodeState, jax.Array]]] = {}
        self.step_shapes: dict[int, StepOutput] = {}
        self.release: Callable[..., DecodeState] | None = None
        self._meshes, self._models, self._config = meshes, models, config
        longest = max(max_model_len + max(tiers) + 1, self.buckets[-1])
        self._capacity = -(-longest // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
        self._allocate = self._compile_allocate()

    def allocate(self) -> DecodeState:
        """Make an empty decode state on its mesh, each shard where it belongs."""
        return self._allocate()

    def _compile_allocate(self) -> Callable[[], DecodeState]:
        shape = self._prefix_shape(self.buckets[0])

        def make() -> DecodeState:
            slots = self._config.max_num_seqs
            return decode.empty_state(
                self._models.kv_shape, self._models.drafter, shape, slots=slots, capacity=self._capacity
            )

        where = shardings(jax.eval_shape(make), self._meshes.decode)
        return jax.jit(make, out_shardings=where).lower().compile()

    def compilations(self, state: DecodeState) -> list[tuple[str, Callable[[], None]]]:
        """List every program by name, with a function that compiles it; they may run in any order and in threads.

        Args:
          state: the decode state that the programs will work on; only its shapes and shardings are used.
        """
        shapes = placed(state, jax.tree.map(lambda leaf: leaf.sharding, state))

        def of_bucket(size: int) -> None:
            self.prefill[size] = self._compile_prefill(size)
            prefix = self._prefix_shape(size)
            arriving = placed(prefix, shardings(prefix, self._meshes.decode))
            self.insert[size] = self._compile_update(self._insert, shapes, arriving)

        def of_tier(tier: int) -> None:
            self.step[tier] = self._compile_step(tier, shapes)

        def of_small_ones() -> None:
            self.release = self._compile_update(decode.release, shapes)
            self.first = self._compile_first()

        return [
            *((f"decode at depth {tier}", functools.partial(of_tier, tier)) for tier in self.tiers),
            *((f"prefill of {size} tokens", functools.partial(of_bucket, size)) for size in reversed(self.buckets)),
            ("first token and release", of_small_ones),
        ]

    def _insert(self, state: DecodeState, prefix: Prefix, slot: jax.Array) -> DecodeState:
        return decode.insert(self._models.drafter, state, prefix, slot)

    def _prefill_fn(self) -> Callable[..., PrefillOutput]:
        models = self._models
        return make_prefill(
            models.target,
            models.kv_shape,
            models.drafter,
            vocab_size=models.vocab_size,
            max_logprobs=self._config.max_logprobs,
        )

    def _prefill_inputs(self, size: int) -> tuple[Any, ...]:
        """Shapes of a prompt, its length, and whether its log-probabilities are wanted."""
        shape = jax.ShapeDtypeStruct
        inputs = (shape((1, size), jnp.int32), shape((1,), jnp.int32), shape((), jnp.bool_))
        return self._on_prefill(inputs)

    def _row(self) -> RowParams:
        config = self._config
        return self._on_prefill(row_shape(max_stop_ids=config.max_stop_ids, max_logit_bias=config.max_logit_bias))

    def _on_prefill(self, shapes: Any) -> Any:
        where = replicated(self._meshes.prefill)
        return placed(shapes, jax.tree.map(lambda _: where, shapes))

    def _prefill_shape(self, size: int) -> PrefillOutput:
        shape = jax.eval_shape(self._prefill_fn(), *self._models.prefill_params, *self._prefill_inputs(size))
        return placed(shape, shardings(shape, self._meshes.prefill))

    def _prefix_shape(self, size: int) -> Prefix:
        output, row = self._prefill_shape(size), self._row()
        token: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
        first, logprobs = jax.eval_shape(self._first_fn(), output.tail_logits, output.prompt_seen, row)
        return Prefix(
            target=output.target,
            draft=output.draft,
            length=token,
            prompt_tail=token,
            first_token=first,
            first_logprobs=logprobs,
            prompt_seen=output.prompt_seen,
            row=row,
        )

    def _compile_prefill(self, size: int) -> Callable[..., PrefillOutput]:
        where = shardings(self._prefill_shape(size), self._meshes.prefill)
        jitted = jax.jit(self._prefill_fn(), out_shardings=where)
        return jitted.lower(*self._models.prefill_params, *self._prefill_inputs(size)).compile()

    def _first_fn(self) -> Callable[..., tuple[jax.Array, TokenLogprobs]]:
        return functools.partial(sample_first, max_logprobs=self._config.max_logprobs)

    def _compile_first(self) -> Callable[..., tuple[jax.Array, TokenLogprobs]]:
        output = self._prefill_shape(self.buckets[0])
        jitted = jax.jit(self._first_fn(), out_shardings=replicated(self._meshes.prefill))
        return jitted.lower(output.tail_logits, output.prompt_seen, self._row()).compile()

    def _compile_update(self, update: Callable[..., DecodeState], state: DecodeState, *arguments: Any) -> Callable:
        """Compile `(state, *arguments, slot) -> state` with the state donated."""
        mesh = self._meshes.decode
        slot = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        jitted = jax.jit(update, donate_argnums=0, out_shardings=shardings(state, mesh))
        return jitted.lower(state, *arguments, slot).compile()

    def _compile_step(self, tier: int, state: DecodeState) -> Callable[..., tuple[DecodeState, jax.Array]]:
        models, mesh = self._models, self._meshes.decode
        step = make_step(
            models.target,
            models.drafter,
            models.verify,
            depth=tier,
            rounds=self._config.rounds_per_tick,
            max_logprobs=self._config.max_logprobs,
        )

        def tick(target_params: Any, draft_params: Any, state: DecodeState) -> tuple[DecodeState, jax.Array]:
            state, output = step(target_params, draft_params, state)
            return state, decode.pack(output)

        self.step_shapes[tier] = jax.eval_shape(step, *models.decode_params, state)[1]
        jitted = jax.jit(tick, donate_argnums=2, out_shardings=(shardings(state, mesh), replicated(mesh)))
        return jitted.lower(*models.decode_params, state).compile()


def placed(shapes: Any, where: Any) -> Any:
    """Attach shardings to shapes, leaf by leaf."""

    def attach(shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(attach, shapes, where)


def row_shape(*, max_stop_ids: int, max_logit_bias: int) -> RowParams:
    """Shapes of one row of sampling parameters: those of any request's."""
    request = Request(request_id="", prompt_token_ids=(0,), params=SamplingParams(), seed=0, stop_ids=())
    row = sampling.make_row(request, max_stop_ids=max_stop_ids, max_logit_bias=max_logit_bias)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), row)
