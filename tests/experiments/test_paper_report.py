"""The report on the paper: claims held against made-up rows, and a text that says what the rows say and no more."""

import ast
import json
import math
import pathlib
import re

from absl.testing import parameterized

from experiments import paper_arms, paper_claims, paper_report, paper_rows, paper_tables, paper_verdicts
from experiments.depth_verdicts import Interval
from experiments.paper_arms import PLAIN, Arm
from tests.experiments.paper_study import BASE, SYSTEM, PaperCase, alter, made_up, speed_of

ROOT = pathlib.Path(__file__).parent.parent.parent


class ClaimTest(PaperCase):
    def findings(self, study):
        board = paper_claims.make_board(study, paper_rows.cells(study))
        return [claim.find(board) for claim in paper_claims.CLAIMS]

    def test_a_bound_must_be_reached_by_whole_intervals(self):
        wide, low, high = Interval(2.0, 1.0, 3.0), Interval(1.0, 0.5, 1.5), Interval(4.0, 3.5, 4.5)
        self.assertEqual(paper_claims.judge([high, high], [3.0, 3.5]), paper_claims.HOLDS)
        self.assertEqual(paper_claims.judge([high, wide], [3.0, 2.5]), paper_claims.UNSURE)
        self.assertEqual(paper_claims.judge([high, low], [3.0, 2.0]), paper_claims.FAILS)
        self.assertEqual(paper_claims.judge([Interval(9.0, math.nan, math.nan)], [1.0]), paper_claims.UNSURE)

    def test_a_system_that_is_fast_enough_meets_the_claims(self):
        study = made_up(lambda arm: 20.0 if arm == SYSTEM else 1.0, workloads=("alpaca", "gsm8k", "sum"))
        verdicts = [finding.verdict for finding in self.findings(study)]
        holds, fails = paper_claims.HOLDS, paper_claims.FAILS
        self.assertEqual(
            verdicts[0::2] + verdicts[3::2], [holds, paper_claims.UNDEFINED, holds, fails, holds], verdicts
        )

    def test_a_system_that_is_slow_does_not(self):
        study = made_up(lambda arm: 0.8 if arm == SYSTEM else 1.0, workloads=("alpaca", "gsm8k", "sum"))
        latency, _, _, alpaca, gsm8k, average = (finding.verdict for finding in self.findings(study))
        self.assertEqual([latency, gsm8k, average], [paper_claims.FAILS] * 3)
        self.assertEqual(alpaca, paper_claims.HOLDS, "the baseline leads")

    def test_the_highest_rate_is_looked_for_among_workloads(self):
        study = made_up()
        for run in study.runs:
            if run["workload"] == "sum":
                run["input_tokens"] = [10 * count for count in run["input_tokens"]]
        self.assertEqual(self.findings(study)[1].verdict, "the highest, here too")
        for run in study.runs:
            if run["workload"] == "sum":
                run["input_tokens"] = [count // 1000 for count in run["input_tokens"]]
        self.assertEqual(self.findings(study)[1].verdict, "not the highest here")

    def test_claims_about_what_did_not_run_or_is_refused_have_no_verdict(self):
        study = made_up(workloads=("bundled",))
        self.assertEqual(
            [finding.verdict for finding in self.findings(study)][3:], [paper_claims.NOT_RUN] * 3, "not these workloads"
        )
        refused = alter(made_up(), SYSTEM, failed=1)
        finding = self.findings(refused)[0]
        self.assertEqual(finding.verdict, paper_claims.REFUSED)
        self.assertNotRegex(finding.here, r"\d\.\d")
        for name in ("tp", "bare"):
            study.engines[name].clear()
            study.engines[name].update({"kind": "engine", "fleet": name, "refused": "too wide"})
        self.assertEqual(self.findings(study)[0].verdict, paper_claims.NOT_RUN, "there is no baseline")

    def test_the_baseline_is_the_widest_tensor_parallel_mesh_that_was_built(self):
        study = made_up()
        self.assertEqual(paper_claims.make_board(study, []).baseline, Arm("tp", "round_robin", PLAIN))
        study.engines["tp"].clear()
        study.engines["tp"].update({"kind": "engine", "fleet": "tp", "refused": "too wide"})
        board = paper_claims.make_board(study, [])
        self.assertEqual((board.baseline, board.system), (BASE, SYSTEM))


class ReportTest(PaperCase):
    def write(self, study):
        lines = [study.header, *study.engines.values(), *study.runs]
        self.rows_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.rows_path

    def test_the_same_rows_give_the_same_bytes(self):
        study = made_up()
        written = []
        for name in ("one.md", "two.md"):
            with self.printing():
                self.assertEqual(paper_report.run(self.write(study), self.folder / name, ()), 0)
            written.append((self.folder / name).read_bytes())
        self.assertEqual(written[0], written[1])
        self.assertEqual(written[0].decode(), paper_report.report(study)[0])

    def test_the_report_shows_what_the_rows_were_made_with(self):
        text, refused = paper_report.report(made_up())
        self.assertEmpty(refused)
        for line in (
            "| all | bare/round_robin/fixed:0 | 12.00 [12.00, 12.00] |",
            "| routing | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] |",
            "| disaggregation x speculation | 4.00 [4.00, 4.00] |",
            "### offline: fleet output",
            "alpaca 4 of 80, sum 4 of 80",
            "| tp | colocated | 1 | 4 | 4 | 8 | none | 5 | 62 |",
            "| 2.50 | 4 / 4 |",
            "Every arm ran 2 times",
            "Commit abcdef012345.",
            "Of alpaca, sum the first prompts ran; the same command without `--num_prompts` runs all.",
        ):
            self.assertTrue(line in text, line)
        self.assertNotIn("### open: fleet output", text)
        self.assertNotIn("## Refused", text)

    def test_the_order_of_the_fleets_does_not_matter(self):
        study = made_up()
        turned = study._replace(engines=dict(reversed(study.engines.items())))
        text, expected = paper_report.report(turned)[0], paper_report.report(study)[0]
        self.assertTrue("bundled:target with bundled:draft" in text)
        for heading in ("## Factors", "## Every arm"):
            self.assertTrue(text.partition(heading)[2] == expected.partition(heading)[2], heading)
        self.assertEqual(paper_claims.make_board(turned, []).system, SYSTEM)

    def test_the_report_says_where_each_factor_loses(self):
        study = made_up(lambda arm: 0.5 if arm.router == "flowguard" else 1.0, repeats=paper_verdicts.MIN_RUNS)
        text, _ = paper_report.report(study)
        self.assertIn(
            "**routing**: main effects (workload x mode x metric): 0 gains, 27 losses, 0 that cannot be told from none",
            text,
        )
        self.assertIn("alpaca, offline, latency 0.50 [0.50, 0.50]", text)
        self.assertIn(
            "**speculation**: main effects (workload x mode x metric): 0 gains, 0 losses, 27 that cannot", text
        )
        self.assertIn("108 losses in 108 comparisons. Losses: alpaca, offline, latency 0.50", text)
        self.assertIn("all would lie on one side of one in 6% of the cases", text)
        self.assertIn("0 losses in 108 comparisons. Losses: none. Below one, but of too few runs: none.", text)

    def test_too_few_runs_make_no_loss(self):
        text, _ = paper_report.report(made_up(lambda arm: 0.5 if arm.router == "flowguard" else 1.0, repeats=2))
        self.assertIn("0 gains, 0 losses, 27 that cannot be told from none, 27 of them for want of runs", text)
        self.assertIn("Losses: none. Below one, but of too few runs: alpaca, offline, latency 0.50", text)
        self.assertIn("all would lie on one side of one in 50% of the cases", text)

    def test_what_one_run_shows_below_one_is_listed_without_an_interval(self):
        text, _ = paper_report.report(made_up(lambda arm: 0.5 if arm.router == "flowguard" else 1.0, repeats=1))
        self.assertIn("Losses: none. Below one, but of too few runs: alpaca, offline, latency 0.50; ", text)
        self.assertIn("There is one run of an arm on a workload in a mode. One run has no interval", text)
        self.assertIn("Intervals: one run has none.", text)

    def test_the_price_of_a_draft_is_told_between_fleets_that_differ_in_it_alone(self):
        text, _ = paper_report.report(made_up(lambda arm: 0.5 if arm.fleet == "co" else 1.0))
        part = text.partition("## What a draft model costs")[2].partition("## Every arm")[0]
        self.assertIn("| alpaca | bare/round_robin/fixed:0 | 0.50 [0.50, 0.50] |", part)
        self.assertNotIn("tp/", part)

    def test_what_is_refused_has_no_number_is_listed_and_ends_with_code_1(self):
        study = alter(made_up(), SYSTEM, compilations_after_warmup=3)
        with self.printing():
            self.assertEqual(paper_report.run(self.write(study), self.folder / "out.md", ()), 1)
        text = (self.folder / "out.md").read_text()
        reason = f"3 programs were compiled while {SYSTEM} ran"
        self.assertIn(f"offline, alpaca: effects: {reason}", text.partition("## Refused")[2])
        self.assertIn(f"refused: offline, all: {SYSTEM} over {BASE} (system): {reason}", self.err.getvalue())
        self.assertIn("| routing | refused | 2.00 [2.00, 2.00] | refused |", text, "the other workload has its number")

    def test_without_a_baseline_the_factors_are_still_reported(self):
        study = made_up()
        del study.engines["tp"], study.engines["bare"]
        study = study._replace(runs=[run for run in study.runs if run["fleet"] in study.engines])
        text, refused = paper_report.report(study)
        self.assertEmpty(refused)
        self.assertIn("No baseline was built.", text)
        self.assertIn("the baseline none could be built", text)
        self.assertIn("| routing | 2.00 [2.00, 2.00] |", text)

    def test_a_failed_arm_has_no_means(self):
        study = made_up()
        for run in study.runs:
            if paper_rows.arm_of(run) == SYSTEM and run["workload"] == "sum":
                run["failed"] = 1
                for name in paper_arms.PER_PROMPT:
                    run[name] = [None, *run[name][1:]]
        text, _ = paper_report.report(study)
        header = next(line for line in text.splitlines() if line.startswith("| arm |"))
        line = next(line for line in text.partition("### sum, offline")[2].splitlines() if str(SYSTEM) in line)
        self.assertEqual(line.count("|"), header.count("|"))
        self.assertEqual(line.count("failed"), header.count("|") - 2)

    @parameterized.parameters("paper_report.py", "paper_tables.py")
    def test_no_number_of_the_report_is_typed(self, name):
        tree = ast.parse((ROOT / "experiments" / name).read_text())
        docstrings = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        }
        formats = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue) for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in formats:
                text = "" if node.value in docstrings else node.value
                for known in ("p50", "p99", "99th", "section 3.6", "arXiv 2604.09562", "utf-8"):
                    text = text.replace(known, "")
                self.assertNotRegex(text, r"\d", f"{name}:{node.lineno}")

    def test_numbers_follow_the_rows(self):
        text, _ = paper_report.report(made_up())
        slower, _ = paper_report.report(made_up(lambda arm: speed_of(arm) / 7))
        for heading in ("## What the paper claims", "## Every arm"):
            self.assertNotEqual(text.partition(heading)[2], slower.partition(heading)[2])
        ratios = [part.partition("## Factors")[2].partition("## Every arm")[0] for part in (text, slower)]
        self.assertEqual(*ratios)
        self.assertTrue(re.search(r"\d", ratios[0]))

    @parameterized.parameters(
        "", "{broken", "[]", '{"kind": "header"}', '{"kind": "header", "study": "reproduce_paper"}', '{"row": 1}'
    )
    def test_other_files_are_refused(self, text):
        self.rows_path.write_text(text + "\n")
        with self.printing():
            self.assertEqual(paper_report.run(self.rows_path, None, ()), 2)
            self.assertEqual(paper_report.run(self.folder / "absent.jsonl", None, ()), 2)
        self.assertEqual(self.err.getvalue().count("error: "), 2)

    def test_runs_of_a_fleet_that_is_not_described_are_refused(self):
        study = made_up()
        del study.engines["tp"]
        with self.printing():
            self.assertEqual(paper_report.run(self.write(study), None, ()), 2)
        self.assertIn("has runs of fleets that it does not describe: ['tp']", self.err.getvalue())

    def test_a_bar_in_a_cell_does_not_end_it(self):
        self.assertEqual(paper_tables.markdown(["a|b"], []).splitlines()[0], "| a\\|b |")
