"""The script of the reproduction with fake engines: fair runs, what a row says, and what cannot run."""

import itertools
import json
import pathlib

import numpy as np
from absl import flags
from absl.testing import parameterized

from experiments import arrivals, common, paper_options, paper_rows, reproduce_paper
from experiments.paper_arms import PLAIN, Arm
from streamserve import mesh
from streamserve.metrics import EngineStats
from tests import fakes
from tests.experiments.paper_study import ARMS, BASE, FLEETS, SYSTEM, PaperCase

CONFIG = {
    "model": {"max_model_len": 2560},
    "speculation": {"method": "draft_model", "model": "bundled:draft", "policy": "specustream", "max_depth": 2},
    "sampling": {"max_tokens": 8, "temperature": 0.0},
    "fleets": FLEETS,
    "compilation_cache_dir": "/home/me/cache",
}


def batched(items, size):
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


class FakeEngine:
    """Serves on a clock of its own; prompt i of an arm takes i + 1 seconds. `ill` arms misbehave as told."""

    def __init__(self, config, world):
        self.config, self._world, self._router, self._policy, self._compiled = config, world, None, None, 0
        self._moved = 0

    def use_router(self, name):
        self._router = name

    def use_policy(self, name):
        self._policy = name

    def serve(self, pairs):
        pairs, world = list(pairs), self._world
        fleet = next(name for name, engine in world.engines.items() if engine is self)
        arm = Arm(fleet, self._router, self._policy)
        self._router = self._policy = None  # what is not set anew for a run is missed
        ill, begin_s = world.ill.get(str(arm)), world.now_s
        world.runs.append((arm, [at_s for at_s, _ in pairs], [prompt for _, prompt in pairs]))
        self._compiled += ill == "compiles"
        self._moved += self.config.topology.topology == "disaggregated" and ill != "moves nothing"
        for index, (at_s, prompt) in reversed(list(enumerate(pairs))):
            drafted = () if arm.policy == PLAIN or ill == "drafts nothing" else (2, 2)
            yield fakes.make_output(
                prompt.request_id,
                tokens=(7, 8, 9, index + (ill == "differs" and index == 0)),
                times=(at_s, at_s + 0.4, at_s + 0.4 + index + 1),
                drafted=drafted,
                accepted=(2, 0) if drafted else (),
                measured={"lane": index % 2 if self.config.topology.num_pairs > 1 else 0},
                error="it broke" if ill == "fails" and index == 0 else None,
            )
        world.now_s = begin_s + 10.0

    def stats(self):
        return EngineStats(compilations_after_warmup=self._compiled, kv_transfer_bytes=self._moved, programs=5)


class World:
    """All fake engines of a run, their clock, and what was asked of them."""

    def __init__(self, *, ill=None, unbuildable=()):
        self.now_s, self.engines, self.configs, self.runs = 0.0, {}, {}, []
        self.ill, self._unbuildable = ill or {}, unbuildable

    def make(self, config):
        values = (config.topology.topology, config.topology.num_pairs, config.speculation.method != "none")
        name = next(
            name for name, one in FLEETS.items() if (one["topology"], one["num_pairs"], one["drafts"]) == values
        )
        self.configs[name] = config
        if name in self._unbuildable:
            raise ValueError("a mesh of 4 devices does not divide the model's 2 key/value heads")
        self.engines[name] = FakeEngine(config, self)
        return self.engines[name]


class RunTest(PaperCase):
    def reproduce(self, world=None, *, config=None, **fields):
        """Run the script with fake engines; gives its exit code, the header, the engines and the runs."""
        self.world = world or World()
        path = self.folder / "in.jsonl"
        path.write_text('{"prompt": "one"}\n{"question_id": 2, "turns": ["two", "later"]}\n{"prompt": "three"}\n')
        options = paper_options.Options(
            **{
                "config": CONFIG | (config or {}),
                "output": self.rows_path,
                "workloads": (("a", path), ("b", path)),
                "num_prompts": 2,
                "repeats": 2,
                "command": ("--output=/home/me/rows.jsonl", "--workload=a=../shared/in.jsonl"),
                **fields,
            }
        )
        with self.printing():
            code = reproduce_paper.run(options, self.world.make, clock=lambda: self.world.now_s)
        lines = [json.loads(line) for line in self.rows_path.read_text().splitlines()] if code != 2 else []
        return code, *([line for line in lines if line["kind"] == kind] for kind in ("header", "engine", "run"))

    def test_every_arm_runs_on_every_workload_and_mode_before_the_next_repeat(self):
        code, headers, engines, runs = self.reproduce(repeats=4)
        self.assertEqual((code, len(headers)), (0, 1))
        self.assertEqual({engine["fleet"] for engine in engines}, set(FLEETS))
        warm, measured = self.world.runs[: len(ARMS)], self.world.runs[len(ARMS) :]
        self.assertCountEqual([arm for arm, _, _ in warm], ARMS)
        turns = [[arm for arm, _, _ in turn] for turn in batched(measured, len(ARMS))]
        self.assertLen(turns, 4 * 2 * 2)
        for turn in turns:
            self.assertCountEqual(turn, ARMS)
        self.assertEqual(turns[4:8], [turn[::-1] for turn in turns[:4]], "what slows down steadily favours none")
        self.assertGreater(len({tuple(turn) for turn in turns}), 8, "the next two repeats are drawn anew")
        keys = ("repeat", "workload", "mode", "position")
        self.assertEqual(
            [tuple(run[key] for key in keys) for run in runs],
            list(itertools.product(range(4), "ab", ("offline", "open"), range(len(ARMS)))),
        )
        self.assertEqual([paper_rows.arm_of(run) for run in runs], [arm for arm, _, _ in measured])

    def test_all_arms_of_a_turn_get_the_same_prompts_seeds_and_arrivals(self):
        self.reproduce(seed=5, max_tokens=3, rate=2.0)
        turns = batched(self.world.runs[len(ARMS) :], len(ARMS))
        for index, turn in enumerate(turns):
            _, at_s, prompts = turn[0]
            self.assertTrue(all((its_s, its) == (at_s, prompts) for _, its_s, its in turn))
            self.assertEqual(
                [(prompt.text, prompt.params.max_tokens, prompt.params.seed) for prompt in prompts],
                [("one", 3, 5), ("two", 3, 6)],
            )
            expected = arrivals.draw(2, arrivals.Pacing(request_rate=2.0), 5 + index // 4).tolist()
            self.assertEqual(at_s, expected if index % 2 else [0.0, 0.0])

    def test_fleets_share_all_settings_and_divide_the_slots(self):
        _, headers, engines, _ = self.reproduce(concurrency=4)
        pairs = {name: (config.topology.num_pairs, config.pipeserve) for name, config in self.world.configs.items()}
        self.assertEqual({num * sizes.max_num_seqs for num, sizes in pairs.values()}, {4})
        self.assertEqual({num * sizes.max_prefills for num, sizes in pairs.values()}, {4})
        methods = {name: config.speculation.method for name, config in self.world.configs.items()}
        self.assertEqual(methods, {"pd": "draft_model", "co": "draft_model", "tp": "none", "bare": "none"})
        self.assertEqual({engine["devices"] for engine in engines}, {4})
        self.assertEqual(headers[0]["concurrency"], 4)

    def test_a_row_says_what_an_arm_did(self):
        _, _, _, runs = self.reproduce()
        run = next(run for run in runs if paper_rows.arm_of(run) == SYSTEM and run["mode"] == "offline")
        expected = {
            "duration_s": 10.0,
            "failed": 0,
            "compilations_after_warmup": 0,
            "kv_transfer_bytes": 1,
            "drafts": 4,
            "draft_tokens": 8,
            "accepted_tokens": 4,
            "input_tokens": [3, 3],
            "output_tokens": [4, 4],
            "ttft_s": [0.4, 0.4],
            "latency_s": [1.4, 2.4],
            "lane": [0, 1],
        }
        self.assertEqual({name: run[name] for name in expected}, expected)
        # Served from a quarter of the time to the first token on: 1.3 and 2.3 s of the ten seconds' wall time.
        np.testing.assert_allclose(run["charged_s"], [10 * 1.3 / 3.6, 10 * 2.3 / 3.6], atol=1e-6)
        self.assertLen(set(run["tokens_sha256"]), 2)

    def test_the_record_names_the_machine_and_no_folder_of_it(self):
        self.reproduce()
        text = self.rows_path.read_text()
        header = json.loads(text.splitlines()[0])
        self.assertLessEqual({"versions", "platform", "devices", "git", "cores", "seed", "sampling"}, header.keys())
        self.assertEndsWith(header["command"], "reproduce_paper --output=rows.jsonl --workload=a=in.jsonl")
        self.assertEqual({facts["prompts"] for facts in header["workloads"].values()}, {2})
        self.assertEqual({facts["lines"] for facts in header["workloads"].values()}, {3})
        for folder in ("/home", "..", "shared", "compilation_cache_dir"):
            self.assertNotIn(folder, text)

    def test_a_baseline_that_cannot_be_built_is_said_and_not_run(self):
        code, _, engines, runs = self.reproduce(World(unbuildable=("tp",)))
        self.assertEqual(code, 0)
        self.assertNotIn("tp", {run["fleet"] for run in runs})
        refused = [engine for engine in engines if "refused" in engine]
        self.assertEqual([engine["fleet"] for engine in refused], ["tp"])
        self.assertIn("fleet `tp` could not be built: a mesh of 4 devices", self.out.getvalue())
        self.assertIn("tp cannot be built", self.err.getvalue())
        self.assertEqual(self.reproduce(World(unbuildable=("pd",)))[0], 2)
        self.assertIn("error: fleet 'pd': a mesh of 4 devices", self.err.getvalue())

    @parameterized.named_parameters(
        ("compiles", "compiles", "5 programs were compiled while {arm} ran"),
        ("fails", "fails", "2 prompts of {arm} failed"),
        ("differs", "differs", "1 prompts of a run have other tokens, allowed are 0"),
        ("drafts_nothing", "drafts nothing", "{arm} drafted nothing"),
        ("moves_nothing", "moves nothing", "{arm} handed nothing over from prefill to decode"),
    )
    def test_an_arm_that_misbehaves_gets_no_speed_up_and_code_1(self, ill, reason):
        code, _, _, runs = self.reproduce(World(ill={str(SYSTEM): ill}))
        told = reason.format(arm=SYSTEM)
        if ill == "compiles":
            told = told.replace("5", "2")
        self.assertEqual(code, 1)
        self.assertIn(f"{SYSTEM} over {BASE} (system): {told}\n", self.err.getvalue())
        self.assertRegex(self.out.getvalue(), rf"\| a \| {BASE} \| refused \| refused \|")
        self.assertRegex(self.out.getvalue(), r"\| routing \| refused \| refused \| refused \|")
        self.assertLen(runs, 2 * 2 * 2 * len(ARMS), "the rows are kept")

    def test_so_many_prompts_may_differ_as_is_said(self):
        self.assertEqual(self.reproduce(World(ill={str(SYSTEM): "differs"}), max_different=1)[0], 0)

    @parameterized.named_parameters(
        ("router", {"routers": ("flowgard",)}, "unknown routing.policy 'flowgard'"),
        ("policy", {"policies": ("specustreem",)}, "unknown speculation.policy 'specustreem'"),
        ("depth", {"policies": ("fixed:7",)}, "no program of that depth"),
        ("oracle", {"policies": ("oracle",)}, "the oracle knows the true acceptance"),
        ("fleet", {"fleets": ("pd", "cp")}, "--fleets must be among"),
        ("one_level", {"fleets": ("pd", "tp")}, "one colocated and one disaggregated fleet must draft"),
        ("slots", {"concurrency": 3}, "concurrency=3 must divide over 2 pairs"),
        ("field", {"config": {"fleets": {**FLEETS, "x": {"pairs": 2}}}}, "config has no field 'fleets.x.pairs'"),
        ("no_fleets", {"config": {"fleets": {"x": {}}}}, "fleets.x"),
        ("topology", {"config": {"fleets": {**FLEETS, "tp": FLEETS["tp"] | {"topology": "x"}}}}, "topology.topology"),
        ("synthetic", {"config": {"speculation": CONFIG["speculation"] | {"method": "none"}}}, "output is exact"),
        ("sampled", {"config": {"sampling": {"temperature": 1.0}}}, "temperature must be 0"),
        ("several", {"config": {"sampling": {"temperature": 0.0, "n": 2}}}, "temperature must be 0 and n 1"),
        ("sampling", {"config": {"sampling": {"heat": 1.0}}}, "config field 'sampling'"),
        ("workload", {"workloads": (("a", pathlib.Path("nowhere.jsonl")),)}, "cannot read the workload"),
        ("output", {"output": pathlib.Path("/nowhere/rows.jsonl")}, "there is no such folder"),
    )
    def test_what_cannot_run_is_one_line_and_code_2_before_an_engine_is_built(self, fields, message):
        self.assertEqual(self.reproduce(**fields)[0], 2)
        self.assertIn(message, self.err.getvalue())
        self.assertEqual(self.err.getvalue().count("\n"), 1)
        self.assertEmpty(self.world.configs)

    def test_flags_become_options_of_the_config(self):
        values = flags.FlagValues()
        paper_options.define_flags(values)
        arguments = ["x", "--workload=a=x.jsonl", "--workload=b=y=z.jsonl", "--rate=2", "--modes=open", "--repeats=3"]
        common.parse_flags(arguments, default_config=reproduce_paper.DEFAULT_CONFIG, values=values)
        options = paper_options.read_options(values, arguments[1:])
        self.assertEqual(
            [(name, str(path)) for name, path in options.workloads], [("a", "x.jsonl"), ("b", "y=z.jsonl")]
        )
        self.assertEqual((options.rate, options.modes, options.repeats, options.concurrency), (2.0, ("open",), 3, 8))
        fleets, configs, sampling = reproduce_paper.read_engines(options)
        self.assertEqual({mesh.num_devices(config.topology) for config in configs.values()}, {4})
        self.assertLen([fleet for fleet in fleets.values() if fleet.drafts], 2)
        self.assertEqual(sampling["max_tokens"], 24)
        for name, bad in (
            ("workload", ["a=x", "a=y"]),
            ("modes", ["closed"]),
            ("routers", ["round_robin"]),
            ("policies", [PLAIN]),
            ("rate", 0.0),
        ):
            kept, values[name].value = values[name].value, bad
            with self.assertRaises(common.RunError):
                paper_options.read_options(values, [])
            values[name].value = kept
