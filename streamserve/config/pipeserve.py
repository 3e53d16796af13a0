"""PipeServe: sizes of programs and pools."""

import dataclasses
import itertools

from streamserve.config.checks import check_choice, check_range


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipeServeConfig:
    """Sizes of the prefill and decode programs of every stream pair, and what its pages do.

    Attributes:
      max_num_seqs: decode slots a pair.
      decode_batches: numbers of slots, ascending, that decode programs are compiled for besides `max_num_seqs`: a tick
        runs over as few slots as are held. Numbers that are no smaller are left out.
      max_prefills: prompts between admission and a decode slot, a pair; back-pressure on the prefill mesh.
      prefill_buckets: tokens of a prefill call that programs are compiled for, ascending; rounded up to pages. The
        largest is the token budget of a call, which several prompts share and a long one is cut to.
      page_size: positions of a page of the cache, tokens.
      prefill_pool_tokens: size of the prefill mesh's pools, prefix cache included, tokens; None for `max_prefills`
        prompts of full length.
      decode_pool_tokens: size of the decode mesh's pools, tokens; None for `max_num_seqs` requests of full length.
      transfer_buckets: pages that one hand-off program carries, besides 1, ascending; those beyond the longest request
        are left out.
      rounds_per_tick: draft-verify rounds that one dispatch runs on the device.
      enable_prefix_caching: keep whole pages of prompts for those that begin alike.
      draft_kv: "transfer" hands the draft's pages over; "recompute" lets the draft read the prompt on the decode mesh.
        A colocated pair has no need of either.
      preemption: what becomes of a request that loses its pages to others: "recompute" begins it again at prefill,
        "keep" holds its pages in the host's memory until there is room.
      max_logprobs: most `logprobs` and `prompt_logprobs` a request may ask for.
      max_stop_ids: most token ids that may end a request, end-of-sequence ids included.
      max_logit_bias: most tokens that a request's `logit_bias` may name.
    """

    max_num_seqs: int = 8
    decode_batches: tuple[int, ...] = ()
    max_prefills: int = 8
    prefill_buckets: tuple[int, ...] = (64, 256, 1024)
    page_size: int = 64
    prefill_pool_tokens: int | None = None
    decode_pool_tokens: int | None = None
    transfer_buckets: tuple[int, ...] = (4, 16)
    rounds_per_tick: int = 4
    enable_prefix_caching: bool = True
    draft_kv: str = "transfer"
    preemption: str = "recompute"
    max_logprobs: int = 20
    max_stop_ids: int = 8
    max_logit_bias: int = 64

    def __post_init__(self) -> None:
        for name in ("decode_batches", "prefill_buckets", "transfer_buckets"):
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            if (sizes and sizes[0] < 1) or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"pipeserve.{name} must ascend from at least 1, got {sizes}")
        if not self.prefill_buckets:
            raise ValueError("pipeserve.prefill_buckets must name at least one size")
        for name in (
            *("max_num_seqs", "max_prefills", "page_size", "rounds_per_tick", "max_stop_ids", "max_logit_bias"),
            *(name for name in ("prefill_pool_tokens", "decode_pool_tokens") if getattr(self, name) is not None),
        ):
            check_range(f"pipeserve.{name}", getattr(self, name), 1)
        check_range("pipeserve.max_logprobs", self.max_logprobs, 0)
        check_choice("pipeserve.draft_kv", self.draft_kv, ("transfer", "recompute"))
        check_choice("pipeserve.preemption", self.preemption, ("recompute", "keep"))
