"""What the scheduler's lanes need of a stream pair: the one seam between orchestration and execution."""

from collections.abc import Callable
from typing import Any, Protocol

from streamserve.types import Deferred, Job, StepOutput, StepPlan, TokenLogprobs


class Pair(Protocol):
    """What a lane needs of a stream pair, `pipeserve.StreamPair`. Its tasks, calls and items are opaque but for names.

    A task has `cached_tokens`, `local` and `row`; a call has `parts`, `done` and `local`; an item `task`, `kept`,
    `transfer_pages` and `transfer_bytes`.
    """

    @property
    def num_slots(self) -> int:
        """Decode slots."""
        ...

    @property
    def free_slots(self) -> int:
        """Decode slots that nobody holds."""
        ...

    @property
    def free_pages(self) -> int:
        """Pages of the decode mesh that nobody owns."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of the decode mesh that can be owned."""
        ...

    @property
    def waiting_tiles(self) -> int:
        """Tiles that no prefill call has taken."""
        ...

    @property
    def waiting_local_tiles(self) -> int:
        """Tiles that no prefill call on the decode mesh of a disaggregated pair has taken."""
        ...

    @property
    def is_broken(self) -> bool:
        """Whether nothing but `reset` helps."""
        ...

    @property
    def is_up(self) -> bool:
        """Whether its machine works; what was on it is lost when it does not."""
        ...

    @property
    def colocated(self) -> bool:
        """Whether prefill and decode share one mesh."""
        ...

    @property
    def local_tokens(self) -> int:
        """Longest prompt that can be computed where it is decoded, though there is a prefill mesh; 0 for none."""
        ...

    sizes: Any
    cached_tokens: Callable[[tuple[int, ...]], int]
    begin: Callable[[Job], Any]
    begin_locally: Callable[[Job], Any]
    prefill: Callable[[], Any]
    prefill_locally: Callable[[], Any]
    is_computed: Callable[[Any], bool]
    is_prompt_computed: Callable[[Any], bool]
    drop: Callable[[Any], None]
    hand_off: Callable[[Any], Any]
    resume: Callable[[Any], Any]
    has_arrived: Callable[[Any], bool]
    abandon: Callable[[Any], None]
    insert: Callable[[Any], int]
    read_prompt_logprobs: Callable[[Any], TokenLogprobs]
    tokens_per_tick: Callable[[int], int]
    ensure: Callable[[int, int], Deferred | None]
    step: Callable[[int, StepPlan], Any]
    is_done: Callable[[Any], bool]
    read: Callable[[Any], StepOutput]
    release: Callable[[int], None]
    rescue: Callable[[int, Job], Any]
    bring_home: Callable[[Any], Any]
    forget: Callable[[Job], None]
    remember: Callable[[tuple[int, ...]], None]
    reset: Callable[[], None]
