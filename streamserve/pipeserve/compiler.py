"""Compilation of each program that a stream pair may run, for declared shapes, ahead of time.

A compiled program refuses other shapes and shardings with an error. So nothing can compile after warm-up by accident.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from streamserve.config import PipeServeConfig
from streamserve.kv import cache
from streamserve.mesh import PairMeshes, replicated
from streamserve.pipeserve import decode
from streamserve.pipeserve.packing import Packed, pack, unpack
from streamserve.pipeserve.prefill import make_draft_prefill, make_first, make_prefill
from streamserve.pipeserve.shapes import PairModels, PairShapes
from streamserve.pipeserve.sizes import LaneSizes
from streamserve.pipeserve.transfer import shardings, split_pages
from streamserve.specustream.step import make_step
from streamserve.types import DecodeState, Pools, PrefillOutput, StepOutput, StepPlan

StepProgram = Callable[..., tuple[Pools, DecodeState, jax.Array, jax.Array]]


class Compiler:
    """Compiles the programs of one stream pair; what each takes and gives is said at `Programs`.

    Its methods keep nothing, so they may be called in any order and in threads.
    """

    def __init__(
        self,
        meshes: PairMeshes,
        models: PairModels,
        config: PipeServeConfig,
        sizes: LaneSizes,
        shapes: PairShapes,
        *,
        xla_options: Mapping[str, Any] | None = None,
    ):
        """Place the pools and the state on the meshes, as shapes.

        Args:
          meshes: of the pair.
          models: what it runs.
          config: what travels and what a request may ask for.
          sizes: declared shapes.
          shapes: of its arrays, which follow from them.
          xla_options: of the compiler, by name; None for its own.
        """
        self._meshes, self._models, self._config, self._sizes, self._shapes = meshes, models, config, sizes, shapes
        self._xla_options = None if xla_options is None else dict(xla_options)
        self._home_pools = on_mesh(jax.eval_shape(shapes.prefill_pools), meshes.prefill)
        self._pools = on_mesh(jax.eval_shape(shapes.decode_pools), meshes.decode)
        self._state = on_mesh(jax.eval_shape(shapes.empty_state()), meshes.decode)

    def step(self, batch: int, tier: int) -> tuple[StepProgram, StepOutput]:
        """Compile a tick of `batch` slots at depth `tier`; gives it and the shapes of what it packs."""
        models, mesh, config, pools, state = self._models, self._meshes.decode, self._config, self._pools, self._state
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

        table = on_mesh(self._shapes.table(batch), mesh)
        narrow = jax.eval_shape(lambda whole: decode.narrow(whole, batch), state)
        plan = on_mesh(self._shapes.plan(batch), mesh)
        output = jax.eval_shape(step, *models.decode_params, pools, narrow, table, plan)[2]
        where = (shardings(pools, mesh), shardings(state, mesh), replicated(mesh), replicated(mesh))
        jitted = jax.jit(tick, donate_argnums=(2, 3), out_shardings=where)
        return self._compile(mesh, jitted, *models.decode_params, pools, state, table, plan), output

    def prefill(self, tiles: int, *, local: bool = False) -> Callable[..., tuple[Pools, PrefillOutput]]:
        """Compile a prefill call of `tiles` tiles; `local` on the decode mesh."""
        models, mesh = self._models, self._meshes.decode if local else self._meshes.prefill
        params = models.decode_params if local else models.prefill_params
        pools = self._pools if local else self._home_pools
        drafter = None if self._shapes.recomputes_draft else models.drafter
        largest = self._sizes.tiles[-1]
        prefill = make_prefill(models.target, drafter, largest=largest, max_logprobs=self._config.max_logprobs)
        jitted = jax.jit(prefill, donate_argnums=2, out_shardings=(shardings(pools, mesh), replicated(mesh)))
        batch = on_mesh(self._shapes.batch(tiles), mesh)
        return self._compile(mesh, jitted, *params, pools, batch)

    def draft_prefill(self, tiles: int) -> Callable[..., Pools]:
        """Compile a call by which the draft reads prompts on the decode mesh."""
        mesh, prefill = self._meshes.decode, make_draft_prefill(self._models.drafter)
        jitted = jax.jit(prefill, donate_argnums=1, out_shardings=shardings(self._pools, mesh))
        batch = on_mesh(self._shapes.batch(tiles), mesh)
        return self._compile(mesh, jitted, self._models.decode_params[1], self._pools, batch)

    def first(self, *, local: bool = False) -> Callable[..., Packed]:
        """Compile the sampling of the first token; `local` on the decode mesh."""
        mesh = self._meshes.decode if local else self._meshes.prefill
        params = self._models.decode_params if local else self._models.prefill_params
        hidden, inputs = self._shapes.first_inputs()
        sample = make_first(self._models.target, max_logprobs=self._config.max_logprobs)

        def first(target_params: Any, hidden: jax.Array, packed: Packed) -> Packed:
            return pack(sample(target_params, hidden, *unpack(packed, inputs)))

        arguments = on_mesh((hidden, jax.eval_shape(pack, inputs)), mesh)
        jitted = jax.jit(first, out_shardings=replicated(mesh))
        return self._compile(mesh, jitted, params[0], *arguments)

    def move(self, count: int) -> tuple[Callable[..., Any], Callable[..., Pools]]:
        """Compile both ends of a hand-off of `count` pages: they leave the prefill mesh, and enter the decode mesh."""
        prefill = self._meshes.prefill
        page_n = jax.ShapeDtypeStruct((count,), jnp.int32)
        pages = jax.eval_shape(cache.take_pages, self._home_pools, page_n)
        take, where = cache.take_pages, shardings(pages, prefill)
        if prefill.size != self._meshes.decode.size:
            take = lambda pools, page_n: split_pages(  # noqa: E731
                cache.take_pages(pools, page_n), self._meshes.decode.size
            )
            where = replicated(prefill)
        jitted = jax.jit(take, out_shardings=where)
        return self._compile(prefill, jitted, self._home_pools, on_mesh(page_n, prefill)), self._put(pages, page_n)

    def rescue(self, count: int) -> tuple[Callable[..., Any], Callable[..., Pools]]:
        """Compile both ends of a rescue of `count` pages: they leave the decode mesh, and come back."""
        mesh = self._meshes.decode
        page_n = jax.ShapeDtypeStruct((count,), jnp.int32)
        pages = jax.eval_shape(cache.take_pages, self._pools, page_n)
        jitted = jax.jit(cache.take_pages, out_shardings=shardings(pages, mesh))
        return self._compile(mesh, jitted, self._pools, on_mesh(page_n, mesh)), self._put(pages, page_n)

    def _put(self, pages: Any, page_n: Any) -> Callable[..., Pools]:
        mesh, recomputes = self._meshes.decode, self._shapes.recomputes_draft

        def put(pools: Pools, pages: Pools, page_n: jax.Array) -> Pools:
            if recomputes and pages.draft == ():
                return dataclasses.replace(pools, target=cache.put_pages(pools.target, pages.target, page_n))
            return cache.put_pages(pools, pages, page_n)

        jitted = jax.jit(put, donate_argnums=0, out_shardings=shardings(self._pools, mesh))
        return self._compile(mesh, jitted, self._pools, on_mesh(pages, mesh), on_mesh(page_n, mesh))

    def slots(self) -> tuple[Callable[..., DecodeState], Callable[..., DecodeState]]:
        """Compile insertion and release."""
        mesh, state = self._meshes.decode, self._state
        slot = on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh)
        shapes = self._shapes.prefix()
        where = shardings(state, mesh)

        def insert(state: DecodeState, packed: Packed, slot: jax.Array) -> DecodeState:
            return decode.insert(state, unpack(packed, shapes), slot)

        jitted = jax.jit(insert, donate_argnums=0, out_shardings=where)
        inserts = self._compile(mesh, jitted, state, on_mesh(jax.eval_shape(pack, shapes), mesh), slot)
        release = jax.jit(decode.release, donate_argnums=0, out_shardings=where)
        return inserts, self._compile(mesh, release, state, slot)

    def _compile(self, mesh: Mesh, jitted: Any, *arguments: Any) -> Any:
        """Compile for a mesh, of which what is traced is told: kernels depend on devices and how they divide heads."""
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jitted.lower(*arguments).compile(compiler_options=self._xla_options)


def on_mesh(shapes: Any, mesh: Mesh) -> Any:
    """Attach to shapes where their arrays lie on a mesh, leaf by leaf."""

    def attach(shape: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(attach, shapes, shardings(shapes, mesh))
