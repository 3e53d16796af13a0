"""Laws 1, 5 and 8 for every drafter, verification rule and depth policy, through the whole engine.

Greedy output is that of decoding by whole sequences. Sampled output is that of plain decoding token for token under the
coupled rule, and has the target's distribution under the others, whatever the depth does: a restless policy changes
the depth of every tick and every slot, and the rule by which rows stop.
"""

import functools
import pathlib
import random
import tempfile

from absl.testing import parameterized
from scipy import stats

from streamserve import parts
from streamserve.specustream import decision_log, policies
from streamserve.types import StepPlan
from tests import doubles
from tests.doubles import VOCAB, make_request, plain_greedy, restless, serve, tiny_pairs, tiny_params
from tests.exact import exact_distribution, pooled
from tests.fake_programs import FakeClock, FakePrograms, fake_scheduler, quiet_output
from tests.faults import FaultyPair

TARGET = tiny_params(0)
TIERS = (0, 1, 3)
PAIR_TIERS = (0, 3)  # of the tiny model: a program takes seconds to compile, and a slot may draft less than its tier
METHODS = tuple(name for name in doubles.DRAFTERS if name != "synthetic")


@functools.cache
def _whole(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(plain_greedy(TARGET, prompt, count))


def _requests(count: int, seed: int, **params):
    """Prompts of all lengths, answers that end by length and by stop tokens within a round; some repeat themselves."""
    rng, made = random.Random(seed), []
    for index in range(count):
        stem = tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 8, 9])))
        prompt = (stem * 4)[: rng.choice([1, 5, 8, 17, 30])]
        stop_ids = (rng.randrange(VOCAB),) if index % 3 == 0 else ()
        made.append(
            make_request(str(index), prompt, seed=index, max_tokens=1 + index * 3 % 40, stop_ids=stop_ids, **params)
        )
    return made


def _pair(method: str, verifier: str):
    return tiny_pairs(3, tiers=PAIR_TIERS, method=method, verifier=verifier, num_pairs=1, decode_batches=())


class EveryCombinationTest(parameterized.TestCase):
    @parameterized.product(method=METHODS, verifier=tuple(parts.VERIFIERS))
    def test_greedy_output_is_that_of_whole_sequences_at_any_depth(self, method, verifier):
        pairs = _pair(method, verifier)
        requests = _requests(14, seed=3)
        ends = serve(pairs, requests, policy=restless(pairs[0].sizes), forbid_compilation=True)
        drafted = set()
        for request in requests:
            want = _whole(request.prompt_token_ids, request.params.max_tokens)
            length = next((i + 1 for i, token in enumerate(want) if token in request.stop_ids), len(want))
            self.assertEqual(ends[request.request_id].completion.token_ids, want[:length])
            drafted |= set(ends[request.request_id].metrics.drafted_per_step)
        self.assertEqual(drafted, {0, 1, 2, 3}, "a depth was never tried")

    @parameterized.product(method=METHODS)
    def test_sampled_output_under_the_coupled_rule_is_that_of_plain_decoding(self, method):
        mixed = _requests(14, seed=5, temperature=1.5, top_p=0.9)
        mixed = [
            r if int(r.request_id) % 4 else make_request(r.request_id, r.prompt_token_ids, max_tokens=9) for r in mixed
        ]
        pairs = _pair(method, "coupled")
        fixed = functools.partial(policies.fixed, PAIR_TIERS, pairs[0].num_slots)
        plain = serve(pairs, mixed, policy=fixed(depth=0))
        accepted = 0
        for policy in (restless(pairs[0].sizes), fixed(depth=3)):
            ends = serve(pairs, mixed, policy=policy)
            for request in mixed:
                self.assertEqual(
                    ends[request.request_id].completion.token_ids, plain[request.request_id].completion.token_ids
                )
                accepted += sum(ends[request.request_id].metrics.accepted_per_step)
        self.assertGreater(accepted, 20)

    @parameterized.product(method=METHODS, verifier=("rejection", "block"))
    def test_sampled_output_has_the_targets_distribution_at_any_depth(self, method, verifier):
        prompt, trials = (3, 1, 4, 3, 1), 1000
        requests = [make_request(str(i), prompt, seed=i, max_tokens=3, temperature=4.0) for i in range(trials)]
        pairs = _pair(method, verifier)
        ends = serve(pairs, requests, policy=restless(pairs[0].sizes))
        outputs = [ends[str(i)].completion.token_ids for i in range(trials)]
        exact = exact_distribution(prompt, 3, temperature=4.0)
        for length in (1, 2, 3):
            counts, expected = pooled(outputs, exact, length, trials)
            self.assertGreater(len(counts), length)
            self.assertGreater(stats.chisquare(counts, expected).pvalue, 1e-4, f"first {length} tokens")

    def test_what_was_not_drafted_is_read_before_the_next_draft(self):
        """A perfect drafter is perfect after any number of plain ticks: it has caught up."""
        pairs = tiny_pairs(3, tiers=PAIR_TIERS, draft_seed=0, num_pairs=1, decode_batches=())
        for seed in range(3):
            specustream = doubles.tiny_specustream(pairs[0], restless(pairs[0].sizes), seed=seed)
            scheduler = doubles.tiny_scheduler(pairs, specustreams=[specustream])
            requests = [make_request(str(i), (i, 2, 5), max_tokens=60) for i in range(6)]
            for end in scheduler.run(requests):
                drafted, accepted = end.metrics.drafted_per_step[:-1], end.metrics.accepted_per_step[:-1]
                self.assertEqual(drafted, accepted)
                self.assertIn(0, drafted)


class LearningDrafterTest(parameterized.TestCase):
    def test_an_answer_is_remembered_once_it_is_whole_and_forgotten_when_told(self):
        (pair,) = _pair("suffix", "rejection")
        pair.forget_answers()
        request = make_request("a", (7, 7, 2, 9, 4), max_tokens=30)
        drafted = []
        for _ in range(2):
            end = serve([pair], [request])["a"]
            self.assertEqual(end.completion.token_ids, _whole(request.prompt_token_ids, 30))
            drafted.append(sum(end.metrics.accepted_per_step))
        self.assertGreater(drafted[1], drafted[0] + 5)
        pair.forget_answers()
        self.assertEqual(sum(serve([pair], [request])["a"].metrics.accepted_per_step), drafted[0])
        pair.forget_answers()

    def test_a_plan_is_copied_to_the_device_once_and_never_mistaken_for_another(self):
        (pair,) = _pair("draft_model", "rejection")
        placed, place = [], pair.programs.to_decode
        pair.programs.to_decode = lambda tree: (placed.append(tree), place(tree))[1]
        self.addCleanup(delattr, pair.programs, "to_decode")
        requests = [make_request(str(i), (i, 3), max_tokens=50) for i in range(4)]
        fixed = policies.fixed(PAIR_TIERS, pair.num_slots, depth=3)
        serve([pair], requests, policy=fixed)
        plans = [tree for tree in placed if isinstance(tree, StepPlan)]
        self.assertLessEqual(len(plans), 1)
        for depth in (3, 2):
            ends = serve([pair], requests, policy=policies.fixed(PAIR_TIERS, pair.num_slots, depth=depth))
            self.assertEqual({step for end in ends.values() for step in end.metrics.drafted_per_step}, {depth})


class EveryPolicyTest(parameterized.TestCase):
    """On lanes without devices, where a run has no noise: real bookkeeping, real policies, real log."""

    NAMES = (*(name for name in parts.POLICIES if name != "oracle"), "fixed")

    def _run(self, name: str, path, *, seed: int = 0):
        pair = FaultyPair(0, FakePrograms(tiers=TIERS))
        make = functools.partial(policies.fixed, depth=1) if name == "fixed" else parts.POLICIES[name]
        policy = make(TIERS, pair.num_slots)
        log = decision_log.DecisionLog(path, header={"policy": name})
        specustream = doubles.tiny_specustream(pair, policy, seed=seed, log=log)
        scheduler = fake_scheduler([pair], clock=FakeClock(), specustreams=[specustream])
        rng = random.Random(7)
        requests = [
            make_request(str(i), tuple(rng.randrange(VOCAB) for _ in range(1 + i % 9)), seed=i, max_tokens=25)
            for i in range(12)
        ]
        ends = {end.request_id: end for end in scheduler.run(requests)}
        log.close()
        doubles.assert_empty([pair])
        return requests, ends, policy

    @parameterized.parameters(*NAMES)
    def test_output_is_quiet_and_the_same_seed_gives_the_same_decisions(self, name):
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder) / which for which in "ab"]
            requests, ends, policy = self._run(name, paths[0])
            self._run(name, paths[1])
            self.assertEqual(paths[0].read_bytes(), paths[1].read_bytes())
            header, logged = decision_log.read_log(paths[0])
        for request in requests:
            self.assertEqual(ends[request.request_id].completion.token_ids, quiet_output(request))
        self.assertGreater(len(logged), 10)
        self.assertEqual(header["policy"], name)
        self.assertEqual(decision_log.replay(policy, logged, num_arms=len(TIERS), seed=0), [])
