"""The arrays that a stream pair's programs take, as shapes, and what allocates those that stay on its meshes.

All from the models and the declared sizes; nothing here is compiled, and no mesh is known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from streamserve import sampling
from streamserve.config import PipeServeConfig
from streamserve.kv import cache
from streamserve.pipeserve import decode
from streamserve.pipeserve.prefill import make_first, make_prefill
from streamserve.pipeserve.sizes import LaneSizes
from streamserve.sampling_params import SamplingParams
from streamserve.specustream.drafters import Drafter
from streamserve.specustream.verify import Verifier
from streamserve.types import (
    DecodeState,
    ForwardFns,
    KVShape,
    Pools,
    PrefillBatch,
    Prefix,
    Request,
    RowParams,
    StepPlan,
)


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


class PairShapes:
    """Shapes of one stream pair's arrays.

    Attributes:
      colocated: prefill and decode share one mesh, and so one pool of pages.
      recomputes_draft: the draft reads prompts on the decode mesh, and has no pages on the other.
      history_tokens: room for a row's tokens in the decode state; 0 where nobody drafts.
    """

    def __init__(self, models: PairModels, config: PipeServeConfig, sizes: LaneSizes, *, colocated: bool):
        self.colocated = colocated
        self.recomputes_draft = config.draft_kv == "recompute" and not colocated and bool(max(sizes.tiers))
        # A drafter looks tokens up, or falls behind in ticks that draft nothing and has to read them later.
        self.history_tokens = sizes.columns * sizes.page_size if max(sizes.tiers) else 0
        self._models, self._config, self._sizes = models, config, sizes
        self._row = row_shape(max_stop_ids=config.max_stop_ids, max_logit_bias=config.max_logit_bias)

    # --- what stays on a mesh, as functions that allocate it

    def num_pages(self, *, decode_side: bool) -> int:
        """Pages of a mesh's pools, the scratch page included."""
        sizes = self._sizes
        if self.colocated:
            return sizes.prefill_pages + sizes.decode_pages - 1
        return sizes.decode_pages if decode_side else sizes.prefill_pages

    def prefill_pools(self) -> Pools:
        """Make the empty pools of the prefill mesh."""
        if self.colocated:
            return self.decode_pools()
        return self._pools(self._sizes.prefill_pages, drafts=not self.recomputes_draft)

    def decode_pools(self) -> Pools:
        """Make the empty pools of the decode mesh; those of the prefill mesh are among them where it is the same."""
        return self._pools(self.num_pages(decode_side=True))

    def _pools(self, num_pages: int, *, drafts: bool = True) -> Pools:
        models, page_size = self._models, self._sizes.page_size
        draft = models.drafter.pool(num_pages, page_size) if drafts else ()
        return Pools(target=cache.zeros(models.kv_shape, num_pages, page_size), draft=draft)

    def empty_state(self) -> Callable[[], DecodeState]:
        """Give what makes a decode state of free slots."""
        prefix = self.prefix()
        return lambda: decode.empty_state(prefix, self._sizes.slots)

    # --- what comes from the host, and what travels

    def batch(self, tiles: int) -> PrefillBatch:
        """Shapes of a prefill call's tiles."""
        shape: Callable[..., Any] = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)  # noqa: E731
        flag: Any = jax.ShapeDtypeStruct((), jnp.bool_)
        page_size = self._sizes.page_size
        return PrefillBatch(
            tokens=shape(tiles, page_size),
            next_tokens=shape(tiles, page_size),
            table=shape(tiles, self._sizes.columns),
            start=shape(tiles),
            tail=shape(tiles),
            wants_logprobs=flag,
        )

    def table(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape of the page table of a tick of `batch` slots."""
        return jax.ShapeDtypeStruct((batch, self._sizes.columns), jnp.int32)

    def plan(self, batch: int) -> StepPlan:
        """Shapes of the plan of a tick of `batch` slots."""
        shape: Callable[..., Any] = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
        return StepPlan(
            depth=shape((batch,), jnp.int32),
            rule=shape((), jnp.int32),
            threshold=shape((), jnp.float32),
            wants_divergence=shape((), jnp.bool_),
            acceptance=shape((max(self._sizes.tiers),), jnp.float32),
        )

    def first_inputs(self) -> tuple[Any, tuple[Any, ...]]:
        """Shapes of what the first token is sampled from: hidden states, and what is packed."""
        models, sizes = self._models, self._sizes
        prefill = make_prefill(models.target, None, largest=sizes.tiles[-1], max_logprobs=self._config.max_logprobs)
        pools = jax.eval_shape(lambda: self._pools(sizes.prefill_pages, drafts=False))
        batch = self.batch(sizes.tiles[0])
        hidden = jax.eval_shape(prefill, *models.prefill_params, pools, batch)[1].tail_hidden
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        history = jax.ShapeDtypeStruct((1, self.history_tokens), jnp.int32)
        seen = jax.ShapeDtypeStruct((1, models.vocab_size), jnp.bool_)
        return hidden, (number, number, number, history, seen, self._row)

    def prefix(self) -> Prefix:
        """Shapes of what travels with pages."""
        hidden, inputs = self.first_inputs()
        sample = make_first(self._models.target, max_logprobs=self._config.max_logprobs)
        return jax.eval_shape(sample, self._models.prefill_params[0], hidden, *inputs)


def row_shape(*, max_stop_ids: int, max_logit_bias: int) -> RowParams:
    """Shapes of one row of sampling parameters: those of any request's."""
    request = Request(request_id="", prompt_token_ids=(0,), params=SamplingParams(), seed=0, stop_ids=())
    row = sampling.make_row(request, max_stop_ids=max_stop_ids, max_logit_bias=max_logit_bias)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), row)
