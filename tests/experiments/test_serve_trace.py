"""The open-loop command with a fake engine: who arrives when, what is judged good, and what the record says."""

import contextlib
import io
import json
import pathlib
import tempfile

import numpy as np
from absl import flags
from absl.testing import parameterized

import streamserve
from experiments import arrivals, common, offered_load, serve_options, serve_trace
from experiments.arrivals import Pacing, RampUp
from experiments.traces import TraceFormat, TraceScale
from streamserve import flowguard
from streamserve.config import Config
from streamserve.metrics import EngineStats, ServiceLevels
from streamserve.models import load_config, resolve_path
from streamserve.tokenizer import load_tokenizer
from streamserve.types import Prompt
from tests import fakes, tiny_models

LATE_S = 0.25  # what the fake engine takes to notice an arrival
CONFIG = {
    "topology": {"num_pairs": 2},
    "routing": {"ttft_s": 1.0, "tpot_s": 0.5},
    "speculation": {"policy": "fixed"},
    "sampling": {"max_tokens": 8, "temperature": 0.0},
}
GOOD = [{"id": f"r{number}", "prompt": f"prompt {number}"} for number in range(5)]
AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.0,40,6",
    "2023-11-16 18:17:04.5,900,10",
    "2023-11-16 18:17:05.0,10,400",
]
MOONCAKE = [
    {"timestamp": 0, "input_length": 1024, "output_length": 20, "hash_ids": [5, 6]},
    {"timestamp": 500, "input_length": 1024, "output_length": 20, "hash_ids": [5, 7]},
]


class FakeServer(fakes.FakeEngine):
    """Takes arrivals in a little late, and ends them two at a time, the later one first.

    A prompt "slow" has its first token after two seconds instead of half a second, and "crawl" two seconds a token
    instead of a tenth. Text decides the tokens, token ids are answered by themselves backwards.
    """

    def __init__(self, *, max_model_len=64, stats=None, differing=(), lost=(), **kwargs):
        super().__init__(**kwargs)
        self.max_model_len, self.now_s = max_model_len, 100.0
        self.offered: list[tuple[float, Prompt]] = []
        self.events: list[str] = []
        self._counters, self._differing, self._lost = stats or EngineStats(), differing, lost

    def clock(self):
        return self.now_s

    def serve(self, pairs):
        self.events.append("serve")
        begin_s, answered, waiting = self.now_s, 0, []
        for at_s, prompt in pairs:
            self.now_s = max(self.now_s, begin_s + at_s) + LATE_S
            self.offered.append((at_s, prompt))
            waiting.append(self._answer(prompt, arrival_s=begin_s + at_s, lane=len(self.offered) % 3 % 2))
            while len(waiting) > 1 and prompt.request_id not in self._lost:
                if answered == self._raise_after:
                    raise self._exception
                answered += 1
                yield waiting.pop()
        self.now_s += 1.0
        yield from (output for output in waiting if output.request_id not in self._lost)

    def stream(self, prompts):
        self.events.append("stream")
        for prompt in prompts:
            self.seen.append(prompt)
            differs = prompt.request_id in self._differing
            yield self._answer(prompt, extra=(1,) if differs else ())

    def stats(self):
        return self._counters

    def close(self):
        self.events.append("close")

    def _answer(self, prompt, *, arrival_s=0.0, lane=0, extra=()):
        text = prompt.text or ""
        if "too long" in text:
            return fakes.make_output(prompt.request_id, error="the queue is full")
        tokens = tuple(map(ord, text[-4:])) if prompt.token_ids is None else prompt.token_ids[:-4:-1]
        first_s = arrival_s + (2.0 if "slow" in text else 0.5)
        end_s = first_s + (len(tokens) - 1) * (2.0 if "crawl" in text else 0.1)
        times = (arrival_s, first_s, end_s)
        return fakes.make_output(prompt.request_id, tokens=tokens + extra, times=times, measured={"lane": lane})


class ServeTraceCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.workdir = self.folder / "work"

    def write(self, lines, name="in.jsonl"):
        path = self.folder / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    def serve(self, lines=GOOD, *, engine=None, name="in.jsonl", make_engine=None, **fields):
        """Run the command; gives its exit code, and keeps what it printed."""
        self.engine = engine or FakeServer()
        options = serve_options.Options(
            **{
                "config": CONFIG,
                "source": self.write(lines, name),
                "pacing": Pacing(request_rate=2.0),
                "scale": TraceScale(),
                "workdir": self.workdir,
                "command": ("serve_trace", "--flag"),
                **fields,
            }
        )

        def make(config, **paths):
            self.made = (config, paths)
            return self.engine

        self.out, self.err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(self.out), contextlib.redirect_stderr(self.err):
            return serve_trace.run(options, make_engine or make, clock=self.engine.clock)

    def never(self, config, **_):
        raise AssertionError("the engine must not be built")

    @property
    def results(self):
        return json.loads((self.workdir / "results.json").read_text())

    @property
    def requests(self):
        text = (self.workdir / "requests.jsonl").read_text()
        self.assertEndsWith(text, "\n")
        return [json.loads(line) for line in text.splitlines()]


class OpenLoopTest(ServeTraceCase):
    def test_every_request_arrives_at_its_time_and_is_recorded_once(self):
        self.assertEqual(self.serve(seed=4), 0)
        want = arrivals.draw(5, Pacing(request_rate=2.0), seed=4).tolist()
        self.assertEqual([at_s for at_s, _ in self.engine.offered], want)
        self.assertEqual([prompt.text for _, prompt in self.engine.offered], [line["prompt"] for line in GOOD])
        self.assertEqual({prompt.params.max_tokens for _, prompt in self.engine.offered}, {8})
        rows = {row["id"]: row for row in self.requests}
        self.assertLen(self.requests, 5)
        self.assertEqual([rows[f"r{number}"]["arrival_s"] for number in range(5)], want)
        self.assertEqual([rows[f"r{number}"]["line"] for number in range(5)], [1, 2, 3, 4, 5])
        self.assertEqual([rows[f"r{number}"]["lanes"] for number in range(5)], [[1], [0], [0], [1], [0]])
        self.assertEqual({(row["error"], row["good"]) for row in rows.values()}, {(None, True)})
        self.assertAlmostEqual(rows["r3"]["ttft_ms"], 500.0)

    def test_the_workdir_records_the_run(self):
        self.serve()
        self.assertEqual(json.loads((self.workdir / "config.json").read_text()), CONFIG)
        self.assertEqual(json.loads((self.workdir / "env.json").read_text())["command"], "serve_trace --flag")
        config, paths = self.made
        self.assertEqual(config.routing.tpot_s, 0.5)
        self.assertEqual(paths["trace"], self.workdir / "trace.json")
        self.assertEqual(paths["routes"], self.workdir / "routes.jsonl")
        self.assertIsNone(paths["decisions"])
        self.serve(config=CONFIG | {"speculation": {"policy": "specustream", "model": "m", "method": "draft_model"}})
        self.assertEqual(self.made[1]["decisions"], self.workdir / "decisions.jsonl")

    def test_the_results_say_what_arrived_and_how_late_it_was_noticed(self):
        self.serve(seed=4)
        want_s = arrivals.draw(5, Pacing(request_rate=2.0), seed=4)
        told = self.results["arrivals"]
        self.assertEqual((told["source"], told["requests"], told["request_rate"]), ("input", 5, 2.0))
        self.assertEqual((told["burstiness"], told["ramp_up_strategy"]), (1.0, "none"))
        self.assertAlmostEqual(told["offered_rate"], 4 / want_s[-1])
        self.assertAlmostEqual(told["interarrival_cv"], np.std(np.diff(want_s)) / np.mean(np.diff(want_s)))
        # The engine is a quarter of a second late at least, and more where the gap was shorter than that.
        now_s, lateness_s = 0.0, []
        for at_s in want_s:
            now_s = max(now_s, at_s) + LATE_S
            lateness_s.append(now_s - at_s)
        self.assertAlmostEqual(told["lateness_p50_ms"], 1000 * np.percentile(lateness_s, 50))
        self.assertAlmostEqual(told["lateness_p100_ms"], 1000 * max(lateness_s))
        self.assertAlmostEqual(self.results["duration"], now_s + 1.0, msg="from the first arrival to the last end")
        self.assertEqual(self.results["completions_per_lane"], [3, 2])
        self.assertEqual(self.results["request_rate"], 2.0)
        shown = self.out.getvalue()
        self.assertRegex(shown, r"Offered rate \(req/s\): +\d+\.\d\d\n")
        self.assertRegex(shown, r"Completions per stream pair: +3 2\n")
        self.assertRegex(shown, r"TTFT <= 1000 ms \(%\): +100\.0\n")
        self.assertRegex(shown, r"-+ Open Loop -+\n")
        self.assertEqual([line for line in shown.splitlines() if set(line) == {"="}], ["=" * 56], "one table")
        self.assertEqual({len(line) for line in shown.splitlines()[:-1] if not line.startswith("Acceptance")}, {56})

    def test_all_arrive_at_once_without_a_rate(self):
        self.assertEqual(self.serve(pacing=Pacing()), 0)
        self.assertEqual([at_s for at_s, _ in self.engine.offered], [0.0] * 5)
        self.assertEqual(self.results["arrivals"]["request_rate"], "inf")
        self.assertIsNone(self.results["arrivals"]["offered_rate"])
        self.assertNotIn("request_rate", self.results)

    def test_a_rate_that_grows_is_recorded(self):
        pacing = Pacing(burstiness=0.5, ramp_up=RampUp.LINEAR, start_rps=1.0, end_rps=4.0)
        self.serve(pacing=pacing)
        told = self.results["arrivals"]
        self.assertEqual([at_s for at_s, _ in self.engine.offered], arrivals.draw(5, pacing, 0).tolist())
        self.assertEqual((told["ramp_up_strategy"], told["ramp_up_start_rps"]), ("linear", 1.0))
        self.assertEqual((told["ramp_up_end_rps"], told["burstiness"]), (4.0, 0.5))
        self.assertNotIn("request_rate", self.results)

    def test_only_the_first_lines_are_served_if_so_asked(self):
        self.serve(num_prompts=2)
        self.assertEqual([prompt.request_id for _, prompt in self.engine.offered], ["r0", "r1"])

    def test_chat_lines_go_through_the_template(self):
        tokenizer = load_tokenizer(fakes.save_tokenizer(self.folder / "tok", chat_template=fakes.CHAT_TEMPLATE))
        body = {"messages": [{"role": "user", "content": "hello"}]}
        line = {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body}
        self.assertEqual(self.serve([line], engine=FakeServer(tokenizer=tokenizer)), 0)
        ids = self.engine.offered[0][1].token_ids
        self.assertEqual(tokenizer.decode(ids, False), "<user>hello<eos><assistant>")

    def test_an_empty_input_is_an_empty_run(self):
        self.assertEqual(self.serve([]), 0)
        self.assertEqual((self.results["completed"], self.results["duration"]), (0, 0.0))


class GoodputTest(ServeTraceCase):
    LINES = (
        {"id": "a", "prompt": "fine"},
        {"id": "b", "prompt": "slow"},  # TTFT 2 s
        {"id": "c", "prompt": "crawl on"},  # 2 s a token
        {"id": "d", "prompt": "too long a queue"},
        {"id": "e", "prompt": "fine"},
    )

    def test_the_objective_of_the_config_judges_and_refused_ones_miss(self):
        self.assertEqual(self.serve(self.LINES), 1)
        results = self.results
        self.assertEqual((results["slo_ttft_ms"], results["slo_tpot_ms"]), (1000.0, 500.0))
        self.assertAlmostEqual(results["slo_attainment"], 2 / 5)
        self.assertAlmostEqual(results["slo_attainment_ttft"], 3 / 5)
        self.assertAlmostEqual(results["slo_attainment_tpot"], 3 / 5)
        self.assertAlmostEqual(results["request_goodput"], 2 / results["duration"])
        rows = {row["id"]: row for row in self.requests}
        self.assertEqual([rows[name]["good"] for name in "abcde"], [True, False, False, False, True])
        self.assertEqual(rows["b"]["met"], {"ttft": False, "tpot": True})
        self.assertEqual(rows["c"]["met"], {"ttft": True, "tpot": False})
        self.assertEqual(rows["d"]["met"], {"ttft": False, "tpot": False})
        self.assertEqual(rows["d"]["error"], "the queue is full")
        self.assertIsNotNone(rows["d"]["arrival_s"])
        self.assertIn("1 of 5 lines failed:\n  line 4: the queue is full", self.err.getvalue())

    def test_levels_that_are_given_judge_instead(self):
        self.serve(self.LINES, levels=ServiceLevels(e2el_s=1.0))
        self.assertEqual(self.results["slo_attainment_e2el"], 2 / 5)
        self.assertNotIn("slo_attainment_ttft", self.results)
        self.assertNotIn("slo_ttft_ms", self.results)

    def test_bad_lines_are_failures_that_never_arrived(self):
        lines = [GOOD[0], "{broken", GOOD[1], {"prompt": "a", "max_tokes": 1}]
        self.assertEqual(self.serve(lines), 1)
        self.assertLen(self.engine.offered, 2)
        self.assertEqual((self.results["completed"], self.results["failed"]), (2, 2))
        self.assertEqual(self.results["slo_attainment"], 1.0)
        bad = [row for row in self.requests if row["error"] is not None]
        self.assertEqual(
            [(row["line"], row["arrival_s"], row["good"]) for row in bad], [(2, None, False), (4, None, False)]
        )
        self.assertIn("2 of 4 lines failed:\n  line 2: not valid JSON", self.err.getvalue())


class CheckTest(ServeTraceCase):
    def test_outputs_that_are_the_same_offline_are_counted(self):
        self.assertEqual(self.serve(check_offline=True), 0)
        self.assertEqual(self.engine.events, ["serve", "close", "stream"], "the logs are about the open loop alone")
        self.assertEqual((self.results["offline_identical"], self.results["offline_compared"]), (5, 5))
        self.assertRegex(self.out.getvalue(), r"Same as offline \(requests\): +5 of 5\n")

    def test_an_output_that_differs_offline_is_named_and_is_code_1(self):
        self.assertEqual(self.serve(check_offline=True, engine=FakeServer(differing=("r3",))), 1)
        self.assertEqual((self.results["offline_identical"], self.results["offline_compared"]), (4, 5))
        self.assertEqual(self.results["offline_differing"], ["r3"])
        self.assertIn("1 outputs differ from offline generation, among them r3", self.err.getvalue())
        self.assertEqual(self.serve(engine=FakeServer(differing=("r3",))), 0, "nobody looked")
        self.assertNotIn("offline_compared", self.results)

    def test_only_greedy_answers_are_compared_and_deadlines_are_lifted(self):
        lines = [
            {"id": "a", "prompt": "one", "timeout_s": 3.0},
            {"id": "b", "prompt": "two", "temperature": 1.0},
            {"id": "c", "prompt": "too long"},
        ]
        self.serve(lines, check_offline=True)
        self.assertEqual([(prompt.request_id, prompt.timeout_s) for prompt in self.engine.seen], [("a", None)])
        self.assertEqual([prompt.timeout_s for _, prompt in self.engine.offered], [3.0, None, None])
        self.assertEqual(self.results["offline_compared"], 1)

    def test_a_compilation_after_warm_up_is_code_1(self):
        self.assertEqual(self.serve(engine=FakeServer(stats=EngineStats(compilations_after_warmup=2))), 1)
        self.assertEqual(self.results["compilations_after_warmup"], 2)
        self.assertIn("2 programs were compiled after warm-up", self.err.getvalue())

    def test_synthetic_acceptance_is_said_and_cannot_be_compared(self):
        speculation = {"method": "synthetic", "model": "bundled:draft", "acceptance": "iid:0.7"}
        config = CONFIG | {"speculation": speculation}
        self.assertEqual(self.serve(config=config), 0)
        self.assertEqual(self.results["synthetic_acceptance"], "iid:0.7")
        self.assertEqual(self.serve(config=config, check_offline=True, make_engine=self.never), 2)
        self.assertIn("where acceptance is synthetic", self.err.getvalue())

    def test_ctrl_c_leaves_complete_lines_and_a_marked_summary(self):
        self.assertEqual(self.serve(engine=FakeServer(raise_after=2), check_offline=True), 130)
        self.assertLen(self.requests, 2)
        self.assertEqual((self.results["completed"], self.results["interrupted"]), (2, True))
        self.assertEqual(self.engine.events, ["serve", "close"], "nothing is compared")

    def test_a_request_that_the_engine_loses_is_noticed(self):
        with self.assertRaisesRegex(AssertionError, "the engine lost .'r4'."):
            self.serve(engine=FakeServer(lost=("r4",)))


class TraceTest(ServeTraceCase):
    def _replay(self, lines, name, **fields):
        return self.serve(lines, name=name, **{"trace_format": TraceFormat.AUTO, "pacing": None, **fields})

    def test_arrivals_and_lengths_of_a_trace_are_scaled_and_clipped(self):
        code = self._replay(AZURE, "t.csv", scale=TraceScale(time=2.0, length=0.1), check_offline=True)
        self.assertEqual(code, 0)
        self.assertEqual([at_s for at_s, _ in self.engine.offered], [0.0, 3.0, 4.0])
        prompts = [prompt for _, prompt in self.engine.offered]
        self.assertEqual([len(prompt.token_ids) for prompt in prompts], [4, 63, 1])
        self.assertEqual([prompt.params.max_tokens for prompt in prompts], [1, 1, 40])
        self.assertEqual({(prompt.params.ignore_eos, prompt.params.temperature) for prompt in prompts}, {(True, 0.0)})
        self.assertEqual([prompt.request_id for prompt in prompts], ["line-2", "line-3", "line-4"])
        self.assertEqual(self.engine.seen, prompts, "the same prompts are made again for the comparison")
        told = self.results["arrivals"]
        self.assertEqual((told["source"], told["time_scale"], told["length_scale"]), ("trace", 2.0, 0.1))
        self.assertEqual((told["clipped_prompts"], told["clipped_outputs"], told["block_tokens"]), (1, 0, 51))
        self.assertEqual((told["offered_rate"], self.results["request_rate"]), (0.5, 0.5))
        self.assertEqual(self.results["offline_identical"], 3)
        self.assertRegex(self.out.getvalue(), r"Prompts clipped: +1\n")
        self.assertEqual({row["id"]: row["line"] for row in self.requests}, {"line-2": 2, "line-3": 3, "line-4": 4})

    def test_prompts_are_made_of_plain_tokens_and_of_the_seed(self):
        tokenizer = load_tokenizer(fakes.save_tokenizer(self.folder / "tok"))
        served = []
        for seed in (0, 0, 1):
            self._replay(AZURE, "t.csv", engine=FakeServer(tokenizer=tokenizer, max_model_len=2000), seed=seed)
            served.append([prompt.token_ids for _, prompt in self.engine.offered])
        self.assertEqual(served[0], served[1])
        self.assertNotEqual(served[0], served[2])
        used = {token for tokens in served[0] for token in tokens}
        self.assertContainsSubset(used, {*tokenizer.vocabulary().values()} - tokenizer.special_ids)
        self.assertGreater(len(used), 100)

    def test_equal_hash_ids_are_equal_beginnings(self):
        engine = FakeServer(max_model_len=300)
        self._replay(MOONCAKE, "t.jsonl", engine=engine, scale=TraceScale(length=0.1))
        one, other = (prompt.token_ids for _, prompt in engine.offered)
        self.assertEqual(self.results["arrivals"]["block_tokens"], 51)
        self.assertEqual(one[:51], other[:51])
        self.assertNotEqual(one[51], other[51])
        self.assertEqual(engine.offered[1][0], 0.5)

    def test_defaults_of_the_config_do_not_decide_how_long_an_answer_is(self):
        sampling = {"max_tokens": 3, "min_tokens": 2, "stop": ["x"], "stop_token_ids": [7], "temperature": 1.0}
        self._replay(AZURE, "t.csv", config=CONFIG | {"sampling": sampling}, check_offline=True)
        params = self.engine.offered[0][1].params
        self.assertEqual((params.max_tokens, params.min_tokens, params.stop, params.stop_token_ids), (6, 0, (), ()))
        self.assertEqual(params.temperature, 1.0)
        self.assertEqual(self.results["offline_compared"], 0, "sampled answers are not compared")

    def test_arrivals_may_be_drawn_for_the_lengths_of_a_trace(self):
        pacing = Pacing(request_rate=4.0)
        self._replay(AZURE, "t.csv", pacing=pacing, num_prompts=2)
        self.assertEqual([at_s for at_s, _ in self.engine.offered], arrivals.draw(2, pacing, 0).tolist())
        told = self.results["arrivals"]
        self.assertEqual((told["source"], told["request_rate"]), ("trace, arrivals drawn", 4.0))
        self.assertNotIn("time_scale", told)
        self.assertEqual(self.results["request_rate"], 4.0)

    @parameterized.parameters(
        ([*AZURE, "nonsense"], "t.csv, line 5: 1 cells for 3 columns"),
        ([MOONCAKE[0], "{}"], "t.csv, line 1: the first line must name the columns"),
        (AZURE[:1], "holds no request"),
        ([], "holds no request"),
    )
    def test_a_bad_trace_is_code_2_before_the_model_loads(self, lines, message):
        self.assertEqual(self._replay(lines, "t.csv", make_engine=self.never), 2)
        self.assertIn(message, self.err.getvalue())
        self.assertEqual(self.err.getvalue().count("\n"), 1)


class UnusableTest(ServeTraceCase):
    @parameterized.parameters(
        ({"modle": {}}, "config has no field 'modle'"),
        ({"sampling": {"temprature": 0}}, "config field 'sampling': unknown field 'temprature'"),
    )
    def test_a_wrong_config_is_code_2_before_the_model_loads(self, config, message):
        self.assertEqual(self.serve(config=config, make_engine=self.never), 2)
        self.assertIn(message, self.err.getvalue())

    def test_a_model_that_cannot_be_loaded_is_code_2(self):
        def fail(config, **_):
            raise FileNotFoundError("model folder 'x' does not exist")

        self.assertEqual(self.serve(make_engine=fail), 2)
        self.assertEqual(self.err.getvalue(), "error: model folder 'x' does not exist\n")

    def test_a_source_that_cannot_be_read_is_code_2(self):
        self.assertEqual(self.serve(source=self.folder / "none.jsonl", make_engine=self.never), 2)
        self.assertIn("cannot read the input", self.err.getvalue())

    @parameterized.parameters(*common.RECORD_FILES)
    def test_the_source_is_never_overwritten(self, name):
        self.workdir.mkdir()
        source = self.write(GOOD, f"work/{name}")
        before = source.read_bytes()
        self.assertEqual(self.serve(source=source, make_engine=self.never), 2)
        self.assertIn("would be overwritten", self.err.getvalue())
        self.assertEqual(source.read_bytes(), before)

    def test_a_workdir_that_cannot_be_made_is_code_2(self):
        self.assertEqual(self.serve(workdir=self.write([], "file"), make_engine=self.never), 2)
        self.assertIn("cannot write", self.err.getvalue())


class PlainTokensTest(parameterized.TestCase):
    def test_special_tokens_and_ids_without_a_token_are_left_out(self):
        config = Config()
        without = offered_load.plain_tokens(config, None)
        tokenizer = load_tokenizer(resolve_path(config.model.model))
        with_one = offered_load.plain_tokens(config, tokenizer)
        vocab_size = load_config(config.model.model).vocab_size
        self.assertFalse(set(tokenizer.eos_ids) & set(without.tolist()))
        self.assertLen(without, vocab_size - len(tokenizer.eos_ids))
        self.assertEqual(
            set(with_one.tolist()), {*tokenizer.vocabulary().values()} - tokenizer.special_ids - {*tokenizer.eos_ids}
        )


class OptionsTest(parameterized.TestCase):
    def _options(self, *arguments):
        values = flags.FlagValues()
        serve_options.define_flags(values)
        common.parse_flags(["serve_trace", *arguments], default_config=serve_trace.DEFAULT_CONFIG, values=values)
        return serve_options.read_options(values, ["serve_trace", *arguments])

    def test_the_bundled_prompts_come_at_once_by_default(self):
        options = self._options()
        self.assertEqual((options.source, options.trace_format), (common.BUNDLED_PROMPTS, None))
        self.assertEqual(options.pacing, Pacing())
        self.assertIsNone(options.levels)
        self.assertFalse(options.check_offline)
        self.assertEqual(options.workdir.parent, pathlib.Path("workdirs"))
        self.assertStartsWith(options.workdir.name, "serve_trace-")

    def test_every_flag_reaches_the_options(self):
        options = self._options(
            "--input=IN", "--num_prompts=3", "--burstiness=0.5", "--ramp_up=exponential", "--ramp_up_start_rps=1",
            "--ramp_up_end_rps=2", "--max_tokens=5", "--seed=9", "--check_offline", "--workdir=W",
        )  # fmt: skip
        self.assertEqual((options.source, options.num_prompts, options.seed), (pathlib.Path("IN"), 3, 9))
        want = Pacing(burstiness=0.5, ramp_up=RampUp.EXPONENTIAL, start_rps=1.0, end_rps=2.0)
        self.assertEqual(options.pacing, want)
        self.assertEqual(options.config["sampling"]["max_tokens"], 5)
        self.assertTrue(options.check_offline)
        self.assertEqual(options.workdir, pathlib.Path("W"))
        self.assertEqual(options.command[1], "--input=IN")
        self.assertEqual(self._options("--request_rate=2.5").pacing, Pacing(request_rate=2.5))

    def test_a_trace_brings_its_own_arrivals_unless_a_process_is_given(self):
        options = self._options("--trace=T", "--trace_format=mooncake", "--time_scale=3", "--length_scale=0.5")
        self.assertEqual((options.source, options.trace_format), (pathlib.Path("T"), TraceFormat.MOONCAKE))
        self.assertEqual(options.scale, TraceScale(time=3.0, length=0.5))
        self.assertIsNone(options.pacing)
        self.assertEqual(self._options("--trace=T").trace_format, TraceFormat.AUTO)
        self.assertEqual(self._options("--trace=T", "--burstiness=2").pacing, Pacing(burstiness=2.0))

    def test_service_levels_are_milliseconds_and_the_objective_of_routing(self):
        options = self._options("--goodput=ttft:250,tpot:40 e2el:5000")
        self.assertEqual(options.levels, ServiceLevels(ttft_s=0.25, tpot_s=0.04, e2el_s=5.0))
        config, _ = common.split_config(options.config)
        self.assertEqual((config.routing.ttft_s, config.routing.tpot_s), (0.25, 0.04))
        self.assertEqual(config.routing.policy, "flowguard")
        config, _ = common.split_config(self._options("--goodput=e2el:5000", "--config.routing.ttft_s=7").config)
        self.assertEqual((config.routing.ttft_s, config.routing.tpot_s), (7.0, 0.1))

    def test_requests_are_greedy_unless_the_config_says_otherwise(self):
        self.assertEqual(serve_options.with_flags({}, None, None)["sampling"], {"temperature": 0.0})
        told = serve_options.with_flags({"sampling": {"temperature": 0.7}}, None, 4)["sampling"]
        self.assertEqual(told, {"temperature": 0.7, "max_tokens": 4})

    @parameterized.parameters(
        (("--input=A", "--trace=B"), "--input and --trace exclude each other"),
        (("--trace=B", "--max_tokens=3"), "--max_tokens has no effect"),
        (("--trace=B", "--request_rate=3", "--time_scale=2"), "--time_scale has no effect"),
        (("--time_scale=2",), "need a --trace"),
        (("--length_scale=2",), "need a --trace"),
        (("--trace_format=azure",), "need a --trace"),
        (("--trace=B", "--time_scale=0"), "time_scale must be positive"),
        (("--request_rate=-1",), "request_rate must be positive"),
        (
            ("--request_rate=1", "--ramp_up=linear", "--ramp_up_start_rps=1", "--ramp_up_end_rps=2"),
            "exclude each other",
        ),
        (("--goodput=ttft:1,ttft:2",), "goodput must be like"),
        (("--goodput=latency:1",), "goodput must be like"),
        (("--goodput=",), "goodput must be like"),
        (("--goodput=ttft",), "the limit of ttft must be a number of milliseconds, got ''"),
        (("--goodput=ttft:fast",), "the limit of ttft must be a number of milliseconds, got 'fast'"),
        (("--goodput=ttft:0",), "the limit of ttft must be positive"),
    )
    def test_flags_that_make_no_sense_are_refused(self, arguments, message):
        with self.assertRaisesRegex(common.RunError, message):
            self._options(*arguments)

    def test_the_config_has_two_pairs_that_adapt_and_room_to_wait(self):
        config, sampling = common.split_config(self._options().config)
        self.assertEqual((config.topology.num_pairs, config.routing.policy), (2, "flowguard"))
        self.assertEqual((config.speculation.policy, config.speculation.model), ("specustream", "bundled:draft"))
        self.assertEqual(config.scheduler.max_waiting, 4096)
        self.assertEqual(sampling["temperature"], 0.0)


class RealEngineTest(ServeTraceCase):
    def test_a_trace_is_served_by_a_real_engine_as_it_is_offline(self):
        tiny_models.save_tiny(self.folder / "model", "llama")
        lines = [AZURE[0], *(f"2023-11-16 18:17:03.{tenth},{20 + tenth},{3 + tenth}" for tenth in range(8))]
        code = self.serve(
            lines,
            name="t.csv",
            trace_format=TraceFormat.AUTO,
            pacing=None,
            config={
                "model": {"model": str(self.folder / "model"), "skip_tokenizer_init": True, "max_model_len": 100},
                "topology": {"num_pairs": 2},
                "pipeserve": {"max_num_seqs": 2, "prefill_buckets": (64,), "max_logprobs": 0, "transfer_buckets": ()},
                "speculation": {"method": "none"},
                "routing": {"policy": "flowguard"},
                "scheduler": {"forbid_compilation": True},
                "sampling": {"temperature": 0.0},
            },
            make_engine=streamserve.LLM.from_config,
            check_offline=True,
        )
        self.assertEqual(code, 0, self.err.getvalue())
        self.assertEqual((self.results["offline_identical"], self.results["offline_compared"]), (8, 8))
        self.assertEqual(sum(self.results["completions_per_lane"]), 8)
        self.assertEqual(
            [row["num_output_tokens"] for row in sorted(self.requests, key=lambda row: row["line"])], [*range(3, 11)]
        )
        self.assertLen(flowguard.read_routes(self.workdir / "routes.jsonl")[1], 8)
        self.assertTrue((self.workdir / "trace.json").exists())
