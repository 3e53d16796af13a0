"""The states of a request and the moves between them, in one table.

It owns what is legal; who makes a move, and what has to be freed on the way, it must not know.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType


class State(enum.Enum):
    """Where a request is. The last five are ends."""

    WAITING = "waiting"  # in the queue
    PREFILL = "prefill"  # its pages on a prefill mesh are reserved
    TRANSFER = "transfer"  # its pages are on their way to a decode mesh
    DECODE = "decode"  # it holds a decode slot
    PREEMPTED = "preempted"  # it lost its slot and waits to go on
    FINISHED = "finished"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"
    FAILED = "failed"


_BROKEN_OFF = frozenset({State.CANCELLED, State.TIMED_OUT, State.FAILED})  # may strike at any moment

# A transfer that was lost begins again from the prefill pages, which are held until it has arrived: it stays TRANSFER.
# Back to WAITING goes what a reset of its lane has left without pages, to be routed anew. From DECODE the way back is
# PREEMPTED, since tokens have been emitted that a new prefill has to take in.
MOVES: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.WAITING: _BROKEN_OFF | {State.PREFILL, State.REFUSED},
        State.PREFILL: _BROKEN_OFF | {State.TRANSFER, State.WAITING, State.REFUSED},
        State.TRANSFER: _BROKEN_OFF | {State.DECODE, State.WAITING},
        State.DECODE: _BROKEN_OFF | {State.FINISHED, State.PREEMPTED},
        State.PREEMPTED: _BROKEN_OFF | {State.PREFILL, State.TRANSFER},  # computed anew, or its pages were kept
        State.FINISHED: frozenset(),
        State.REFUSED: frozenset(),
        State.CANCELLED: frozenset(),
        State.TIMED_OUT: frozenset(),
        State.FAILED: frozenset(),
    }
)

ENDS: frozenset[State] = frozenset(state for state, moves in MOVES.items() if not moves)


class IllegalMoveError(AssertionError):
    """A move that the table does not have: an error of ours, never of a user."""


class Life:
    """The state of one request, from WAITING to an end. What came before is not kept: memory stays flat."""

    def __init__(self, request_id: str):
        self._request_id = request_id
        self._state = State.WAITING

    @property
    def state(self) -> State:
        """Where the request is."""
        return self._state

    @property
    def ended(self) -> bool:
        """Whether it is at an end."""
        return self._state in ENDS

    def move(self, to: State) -> None:
        """Go to another state.

        Raises:
          IllegalMoveError: the table has no such move; the state stays.
        """
        if to not in MOVES[self._state]:
            raise IllegalMoveError(f"request {self._request_id}: no move from {self._state.name} to {to.name}")
        self._state = to
