"""A stream pair: one prefill mesh, one decode mesh, and the decode state between ticks.

It owns which slot belongs to whom (through the ledger) and nothing else of a request: it does not order, route or
detokenize. No method waits for a device but `read` and `wait`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from streamserve import sampling
from streamserve.config import PipeServeConfig
from streamserve.kv.pages import Owner, PageLedger, Stage
from streamserve.mesh import PairMeshes, replicated
from streamserve.pipeserve import decode
from streamserve.pipeserve.programs import PairModels, Programs
from streamserve.pipeserve.transfer import transfer
from streamserve.types import Prefix, Request, StepOutput, TokenLogprobs


class InTransit(NamedTuple):
    """A request between prefill and a decode slot."""

    request: Request
    bucket: int  # padded prompt tokens
    prefix: Prefix  # on the decode mesh, or on its way there
    prompt_logprobs: TokenLogprobs  # on the prefill mesh
    transfer_bytes: int


class PendingStep(NamedTuple):
    """A tick that was dispatched and not yet read."""

    tier: int
    packed: jax.Array  # [B, W] int32


class StreamPair:
    """One lane of PipeServe."""

    def __init__(
        self,
        index: int,
        meshes: PairMeshes,
        models: PairModels,
        config: PipeServeConfig,
        *,
        max_model_len: int,
        tiers: tuple[int, ...],
    ):
        """Declare the programs and allocate the decode state.

        Args:
          index: of this lane.
          meshes: its two meshes.
          models: what it runs.
          config: sizes.
          max_model_len: most tokens of prompt and output together.
          tiers: draft depths that a plan may ask for, each a program.
        """
        self.index = index
        self.ledger = PageLedger(config.max_num_seqs)
        self.programs = Programs(meshes, models, config, max_model_len=max_model_len, tiers=tiers)
        self._meshes, self._models, self._config = meshes, models, config
        self._state = self.programs.allocate()

    @property
    def num_slots(self) -> int:
        """Decode slots."""
        return self.ledger.num_pages

    @property
    def free_slots(self) -> int:
        """Decode slots that nobody owns."""
        return self.ledger.num_free

    def compilations(self) -> list[tuple[str, Callable[[], None]]]:
        """List every program by name, with a function that compiles it. All must have run before a request comes."""
        return self.programs.compilations(self._state)

    def prefill(self, request: Request) -> InTransit:
        """Dispatch the prefill of a request and the transfer of its prefix.

        Raises:
          ValueError: the prompt fits no bucket, or the sampling parameters do not fit the programs.
        """
        tokens = request.prompt_token_ids
        bucket = next((size for size in self.programs.buckets if size >= len(tokens)), None)
        if bucket is None:
            raise ValueError(f"a prompt of {len(tokens)} tokens fits no bucket of {self.programs.buckets}")
        padded_1S = np.zeros((1, bucket), np.int32)
        padded_1S[0, : len(tokens)] = tokens
        config = self._config
        row = sampling.make_row(request, max_stop_ids=config.max_stop_ids, max_logit_bias=config.max_logit_bias)
        wants = np.bool_(request.params.prompt_logprobs is not None)
        length, tail = np.array([len(tokens)], np.int32), np.array([tokens[-1]], np.int32)
        inputs = jax.device_put((padded_1S, length, wants, tail, row), replicated(self._meshes.prefill))
        padded, length, wants, tail, row = inputs
        assert self.programs.first is not None, "nothing has been compiled"
        output = self.programs.prefill[bucket](*self._models.prefill_params, padded, length, wants)
        first, logprobs = self.programs.first(output.tail_logits, output.prompt_seen, row)
        prefix = Prefix(
            target=output.target,
            draft=output.draft,
            length=length,
            prompt_tail=tail,
            first_token=first,
            first_logprobs=logprobs,
            prompt_seen=output.prompt_seen,
            row=row,
        )
        prefix, moved_bytes = transfer(prefix, self._meshes.decode)
        return InTransit(request, bucket, prefix, output.prompt_logprobs, moved_bytes)

    def has_arrived(self, item: InTransit) -> bool:
        """Whether a prefix is on the decode mesh, without waiting for it."""
        # One leaf of each program of the prefill mesh; all leaves of a program become ready together.
        leaves: list[Any] = [item.prefix.target.layers[-1].v, item.prefix.first_token]
        return all(leaf.is_ready() for leaf in leaves)

    def wait(self, item: InTransit) -> None:
        """Wait until a prefix is on the decode mesh."""
        jax.block_until_ready(item.prefix)

    def insert(self, item: InTransit) -> int:
        """Put a prefix into a free slot.

        Returns:
          The slot.

        Raises:
          ValueError: no slot is free.
        """
        slot = self.ledger.acquire(Owner(Stage.DECODE, item.request.request_id))
        self._state = self.programs.insert[item.bucket](self._state, item.prefix, self._slot(slot))
        return slot

    def step(self, tier: int) -> PendingStep:
        """Dispatch one tick at draft depth `tier`, and the copy of its output to the host."""
        self._state, packed = self.programs.step[tier](*self._models.decode_params, self._state)
        with jax.transfer_guard_device_to_host("allow"):  # the one copy of a tick starts here; `read` waits for it
            packed.copy_to_host_async()
        return PendingStep(tier, packed)

    def read(self, pending: PendingStep) -> StepOutput:
        """Wait for a tick's output: the one device-to-host copy of a tick.

        Returns:
          The output as numpy arrays.
        """
        return decode.unpack(jax.device_get(pending.packed), self.programs.step_shapes[pending.tier])

    def read_prompt_logprobs(self, item: InTransit) -> TokenLogprobs:
        """Copy a prompt's log-probabilities to the host; only for requests that asked for them."""
        return jax.device_get(item.prompt_logprobs)

    def release(self, slot: int, request_id: str) -> None:
        """Free a slot, whether its row has finished or not."""
        self.ledger.release(slot, Owner(Stage.DECODE, request_id))
        assert self.programs.release is not None, "nothing has been compiled"
        self._state = self.programs.release(self._state, self._slot(slot))

    def reset(self) -> None:
        """Forget all requests and begin with an empty state, whatever became of the old one."""
        self.ledger = PageLedger(self._config.max_num_seqs)
        self._state = self.programs.allocate()

    def _slot(self, slot: int) -> jax.Array:
        return jax.device_put(np.int32(slot), replicated(self._meshes.decode))
