"""The book on prompts that are being computed: who hears that a call has ended."""

import types
from unittest import mock

import pytest

from streamserve.lane_counters import LaneCounters
from streamserve.lane_prompts import LanePrompts


@pytest.mark.parametrize(
    ("then", "hears"), [("stays", True), ("is handed off", True), ("leaves", False), ("leaves and comes back", False)]
)
def test_the_end_of_a_call_is_told_to_those_whose_prompts_it_computed(then, hears):
    task, running = types.SimpleNamespace(request_id="a"), mock.MagicMock(request_id="a")
    call = types.SimpleNamespace(local=False, parts=[(task, 1)], done=[task])
    sizes = types.SimpleNamespace(page_size=8)
    pair = types.SimpleNamespace(sizes=sizes, prefill=lambda: call, prefill_locally=lambda: None, is_computed=bool)
    deaf = types.SimpleNamespace(called=lambda *told: None, scheduled=lambda *told: None)
    prompts = LanePrompts(pair, LaneCounters(), deaf, deaf)
    prompts.tasks["a"], on_lane = task, {"a": running}
    assert prompts.dispatch(0.0, 1, on_lane)
    if then != "stays":
        prompts.leave("a")
    if then == "leaves":
        del on_lane["a"]
    if then == "leaves and comes back":
        prompts.tasks["a"] = types.SimpleNamespace(request_id="a")
    prompts.note_computed(1.0, on_lane)
    assert running.stamps.prefilled.called == hears
