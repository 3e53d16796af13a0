"""Compilation: every program that a stream pair may run, for declared shapes, ahead of time.

A compiled program refuses other shapes and shardings with an error. So nothing can compile after warm-up by accident.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from streamserve.config import PipeServeConfig
from streamserve.mesh import PairMeshes, replicated
from streamserve.pipeserve import decode
from streamserve.pipeserve.prefill import make_prefill
from streamserve.pipeserve.transfer import shardings
from streamserve.specustream.drafters import Drafter
from streamserve.specustream.step import make_step
from streamserve.specustream.verify import VerifyFn
from streamserve.types import DecodeState, ForwardFns, KVShape, Prefix, PrefillOutput, RowParams, StepOutput

_CAPACITY_MULTIPLE = 64  # tokens; keeps the rows of the cache aligned


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
        """Declare the programs; `compile_all` compiles them.

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
        self.insert: dict[int, Callable[..., DecodeState]] = {}
        self.step: dict[int, Callable[..., tuple[DecodeState, jax.Array]]] = {}
        self.step_shapes: dict[int, StepOutput] = {}
        self.release: Callable[..., DecodeState] | None = None
        self._meshes, self._models, self._config = meshes, models, config
        longest = max(max_model_len + max(tiers) + 1, self.buckets[-1])
        self._capacity = -(-longest // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE

    @property
    def count(self) -> int:
        """How many programs there are."""
        return 2 * len(self.buckets) + len(self.tiers) + 1

    def allocate(self) -> DecodeState:
        """Make an empty decode state on its mesh, each shard where it belongs."""
        shape = self._prefill_shape(self.buckets[0]).prefix

        def make() -> DecodeState:
            slots = self._config.max_num_seqs
            return decode.empty_state(
                self._models.kv_shape, self._models.drafter, shape, slots=slots, capacity=self._capacity
            )

        return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), self._meshes.decode))()

    def compile_all(self, state: DecodeState) -> Iterator[str]:
        """Compile every program, yielding the name of each when it is done.

        Args:
          state: the decode state that the programs will work on; only its shapes and shardings are used.
        """
        for size in self.buckets:
            self.prefill[size] = self._compile_prefill(size)
            yield f"prefill {size}"
            prefix = self._prefill_shape(size).prefix
            arriving = placed(prefix, shardings(prefix, self._meshes.decode))
            self.insert[size] = self._compile_update(self._insert, state, arriving)
            yield f"insert {size}"
        for tier in self.tiers:
            self.step[tier] = self._compile_step(tier, state)
            yield f"decode at depth {tier}"
        self.release = self._compile_update(decode.release, state)
        yield "release"

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
        """Shapes of a prompt, its length, its sampling parameters and whether its logprobs are wanted."""
        row = row_shape(max_stop_ids=self._config.max_stop_ids, max_logit_bias=self._config.max_logit_bias)
        scalars = (jax.ShapeDtypeStruct((1,), jnp.int32), row, jax.ShapeDtypeStruct((), jnp.bool_))
        inputs = (jax.ShapeDtypeStruct((1, size), jnp.int32), *scalars)
        where = replicated(self._meshes.prefill)
        return placed(inputs, jax.tree.map(lambda _: where, inputs))

    def _prefill_shape(self, size: int) -> PrefillOutput:
        return jax.eval_shape(self._prefill_fn(), *self._models.prefill_params, *self._prefill_inputs(size))

    def _compile_prefill(self, size: int) -> Callable[..., PrefillOutput]:
        where = shardings(self._prefill_shape(size), self._meshes.prefill)
        jitted = jax.jit(self._prefill_fn(), out_shardings=where)
        return jitted.lower(*self._models.prefill_params, *self._prefill_inputs(size)).compile()

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
    """Shapes of one row of sampling parameters, as `sampling.make_row` fills them."""
    real = jax.ShapeDtypeStruct((1,), np.float32)
    whole = jax.ShapeDtypeStruct((1,), np.int32)
    return RowParams(
        key=jax.ShapeDtypeStruct((1, 2), np.uint32),
        temperature=real,
        top_p=real,
        top_k=whole,
        min_p=real,
        presence_penalty=real,
        frequency_penalty=real,
        repetition_penalty=real,
        bias_ids=jax.ShapeDtypeStruct((1, max_logit_bias), np.int32),
        bias=jax.ShapeDtypeStruct((1, max_logit_bias), np.float32),
        stop_ids=jax.ShapeDtypeStruct((1, max_stop_ids), np.int32),
        min_tokens=whole,
        max_tokens=whole,
        wants_logprobs=jax.ShapeDtypeStruct((1,), np.bool_),
    )
