"""The laws of the design, on a model small enough to enumerate, through prefill, hand-off, slots and speculation."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from scipy import stats

from streamserve.kv import cache
from streamserve.pipeserve import CompilationCounter
from streamserve.scheduler import Refused
from tests import doubles
from tests.doubles import VOCAB, make_request, plain_greedy, serve, tiny_pairs, tiny_params

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
        ends = serve(pairs, depth, requests)
        for request in requests:
            want = plain_greedy(TARGET, request.prompt_token_ids, request.params.max_tokens)
            got = ends[request.request_id].completion
            self.assertEqual(list(got.token_ids), want)
            self.assertEqual(got.finish_reason, "length")

    def test_a_perfect_draft_is_accepted_and_another_is_not(self):
        rates = {}
        for draft_seed in (0, 1):  # several rows and lanes: each must draft from its own cache
            requests = [make_request(str(i), prompt, max_tokens=40) for i, prompt in enumerate(_prompts(7, seed=3))]
            metrics = [end.metrics for end in serve(tiny_pairs(3, draft_seed=draft_seed), 3, requests).values()]
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
        ends = serve(pairs, depth, requests)
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
        plain, speculative = (serve(tiny_pairs(depth), depth, requests) for depth in (0, 3))
        unpenalised = serve(
            tiny_pairs(0),
            0,
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
        ends = serve(tiny_pairs(depth), depth, requests, max_prefills=4)
        outputs = [ends[str(i)].completion.token_ids for i in range(trials)]
        exact = _exact_distribution(prompt, 3, **params)
        for length in (1, 2, 3):  # the joint distribution of the first tokens
            counts, expected = _pooled(outputs, exact, length, trials)
            self.assertGreater(len(counts), length)
            self.assertGreater(stats.chisquare(counts, expected).pvalue, 1e-4, f"first {length} tokens")
        if depth:
            # At depth 1 the third token comes as a bonus or from a second round, at depth 3 it is drafted.
            accepted = [count for end in ends.values() for count in end.metrics.accepted_per_step]
            self.assertGreater(accepted.count(0), 60)
            self.assertGreater(accepted.count(min(depth, 2)), 60)


def _exact_distribution(prompt, length, *, temperature, top_p=1.0, top_k=0) -> dict[tuple[int, ...], float]:
    """Probability of every continuation, by enumeration with numpy filters."""
    exact = {(): 1.0}
    for _ in range(length):
        stems = list(exact)
        tokens = jnp.asarray([list(prompt) + list(stem) for stem in stems])
        logits = np.asarray(doubles.whole_logits(TARGET, tokens)[:, -1], np.float64) / temperature
        grown = {}
        for stem, row in zip(stems, logits, strict=True):
            p = np.exp(row - row.max())
            p /= p.sum()
            order = np.argsort(-p)
            if top_k:
                p[order[top_k:]] = 0
            before = np.cumsum(p[order]) - p[order]
            p[order[before >= top_p * p.sum()]] = 0
            p /= p.sum()
            grown |= {(*stem, token): exact[stem] * p[token] for token in range(VOCAB) if p[token] > 0}
        exact = grown
    return exact


def _pooled(outputs, exact, length, trials):
    """Counts and expectations by continuation; rare continuations share one cell, impossible ones must not occur."""
    marginal: dict[tuple[int, ...], float] = {}
    for tokens, probability in exact.items():
        marginal[tokens[:length]] = marginal.get(tokens[:length], 0.0) + probability
    seen = [tokens[:length] for tokens in outputs]
    assert set(seen) <= set(marginal), set(seen) - set(marginal)
    common = [tokens for tokens, probability in marginal.items() if probability * trials >= 8]
    counts = [seen.count(tokens) for tokens in common]
    expected = [marginal[tokens] * trials for tokens in common]
    if len(common) < len(marginal) and (rest := trials - sum(expected)) > 1:
        counts, expected = [*counts, trials - sum(counts)], [*expected, rest]
    scale = sum(counts) / sum(expected)
    return counts, [value * scale for value in expected]


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
        alone = {r.request_id: serve(pairs, depth, [r])[r.request_id].completion for r in mixed}
        for order in itertools.islice(itertools.permutations(mixed), 0, 120, 17):
            together = serve(pairs, depth, order)
            for name, completion in alone.items():
                self.assertEqual(together[name].completion.token_ids, completion.token_ids, name)

    def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(self):
        pairs = tiny_pairs(3)
        tokens = []
        for seed in (1, 1, 2):
            request = make_request("a", (1,), seed=seed, temperature=4.0, max_tokens=40)
            tokens.append(serve(pairs, 3, [request])["a"].completion.token_ids)
        self.assertEqual(tokens[0], tokens[1])
        self.assertNotEqual(tokens[0], tokens[2])


class PrefillEqualsSteppingTest(parameterized.TestCase):
    @parameterized.parameters(1, 5, 8, 9, 32)
    def test_a_prefilled_prefix_equals_token_by_token_decoding(self, length):
        prompt = _prompts(1, seed=length)[0] * 32
        prompt = prompt[:length]
        pair = tiny_pairs(3)[0]
        item = pair.prefill(make_request("a", prompt))
        stepped = cache.zeros(doubles.KV_SHAPE, 1, 95)
        forward = jax.jit(doubles.TINY_FNS.forward)
        for position, token in enumerate(prompt):
            hidden, stepped = forward(TARGET, jnp.asarray([[token]]), stepped, jnp.asarray([position]))
        for got, want in zip(jax.tree.leaves(item.prefix.target), jax.tree.leaves(stepped), strict=True):
            np.testing.assert_allclose(np.asarray(got)[:, :, :length], np.asarray(want)[:, :, :length], atol=1e-5)
        self.assertEqual(int(item.prefix.first_token[0]), int(jnp.argmax(hidden[0, -1] @ TARGET["head"])))


class CacheTest(parameterized.TestCase):
    def test_transfer_is_the_identity_and_changes_devices(self):
        pair = tiny_pairs(3)[1]
        request = make_request("a", (1, 2, 3), temperature=0.5, seed=3)
        item = pair.prefill(request)
        inputs = {device.id for device in item.prompt_logprobs.chosen.sharding.device_set}
        outputs = {device.id for device in item.prefix.length.sharding.device_set}
        self.assertTrue(inputs.isdisjoint(outputs))
        self.assertGreater(item.transfer_bytes, 2 * 8 * 2 * 8 * 4)
        # It arrives as the prefill mesh made it: the prefill program is asked again, and its output stays at home.
        padded = np.asarray([[1, 2, 3, 0, 0, 0, 0, 0]], np.int32)
        where = item.prompt_logprobs.chosen.sharding
        inputs = jax.device_put((padded, np.asarray([3], np.int32), np.bool_(False)), where)
        home = pair.programs.prefill[8](*pair._models.prefill_params, *inputs)
        pairs = [(item.prefix.target, home.target), (item.prefix.draft, home.draft)]
        pairs += [(item.prefix.prompt_seen, home.prompt_seen)]
        for got, want in zip(*map(jax.tree.leaves, zip(*pairs, strict=True)), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        self.assertGreater(float(np.abs(np.asarray(home.target.layers[0].k)[:, :, :3]).min()), 0)
        self.assertEqual([int(item.prefix.length[0]), int(item.prefix.prompt_tail[0])], [3, 3])

    def test_what_lies_beyond_a_length_is_never_read(self):
        # truncate(append(x)) is the identity: tokens written and refused leave no trace in what comes after.
        shape = (2, 5)
        kv = cache.zeros(doubles.KV_SHAPE, 2, 24)
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
        scheduler = doubles.tiny_scheduler(pairs, 3)  # it compiles its router
        counter = CompilationCounter()
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
        jax.jit(lambda x: x + 41)(1).block_until_ready()
        self.assertEqual(counter.count, 1, "the counter does not count")

    def test_every_request_ends_once_refusals_included(self):
        requests = [
            Refused("no", "because"),
            make_request("long", (1,) * 96, max_tokens=1),
            make_request("stops", (1, 2), stop_ids=tuple(range(9)), max_tokens=2),
            make_request("fine", (1, 2), max_tokens=5),
        ]
        ends = serve(tiny_pairs(3), 3, requests)
        self.assertEqual(ends["no"].error, "because")
        self.assertRegex(ends["long"].error, "96 tokens fits no bucket")
        self.assertRegex(ends["stops"].error, "9 stop token ids given, the engine is configured for at most 8")
        self.assertIsNone(ends["fine"].error)

    def test_an_abandoned_run_leaves_nothing_behind(self):
        pairs = tiny_pairs(3)
        scheduler = doubles.tiny_scheduler(pairs, 3)
        requests = [make_request(str(i), (1, 2, 3), max_tokens=2 if i == 0 else 60) for i in range(9)]
        run = scheduler.run(iter(requests))
        next(run)
        with self.assertRaisesRegex(RuntimeError, "already running"):
            next(scheduler.run(requests))
        self.assertTrue(any(pair.ledger.held() for pair in pairs))
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
                reads.append(pending.packed.shape)
                return read(pending)

        scheduler = doubles.tiny_scheduler([Counting()], 3)
        ends = list(scheduler.run([make_request(str(i), (1, 2), max_tokens=30, logprobs=2) for i in range(5)]))
        self.assertLen(ends, 5)
        self.assertLen(reads, scheduler.counters.ticks)
        self.assertEqual({len(shape) for shape in reads}, {2})
