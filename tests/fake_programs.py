"""Lanes without devices: pools that hold what was written where, and a model that hashes what it reads back.

`FakePrograms` stands in for `pipeserve.Programs`, so that the bookkeeping above it is the real one. A position of a
pool holds a hash of its token and of the position before it, as keys and values depend on all that came before. The
next token is a hash of all positions that the page table leads to: a wrong table, a page that another request has
written, a lost transfer or a wrong length changes the output. The draft's pool must agree with the target's; that is
asserted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from streamserve import sampling
from streamserve.config import PipeServeConfig, SchedulerConfig
from streamserve.flowguard import FlowGuard, routers
from streamserve.kv.pages import SCRATCH_PAGE
from streamserve.pipeserve import StreamPair, lane_sizes
from streamserve.scheduler import StreamScheduler
from streamserve.sequence import RunningRequest
from streamserve.tokenizer import TextStream
from streamserve.types import (
    EMPTY_TOKEN,
    FinishCode,
    Pools,
    PrefillOutput,
    Prefix,
    Request,
    StepOutput,
    TokenLogprobs,
)
from tests.doubles import tiny_specustream

VOCAB = 13
POISON = 0  # a position whose keys are not finite; no token hashes to it
FAKE_SIZES = {
    "max_num_seqs": 4,
    "decode_batches": (1, 2),
    "max_prefills": 3,
    "prefill_buckets": (4, 12),
    "page_size": 4,
    "transfer_buckets": (2, 4),
    "rounds_per_tick": 2,
    "max_logprobs": 2,
}
MAX_MODEL_LEN = 40
PREFILL, DECODE, HOST = "prefill", "decode", "host"
_ALL = 2**64 - 1
_START = 0x9E3779B97F4A7C15  # what position 0 is chained to


# --- the model


def _mix(*values: int) -> int:
    out = _START
    for value in values:
        out = ((out ^ value) * 0xBF58476D1CE4E5B9) & _ALL
        out ^= out >> 29
    return out


def _chain(before: int, token: int) -> int:
    """Keys of a token after those of the position before it; what follows poison is poison."""
    return POISON if before == POISON else _mix(before, token) or 1


def _weight(position: int) -> int:
    return 2 * position + 1


def _digest(values: np.ndarray) -> int:
    """Sum up what attention sees: all positions, each at its place."""
    return int(np.sum(values * (2 * np.arange(len(values), dtype=np.uint64) + np.uint64(1))))


def _predict(digest: int, seed: int) -> int:
    return _mix(digest & _ALL, seed) % VOCAB


def _seed(key_12: np.ndarray) -> int:
    return int(key_12[0, 0]) << 32 | int(key_12[0, 1])


def quiet_output(request: Request) -> tuple[int, ...]:
    """Decode a prompt without any engine: the output that a request must have, whatever happens around it."""
    seed = _seed(sampling.make_row(request, max_stop_ids=8, max_logit_bias=64).key)
    digest, value, output = 0, _START, []
    tokens = list(request.prompt_token_ids)
    for position in range(len(tokens) + request.params.max_tokens):
        if position >= len(tokens):
            output.append(_predict(digest, seed))
            tokens.append(output[-1])
            if output[-1] in request.stop_ids:
                break
        value = _chain(value, tokens[position])
        digest += value * _weight(position)
    return tuple(output)


# --- arrays


class FakeArray:
    """A value on a mesh. It is ready when it has been asked for it `polls` times, and dead once it was donated."""

    def __init__(self, value: Any, place: str, polls: float = 0, *, after: Optional["FakeArray"] = None):
        self.place, self._after = place, after
        self._value, self._polls, self._donated, self._lost = value, polls, False, False

    def is_ready(self) -> bool:
        """Count one more question; nothing is ready before what it is made from."""
        if self._after is not None and not self._after.is_ready():
            return False
        self._polls -= 1
        return self._polls < 0

    def is_deleted(self) -> bool:
        """Whether it was donated, or lost with the program that took it."""
        return self._donated or self._lost

    def delete(self) -> None:
        """Lose it, as a program that fails loses what was donated to it."""
        self._lost = True

    def get(self, place: str) -> Any:
        """Read it where it lies."""
        assert not self._donated, "a program was given an array that another one had taken over"
        if self._lost:
            raise RuntimeError("Array has been deleted")
        assert self.place == place, f"an array in {self.place} was read in {place}"
        return self._value

    def donate(self, place: str) -> Any:
        """Take it over."""
        value = self.get(place)
        self._donated = True
        return value


@dataclasses.dataclass(slots=True, kw_only=True)
class _Row:
    """A decode slot, as `DecodeState` has it."""

    active: bool = False
    first_pending: bool = False
    length: int = 1
    prev: int = 0
    last: int = 0
    emitted: int = 0
    finish: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    max_tokens: int = 0
    draft_length: int = 0  # tokens that the draft has read
    history: list[int] = dataclasses.field(default_factory=list)


class _Round(NamedTuple):
    """What a row did in one round."""

    tokens: list[int]
    accepted: int
    drafted: int


class FakePrograms:
    """Programs of one stream pair; attributes and signatures are those of `pipeserve.Programs`."""

    def __init__(
        self,
        *,
        depth: int = 2,
        tiers: tuple[int, ...] = (),
        colocated: bool = False,
        polls: Callable[[str], float] = lambda what: 0,
        max_model_len: int = MAX_MODEL_LEN,
        local_tokens: int = 0,
        **config: Any,
    ):
        """Build programs that need no compilation.

        Args:
          depth: K, where there is one alone.
          tiers: depths, ascending.
          colocated: one mesh for both.
          polls: how often a "call", "transfer", "prefix", "rescue" or "tick" has to be asked before it is ready.
          max_model_len: most tokens of a request.
          local_tokens: longest prompt that the decode mesh can compute.
          config: of PipeServe, where it differs from `FAKE_SIZES`.
        """
        self.config = PipeServeConfig(**(FAKE_SIZES | config))
        self.sizes = lane_sizes(
            self.config, max_model_len=max_model_len, tiers=tiers or (depth,), local_tokens=local_tokens
        )
        self.colocated = colocated
        self.recomputes_draft = self.config.draft_kv == "recompute" and not colocated
        self.vocab_size = VOCAB
        self.prefill_params, self.decode_params = ("prefill target", "prefill draft"), ("decode target", "decode draft")
        self.remember, self.draft_memory = None, ()
        self.history_tokens = max_model_len if max(self.sizes.tiers) else 0
        self._depth, self._polls = self.sizes.tiers[-1], polls
        self._home = DECODE if colocated else PREFILL
        tiles, moves = self.sizes.tiles, self.sizes.moves
        self.prefill = {size: self._sized_prefill(size, self._home, self.prefill_params) for size in tiles}
        local = self.sizes.local_tiles
        self.local_prefill = {size: self._sized_prefill(size, DECODE, self.decode_params) for size in local}
        self.draft_prefill = dict.fromkeys(tiles, self._draft_prefill) if self.recomputes_draft else {}
        self.take = {} if colocated else {size: self._sized_take(size, self._home) for size in moves}
        self.put = {} if colocated else {size: self._sized_put(size) for size in moves}
        keeps = self.config.preemption == "keep"
        self.keep = {size: self._sized_take(size, DECODE) for size in moves} if keeps else {}
        self.restore = {size: self._sized_put(size) for size in moves} if keeps else {}
        shapes = [(batch, tier) for batch in self.sizes.batches for tier in self.sizes.tiers]
        self.step = {shape: self._sized_step(*shape) for shape in shapes}
        self.step_shapes = {shape: self._step_shape(*shape) for shape in shapes}

    # --- ways of arrays

    def to_prefill(self, tree: Any) -> Any:
        """Copy host arrays to the prefill mesh."""
        return self._placed(tree, self._home)

    def to_decode(self, tree: Any) -> Any:
        """Copy host arrays to the decode mesh."""
        return self._placed(tree, DECODE)

    def transfer(self, tree: FakeArray) -> tuple[FakeArray, int]:
        """Start the copy of pages or a prefix to the decode mesh."""
        value = tree.get(tree.place)
        if isinstance(value, Pools):
            value = jax.tree.map(np.copy, value)
        return FakeArray(value, DECODE, self._polls("transfer"), after=tree), 0 if tree.place == DECODE else 10

    def to_host(self, tree: FakeArray) -> FakeArray:
        """Bring pages that are ready to the host's memory."""
        assert tree.is_ready(), "the host would have to wait for pages"
        return FakeArray(tree.get(DECODE), HOST)

    def is_ready(self, tree: Any) -> bool:
        """Ask all arrays of a tree."""
        answers = [leaf.is_ready() for leaf in jax.tree.leaves(tree)]  # all are asked, so that all come nearer
        return all(answers)

    def start_read(self, tree: Any) -> None:
        """Start the copy of a tick's output to the host."""
        assert all(leaf.place == DECODE for leaf in jax.tree.leaves(tree))

    def read(self, tree: Any) -> Any:
        """Wait for arrays."""
        return jax.tree.map(lambda leaf: leaf.get(leaf.place), tree)

    def pack(self, tree: Any) -> Any:
        """Leave records as they are."""
        return tree

    def _placed(self, tree: Any, place: str) -> Any:
        return FakeArray(tree, place, self._polls("prefix") if isinstance(tree, Prefix) else 0)

    # --- allocation

    def allocate_prefill(self) -> Pools:
        """Make the empty pools of the prefill mesh."""
        return self._pools(self.num_pages(decode_side=False), self._home, drafts=not self.recomputes_draft)

    def allocate_decode(self) -> Pools:
        """Make the empty pools of the decode mesh."""
        return self._pools(self.num_pages(decode_side=True), DECODE, drafts=True)

    def allocate_state(self) -> FakeArray:
        """Make a decode state of free slots."""
        return FakeArray([_Row() for _ in range(self.sizes.slots)], DECODE)

    def num_pages(self, *, decode_side: bool) -> int:
        """Pages of a mesh's pools, the scratch page included."""
        sizes = self.sizes
        if self.colocated:
            return sizes.prefill_pages + sizes.decode_pages - 1
        return sizes.decode_pages if decode_side else sizes.prefill_pages

    def _pools(self, num_pages: int, place: str, *, drafts: bool) -> Pools:
        make = lambda: FakeArray(np.full((num_pages, self.sizes.page_size), 3, np.uint64), place)  # noqa: E731
        return Pools(target=make(), draft=make() if drafts and self._depth else ())

    # --- programs of the prefill mesh

    def _sized_prefill(self, size: int, place: str, params: Any) -> Callable[..., tuple[Pools, PrefillOutput]]:
        def prefill(target: Any, draft: Any, pools: Pools, placed: FakeArray) -> tuple[Pools, PrefillOutput]:
            assert (target, draft) == params
            batch, pools = placed.get(place), _donated(pools, place)
            assert batch.tokens.shape == (size, self.sizes.page_size)
            for pool in [pools.target] if self.recomputes_draft else jax.tree.leaves(pools):
                self._write_tiles(pool, batch)
            ends = batch.start + batch.tail + 1
            seen = [
                self._read(pools.target, table, end)
                for table, end in zip(batch.table, ends, strict=True)
                if table[0] != SCRATCH_PAGE  # padding comes last
            ]
            hidden = [None if POISON in values else _digest(values) for values in seen]
            output = PrefillOutput(
                tail_hidden=FakeArray(hidden, place, self._polls("call")),
                prompt_logprobs=FakeArray(_logprobs(batch.next_tokens, self.config.max_logprobs), place),
            )
            return _placed_pools(pools, place), output

        return prefill

    def _draft_prefill(self, draft_params: Any, pools: Pools, placed: FakeArray) -> Pools:
        assert draft_params == self.decode_params[1]
        pools = _donated(pools, DECODE)
        for pool in jax.tree.leaves(pools.draft):
            self._write_tiles(pool, placed.get(DECODE))
        return _placed_pools(pools, DECODE)

    def first(self, params: Any, hidden: FakeArray, placed: FakeArray) -> FakeArray:
        """Sample the token after a computed prompt."""
        assert params == self.prefill_params[0]
        return self._first(hidden, placed, self._home)

    def local_first(self, params: Any, hidden: FakeArray, placed: FakeArray) -> FakeArray:
        """Sample the token after a prompt that the decode mesh has computed."""
        assert params == self.decode_params[0]
        return self._first(hidden, placed, DECODE)

    def _first(self, hidden: FakeArray, placed: FakeArray, place: str) -> FakeArray:
        tile, length, prev, history, seen, row = placed.get(place)
        digest = hidden.get(place)[int(tile[0])]
        token = 0 if digest is None else _predict(digest, _seed(row.key))
        tokens, history = np.array([token], np.int32), history.copy()
        history[0, length[0] : length[0] + 1] = token
        prefix = Prefix(
            length=length,
            prev_token=prev,
            last_token=tokens,
            emitted=np.ones(1, np.int32),
            first_pending=np.ones(1, bool),
            finite=np.array([digest is not None]),
            first_logprobs=_logprobs(tokens, self.config.max_logprobs),
            draft_length=length,
            history=history,
            prompt_seen=seen,
            output_counts=np.bincount(tokens, minlength=VOCAB)[None],
            row=row,
        )
        return FakeArray(prefix, place, after=hidden)

    def _sized_take(self, size: int, place: str) -> Callable[[Pools, FakeArray], FakeArray]:
        def take(pools: Pools, page_n: FakeArray) -> FakeArray:
            pages = page_n.get(place)
            assert pages.shape == (size,)
            polls = self._polls("rescue") if place == DECODE else 0
            return FakeArray(jax.tree.map(lambda pool: pool.get(place)[pages], pools), place, polls)

        return take

    # --- programs of the decode mesh

    def _sized_put(self, size: int) -> Callable[[Pools, FakeArray, FakeArray], Pools]:
        def put(pools: Pools, arrived: FakeArray, page_n: FakeArray) -> Pools:
            values, pages, into = arrived.get(DECODE), page_n.get(DECODE), _donated(pools, DECODE)
            assert pages.shape == values.target.shape[:1] == (size,)
            into.target[pages] = values.target
            if not isinstance(values.draft, tuple):
                into.draft[pages] = values.draft
            return _placed_pools(into, DECODE)

        return put

    def insert(self, state: FakeArray, prefix: FakeArray, slot: FakeArray) -> FakeArray:
        """Put a request into a free slot."""
        rows, new, index = state.donate(DECODE), prefix.get(DECODE), int(slot.get(DECODE))
        stops, last = tuple(int(stop) for stop in new.row.stop_ids[0]), int(new.last_token[0])
        full = new.row.max_tokens[0] <= new.emitted[0]
        ended = FinishCode.STOP if last in stops else FinishCode.LENGTH if full else FinishCode.RUNNING
        code = ended if new.finite[0] else FinishCode.INVALID
        rows[index] = _Row(
            active=code == FinishCode.RUNNING,
            first_pending=bool(new.first_pending[0] and new.finite[0]),
            length=int(new.length[0]),
            prev=int(new.prev_token[0]),
            last=last,
            emitted=int(new.emitted[0]),
            finish=int(code),
            seed=_seed(new.row.key),
            stop_ids=stops,
            max_tokens=int(new.row.max_tokens[0]),
            draft_length=int(new.draft_length[0]),
            history=new.history[0, : int(new.length[0]) + 1].tolist(),
        )
        return FakeArray(rows, DECODE)

    def release(self, state: FakeArray, slot: FakeArray) -> FakeArray:
        """Stop a row."""
        rows = state.donate(DECODE)
        row = rows[int(slot.get(DECODE))]
        row.active = row.first_pending = False
        return FakeArray(rows, DECODE)

    def _sized_step(self, batch: int, tier: int) -> Callable[..., tuple[Pools, FakeArray, FakeArray, FakeArray]]:
        shape = (batch, 1 + self.sizes.rounds * (tier + 1))

        def step(
            target: Any, draft: Any, pools: Pools, state: FakeArray, placed: FakeArray, plan: FakeArray
        ) -> tuple[Any, ...]:
            assert (target, draft) == self.decode_params
            table, into, rows = placed.get(DECODE), _donated(pools, DECODE), state.donate(DECODE)
            depths = np.minimum(plan.get(DECODE).depth, tier)
            assert depths.shape == (batch,)
            tokens = np.full(shape, EMPTY_TOKEN, np.int32)
            accepted, drafted = (np.full((batch, self.sizes.rounds), EMPTY_TOKEN, np.int32) for _ in range(2))
            for slot, row in enumerate(rows[:batch]):
                if row.first_pending:
                    tokens[slot, 0], row.first_pending = row.last, False
            for index in range(self.sizes.rounds):
                active = [slot for slot, row in enumerate(rows[:batch]) if row.active]
                drafts = any(depths[slot] for slot in active)
                for slot in active:
                    if drafts and not index:
                        self._catch_up(into, rows[slot], table[slot])
                    done = self._round(into, rows[slot], table[slot], int(depths[slot]), drafts=drafts)
                    begin = 1 + index * (tier + 1)
                    tokens[slot, begin : begin + len(done.tokens)] = done.tokens
                    accepted[slot, index], drafted[slot, index] = done.accepted, done.drafted
            finish = np.array([row.finish for row in rows[:batch]], np.int32)[:, None]
            scored = _logprobs(tokens, self.config.max_logprobs)
            flat = [np.ascontiguousarray(leaf).view(np.int32).reshape(batch, -1) for leaf in jax.tree.leaves(scored)]
            quiet = np.zeros((batch, self.sizes.rounds), np.int32)  # the divergence, which nobody measures here
            packed = np.concatenate([tokens, accepted, drafted, quiet, finish], axis=1)
            logprobs = FakeArray(np.concatenate(flat, axis=1), DECODE)
            ticked = FakeArray(packed, DECODE, self._polls("tick"))
            return _placed_pools(into, DECODE), FakeArray(rows, DECODE), ticked, logprobs

        return step

    def _catch_up(self, pools: Pools, row: _Row, table: np.ndarray) -> None:
        """Let the draft read what was emitted while nothing was drafted."""
        for position in range(row.draft_length, row.length - 1):
            assert self.history_tokens, "the draft has missed something, and nobody knows what"
            self._write(pools.draft, table, position, row.history[position])

    def _round(self, pools: Pools, row: _Row, table: np.ndarray, depth: int, *, drafts: bool) -> _Round:
        """Draft, verify and commit; refused drafts stay beyond the new length."""
        length = row.length
        seen = self._read(pools.target, table, length)
        if drafts:
            self._write(pools.draft, table, length - 1, row.prev)
            read = self._read(pools.draft, table, length)
            same = (read == seen).all() or POISON in read or POISON in seen
            assert same, f"the draft has read {read}, not {seen}"
        if POISON in seen:
            row.active, row.finish = False, int(FinishCode.INVALID)
            return _Round([], 0, depth)
        digest, feed, tokens = _digest(seen), row.last, []
        agreed = _mix(digest, row.seed, 1) % (depth + 1)
        for k in range(depth + 1):
            value = self._write(pools.target, table, length + k, feed)
            if k < depth:
                self._write(pools.draft, table, length + k, feed)
            digest += value * _weight(length + k)
            truth = _predict(digest, row.seed)
            if k <= agreed:
                tokens.append(truth)
            feed = truth if k < agreed else (truth + 1) % VOCAB
        done = self._commit(row, tokens, agreed, depth)
        if drafts:
            row.draft_length = row.length - 1
        return done

    def _commit(self, row: _Row, tokens: list[int], agreed: int, depth: int) -> _Round:
        for index, token in enumerate(tokens):
            row.emitted, row.length = row.emitted + 1, row.length + 1
            row.prev, row.last = row.last, token
            row.history.append(token)
            if token in row.stop_ids or row.emitted >= row.max_tokens:
                row.active, row.finish = False, int(FinishCode.STOP if token in row.stop_ids else FinishCode.LENGTH)
                tokens = tokens[: index + 1]
                break
        return _Round(tokens, min(agreed, len(tokens)), depth)

    # --- pages

    def _write(self, pool: np.ndarray, table: np.ndarray, position: int, token: int) -> int:
        """Write one token after what the table leads to."""
        page_size = self.sizes.page_size
        before = _START
        if position:
            page = self._page(table, position - 1)
            before = int(pool[page, (position - 1) % page_size])
        value = _chain(before, token)
        pool[self._page(table, position), position % page_size] = value
        return value

    def _write_tiles(self, pool: np.ndarray, batch: Any) -> None:
        for tokens, table, start in sorted(
            zip(batch.tokens, batch.table, batch.start, strict=True), key=lambda tile: int(tile[2])
        ):
            for place, token in enumerate(tokens):
                self._write(pool, table, int(start) + place, int(token))

    def _read(self, pool: np.ndarray, table: np.ndarray, length: int) -> np.ndarray:
        pages = table[: self.sizes.pages(int(length))]
        assert SCRATCH_PAGE not in pages, f"{length} tokens are to be read, and the table has {table}"
        return pool[pages].reshape(-1)[: int(length)]

    def _page(self, table: np.ndarray, position: int) -> int:
        column = position // self.sizes.page_size
        return int(table[column]) if column < len(table) else SCRATCH_PAGE

    def _step_shape(self, batch: int, tier: int) -> StepOutput:
        columns, rounds = 1 + self.sizes.rounds * (tier + 1), self.sizes.rounds
        whole = lambda *dims: jax.ShapeDtypeStruct((batch, *dims), np.int32)  # noqa: E731
        scored = _logprobs(np.zeros((batch, columns), np.int32), self.config.max_logprobs)
        return StepOutput(
            tokens=whole(columns),
            accepted=whole(rounds),
            drafted=whole(rounds),
            divergence=jax.ShapeDtypeStruct((batch, rounds), np.float32),
            finish=whole(),
            logprobs=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), scored),
        )


def _donated(pools: Pools, place: str) -> Pools:
    return jax.tree.map(lambda leaf: leaf.donate(place), pools)


def _placed_pools(pools: Pools, place: str) -> Pools:
    return jax.tree.map(lambda leaf: FakeArray(leaf, place), pools)


def _logprobs(tokens: np.ndarray, width: int) -> TokenLogprobs:
    """Score tokens: any function of them will do."""
    return TokenLogprobs(
        chosen=-(tokens.astype(np.float32) + 1) / 16,
        rank=tokens.astype(np.int32) + 1,
        top_ids=np.zeros((*tokens.shape, width), np.int32),
        top=np.zeros((*tokens.shape, width), np.float32),
    )


# --- a whole engine


class FakeClock:
    """Seconds that pass when somebody sleeps, or says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-6  # no two readings are equal
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


def fake_scheduler(
    pairs: Sequence[StreamPair], *, clock: FakeClock, flowguard: Any = None, specustreams: Any = None, **config: Any
) -> StreamScheduler:
    """Put a scheduler before lanes of any kind; `clock` tells the time and passes it."""
    settings = pairs[0].programs.config

    def start(request: Request, *, arrival_s: float) -> RunningRequest:
        return RunningRequest(request, TextStream(None, request.params), lambda token: None, arrival_s=arrival_s)

    return StreamScheduler(
        pairs,
        FlowGuard(routers.round_robin, num_lanes=len(pairs), seed=0) if flowguard is None else flowguard,
        SchedulerConfig(**config),
        specustreams=[tiny_specustream(pair) for pair in pairs] if specustreams is None else specustreams,
        max_prefills=settings.max_prefills,
        keeps_pages=settings.preemption == "keep",
        start=start,
        clock=clock,
        sleep=clock.sleep,
    )
