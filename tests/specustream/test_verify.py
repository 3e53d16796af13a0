"""The verification rule keeps the target's distribution: chi-square at accepted, corrected and bonus positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from streamserve import sampling
from streamserve.specustream import verify
from streamserve.types import Draft

RULES = {"rejection": verify.rejection}
TRIALS = 40_000
VOCAB = 6


def _distributions(seed: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Random p [T, V] and q [K, V], with tokens that only one of them can produce."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(VOCAB, 0.6), depth + 1).astype(np.float32)
    q = rng.dirichlet(np.full(VOCAB, 0.6), depth).astype(np.float32)
    p[:, 0], q[:, -1] = 0.0, 0.0
    return p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)


def _run(rule, p, q, lengths, seed):
    """Draft from q and verify against p, in TRIALS independent rows."""
    depth = q.shape[0]
    key = jax.random.key(seed)
    rows_B = jax.random.split(key, TRIALS)
    draft_key, verify_key = jax.vmap(jax.random.split, out_axes=1)(rows_B)
    logits = jnp.log(jnp.asarray(q))
    tokens_BK = jax.vmap(lambda k: jax.random.categorical(k, logits, axis=-1))(draft_key).astype(jnp.int32)
    p_BTV, q_BKV = (jnp.broadcast_to(jnp.asarray(probs), (TRIALS, *probs.shape)) for probs in (p, q))
    draft = Draft(tokens=tokens_BK, probs=q_BKV, length=jnp.asarray(lengths, jnp.int32))
    verdict = jax.jit(rule)(p_BTV, draft, verify_key)
    return np.asarray(tokens_BK), np.asarray(verdict.num_accepted), np.asarray(verdict.next_token), depth


def _p_value(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square test that `tokens` come from `expected`; a token of probability zero must not occur at all."""
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    share = expected[live].astype(np.float64) / expected[live].astype(np.float64).sum()
    return stats.chisquare(counts[live], counts.sum() * share).pvalue


class VerifyTest(parameterized.TestCase):
    @parameterized.product(rule=tuple(RULES), depth=(1, 3), seed=(0, 1, 2))
    def test_every_emitted_position_has_the_targets_distribution(self, rule, depth, seed):
        p, q = _distributions(seed, depth)
        tokens, accepted, next_token, _ = _run(RULES[rule], p, q, np.full(TRIALS, depth), seed)
        for position in range(depth + 1):
            here = accepted >= position  # rows that emit something at this position
            emitted = np.where(accepted > position, tokens[:, min(position, depth - 1)], next_token)[here]
            self.assertGreater(here.sum(), 100)
            self.assertGreater(_p_value(emitted, p[position]), 1e-4, f"{position=}")

    def test_correction_comes_from_the_residual_and_bonus_from_the_target(self):
        p, q = _distributions(3, 1)
        _, accepted, next_token, _ = _run(verify.rejection, p, q, np.ones(TRIALS), 3)
        residual = np.maximum(p[0] - q[0], 0)
        self.assertGreater(_p_value(next_token[accepted == 0], residual / residual.sum()), 1e-4)
        self.assertGreater(_p_value(next_token[accepted == 1], p[1]), 1e-4)
        self.assertAlmostEqual(accepted.mean(), np.minimum(p[0], q[0]).sum(), delta=0.01)

    def test_a_row_may_draft_less_than_the_tier(self):
        p, q = _distributions(4, 3)
        tokens, accepted, next_token, _ = _run(verify.rejection, p, q, np.ones(TRIALS), 4)
        self.assertLessEqual(accepted.max(), 1)
        second = next_token[accepted == 1]
        self.assertGreater(_p_value(second, p[1]), 1e-4)
        first = np.where(accepted > 0, tokens[:, 0], next_token)
        self.assertGreater(_p_value(first, p[0]), 1e-4)

    def test_point_masses_accept_exactly_what_agrees(self):
        p = jax.nn.one_hot(jnp.array([[2, 3, 1], [2, 3, 1]]), VOCAB)
        tokens = jnp.array([[2, 3], [2, 4]], jnp.int32)
        draft = Draft(tokens=tokens, probs=jax.nn.one_hot(tokens, VOCAB), length=jnp.array([2, 2]))
        verdict = verify.rejection(p, draft, jax.random.split(jax.random.key(0), 2))
        self.assertEqual(verdict.num_accepted.tolist(), [2, 1])
        self.assertEqual(verdict.next_token.tolist(), [1, 3])

    def test_equal_distributions_accept_everything(self):
        p, _ = _distributions(5, 3)
        _, accepted, _, _ = _run(verify.rejection, p, p[:3], np.full(TRIALS, 3), 5)
        self.assertEqual(accepted.min(), 3)


class SampleTest(parameterized.TestCase):
    def test_samples_follow_the_distribution(self):
        p, _ = _distributions(6, 0)
        keys = jax.random.split(jax.random.key(1), TRIALS)
        tokens = sampling.sample(jnp.broadcast_to(p[0], (TRIALS, VOCAB)), keys)
        self.assertGreater(_p_value(np.asarray(tokens), p[0]), 1e-4)


if __name__ == "__main__":
    pytest.main([__file__])
