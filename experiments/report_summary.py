"""Sections of a report that are read first and last: headline numbers, exactness, and what ran where."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.report_html import Block, Card, Note, Section, Table
from experiments.report_latency import attainment, goodput
from experiments.report_run import Run

_MIB = 2.0**20
_MOST_DIVERGENCES = 10  # that are listed


def headline_section(run: Run) -> Section:
    """Show the numbers that are looked at first."""
    blocks: list[Block] = []
    if run.synthetic is not None:
        blocks.append(Note(synthetic_warning(run.synthetic), alarm=True))
    if run.results.get("interrupted"):
        blocks.append(Note("The run was interrupted: it holds what had been finished.", alarm=True))
    return Section("Headline numbers", (*blocks, *_cards(run)), run.synthetic is not None)


def synthetic_warning(process: str) -> str:
    """Say what numbers of a run are worth whose acceptance was drawn at random."""
    return (
        f"SYNTHETIC ACCEPTANCE ({process}): what was accepted was drawn at random. The output is not the target's, and "
        "no latency, throughput or acceptance here is a model's."
    )


def _cards(run: Run) -> Iterator[Card]:
    """Lay out what results.json has; a number that it lacks is left out."""
    failed, compiled = run.number("failed"), run.number("compilations_after_warmup")
    for key, label in (("completed", "answered"), ("failed", "failed")):
        if (count := run.number(key)) is not None:
            yield Card(f"Requests {label}", f"{count:.0f}", alarm=bool(key == "failed" and failed))
    for key, label, unit in (
        ("duration", "Duration", "s"),
        ("request_throughput", "Requests", "requests/s"),
        ("output_throughput", "Output tokens", "tokens/s"),
    ):
        if (value := run.number(key)) is not None:
            yield Card(label, f"{value:.4g}", unit)
    if (value := goodput(run)) is not None:
        share = attainment(run)
        more = "" if share is None else f"{100 * share:.1f} % of requests within the objective"
        yield Card("Goodput", f"{value:.4g}", "requests/s", more)
    for key, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "End to end")):
        median, p99 = run.number(f"median_{key}_ms"), run.number(f"p99_{key}_ms")
        if median is not None:
            yield Card(f"{label}, median", f"{median:.4g}", "ms", "" if p99 is None else f"99 % within {p99:.4g} ms")
    if (length := run.number("spec_decode_acceptance_length")) is not None:
        rate = run.number("spec_decode_acceptance_rate")
        yield Card(
            "Acceptance length", f"{length:.3f}", "tokens", "" if rate is None else f"{rate:.1f} % of drafts accepted"
        )
    if (moved := run.number("kv_transfer_bytes")) is not None:
        count = run.number("kv_transfers")
        yield Card("Handed over", f"{moved / _MIB:.1f}", "MiB", "" if count is None else f"{count:.0f} hand-offs")
    if compiled is not None:
        yield Card("Compiled after warm-up", f"{compiled:.0f}", "programs", "0 is the law", alarm=compiled > 0)


def exactness_section(run: Run) -> Section:
    """Say whether the output was compared with plain decoding, and what came of it."""
    blocks: list[Block] = []
    if run.synthetic is not None:
        blocks.append(Note(synthetic_warning(run.synthetic), alarm=True))
    audit = run.results.get("audit")
    same, compared = run.number("offline_identical"), run.number("offline_compared")
    if isinstance(audit, Mapping):
        blocks += _audit(audit)
    if same is not None and compared is not None:
        told = f"{same:.0f} of {compared:.0f} answers have the tokens of the same requests served offline."
        blocks.append(Note(told, alarm=same < compared, good=same == compared > 0))
    elif not isinstance(audit, Mapping):
        told = "Not checked: this run did not compare its output with plain decoding (speculation.audit does)."
        blocks.append(Note(told))
    return Section("Is the output exact?", tuple(blocks), run.synthetic is not None)


def _audit(audit: Mapping[str, Any]) -> Iterator[Block]:
    """Say what an audit found, as `streamserve.audit.AuditReport` has it."""
    identical, completions = audit.get("identical"), audit.get("completions")
    told = f"{identical} of {completions} greedy completions have the tokens of plain decoding"
    if "wide_identical" in audit:
        told += f" ({audit['wide_identical']} without speculation at the same width)"
    if audit.get("left_out"):
        told += f"; {audit['left_out']} sampled ones are not comparable"
    yield Note(f"{told}.", alarm=identical != completions, good=bool(completions) and identical == completions)
    found = audit.get("divergences")
    if isinstance(found, list) and found:
        names = ("request_id", "index", "position", "got", "plain", "margin")
        rows = [one for one in found if isinstance(one, Mapping)][:_MOST_DIVERGENCES]
        caption = (
            f"First {len(rows)} of {len(found)} divergences. A margin near rounding (1e-6) is no error of speculation."
        )
        cells = tuple(tuple("-" if one.get(name) is None else str(one[name]) for name in names) for one in rows)
        yield Table(caption, names, cells)


def configuration_section(run: Run) -> Section:
    """Show what ran, of which version, on what machine."""
    blocks: list[Block] = []
    for name, values in (("env.json", run.environment), ("config.json", run.config)):
        if values is None:
            blocks.append(Note(f"{name} is absent."))
        else:
            rows = tuple(flat(values))
            blocks.append(Table(f"{name}, {len(rows)} fields.", ("field", "value"), rows, text=True))
    return Section("Configuration and machine", tuple(blocks))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """List every field of nested objects by its path."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
