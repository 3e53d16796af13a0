"""The summary of a run, against numbers worked out by hand."""

import dataclasses
import json

import pytest

from streamserve import metrics
from streamserve.metrics import STAGES, EngineStats, ServiceLevels, Tally, summarise
from streamserve.report_table import format_table
from tests import fakes

STATS = EngineStats(
    prefill_calls=4, ticks=9, kv_transfers=2, kv_transfer_pages=7, kv_transfer_bytes=20, local_prefills=14,
    preemptions=13, prefix_queried_tokens=16, prefix_hit_tokens=15, refused=5, cancelled=6, timed_out=8, failed=11,
    programs=12, compilations_after_warmup=0, warmup_s=3.0,
)  # fmt: skip
OUTPUTS = [
    # arrival, first token, end: TTFT 100 ms, e2e 300 ms, TPOT 100 ms; (3 + 3) / 0.3 = 20 tokens/s
    fakes.make_output(
        "a", times=(1.0, 1.1, 1.3), drafted=(3, 0, 3), accepted=(3, 0, 1), measured={"itls_s": (0.05, 0.15)}
    ),
    # one token: no TPOT; TTFT = e2e = 200 ms; (5 + 1) / 0.2 = 30 tokens/s
    fakes.make_output("b", prompt_tokens=5, tokens=(9,), times=(1.0, 1.2, 1.2), drafted=(2,), accepted=(0,)),
    fakes.make_output("c", error="refused"),
]


def test_counts_and_rates():
    results = summarise(OUTPUTS, 2.0, STATS)
    assert (results["duration"], results["completed"], results["failed"]) == (2.0, 2, 1)
    assert (results["total_input_tokens"], results["total_output_tokens"]) == (8, 4)
    assert results["request_throughput"] == 1.0
    assert results["output_throughput"] == 2.0
    assert results["total_token_throughput"] == 6.0
    assert (results["input_lens"], results["output_lens"]) == ([3, 5], [3, 1])
    assert (results["compilations_after_warmup"], results["kv_transfer_bytes"]) == (0, 20)


def test_latencies_are_in_milliseconds_by_the_usual_definitions():
    results = summarise(OUTPUTS, 2.0, STATS)
    assert results["mean_ttft_ms"] == pytest.approx(150)
    assert results["median_ttft_ms"] == pytest.approx(150)
    assert results["std_ttft_ms"] == pytest.approx(50)
    assert results["p99_ttft_ms"] == pytest.approx(199)
    assert results["mean_e2el_ms"] == pytest.approx(250)
    assert results["mean_tpot_ms"] == pytest.approx(100), "a request of one token has no TPOT"


def test_gaps_between_tokens_count_alike_whichever_request_they_are_of():
    gaps = [(0.010, 0.010, 0.040), (), (0.100,)]
    results = summarise([fakes.make_output(measured={"itls_s": gap}) for gap in gaps], 2.0, STATS)
    assert results["mean_itl_ms"] == pytest.approx(40)
    assert results["median_itl_ms"] == pytest.approx(25)
    assert results["p90_itl_ms"] == pytest.approx(82)
    assert results["p99_itl_ms"] == pytest.approx(98.2)
    assert results["std_itl_ms"] == pytest.approx(36.7423, abs=1e-3)
    assert results["itls"] == [[0.010, 0.010, 0.040], [], [0.100]], "in seconds, in the order of `ttfts`"


def test_gaps_are_kept_as_numbers_of_eight_bytes_and_listed_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(metrics, "LISTED_ITLS", 2)
    tally = Tally()
    for number in range(5):
        tally.add(fakes.make_output(measured={"itls_s": (number / 10,) * number}))
    assert (tally.itls_s.typecode, len(tally.itls_s), tally.itls_s.itemsize) == ("d", 10, 8)
    results = summarise(tally, 2.0, STATS)
    assert results["itls"] == [[], [0.1]]
    assert results["mean_itl_ms"] == pytest.approx(300), "of all gaps, listed or not"
    assert len(results["ttfts"]) == 5


def test_stages_add_up_to_the_end_to_end_latency():
    stamps = {"scheduled_s": 1.01, "prefilled_s": 1.03, "handed_off_s": 1.04, "transferred_s": 1.07}
    outputs = [fakes.make_output(times=(1.0, 1.1, 1.3), measured=stamps), fakes.make_output(times=(1.0, 1.4, 1.4))]
    results = summarise(outputs, 2.0, STATS)
    assert [results[f"mean_{stage}_ms"] for stage in STAGES] == pytest.approx(
        [(10 + 100) / 2, (20 + 100) / 2, (10 + 0) / 2, (30 + 100) / 2, (230 + 100) / 2]
    )
    assert sum(results[f"mean_{stage}_ms"] for stage in STAGES) == pytest.approx(results["mean_e2el_ms"])
    for stage in STAGES:
        assert {f"{stat}_{stage}_ms" for stat in ("mean", "median", "std", "p90", "p99")} <= set(results)
    assert results["p90_transfer_ms"] == pytest.approx(93)
    assert results["kv_transfer_s"] == pytest.approx(0.13)


def test_the_prefix_cache_is_rated_by_prompt_tokens_of_each_completion():
    one = fakes.make_output(prompt_tokens=10, measured={"cached_tokens": 8, "num_preemptions": 2})
    two = dataclasses.replace(one, outputs=one.outputs * 2, metrics=one.metrics * 2)
    results = summarise([two, fakes.make_output(prompt_tokens=20)], 2.0, STATS)
    assert (results["cached_tokens"], results["num_preemptions"]) == (16, 4)
    assert results["prefix_cache_hit_rate"] == pytest.approx(16 / 40)
    assert results["total_input_tokens"] == 30, "a prompt counts once, as before"
    without = summarise([two], 2.0, dataclasses.replace(STATS, prefix_queried_tokens=0))
    assert "prefix_cache_hit_rate" not in without


def test_every_counter_of_the_engine_is_in_the_results():
    counters = dataclasses.asdict(STATS)
    assert len({*counters.values()}) == len(counters), "otherwise a mix-up would not show"
    results = summarise(OUTPUTS, 2.0, STATS)
    assert results["engine_failed"] == counters.pop("failed")
    assert results["failed"] == 1, "requests without an answer, as before"
    assert {name: results[name] for name in counters} == counters


def test_acceptance_leaves_out_steps_without_a_draft():
    results = summarise(OUTPUTS, 2.0, STATS)
    assert results["spec_decode_num_drafts"] == 3
    assert results["spec_decode_draft_tokens"] == 8
    assert results["spec_decode_accepted_tokens"] == 4
    assert results["spec_decode_acceptance_rate"] == pytest.approx(50.0)
    assert results["spec_decode_acceptance_length"] == pytest.approx(1 + 4 / 3)
    assert results["spec_decode_per_position_acceptance_rates"] == pytest.approx([2 / 3, 1 / 3, 1 / 3])


def test_the_papers_throughput_has_its_own_name():
    assert summarise(OUTPUTS, 2.0, STATS)["paper_3_6_tokens_per_s"] == pytest.approx((20 + 30) / 2)


def test_what_was_not_measured_is_left_out():
    results = summarise([fakes.make_output("b", tokens=(9,)), fakes.make_output("c", error="refused")], 2.0, STATS)
    assert not [key for key in results if "tpot" in key or "spec_decode" in key or "itl" in key or "goodput" in key]
    results = summarise([], 0.0, STATS)
    assert not {"kv_transfer_s", "prefix_cache_hit_rate", "itls"} & set(results)
    assert not [key for key in results if key.endswith("_ms") or "throughput" in key or "paper" in key]
    assert results["completed"] == 0


def test_each_completion_of_a_prompt_counts_by_itself_in_latencies():
    one = OUTPUTS[0]
    two = type(one)(**{name: getattr(one, name) for name in one.__slots__} | {
        "outputs": one.outputs * 2, "metrics": one.metrics * 2,
    })  # fmt: skip
    results = summarise([two], 1.0, STATS)
    assert (results["completed"], results["output_lens"], len(results["latencies"])) == (1, [6], 2)


def test_lines_that_never_became_requests_count_as_failed():
    tally = Tally()
    tally.add(OUTPUTS[0])
    tally.add_failure()
    assert (tally.completed, tally.failed, tally.output_tokens) == (1, 1, 3)


def judged(outputs, **limits):
    """Tally outputs under service levels."""
    tally = Tally(ServiceLevels(**limits))
    for output in outputs:
        tally.add(output)
    return tally


def test_percentiles_are_those_of_the_values():
    outputs = [fakes.make_output(times=(0.0, rank / 1000, rank / 1000), tokens=(5,)) for rank in range(101)]
    results = summarise(outputs, 2.0, STATS)
    assert [results[f"p{rank}_e2el_ms"] for rank in (50, 90, 95, 99)] == pytest.approx([50, 90, 95, 99])


def test_goodput_counts_requests_within_all_limits_and_attainment_all_that_were_sent():
    # "a": TTFT 100 ms, TPOT 100 ms, E2EL 300 ms; "b": 200 ms, one token, 200 ms; "c" was refused
    results = summarise(judged(OUTPUTS, ttft_s=0.15, tpot_s=0.2, e2el_s=0.25), 2.0, STATS)
    assert results["request_goodput"] == 0.0, "each misses one"
    assert results["slo_attainment"] == 0.0
    names = ("ttft", "tpot", "e2el")
    assert [results[f"slo_attainment_{name}"] for name in names] == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    assert [results[f"slo_{name}_ms"] for name in names] == pytest.approx([150, 200, 250])
    results = summarise(judged(OUTPUTS, ttft_s=0.15, tpot_s=0.2), 4.0, STATS)
    assert (results["request_goodput"], results["slo_attainment"]) == pytest.approx((1 / 4, 1 / 3))
    assert "slo_attainment_e2el" not in results


def test_a_request_exactly_at_its_limits_is_good():
    output = fakes.make_output(times=(0.0, 0.25, 0.75), tokens=(5, 6, 7))
    for limits in ({"ttft_s": 0.25}, {"tpot_s": 0.25}, {"e2el_s": 0.75}):
        assert judged([output], **limits).good == 1
        assert judged([output], **{name: limit - 1e-9 for name, limit in limits.items()}).good == 0


def test_a_request_of_one_token_meets_any_limit_of_time_per_token():
    assert judged([fakes.make_output(tokens=(5,), times=(0.0, 9.0, 9.0))], tpot_s=1e-9).good == 1


def test_a_request_is_as_good_as_the_worst_of_its_completions():
    quick = fakes.make_output(times=(0.0, 0.1, 0.3))
    slow = fakes.make_output(times=(0.0, 0.5, 0.6))
    both = dataclasses.replace(quick, outputs=quick.outputs * 2, metrics=quick.metrics + slow.metrics)
    assert ServiceLevels(ttft_s=0.2, tpot_s=0.2).met(both) == {"ttft": False, "tpot": True}
    assert judged([both], ttft_s=0.2, tpot_s=0.2).good == 0


def test_lines_that_were_never_sent_are_no_misses():
    tally = judged(OUTPUTS[:1], ttft_s=1.0)
    tally.add_failure()
    results = summarise(tally, 2.0, STATS)
    assert (results["slo_attainment"], results["failed"]) == (1.0, 1)
    assert "slo_attainment" not in summarise(judged([], ttft_s=1.0), 2.0, STATS)


@pytest.mark.parametrize("limits", [{}, {"ttft_s": 0.0}, {"tpot_s": -1.0}, {"e2el_s": float("nan")}])
def test_service_levels_need_a_positive_limit(limits):
    with pytest.raises(ValueError, match="limit"):
        ServiceLevels(**limits)


def test_results_are_json():
    results = summarise(OUTPUTS, 2.0, STATS)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_the_table_is_aligned_and_leaves_out_what_is_missing():
    table = format_table(summarise(OUTPUTS, 2.0, STATS))
    lines = table.splitlines()
    assert {len(line) for line in lines if not line.startswith("Acceptance by")} == {56}
    assert "Successful requests:" in table
    assert "150.00" in table
    assert "0.67  0.33  0.33" in table
    assert [line.split()[-1] for line in lines if line.startswith(("Mean queue", "P99 decode", "P90 ITL"))] == [
        "140.00", "37.50", "223.25",
    ]  # fmt: skip
    engine = lines[next(index for index, line in enumerate(lines) if " Engine " in line) :]
    assert [line.split()[-1] for line in engine[1:-2]] == [
        "4", "9", "2", "7", "20", "0", "0.000", "13", "6", "8", "12", "0", "3.00",
    ]  # fmt: skip
    without = format_table(summarise(OUTPUTS[2:], 2.0, STATS))
    assert not [word for word in ("TTFT", "ITL", "Stages", "hit rate") if word in without]
    assert "Speculative" not in without
