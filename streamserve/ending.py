"""How a request ends, exactly once: what the scheduler hands over, and what it takes in as refused already."""

from typing import NamedTuple

from streamserve.lifecycle import State
from streamserve.types import CompletionOutput, Logprob, RequestMetrics


class Refused(NamedTuple):
    """A request that cannot be served, and why."""

    request_id: str
    reason: str


class Finished(NamedTuple):
    """The one end of a request: an output with its metrics, or an error."""

    request_id: str
    state: State
    completion: CompletionOutput | None = None
    metrics: RequestMetrics | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    error: str | None = None
