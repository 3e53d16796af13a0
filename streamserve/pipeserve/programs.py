"""Compilation: every program that a stream pair may run, for declared shapes, ahead of time.

A compiled program refuses other shapes and shardings with an error. So nothing can compile after warm-up by accident.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from streamserve import sampling
from streamserve.config import PipeServeConfig
from streamserve.kv import cache
from streamserve.mesh import PairMeshes, replicated
from streamserve.pipeserve import decode
from streamserve.pipeserve.packing import Packed, pack, unpack
from streamserve.pipeserve.prefill import make_draft_prefill, make_first, make_prefill
from streamserve.pipeserve.sizes import LaneSizes
from streamserve.pipeserve.transfer import shardings, split_pages, transfer
from streamserve.sampling_params import SamplingParams
from streamserve.specustream.drafters import Drafter
from streamserve.specustream.step import make_step
from streamserve.specustream.verify import Verifier
from streamserve.types import (
    DecodeState,
    ForwardFns,
    KVShape,
    Pools,
    PrefillBatch,
    PrefillOutput,
    Prefix,
    Request,
    RowParams,
    StepOutput,
    StepPlan,
)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring, once per compilation


class CompilationError(AssertionError):
    """Something was compiled after warm-up."""


class CompilationCounter:
    """Counts the compilations of the process while it is switched on."""

    def __init__(self, *, forbid: bool = False) -> None:
        """Start switched off; `forbid` makes each compilation an error where it happens."""
        self.count = 0
        self.on = False
        self._forbid = forbid
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if self.on and event == _COMPILE_EVENT:
            self.count += 1
            if self._forbid:
                raise CompilationError(f"a program was compiled after warm-up, in {duration_secs:.3f} s")


class PairModels(NamedTuple):
    """Models as a stream pair sees them: pure functions, shapes, and parameters on both meshes."""

    target: ForwardFns
    kv_shape: KVShape
    vocab_size: int
    drafter: Drafter
    verifier: Verifier
    prefill_params: tuple[Any, Any]  # of target and drafter, on the prefill mesh
    decode_params: tuple[Any, Any]  # of target and drafter, on the decode mesh
    synthetic: bool = False  # what is accepted is drawn from the plan


class Programs:
    """The compiled programs of one stream pair, and the ways of arrays to, between and from its meshes.

    Attributes:
      prefill: by tiles: `(target_params, draft_params, pools, batch) -> (pools, PrefillOutput)`.
      local_prefill, local_first: as `prefill` and `first`, on the decode mesh of a disaggregated pair; empty unless
        prompts may be computed there.
      draft_prefill: by tiles, on the decode mesh: `(draft_params, pools, batch) -> pools`; empty unless the draft's
        pages are computed there anew.
      first: `(target_params, tail_hidden, packed inputs) -> packed Prefix`; the inputs are `(tile, length, prev_token,
        prompt_seen, row)`.
      take: by pages, on the prefill mesh: `(pools, page_n) -> pages`.
      put: by pages, on the decode mesh: `(pools, pages, page_n) -> pools`.
      keep, restore: as `take` and `put`, from the decode mesh and back; empty unless preemption keeps pages.
      insert: `(state, packed Prefix, slot) -> state`.
      release: `(state, slot) -> state`.
      step: by slots and depth: `(target_params, draft_params, pools, state, table, plan) -> (pools, state, packed,
        packed log-probabilities)`.
      step_shapes: by slots and depth, what `step` packs.
      remember: how the drafter learns from answered requests, on the host; None where it does not.
      draft_memory: what it starts with, as numpy arrays.
      history_tokens: room for a row's tokens in the decode state; 0 where nobody drafts.
    """

    def __init__(self, meshes: PairMeshes, models: PairModels, config: PipeServeConfig, sizes: LaneSizes):
        """Declare the programs; `compilations` compiles them.

        Args:
          meshes: of the pair.
          models: what it runs.
          config: what travels and what a request may ask for.
          sizes: declared shapes.
        """
        self.sizes, self.config = sizes, config
        self.colocated = meshes.colocated
        self.recomputes_draft = config.draft_kv == "recompute" and not self.colocated and bool(max(sizes.tiers))
        self.prefill: dict[int, Callable[..., tuple[Pools, PrefillOutput]]] = {}
        self.local_prefill: dict[int, Callable[..., tuple[Pools, PrefillOutput]]] = {}
        self.draft_prefill: dict[int, Callable[..., Pools]] = {}
        self.take: dict[int, Callable[..., Any]] = {}
        self.put: dict[int, Callable[..., Pools]] = {}
        self.keep: dict[int, Callable[..., Any]] = {}
        self.restore: dict[int, Callable[..., Pools]] = {}
        self.step: dict[tuple[int, int], Callable[..., tuple[Pools, DecodeState, jax.Array, jax.Array]]] = {}
        self.step_shapes: dict[tuple[int, int], StepOutput] = {}
        self._meshes, self._models = meshes, models
        drafter = models.drafter
        self.remember, self.draft_memory = drafter.remember, drafter.params
        # A drafter looks tokens up, or falls behind in ticks that draft nothing and has to read them later.
        self.history_tokens = sizes.columns * sizes.page_size if max(sizes.tiers) else 0
        self._allocators: dict[str, Callable[[], Any]] = {}
        self._row = row_shape(max_stop_ids=config.max_stop_ids, max_logit_bias=config.max_logit_bias)

    @property
    def vocab_size(self) -> int:
        """Tokens that the models know."""
        return self._models.vocab_size

    @property
    def prefill_params(self) -> tuple[Any, Any]:
        """Parameters of target and drafter on the prefill mesh."""
        return self._models.prefill_params

    @property
    def decode_params(self) -> tuple[Any, Any]:
        """Parameters of target and drafter on the decode mesh."""
        return self._models.decode_params

    # --- ways of arrays

    def pack(self, tree: Any) -> Packed:
        """Lay out host arrays as the programs take them."""
        return pack(tree)

    def to_prefill(self, tree: Any) -> Any:
        """Copy host arrays to the prefill mesh."""
        return jax.device_put(tree, replicated(self._meshes.prefill))

    def to_decode(self, tree: Any) -> Any:
        """Copy host arrays to the decode mesh."""
        return jax.device_put(tree, replicated(self._meshes.decode))

    def transfer(self, tree: Any) -> tuple[Any, int]:
        """Start the copy of pages or a prefix to the decode mesh; gives it and the bytes that change devices."""
        return transfer(tree, self._meshes.decode)

    def to_host(self, tree: Any) -> Any:
        """Bring arrays that are ready, and whose copy has been started, to the host's memory."""
        return jax.device_get(tree)

    def is_ready(self, tree: Any) -> bool:
        """Whether all arrays of a tree are computed, without waiting for them."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(tree))

    def start_read(self, tree: Any) -> None:
        """Start the copy of arrays to the host; `read` waits for it."""
        with jax.transfer_guard_device_to_host("allow"):  # it counts as implicit, though it could not be more explicit
            jax.tree.map(lambda leaf: leaf.copy_to_host_async(), tree)

    def read(self, tree: Any) -> Any:
        """Wait for arrays and bring them to the host."""
        return jax.device_get(tree)

    # --- allocation

    def allocate_prefill(self) -> Pools:
        """Make the empty pools of the prefill mesh."""
        drafts = not self.recomputes_draft
        return self._allocate("prefill", self._pools(self.sizes.prefill_pages, drafts=drafts), self._meshes.prefill)

    def allocate_decode(self) -> Pools:
        """Make the empty pools of the decode mesh; those of the prefill mesh are among them where it is the same."""
        return self._allocate("decode", self._decode_pools, self._meshes.decode)

    def allocate_state(self) -> DecodeState:
        """Make a decode state of free slots."""
        return self._allocate("state", self._empty_state(), self._meshes.decode)

    def num_pages(self, *, decode_side: bool) -> int:
        """Pages of a mesh's pools, the scratch page included."""
        sizes = self.sizes
        if self.colocated:
            return sizes.prefill_pages + sizes.decode_pages - 1
        return sizes.decode_pages if decode_side else sizes.prefill_pages

    def _allocate(self, name: str, make: Callable[[], Any], mesh: Mesh) -> Any:
        """Run an allocator, which is compiled once: a lane that is reset in the middle of serving allocates again."""
        if name not in self._allocators:
            where = shardings(jax.eval_shape(make), mesh)
            self._allocators[name] = jax.jit(make, out_shardings=where).lower().compile()
        return self._allocators[name]()

    def _pools(self, num_pages: int, *, drafts: bool = True) -> Callable[[], Pools]:
        models, page_size = self._models, self.sizes.page_size

        def make() -> Pools:
            draft = models.drafter.pool(num_pages, page_size) if drafts else ()
            return Pools(target=cache.zeros(models.kv_shape, num_pages, page_size), draft=draft)

        return make

    def _empty_state(self) -> Callable[[], DecodeState]:
        prefix = self.prefix_shape()
        return lambda: decode.empty_state(prefix, self.sizes.slots)

    def _decode_pools(self) -> Pools:
        return self._pools(self.num_pages(decode_side=True))()

    # --- compilation

    def compilations(self) -> list[tuple[str, Callable[[], None]]]:
        """List every program by name, with a function that compiles it; they may run in any order and in threads."""
        prefill, decode_mesh, sizes = self._meshes.prefill, self._meshes.decode, self.sizes
        drafts = not self.recomputes_draft
        home = self._decode_pools if self.colocated else self._pools(sizes.prefill_pages, drafts=drafts)
        home_pools = on_mesh(jax.eval_shape(home), prefill)
        pools = on_mesh(jax.eval_shape(self._decode_pools), decode_mesh)
        state = on_mesh(jax.eval_shape(self._empty_state()), decode_mesh)
        jobs: list[tuple[str, Callable[[], None]]] = []
        for batch in reversed(sizes.batches):
            for tier in sizes.tiers:
                job = functools.partial(self._compile_step, batch, tier, pools, state)
                jobs.append((f"decode of {batch} slots at depth {tier}", job))
        for tiles in reversed(sizes.tiles):
            job = functools.partial(self._compile_prefill, tiles, home_pools, self.prefill, local=False)
            jobs.append((f"prefill of {tiles * sizes.page_size} tokens", job))
            if self.recomputes_draft:
                job = functools.partial(self._compile_draft_prefill, tiles, pools)
                jobs.append((f"prefill of {tiles * sizes.page_size} tokens by the draft", job))
        jobs.append(("first token", self._compile_first))
        for tiles in sizes.local_tiles:
            job = functools.partial(self._compile_prefill, tiles, pools, self.local_prefill, local=True)
            jobs.append((f"prefill of {tiles * sizes.page_size} tokens on the decode mesh", job))
        if sizes.local_tiles:
            jobs.append(("first token on the decode mesh", functools.partial(self._compile_first, local=True)))
        if not self.colocated:
            for count in sizes.moves:
                jobs.append(
                    (f"hand-off of {count} pages", functools.partial(self._compile_move, count, home_pools, pools))
                )
        if self.config.preemption == "keep":
            for count in sizes.moves:
                jobs.append((f"rescue of {count} pages", functools.partial(self._compile_keep, count, pools)))
        jobs.append(("insertion and release", functools.partial(self._compile_state, state)))
        return jobs

    def _compile_step(self, batch: int, tier: int, pools: Any, state: Any) -> None:
        models, mesh, config = self._models, self._meshes.decode, self.config
        step = make_step(
            models.target,
            models.drafter,
            models.verifier,
            depth=tier,
            rounds=config.rounds_per_tick,
            max_logprobs=config.max_logprobs,
            synthetic=models.synthetic,
        )

        def tick(
            target_params: Any, draft_params: Any, pools: Pools, state: DecodeState, table_BM: jax.Array, plan: StepPlan
        ) -> tuple[Pools, DecodeState, jax.Array, jax.Array]:
            part = decode.narrow(state, batch)
            pools, part, output = step(target_params, draft_params, pools, part, table_BM, plan)
            return pools, decode.widen(state, part), *decode.pack(output)

        table = on_mesh(jax.ShapeDtypeStruct((batch, self.sizes.columns), jnp.int32), mesh)
        narrow = jax.eval_shape(lambda whole: decode.narrow(whole, batch), state)
        plan = on_mesh(self._plan_shape(batch), mesh)
        self.step_shapes[batch, tier] = jax.eval_shape(step, *models.decode_params, pools, narrow, table, plan)[2]
        where = (shardings(pools, mesh), shardings(state, mesh), replicated(mesh), replicated(mesh))
        jitted = jax.jit(tick, donate_argnums=(2, 3), out_shardings=where)
        self.step[batch, tier] = jitted.lower(*models.decode_params, pools, state, table, plan).compile()

    def _compile_prefill(self, tiles: int, pools: Any, into: dict[int, Any], *, local: bool) -> None:
        models, mesh = self._models, self._meshes.decode if local else self._meshes.prefill
        params = models.decode_params if local else models.prefill_params
        drafter = None if self.recomputes_draft else models.drafter
        largest = self.sizes.tiles[-1]
        prefill = make_prefill(models.target, drafter, largest=largest, max_logprobs=self.config.max_logprobs)
        jitted = jax.jit(prefill, donate_argnums=2, out_shardings=(shardings(pools, mesh), replicated(mesh)))
        batch = on_mesh(self._batch_shape(tiles), mesh)
        into[tiles] = jitted.lower(*params, pools, batch).compile()

    def _compile_draft_prefill(self, tiles: int, pools: Any) -> None:
        mesh, prefill = self._meshes.decode, make_draft_prefill(self._models.drafter)
        jitted = jax.jit(prefill, donate_argnums=1, out_shardings=shardings(pools, mesh))
        batch = on_mesh(self._batch_shape(tiles), mesh)
        self.draft_prefill[tiles] = jitted.lower(self._models.decode_params[1], pools, batch).compile()

    def _compile_first(self, *, local: bool = False) -> None:
        mesh = self._meshes.decode if local else self._meshes.prefill
        params = self._models.decode_params if local else self._models.prefill_params
        hidden, inputs = self._first_inputs()
        sample = self._first_fn()

        def first(target_params: Any, hidden: jax.Array, packed: Packed) -> Packed:
            return pack(sample(target_params, hidden, *unpack(packed, inputs)))

        arguments = on_mesh((hidden, jax.eval_shape(pack, inputs)), mesh)
        jitted = jax.jit(first, out_shardings=replicated(mesh))
        compiled = jitted.lower(params[0], *arguments).compile()
        if local:
            self.local_first = compiled
        else:
            self.first = compiled

    def _compile_move(self, count: int, home_pools: Any, pools: Any) -> None:
        """Compile both ends of a hand-off."""
        prefill = self._meshes.prefill
        page_n = jax.ShapeDtypeStruct((count,), jnp.int32)
        pages = jax.eval_shape(cache.take_pages, home_pools, page_n)
        take, where = cache.take_pages, shardings(pages, prefill)
        if prefill.size != self._meshes.decode.size:
            take = lambda pools, page_n: split_pages(  # noqa: E731
                cache.take_pages(pools, page_n), self._meshes.decode.size
            )
            where = replicated(prefill)
        self.take[count] = jax.jit(take, out_shardings=where).lower(home_pools, on_mesh(page_n, prefill)).compile()
        self.put[count] = self._compile_put(pages, page_n, pools)

    def _compile_put(self, pages: Any, page_n: Any, pools: Any) -> Callable[..., Pools]:
        mesh, recomputes = self._meshes.decode, self.recomputes_draft

        def put(pools: Pools, pages: Pools, page_n: jax.Array) -> Pools:
            if recomputes and pages.draft == ():
                return dataclasses.replace(pools, target=cache.put_pages(pools.target, pages.target, page_n))
            return cache.put_pages(pools, pages, page_n)

        jitted = jax.jit(put, donate_argnums=0, out_shardings=shardings(pools, mesh))
        return jitted.lower(pools, on_mesh(pages, mesh), on_mesh(page_n, mesh)).compile()

    def _compile_keep(self, count: int, pools: Any) -> None:
        """Compile both ends of a rescue: pages leave the decode mesh, and come back."""
        mesh = self._meshes.decode
        page_n = jax.ShapeDtypeStruct((count,), jnp.int32)
        pages = jax.eval_shape(cache.take_pages, pools, page_n)
        jitted = jax.jit(cache.take_pages, out_shardings=shardings(pages, mesh))
        self.keep[count] = jitted.lower(pools, on_mesh(page_n, mesh)).compile()
        self.restore[count] = self._compile_put(pages, page_n, pools)

    def _compile_state(self, state: Any) -> None:
        mesh = self._meshes.decode
        slot = on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh)
        shapes = self.prefix_shape()
        where = shardings(state, mesh)

        def insert(state: DecodeState, packed: Packed, slot: jax.Array) -> DecodeState:
            return decode.insert(state, unpack(packed, shapes), slot)

        jitted = jax.jit(insert, donate_argnums=0, out_shardings=where)
        self.insert = jitted.lower(state, on_mesh(jax.eval_shape(pack, shapes), mesh), slot).compile()
        release = jax.jit(decode.release, donate_argnums=0, out_shardings=where)
        self.release = release.lower(state, slot).compile()

    # --- shapes

    def _batch_shape(self, tiles: int) -> PrefillBatch:
        shape: Callable[..., Any] = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)  # noqa: E731
        flag: Any = jax.ShapeDtypeStruct((), jnp.bool_)
        page_size = self.sizes.page_size
        return PrefillBatch(
            tokens=shape(tiles, page_size),
            next_tokens=shape(tiles, page_size),
            table=shape(tiles, self.sizes.columns),
            start=shape(tiles),
            tail=shape(tiles),
            wants_logprobs=flag,
        )

    def _plan_shape(self, batch: int) -> StepPlan:
        shape: Callable[..., Any] = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
        return StepPlan(
            depth=shape((batch,), jnp.int32),
            rule=shape((), jnp.int32),
            threshold=shape((), jnp.float32),
            wants_divergence=shape((), jnp.bool_),
            acceptance=shape((max(self.sizes.tiers),), jnp.float32),
        )

    def _first_fn(self) -> Callable[..., Prefix]:
        return make_first(self._models.target, max_logprobs=self.config.max_logprobs)

    def _first_inputs(self) -> tuple[Any, tuple[Any, ...]]:
        """Shapes of what the first token is sampled from: hidden states, and what is packed."""
        prefill = make_prefill(
            self._models.target, None, largest=self.sizes.tiles[-1], max_logprobs=self.config.max_logprobs
        )
        pools = jax.eval_shape(self._pools(self.sizes.prefill_pages, drafts=False))
        batch = self._batch_shape(self.sizes.tiles[0])
        hidden = jax.eval_shape(prefill, *self._models.prefill_params, pools, batch)[1].tail_hidden
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        history = jax.ShapeDtypeStruct((1, self.history_tokens), jnp.int32)
        seen = jax.ShapeDtypeStruct((1, self.vocab_size), jnp.bool_)
        return hidden, (number, number, number, history, seen, self._row)

    def prefix_shape(self) -> Prefix:
        """Shapes of what travels with pages."""
        hidden, inputs = self._first_inputs()
        return jax.eval_shape(self._first_fn(), self._models.prefill_params[0], hidden, *inputs)


def on_mesh(shapes: Any, mesh: Mesh) -> Any:
    """Attach to shapes where their arrays lie on a mesh, leaf by leaf."""

    def attach(shape: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(attach, shapes, shardings(shapes, mesh))


def row_shape(*, max_stop_ids: int, max_logit_bias: int) -> RowParams:
    """Shapes of one row of sampling parameters: those of any request's."""
    request = Request(request_id="", prompt_token_ids=(0,), params=SamplingParams(), seed=0, stop_ids=())
    row = sampling.make_row(request, max_stop_ids=max_stop_ids, max_logit_bias=max_logit_bias)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), row)
