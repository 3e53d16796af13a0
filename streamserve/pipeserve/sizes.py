"""Every shape that a lane's programs are compiled for, from the config alone. Nothing else declares a shape."""

import dataclasses

from streamserve.config import PipeServeConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneSizes:
    """Declared shapes of one lane.

    Attributes:
      page_size: P, positions of a page, and tokens of a prefill tile.
      columns: M, pages of the longest request.
      slots: B, decode slots.
      batches: numbers of slots that decode programs run over, ascending; the last is `slots`.
      tiers: draft depths.
      rounds: R, draft-verify rounds a tick.
      tiles: tiles of a prefill call, ascending.
      local_tiles: tiles of a prefill call on the decode mesh of a disaggregated pair, ascending; () for no such calls.
      moves: pages that one hand-off program carries, ascending from 1.
      prefill_pages: pages of the prefill mesh's pools, the scratch page included.
      decode_pages: the same of the decode mesh's. A colocated lane has one pool, of both numbers together.
    """

    page_size: int
    columns: int
    slots: int
    batches: tuple[int, ...]
    tiers: tuple[int, ...]
    rounds: int
    tiles: tuple[int, ...]
    moves: tuple[int, ...]
    prefill_pages: int
    decode_pages: int
    local_tiles: tuple[int, ...] = ()

    @property
    def local_tokens(self) -> int:
        """Longest prompt that can be computed on the decode mesh of a disaggregated pair."""
        return self.local_tiles[-1] * self.page_size if self.local_tiles else 0

    def pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def groups(self, num_pages: int) -> list[int]:
        """Cut a number of pages into the hand-off programs that carry them, the largest first."""
        groups = []
        while num_pages > 0:
            size = max(move for move in self.moves if move <= num_pages)
            groups.append(size)
            num_pages -= size
        return groups


def lane_sizes(
    config: PipeServeConfig, *, max_model_len: int, tiers: tuple[int, ...], local_tokens: int = 0
) -> LaneSizes:
    """Derive a lane's shapes.

    Args:
      config: sizes that the user declares.
      max_model_len: most tokens of prompt and output together.
      tiers: draft depths.
      local_tokens: longest prompt that may be computed on the decode mesh of a disaggregated pair; 0 for none.

    Raises:
      ValueError: a pool cannot hold one request of full length.
    """
    page_size = config.page_size
    columns = -(-max_model_len // page_size)
    longest = columns * page_size
    pools = {}
    for name, tokens, rows in (
        ("prefill_pool_tokens", config.prefill_pool_tokens, config.max_prefills),
        ("decode_pool_tokens", config.decode_pool_tokens, config.max_num_seqs),
    ):
        pools[name] = (rows * longest if tokens is None else tokens) // page_size
        if pools[name] < columns:
            raise ValueError(
                f"pipeserve.{name}={tokens} holds {pools[name]} pages of {page_size} tokens, but one request may need "
                f"{columns} (max_model_len is {max_model_len})"
            )
    tiles = sorted({min(-(-size // page_size), config.max_prefills * columns) for size in config.prefill_buckets})
    batches = sorted({*(size for size in config.decode_batches if size < config.max_num_seqs), config.max_num_seqs})
    return LaneSizes(
        page_size=page_size,
        columns=columns,
        slots=config.max_num_seqs,
        batches=tuple(batches),
        tiers=tiers,
        rounds=config.rounds_per_tick,
        tiles=tuple(tiles),
        moves=tuple(sorted({1, *(size for size in config.transfer_buckets if size <= columns)})),
        prefill_pages=1 + pools["prefill_pool_tokens"],
        decode_pages=1 + pools["decode_pool_tokens"],
        local_tiles=_local_tiles(tiles, min(-(-min(local_tokens, longest) // page_size), tiles[-1])),
    )


def _local_tiles(tiles: list[int], wanted: int) -> tuple[int, ...]:
    """Choose the calls that a prompt of `wanted` tiles may need: those below, and one that holds it."""
    return tuple(sorted({*(size for size in tiles if size < wanted), *((wanted,) if wanted else ())}))
