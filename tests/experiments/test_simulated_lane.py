"""Simulated stream pairs: their times against hand calculations, their pages against those of a real pair."""

import dataclasses
import random

import numpy as np
from absl.testing import parameterized

from experiments import router_capacity
from experiments.router_clock import InOrder, LaneCosts, VirtualClock
from experiments.router_runs import Simulation
from experiments.router_scenarios import Ask
from experiments.simulated_lane import SimulatedPair
from streamserve.config import Config, from_mapping
from streamserve.flowguard import Route
from streamserve.flowguard.routers.picking import stateless
from streamserve.pipeserve import StreamPair
from streamserve.specustream import CostTable
from streamserve.types import Deferred, Job
from tests.doubles import assert_empty, make_request
from tests.fake_programs import FakePrograms

COSTS = LaneCosts(
    prefill_fixed_s=0.010,
    prefill_token_s=0.001,
    tick_fixed_s=0.002,
    transfer_fixed_s=0.003,
    transfer_bytes_per_s=1000.0,
    token_bytes=5,
)
ROUND_S = {0: 0.004, 2: 0.007}  # of one row, by depth; each other row costs a millisecond more
CONFIG = {
    "model": {"max_model_len": 40},
    "topology": {"num_pairs": 1},
    "pipeserve": {
        "max_num_seqs": 4,
        "decode_batches": (1, 2),
        "max_prefills": 3,
        "prefill_buckets": (4, 12),
        "page_size": 4,
        "rounds_per_tick": 2,
        "enable_prefix_caching": False,
    },
    "routing": {"policy": "round_robin", "ttft_s": 0.1, "tpot_s": 0.01},
}
SYNTHETIC = {
    "method": "synthetic",
    "model": "bundled:draft",
    "acceptance": "iid:0.6",
    "policy": "fixed",
    "num_speculative_tokens": 2,
}
CALL_12_S, TICK_S = 0.010 + 12 * 0.001, 0.002 + 2 * 0.004
WAY_S = 0.003 + 12 * 5 / 1000  # three pages


def always_local(num_lanes):
    """Route to lane 0, and let it prefill where it decodes."""
    del num_lanes
    return stateless(lambda context, noise_A2: Route(0, local=bool(context.local_A[0])))


def any_way(num_lanes):
    """Route to any lane, and let it prefill where it decodes half of what can be."""
    del num_lanes

    def choose(context, noise_A2):
        arm = int(np.flatnonzero(context.eligible_A)[int(noise_A2[0, 0] * context.eligible_A.sum()) - 1])
        return Route(arm, local=bool(context.local_A[arm] and noise_A2[0, 1] < 0.5))

    return stateless(choose)


def config_of(**sections) -> Config:
    merged = {name: CONFIG.get(name, {}) | sections.get(name, {}) for name in {*CONFIG, *sections}}
    return from_mapping(Config, merged)


def simulation(**sections) -> Simulation:
    """Build a fleet in which a round takes `ROUND_S` and a millisecond more for each further row."""
    config = config_of(**sections)
    lanes = router_capacity.fleet(config, 40)
    tiers, batches = lanes[0].sizes.tiers, sorted({batch for lane in lanes for batch in lane.sizes.batches})
    seconds = np.array([[[ROUND_S[tier] + 0.001 * (batch - 1) for tier in tiers]] for batch in batches])
    rounds = CostTable(
        tiers=tiers, batches=batches, contexts=(0,), seconds_NCA=seconds, draft_NCA=np.zeros_like(seconds)
    )
    return Simulation(config=config, lanes=lanes, costs=COSTS, rounds=rounds)


def ask(at_s=0.0, prompt=12, output=5, first=0) -> Ask:
    return Ask(at_s, tuple(first + token for token in range(prompt)), output)


def served(fleet: Simulation, asks):
    """Serve requests in turn; gives their times, the lanes and the clock."""
    scheduler, clock, pairs = fleet.build("round_robin", seed=0)
    requests = []
    for index, one in enumerate(asks):
        clock.expect(one.at_s)
        requests.append((one.at_s, make_request(str(index), one.tokens, max_tokens=one.max_tokens)))
    times = {int(end.request_id): end.metrics for end in scheduler.serve(requests)}
    return [times[index] for index in range(len(asks))], pairs, clock


class ClockTest(parameterized.TestCase):
    def test_a_nap_ends_at_the_next_event_and_a_sleep_does_not(self):
        clock = VirtualClock()
        for when_s in (0.5, 0.2, 0.2):
            clock.expect(when_s)
        told = []
        for _ in range(4):
            clock.nap(0.4)
            told.append(clock())
        self.assertEqual(told, [0.2, 0.5, 0.9, 1.3])
        clock.expect(1.4)
        clock.sleep(1.0)
        self.assertEqual(clock(), 2.3)
        clock.nap(0.25)
        self.assertEqual(clock(), 2.55, "an event that was slept over holds nobody up")

    def test_waiting_for_what_has_been_takes_no_time(self):
        clock = VirtualClock()
        clock.wait_until(2.0)
        clock.wait_until(1.0)
        self.assertEqual(clock(), 2.0)

    def test_work_on_a_mesh_is_done_in_order_and_ends_naps(self):
        clock = VirtualClock()
        mesh, other = InOrder(clock), InOrder(clock)
        self.assertEqual([mesh.run(0.3), mesh.run(0.2), other.run(0.1)], [0.3, 0.5, 0.1])
        self.assertEqual(mesh.run(0.1, after_s=2.0), 2.1)
        clock.nap(9.0)
        self.assertEqual(clock(), 0.1)
        clock.sleep(2.9)
        self.assertEqual(mesh.run(0.5), 3.5)
        self.assertAlmostEqual(mesh.busy_s, 1.1)
        clock.sleep(0.2)
        mesh.clear()
        self.assertAlmostEqual(mesh.busy_s, 0.8, msg="what was lost was no work")
        self.assertAlmostEqual(mesh.run(1.0), 4.2)

    @parameterized.parameters("prefill_fixed_s", "token_bytes", "transfer_bytes_per_s")
    def test_costs_are_not_negative(self, name):
        with self.assertRaisesRegex(ValueError, f"costs.{name} must"):
            dataclasses.replace(COSTS, **{name: -1})
        with self.assertRaisesRegex(ValueError, "must be positive"):
            dataclasses.replace(COSTS, transfer_bytes_per_s=0)


class TimesTest(parameterized.TestCase):
    """One lane without a queue, by hand. A tick of a row is two rounds; its first brings the first token, too."""

    @parameterized.named_parameters(
        ("apart", {}, CALL_12_S + WAY_S + TICK_S),
        ("colocated", {"topology": {"topology": "colocated"}}, CALL_12_S + TICK_S),
        (
            "local",
            {"routing": {"policy": f"{__name__}:always_local", "local_prefill_tokens": 12}},
            CALL_12_S + TICK_S,
        ),
        ("not local, being too long", {"routing": {"local_prefill_tokens": 8}}, CALL_12_S + WAY_S + TICK_S),
    )
    def test_the_first_token_takes_prefill_transfer_and_a_tick(self, sections, ttft_s):
        fleet = simulation(**sections)
        row = fleet.run(fleet.config.routing.policy, [ask(output=5)], duration_s=1.0, seed=0)
        self.assertAlmostEqual(row["p50_ttft_ms"], 1e3 * ttft_s)
        self.assertAlmostEqual(row["p50_tpot_ms"], 1e3 * TICK_S / 4, msg="five tokens in two ticks")
        self.assertEqual((row["requests"], row["answered"], row["goodput"]), (1, 1, float(ttft_s <= 0.1)))
        self.assertEqual(row["local_share"], float("always_local" in fleet.config.routing.policy))

    def test_a_short_prompt_takes_a_small_call_and_few_pages(self):
        row = simulation().run("round_robin", [ask(prompt=3, output=1)], duration_s=1.0, seed=0)
        self.assertAlmostEqual(row["p50_ttft_ms"], 1e3 * (0.010 + 4 * 0.001 + 0.003 + 4 * 5 / 1000 + 0.002))
        self.assertIsNone(row["p50_tpot_ms"], "one token has no time after it")

    def test_a_call_costs_what_its_program_has_room_for(self):
        row = simulation().run("round_robin", [ask(prompt=8, output=3)], duration_s=1.0, seed=0)
        self.assertAlmostEqual(row["p50_ttft_ms"], 1e3 * (CALL_12_S + 0.003 + 8 * 5 / 1000 + TICK_S))

    def test_a_long_prompt_takes_several_calls(self):
        row = simulation().run("round_robin", [ask(prompt=15, output=3)], duration_s=1.0, seed=0)
        way_s = 0.003 + 16 * 5 / 1000
        self.assertAlmostEqual(row["p50_ttft_ms"], 1e3 * (CALL_12_S + 0.010 + 4 * 0.001 + way_s + TICK_S))

    def test_rows_share_ticks_and_prompts_share_calls(self):
        asks = [ask(prompt=4, output=3, first=20 * index) for index in range(3)]
        times, (pair,), _ = served(simulation(), asks)
        # Three tiles in one call; pages one after the other; the first row does not wait for the others.
        arrived_s = [0.022 + count * (0.003 + 20 / 1000) for count in (1, 2, 3)]
        first_s = [one.first_token_s for one in times]
        self.assertSequenceAlmostEqual(first_s, [arrived + TICK_S for arrived in arrived_s])
        self.assertAlmostEqual(pair.prefill_mesh.busy_s, 0.022)

    def test_a_tick_costs_by_its_program_and_rounds(self):
        asks = [ask(prompt=4, output=3, first=20 * index) for index in range(3)]
        at_once = dataclasses.replace(COSTS, transfer_fixed_s=0, token_bytes=0)
        times, (pair,), _ = served(dataclasses.replace(simulation(), costs=at_once), asks)
        tick_s = 0.002 + 2 * (0.004 + 0.003)  # three rows take the program of four
        self.assertSequenceAlmostEqual([one.first_token_s for one in times], [0.022 + tick_s] * 3)
        self.assertAlmostEqual(pair.decode_mesh.busy_s, tick_s + 0.002, msg="and a tick in which no row runs")

    def test_meshes_are_as_busy_as_their_work(self):
        _, (pair,), clock = served(simulation(), [ask(0.2 * index, first=20 * index) for index in range(5)])
        self.assertAlmostEqual(pair.prefill_mesh.busy_s, 5 * CALL_12_S)
        self.assertAlmostEqual(pair.link.busy_s, 5 * WAY_S)
        # Five tokens are two ticks; a third is under way, empty, when the second is read.
        self.assertAlmostEqual(pair.decode_mesh.busy_s, 5 * (2 * TICK_S + 0.002))
        self.assertAlmostEqual(clock(), 0.8 + CALL_12_S + WAY_S + 2 * TICK_S, delta=0.0021)

    def test_prefill_and_decode_run_side_by_side_unless_colocated(self):
        asks = [ask(output=21), *(ask(0.04 + 0.02 * index, first=20 + 20 * index) for index in range(3))]
        spans = []
        for topology in ("disaggregated", "colocated"):
            (first, *_), _, _ = served(simulation(topology={"topology": topology}), asks)
            spans.append(first.finished_s - first.first_token_s)
        self.assertLess(spans[0], 9 * TICK_S + CALL_12_S)
        self.assertGreater(spans[1], spans[0] + 2 * CALL_12_S, "its ticks stood behind calls")

    def test_a_slow_pair_takes_so_many_times_as_long_and_a_delay_comes_on_top(self):
        base = CALL_12_S + WAY_S + TICK_S
        slow = simulation(lanes={"slowdown": (3.0,)}).run("round_robin", [ask()], duration_s=1.0, seed=0)
        # Pages travel at once: they wait for the prompt that only seems to take longer.
        seems_s = max(3 * CALL_12_S, CALL_12_S + WAY_S) + 3 * TICK_S
        self.assertAlmostEqual(slow["p50_ttft_ms"], 1e3 * seems_s, delta=2.5)
        late = simulation(lanes={"transfer_delay_s": (0.2,)}).run("round_robin", [ask()], duration_s=1.0, seed=0)
        self.assertAlmostEqual(late["p50_ttft_ms"], 1e3 * (base - WAY_S + 0.2), delta=2.5)

    def test_a_dead_lane_is_left_and_comes_back(self):
        lanes = {"down_from_s": (0.15, -1.0), "down_until_s": (0.5, -1.0)}
        fleet = simulation(topology={"num_pairs": 2}, lanes=lanes)
        times, pairs, _ = served(fleet, [ask(0.1 * index, first=20 * index) for index in range(12)])
        lanes = [one.lane for one in times]
        self.assertEqual([lanes[index] for index in (0, 2, 3, 4)], [0, 1, 1, 1])
        self.assertIn(0, lanes[6:])
        assert_empty(pairs)


class LuckTest(parameterized.TestCase):
    @parameterized.parameters(("iid:1.0", 3.0), ("iid:0.0", 1.0), ("iid:0.6", 1 + 0.6 + 0.36))
    def test_drafts_are_accepted_as_the_process_says(self, acceptance, per_round):
        fleet = simulation(speculation=SYNTHETIC | {"acceptance": acceptance}, model={"max_model_len": 40})
        scheduler, _, _ = fleet.build("round_robin", seed=3)
        requests = [(0.0, make_request(str(index), (index, 1, 2), max_tokens=36)) for index in range(40)]
        ends = list(scheduler.serve(requests))
        self.assertEqual({len(end.completion.token_ids) for end in ends}, {36}, "the end cuts what is accepted")
        steps = [end.metrics for end in ends]
        # The last round of a row may be cut by its end.
        accepted = [count for one in steps for count in one.accepted_per_step[:-1]]
        self.assertAlmostEqual(1 + float(np.mean(accepted)), per_round, delta=0.08)
        self.assertEqual({count for one in steps for count in one.drafted_per_step}, {2})

    def test_the_same_seed_gives_the_same_run_and_another_one_another(self):
        fleet = simulation(speculation=SYNTHETIC, topology={"num_pairs": 2})
        asks = [ask(0.03 * index, prompt=4, output=9, first=9 * index) for index in range(30)]
        rows = [fleet.run("power_of_two", asks, duration_s=1.0, seed=seed) for seed in (0, 0, 1)]
        self.assertEqual(rows[0], rows[1])
        self.assertNotEqual(rows[0], rows[2])


class ConservationTest(parameterized.TestCase):
    @parameterized.product(
        topology=("disaggregated", "colocated"),
        preemption=("recompute", "keep"),
        cached=(False, True),
    )
    def test_every_request_ends_once_and_nothing_is_held_afterwards(self, topology, preemption, cached):
        fleet = simulation(
            topology={"num_pairs": 2, "topology": topology},
            pipeserve={"preemption": preemption, "enable_prefix_caching": cached, "prefill_pool_tokens": 40},
            lanes={"slowdown": (2.0, 1.0), "slots": (3, 4), "decode_pool_tokens": (40, 44)},
            routing={"local_prefill_tokens": 8},
            scheduler={"max_waiting": 200},
        )
        walk = random.Random(f"{topology}{preemption}{cached}")
        scheduler, clock, pairs = fleet.build(f"{__name__}:any_way", seed=0)
        requests, at_s = [], 0.0
        for index in range(30):
            at_s += walk.expovariate(60)
            prompt = (walk.choice((1, 2)),) * walk.randint(0, 8) + (index,) * walk.randint(1, 4)
            requests.append((at_s, make_request(str(index), prompt, max_tokens=walk.randint(1, 28))))
            clock.expect(at_s)
        wanted = {request.request_id: request.params.max_tokens for _, request in requests}
        ends = list(scheduler.serve(requests))
        self.assertEqual(sorted(end.request_id for end in ends), sorted(wanted))
        for end in ends:
            self.assertLen(end.completion.token_ids, wanted[end.request_id])
        self.assertGreater(scheduler.counters().preemptions, 0, "pages are so few that rows lose them")
        self.assertEqual(scheduler.counters().local_prefills > 0, topology == "disaggregated")
        assert_empty(pairs)

    def test_a_decision_sees_what_is_under_way(self):
        pair, _ = _twins(seed=0)
        task = pair.begin(Job(request=make_request("a", tuple(range(10)))))
        self.assertEqual((pair.waiting_tiles, pair.free_slots), (3, 4))
        self.assertLen(pair.prefill().parts, 1)
        self.assertEqual(pair.waiting_tiles, 0)
        item = pair.hand_off(task)
        self.assertEqual((item.transfer_pages, item.transfer_bytes), (3, 60))
        self.assertFalse(pair.is_prompt_computed(item) or pair.has_arrived(item))


def _twins(*, seed, **options):
    """Give a simulated pair and a real one of the same sizes, the latter over programs that only keep books."""
    del seed
    colocated = options.pop("colocated", False)
    programs = FakePrograms(depth=0, colocated=colocated, **options)
    clock = VirtualClock()
    tiers, batches = programs.sizes.tiers, programs.sizes.batches
    seconds = np.full((len(batches), 1, len(tiers)), 0.01)
    table = CostTable(tiers=tiers, batches=batches, contexts=(0,), seconds_NCA=seconds, draft_NCA=0 * seconds)
    reuse = programs.config.enable_prefix_caching
    pair = SimulatedPair(0, programs.sizes, COSTS, table, clock, colocated=colocated, reuse_prefixes=reuse, seed=0)
    return pair, StreamPair(0, programs)


class LikeARealPairTest(parameterized.TestCase):
    """Both are told the same, and must hold the same pages and slots, and refuse the same."""

    def _books(self, pair):
        return (
            pair.free_slots,
            pair.free_pages,
            pair.num_pages,
            pair.prefill_store.num_free,
            pair.waiting_tiles,
            pair.waiting_local_tiles,
            pair.prefill_store.tree.num_pages,
        )

    @parameterized.product(
        seed=(0, 1, 2, 3),
        options=(
            {},
            {"colocated": True},
            {"local_tokens": 12},
            {"enable_prefix_caching": False, "decode_pool_tokens": 44},
            {"preemption": "keep", "decode_pool_tokens": 60},
        ),
    )
    def test_a_walk_keeps_the_same_books(self, seed, options):
        walk, pairs = random.Random(seed), _twins(seed=seed, **options)
        stages = [{name: [] for name in ("tasks", "ready", "items", "slots", "kept")} for _ in pairs]
        for turn in range(250):
            move, luck = (
                walk.choice(("begin", "begin", "prefill", "prefill", "move", "move", "insert", "grow")),
                walk.random(),
            )
            if walk.random() < 0.15:
                rare = ("drop", "abandon", "release", "reset", *(("rescue", "resume") * ("preemption" in options)))
                move = walk.choice(rare)
            told = [self._do(pair, stage, move, luck, turn) for pair, stage in zip(pairs, stages, strict=True)]
            self.assertEqual(told[0], told[1], f"{move} in turn {turn}")
            self.assertEqual(self._books(pairs[0]), self._books(pairs[1]), f"{move} in turn {turn}")
            pairs[0].decode_store.ledger.check()

    def _do(self, pair, stage, move, luck, turn):
        """Make a move on one pair; gives what it says."""
        pick = lambda name: stage[name].pop(int(luck * len(stage[name])))  # noqa: E731
        if move == "begin":
            tokens = (7,) * int(8 * luck) + tuple(turn % 5 + token for token in range(1 + int(20 * luck)))
            job = Job(request=make_request(str(turn), tuple(token % 13 for token in tokens), max_tokens=9))
            known = pair.cached_tokens(job.tokens)
            local = luck < 0.3 and len(job.tokens) <= pair.local_tokens
            task = pair.begin_locally(job) if local else pair.begin(job)
            if not isinstance(task, Deferred):
                stage["tasks"].append(task)
                return known, task.cached_tokens, task.local
            return known, task
        if move == "prefill":
            call = pair.prefill() or pair.prefill_locally()
            if call is None:
                return None
            for task in call.done:
                stage["tasks"].remove(task)
                stage["ready"].append(task)
            return [(task.request_id, count) for task, count in call.parts], [task.request_id for task in call.done]
        if move == "move" and stage["ready"]:
            task = pick("ready")
            item = pair.hand_off(task)
            stage["ready" if isinstance(item, Deferred) else "items"].append(
                task if isinstance(item, Deferred) else item
            )
            return item if isinstance(item, Deferred) else item.transfer_pages
        if move == "insert" and stage["items"] and pair.free_slots:
            item = pick("items")
            slot = pair.insert(item)
            stage["slots"].append((slot, item.job))
            return slot
        if move == "grow" and stage["slots"]:
            return pair.ensure(stage["slots"][int(luck * len(stage["slots"]))][0], int(60 * luck))
        return self._undo(pair, stage, move, pick)

    def _undo(self, pair, stage, move, pick):
        if move == "drop" and stage["tasks"]:
            pair.drop(pick("tasks"))
        elif move == "abandon" and stage["items"]:
            item = pick("items")
            pair.abandon(item)
            if item.task is not None:
                pair.drop(item.task)
        elif move == "release" and stage["slots"]:
            pair.release(pick("slots")[0])
        elif move == "rescue" and stage["slots"]:
            return self._rescue(pair, stage, pick)
        elif move == "resume" and stage["kept"]:
            kept = pick("kept")
            item = pair.resume(kept)
            stage["kept" if isinstance(item, Deferred) else "items"].append(
                kept if isinstance(item, Deferred) else item
            )
            return item if isinstance(item, Deferred) else None
        elif move == "reset":
            pair.reset()
            for held in stage.values():
                held.clear()
        return None

    def _rescue(self, pair, stage, pick):
        slot, job = pick("slots")
        kept = pair.rescue(slot, Job(request=job.request, output=(1, 2, 3)))
        if isinstance(pair, SimulatedPair):
            pair._clock.sleep(10.0)
        stage["kept"].append(pair.bring_home(kept))
        return stage["kept"][-1].at_home

    def test_what_fits_nowhere_is_refused(self):
        for pair in _twins(seed=0, local_tokens=8):
            with self.assertRaisesRegex(ValueError, "44 tokens do not fit into a row of 40"):
                pair.begin(Job(request=make_request("a", (1,) * 44)))
            with self.assertRaisesRegex(ValueError, "9 tokens are more than"):
                pair.begin_locally(Job(request=make_request("a", (1,) * 9)))

    def test_there_is_no_slot_beyond_the_last_and_no_log_probability(self):
        pair, _ = _twins(seed=0)
        items = []
        for name in "abcde":
            task = pair.begin(Job(request=make_request(name, (1,))))
            pair.prefill()
            items.append(pair.hand_off(task))
        for item in items[:4]:
            pair.insert(item)
        with self.assertRaisesRegex(ValueError, "no free slot for e"):
            pair.insert(items[4])
        with self.assertRaisesRegex(NotImplementedError, "e wants log-probabilities"):
            pair.read_prompt_logprobs(items[4])
