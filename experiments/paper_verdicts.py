"""What the rows of the reproduction say of two arms: how many times better one is, or why nothing may be said.

Two arms are compared on the same prompts and repeats, in the name of one factor. There is no number where they differ
in anything that the factor does not own: a setting, the devices, the slots, the software; nor where a program was
compiled while one ran, prompts failed, their tokens differ, or what the factor is about did not take place.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.depth_verdicts import Interval
from experiments.paper_arms import PLAIN, Arm
from experiments.paper_rows import METRICS, Cell, Row, Study, interval, log_speed

MIN_RUNS = 5  # to tell a difference from luck: so many runs lie on one side by chance in one case of sixteen
_DIVISION = ("topology.topology", "topology.prefill_devices", "topology.decode_devices")
_SIZES = ("topology.num_pairs", "pipeserve.max_num_seqs", "pipeserve.max_prefills")
# What two arms may differ in when they are compared in the name of a factor; a dot at the end stands for a section.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "routing": ("router",),
    "disaggregation": _DIVISION,
    "speculation": ("policy",),
    "draft": ("speculation.",),  # plain decoding beside a draft model that reads the prompts, or without one
    "system": ("router", "policy", "speculation.", *_DIVISION, *_SIZES),  # three factors at once: it explains nothing
}


class Comparison(NamedTuple):
    """How many times better `other` is than `base`, by metric; none where it is refused."""

    cell: Cell
    factor: str
    base: Arm
    other: Arm
    speeds: Mapping[str, Interval]
    refusal: str | None


def compare(study: Study, cell: Cell, factor: str, base: Arm, other: Arm) -> Comparison:
    """Compare two arms in the name of a factor."""
    why = refusal(study, cell, factor, base, other)
    if why is not None:
        return Comparison(cell, factor, base, other, {}, why)
    (value_M, drawn_RM), (base_M, base_RM) = log_speed(cell, other), log_speed(cell, base)
    speed_M, speed_RM = np.exp(value_M - base_M), np.exp(drawn_RM - base_RM)
    speeds = {
        name: interval(speed_M[index], speed_RM[:, index]) for index, name in enumerate(METRICS) if name in cell.metrics
    }
    return Comparison(cell, factor, base, other, speeds, None)


def refusal(study: Study, cell: Cell, factor: str, base: Arm, other: Arm) -> str | None:
    """Say why two arms must not be compared in the name of a factor; None if they may.

    Raises:
      RunError: there is no such factor.
    """
    if factor not in FACTORS:
        raise common.RunError(f"unknown factor {factor!r}; known: {', '.join(FACTORS)}")
    for arm in (base, other):
        if "refused" in study.engines.get(arm.fleet, {}):
            return f"{arm.fleet} could not be built: {study.engines[arm.fleet]['refused']}"
        if arm not in cell.runs or arm.fleet not in study.engines:
            return f"there is no run of {arm}"
        if why := _unsound(study, arm, cell.runs[arm]):
            return why
    return _foreign(factor, facts(study, base), facts(study, other)) or _unlike(
        cell.runs[base], cell.runs[other], study.header["max_different"]
    )


def facts(study: Study, arm: Arm) -> dict[str, Any]:
    """Say all that an arm is: its names, its engine's settings, software, devices and slots."""
    engine = study.engines[arm.fleet]
    values = study.settings[arm.fleet]
    return {
        "router": arm.router,
        "policy": arm.policy,
        "devices": engine["devices"],
        "slots": values["topology.num_pairs"] * values["pipeserve.max_num_seqs"],
        **{f"versions.{name}": version for name, version in engine["versions"].items()},
        **values,
    }


def _foreign(factor: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Say in what two arms differ that the factor does not own, or that they do not differ in what it owns."""
    names = [name for name in {**base, **other} if base.get(name) != other.get(name)]
    owned = tuple(name for name in FACTORS[factor] if name.endswith("."))
    foreign = [name for name in names if name not in FACTORS[factor] and not (owned and name.startswith(owned))]
    if foreign:
        told = ", ".join(f"{name} ({base.get(name)} against {other.get(name)})" for name in foreign)
        return f"they differ in {told}, which {factor} does not mean"
    return None if names else f"they do not differ in {factor}"


def _unsound(study: Study, arm: Arm, runs: Sequence[Row]) -> str | None:
    """Say what is wrong with the runs of one arm by themselves."""
    failed, compiled, drafted, moved = (
        sum(run[name] for run in runs)
        for name in ("failed", "compilations_after_warmup", "draft_tokens", "kv_transfer_bytes")
    )
    values = study.settings[arm.fleet]
    if failed:
        return f"{failed} prompts of {arm} failed"
    if compiled:
        return f"{compiled} programs were compiled while {arm} ran"
    if arm.policy != PLAIN and not drafted:
        return f"{arm} drafted nothing"
    if values["topology.topology"] == "disaggregated" and not values["topology.share_devices"] and not moved:
        return f"{arm} handed nothing over from prefill to decode"
    return None


def _unlike(base: Sequence[Row], other: Sequence[Row], max_different: int) -> str | None:
    """Say in what the runs of two arms did not do the same work."""
    turns = [[(run["repeat"], run["workload"], run["input_tokens"]) for run in runs] for runs in (base, other)]
    if turns[0] != turns[1]:
        return "they were given other prompts"
    different = max(
        sum(a != b for a, b in zip(one["tokens_sha256"], two["tokens_sha256"], strict=True))
        for one, two in zip(base, other, strict=True)
    )
    if different > max_different:
        return f"{different} prompts of a run have other tokens, allowed are {max_different}"
    return None
