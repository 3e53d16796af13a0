"""What a report knows of a run. JSON stops before: `report_data` has read and checked the files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.common import RunError
from streamserve.flowguard import LoggedRoute
from streamserve.metrics import ServiceLevels
from streamserve.specustream.logged import Logged

RESULTS = "results.json"
LIMITS = ("ttft", "tpot", "e2el")  # of `ServiceLevels`
_LARGEST = 1e300  # what exceeds it is a mistake, or infinite


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and abs(value) < _LARGEST


def is_limit(value: Any) -> bool:
    """Tell whether a JSON value can be a limit: a positive number."""
    return is_number(value) and value > 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """A line of requests.jsonl, as far as a report needs it; None where the line does not say.

    Attributes:
      is_sent: it became a request; false for an input line that could not.
      error: why it was not answered; None if it was.
      lanes: stream pair of each completion.
      num_output_tokens: of all completions.
      ttft_ms: from arrival to the first token.
      tpot_ms: a token after the first.
      e2el_ms: from arrival to the last token.
      itls_ms: gaps between the moments at which the host received tokens.
      transfer_ms: from the start for the decode mesh to the arrival there.
      kv_transfer_bytes: that went with it.
      met: for each limit whether it was within it; empty where nobody judged.
    """

    is_sent: bool = True
    error: str | None = None
    lanes: tuple[int, ...] = ()
    num_output_tokens: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    itls_ms: tuple[float, ...] = ()
    transfer_ms: float | None = None
    kv_transfer_bytes: float | None = None
    met: Mapping[str, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run's workdir.

    Attributes:
      name: of the folder, made longer where two have the same.
      results: results.json.
      config: config.json.
      environment: env.json.
      requests: requests.jsonl, in order of completion.
      decisions: decisions.jsonl, by lane and step.
      routes: routes.jsonl, in their order.
      logs_synthetic: a log says that acceptance was synthetic.
    """

    name: str
    results: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    requests: tuple[RequestRow, ...] | None = None
    decisions: tuple[Logged, ...] | None = None
    routes: tuple[LoggedRoute, ...] | None = None
    logs_synthetic: bool = False

    def number(self, key: str) -> float | None:
        """Give a number of results.json; None where it is absent.

        Raises:
          RunError: it is something else.
        """
        value = self.results.get(key)
        if value is not None and not is_number(value):
            raise RunError(f"{self.name}, {RESULTS}: {key!r} must be a number, got {str(value)[:60]!r}")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """Give a list of numbers of results.json; empty where it is absent.

        Raises:
          RunError: it is something else.
        """
        values = self.results.get(key, [])
        if not isinstance(values, list) or not all(map(is_number, values)):
            raise RunError(f"{self.name}, {RESULTS}: {key!r} must be a list of numbers, got {str(values)[:60]!r}")
        return tuple(values)

    def setting(self, *path: str) -> Any:
        """Give a field of config.json; None where it is absent."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def rate(self) -> float | None:
        """Requests a second that were to come, else that came; None where they did not come by themselves."""
        arrivals = self.results.get("arrivals")
        came = arrivals.get("offered_rate") if isinstance(arrivals, Mapping) else None
        return self.number("request_rate") or (came if is_limit(came) else None)

    @property
    def synthetic(self) -> str | None:
        """What acceptance was drawn from where that is synthetic; None where tokens are the target's own."""
        told = self.results.get("synthetic_acceptance") or self.setting("speculation", "acceptance")
        if told is None and (self.logs_synthetic or self.setting("speculation", "method") == "synthetic"):
            return "a process that is not recorded"
        return None if told is None else str(told)

    @property
    def levels(self) -> ServiceLevels | None:
        """What requests were to be answered within, as the results, else the log of routes, else the config say."""
        told_ms = {name: self.number(f"slo_{name}_ms") for name in LIMITS}
        if any(told_ms.values()):
            limits = {f"{name}_s": limit_ms / 1000 for name, limit_ms in told_ms.items() if limit_ms}
        elif self.routes:
            limits = self.routes[0].context.objective._asdict()
        else:
            limits = {name: self.setting("routing", name) for name in ("ttft_s", "tpot_s")}
        limits = {name: limit_s for name, limit_s in limits.items() if is_limit(limit_s)}
        return ServiceLevels(**limits) if limits else None

    @property
    def begin_s(self) -> float:
        """When the first decision was made, by the clock of the logs; 0 without any."""
        return min((one.chosen_s for one in (*(self.routes or ()), *(self.decisions or ()))), default=0.0)
