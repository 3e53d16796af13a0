"""The summary of a run, against numbers worked out by hand."""

import json

import pytest

from streamserve.metrics import EngineStats, Tally, format_table, summarise
from tests import fakes

STATS = EngineStats(ticks=9, kv_transfers=2, kv_transfer_bytes=20, compilations_after_warmup=0, warmup_s=3.0)
OUTPUTS = [
    # arrival, first token, end: TTFT 100 ms, e2e 300 ms, TPOT 100 ms; (3 + 3) / 0.3 = 20 tokens/s
    fakes.make_output("a", times=(1.0, 1.1, 1.3), drafted=(3, 0, 3), accepted=(3, 0, 1)),
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
    without = format_table(summarise(OUTPUTS[2:], 2.0, STATS))
    assert "TTFT" not in without
    assert "Speculative" not in without
