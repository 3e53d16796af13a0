"""The compiled programs of a stream pair, and the ways of arrays to, between and from its meshes.

Which programs there are is decided here; `compiler.py` compiles each of them, and `shapes.py` says for which shapes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from streamserve.config import PipeServeConfig
from streamserve.mesh import PairMeshes, replicated
from streamserve.pipeserve.compiler import Compiler, StepProgram
from streamserve.pipeserve.packing import Packed, pack
from streamserve.pipeserve.shapes import PairModels, PairShapes
from streamserve.pipeserve.sizes import LaneSizes
from streamserve.pipeserve.transfer import shardings, transfer
from streamserve.types import DecodeState, Pools, PrefillOutput, StepOutput


class Programs:
    """What one stream pair runs on its meshes, and how arrays come there and back.

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
      shapes: of what the programs take.
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
        self.shapes = PairShapes(models, config, sizes, colocated=meshes.colocated)
        self.prefill: dict[int, Callable[..., tuple[Pools, PrefillOutput]]] = {}
        self.local_prefill: dict[int, Callable[..., tuple[Pools, PrefillOutput]]] = {}
        self.draft_prefill: dict[int, Callable[..., Pools]] = {}
        self.first: Callable[..., Packed]
        self.local_first: Callable[..., Packed]
        self.take: dict[int, Callable[..., Any]] = {}
        self.put: dict[int, Callable[..., Pools]] = {}
        self.keep: dict[int, Callable[..., Any]] = {}
        self.restore: dict[int, Callable[..., Pools]] = {}
        self.insert: Callable[..., DecodeState]
        self.release: Callable[..., DecodeState]
        self.step: dict[tuple[int, int], StepProgram] = {}
        self.step_shapes: dict[tuple[int, int], StepOutput] = {}
        self.remember, self.draft_memory = models.drafter.remember, models.drafter.params
        self._meshes, self._models = meshes, models
        self._allocators: dict[str, Callable[[], Any]] = {}

    @property
    def colocated(self) -> bool:
        """Whether prefill and decode share one mesh."""
        return self.shapes.colocated

    @property
    def recomputes_draft(self) -> bool:
        """Whether the draft reads prompts anew, on the decode mesh."""
        return self.shapes.recomputes_draft

    @property
    def history_tokens(self) -> int:
        """Room for a row's tokens in the decode state; 0 where nobody drafts."""
        return self.shapes.history_tokens

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
        return self._allocate("prefill", self.shapes.prefill_pools, self._meshes.prefill)

    def allocate_decode(self) -> Pools:
        """Make the empty pools of the decode mesh; those of the prefill mesh are among them where it is the same."""
        return self._allocate("decode", self.shapes.decode_pools, self._meshes.decode)

    def allocate_state(self) -> DecodeState:
        """Make a decode state of free slots."""
        return self._allocate("state", self.shapes.empty_state(), self._meshes.decode)

    def num_pages(self, *, decode_side: bool) -> int:
        """Pages of a mesh's pools, the scratch page included."""
        return self.shapes.num_pages(decode_side=decode_side)

    def _allocate(self, name: str, make: Callable[[], Any], mesh: Mesh) -> Any:
        """Run an allocator, which is compiled once: a lane that is reset in the middle of serving allocates again."""
        if name not in self._allocators:
            where = shardings(jax.eval_shape(make), mesh)
            self._allocators[name] = jax.jit(make, out_shardings=where).lower().compile()
        return self._allocators[name]()

    # --- compilation

    def compilations(self) -> list[tuple[str, Callable[[], None]]]:
        """List every program by name, with a function that compiles it; they may run in any order and in threads."""
        sizes, partial = self.sizes, functools.partial
        compiler = Compiler(self._meshes, self._models, self.config, sizes, self.shapes)
        jobs: list[tuple[str, Callable[[], None]]] = []
        for batch in reversed(sizes.batches):
            for tier in sizes.tiers:
                job = partial(self._compile_step, compiler, batch, tier)
                jobs.append((f"decode of {batch} slots at depth {tier}", job))
        for tiles in reversed(sizes.tiles):
            tokens = f"prefill of {tiles * sizes.page_size} tokens"
            jobs.append((tokens, partial(_enter, self.prefill, tiles, compiler.prefill)))
            if self.recomputes_draft:
                jobs.append(
                    (f"{tokens} by the draft", partial(_enter, self.draft_prefill, tiles, compiler.draft_prefill))
                )
        jobs.append(("first token", partial(self._compile_first, compiler)))
        for tiles in sizes.local_tiles:
            job = partial(_enter, self.local_prefill, tiles, partial(compiler.prefill, local=True))
            jobs.append((f"prefill of {tiles * sizes.page_size} tokens on the decode mesh", job))
        if sizes.local_tiles:
            jobs.append(("first token on the decode mesh", partial(self._compile_local_first, compiler)))
        for count in () if self.colocated else sizes.moves:
            jobs.append((f"hand-off of {count} pages", partial(self._compile_move, compiler, count)))
        for count in sizes.moves if self.config.preemption == "keep" else ():
            jobs.append((f"rescue of {count} pages", partial(self._compile_rescue, compiler, count)))
        jobs.append(("insertion and release", partial(self._compile_slots, compiler)))
        return jobs

    def _compile_step(self, compiler: Compiler, batch: int, tier: int) -> None:
        self.step[batch, tier], self.step_shapes[batch, tier] = compiler.step(batch, tier)

    def _compile_first(self, compiler: Compiler) -> None:
        self.first = compiler.first()

    def _compile_local_first(self, compiler: Compiler) -> None:
        self.local_first = compiler.first(local=True)

    def _compile_move(self, compiler: Compiler, count: int) -> None:
        self.take[count], self.put[count] = compiler.move(count)

    def _compile_rescue(self, compiler: Compiler, count: int) -> None:
        self.keep[count], self.restore[count] = compiler.rescue(count)

    def _compile_slots(self, compiler: Compiler) -> None:
        self.insert, self.release = compiler.slots()


def _enter(programs: dict[int, Any], size: int, compile_: Callable[[int], Any]) -> None:
    programs[size] = compile_(size)
