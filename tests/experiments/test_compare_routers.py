"""The comparison of routers: fleets, traffic, loads, paired runs, verdicts, and tables of rows alone."""

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from configs import compare_routers as default_config
from experiments import (
    common,
    compare_routers,
    router_capacity,
    router_plan,
    router_report,
    router_runs,
    router_scenarios,
)
from experiments.router_report import Cell
from experiments.router_runs import Answer
from experiments.router_scenarios import Shape
from streamserve import parts
from streamserve.config import Config, from_mapping
from streamserve.flowguard import Objective, Route
from streamserve.flowguard.routers.picking import stateless
from streamserve.metrics import EngineStats
from streamserve.types import RequestMetrics
from tests import fakes

SMALL = {"duration_s": 0.05}
ROUTERS = ("least_outstanding", "round_robin")


def last_lane(num_lanes):
    """Route to the last lane that may take a request."""
    del num_lanes
    return stateless(lambda context, noise_A2: Route(int(np.flatnonzero(context.eligible_A)[-1])))


def values(**sections):
    """Give the sections of the config file, some fields changed."""
    config = default_config.get_config().to_dict()
    for name, fields in sections.items():
        config[name] = config[name] | fields
    return config


def plan_of(**sections):
    return router_plan.Plan(values(**sections), None)


def prepared(name, **sections) -> Config:
    plan = plan_of(**sections)
    return router_scenarios.prepare(name, plan.engine, plan.troubles, 10.0)


class FakeEngine:
    """Answers each prompt half a second after it came, on lane 0; in a closed loop eight a second."""

    max_model_len = 2560

    def __init__(self, config, log, *, compiles=""):
        self.config, self.log, self.router, self.compiled = config, log, "", 0
        self._compiles = compiles

    def use_router(self, name):
        self.router = name

    def use_policy(self, name):
        assert self.router, "the router comes first"
        self.policy = name

    def stream(self, prompts):
        prompts = list(prompts)
        self.log.append((self.config, "stream", self.router, len(prompts)))
        for index, prompt in enumerate(prompts):
            yield fakes.make_output(prompt.request_id, times=(100.0, 100.1, 100.0 + (index + 1) / 8))

    def serve(self, arrivals):
        arrivals = list(arrivals)
        self.log.append((self.config, "serve", self.router, arrivals))
        self.compiled += self.router == self._compiles
        for at_s, prompt in arrivals:
            error = "it is full" if prompt.request_id == "1" else None
            yield fakes.make_output(
                prompt.request_id, tokens=(1,) * 6, times=(100.0 + at_s, 100.5 + at_s, 101.0 + at_s), error=error
            )

    def stats(self):
        return EngineStats(compilations_after_warmup=self.compiled)

    def close(self):
        self.log.append((self.config, "close", self.router, 0))


@pytest.fixture
def compare(tmp_path):
    """Run a mode; gives exit code, header, rows, and what engines saw."""

    def run(mode="simulate", *, sections=None, compiles="", **given):
        log = []
        options = compare_routers.Options(
            **{
                "config": values(**(sections or {"simulation": SMALL})),
                "output": tmp_path / "rows.jsonl",
                "routers": ROUTERS,
                "repeats": 2,
                "command": ("--output=/home/me/rows.jsonl",),
                **given,
            }
        )
        code = compare_routers.run(options, mode, lambda config: FakeEngine(config, log, compiles=compiles))
        found = options.output.exists()
        lines = [json.loads(line) for line in options.output.read_text().splitlines()] if found else [{}]
        return code, lines[0], lines[1:], log

    return run


# --- scenarios


@pytest.mark.parametrize(
    ("name", "lanes"),
    [
        ("alike", {}),
        ("degraded", {"slowdown": (3.0, 1.0)}),
        ("stalled", {"transfer_delay_s": (1.2, 0.0)}),
        ("small", {"slots": (2, 8), "decode_pool_tokens": (2560, 20480)}),
        ("dies", {"down_from_s": (2.5, -1.0), "down_until_s": (6.0, -1.0)}),
        ("prefixes", {}),
        ("acceptance", {"acceptance": ("iid:0.9", "iid:0.3")}),
        ("mixed", {}),
    ],
)
def test_a_scenario_has_one_thing_wrong(name, lanes):
    config, base = prepared(name), plan_of().engine
    assert config.lanes == from_mapping(type(config.lanes), lanes)
    same = {"prefixes": "pipeserve", "acceptance": "speculation", "mixed": "routing"}.get(name)
    for section in ("model", "topology", "pipeserve", "speculation", "routing", "scheduler"):
        assert (getattr(config, section) == getattr(base, section)) == (section != same), section
    assert set(router_scenarios.SCENARIOS) == {*plan_of().compared.scenarios}


def test_what_scenarios_change_is_what_the_config_says():
    pipeserve = prepared("prefixes", troubles={"cache_tokens": 4096}).pipeserve
    assert (pipeserve.enable_prefix_caching, pipeserve.prefill_pool_tokens) == (True, 4096)
    assert prepared("mixed", troubles={"local_tokens": 64}).routing.local_prefill_tokens == 64
    assert prepared("acceptance").speculation.depths == (0, 1, 2, 4)
    assert prepared("acceptance", troubles={"policy": "fixed"}).speculation.depths == (4,)
    unbounded = {"pipeserve": {"decode_pool_tokens": None}}
    assert prepared("small", **unbounded).lanes.decode_pool_tokens == (2560, 8 * 2560)
    with pytest.raises(common.RunError, match=r"scenario 'small': model\.max_model_len or"):
        prepared("small", model={"max_model_len": None}, **unbounded)
    with pytest.raises(common.RunError, match="unknown scenario 'smal'"):
        prepared("smal")


# --- traffic


def drawn(name, *, seed=0, rate=500.0, **traffic):
    plan = plan_of(traffic=traffic)
    return plan.asks(name, 2560, rate=rate, duration_s=1.0, seed=seed)


def test_requests_depend_on_the_seed_alone_and_come_as_fast_as_the_rate_says():
    one, other = drawn("alike"), drawn("alike", seed=1)
    assert one == drawn("alike")
    assert one != other
    slow = drawn("alike", rate=250.0)
    assert len(one) == 2 * len(slow) == 500
    assert [ask.tokens for ask in slow] == [ask.tokens for ask in one[:250]], "a rate changes when, not who"
    assert [ask.at_s for ask in slow] == pytest.approx([2 * ask.at_s for ask in one[:250]])
    gaps_s = np.diff([ask.at_s for ask in drawn("alike", rate=4000.0)])
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(2**0.5, rel=0.1), "gamma of shape 0.5"


def test_lengths_have_their_medians_and_fit_the_model():
    lengths = router_scenarios.shapes("alike", plan_of().traffic, 2560, 3000, 0)
    assert np.median([shape.prompt for shape, _ in lengths]) == pytest.approx(384, rel=0.05)
    assert np.median([shape.output for shape, _ in lengths]) == pytest.approx(24, rel=0.05)
    assert np.std(np.log([shape.prompt for shape, _ in lengths])) == pytest.approx(0.6, rel=0.05)
    cut = router_scenarios.shapes("mixed", plan_of().traffic, 512, 300, 0)
    assert max(shape.prompt + shape.output for shape, _ in cut) <= 512
    talk = router_scenarios.shapes("acceptance", plan_of().traffic, 2560, 3000, 0)
    assert np.median([shape.output for shape, _ in talk]) == pytest.approx(96, rel=0.05)


def test_prompts_of_a_prefix_begin_alike_and_the_first_prefixes_are_asked_for_most():
    asks = drawn("prefixes", prefixes=4, prefix_tokens=128, prefix_skew=1.0)
    counts = collections.Counter(ask.tokens[:128] for ask in asks)
    shares = sorted((count / len(asks) for count in counts.values()), reverse=True)
    assert shares == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.05)
    assert len({ask.tokens for ask in asks}) == len(asks)
    assert len({ask.tokens[:64] for ask in drawn("alike")}) == 500


def test_long_prompts_stand_among_short_ones():
    lengths = [len(ask.tokens) for ask in drawn("mixed", long_share=0.2)]
    assert lengths.count(2048) / len(lengths) == pytest.approx(0.2, abs=0.05)
    assert np.median([length for length in lengths if length != 2048]) == pytest.approx(64, rel=0.15)


# --- capacity


def capacity(name="alike", shape=None, *, prefix=-1, duration_s=10.0, prefixes=1, **sections):
    """Estimate a fleet of two lanes whose requests all have one shape, a prefix in turn."""
    plan = plan_of(simulation={"num_pairs": 2}, **sections)
    simulation, _ = router_plan.simulated_fleet(plan, name)
    config = dataclasses.replace(simulation.config)
    sample = [(shape or Shape(512, 0, 25), prefix + turn) for turn in range(prefixes)]
    return router_capacity.capacity(
        config, simulation.lanes, simulation.costs, simulation.rounds, sample, duration_s=duration_s
    )


CALL_1024_S = 1e-3 + 1024e-5
# 25 tokens: six ticks after the first token, and one in which the slot changes hands; eight rows by "gpu_like".
SLOT_S = 7 * (2e-4 + 4 * 1e-3 * (1 + 8 / 128))


def test_a_lane_is_as_fast_as_what_is_slowest_for_a_request():
    assert capacity() == pytest.approx(2 / (CALL_1024_S / 2)), "prefill: half of a large call"
    assert capacity(shape=Shape(64, 0, 25)) == pytest.approx(2 * 8 / SLOT_S), "decode slots"
    slow_link = values()["simulation"] | {"costs": values()["simulation"]["costs"] | {"transfer_bytes_per_s": 1e9}}
    plan = plan_of(simulation=slow_link | {"num_pairs": 2})
    simulation, _ = router_plan.simulated_fleet(plan, "alike")
    way_s = 3e-4 + 512 * 16384 / 1e9
    bound = router_capacity.capacity(
        simulation.config,
        simulation.lanes,
        simulation.costs,
        simulation.rounds,
        [(Shape(512, 0, 25), -1)],
        duration_s=1.0,
    )
    assert bound == pytest.approx(2 / way_s)


def test_one_mesh_for_both_does_both():
    assert capacity(topology={"topology": "colocated"}) == pytest.approx(2 / (CALL_1024_S / 2 + SLOT_S / 8))


def test_what_is_wrong_with_a_lane_costs_what_it_should():
    whole = capacity()
    assert capacity("degraded") == pytest.approx(whole * (1 + 1 / 3) / 2)
    assert capacity("dies", duration_s=1.0) == pytest.approx(whole * (1 + 1 - 0.35) / 2)
    two_slots = 2 / (7 * (2e-4 + 4e-3 * (1 + 2 / 128)))
    assert capacity("small", Shape(64, 0, 25)) == pytest.approx(8 / SLOT_S + two_slots)
    few_pages = capacity("small", Shape(2048, 0, 25), troubles={"slots": 8})
    one_slot = 1 / (7 * (2e-4 + 4e-3 * (1 + 1 / 128)))
    assert few_pages == pytest.approx(1 / (CALL_1024_S * 2) + one_slot), "pages of one request"
    way_s = 3e-4 + 64 * 16384 / 1e10
    held_up = (8 + 2) / (SLOT_S + way_s + 0.048)
    assert capacity("stalled", Shape(64, 0, 25)) == pytest.approx(8 / SLOT_S + held_up)


def test_speculation_counts_at_its_best_depth():
    def slot_s(tokens, depth):
        tick_s = 2e-4 + 4e-3 * (1 + 8 * (depth + 1) / 128 + 0.06 * depth * (1 + 8 / 128))
        return (np.ceil(96 / (4 * tokens)) + 1) * tick_s

    good = min(slot_s(1 + sum(0.9**k for k in range(1, depth + 1)), depth) for depth in (0, 1, 2, 4))
    bad = min(slot_s(1 + sum(0.3**k for k in range(1, depth + 1)), depth) for depth in (0, 1, 2, 4))
    assert capacity("acceptance", Shape(64, 0, 97)) == pytest.approx(8 / good + 8 / bad)


def test_a_cache_spares_the_part_of_the_beginnings_that_it_holds():
    shape = Shape(1024 + 64, 1024, 25)
    pool = {"troubles": {"cache_tokens": 4096}}

    def prefill(tiles):
        return 2 / (CALL_1024_S / 16 * tiles)

    assert capacity("prefixes", shape, prefix=0, prefixes=16, **pool) == pytest.approx(prefill(17 - 16 / 4))
    assert capacity("prefixes", shape, prefix=0, prefixes=2, **pool) == pytest.approx(2 * 8 / SLOT_S), "all of them"
    assert capacity("alike", shape, prefix=0, prefixes=16) == pytest.approx(prefill(17)), "there is no cache"


def test_a_fleet_that_gets_more_than_it_can_answer_answers_what_was_estimated():
    plan = plan_of(simulation={"duration_s": 0.5})
    simulation, most = router_plan.simulated_fleet(plan, "alike")
    asks = plan.asks("alike", 2560, rate=2 * most, duration_s=0.5, seed=0)
    row = simulation.run("least_outstanding", asks, duration_s=0.5, seed=0)
    answered = row["answered"] / (row["answered"] * 27 / row["output_throughput"])  # 27 tokens in the mean
    assert answered == pytest.approx(most, rel=0.2)


# --- what came of a run


def answer(lane=0, ttft_s=0.1, tpot_s=0.01, tokens=11, *, arrival_s=0.0, pages=1, cached=0):
    first_s = arrival_s + ttft_s
    times = RequestMetrics(
        arrival_s=arrival_s,
        scheduled_s=arrival_s,
        prefilled_s=arrival_s,
        handed_off_s=arrival_s,
        transferred_s=arrival_s,
        first_token_s=first_s,
        finished_s=first_s + tpot_s * (tokens - 1),
        itls_s=(),
        lane=lane,
        cached_tokens=cached,
        num_preemptions=1,
        drafted_per_step=(),
        accepted_per_step=(),
        transfer_pages=pages,
        transfer_bytes=0,
    )
    return Answer(times, tokens)


def summary(answers, **given):
    told = {"asked": 8, "duration_s": 2.0, "objective": Objective(0.15, 0.02), "num_lanes": 3, "colocated": False}
    return router_runs.summarise(answers, **(told | given))


def test_a_request_is_good_within_both_limits():
    answers = [
        answer(),
        answer(lane=2, ttft_s=0.15),
        answer(ttft_s=0.16),
        answer(tpot_s=0.021),
        answer(lane=2, tokens=1, tpot_s=9.0, arrival_s=1.0, pages=0, cached=64),
    ]
    row = summary(answers)
    assert (row["requests"], row["answered"], row["good"]) == (8, 5, 3)
    assert (row["goodput"], row["attainment"]) == (1.5, 3 / 8)
    assert (row["p50_ttft_ms"], row["p99_ttft_ms"]) == pytest.approx((100, 159.6))
    assert row["p99_tpot_ms"] == pytest.approx(10 + 0.97 * 11), "of four: one token has no time after it"
    assert row["output_throughput"] == pytest.approx(45 / 1.1), "from the first arrival to the last token"
    assert (row["lane_share"], row["local_share"]) == ([0.6, 0.0, 0.4], 0.2)
    assert (row["cached_tokens"], row["preemptions"]) == (64, 5)
    assert summary(answers, colocated=True)["local_share"] == 0.0


def test_a_run_without_answers_has_no_times():
    row = summary([])
    assert (row["goodput"], row["p50_ttft_ms"], row["p99_tpot_ms"]) == (0.0, None, None)
    assert (row["output_throughput"], row["lane_share"]) == (0.0, [0.0, 0.0, 0.0])


# --- simulation


def test_every_router_meets_the_same_requests_in_every_cell(compare):
    given = {"simulation": SMALL, "comparison": {"scenarios": ("degraded", "mixed"), "loads": (0.4, 0.8)}}
    code, header, rows, _ = compare(sections=given)
    assert code == 0
    named = [(row["scenario"], row["load"], row["seed"], row["router"]) for row in rows]
    assert named == [
        (scenario, load, seed, router)
        for scenario in ("degraded", "mixed")
        for load in (0.4, 0.8)
        for seed in (0, 1)
        for router in ROUTERS
    ]
    for row in rows:
        assert row["requests"] == max(2, round(row["rate"] * 0.05)) == sum(row["ends"].values())
        assert sum(row["lane_share"]) == pytest.approx(1)
        assert all(0 <= busy <= 1 for busy in (*row["prefill_busy"], *row["decode_busy"]))
    rates = {row["scenario"]: row["rate"] / row["load"] for row in rows}
    plan = router_plan.Plan(values(**given), None)
    assert rates == pytest.approx({name: router_plan.simulated_fleet(plan, name)[1] for name in rates})
    assert (header["mode"], header["synthetic"]) == ("simulate", True)
    assert (header["ttft_s"], header["tpot_s"]) == (0.08, 0.004)
    assert compare(sections=given)[2] == rows, "the same seed gives the same rows"
    assert compare(sections=given, seed=1, repeats=1)[2] == [row for row in rows if row["seed"] == 1]


def test_a_router_of_ones_own_runs_beside_the_others(compare):
    name = f"{__name__}:last_lane"
    given = {"simulation": SMALL, "comparison": {"scenarios": ("alike",), "loads": (0.2,)}}
    _, _, rows, _ = compare(sections=given, routers=(name, "round_robin"), repeats=1)
    assert [row["router"] for row in rows] == [name, "round_robin"]
    assert rows[0]["lane_share"] == [0.0, 0.0, 1.0]


def test_all_routers_run_by_default():
    assert router_plan.Plan(values(), None).routers == tuple(sorted(parts.ROUTERS))


def test_flowguards_coefficients_and_the_limits_reach_the_simulation():
    plan = plan_of(routing={"flowguard": {"explore": 0.5}}, simulation={"ttft_s": 0.3, "tpot_s": 0.7, "num_pairs": 2})
    config = router_plan.simulated_fleet(plan, "alike")[0].config
    assert (config.routing.flowguard.explore, config.topology.num_pairs) == (0.5, 2)
    assert (config.routing.ttft_s, config.routing.tpot_s) == (0.3, 0.7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"routers": ("flowguart",)}, "unknown router 'flowguart'"),
        ({"sections": {"comparison": {"scenarios": ("alik",)}}}, "unknown scenario 'alik'"),
        ({"sections": {"comparison": {"loads": (0.5, 0.0)}}}, "positive loads"),
        ({"sections": {"simulation": {"rounds": "x"}}}, "unknown cost shape 'x'"),
        ({"sections": {"simulation": {"costs": {"token_bytes": 1}}}}, "config section 'simulation'"),
        ({"sections": {"simulation": {"num_pair": 2}}}, "config has no field 'simulation.num_pair'"),
        ({"sections": {"speculation": {"method": "ngram"}}}, "must be 'none' or 'synthetic'"),
        ({"sections": {"troubles": {"slowdown": 0.5}}}, "scenario 'degraded': lanes.slowdown must be at least 1"),
        ({"sections": {"model": {"max_model_len": None}}}, "needs model.max_model_len"),
    ],
)
def test_what_cannot_run_is_one_line_and_code_2(compare, capsys, given, message):
    assert compare(**given)[0] == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_missing_folder_is_told(compare, tmp_path, capsys):
    assert compare(output=tmp_path / "none" / "rows.jsonl")[0] == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_header_names_no_folder_of_the_machine(compare):
    given = {"simulation": SMALL, "comparison": {"scenarios": ("alike",), "loads": (0.3,)}}
    text = json.dumps(compare(sections=given, repeats=1)[1])
    assert "/home" not in text
    assert json.loads(text)["command"].endswith("--output=rows.jsonl")


def test_flags_become_options():
    read = flags.FlagValues()
    compare_routers.define_flags(read)
    arguments = ["compare", "--routers=flowguard,a.b:c", "--scenarios=dies", "--loads=0.4,2", "--repeats=7"]
    common.parse_flags(arguments, default_config=compare_routers.DEFAULT_CONFIG, values=read)
    options = compare_routers.read_options(read, arguments[1:])
    assert (options.routers, options.repeats) == (("flowguard", "a.b:c"), 7)
    compared = router_plan.Plan(options.config, ()).compared
    assert (compared.scenarios, compared.loads) == (("dies",), (0.4, 2.0))
    read.loads = ["high"]
    with pytest.raises(common.RunError, match="--loads must be numbers"):
        compare_routers.read_options(read, [])


# --- on an engine


def test_an_engine_runs_every_router_on_the_same_arrivals_in_interleaved_repeats(compare):
    given = {
        "comparison": {"scenarios": ("stalled", "mixed"), "loads": (0.5, 1.0)},
        "engine": {"duration_s": 4.0, "capacity_requests": 10},
    }
    routers = ("flowguard", "least_outstanding", "random", "round_robin")
    code, header, rows, log = compare("engine", sections=given, repeats=2, routers=routers)
    assert (code, header["mode"], header["synthetic"]) == (0, "engine", False)
    assert (header["ttft_s"], header["tpot_s"]) == (2.0, 0.2)
    assert [what for _, what, _, _ in log].count("close") == 2
    configs = list(dict.fromkeys(id(config) for config, *_ in log))
    assert len(configs) == 2, "an engine a scenario"
    assert log[0][0].lanes.transfer_delay_s == (1.2, 0.0)
    assert log[0][1:] == log[1][1:] == ("stream", compare_routers.CALIBRATION, 10)
    assert {row["rate"] / row["load"] for row in rows} == {8.0}, "what it was measured to answer"
    served = [(router, arrivals) for _, what, router, arrivals in log if what == "serve"]
    assert len(served) == len(rows) == 2 * 2 * 2 * 4
    orders = [[router for router, _ in served[first : first + 4]] for first in range(0, len(served), 4)]
    assert all(sorted(order) == list(routers) for order in orders)
    assert orders[0] == orders[1] == orders[2][::-1] == orders[3][::-1], "backwards in the second repeat"
    for first in range(0, len(served), 4):
        assert all(arrivals == served[first][1] for _, arrivals in served[first : first + 4])
    assert served[0][1] != served[8][1], "each repeat has requests of its own"
    prompt = served[0][1][0][1]
    assert (prompt.params.ignore_eos, prompt.params.temperature) == (True, 0.0)


def test_the_header_leaves_the_engine_as_many_host_devices_as_its_pairs_need(tmp_path):
    # In a process of its own: this one has its devices already.
    code = """
import pathlib, sys
import jax
from configs import compare_routers as default_config
from experiments import compare_routers

def make_engine(config):
    sys.exit(10 * config.topology.num_pairs + len(jax.devices()))

values = default_config.get_config().to_dict()
options = compare_routers.Options(config=values, output=pathlib.Path(sys.argv[1]))
compare_routers.compare_on_engine(options, make_engine)
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], cwd=root, check=False)
    assert done.returncode == 24, "two pairs of two meshes, and a device for each"


def test_rows_of_an_engine_say_what_failed_and_compiled(compare, capsys):
    given = {
        "comparison": {"scenarios": ("alike",), "loads": (1.0,)},
        "engine": {"duration_s": 2.0, "capacity_requests": 4},
    }
    code, _, rows, _ = compare("engine", sections=given, repeats=1, compiles="round_robin")
    assert code == 1
    assert "programs were compiled" in capsys.readouterr().err
    row = next(row for row in rows if row["router"] == "round_robin")
    assert (row["requests"], row["answered"], row["good"]) == (16, 15, 15)
    assert (row["p50_ttft_ms"], row["p50_tpot_ms"]) == pytest.approx((500, 100))
    assert [one["compilations_after_warmup"] for one in rows] == [int(one is row) for one in rows]


# --- report


def row(scenario, load, seed, router, goodput, **more):
    told = {
        "rate": 10.0,
        "attainment": goodput / 10,
        "p50_ttft_ms": 5.0,
        "p99_ttft_ms": None,
        "p50_tpot_ms": 1.0,
        "p99_tpot_ms": 2.0,
        "output_throughput": 100.0,
        "lane_share": [0.25, 0.75],
        "local_share": 0.0,
    }
    named = {"scenario": scenario, "load": load, "seed": seed, "router": router, "goodput": goodput}
    return told | named | more


HEADER = {
    "kind": "header",
    "mode": "simulate",
    "synthetic": True,
    "command": "python",
    "seed": 0,
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "platform": "here",
    "ttft_s": 0.1,
    "tpot_s": 0.004,
}


def cell_of(goodput_by_router) -> Cell:
    rows = [
        row("alike", 0.5, seed, name, goodput)
        for name, goodputs in goodput_by_router.items()
        for seed, goodput in enumerate(goodputs)
    ]
    (cell,) = router_report.judge(rows)
    return cell


def test_routers_stand_by_their_mean_goodput_and_are_compared_with_the_first():
    cell = cell_of({"a": [4.0, 6.0], "b": [8.0, 8.0], "flowguard": [7.0, 7.0]})
    assert [standing.router for standing in cell.standings] == ["b", "flowguard", "a"]
    assert [standing.goodput.value for standing in cell.standings] == [8.0, 7.0, 5.0]
    assert cell.standings[2].to_best == pytest.approx((5 / 8, 4 / 8, 6 / 8))
    assert cell.standings[1].to_best == pytest.approx((7 / 8, 7 / 8, 7 / 8)), "it lost the same in every repeat"


def test_what_strikes_all_routers_alike_leaves_no_interval():
    cell = cell_of({"a": [10.0, 1.0, 5.0], "flowguard": [8.0, 0.8, 4.0]})
    assert cell.standings[1].to_best == pytest.approx((0.8, 0.8, 0.8))
    assert cell.standings[1].goodput.low < 2 < 6 < cell.standings[1].goodput.high


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ([10.0, 12.0], "`flowguard` is first."),
        ([9.0, 10.5], "`flowguard` is within 3% of the first, `b`: 0.975 [0.900, 1.050]."),
        ([9.0, 9.0], "`flowguard` loses 10.0% to `b`: 0.900 [0.900, 0.900]."),
        (
            [8.0, 10.0],
            "`flowguard` loses 10.0% to `b`: 0.900 [0.800, 1.000]. These repeats do not rule out that it is within.",
        ),
    ],
)
def test_the_verdict_says_first_or_near_or_by_how_much_it_lost(own, text):
    assert router_report.verdict(cell_of({"b": [10.0, 10.0], "flowguard": own})) == text


def test_one_repeat_has_no_interval_and_nothing_good_is_no_loss():
    cell = cell_of({"a": [0.0], "flowguard": [0.0]})
    assert router_report.verdict(cell, "a") == "`a` is first."
    assert router_report.verdict(cell) == "`flowguard` is within 3% of the first, `a`: 1.000."
    assert router_report.verdict(cell, "b") == "`b` did not run."


def test_a_run_that_was_cut_short_is_judged_by_the_repeats_that_all_have():
    rows = [row("alike", 0.5, seed, name, 1.0 + seed) for seed in (0, 1) for name in ("a", "b")]
    (cell,) = router_report.judge(rows[:-1])
    assert cell.repeats == 1
    assert cell.standings[0].goodput.value == 1.0
    cells = router_report.judge([*rows, row("dies", 0.5, 0, "a", 1.0), row("dies", 0.5, 1, "b", 1.0)])
    assert [(cell.scenario, cell.repeats) for cell in cells] == [("alike", 2)]


def test_a_report_is_made_of_rows_alone_and_always_the_same(tmp_path):
    rows = [row("alike", 0.5, seed, name, 5.0) for seed in (0, 1) for name in ("a", "flowguard")]
    rows += [row("dies", 1.1, seed, name, 5.0 + (name == "a")) for seed in (0, 1) for name in ("a", "flowguard")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [HEADER, *rows])) + "\n")
    texts = []
    for name in ("one.md", "two.md"):
        assert router_report.report(path, tmp_path / name) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    lines = texts[0].splitlines()
    assert lines[0] == "# SYNTHETIC. Routers, simulate"
    assert "| `a` | 1.000 | 1.000 | 1.000 | 1.000 |" in lines
    assert "| `flowguard` | 0.917 | 0.833 | 1.000 | 0.833 |" in lines
    assert "`flowguard` loses 16.7% to `a`: 0.833 [0.833, 0.833]." in lines
    assert "100 ms to the first token, 4 ms a token" in texts[0]
    cells = next(line for line in lines if line.startswith("| `flowguard` | 5.0 ["))
    assert "| 5/- | 1/2 | 100 | 25 75 | 0 |" in cells


@pytest.mark.parametrize("text", ["", "{}\n{}\n", '{"kind": "header"}\n', '{"kind": "header"}\n{}\n', "{broken"])
def test_other_files_are_refused(tmp_path, capsys, text):
    (tmp_path / "rows.jsonl").write_text(text)
    assert router_report.report(tmp_path / "rows.jsonl", tmp_path / "table.md") == 2
    assert "rows.jsonl" in capsys.readouterr().err
