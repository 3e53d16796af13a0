"""Recorded workloads: arrivals and lengths as production systems saw them, and prompts made up for them.

A trace has no text. Its prompts are random tokens, a function of the seed and the trace alone; where the trace says
that prompts begin alike, they do. Two formats are read:

  azure     CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens (Azure public data set).
  mooncake  JSON lines of {"timestamp": ms, "input_length", "output_length", "hash_ids": [int, ...]}. A hash id is a
            block of 512 prompt tokens; equal ids are equal blocks.

Rates and lengths are those of a cluster: both are shrunk by stated factors, `TraceScale`.
"""

import dataclasses
import datetime
import enum
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

BLOCK_TOKENS = 512  # prompt tokens that a hash id of Mooncake stands for
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_SHARED, _UNIQUE = 0, 1  # what tokens are drawn for, so that a hash id and a place in the trace never share a stream


class TraceFormat(enum.Enum):
    """Form of a trace file."""

    AZURE = "azure"
    MOONCAKE = "mooncake"
    AUTO = "auto"  # by suffix, else by the first line


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """A recorded request.

    Attributes:
      at_s: when it arrived, seconds from any moment.
      prompt_tokens: length of its prompt.
      output_tokens: length of its answer.
      hash_ids: what its prompt begins with, block by block; empty where the trace does not say.
      line_number: in the file, from 1; 0 where it is of none.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    line_number: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceScale:
    """By what a trace is shrunk or stretched.

    Attributes:
      time: recorded times are multiplied by it.
      length: recorded token counts are multiplied by it; the result is rounded, and at least 1.
    """

    time: float = 1.0
    length: float = 1.0

    def __post_init__(self) -> None:
        """Check both.

        Raises:
          ValueError: a factor is not positive and finite.
        """
        for name in ("time", "length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}_scale must be positive and finite, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTrace:
    """A trace as an engine can serve it.

    Attributes:
      rows: with scaled and clipped lengths of at least 1.
      block_tokens: tokens that a hash id stands for.
      clipped_prompts: rows whose prompt had to be cut.
      clipped_outputs: rows whose answer had to be cut.
    """

    rows: tuple[TraceRow, ...]
    block_tokens: int
    clipped_prompts: int
    clipped_outputs: int


def read_trace(lines: Iterable[bytes], path: pathlib.Path, form: TraceFormat = TraceFormat.AUTO) -> Iterator[TraceRow]:
    """Read a trace as it is pulled; blank lines are skipped.

    Args:
      lines: of the file.
      path: its name, for the format and for messages.
      form: of the file.

    Yields:
      Rows in order of time.

    Raises:
      ValueError: a line is malformed or earlier than the one before it; the message has the file and the line.
    """
    parse: Callable[[str], TraceRow] | None = None
    before_s = -math.inf
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            if parse is None:
                kind = _detect(path, text) if form is TraceFormat.AUTO else form
                parse = _mooncake if kind is TraceFormat.MOONCAKE else functools.partial(_azure, _columns(text))
                if kind is TraceFormat.AZURE:
                    continue
            row = dataclasses.replace(parse(text), line_number=number)
            if row.at_s < before_s:
                raise ValueError("it is earlier than the line before")
        except (ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        before_s = row.at_s
        yield row


def fit(rows: Sequence[TraceRow], length_scale: float, *, max_model_len: int) -> ScaledTrace:
    """Scale lengths, and cut what does not fit.

    Args:
      rows: of a trace.
      length_scale: as in `TraceScale`.
      max_model_len: most tokens of prompt and answer together, at least 2. The answer is kept and the prompt cut, since
        the answers of traces are the shorter part by far.
    """
    scaled, clipped_prompts, clipped_outputs = [], 0, 0
    for row in rows:
        prompt, output = _scaled(row.prompt_tokens, length_scale), _scaled(row.output_tokens, length_scale)
        kept_output = min(output, max_model_len - 1)
        kept_prompt = min(prompt, max_model_len - kept_output)
        clipped_prompts += kept_prompt < prompt
        clipped_outputs += kept_output < output
        scaled.append(dataclasses.replace(row, prompt_tokens=kept_prompt, output_tokens=kept_output))
    return ScaledTrace(
        rows=tuple(scaled),
        block_tokens=_scaled(BLOCK_TOKENS, length_scale),
        clipped_prompts=clipped_prompts,
        clipped_outputs=clipped_outputs,
    )


def prompt_of(row: TraceRow, block_tokens: int, vocabulary: np.ndarray, seed: int) -> tuple[int, ...]:
    """Make up the prompt of a scaled row: the blocks of its hash ids, cut to its length, then tokens of its own.

    Args:
      row: of `ScaledTrace`.
      block_tokens: likewise.
      vocabulary: token ids to draw from, [any] integers.
      seed: of all prompts of a run.
    """
    needed = min(len(row.hash_ids), -(-row.prompt_tokens // block_tokens))
    blocks = [_draw(vocabulary, block_tokens, seed, _SHARED, hash_id) for hash_id in row.hash_ids[:needed]]
    own = max(0, row.prompt_tokens - needed * block_tokens)
    tokens = np.concatenate([*blocks, _draw(vocabulary, own, seed, _UNIQUE, row.line_number)])
    return tuple(tokens[: row.prompt_tokens].tolist())


def _draw(vocabulary: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Draw tokens that depend on the key alone."""
    return vocabulary[np.random.default_rng(key).integers(0, len(vocabulary), count)]


def _scaled(tokens: int, length_scale: float) -> int:
    return max(1, round(tokens * length_scale))


def _detect(path: pathlib.Path, first: str) -> TraceFormat:
    """Tell the format of a file from its name, else from its first line."""
    by_suffix = {".csv": TraceFormat.AZURE, ".jsonl": TraceFormat.MOONCAKE}.get(path.suffix)
    if by_suffix is not None:
        return by_suffix
    if first.startswith("{"):
        return TraceFormat.MOONCAKE
    if set(AZURE_COLUMNS) <= set(_cells(first)):
        return TraceFormat.AZURE
    raise ValueError("neither the columns of an Azure trace nor a JSON object of a Mooncake trace")


def _columns(line: str) -> tuple[str, ...]:
    """Read the first line of an Azure trace."""
    columns = tuple(_cells(line))
    missing = [name for name in AZURE_COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"the first line must name the columns {', '.join(AZURE_COLUMNS)}; {missing[0]} is missing")
    return columns


def _azure(columns: Sequence[str], line: str) -> TraceRow:
    """Parse a line of an Azure trace."""
    cells = _cells(line)
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells for {len(columns)} columns")
    at, prompt, output = (cells[columns.index(name)] for name in AZURE_COLUMNS)
    time = datetime.datetime.fromisoformat(at)  # cuts the seventh digit, tenths of a microsecond
    return TraceRow(
        at_s=(time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp(),
        prompt_tokens=_count("ContextTokens", int(prompt)),
        output_tokens=_count("GeneratedTokens", int(output)),
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


def _mooncake(line: str) -> TraceRow:
    """Parse a line of a Mooncake trace."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    at_ms, hash_ids = value.get("timestamp"), value.get("hash_ids", [])
    if isinstance(at_ms, bool) or not isinstance(at_ms, (int, float)) or not math.isfinite(at_ms):
        raise ValueError(f"timestamp must be a number of milliseconds, got {at_ms!r}")
    if not isinstance(hash_ids, list):
        raise ValueError(f"hash_ids must be a list, got {hash_ids!r}")
    prompt_tokens = _count("input_length", value.get("input_length"))
    if len(hash_ids) > -(-prompt_tokens // BLOCK_TOKENS):
        raise ValueError(f"{len(hash_ids)} hash_ids for {prompt_tokens} tokens in blocks of {BLOCK_TOKENS}")
    return TraceRow(
        at_s=at_ms / 1000,
        prompt_tokens=prompt_tokens,
        output_tokens=_count("output_length", value.get("output_length")),
        hash_ids=tuple(_count("hash_ids", item) for item in hash_ids),
    )


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return value
