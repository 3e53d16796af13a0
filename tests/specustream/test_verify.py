"""Every verification rule keeps the target's distribution: chi-square of whole continuations, with tables for models.

Tables give p and q for every prefix, so both depend on what came before. A play is one round of draft and verification
and then plain sampling, until T = K + 1 tokens are out; their joint distribution must be the target's own.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from streamserve import sampling
from streamserve.specustream import verify
from streamserve.types import Draft, RowContext, RowParams

RULES = {"rejection": verify.rejection, "block": verify.block, "coupled": verify.coupled}
TRIALS = 100_000
VOCAB = 3
DEPTH = 3
FEWER = 20_000  # trials where nothing rare is looked for
SEED = 1  # of tables whose drafts stop at every depth from 1 on, and are accepted to every depth
TOO_UNLIKELY = 1e-4  # of a p-value; seeds are fixed, so a test that passes goes on passing


class Stops(NamedTuple):
    """When a row stops drafting. All but `foresight` are lossless; it looks at the token that it decides about."""

    cap: int = DEPTH
    min_prob: float = 0.0  # stop after a token that is less likely
    max_entropy: float = 100.0  # stop before a position that is less certain
    foresight: float = 0.0  # drop a token that is less likely


STOPS = {
    "nowhere": Stops(),
    "at_once": Stops(cap=0),
    "at_a_depth": Stops(cap=2),
    "after_an_unlikely_token": Stops(min_prob=0.4),
    "before_an_uncertain_position": Stops(max_entropy=0.75),
    "for_any_reason": Stops(cap=2, min_prob=0.4, max_entropy=0.75),
}


class Play(NamedTuple):
    """What came of a round, and of plain sampling after it."""

    emitted: np.ndarray  # [B, T]
    drafted: np.ndarray  # [B, K], 0 from `length` on
    length: np.ndarray  # [B]
    accepted: np.ndarray  # [B]
    next_token: np.ndarray  # [B]


def _tables(seed: int, *shape: int, vocab: int = VOCAB) -> np.ndarray:
    """Random distributions [*shape, V]; three in ten rule a token out."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(vocab), shape)
    barred = rng.random(shape) < 0.3
    probs[barred, rng.integers(vocab, size=shape)[barred]] = 0.0
    return (probs / probs.sum(-1, keepdims=True)).astype(np.float32)


def _models(seed: int, drafter: str) -> tuple[np.ndarray, np.ndarray]:
    """Tables p [T, X, V] and q [K, X, V]."""
    prefixes = VOCAB**DEPTH
    p, q = _tables(seed, DEPTH + 1, prefixes), _tables(seed + 1000, DEPTH, prefixes)
    if drafter == "certain":
        q = np.eye(VOCAB, dtype=np.float32)[q.argmax(-1)]
    return p, p[:DEPTH] if drafter == "target" else q


def _joint(p_TXV: np.ndarray) -> np.ndarray:
    """Distribution of T tokens [V ** T], in the order of their base-V codes."""
    joint_X = np.ones(1)
    for probs_XV in p_TXV.astype(np.float64):
        here_XV = probs_XV[: joint_X.size] / probs_XV[: joint_X.size].sum(-1, keepdims=True)
        joint_X = (joint_X[:, None] * here_XV).reshape(-1)
    return joint_X


def _context(trials: int, emitted: int) -> RowContext:
    unread = {field.name: None for field in dataclasses.fields(RowParams)}
    key_B2 = jnp.stack([jnp.arange(trials, dtype=jnp.uint32), jnp.full((trials,), 7, jnp.uint32)], axis=1)
    row = RowParams(**{**unread, "key": key_B2})
    return RowContext(row=row, prompt_seen=None, output_counts=None, emitted=jnp.full((trials,), emitted, jnp.int32))


def _draft(q_KXV, stops: Stops, key_BK) -> tuple[Draft, jax.Array]:
    """Draft along the tables; what is beyond a row's length is token 0 with certainty."""
    batch, (depth, _, vocab) = len(key_BK), q_KXV.shape
    code_B, length_B, going_B = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    tokens, probs = [], []
    for k in range(depth):
        q_BV = q_KXV[k][code_B]
        entropy_B = -jnp.sum(jnp.where(q_BV > 0, q_BV * jnp.log(q_BV), 0.0), axis=-1)
        token_B = sampling.sample(q_BV, key_BK[:, k])
        prob_B = jnp.take_along_axis(q_BV, token_B[:, None], axis=-1)[:, 0]
        going_B &= (k < stops.cap) & (entropy_B <= stops.max_entropy) & (prob_B >= stops.foresight)
        length_B += going_B.astype(jnp.int32)
        tokens.append(jnp.where(going_B, token_B, 0))
        probs.append(jnp.where(going_B[:, None], q_BV, jax.nn.one_hot(jnp.zeros_like(token_B), vocab)))
        code_B = code_B * vocab + tokens[-1]
        going_B &= prob_B >= stops.min_prob
    return Draft(tokens=jnp.stack(tokens, 1), logits=None, length=length_B), jnp.stack(probs, 1)


@functools.partial(jax.jit, static_argnames=("rule", "trials"))
def _play(rule: str, p_TXV, q_KXV, stops: Stops, trials: int) -> Play:
    verifier, (width, _, vocab) = RULES[rule](), p_TXV.shape
    keys = verifier.keys(_context(trials, 0), width)
    draft, q_BKV = _draft(q_KXV, stops, keys.token[:, : width - 1])
    code_B, target = jnp.zeros(trials, jnp.int32), []
    for t in range(width):
        target.append(p_TXV[t][code_B])
        code_B = code_B * vocab + draft.tokens[:, min(t, width - 2)]
    verdict = verifier.verify(jnp.stack(target, 1), q_BKV, draft, keys)
    code_B, emitted = jnp.zeros(trials, jnp.int32), []
    for t in range(width):
        token_B = sampling.sample(p_TXV[t][code_B], verifier.keys(_context(trials, t), 1).token[:, 0])
        token_B = jnp.where(t == verdict.num_accepted, verdict.next_token, token_B)
        token_B = jnp.where(t < verdict.num_accepted, draft.tokens[:, min(t, width - 2)], token_B)
        emitted.append(token_B)
        code_B = code_B * vocab + token_B
    return Play(jnp.stack(emitted, 1), draft.tokens, draft.length, verdict.num_accepted, verdict.next_token)


def _run(rule: str, p: np.ndarray, q: np.ndarray, stops: Stops = STOPS["nowhere"], trials: int = TRIALS) -> Play:
    return Play(*map(np.asarray, _play(rule, jnp.asarray(p), jnp.asarray(q), stops, trials)))


def _unlikely(tokens_BX: np.ndarray, expected: np.ndarray, vocab: int = VOCAB) -> float:
    """Return the p-value that rows of tokens come from `expected` [V ** X]; what is impossible must not occur."""
    codes = tokens_BX @ vocab ** np.arange(tokens_BX.shape[1])[::-1]
    counts = np.bincount(codes, minlength=expected.size)
    assert counts[expected == 0].sum() == 0
    expected = expected * counts.sum()
    rare = expected < 5
    merge = lambda cells: np.append(cells[~rare], cells[rare].sum())  # noqa: E731
    observed, wanted = (merge(counts), merge(expected)) if expected[rare].sum() else (counts[~rare], expected[~rare])
    return stats.chisquare(observed, wanted * (observed.sum() / wanted.sum())).pvalue


def _four_errors(values: np.ndarray) -> float:
    return 4 * values.std() / np.sqrt(values.size)


class LosslessTest(parameterized.TestCase):
    @parameterized.product(rule=tuple(RULES), drafter=("sampled", "certain"), stops=tuple(STOPS))
    def test_the_joint_distribution_is_the_targets(self, rule, drafter, stops):
        p, q = _models(SEED, drafter)
        play = _run(rule, p, q, STOPS[stops])
        joint = _joint(p)
        self.assertGreater((joint == 0).sum(), 0)
        self.assertLessEqual(play.length.max(), STOPS[stops].cap)
        self.assertTrue((play.accepted <= play.length).all())
        self.assertGreater(_unlikely(play.emitted, joint), TOO_UNLIKELY)

    @parameterized.parameters("after_an_unlikely_token", "before_an_uncertain_position", "for_any_reason")
    def test_these_rows_stop_at_different_depths(self, stops):
        p, q = _models(SEED, "sampled")
        self.assertEqual(set(_run("rejection", p, q, STOPS[stops]).length), set(range(1, STOPS[stops].cap + 1)))

    @parameterized.parameters("rejection", "block")
    def test_a_stop_that_looks_at_its_own_token_is_found_out(self, rule):
        p, q = _models(SEED, "sampled")
        play = _run(rule, p, q, Stops(foresight=0.4))
        self.assertLess(_unlikely(play.emitted, _joint(p)), 1e-9)

    @parameterized.parameters(*RULES)
    def test_equal_distributions_accept_everything(self, rule):
        play = _run(rule, *_models(SEED, "target"), STOPS["after_an_unlikely_token"], FEWER)
        np.testing.assert_array_equal(play.accepted, play.length)
        self.assertEqual(set(play.length), {1, 2, 3})

    @parameterized.parameters(*RULES)
    def test_point_masses_are_judged_as_greedy_ones_and_leave_their_neighbours_alone(self, rule):
        batch, vocab = 64, 5
        p, q = _tables(5, batch, DEPTH + 1, vocab=vocab), _tables(6, batch, DEPTH, vocab=vocab)
        greedy = np.arange(batch) % 2 == 0
        for probs in (p, q):
            probs[greedy] = np.eye(vocab, dtype=np.float32)[probs[greedy].argmax(-1)]
        p[greedy, 0] = np.where((np.arange(batch) % 4 == 0)[greedy, None], q[greedy, 0], p[greedy, 0])
        verifier = RULES[rule]()
        keys = verifier.keys(_context(batch, 0), DEPTH + 1)
        tokens = np.asarray(sampling.sample_each(jnp.asarray(q), keys.token[:, :DEPTH]))
        length = np.arange(batch, dtype=np.int32) // 4 % (DEPTH + 1)

        def judge(rows):
            draft = Draft(tokens=jnp.asarray(tokens[rows]), logits=None, length=jnp.asarray(length[rows]))
            rows_keys = jax.tree.map(lambda key: key[jnp.asarray(rows)], keys)
            return jax.jit(verifier.verify)(jnp.asarray(p[rows]), jnp.asarray(q[rows]), draft, rows_keys), draft

        together, _ = judge(np.arange(batch))
        sampled, _ = judge(np.flatnonzero(~greedy))
        _, greedy_draft = judge(np.flatnonzero(greedy))
        best = verify.greedy(jnp.log(jnp.asarray(p[greedy])), greedy_draft)
        self.assertGreater(int(best.num_accepted.max()), 0)
        for rows, alone in ((greedy, best), (~greedy, sampled)):
            np.testing.assert_array_equal(together.num_accepted[rows], alone.num_accepted)
            np.testing.assert_array_equal(together.next_token[rows], alone.next_token)


class ResidualTest(parameterized.TestCase):
    @parameterized.parameters("rejection", "block")
    def test_one_token_is_accepted_by_overlap_and_corrected_from_the_residual(self, rule):
        p, q = _tables(7, 2, 6, vocab=6), _tables(8, 1, 6, vocab=6)
        play = _run(rule, p, q)
        first, drafted = p[0, 0].astype(np.float64), q[0, 0].astype(np.float64)
        kept = np.minimum(first, drafted)
        self.assertAlmostEqual(play.accepted.mean(), kept.sum(), delta=_four_errors(play.accepted))
        refused = play.next_token[play.accepted == 0][:, None]
        self.assertGreater(_unlikely(refused, (first - kept) / (first - kept).sum(), 6), TOO_UNLIKELY)
        bonus = play.emitted[play.accepted == 1]
        joint = (kept[:, None] * p[1].astype(np.float64)).reshape(-1)
        self.assertGreater(_unlikely(bonus, joint / joint.sum(), 6), TOO_UNLIKELY)

    @parameterized.parameters("rejection", "block")
    def test_where_rounding_leaves_no_residual_the_correction_comes_from_the_target(self, rule):
        # A target that is short by a half stands for one that is short by a rounding: p < q, but for no token p > q.
        play = _run(rule, np.float32([[[0, 0.5]] * 2] * 2), np.float32([[[0, 1]] * 2]), trials=FEWER)
        self.assertAlmostEqual(play.accepted.mean(), 0.5, delta=_four_errors(play.accepted))
        self.assertEqual(set(play.next_token), {1})


class BlockTest(parameterized.TestCase):
    @parameterized.product(seed=(2, 3, 4), stops=("nowhere", "after_an_unlikely_token"))
    def test_accepts_no_fewer_tokens_than_rejection(self, seed, stops):
        p, q = _models(seed, "sampled")
        block, rejection = (_run(rule, p, q, STOPS[stops], FEWER).accepted for rule in ("block", "rejection"))
        self.assertGreater(block.mean() - rejection.mean(), -_four_errors(block) - _four_errors(rejection))

    @parameterized.parameters(("rejection", 10 / 9), ("block", 11 / 9))
    def test_accepts_more_where_an_unlikely_token_makes_up_for_a_likely_one(self, rule, expected):
        # The example of arXiv 2403.10444, section 2: two tokens, two positions, no context.
        p = np.broadcast_to(np.float32([1 / 3, 2 / 3]), (3, 4, 2))
        play = _run(rule, p, p[:2, :, ::-1])
        self.assertAlmostEqual(play.accepted.mean(), expected, delta=_four_errors(play.accepted))
        self.assertGreater(_unlikely(play.emitted, _joint(p), 2), TOO_UNLIKELY)


class CoupledTest(parameterized.TestCase):
    @parameterized.parameters("sampled", "certain", "target")
    def test_output_is_that_of_plain_sampling_to_the_bit(self, drafter):
        p, q = _models(SEED, drafter)
        plain, *plays = (
            _run("coupled", p, q, stops, FEWER)
            for stops in (STOPS["at_once"], *STOPS.values(), Stops(foresight=0.4))  # even a stop that looks ahead
        )
        self.assertEqual(plain.accepted.max(), 0)
        self.assertEqual(max(play.accepted.max() for play in plays), DEPTH)
        for play in plays:
            np.testing.assert_array_equal(play.emitted, plain.emitted)

    @parameterized.parameters(*range(6))
    def test_agrees_as_often_as_shared_random_numbers_promise(self, seed):
        p, q = _tables(seed, 2, 6, vocab=6), _tables(seed + 50, 1, 6, vocab=6)
        accepted = _run("coupled", p, q, trials=FEWER).accepted
        apart = 1 - np.minimum(p[0, 0], q[0, 0]).sum()
        self.assertGreater(accepted.mean(), (1 - apart) / (1 + apart) - _four_errors(accepted))
        self.assertLess(accepted.mean(), 1 - apart + _four_errors(accepted))

    def test_draft_probabilities_are_not_read(self):
        p, _ = _models(SEED, "sampled")
        draft = Draft(tokens=jnp.zeros((1, DEPTH), jnp.int32), logits=None, length=jnp.array([DEPTH]))
        verifier = verify.coupled()
        verdict = verifier.verify(jnp.asarray(p[None, :, 0]), None, draft, verifier.keys(_context(1, 0), DEPTH + 1))
        self.assertEqual(verdict.num_accepted.shape, (1,))


class SyntheticTest(parameterized.TestCase):
    def test_each_position_is_accepted_at_its_rate(self):
        rates = np.float32([0.9, 0.5, 0.2])
        length = np.arange(TRIALS, dtype=np.int32) % 4
        keys = sampling.independent_keys(_context(TRIALS, 0), 1).verify
        counts = np.asarray(verify.drawn_counts(jnp.asarray(rates), jnp.asarray(length), keys))
        self.assertEqual(counts.dtype, np.int32)
        self.assertTrue((counts <= length).all())
        for k, rate in enumerate(rates):
            tried = (counts >= k) & (length > k)
            self.assertGreater(stats.binomtest(int((counts[tried] > k).sum()), int(tried.sum()), rate).pvalue, 1e-4)

    def test_certain_rates_are_certain(self):
        keys = sampling.independent_keys(_context(1000, 0), 1).verify
        counts = verify.drawn_counts(jnp.array([1.0, 1.0, 0.0]), jnp.full((1000,), 3), keys)
        self.assertEqual(set(counts.tolist()), {2})

    def test_the_token_after_the_accepted_ones_follows(self):
        verdict = verify.forced(jnp.array([0, 2, 1]), jnp.arange(9).reshape(3, 3))
        self.assertEqual(verdict.num_accepted.tolist(), [0, 2, 1])
        self.assertEqual(verdict.next_token.tolist(), [0, 5, 7])


class SampleTest(parameterized.TestCase):
    def test_samples_follow_the_distribution(self):
        p = _tables(6, vocab=6)
        keys = sampling.independent_keys(_context(TRIALS, 0), 1).verify
        tokens = sampling.sample(jnp.broadcast_to(jnp.asarray(p), (TRIALS, 6)), keys)
        self.assertGreater(_unlikely(np.asarray(tokens)[:, None], p.astype(np.float64), 6), TOO_UNLIKELY)


if __name__ == "__main__":
    pytest.main([__file__])
