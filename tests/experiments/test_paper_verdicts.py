"""What is said of two arms and of three factors: refusals one by one, and effects that are exact on made-up rows."""

import copy
import math

import numpy as np
from absl.testing import parameterized

from experiments import common, paper_claims, paper_effects, paper_report, paper_rows, paper_verdicts
from experiments.paper_arms import PLAIN, Arm
from experiments.paper_rows import METRICS
from tests.experiments.paper_study import (
    ARMS,
    BASE,
    CORNERS,
    SYSTEM,
    PaperCase,
    alter,
    cell_of,
    change_engine,
    corner_arm,
    made_up,
)


class RefusalTest(PaperCase):
    STUDY = made_up()
    EDGE = ("speculation", corner_arm(1, 1, 0), SYSTEM)

    def why(self, study, factor, base, other):
        return paper_verdicts.refusal(study, cell_of(study), factor, base, other)

    def test_what_differs_in_the_factor_alone_is_compared(self):
        for factor, base, other in (
            *paper_effects.edges(dict(zip(CORNERS, ARMS, strict=False))),
            ("draft", BASE, corner_arm(0, 0, 0)),
            ("system", BASE, SYSTEM),
            ("system", ARMS[-1], SYSTEM),
        ):
            self.assertIsNone(self.why(self.STUDY, factor, base, other), (factor, base, other))

    @parameterized.named_parameters(
        ("routing", "routing", corner_arm(0, 1, 0), SYSTEM, "policy (fixed:0 against specustream), which routing"),
        ("disaggregation", "disaggregation", corner_arm(0, 0, 1), SYSTEM, "router (round_robin against flowguard)"),
        ("speculation", "speculation", corner_arm(1, 0, 0), SYSTEM, "topology.topology (colocated against disagg"),
        ("draft", "draft", BASE, corner_arm(0, 1, 0), "topology.topology"),
        ("pairs", "disaggregation", Arm("tp", "round_robin", PLAIN), corner_arm(0, 1, 0), "topology.num_pairs (1"),
        ("same", "routing", SYSTEM, SYSTEM, "they do not differ in routing"),
        ("absent", "system", BASE, Arm("pd", "p2c", PLAIN), "there is no run of pd/p2c/fixed:0"),
    )
    def test_arms_that_differ_in_more_or_less_than_the_factor_are_refused(self, factor, base, other, reason):
        self.assertIn(reason, self.why(self.STUDY, factor, base, other))

    @parameterized.named_parameters(
        ("devices", {"devices": 5}, {}, "devices (4 against 5)"),
        ("slots", {}, {"pipeserve.max_num_seqs": 8}, "slots (8 against 16)"),
        ("dtype", {}, {"model.dtype": "bfloat16"}, "model.dtype (float32 against bfloat16)"),
        ("setting", {}, {"pipeserve.rounds_per_tick": 1}, "pipeserve.rounds_per_tick (4 against 1)"),
        ("new_setting", {}, {"pipeserve.new": 1}, "pipeserve.new (None against 1)"),
        ("versions", {"versions": {"jax": "0.11", "python": "3.11.7"}}, {}, "versions.jax (0.10.2 against 0.11)"),
    )
    def test_engines_that_differ_otherwise_are_refused_whatever_the_factor(self, values, settings, reason):
        study = change_engine(self.STUDY, "pd", settings, **values)
        self.assertIn(reason, self.why(study, "disaggregation", corner_arm(1, 0, 1), SYSTEM))
        self.assertIn(reason, self.why(study, "system", BASE, SYSTEM))
        self.assertIsNone(self.why(study, *self.EDGE), "both arms are of the changed fleet")

    @parameterized.named_parameters(
        ("compiled", {"compilations_after_warmup": 2}, "2 programs were compiled while pd/flowguard/specustream ran"),
        ("failed", {"failed": 1}, "1 prompts of pd/flowguard/specustream failed"),
        ("tokens", {"tokens_sha256": lambda old: ["other", *old[1:]]}, "1 prompts of a run have other tokens"),
        ("prompts", {"input_tokens": lambda old: [1, *old[1:]]}, "they were given other prompts"),
    )
    def test_one_unsound_run_is_enough_on_either_side(self, values, reason):
        study = alter(self.STUDY, SYSTEM, **values)
        self.assertIn(reason, self.why(study, *self.EDGE))
        factor, base, other = self.EDGE
        self.assertIn(reason, self.why(study, factor, other, base))
        self.assertIsNone(paper_verdicts.refusal(study, cell_of(study, "open"), *self.EDGE), "other runs are sound")

    def test_what_did_not_take_place_is_refused(self):
        idle, still = copy.deepcopy(self.STUDY), copy.deepcopy(self.STUDY)
        for run in idle.runs:
            run["draft_tokens"] = 0
        for run in still.runs:
            run["kv_transfer_bytes"] = 0
        self.assertEqual(self.why(idle, *self.EDGE), f"{SYSTEM} drafted nothing")
        self.assertIsNone(self.why(idle, "routing", corner_arm(0, 1, 0), corner_arm(1, 1, 0)), "plain ones need not")
        moved = self.why(still, "disaggregation", corner_arm(0, 0, 0), corner_arm(0, 1, 0))
        self.assertEqual(moved, f"{corner_arm(0, 1, 0)} handed nothing over from prefill to decode")
        shared = change_engine(still, "pd", {"topology.share_devices": True})
        self.assertNotIn("handed", self.why(shared, "disaggregation", corner_arm(0, 0, 0), corner_arm(0, 1, 0)))

    def test_so_many_tokens_may_differ_as_the_header_allows_in_a_run(self):
        study = alter(self.STUDY, SYSTEM, tokens_sha256=lambda old: ["x", "y", *old[2:]])
        allowed = study._replace(header=study.header | {"max_different": 2})
        self.assertIn("2 prompts of a run", self.why(study, *self.EDGE))
        self.assertIsNone(self.why(allowed, *self.EDGE))

    def test_a_refused_comparison_has_no_number_and_an_unknown_factor_is_an_error(self):
        study = alter(self.STUDY, SYSTEM, failed=1)
        comparison = paper_verdicts.compare(study, cell_of(study), *self.EDGE)
        self.assertEmpty(comparison.speeds)
        with self.assertRaisesRegex(common.RunError, "unknown factor 'luck'"):
            self.why(self.STUDY, "luck", BASE, SYSTEM)

    def test_the_command_line_prints_a_ratio_or_the_reason(self):
        factor, base, other = self.EDGE
        with self.printing():
            self.assertEqual(paper_report.print_comparisons(self.STUDY, [f"{factor},{base},{other}"]), 0)
        self.assertIn(f"offline, all: {other} over {base} (speculation)", self.out.getvalue())
        self.assertIn("12.00 [12.00, 12.00]", self.out.getvalue())
        with self.printing():
            self.assertEqual(paper_report.print_comparisons(self.STUDY, [f"routing,{base},{other}"]), 1)
        self.assertEmpty(self.out.getvalue())
        self.assertIn("policy (fixed:0 against specustream), which routing does not mean", self.err.getvalue())
        for text in (
            "routing",
            f"routing,{base}",
            "routing,a/b,c",
            f"routing,{base},{base},{base}",
            f"routing,a,{base},{base}",
        ):
            with self.assertRaisesRegex(common.RunError, "FACTOR,ARM,ARM"):
                paper_report.print_comparisons(self.STUDY, [text])


class ArithmeticTest(PaperCase):
    def test_metrics_are_what_they_are_called(self):
        study = made_up(workloads=("a",), repeats=1, prompts=2)
        for run in study.runs:
            run.update(
                input_tokens=[90, 30], output_tokens=[10, 1], ttft_s=[0.1, 0.3], latency_s=[1.0, 0.31], charged_s=[2, 3]
            )
        values = dict(zip(METRICS, cell_of(study, group="a").values[SYSTEM], strict=True))
        self.assertAlmostEqual(values["latency"], 0.655)
        self.assertAlmostEqual(values["ttft"], 0.2)
        self.assertAlmostEqual(values["tpot"], 0.1, msg="nine gaps in 0.9 s; one token has none")
        self.assertAlmostEqual(values["output_rate"], 11 / 5)
        self.assertAlmostEqual(values["paper_rate"], (100 / 1.0 + 31 / 0.31) / 2)
        np.testing.assert_allclose(paper_claims.tpots_s([study.runs[0]]), [0.1])

    def test_one_token_alone_has_no_time_per_output_token(self):
        study = made_up()
        for run in study.runs:
            run["output_tokens"] = [1] * 4
        cell = cell_of(study)
        self.assertTrue(np.isnan(cell.values[SYSTEM][list(METRICS).index("tpot")]))
        self.assertEmpty(paper_claims.tpots_s(study.runs))
        self.assertIn("nan", paper_report.report(study)[0])

    def test_all_workloads_together_are_their_geometric_mean_however_long_they_take(self):
        study = made_up(workloads=("a", "bb"))
        for run in study.runs:
            if run["workload"] == "bb":
                factor = 300 if paper_rows.arm_of(run) == SYSTEM else 100
                run["latency_s"] = [factor * one for one in run["latency_s"]]
        edge = RefusalTest.EDGE
        single = [paper_verdicts.compare(study, cell_of(study, group=name), *edge).speeds for name in ("a", "bb")]
        both = paper_verdicts.compare(study, cell_of(study), *edge).speeds
        self.assertAlmostEqual(single[0]["latency"].value, 3 * single[1]["latency"].value)
        np.testing.assert_allclose(both["latency"], np.sqrt(np.prod([one["latency"] for one in single], axis=0)))
        self.assertEqual(cell_of(study).num_runs, 4)
        self.assertEqual([c.group for c in paper_rows.cells(made_up(workloads=("a",)))], ["a", "a"])

    def test_a_speed_up_is_above_one_where_it_is_better(self):
        comparison = paper_verdicts.compare(
            self.study, cell_of(self.study), "speculation", corner_arm(0, 0, 0), corner_arm(0, 0, 1)
        )
        self.assertEqual(set(comparison.speeds), set(METRICS))
        for speed in comparison.speeds.values():
            np.testing.assert_allclose(speed, (3.0, 3.0, 3.0), rtol=1e-9)
        opened = paper_verdicts.compare(
            self.study, cell_of(self.study, "open"), "speculation", corner_arm(0, 0, 1), corner_arm(0, 0, 0)
        )
        self.assertEqual(set(METRICS) - set(opened.speeds), {"output_rate"}, "in an open loop it is the arrivals'")
        np.testing.assert_allclose(opened.speeds["latency"].value, 1 / 3)

    study = made_up()

    def test_effects_are_those_that_the_rows_were_made_with(self):
        found = paper_effects.effects(self.study, cell_of(self.study), dict(zip(CORNERS, ARMS, strict=False)))
        # Together disaggregation and speculation bring a factor of four, on the mean the square root of it to each.
        expected = {
            ("routing",): 2.0,
            ("disaggregation",): 0.5 * 2.0,
            ("speculation",): 3.0 * 2.0,
            ("routing", "disaggregation"): 1.0,
            ("routing", "speculation"): 1.0,
            ("disaggregation", "speculation"): 4.0,
            ("routing", "disaggregation", "speculation"): 1.0,
        }
        self.assertEqual(list(found.by_subset), list(expected))
        for factors, value in expected.items():
            for metric, effect in found.by_subset[factors].items():
                np.testing.assert_allclose(effect, (value,) * 3, rtol=1e-9, err_msg=f"{factors} {metric}")

    def test_contrasts_are_differences_of_means(self):
        logs = np.random.default_rng(0).normal(size=(3, 2, 2, 2))
        for factors in paper_effects.SUBSETS:
            expected = 0.0
            for corner in CORNERS:
                sign = math.prod(
                    2 * level - 1
                    for level, name in zip(corner, paper_effects.FACTOR_NAMES, strict=True)
                    if name in factors
                )
                expected = expected + sign * logs[:, *corner] / 2 ** (3 - len(factors))
            np.testing.assert_allclose(paper_effects.contrast(logs, factors), expected, err_msg=str(factors))

    def test_corners_and_edges_are_named_after_what_is_on(self):
        corners = paper_effects.cube(self.study, "flowguard", "specustream")
        self.assertEqual(corners, {corner: corner_arm(*corner) for corner in CORNERS})
        edges = list(paper_effects.edges(corners))
        self.assertLen(set(edges), 12)
        self.assertIn(("routing", corner_arm(0, 1, 0), corner_arm(1, 1, 0)), edges)
        self.assertIn(("disaggregation", corner_arm(1, 0, 1), corner_arm(1, 1, 1)), edges)
        self.assertIn(("speculation", corner_arm(0, 1, 0), corner_arm(0, 1, 1)), edges)

    def test_one_refused_pair_refuses_all_effects(self):
        study = alter(self.study, corner_arm(0, 1, 0), compilations_after_warmup=1)
        found = paper_effects.effects(study, cell_of(study), dict(zip(CORNERS, ARMS, strict=False)))
        self.assertEmpty(found.by_subset)
        self.assertEqual(found.refusals, (f"1 programs were compiled while {corner_arm(0, 1, 0)} ran",))

    def test_an_interval_holds_what_differs_between_runs(self):
        study = made_up(lambda arm: 1.0, workloads=("a",), repeats=2)
        for run in study.runs:
            if paper_rows.arm_of(run) == SYSTEM and run["repeat"] == 1:
                run["latency_s"] = [2 * one for one in run["latency_s"]]
        cell = cell_of(study, group="a")
        speed = paper_verdicts.compare(study, cell, "speculation", corner_arm(1, 1, 0), SYSTEM).speeds["latency"]
        self.assertBetween(speed.value, 0.5, 1.0)
        self.assertLess(speed.low, 0.6)
        self.assertGreater(speed.high, 0.8)

    def test_blocks_are_as_long_as_a_run(self):
        slow = made_up(lambda arm: 1.0, workloads=("a",), repeats=6, prompts=8)
        mixed = copy.deepcopy(slow)
        for study, alternates in ((slow, False), (mixed, True)):
            for run in study.runs:
                if paper_rows.arm_of(run) == SYSTEM:
                    run["latency_s"] = [
                        (2.0 if (prompt if alternates else run["repeat"]) % 2 else 1.0) * one
                        for prompt, one in enumerate(run["latency_s"])
                    ]
        widths = []
        for study in (slow, mixed):
            cell = cell_of(study, group="a")
            speed = paper_verdicts.compare(study, cell, "speculation", corner_arm(1, 1, 0), SYSTEM).speeds["latency"]
            widths.append(speed.high - speed.low)
        self.assertGreater(widths[0], 2 * widths[1], "a whole run that was slow says less than slow prompts in all")

    def test_one_run_has_no_interval(self):
        cell = cell_of(made_up(repeats=1), group="sum")
        speed = paper_verdicts.compare(made_up(repeats=1), cell, *RefusalTest.EDGE).speeds["latency"]
        self.assertTrue(math.isnan(speed.low))
        self.assertEqual(paper_claims.ratio_text(speed), "12.00")

    def test_a_study_that_was_cut_short_is_judged_by_its_whole_repeats(self):
        study = made_up(repeats=3)
        cut = study._replace(runs=study.runs[:-5])
        cell = cell_of(cut, "open", "sum")
        self.assertEqual({len(runs) for runs in cell.runs.values()}, {2})
        self.assertIsNone(paper_verdicts.refusal(cut, cell, *RefusalTest.EDGE))
        self.assertEqual({len(runs) for runs in cell_of(cut, "open", "alpaca").runs.values()}, {3})
        self.assertIn("The study was cut short", paper_report.report(cut)[0])
        self.assertNotIn("The study was cut short", paper_report.report(study)[0])
