"""What a tick was worth, as one number."""

from streamserve.specustream.depth import StepStats

_SHORTEST = 1e-9  # s; below it the clock has not measured anything


def ran(stats: StepStats) -> bool:
    """Whether anything was verified."""
    return stats.row_rounds > 0


def timed(stats: StepStats) -> bool:
    """Whether anything was verified and measured."""
    return stats.seconds > _SHORTEST and ran(stats)


def tokens(stats: StepStats) -> int:
    """Tokens that all rows emitted; a slot that did not run may hold NOT_RUN."""
    return sum(max(emitted, 0) for emitted in stats.emitted_B.tolist())


def tokens_per_verification(stats: StepStats) -> float:
    """Mean tokens that a row emitted in a round, from a tick that `ran`."""
    return tokens(stats) / stats.row_rounds


def row_rate(stats: StepStats) -> float:
    """Mean tokens per second of a row, from a tick that was `timed`.

    Tokens per verification over seconds per round: other than the lane's rate it does not grow with the batch, so that
    rewards of one arm at different batches can be averaged.
    """
    return tokens_per_verification(stats) * stats.rounds / stats.seconds


def lane_rate(stats: StepStats) -> float:
    """Tokens per second of the lane, from a tick that was `timed`."""
    return tokens(stats) / stats.seconds
