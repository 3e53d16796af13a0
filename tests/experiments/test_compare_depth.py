"""The comparison of depth policies: fair orders, exact simulations, intervals, refusals, and a report of rows alone."""

import json
import types

import numpy as np
import pytest
from absl import flags

from experiments import (
    common,
    compare_depth,
    depth_arms,
    depth_options,
    depth_plots,
    depth_report,
    depth_verdicts,
    paper_rows,
    router_report,
)
from experiments.depth_verdicts import Panel
from streamserve.metrics import EngineStats
from streamserve.specustream import DecisionLog, DepthContext, Plan, StepStats, nominal
from tests import fakes

CONFIG = {
    "pipeserve": {"enable_prefix_caching": False, "max_num_seqs": 2},
    "speculation": {
        "method": "draft_model",
        "model": "bundled:draft",
        "policy": "specustream",
        "max_depth": 2,
        "tiers": (0, 2),
    },
    "sampling": {"max_tokens": 8, "temperature": 0.0},
    "simulation": {
        "cells": ("iid:0.2", "regimes:0.9,0.2@10"),
        "costs": ("cpu_like",),
        "batches": (2,),
        "tiers": (0, 1, 4),
        "ticks": 40,
        "rounds": 2,
    },
}
SYNTHETIC = CONFIG["speculation"] | {"method": "synthetic", "acceptance": "iid:0.7"}


class FakeController:
    """Plans one depth, and each call takes a whole second of the fake clock."""

    def __init__(self, engine):
        self._engine = engine

    def plan(self, load, now_s):
        self._engine.ticks += 1
        self._engine.now_s += 1.0
        return types.SimpleNamespace(tier=self._engine.depth)

    def learn(self, ticket, output, seconds, now_s):
        self._engine.now_s += 2.0


class FakeEngine:
    """Answers each prompt with its own tokens, in time that depends on the arm; `ill` arms misbehave as told."""

    def __init__(self, *, seconds=lambda arm, run: 4.0, ill=None):
        self.specustreams = (FakeController(self),)
        self.now_s, self.ticks, self.depth, self.runs, self.seen = 0.0, 0, 0, [], []
        self._seconds, self._ill, self._compiled = seconds, ill or {}, 0

    def use_policy(self, name):
        self.runs.append(name)
        self.depth = 0 if name == "fixed:0" else 2

    def stream(self, prompts):
        prompts, ill = list(prompts), self._ill.get(self.runs[-1])
        self.seen.append([(prompt.text, prompt.params) for prompt in prompts])
        ticket = self.specustreams[0].plan(None, 0.0)
        self.specustreams[0].learn(ticket, None, 10.0, 0.0)
        self.now_s += self._seconds(self.runs[-1], len(self.runs)) - 3.0  # the controller took three
        self._compiled += ill == "compiles"
        for index, prompt in reversed(list(enumerate(prompts))):
            tokens = (7, 8, 9, index + (ill == "differs" and index == 0))
            drafted = () if ill == "drafts nothing" or not self.depth else (2, 2)
            yield fakes.make_output(
                prompt.request_id,
                tokens=tokens,
                times=(0.0, 0.4 * (index + 1), 0.4 * (index + 1)),
                drafted=drafted,
                accepted=(2, 0) if drafted else (),
                error="it broke" if ill == "fails" and index == 0 else None,
            )

    def stats(self):
        return EngineStats(ticks=self.ticks, compilations_after_warmup=self._compiled)

    def close(self):
        self.closed = True


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run a mode with a fake engine and its clock; returns exit code, header and rows."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n\n{"question_id": 2, "turns": ["two", "later"]}\n')
    init = depth_arms.Bench.__init__
    monkeypatch.setattr(depth_arms.Bench, "__init__", lambda self, engine: init(self, engine, lambda: engine.now_s))

    def run(mode="engine", *, engine=None, config=None, **given):
        options = depth_options.Options(
            **{
                "config": CONFIG | (config or {}),
                "output": tmp_path / "rows.jsonl",
                "policies": ("goodput", "specustream"),
                "workloads": (("a", tmp_path / "in.jsonl"), ("b", tmp_path / "in.jsonl")),
                "command": ("--output=/home/me/rows.jsonl", "--workload=a=/data/set/in.jsonl", "--costs=~/c.json"),
                "repeats": 2,
                **given,
            }
        )
        code = compare_depth.run(options, mode, lambda config: engine or FakeEngine())
        lines = (
            [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else [{}]
        )
        return code, lines[0], lines[1:]

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Make empty files of figures: drawing takes a second each."""
    monkeypatch.setattr(depth_plots.figure.Figure, "savefig", lambda self, path, **_: path.touch())


# --- simulation


def test_a_simulation_has_a_row_for_every_arm_and_is_exact(compare, capsys):
    code, header, rows = compare("simulate", policies=("oracle", "ema_tiers"))
    arms = ["fixed:0", "fixed:1", "fixed:4", "oracle", "ema_tiers"]
    assert code == 0
    assert [(row["cell"], row["seed"], row["policy"]) for row in rows] == [
        (cell, seed, arm) for cell in CONFIG["simulation"]["cells"] for seed in (0, 1) for arm in arms
    ]
    assert compare("simulate", policies=("oracle", "ema_tiers"))[2] == rows, "the same seed gives the same rows"
    assert (header["mode"], header["synthetic"], header["seed"]) == ("simulate", True, 0)
    shown = capsys.readouterr().out
    assert "# SYNTHETIC" in shown
    assert "cpu_like (SYNTHETIC)" in shown
    assert all(row["synthetic"] is True for row in rows)


def test_ratios_of_a_simulation_are_those_of_its_own_rows(compare):
    _, _, rows = compare("simulate", policies=("oracle",))
    by = {(row["cell"], row["seed"], row["policy"]): row for row in rows}
    for row in rows:
        others = [by[row["cell"], row["seed"], f"fixed:{depth}"]["goodput"] for depth in (0, 1, 4)]
        assert row["ratio_to_plain"] == row["goodput"] / others[0]
        assert row["ratio_to_best_fixed"] == row["goodput"] / others[(0, 1, 4).index(row["best_fixed"])]
        assert row["ratio_to_mix_fixed"] == row["goodput"] / others[(0, 1, 4).index(row["mix_fixed"])]
        assert sum(row["shares"].values()) == pytest.approx(1)
        if row["policy"].startswith("fixed:"):
            assert (row["switches"], row["shares"][row["policy"].removeprefix("fixed:")]) == (0, 1.0)
        if row["policy"] == "oracle":
            assert row["regret"] == pytest.approx(0, abs=1e-9)
            assert row["ratio_to_best_fixed"] >= 1 - 1e-9
    assert any(row["switches"] for row in rows if row["policy"] == "oracle"), "the regimes change"
    lucks = [by["regimes:0.9,0.2@10", seed, "fixed:4"]["goodput"] for seed in (0, 1)]
    assert lucks[0] != lucks[1], "each seed has its own luck"


def test_the_best_depth_of_a_mix_needs_the_least_time_for_as_many_tokens():
    def row(cell, arm, goodput, seed):
        return {"cell": cell, "batch": 1, "seed": seed, "policy": arm, "goodput": goodput}

    slow = [row("slow", "fixed:0", 10.0, seed) for seed in (0, 1)] + [
        row("slow", "fixed:4", 4.0, seed) for seed in (0, 1)
    ]
    fast = [row("fast", "fixed:0", 100.0, seed) for seed in (0, 1)]
    fast += [row("fast", "fixed:4", goodput, seed) for seed, goodput in enumerate((90.0, 400.0))]
    done = list(compare_depth.compared([*slow, *fast], (0, 4)))
    assert {one["mix_fixed"] for one in done} == {0}, "0.11 s for a token of each, against 0.25 s: no mean of goodputs"
    assert {(one["cell"], one["best_fixed"]) for one in done} == {("slow", 0), ("fast", 4)}, "by the mean over seeds"
    assert done[-2]["ratio_to_best_fixed"] == 1.0
    assert done[0]["ratio_to_best_fixed"] == 1.0
    assert done[4]["ratio_to_best_fixed"] == 100 / 90


def test_a_measured_table_takes_the_place_of_shapes(compare, tmp_path):
    (tmp_path / "mine.json").write_text(nominal((0, 2), (1, 4)).to_json())
    _, _, rows = compare("simulate", costs=tmp_path / "mine.json", policies=("goodput",))
    assert {(row["cost"], row["policy"]) for row in rows} == {("mine", a) for a in ("fixed:0", "fixed:2", "goodput")}
    plain = rows[0]["goodput"]
    assert plain == pytest.approx(2 / 1e-3), "two rows, a token each a millisecond"


def test_cells_from_files_are_named_without_folders_and_one_seed_has_no_interval(compare, tmp_path, capsys):
    (tmp_path / "luck.jsonl").write_text('{"acceptance": [0.5]}\n')
    simulation = CONFIG["simulation"] | {"cells": (f"replay:{tmp_path}/luck.jsonl",)}
    _, header, rows = compare("simulate", config={"simulation": simulation}, repeats=1, policies=("goodput",))
    assert {row["cell"] for row in rows} == {"replay:luck.jsonl"}
    assert header["config"]["simulation"]["cells"] == ["replay:luck.jsonl"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| fixed", "| goodput"))]
    assert len(lines) == len(rows) == 4
    assert not any("[" in line for line in lines)


def test_coefficients_of_the_config_reach_the_simulated_policy(compare):
    goodputs = []
    for explore in (0.0, 1.0):
        speculation = CONFIG["speculation"] | {"specustream": {"explore": explore}}
        _, _, rows = compare("simulate", config={"speculation": speculation}, policies=("specustream",), repeats=1)
        goodputs.append([row["goodput"] for row in rows if row["policy"] == "specustream"])
    assert goodputs[0] != goodputs[1]


def test_a_policy_that_stops_by_confidence_is_marked(compare, capsys):
    _, _, rows = compare("simulate", policies=("confidence_stop", "goodput"))
    assert {row["policy"] for row in rows if row["stops"]} == {"confidence_stop"}
    shown = capsys.readouterr().out
    assert "confidence_stop (*)" in shown
    assert "goodput (*)" not in shown


def test_made_up_machines_are_what_their_formula_says():
    cost_A, draft_A = depth_arms.made_up_costs("cpu_like", (0, 4), (1, 8)).lookup(8, 100.0)
    np.testing.assert_allclose(cost_A, [2e-3, 7.2e-3])
    np.testing.assert_allclose(draft_A, [0.0, 1.2e-3])


# --- engine


def test_all_arms_of_a_repeat_run_before_the_next_one_and_orders_are_mirrored(compare):
    engine = FakeEngine()
    code, _, rows = compare(engine=engine, repeats=4)
    arms = ["fixed:0", "fixed:2", "goodput", "specustream"]
    assert code == 0
    assert engine.runs[:4] == arms, "a turn that does not count"
    turns = [engine.runs[begin : begin + 4] for begin in range(4, len(engine.runs), 4)]
    assert len(turns) == 4 * 2
    assert all(sorted(turn) == arms for turn in turns)
    assert turns[2:4] == [turns[0][::-1], turns[1][::-1]], "what slows down steadily favours none"
    assert len({tuple(turn) for turn in turns}) > 4, "the next two repeats are drawn anew, workload by workload"
    where = [(row["repeat"], row["workload"]) for row in rows]
    assert where == sorted(where)
    assert [row["position"] for row in rows[:4]] == [0, 1, 2, 3]
    assert [row["arm"] for row in rows[:4]] == turns[0]


def test_arms_are_given_the_same_prompts_and_seeds(compare):
    engine = FakeEngine()
    compare(engine=engine, max_tokens=3, seed=5)
    assert all(seen == engine.seen[0] for seen in engine.seen)
    assert [(text, params.max_tokens, params.seed) for text, params in engine.seen[0]] == [("one", 3, 5), ("two", 3, 6)]


def test_a_row_says_what_an_arm_did_and_what_its_controller_cost(compare):
    _, header, rows = compare(engine=FakeEngine(seconds=lambda arm, run: 8.0))
    row = next(row for row in rows if row["arm"] == "goodput")
    expected = {
        "kind": "engine",
        "synthetic": False,
        "duration": 8.0,
        "total_output_tokens": 8,
        "output_throughput": 1.0,
        "spec_decode_acceptance_rate": 50.0,
        "spec_decode_acceptance_length": 2.0,
        "spec_decode_per_position_acceptance_rates": [0.5, 0.5],
        "mean_depth": 2.0,
        "verify_steps": 4,
        "ticks": 1,
        "compilations_after_warmup": 0,
        "same_as_plain": 2,
        "prompts": 2,
        "plan_us": 1e6,
        "learn_us": 2e6,
        "controller_share": 0.3,
        "shares": {"2": 1.0},
    }
    assert {name: row[name] for name in expected} == expected
    assert row["prompt_tokens"] == [4, 4]
    assert row["prompt_seconds"] == pytest.approx([8 / 3, 16 / 3]), "the wall time, by how long each was served"
    assert len({row["tokens_sha256"] for row in rows}) == 1
    assert header["concurrency"] == 2


def test_the_header_names_the_machine_and_no_folder_of_it(compare):
    text = json.dumps(compare(config={"compilation_cache_dir": "/home/me/cache"})[1])
    header = json.loads(text)
    assert {"versions", "platform", "devices", "git", "command", "config", "seed"} <= header.keys()
    assert header["command"].endswith("--output=rows.jsonl --workload=a=in.jsonl --costs=c.json")
    assert header["config"]["compilation_cache_dir"] == "cache"
    assert header["config"]["speculation"]["model"] == "bundled:draft"
    assert "/home" not in text
    assert "/data" not in text


@pytest.mark.parametrize(
    ("ill", "reason"),
    [
        ("differs", "1 prompts of a run differ from plain decoding, allowed are 0"),
        ("drafts nothing", "it drafted nothing"),
        ("compiles", "2 programs were compiled while it ran"),
        ("fails", "2 prompts failed"),
    ],
)
def test_an_arm_that_cannot_be_compared_gets_no_speed_up(compare, capsys, ill, reason):
    code, _, rows = compare(engine=FakeEngine(ill={"goodput": ill}))
    shown = capsys.readouterr()
    assert code == 1
    assert f"refused: a, goodput: {reason}" in shown.err
    lines = [line for line in shown.out.splitlines() if line.startswith("| goodput")]
    assert len(lines) == 3
    assert all(line.count("refused") == 2 for line in lines), "both workloads, and all together"
    assert all("refused" not in line for line in shown.out.splitlines() if line.startswith("| specustream"))
    assert len(rows) == 2 * 2 * 4, "the rows are kept"


def test_nothing_is_compared_with_a_plain_run_that_is_not_sound(compare, capsys):
    code, _, _ = compare(engine=FakeEngine(ill={"fixed:0": "compiles"}))
    shown = capsys.readouterr()
    assert code == 1
    assert shown.err.count("plain decoding cannot be compared with: ") == 3 * 4
    assert shown.out.count("No fixed depth can be compared.") == 3


def test_a_run_that_was_cut_short_is_judged_by_its_whole_repeats(compare):
    _, header, rows = compare(repeats=2)
    verdicts = depth_verdicts.judge(header, rows[:-3])
    repeats = {v.group: {row["repeat"] for row in v.rows} for v in verdicts}
    assert repeats == {"a": {0, 1}, "b": {0}, depth_verdicts.MIX: {0}}
    without = [row for row in rows if row["arm"] != "fixed:0"]
    with pytest.raises(common.RunError, match="no run of fixed:0"):
        depth_verdicts.judge(header, without)


def test_so_many_prompts_may_differ_as_is_said(compare):
    assert compare(engine=FakeEngine(ill={"goodput": "differs"}), max_different=1)[0] == 0


@pytest.mark.parametrize("sections", [{"speculation": SYNTHETIC}, {"sampling": {"temperature": 1.0}}])
def test_tokens_are_compared_only_where_they_must_agree(compare, capsys, sections):
    code, header, rows = compare(engine=FakeEngine(ill={"goodput": "differs"}), config=sections)
    synthetic = "speculation" in sections
    assert (code, header["compares_tokens"], header["synthetic"]) == (0, False, synthetic)
    assert {(row["same_as_plain"], row["synthetic"]) for row in rows} == {(None, synthetic)}
    shown = capsys.readouterr().out
    assert ("## a (SYNTHETIC)" in shown) == ("# SYNTHETIC." in shown) == synthetic


def test_the_oracle_runs_where_acceptance_is_known_and_nowhere_else():
    assert "oracle" in compare_depth.list_arms(None, (0, 2), synthetic=True)
    assert "oracle" not in compare_depth.list_arms(None, (0, 2), synthetic=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policies": ("oracle",)}, "the oracle needs speculation.method='synthetic'"),
        ({"policies": ("goodputt",)}, "unknown policy 'goodputt'"),
        ({"config": {"pipeserve": {}}}, "a prefix cache favours the arms that run later"),
        (
            {"config": {"speculation": CONFIG["speculation"] | {"tiers": (1, 2)}}},
            "depth 0, plain decoding, must be among",
        ),
        ({"config": {"speculatoin": {}}}, "config has no field 'speculatoin'"),
        ({"concurrency": 3, "config": {"topology": {"num_pairs": 2}}}, "concurrency=3 must divide over 2 pairs"),
        (
            {"mode": "simulate", "config": {"simulation": CONFIG["simulation"] | {"cells": ("idd:1",)}}},
            "unknown acceptance",
        ),
        (
            {"mode": "simulate", "config": {"simulation": CONFIG["simulation"] | {"costs": ("x",)}}},
            "unknown cost shape 'x'",
        ),
    ],
)
def test_what_cannot_run_is_one_line_and_code_2(compare, capsys, given, message):
    assert compare(**given)[0] == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_flags_become_options(tmp_path):
    values = flags.FlagValues()
    depth_options.define_flags(values)
    arguments = [
        "compare",
        "--workload=a=x.jsonl",
        "--workload=b=y=z.jsonl",
        "--policies=goodput,dsde",
        "--max_different=2",
    ]
    common.parse_flags(arguments, default_config=compare_depth.DEFAULT_CONFIG, values=values)
    options = depth_options.read_options(values, arguments[1:])
    assert [(name, str(path)) for name, path in options.workloads] == [("a", "x.jsonl"), ("b", "y=z.jsonl")]
    assert (options.policies, options.max_different, options.num_prompts) == (("goodput", "dsde"), 2, None)
    config, _ = compare_depth.engine_config(options)
    assert config.speculation.depths == (0, 1, 2, 4, 6, 8)
    values.workload = ["a=x", "a=y"]
    with pytest.raises(common.RunError, match="names that differ"):
        depth_options.read_options(values, [])


@pytest.mark.parametrize("line", ["", "{}", '{"prompt": 3}', '{"turns": []}', "{broken"])
def test_a_workload_without_prompts_is_refused(tmp_path, line):
    (tmp_path / "w.jsonl").write_text(line + "\n")
    with pytest.raises(common.RunError, match=r"w\.jsonl"):
        compare_depth.read_workload(tmp_path / "w.jsonl")


@pytest.mark.parametrize(
    "read", [compare_depth.read_workload, depth_verdicts.read_rows, router_report.read_rows, paper_rows.read_study]
)
def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path, read):
    (tmp_path / "w.jsonl").write_text('{"kind": "header"}\n{"prompt": "a\u2028b"}\n\n{"prompt": "c", broken}\n')
    reason = "line 4: not valid JSON: Expecting property name enclosed in double quotes at column 17"
    with pytest.raises(common.RunError, match=rf"^cannot read .*w\.jsonl': {reason}$"):
        read(tmp_path / "w.jsonl")


# --- intervals


def value(interval):
    assert interval is not None
    return interval.value


def panel(tokens, seconds):
    return Panel(np.array(tokens, np.float64), np.array(seconds, np.float64))


def test_a_ratio_is_of_all_tokens_over_all_seconds():
    over, under = panel([[10, 30]], [[1, 1]]), panel([[10, 30]], [[4, 4]])
    assert depth_verdicts.ratio(over, under).value == 4.0
    uneven = depth_verdicts.ratio(panel([[10, 30]], [[1, 3]]), panel([[10, 30]], [[2, 3]]))
    assert uneven.value == pytest.approx((40 / 4) / (40 / 5)), "no mean of the prompts' ratios"


def test_what_slows_both_arms_down_alike_leaves_no_interval():
    slowed = panel([[8, 8, 8]] * 4, np.outer([1, 2, 3, 9], [1, 5, 2]))
    twice = slowed._replace(seconds_RP=slowed.seconds_RP / 2)
    assert depth_verdicts.ratio(twice, slowed) == pytest.approx((2.0, 2.0, 2.0))


def test_an_interval_is_that_of_drawing_repeats_and_prompts_again():
    over = panel([[1], [1]], [[1], [0.5]])  # two repeats: ratios 1 and 2, together 2 / 1.5
    interval = depth_verdicts.ratio(over, panel([[1], [1]], [[1], [1]]))
    assert interval == pytest.approx((4 / 3, 1.0, 2.0)), "a quarter of the draws has the same repeat twice"
    across = depth_verdicts.ratio(panel([[1, 1]], [[1, 0.5]]), panel([[1, 1]], [[1, 1]]))
    assert across == pytest.approx((4 / 3, 1.0, 2.0)), "prompts are drawn, too"
    many = depth_verdicts.ratio(panel(np.ones((16, 1)), [[1], [0.5]] * 8), panel(np.ones((16, 1)), np.ones((16, 1))))
    assert 1.1 < many.low < 4 / 3 < many.high < 1.7, "more repeats say more"


def test_one_measurement_has_no_interval():
    interval = depth_verdicts.ratio(panel([[3]], [[1]]), panel([[3]], [[2]]))
    assert str(interval) == "2.000"
    assert np.isnan(interval.low)


def test_the_best_fixed_depth_is_chosen_on_other_repeats_than_it_is_judged_on(compare, capsys):
    def seconds(
        arm, run
    ):  # the first four runs do not count; then repeats of eight, of which depth 2 wins the even ones
        even = (run - 5) // 8 % 2 == 0
        return {"fixed:2": 4.0 if even else 16.0}.get(arm, 8.0)

    _, header, rows = compare(engine=FakeEngine(seconds=seconds), repeats=4)
    verdicts = {(v.group, v.arm): v for v in depth_verdicts.judge(header, rows)}
    assert verdicts["a", "goodput"].best == "fixed:2"
    assert value(verdicts["a", "goodput"].to_fixed) == pytest.approx(2.0), "where it was not chosen, it takes 16 s"
    assert value(verdicts["a", "goodput"].to_plain) == pytest.approx(1.0)
    assert value(verdicts["a", "fixed:2"].to_plain) == pytest.approx(8 / 10)
    assert value(verdicts[depth_verdicts.MIX, "fixed:2"].to_plain) == pytest.approx(8 / 10)
    assert "chosen on every other repeat" in capsys.readouterr().out
    few = [row for row in rows if row["repeat"] < 2]
    assert "in hindsight on all 2 repeats, which favours it" in depth_report.tables(header, few)[0]


# --- report


@pytest.mark.parametrize("mode", ["simulate", "engine"])
def test_a_report_is_made_of_rows_alone_and_always_the_same(compare, tmp_path, mode):
    compare(mode)
    names = {"simulate": ("depth", "regret", "pulls", "speed"), "engine": ("depth", "acceptance", "pulls", "speed")}[
        mode
    ]
    written = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert depth_report.report(tmp_path / "rows.jsonl", folder) == 0
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"table.md", *(f"{name}.{kind}" for name in names for kind in ("png", "svg"))}
    assert all(content[:4] == b"\x89PNG" for name, content in written[0].items() if name.endswith("png"))
    assert all(len(content) > 5000 for name, content in written[0].items() if name != "table.md")


class Axes:
    """Collects what is drawn."""

    def __init__(self):
        self.said, self.titles = {}, []

    def __getattr__(self, name):
        return lambda *arguments, **named: self.said.update(named)


def test_axes_have_units():
    labels = {}
    span = depth_verdicts.Interval(1.0, 0.9, 1.1)
    verdict = depth_verdicts.Verdict("a", "goodput", span, span, "fixed:0", None, [])
    for draw, content in [
        (depth_plots._curves("depth (tokens a round)"), {"goodput": {"tick": [1], "value": [2]}}),
        (depth_plots._draw_shares, {"goodput": {"2": 1.0}}),
        (depth_plots._draw_positions, {"goodput": [0.5]}),
        (depth_plots._draw_speed, [verdict]),
    ]:
        axes = Axes()
        draw(axes, content)
        labels[axes.said["xlabel"]] = axes.said["ylabel"]
    assert labels == {
        "time (ticks)": "depth (tokens a round)",
        "share of ticks (%)": "arm",
        "position (drafted token of a round)": "accepted (fraction of drafts)",
        "tokens a second, ratio": "arm",
    }


def test_titles_say_what_is_synthetic(compare, undrawn, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(depth_plots.figure.Figure, "suptitle", lambda self, title: titles.append(title))
    compare("simulate")
    depth_report.report(tmp_path / "rows.jsonl", tmp_path)
    assert len(titles) == 4
    assert all(title.startswith("SYNTHETIC. ") for title in titles)
    titles.clear()
    compare("engine")
    depth_report.report(tmp_path / "rows.jsonl", tmp_path)
    assert titles
    assert not any("SYNTHETIC" in title for title in titles)


def log_decisions(path, *, acceptance_K):
    log = DecisionLog(path, header={"policy": "mine", "synthetic": acceptance_K is not None})
    for arm in (0, 1, 1, 1):
        depth_B = np.full(2, 2 * arm, np.int32)
        context = DepthContext(
            tiers_A=np.array([0, 2]),
            holder_B=np.array([0, 1]),
            cost_A=np.array([1.0, 1.5]),
            draft_A=np.array([0.0, 0.2]),
            switch_A=np.zeros(2),
            acceptance_K=acceptance_K,
        )
        drafted_BR = np.full((2, 1), 2 * arm)
        stats = StepStats(drafted_BR, np.array([[arm], [2 * arm]]), np.array([2, 3]), np.zeros((2, 1)), 1.0)
        log.learn(log.choose(0, context, Plan(arm, 1.0, depth_B), 0, 0.0), stats, 0.0)
    log.close()


@pytest.mark.parametrize("acceptance_K", [None, np.array([1.0, 1.0])])
def test_a_log_of_decisions_has_plots_of_its_own(compare, undrawn, tmp_path, acceptance_K):
    compare()
    log_decisions(tmp_path / "log.jsonl", acceptance_K=acceptance_K)
    assert depth_report.report(tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "log.jsonl") == 0
    drawn = {path.name for path in (tmp_path / "out").glob("decisions_*.png")}
    regret = set() if acceptance_K is None else {"decisions_regret.png"}
    assert drawn == {"decisions_depth.png", "decisions_pulls.png", "decisions_acceptance.png"} | regret
    _, logged = depth_plots.decision_log.read_log(tmp_path / "log.jsonl")
    row = depth_plots._logged_row(logged)
    assert row["shares"] == {"0": 0.25, "2": 0.75}
    assert row["depth_curve"]["value"] == [0, 2, 2, 2]
    assert row["spec_decode_per_position_acceptance_rates"] == [1.0, 0.5]
    if acceptance_K is not None:  # plain: 2 tokens in 1 s, where depth 2 brings 6 in 1.5 s
        assert row["regret_curve"]["value"] == [2.0, 2.0, 2.0, 2.0]


def test_without_matplotlib_there_are_tables_and_a_message(compare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(depth_plots, "mpl", None)
    assert compare()[0] == 0
    assert depth_report.report(tmp_path / "rows.jsonl", tmp_path) == 2
    assert "install the extra `plots`, as in pip install -e '.[plots]'" in capsys.readouterr().err
    assert (tmp_path / "table.md").exists()


def test_refusals_are_reported_from_rows_alone(compare, undrawn, tmp_path, capsys):
    compare(engine=FakeEngine(ill={"goodput": "differs"}))
    capsys.readouterr()
    assert depth_report.report(tmp_path / "rows.jsonl", tmp_path) == 1
    assert "refused: a, goodput: 1 prompts of a run differ" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}\n{}\n", '{"kind": "header", "mode": "engine"}\n', "{broken"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    assert depth_report.report(tmp_path / "rows.jsonl", tmp_path) == 2


def test_a_curve_keeps_means_and_places():
    thinned = depth_arms.curve(np.arange(100.0))
    assert len(thinned["tick"]) == depth_arms.CURVE_POINTS
    assert (thinned["tick"][:2], thinned["value"][:2]) == ([1.0, 3.0], [0.5, 2.5])
    assert depth_arms.curve([]) == {"tick": [], "value": []}
