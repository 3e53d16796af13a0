"""The host side of a prefill mesh: which tiles of which prompts go into the next call.

A prompt is cut into tiles of one page. Among prompts of the best priority, every call gives its first tile to the
oldest, so that none starves, and the rest to those that need the fewest: a short prompt beside a long one is done after
one call.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from streamserve import sampling
from streamserve.kv.pages import SCRATCH_PAGE, Owner, Stage
from streamserve.pipeserve.packing import Packed
from streamserve.pipeserve.programs import Programs
from streamserve.pipeserve.store import Holding, PageStore
from streamserve.types import Deferred, Job, PrefillBatch, Prefix, RowParams, TokenLogprobs


class PrefillTask:
    """A prompt on the mesh that computes it, from the reservation of its pages until they have left."""

    def __init__(self, job: Job, row: RowParams, holding: Holding, page_size: int, *, local: bool):
        self.job, self.row, self.holding = job, row, holding
        self.local = local  # it is computed where it is decoded
        self.tokens = job.tokens
        self.cached_tokens = len(holding.shared) * page_size
        self.next_tile = len(holding.shared)
        self.num_tiles = -(-len(self.tokens) // page_size)
        self.tail: tuple[Any, int] | None = None  # hidden states of the call with the prompt's last tile, and its place
        self.scored: list[tuple[TokenLogprobs, int]] = []  # log-probabilities of a tile: a call's, and its place

    @property
    def request_id(self) -> str:
        """Whose prompt it is."""
        return self.job.request.request_id

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are wanted, and not yet computed before a preemption."""
        return self.job.request.params.prompt_logprobs is not None and not self.job.output

    @property
    def num_waiting(self) -> int:
        """Tiles that no call has taken yet."""
        return self.num_tiles - self.next_tile


class PrefillError(RuntimeError):
    """A prefill call failed; `request_ids` were in it."""

    def __init__(self, message: str, request_ids: tuple[str, ...]):
        super().__init__(message)
        self.request_ids = request_ids


class PrefillCall(NamedTuple):
    """One dispatched call."""

    parts: tuple[tuple[PrefillTask, int], ...]  # tasks and the number of tiles of each in this call
    done: tuple[PrefillTask, ...]  # tasks whose last tile is in it
    tail_hidden: Any  # on the mesh that computes; ready when the call is
    local: bool  # that is the decode mesh, though there is a prefill mesh


class Prefiller:
    """Prompts on one mesh that computes them."""

    def __init__(self, programs: Programs, store: PageStore, *, local: bool = False):
        """Begin without prompts.

        Args:
          programs: of the pair.
          store: pages of the mesh.
          local: the mesh is the one that decodes, though there is a prefill mesh.
        """
        self._programs, self._store, self._sizes, self._local = programs, store, programs.sizes, local
        self._tiles = self._sizes.local_tiles if local else self._sizes.tiles
        self._calls = programs.local_prefill if local else programs.prefill
        self._params = programs.decode_params if local else programs.prefill_params
        self._place = programs.to_decode if local else programs.to_prefill
        self.tasks: list[PrefillTask] = []  # with tiles that no call has taken, the oldest first

    def begin(self, job: Job, *, ahead: int) -> PrefillTask | Deferred:
        """Reserve the pages of a prompt, and of `ahead` tokens beyond it.

        Raises:
          ValueError: its sampling parameters do not fit the programs, or it is longer than any row.
        """
        request, config, sizes = job.request, self._programs.config, self._sizes
        num_tokens = len(job.tokens)
        if num_tokens > sizes.columns * sizes.page_size:
            raise ValueError(f"{num_tokens} tokens do not fit into a row of {sizes.columns * sizes.page_size}")
        row = sampling.make_row(request, max_stop_ids=config.max_stop_ids, max_logit_bias=config.max_logit_bias)
        # Log-probabilities of the prompt need its hidden states, which the prefix cache does not keep.
        reuse = request.params.prompt_logprobs is None
        owner = Owner(Stage.PREFILL, request.request_id)
        holding = self._store.begin(job.tokens, owner, ahead=ahead, reuse=reuse)
        if isinstance(holding, Deferred):
            return holding
        task = PrefillTask(job, row, holding, sizes.page_size, local=self._local)
        self.tasks.append(task)
        return task

    def drop(self, task: PrefillTask) -> None:
        """Forget a prompt and free its pages."""
        if task in self.tasks:
            self.tasks.remove(task)
        self._store.drop(task.holding)

    def dispatch(self) -> PrefillCall | None:
        """Dispatch one call over tiles that wait, if there are any.

        Raises:
          PrefillError: the program refused; the prompts in the call are to be dropped.
        """
        picked = self._pick()
        if not picked:
            return None
        size = next(size for size in self._tiles if size >= len(picked))
        batch = self._batch(picked, size)
        try:
            placed = self._place(batch)
            self._store.pools, output = self._calls[size](*self._params, self._store.pools, placed)
        except RuntimeError as error:
            raise PrefillError(str(error), tuple(dict.fromkeys(task.request_id for task, _ in picked))) from error
        counts: dict[PrefillTask, int] = {}
        for place, (task, tile) in enumerate(picked):
            counts[task] = counts.get(task, 0) + 1
            if tile == task.num_tiles - 1:
                task.tail = (output.tail_hidden, place)
            if task.wants_logprobs:
                task.scored.append((output.prompt_logprobs, place))
        done = tuple(task for task in counts if task.tail is not None)
        self.tasks = [task for task in self.tasks if task.tail is None]
        return PrefillCall(tuple(counts.items()), done, output.tail_hidden, self._local)

    def first(self, task: PrefillTask) -> Packed:
        """Sample the token after a computed prompt, on the mesh that computed it."""
        assert task.tail is not None, f"{task.request_id} has tiles left"
        hidden, place = task.tail
        programs = self._programs
        length, prev_token = _int32(1, fill=len(task.tokens)), _int32(1, fill=task.tokens[-1])
        history, seen = _history(task.tokens, programs.history_tokens), _seen(task.tokens, programs.vocab_size)
        inputs = (_int32(1, fill=place), length, prev_token, history, seen, task.row)
        first = programs.local_first if self._local else programs.first
        return first(self._params[0], hidden, self._place(programs.pack(inputs)))

    def resumed(self, task: PrefillTask) -> Packed:
        """Describe where a preempted request goes on, on the decode mesh. Its prompt has been computed again."""
        prefix = resumed_prefix(task.job, task.row, self._programs, draft_length=len(task.tokens))
        return self._programs.to_decode(self._programs.pack(prefix))

    def read_prompt_logprobs(self, task: PrefillTask) -> TokenLogprobs:
        """Bring the log-probabilities of a prompt's tokens but the first to the host; [S - 1] in all."""
        calls = {id(scored): self._programs.read(scored) for scored, _ in task.scored}
        tiles = [jax.tree.map(operator.itemgetter(place), calls[id(scored)]) for scored, place in task.scored]
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(task.tokens) - 1], *tiles)

    def _pick(self) -> list[tuple[PrefillTask, int]]:
        """Choose the tiles of the next call; those of a task in their order."""
        if not self.tasks:
            return []
        room = self._tiles[-1]
        urgency = lambda task: task.job.request.priority  # noqa: E731
        by_need = sorted(self.tasks, key=lambda task: (urgency(task), task.num_waiting))  # stable: the older first
        oldest = min(self.tasks, key=urgency)  # the first among equals
        granted = {oldest: 1}
        for task in by_need:
            granted[task] = min(task.num_waiting, granted.get(task, 0) + room - sum(granted.values()))
        picked = []
        for task in self.tasks:
            for _ in range(granted[task]):
                picked.append((task, task.next_tile))
                task.next_tile += 1
        return picked

    def _batch(self, picked: Sequence[tuple[PrefillTask, int]], size: int) -> PrefillBatch:
        page_size, columns = self._sizes.page_size, self._sizes.columns
        tokens, following = _int32(size, page_size), _int32(size, page_size)
        table, start, tail = _int32(size, columns, fill=SCRATCH_PAGE), _int32(size), _int32(size)
        for place, (task, tile) in enumerate(picked):
            begin = tile * page_size
            part = task.tokens[begin : begin + page_size]
            after = task.tokens[begin + 1 : begin + page_size + 1]
            tokens[place, : len(part)], following[place, : len(after)] = part, after
            table[place, : len(task.holding.pages)] = task.holding.pages
            start[place] = begin
            if tile == task.num_tiles - 1:
                tail[place] = len(part) - 1
        wants: Any = np.bool_(any(task.wants_logprobs for task, _ in picked))
        return PrefillBatch(
            tokens=tokens, next_tokens=following, table=table, start=start, tail=tail, wants_logprobs=wants
        )


def resumed_prefix(job: Job, row: RowParams, programs: Programs, *, draft_length: int) -> Prefix:
    """Describe on the host where a preempted request goes on: after its latest token, which no page holds.

    Args:
      job: request and output so far.
      row: its sampling parameters.
      programs: whose shapes it takes.
      draft_length: tokens that the drafter has certainly read.
    """
    tokens = job.tokens
    counts: Any = np.bincount(job.output, minlength=programs.vocab_size)[None].astype(np.int32)
    return Prefix(
        length=_int32(1, fill=len(tokens)),
        prev_token=_int32(1, fill=tokens[-1]),
        last_token=_int32(1, fill=job.output[-1]),
        emitted=_int32(1, fill=len(job.output)),
        first_pending=_bool(False),
        finite=_bool(True),
        first_logprobs=_no_logprobs(programs.config.max_logprobs),
        draft_length=_int32(1, fill=draft_length),
        history=_history((*tokens, job.output[-1]), programs.history_tokens),
        prompt_seen=_seen(job.request.prompt_token_ids, programs.vocab_size),
        output_counts=counts,
        row=row,
    )


# Host arrays stand in the places of device arrays; their type is left open, since records name the latter.


def _int32(*dims: int, fill: int = 0) -> Any:
    return np.full(dims, fill, np.int32)


def _history(tokens: Sequence[int], width: int) -> Any:
    history = _int32(1, width)
    history[0, : len(tokens)] = tokens[:width]
    return history


def _bool(value: bool) -> Any:
    return np.full(1, value)


def _no_logprobs(width: int) -> TokenLogprobs:
    zeros: Any = np.zeros((1, width), np.float32)
    return TokenLogprobs(chosen=zeros.sum(axis=1), rank=_int32(1), top_ids=_int32(1, width), top=zeros)


def _seen(tokens: Sequence[int], vocab_size: int) -> Any:
    seen = np.zeros((1, vocab_size), bool)
    seen[0, list(tokens)] = True
    return seen
