"""What a report is made of: the files of a run's workdir, read and checked.

JSON stops here: what leaves is a `Run`. results.json must be there, since a run writes it at its end; every other file
may be absent, and is None then. A file that is damaged ends the report with a message that names it.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import RunError
from experiments.report_run import RESULTS, RequestRow, Run, is_limit, is_number
from streamserve.flowguard import LoggedRoute, read_routes
from streamserve.specustream.decision_log import read_log
from streamserve.specustream.logged import Logged


def find_workdirs(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """List the workdirs that were meant: each is one, or a folder of some.

    Raises:
      RunError: a path is neither.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        inside = [path] if (path / RESULTS).is_file() else _workdirs_in(path)
        if not inside:
            raise RunError(
                f"{str(path)!r} is no workdir of a run that has ended: no {RESULTS}, there or one folder below"
            )
        found |= {one.resolve(): one for one in inside}
    return list(found.values())


def _workdirs_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """List the workdirs in a folder, numbers in their names in the order of numbers."""
    if not folder.is_dir():
        return []
    inside = [path for path in folder.iterdir() if (path / RESULTS).is_file()]
    return sorted(
        inside, key=lambda path: [(part.isdigit(), part.zfill(20)) for part in re.findall(r"\d+|\D+", path.name)]
    )


def read_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """Read every workdir.

    Raises:
      RunError: a file of one is damaged; the message says which.
    """
    names = [path.resolve().name for path in workdirs]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in workdirs]
    if len(set(names)) < len(names):
        names = [f"{index}: {name}" for index, name in enumerate(names)]
    return [_read_run(path, name) for path, name in zip(workdirs, names, strict=True)]


def _read_run(folder: pathlib.Path, name: str) -> Run:
    lines = folder / "requests.jsonl"
    routes, decisions = _log(folder / "routes.jsonl", read_routes), _log(folder / "decisions.jsonl", read_log)
    run = Run(
        name=name,
        results=_object(folder / RESULTS),
        config=_object(folder / "config.json") if (folder / "config.json").exists() else None,
        environment=_object(folder / "env.json") if (folder / "env.json").exists() else None,
        requests=_rows(lines) if lines.exists() else None,
        routes=None if routes is None else tuple(routes[1]),
        decisions=None if decisions is None else tuple(decisions[1]),
        logs_synthetic=any(bool(log[0].get("synthetic")) for log in (routes, decisions) if log is not None),
    )
    for route in run.routes or ():
        _check_route(folder / "routes.jsonl", route, len(run.routes[0].context.eligible_A) if run.routes else 0)
    for decision in run.decisions or ():
        _check_decision(folder / "decisions.jsonl", decision)
    return run


def _log(path: pathlib.Path, read: Callable[[pathlib.Path], tuple[dict[str, Any], list[Any]]]) -> Any:
    """Read a log of decisions; None where there is none."""
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def _check_route(path: pathlib.Path, one: LoggedRoute, num_lanes: int) -> None:
    """See what the reader of routes takes on trust: numbers where numbers belong, and one number a lane."""
    context = one.context
    arrays = [value for field, value in context._asdict().items() if field.endswith("_A")]
    numbers = [one.chosen_s, *context.objective, context.queue, context.waited_s, context.prompt_tokens]
    numbers += [] if one.outcome is None else [one.learned_s, *one.outcome]
    right = isinstance(one.route.arm, int) and 0 <= one.route.arm < num_lanes
    right = right and all(map(is_number, numbers)) and all(map(is_limit, context.objective))
    if not (right and all(np.shape(array) == (num_lanes,) and np.isfinite(array).all() for array in arrays)):
        raise RunError(f"cannot read {str(path)!r}: step {one.step}: a field is no number, or not of {num_lanes} lanes")


def _check_decision(path: pathlib.Path, one: Logged) -> None:
    """See what the reader of decisions takes on trust: arrays of one shape, and no more accepted than drafted."""
    right = np.shape(one.context.holder_B) == np.shape(one.plan.depth_B) and is_number(one.chosen_s)
    if right and one.outcome is not None:
        drafted, accepted = one.outcome.stats.drafted_BR, one.outcome.stats.accepted_BR
        right = np.shape(drafted) == np.shape(accepted) and np.ndim(drafted) == 2 and not (accepted > drafted).any()
        right = bool(right and (accepted[drafted > 0] >= 0).all())
    if not right:
        raise RunError(f"cannot read {str(path)!r}: lane {one.lane} step {one.step}: its arrays do not fit together")


def _object(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        return _parsed(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def _rows(path: pathlib.Path) -> tuple[RequestRow, ...]:
    """Read the numbers of single requests."""
    rows: list[RequestRow] = []
    try:
        for line in path.read_bytes().splitlines():
            rows.append(_row(_parsed(line)))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error, "" if isinstance(error, OSError) else f", line {len(rows) + 1}") from None
    return tuple(rows)


def _row(raw: Mapping[str, Any]) -> RequestRow:
    """Take what a report needs from a line.

    Raises:
      ValueError: a field is of the wrong type.
    """
    fields: dict[str, Any] = {}
    for name in ("num_output_tokens", "ttft_ms", "tpot_ms", "e2el_ms", "transfer_ms", "kv_transfer_bytes"):
        fields[name] = _checked(name, raw.get(name), lambda value: value is None or is_number(value))
    for name in ("lanes", "itls_ms"):
        listed = _checked(name, raw.get(name, []), lambda value: isinstance(value, list) and all(map(is_number, value)))
        fields[name] = tuple(listed)
    fields["met"] = _checked("met", raw.get("met", {}), _are_flags)
    error = raw.get("error")
    is_sent = error is None or "finish_reasons" in raw
    return RequestRow(is_sent=is_sent, error=None if error is None else str(error), **fields)


def _are_flags(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(met, bool) for met in value.values())


def _checked(name: str, value: Any, is_right: Callable[[Any], bool]) -> Any:
    if not is_right(value):
        raise ValueError(f"field {name!r} is {str(value)[:60]!r}")
    return value


def _parsed(text: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
      ValueError: it is none, or holds NaN.
    """
    value = json.loads(text, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise ValueError(f"not an object: {str(value)[:60]!r}")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _damaged(path: pathlib.Path, error: Exception, where: str = "") -> RunError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = reason.removeprefix(f"{path}, ")  # readers of logs name the file, too
    return RunError(f"cannot read {str(path)!r}{where}: {' '.join(reason.split())[:300]}")
