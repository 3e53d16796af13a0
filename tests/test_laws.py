"""The laws of the design, on a model small enough to enumerate, through prefill, hand-off, slots and speculation."""

import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from scipy import stats

from streamserve.ending import Refused
from streamserve.kv import cache
from streamserve.pipeserve import CompilationCounter, CompilationError, packing
from streamserve.types import Job
from tests import doubles
from tests.doubles import VOCAB, make_request, plain_greedy, serve, tiny_pairs, tiny_params
from tests.exact import exact_distribution, pooled

TARGET = tiny_params(0)


def _prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 8, 9, 20, 31]))) for _ in range(count)]


class SpeculationIsLosslessTest(parameterized.TestCase):
    @parameterized.parameters((0, 1), (3, 1), (3, 0), (8, 1))
    def test_greedy_output_equals_decoding_by_whole_sequences(self, depth, draft_seed):
        pairs = tiny_pairs(depth, draft_seed=draft_seed)
        requests = [
            make_request(str(index), prompt, max_tokens=1 + 5 * (index % 8))
            for index, prompt in enumerate(_prompts(17, seed=depth))
        ]
        ends = serve(pairs, requests)
        for request in requests:
            want = plain_greedy(TARGET, request.prompt_token_ids, request.params.max_tokens)
            got = ends[request.request_id].completion
            self.assertEqual(list(got.token_ids), want)
            self.assertEqual(got.finish_reason, "length")

    def test_a_perfect_draft_is_accepted_and_another_is_not(self):
        rates = {}
        for draft_seed in (0, 1):  # several rows and lanes: each must draft from its own cache
            requests = [make_request(str(i), prompt, max_tokens=40) for i, prompt in enumerate(_prompts(7, seed=3))]
            metrics = [end.metrics for end in serve(tiny_pairs(3, draft_seed=draft_seed), requests).values()]
            # The last round of a request is cut by its length.
            accepted = sum(sum(one.accepted_per_step[:-1]) for one in metrics)
            rates[draft_seed] = accepted / sum(sum(one.drafted_per_step[:-1]) for one in metrics)
        self.assertEqual(rates[0], 1.0)
        self.assertLess(rates[1], 0.8)

    @parameterized.parameters(0, 3)
    def test_stop_tokens_end_the_output_inside_an_accepted_run(self, depth):
        pairs = tiny_pairs(depth, draft_seed=0 if depth else 1)  # with depth, whole drafts are accepted
        prompts = _prompts(12, seed=5)
        whole = {index: plain_greedy(TARGET, prompt, 30) for index, prompt in enumerate(prompts)}
        requests, expected = [], {}
        for index, prompt in enumerate(prompts):
            stop = whole[index][index + 3]
            requests.append(make_request(str(index), prompt, max_tokens=30, stop_ids=(stop,)))
            expected[index] = whole[index][: whole[index].index(stop) + 1]
        ends = serve(pairs, requests)
        for index in expected:
            self.assertEqual(list(ends[str(index)].completion.token_ids), expected[index])
            self.assertEqual(ends[str(index)].completion.finish_reason, "stop")

    @parameterized.parameters(
        {"presence_penalty": 1.5, "frequency_penalty": 0.8},
        {"repetition_penalty": 1.7},
        {"logit_bias": {4: 3.0, 2: -50.0}},
        {"min_tokens": 9},
    )
    def test_penalties_are_exact_under_speculation(self, **params):
        stop_ids = (0, 3, 5, 7) if "min_tokens" in params else ()
        requests = [
            make_request(str(i), prompt, max_tokens=25, stop_ids=stop_ids, logprobs=2, **params)
            for i, prompt in enumerate(_prompts(6, seed=7))
        ]
        plain, speculative = (serve(tiny_pairs(depth), requests) for depth in (0, 3))
        unpenalised = serve(
            tiny_pairs(0),
            [make_request(r.request_id, r.prompt_token_ids, max_tokens=25, stop_ids=stop_ids) for r in requests],
        )
        for name, end in plain.items():
            self.assertEqual(end.completion.token_ids, speculative[name].completion.token_ids)
            for one, two in zip(end.completion.logprobs, speculative[name].completion.logprobs, strict=True):
                self.assertEqual(one.keys(), two.keys())
                for token in one:
                    self.assertAlmostEqual(one[token].logprob, two[token].logprob, places=4)
                    self.assertEqual(one[token].rank, two[token].rank)
        self.assertNotEqual(
            [end.completion.token_ids for end in plain.values()],
            [end.completion.token_ids for end in unpenalised.values()],
            "the parameters under test changed nothing",
        )
        if "min_tokens" in params:
            self.assertTrue(all(len(end.completion.token_ids) >= 9 for end in plain.values()))

    @parameterized.product(
        depth=(0, 1, 3), params=({"temperature": 4.0}, {"temperature": 5.0, "top_p": 0.8, "top_k": 6})
    )
    def test_sampled_output_has_the_targets_distribution(self, depth, params):
        prompt, trials = (3, 1, 4), 2000
        requests = [make_request(str(i), prompt, seed=i, max_tokens=3, **params) for i in range(trials)]
        ends = serve(tiny_pairs(depth), requests)
        outputs = [ends[str(i)].completion.token_ids for i in range(trials)]
        exact = exact_distribution(prompt, 3, **params)
        for length in (1, 2, 3):  # the joint distribution of the first tokens
            counts, expected = pooled(outputs, exact, length, trials)
            self.assertGreater(len(counts), length)
            self.assertGreater(stats.chisquare(counts, expected).pvalue, 1e-4, f"first {length} tokens")
        if depth:
            # At depth 1 the third token comes as a bonus or from a second round, at depth 3 it is drafted.
            accepted = [count for end in ends.values() for count in end.metrics.accepted_per_step]
            self.assertGreater(accepted.count(0), 60)
            self.assertGreater(accepted.count(min(depth, 2)), 60)


class RowsAreIndependentTest(parameterized.TestCase):
    @parameterized.parameters(0, 3)
    def test_neighbours_slot_lane_and_order_change_nothing(self, depth):
        pairs = tiny_pairs(depth)
        mixed = [
            make_request("greedy", (1, 2, 3), max_tokens=20),
            make_request("sampled", (4, 5), seed=9, temperature=4.0, max_tokens=20),
            make_request("filtered", (6,), seed=8, temperature=4.0, top_k=4, top_p=0.9, max_tokens=20),
            make_request("penalised", (7, 7), seed=7, temperature=3.0, presence_penalty=1.0, max_tokens=20, logprobs=3),
            make_request("long", tuple(range(12)) * 2, max_tokens=60),
        ]
        alone = {r.request_id: serve(pairs, [r])[r.request_id].completion for r in mixed}
        for order in itertools.islice(itertools.permutations(mixed), 0, 120, 17):
            together = serve(pairs, order)
            for name, completion in alone.items():
                self.assertEqual(together[name].completion.token_ids, completion.token_ids, name)

    def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(self):
        pairs = tiny_pairs(3)
        tokens = []
        for seed in (1, 1, 2):
            request = make_request("a", (1,), seed=seed, temperature=4.0, max_tokens=40)
            tokens.append(serve(pairs, [request])["a"].completion.token_ids)
        self.assertEqual(tokens[0], tokens[1])
        self.assertNotEqual(tokens[0], tokens[2])


class PrefillEqualsSteppingTest(parameterized.TestCase):
    @parameterized.parameters(1, 5, 8, 9, 32)
    def test_a_prefilled_prefix_equals_token_by_token_decoding(self, length):
        prompt = _prompts(1, seed=length)[0] * 32
        prompt = prompt[:length]
        pair = tiny_pairs(3)[0]
        item = _handed_off(pair, make_request("a", prompt))
        stepped = cache.rows(doubles.KV_SHAPE, 1, 96, page_size=8)
        forward = jax.jit(doubles.TINY_FNS.forward)
        for position, token in enumerate(prompt):
            hidden, stepped = forward(TARGET, jnp.asarray([[token]]), stepped, jnp.asarray([position]))
        got = _positions([group.pages.target.pages for group in item.groups])[:, :, :length]
        want = _positions([cache.take_pages(stepped.pool, stepped.table[0]).pages])[:, :, :length]
        np.testing.assert_allclose(got, want, atol=1e-5)
        prefix = packing.unpack(item.prefix, pair.programs.shapes.prefix())
        self.assertEqual(int(prefix.last_token[0]), int(jnp.argmax(hidden[0, -1] @ TARGET["head"])))
        pair.reset()

    def test_chunks_and_cached_prefixes_equal_the_whole(self):
        depth = 3
        # Calls of one tile, calls of four, a prefix cache that hits, one that is switched off: the same tokens.
        shared = _prompts(1, seed=50)[0] * 40
        prompts = [shared[:24] + prompt[:9] for prompt in _prompts(6, seed=51)] + [
            shared[:24],
            shared[:25],
            shared[:70],
        ]
        requests = [make_request(str(index), prompt, max_tokens=12) for index, prompt in enumerate(prompts)]
        outputs = {}
        for name, settings in {
            "whole": {"enable_prefix_caching": False},
            "tiles": {"enable_prefix_caching": False, "prefill_buckets": (8,)},
            "cached": {},
        }.items():
            pairs = tiny_pairs(depth, num_pairs=1, **settings)
            ends = serve(pairs, requests)
            outputs[name] = [ends[request.request_id].completion.token_ids for request in requests]
            hits = pairs[0].prefill_store.hit_tokens
            self.assertEqual(hits > 0, name == "cached")
            if name == "cached":
                self.assertGreater(sum(end.metrics.cached_tokens for end in ends.values()), 4 * 24)
                again = serve(pairs, requests)  # all hit now
                outputs["again"] = [again[request.request_id].completion.token_ids for request in requests]
                self.assertGreater(pairs[0].prefill_store.hit_tokens, 2 * hits)
        for name, got in outputs.items():
            self.assertEqual(got, outputs["whole"], name)
        for request, got in zip(requests, outputs["whole"], strict=True):
            self.assertEqual(list(got), plain_greedy(TARGET, request.prompt_token_ids, 12))


def _handed_off(pair, request):
    """Take a request through prefill and the way to the decode mesh, without a scheduler."""
    task = pair.begin(Job(request=request))
    while task.tail is None:
        pair.prefill()
    item = pair.hand_off(task)
    while not pair.has_arrived(item):
        pass
    return item


def _positions(groups):
    """Lay groups of travelling pages [2L, n, G, P, D] out as [2L, G, positions, D]."""
    whole = np.swapaxes(np.concatenate([np.asarray(group) for group in groups], axis=1), 1, 2)
    return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])


class CacheTest(parameterized.TestCase):
    def test_transfer_is_the_identity_and_changes_devices(self):
        pair = tiny_pairs(3)[1]
        prompt = tuple(range(12)) * 4
        item = _handed_off(pair, make_request("a", prompt, temperature=0.5, seed=3))
        source, target = pair.prefill_store.pools, pair.decode_store.pools
        devices = lambda tree: {d.id for leaf in jax.tree.leaves(tree) for d in leaf.sharding.device_set}  # noqa: E731
        self.assertTrue(devices(source).isdisjoint(devices([group.pages for group in item.groups])))
        self.assertEqual(devices([group.pages for group in item.groups]), devices(target))
        self.assertEqual(item.transfer_pages, 6)
        page_bytes = 2 * 2 * 8 * 8 * 4  # keys and values of two heads, eight positions, eight floats
        self.assertGreaterEqual(item.transfer_bytes, 2 * 6 * page_bytes)
        home = cache.take_pages(source, np.asarray(item.task.holding.pages))
        self.assertGreater(float(np.abs(np.asarray(home.target.pages[0])).min()), 0)
        pair.insert(item)
        there = cache.take_pages(pair.decode_store.pools, np.asarray(item.holding.pages[:6]))
        for got, want in zip(jax.tree.leaves(there), jax.tree.leaves(home), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        prefix = packing.unpack(item.prefix, pair.programs.shapes.prefix())
        self.assertEqual([int(prefix.length[0]), int(prefix.prev_token[0])], [48, 11])
        pair.reset()

    def test_no_program_collects_a_pool_that_is_divided(self):
        programs = tiny_pairs(3, num_pairs=1, devices=2)[0].programs
        for decode_side, table in ((True, programs.step), (False, programs.prefill)):
            pool = rf"f32\[{programs.num_pages(decode_side=decode_side)},\d+,\d+,\d+\]"
            for size, program in table.items():
                text = program.as_text()
                self.assertIn("num_partitions=2", text.splitlines()[0])
                self.assertIsNotNone(re.search(rf"{pool}\S* parameter", text), size)
                self.assertIsNone(re.search(rf"{pool}\S* all-gather", text), size)

    @parameterized.parameters((1, 2, "transfer"), (2, 1, "recompute"), (2, 2, "transfer"))
    def test_meshes_of_different_size_hand_over_without_compiling(self, prefill, decode, draft_kv):
        pairs = tiny_pairs(3, num_pairs=1, devices=prefill, decode_devices=decode, draft_kv=draft_kv, draft_seed=0)
        requests = [make_request(str(i), prompt, max_tokens=12) for i, prompt in enumerate(_prompts(6, seed=21))]
        scheduler = doubles.tiny_scheduler(pairs)  # it compiles its router
        counter = CompilationCounter(forbid=True)
        counter.on = True
        try:
            ends = {end.request_id: end for end in scheduler.run(requests)}
        finally:
            counter.on = False
        doubles.assert_empty(pairs)
        for request in requests:
            got = ends[request.request_id]
            self.assertEqual(list(got.completion.token_ids), plain_greedy(TARGET, request.prompt_token_ids, 12))
            self.assertEqual(got.metrics.transfer_pages, -(-len(request.prompt_token_ids) // 8))
            # A perfect draft is accepted whole only if its pages are the right ones.
            self.assertEqual(got.metrics.accepted_per_step[:-1], got.metrics.drafted_per_step[:-1])

    def test_colocated_pairs_move_nothing_and_give_the_same_tokens(self):
        pairs = tiny_pairs(3, num_pairs=1, topology="colocated", draft_seed=0)
        requests = [make_request(str(i), prompt, max_tokens=12) for i, prompt in enumerate(_prompts(9, seed=22))]
        ends = serve(pairs, requests)
        for request in requests:
            got = ends[request.request_id]
            self.assertEqual(list(got.completion.token_ids), plain_greedy(TARGET, request.prompt_token_ids, 12))
            self.assertEqual((got.metrics.transfer_pages, got.metrics.transfer_bytes), (0, 0))
            self.assertEqual(got.metrics.accepted_per_step[:-1], got.metrics.drafted_per_step[:-1])

    def test_what_lies_beyond_a_length_is_never_read(self):
        # truncate(append(x)) is the identity: tokens written and refused leave no trace in what comes after.
        shape = (2, 5)
        kv = cache.rows(doubles.KV_SHAPE, 2, 24, page_size=8)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, shape))
        start = jnp.asarray([0, 3])
        _, kept = doubles.TINY_FNS.forward(TARGET, tokens, kv, start)
        _, dirty = doubles.TINY_FNS.forward(TARGET, (tokens + 1) % VOCAB, kept, start + 5)
        clean_out, _ = doubles.TINY_FNS.forward(TARGET, tokens[:, :2], kept, start + 5)
        dirty_out, _ = doubles.TINY_FNS.forward(TARGET, tokens[:, :2], dirty, start + 5)
        np.testing.assert_array_equal(np.asarray(clean_out), np.asarray(dirty_out))


class LoopTest(parameterized.TestCase):
    def test_nothing_compiles_after_warmup_whatever_the_mix(self):
        pairs = tiny_pairs(3)
        scheduler = doubles.tiny_scheduler(pairs)  # it compiles its router
        counter = CompilationCounter(forbid=True)
        counter.on = True
        requests = [
            make_request("a", (1,), max_tokens=1),
            make_request(
                "b", (2,) * 31, temperature=1.0, seed=1, top_p=0.5, logprobs=4, prompt_logprobs=2, max_tokens=9
            ),
            make_request("c", (3,) * 9, logit_bias={1: 2.0}, min_tokens=3, max_tokens=7, stop_ids=(1, 2)),
        ]
        ends = {end.request_id: end for end in scheduler.run(requests)}
        self.assertEqual(counter.count, 0)
        self.assertEqual(len(ends["b"].prompt_logprobs), 31)
        with self.assertRaisesRegex(CompilationError, "compiled after warm-up"):
            jax.jit(lambda x: x + 41)(1).block_until_ready()
        self.assertEqual(counter.count, 1, "the counter does not count")
        counter.on = False

    def test_every_request_ends_once_refusals_included(self):
        requests = [
            Refused("no", "because"),
            make_request("long", (1,) * 97, max_tokens=1),
            make_request("stops", (1, 2), stop_ids=tuple(range(9)), max_tokens=2),
            make_request("fine", (1, 2), max_tokens=5),
        ]
        ends = serve(tiny_pairs(3), requests)
        self.assertEqual(ends["no"].error, "because")
        self.assertRegex(ends["long"].error, "97 tokens do not fit into a row of 96")
        self.assertRegex(ends["stops"].error, "9 stop token ids given, the engine is configured for at most 8")
        self.assertIsNone(ends["fine"].error)

    def test_a_lane_is_reset_without_compiling(self):
        pair = tiny_pairs(3)[0]
        counter = CompilationCounter(forbid=True)
        counter.on = True
        try:
            pair.reset()
        finally:
            counter.on = False
        self.assertEqual(counter.count, 0)

    def test_an_abandoned_run_leaves_nothing_behind(self):
        pairs = tiny_pairs(3)
        scheduler = doubles.tiny_scheduler(pairs)
        requests = [make_request(str(i), (1, 2, 3), max_tokens=2 if i == 0 else 60) for i in range(9)]
        run = scheduler.run(iter(requests))
        next(run)
        with self.assertRaisesRegex(RuntimeError, "already running"):
            next(scheduler.run(requests))
        self.assertTrue(any(pair.free_slots < pair.num_slots for pair in pairs))
        run.close()
        doubles.assert_empty(pairs)
        again = {end.request_id: end for end in scheduler.run(requests[:3])}
        self.assertEqual(list(again["1"].completion.token_ids), plain_greedy(TARGET, (1, 2, 3), 60))

    def test_one_copy_a_tick_comes_to_the_host(self):
        pair = tiny_pairs(3)[0]
        reads, read = [], pair.read

        class Counting:
            """Forwards to the pair, and counts what is read."""

            def __getattr__(self, name):
                return getattr(pair, name)

            def read(self, pending):
                reads.append([array.shape for array in pending.packed])
                return read(pending)

        scheduler = doubles.tiny_scheduler([Counting()])
        ends = list(scheduler.run([make_request(str(i), (1, 2), max_tokens=30, logprobs=2) for i in range(5)]))
        self.assertLen(ends, 5)
        self.assertLen(reads, scheduler.counters().ticks)
        self.assertTrue(all(len(arrays) <= 2 for arrays in reads))
