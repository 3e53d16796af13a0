"""What a comparison of depth policies says of each arm, from its rows alone: ratios with intervals, or why none."""

import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.depth_arms import PLAIN, fixed_arm, fixed_depth

MIX = "all workloads"
RESAMPLES, LEVEL = 2000, 0.95
SPLIT_REPEATS = 4  # from so many on, the best fixed depth is chosen on half of the repeats
Row = Mapping[str, Any]


class Interval(NamedTuple):
    """A ratio and where it lies; the bounds are NaN where there was one measurement alone."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if np.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


class Panel(NamedTuple):
    """Tokens and seconds of every prompt in every repeat."""

    tokens_RP: np.ndarray
    seconds_RP: np.ndarray


class Verdict(NamedTuple):
    """What is known of an arm on a workload or on a mix; ratios are None where they are refused.

    Attributes:
      group: the workload, or the cost shape of a simulation.
      arm: name.
      to_plain: speed over plain decoding's.
      to_fixed: speed over the best fixed depth's.
      best: the best fixed arm.
      refusal: why there are no ratios.
      rows: of the arm.
    """

    group: str
    arm: str
    to_plain: Interval | None
    to_fixed: Interval | None
    best: str | None
    refusal: str | None
    rows: list[Row]


def read_rows(path: pathlib.Path) -> tuple[Row, list[Row]]:
    """Read the header and the rows.

    Raises:
      RunError: it cannot be read, or is no such file.
    """
    lines = common.read_json_lines(path)
    if len(lines) < 2 or lines[0].get("kind") != "header" or lines[0].get("mode") not in ("simulate", "engine"):
        raise common.RunError(f"{str(path)!r} does not hold a header of experiments.compare_depth and rows")
    return lines[0], lines[1:]


def ratio(over: Panel, under: Panel) -> Interval:
    """Compare the tokens a second of two arms on the same prompts and repeats.

    Returns:
      The ratio, and the percentile bootstrap's interval: prompts and repeats are drawn again, the same for both arms.
    """
    repeats, prompts = over.tokens_RP.shape
    generator = np.random.default_rng(0)
    drawn_NR = generator.multinomial(repeats, [1 / repeats] * repeats, size=RESAMPLES)
    drawn_NP = generator.multinomial(prompts, [1 / prompts] * prompts, size=RESAMPLES)
    sums = [((drawn_NR @ values_RP) * drawn_NP).sum(axis=1) for values_RP in (*over, *under)]
    value = (over.tokens_RP.sum() / over.seconds_RP.sum()) / (under.tokens_RP.sum() / under.seconds_RP.sum())
    if repeats * prompts == 1:
        return Interval(float(value), np.nan, np.nan)
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    low, high = np.percentile((sums[0] / sums[1]) / (sums[2] / sums[3]), tails)
    return Interval(float(value), float(low), float(high))


def judge_engine(header: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Compare the arms on every workload, and on all together where there are several."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    groups = {name: [name] for name in names} | ({MIX: names} if len(names) > 1 else {})
    verdicts = []
    for group, members in groups.items():
        chosen = [row for row in rows if row["workload"] in members]
        counts = Counter(row["repeat"] for row in chosen)  # a run that was cut short may leave part of a repeat
        whole = sorted(repeat for repeat, count in counts.items() if count == max(counts.values()))
        by_arm: dict[str, list[Row]] = {}
        for row in sorted(chosen, key=lambda row: (row["repeat"], members.index(row["workload"]))):
            if row["repeat"] in whole:
                by_arm.setdefault(row["arm"], []).append(row)
        verdicts += _judge_group(header, group, by_arm, whole)
    return verdicts


def _judge_group(header: Row, group: str, by_arm: Mapping[str, list[Row]], repeats: Sequence[int]) -> Iterator[Verdict]:
    if PLAIN not in by_arm:
        raise common.RunError(f"there is no run of {PLAIN}, plain decoding, on {group!r}")
    refusals = {arm: _refusal(header, rows) for arm, rows in by_arm.items()}
    if refusals[PLAIN] is not None:
        refusals = dict.fromkeys(by_arm, f"plain decoding cannot be compared with: {refusals[PLAIN]}")
    splits = len(repeats) >= SPLIT_REPEATS
    choosing, judging = (repeats[::2], repeats[1::2]) if splits else (repeats, repeats)
    rates = {
        arm: ratio(_panel(rows, choosing), _panel(by_arm[PLAIN], choosing)).value
        for arm, rows in by_arm.items()
        if refusals[arm] is None and fixed_depth(arm) is not None
    }
    best = max(sorted(rates), key=lambda arm: rates[arm]) if rates else None
    for arm in sorted(by_arm, key=lambda arm: (fixed_depth(arm) is None, fixed_depth(arm), arm)):
        rows, to_plain, to_fixed = by_arm[arm], None, None
        if refusals[arm] is None and best is not None:
            to_plain = ratio(_panel(rows, repeats), _panel(by_arm[PLAIN], repeats))
            to_fixed = ratio(_panel(rows, judging), _panel(by_arm[best], judging))
        yield Verdict(group, arm, to_plain, to_fixed, best, refusals[arm], rows)


def _refusal(header: Row, rows: Sequence[Row]) -> str | None:
    """Say why an arm must not be compared."""
    failed, compiled = (sum(row[key] for row in rows) for key in ("failed", "compilations_after_warmup"))
    if failed:
        return f"{failed} prompts failed"
    if compiled:
        return f"{compiled} programs were compiled while it ran"
    if header["compares_tokens"]:
        different = max(row["prompts"] - row["same_as_plain"] for row in rows)
        if different > header["max_different"]:
            return f"{different} prompts of a run differ from plain decoding, allowed are {header['max_different']}"
    if rows[0]["arm"] != PLAIN and not any(row["spec_decode_draft_tokens"] for row in rows):
        return "it drafted nothing"
    return None


def _panel(rows: Sequence[Row], repeats: Sequence[int]) -> Panel:
    """Lay the prompts of all workloads side by side, a line a repeat."""
    keys = ("prompt_tokens", "prompt_seconds")
    lines = [[np.concatenate([row[key] for row in rows if row["repeat"] == r]) for r in repeats] for key in keys]
    return Panel(*(np.array(line, np.float64) for line in lines))


def judge_simulation(header: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Compare the arms of each cost over the mix of its cells and batches, as many tokens from each.

    The intervals are the lowest and the highest seed's.
    """
    del header
    verdicts = []
    for cost in dict.fromkeys(row["cost"] for row in rows):
        seconds: dict[tuple[str, int], float] = {}
        by_arm: dict[str, list[Row]] = {}
        for row in rows:
            if row["cost"] == cost:
                key = row["policy"], row["seed"]
                seconds[key] = seconds.get(key, 0.0) + 1 / row["goodput"]
                by_arm.setdefault(row["policy"], []).append(row)
        best = fixed_arm(next(iter(by_arm.values()))[0]["mix_fixed"])
        for arm, own in by_arm.items():
            to = {
                base: [seconds[base, seed] / seconds[arm, seed] for seed in sorted({row["seed"] for row in own})]
                for base in (PLAIN, best)
            }
            ends = {base: (min(over), max(over)) if len(over) > 1 else (np.nan, np.nan) for base, over in to.items()}
            spans = {base: Interval(float(np.mean(over)), *ends[base]) for base, over in to.items()}
            verdicts.append(Verdict(cost, arm, spans[PLAIN], spans[best], best, None, own))
    return verdicts


def judge(header: Row, rows: Sequence[Row]) -> list[Verdict]:
    """Compare the arms, whatever ran them."""
    return (judge_simulation if header["mode"] == "simulate" else judge_engine)(header, rows)
