"""Penalties, filters and log-probabilities against short numpy definitions."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from streamserve import SamplingParams, sampling
from streamserve.types import Request, RowContext

VOCAB = 11


def _rows(*params: dict) -> sampling.RowParams:
    rows = []
    for index, fields in enumerate(params):
        stop_ids = fields.pop("stop_ids", ())
        request = Request(
            request_id=str(index), prompt_token_ids=(1,), params=SamplingParams(**fields), seed=index, stop_ids=stop_ids
        )
        rows.append(sampling.make_row(request, max_stop_ids=3, max_logit_bias=4))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def _context(row, seen=(), output=(), emitted=0) -> RowContext:
    batch = row.temperature.shape[0]
    seen_BV = np.zeros((batch, VOCAB), bool)
    seen_BV[:, list(seen)] = True
    counts = np.bincount(np.asarray(output, np.int64), minlength=VOCAB).astype(np.int32)
    return RowContext(
        row=row,
        prompt_seen=jnp.asarray(seen_BV),
        output_counts=jnp.broadcast_to(jnp.asarray(counts), (batch, VOCAB)),
        emitted=jnp.full((batch,), emitted, jnp.int32),
    )


def _numpy_filter(logits, temperature, top_p, top_k, min_p):
    """Temperature, then min-p, top-k, top-p, by sorting."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    total, mass = p.sum(), 0.0
    for token in order:
        if mass >= top_p * total:
            p[token] = 0
        mass += p[token]
    return p / p.sum()


class ProbabilitiesTest(parameterized.TestCase):
    @parameterized.parameters(
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.6},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 1.1, "top_p": 0.8, "top_k": 5, "min_p": 0.05},
        {"temperature": 2.0, "top_p": 1e-6},
    )
    def test_filters_agree_with_numpy(self, **params):
        logits = np.random.default_rng(0).normal(size=(1, 4, VOCAB)).astype(np.float32) * 2
        probs = np.asarray(sampling.probabilities(jnp.asarray(logits), _rows(params)))
        for position in range(4):
            merged = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **params}
            np.testing.assert_allclose(probs[0, position], _numpy_filter(logits[0, position], **merged), atol=1e-6)

    def test_greedy_is_a_point_mass_on_the_first_largest_logit(self):
        logits = jnp.asarray(np.array([[[0.0, 5.0, 5.0, *[1.0] * 8]]], np.float32))
        probs = sampling.probabilities(logits, _rows({"temperature": 0.0}))
        self.assertEqual(np.asarray(probs)[0, 0].tolist(), [0.0, 1.0, *[0.0] * 9])

    def test_a_row_does_not_see_its_neighbours_parameters(self):
        logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 100, VOCAB)).astype(np.float32))
        params = [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 2}]
        together = sampling.probabilities(jnp.repeat(logits, 3, axis=0), _rows(*params))
        for index, one in enumerate(params):
            # Among its like, in a batch as large: arrays of another shape may round differently.
            alike = sampling.probabilities(jnp.repeat(logits, 3, axis=0), _rows(*[one] * 3))
            np.testing.assert_array_equal(np.asarray(together)[index], np.asarray(alike)[index])


class AdjustTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.logits = np.random.default_rng(2).normal(size=(1, 3, VOCAB)).astype(np.float32)

    def _expected(self, position_tokens, row_fields, seen, emitted):
        """The rules of the field, one position at a time."""
        out = []
        for position, tokens in enumerate(position_tokens):
            x = self.logits[0, position].astype(np.float64).copy()
            for token, bias in row_fields.get("logit_bias", {}).items():
                x[token] += bias
            if emitted + position < row_fields.get("min_tokens", 0):
                x[list(row_fields["stop_ids"])] = -np.inf
            counts = np.bincount(np.asarray(tokens, np.int64), minlength=VOCAB)
            repeated = (counts > 0) | np.isin(np.arange(VOCAB), seen)
            factor = row_fields.get("repetition_penalty", 1.0)
            x = np.where(repeated, np.where(x > 0, x / factor, x * factor), x)
            x = (
                x
                - row_fields.get("frequency_penalty", 0) * counts
                - row_fields.get("presence_penalty", 0) * (counts > 0)
            )
            out.append(x)
        return np.stack(out)

    @parameterized.parameters(
        {"presence_penalty": 0.7},
        {"frequency_penalty": 1.1},
        {"repetition_penalty": 1.6},
        {"logit_bias": {3: 2.5, 4: -100.0}},
        {"min_tokens": 5, "stop_ids": (2, 9)},
        {"presence_penalty": -1.0, "frequency_penalty": 0.3, "repetition_penalty": 0.8, "logit_bias": {1: 1.0}},
    )
    def test_each_position_is_judged_as_plain_decoding_would(self, **fields):
        output, drafted, seen, emitted = [4, 4, 7], [7, 2], [0, 5], 3
        row = _rows(dict(fields))
        context = _context(row, seen, output, emitted)
        got = sampling.adjust(jnp.asarray(self.logits), context, jnp.asarray([drafted], jnp.int32), 0)
        tokens = [output, [*output, 7], [*output, 7, 2]]
        np.testing.assert_allclose(np.asarray(got)[0], self._expected(tokens, fields, seen, emitted), atol=1e-5)
        # One position at a time, as the drafter asks, gives the same.
        for position in range(3):
            one = jnp.asarray(self.logits[:, position : position + 1])
            single = sampling.adjust(one, context, jnp.asarray([drafted], jnp.int32)[:, :position], position)
            np.testing.assert_allclose(np.asarray(single)[0, 0], np.asarray(got)[0, position], atol=1e-6)

    def test_neutral_parameters_leave_logits_untouched_to_the_bit(self):
        context = _context(_rows({}, {"presence_penalty": 1.0}), [1], [2])
        logits = jnp.repeat(jnp.asarray(self.logits), 2, axis=0)
        got = sampling.adjust(logits, context, jnp.zeros((2, 2), jnp.int32), 0)
        np.testing.assert_array_equal(np.asarray(got)[0], self.logits[0])


class LogprobsTest(parameterized.TestCase):
    def test_chosen_rank_and_top(self):
        logits = np.random.default_rng(3).normal(size=(2, VOCAB)).astype(np.float32)
        tokens = jnp.asarray([3, 8], jnp.int32)
        got = sampling.token_logprobs(jnp.asarray(logits), tokens, jnp.bool_(True), 4)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, token in enumerate([3, 8]):
            self.assertAlmostEqual(float(got.chosen[row]), expected[row, token], places=5)
            self.assertEqual(int(got.rank[row]), 1 + (expected[row] > expected[row, token]).sum())
            self.assertEqual(got.top_ids[row].tolist(), np.argsort(-expected[row])[:4].tolist())

    def test_nothing_is_computed_for_nobody(self):
        got = sampling.token_logprobs(jnp.ones((2, VOCAB)), jnp.zeros((2,), jnp.int32), jnp.bool_(False), 4)
        self.assertEqual(float(jnp.abs(got.top).sum() + jnp.abs(got.chosen).sum()), 0.0)


class RowTest(parameterized.TestCase):
    def test_too_many_stop_ids_are_refused_with_both_numbers(self):
        with self.assertRaisesRegex(ValueError, "4 stop token ids given, the engine is configured for at most 3"):
            _rows({"stop_ids": (1, 2, 3, 4)})

    def test_the_stream_of_random_numbers_depends_on_seed_and_count_alone(self):
        row = _rows({}, {}, {})
        keys = sampling.round_keys(row.key, jnp.array([0, 0, 5], jnp.int32))
        again = sampling.round_keys(row.key[2:], jnp.array([5], jnp.int32))
        data = np.asarray(jax.random.key_data(keys))
        np.testing.assert_array_equal(data[2], np.asarray(jax.random.key_data(again))[0])
        self.assertFalse((data[0] == data[1]).all())
