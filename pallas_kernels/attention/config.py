"""Block sizes of the kernels, and who decides them: what is passed, else what was measured, else a rule, else an error.

What was measured lies in `tuned/<device>.json`, written by `pallas_kernels.tune` with the times beside each choice. No
table is kept as Python.
"""

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import backend

TUNED = pathlib.Path(__file__).parent.parent / "tuned"
MAX_DECODE_TOKENS = 16  # query tokens a row that the decode kernel takes; more go to the prefill kernel
MAX_DECODE_ROWS = 128  # query heads of a group times tokens, likewise: its sums stay in registers
PROMPT_TOKENS = 4096  # stands for prompts of any length, which share their block sizes
_HEAD_DIMS = (16, 32, 64, 128, 256)
_TILE_BYTES = 16384  # of keys in a loop step by the rule: with values and three steps in flight, 96 KiB


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """How a kernel cuts its work.

    Attributes:
      block_rows: query rows (heads of a group times tokens) of a program, at most; a power of two.
      block_keys: keys of a loop step; a power of two, whatever the page size.
      num_warps: of a program.
      num_stages: loop steps in flight.
      programs_per_core: decode: programs that run at once on a core.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    programs_per_core: int = 2

    def __post_init__(self) -> None:
        """Refuse what no kernel can run.

        Raises:
          ValueError: a field out of range; the message names it.
        """
        for name in ("block_rows", "block_keys"):
            value = getattr(self, name)
            if value < backend.MIN_DOT or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two and at least {backend.MIN_DOT}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps={self.num_warps} must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1 or self.programs_per_core < 1:
            raise ValueError(f"{self.num_stages=} and {self.programs_per_core=} must be at least 1")


class Case(NamedTuple):
    """What attention is asked to do, as far as block sizes depend on it.

    Batch and context are not among it: what a row gets must not depend on who else is there.

    Attributes:
      tokens: query tokens a row.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: size of a head.
      dtype: of the pages.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of the matrix that one key/value head is multiplied with, rounded up to a block."""
        rows = backend.power_of_two(self.group) * backend.power_of_two(self.tokens)
        return max(backend.MIN_DOT, rows)

    @property
    def decodes(self) -> bool:
        """Whether the decode kernel takes it, which divides keys among programs."""
        return self.tokens <= MAX_DECODE_TOKENS and self.rows <= MAX_DECODE_ROWS

    @property
    def shared(self) -> "Case":
        """The case whose block sizes it shares: that of the next power of two of tokens, and all prompts one."""
        return self._replace(tokens=backend.power_of_two(self.tokens) if self.decodes else PROMPT_TOKENS)


def check(case: Case, gpu: backend.Gpu | None) -> None:
    """Refuse what the kernels do not do, or not on this GPU.

    Raises:
      NotImplementedError: another implementation has to; the message says why.
    """
    if case.head_dim not in _HEAD_DIMS:
        raise NotImplementedError(f"head size {case.head_dim} is none of {_HEAD_DIMS}")
    if case.dtype not in ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn"):
        raise NotImplementedError(f"pages of {case.dtype}")
    capability = None if gpu is None else gpu.capability
    if case.dtype == "float8_e4m3fn" and capability is not None and capability < backend.FLOAT8_CAPABILITY:
        raise NotImplementedError(f"pages of {case.dtype} on a GPU of compute capability {capability}")


def choose(case: Case, explicit: BlockConfig | None, gpu: backend.Gpu | None) -> BlockConfig:
    """Choose block sizes: the explicit ones, else the tuned ones of this device, else those of a rule.

    Raises:
      NotImplementedError: the kernels do not do this.
    """
    check(case, gpu)
    if explicit is not None:
        return explicit
    tuned = {} if gpu is None else _tuned(gpu.kind)
    return tuned.get(case.shared) or heuristic(case)


def heuristic(case: Case) -> BlockConfig:
    """Guess block sizes from bytes and registers.

    A loop step reads some 16 KiB of keys. Sums of 128 rows of 128 numbers fill the registers of four warps, so larger
    tiles get eight. Float32 is multiplied without tensor cores, from registers: small tiles, or they spill.
    """
    size = 2 if case.dtype in ("int8", "float8_e4m3fn") else jnp.dtype(case.dtype).itemsize  # bytes become queries'
    exact = size == 4
    if exact:
        rows = min(case.rows, 32, max(backend.MIN_DOT, 4096 // case.head_dim))
        rows = case.rows if case.decodes else rows
        return BlockConfig(
            block_rows=rows,
            block_keys=32 if case.head_dim <= 32 else 16,
            num_warps=8 if rows * case.head_dim > 4096 else 4,
            num_stages=2,
        )
    keys = min(128, max(backend.MIN_DOT, _TILE_BYTES // (case.head_dim * size)))
    if case.decodes:
        return BlockConfig(
            block_rows=case.rows,
            block_keys=min(keys, 64),  # for any number of rows: sums are made in the same order
            num_warps=8 if case.rows > 32 else 4,
            num_stages=3,
        )
    rows = min(64 if case.head_dim > 128 else 128, case.rows)
    return BlockConfig(
        block_rows=rows,
        block_keys=32 if case.head_dim > 128 else 64,
        num_warps=8 if rows >= 128 or rows * case.head_dim >= 128 * 128 else 4,
        num_stages=2,
    )


@functools.cache
def _tuned(kind: str) -> dict[Case, BlockConfig]:
    """Read what was measured on this kind of device; nothing where nobody has measured."""
    path = TUNED / backend.file_name(kind)
    if not kind or not path.is_file():
        return {}
    entries = json.loads(path.read_text())["entries"]
    return {Case(**entry["case"]): BlockConfig(**entry["config"]) for entry in entries}
