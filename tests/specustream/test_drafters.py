"""Laws of every drafter, over one table of them; and each against a reference in plain Python."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve import sampling
from streamserve.specustream import drafters
from streamserve.specustream.depth import StopRule
from tests.specustream import drafters_cases as cases
from tests.specustream.drafters_cases import BATCH, CAPACITY, DRAFTERS, MODELS, VOCAB, counted, make_rows

RULES = {
    "never": (StopRule.NEVER, 0.0),
    "confidence": (StopRule.CONFIDENCE, 0.4),
    "entropy": (StopRule.ENTROPY, 0.5),
}
SEEDS = (0, 1)
_case = functools.cache(lambda name: DRAFTERS[name]())


@functools.cache
def _propose(name: str, depth: int):
    return jax.jit(functools.partial(_case(name).drafter.propose, depth=depth))


def _draft(name, rows, *, depth=4, order=None):
    """Draft for rows, whose pages are in any order where `order` moves the rows afterwards."""
    case = _case(name)
    pool, table_BM = cases.pages(case, rows)
    if order is not None:
        rows, table_BM = cases.take_rows(rows, order), table_BM[order]
    rows = dataclasses.replace(rows, keys=rows.keys[:, :depth])
    return jax.device_get(_propose(name, depth)(case.params, pool, table_BM, rows)[0])


def _plan(rows, **fields):
    return dataclasses.replace(rows, plan=dataclasses.replace(rows.plan, **fields))


def _assert_same(draft, other, rows=range(BATCH), others=None):
    """Drafts are equal bit by bit, those positions included that do not count."""
    for row, twin in zip(rows, others or rows, strict=True):
        for field in ("tokens", "logits", "length"):
            np.testing.assert_array_equal(getattr(draft, field)[row], getattr(other, field)[twin], f"{field} of {row}")


class ContractTest(parameterized.TestCase):
    @parameterized.product(name=tuple(DRAFTERS), rule=tuple(RULES), seed=SEEDS)
    def test_drafts_are_within_bounds_and_have_positive_probability(self, name, rule, seed):
        rule, threshold = RULES[rule]
        rows = make_rows(seed, rule=rule, threshold=threshold)
        draft = _draft(name, rows)
        limit_B = np.where(rows.active, np.minimum(rows.plan.depth, 4), 0)
        self.assertTrue(np.all((draft.length >= 0) & (draft.length <= limit_B)), draft.length)
        self.assertTrue(np.all((draft.tokens >= 0) & (draft.tokens < VOCAB)))
        self.assertFalse(np.any(np.isnan(draft.logits) | (draft.logits == np.inf)))
        probs_BKV = np.asarray(sampling.probabilities(jnp.asarray(draft.logits), rows.context.row))
        np.testing.assert_allclose(probs_BKV.sum(-1), 1.0, atol=1e-5)
        drawn_BK = np.take_along_axis(probs_BKV, draft.tokens[..., None], axis=-1)[..., 0]
        self.assertTrue(np.all(drawn_BK[np.arange(4) < draft.length[:, None]] > 0))
        self.assertGreater(draft.length.sum(), 0)

    @parameterized.product(name=tuple(DRAFTERS), seed=SEEDS)
    def test_rows_do_not_depend_on_their_slots(self, name, seed):
        rows, order = make_rows(seed), np.random.default_rng(seed).permutation(BATCH)
        _assert_same(_draft(name, rows, order=order), _draft(name, rows), range(BATCH), order.tolist())

    @parameterized.product(name=tuple(DRAFTERS), rule=tuple(RULES))
    def test_rows_do_not_depend_on_their_neighbours(self, name, rule):
        rule, threshold = RULES[rule]
        rows, others = (make_rows(seed, rule=rule, threshold=threshold) for seed in (0, 1))
        rows, others = (_plan(these, depth=jnp.asarray([4, 4, 3, 2, 0, 4])) for these in (rows, others))
        draft = _draft(name, rows)
        for row in range(BATCH):
            only = lambda mine, theirs, row=row: (  # noqa: E731
                mine if mine.ndim == 0 or len(mine) != BATCH else theirs.at[row].set(mine[row])
            )
            _assert_same(draft, _draft(name, jax.tree.map(only, rows, others)), [row])

    @parameterized.named_parameters((name, name) for name in DRAFTERS)
    def test_idle_rows_draft_nothing_and_harm_nobody(self, name):
        rows = make_rows()
        wild = dataclasses.replace(
            rows,
            length=rows.length.at[5].set(CAPACITY - 1),
            last_token=rows.last_token.at[5].set(VOCAB - 1),
            history=rows.history.at[5].set(0),
        )
        draft = _draft(name, wild)
        self.assertEqual(draft.length[5], 0)
        _assert_same(draft, _draft(name, rows), range(5))
        idle = _draft(name, dataclasses.replace(rows, active=jnp.zeros((BATCH,), bool)))
        self.assertEqual(idle.length.tolist(), [0] * BATCH)

    @parameterized.product(name=tuple(DRAFTERS), seed=SEEDS)
    def test_nothing_beyond_the_length_is_seen(self, name, seed):
        rows = make_rows(seed)
        future_BC = np.arange(CAPACITY)[None] > np.asarray(rows.length)[:, None]
        poisoned = cases.with_history(rows, np.where(future_BC, VOCAB - 1, np.asarray(rows.history)))
        _assert_same(_draft(name, rows), _draft(name, poisoned))

    @parameterized.product(name=tuple(DRAFTERS), rule=tuple(RULES))
    def test_no_decision_sees_the_token_it_decides_about(self, name, rule):
        rule, threshold = RULES[rule]
        changed = 0
        for seed, k in itertools.product(SEEDS, range(4)):
            rows = make_rows(seed, rule=rule, threshold=threshold)
            draft = _draft(name, rows)
            keys = rows.keys.at[:, k].set(jax.random.split(jax.random.key(100 + k), BATCH))
            other = _draft(name, dataclasses.replace(rows, keys=keys))
            np.testing.assert_array_equal(other.length > k, draft.length > k, f"position {k}")
            np.testing.assert_array_equal(other.tokens[:, :k], draft.tokens[:, :k])
            np.testing.assert_array_equal(other.logits[:, : k + 1], draft.logits[:, : k + 1])
            changed += np.count_nonzero(other.tokens[:, k] != draft.tokens[:, k])
        self.assertEqual(changed > 0, name in MODELS, "key k does not change token k: the test is empty")

    @parameterized.named_parameters((name, name) for name in DRAFTERS)
    def test_the_same_keys_give_the_same_draft(self, name):
        _assert_same(_draft(name, make_rows()), _draft(name, make_rows()))

    @parameterized.product(name=tuple(DRAFTERS), rule=tuple(RULES), seed=SEEDS)
    def test_depth_only_cuts(self, name, rule, seed):
        rule, threshold = RULES[rule]
        rows = make_rows(seed, rule=rule, threshold=threshold)
        deep, flat = _draft(name, rows), _draft(name, rows, depth=2)
        planned = _draft(name, _plan(rows, depth=jnp.minimum(rows.plan.depth, 2)))
        for short in (flat, planned):
            np.testing.assert_array_equal(short.length, np.minimum(deep.length, 2))
            for row in range(BATCH):
                tokens, logits = counted(short, row)
                self.assertEqual(tokens, counted(deep, row)[0][:2])
                np.testing.assert_array_equal(logits, counted(deep, row)[1][:2])

    @parameterized.named_parameters((name, name) for name in DRAFTERS if name not in MODELS)
    def test_what_was_not_drawn_is_a_point_mass(self, name):
        draft = _draft(name, make_rows())
        mass_BKV = np.arange(VOCAB) == draft.tokens[..., None]
        np.testing.assert_array_equal(draft.logits, np.where(mass_BKV, 0.0, -np.inf))

    def test_none_refuses_to_draft(self):
        with self.assertRaisesRegex(ValueError, "nothing drafts, so the depth must be 0, got depth=2"):
            drafters.none().propose((), (), jnp.zeros((BATCH, 1), jnp.int32), make_rows(), depth=2)


class DraftModelTest(parameterized.TestCase):
    @parameterized.product(name=tuple(MODELS), seed=SEEDS)
    def test_each_token_is_drawn_from_the_models_adjusted_logits(self, name, seed):
        rows = make_rows(seed)
        draft, case = _draft(name, rows), _case(name)
        expected = np.zeros((BATCH, 4, VOCAB), np.float32)
        for row in range(BATCH):
            for k in range(draft.length[row]):
                seen = np.asarray(rows.history)[row, : int(rows.length[row]) + 1].tolist()
                expected[row, k] = _raw_logits(name, case.params, seen + draft.tokens[row, :k].tolist())
        adjusted = sampling.adjust(jnp.asarray(expected), rows.context, jnp.asarray(draft.tokens), 0)
        probs = sampling.probabilities(jnp.asarray(draft.logits), rows.context.row)
        for row in range(BATCH):
            length = int(draft.length[row])
            self.assertEqual(length, min(int(rows.plan.depth[row]), 4) if rows.active[row] else 0)
            np.testing.assert_allclose(counted(draft, row)[1], adjusted[row, :length], atol=2e-5)
        for k in range(4):
            drawn_B = sampling.sample(probs[:, k], rows.keys[:, k])
            np.testing.assert_array_equal(draft.tokens[:, k], np.where(draft.length > k, drawn_B, 0))

    @parameterized.product(rule=(StopRule.CONFIDENCE, StopRule.ENTROPY), threshold=(0.2, 0.35, 0.5, 0.8), greedy=(0, 1))
    def test_stop_rules_are_those_of_the_papers(self, rule, threshold, greedy):
        rows = make_rows(3)
        if greedy:
            row = dataclasses.replace(rows.context.row, temperature=jnp.zeros((BATCH,)))
            rows = dataclasses.replace(rows, context=dataclasses.replace(rows.context, row=row))
        rows = _plan(rows, depth=jnp.full((BATCH,), 4))
        whole = _draft("draft_model", rows)
        draft = _draft("draft_model", _plan(rows, rule=jnp.asarray(rule, jnp.int32), threshold=jnp.float32(threshold)))
        temperature_B = np.asarray(rows.context.row.temperature)
        for row in range(5):
            length = 0
            for token, logits in zip(*counted(whole, row), strict=True):
                scaled = logits.astype(np.float64) / (temperature_B[row] or 1.0)
                probs = np.exp(scaled - scaled.max())
                probs /= probs.sum()
                entropy = -sum(p * np.log(p) for p in probs if p > 0)
                if rule == StopRule.ENTROPY and 1 - np.sqrt(0.2 * entropy) < threshold:
                    break
                length += 1
                if rule == StopRule.CONFIDENCE and probs[token] < threshold:
                    break
            self.assertEqual(draft.length[row], length, f"{row=}")
            self.assertEqual(counted(draft, row)[0], counted(whole, row)[0][:length])

    @parameterized.parameters(([0, 0, 0, 0, 0, 4], 0), ([0, 1, 0, 0, 0, 4], 1), ([1, 3, 0, 2, 0, 4], 3), ([9] * 6, 4))
    def test_as_many_passes_run_as_the_deepest_row_needs(self, depths, passes):
        case, rows = _case("draft_model"), _plan(make_rows(), depth=jnp.asarray(depths))
        pool, table_BM = cases.pages(case, rows)
        pool = jax.tree.map(lambda leaf: leaf - 100.0, pool)  # no token: whatever is written shows
        _, after = _propose("draft_model", 4)(case.params, pool, table_BM, rows)
        written = jax.device_get(after.layers[0].k[table_BM[1]] != pool.layers[0].k[table_BM[1]])
        self.assertEqual(np.count_nonzero(written), passes + 1 if passes else 0)

    @parameterized.parameters((StopRule.CONFIDENCE, 2.0, 1), (StopRule.ENTROPY, 2.0, 0), (StopRule.NEVER, 2.0, 4))
    def test_a_threshold_beyond_all_stops_at_once(self, rule, threshold, length):
        rows = _plan(make_rows(rule=rule, threshold=threshold), depth=jnp.full((BATCH,), 4))
        self.assertEqual(_draft("draft_model", rows).length.tolist(), [length] * 5 + [0])


def _raw_logits(name, params, tokens):
    """Logits of the model in plain numpy; of `tli` through the definition of the intersection."""
    if name == "draft_model":
        return cases.table_logits(params, tokens)
    names = {index: token for token, index in cases.TARGET_TOKENS.items()}
    to_draft = [cases.DRAFT_TOKENS.get(names[index], None) for index in range(VOCAB)]
    logits = cases.table_logits(params, [7 if to_draft[token] is None else to_draft[token] for token in tokens])
    return np.array([-np.inf if index is None else logits[index] for index in to_draft])


_HISTORIES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=3, max_size=3)


@functools.cache
def _lookup(make, depth: int, **options):
    return jax.jit(functools.partial(make(VOCAB, **options).propose, depth=depth))


@functools.cache
def _three_rows():
    return cases.take_rows(make_rows(), np.arange(3))


def _look_up(propose, params, histories, depth):
    """Drafted tokens [3, ...] for three histories, whose pages are none."""
    history_BC = np.full((3, 24), 1)
    for row, tokens in enumerate(histories):
        history_BC[row, : len(tokens)] = tokens
    rows = dataclasses.replace(_three_rows(), length=jnp.asarray([len(tokens) - 1 for tokens in histories], jnp.int32))
    rows = _plan(cases.with_history(rows, history_BC), depth=jnp.full((3,), depth))
    draft = jax.device_get(propose(params, (), jnp.zeros((3, 1), jnp.int32), rows)[0])
    return [counted(draft, row)[0] for row in range(3)]


class NgramTest(parameterized.TestCase):
    @parameterized.parameters((1, 4), (2, 3), (3, 3), (1, 1))
    def test_agrees_with_the_reference(self, low, high):
        propose = _lookup(drafters.ngram, 5, min_ngram=low, max_ngram=high)

        @settings(max_examples=60, deadline=None)
        @given(_HISTORIES)
        def check(histories):
            expected = [cases.ngram_reference(tokens, low, high)[:5] for tokens in histories]
            self.assertEqual(_look_up(propose, (), histories, 5), expected)

        check()

    def test_the_latest_of_the_longest_occurrences_counts(self):
        histories = [[1, 2, 7, 1, 2, 8, 2, 9, 1, 2], [4, 4], [1, 2, 3]]
        propose = _lookup(drafters.ngram, 4, max_ngram=4)
        self.assertEqual(_look_up(propose, (), histories, 4), [[8, 2, 9, 1], [4, 4, 4, 4], []])

    @parameterized.parameters((0, 3), (3, 2), (1, 128))
    def test_sizes_that_make_no_sense_are_refused(self, low, high):
        with self.assertRaisesRegex(ValueError, f"does not hold: min_ngram={low}, max_ngram={high}"):
            drafters.ngram(VOCAB, min_ngram=low, max_ngram=high)


class SuffixTest(parameterized.TestCase):
    @parameterized.parameters(
        {"max_match": 3, "max_places": 32, "min_probability": 0.29, "factor": 1.0},
        {"max_match": 8, "max_places": 32, "min_probability": 0.47, "factor": 2.5},
        {"max_match": 1, "max_places": 2, "min_probability": 0.0, "factor": 9.0},
        {"max_match": 2, "max_places": 5, "min_probability": 0.13, "factor": 3.0},
    )
    def test_agrees_with_the_reference(self, factor, **options):
        propose = _lookup(drafters.suffix, 5, memory_tokens=150, max_spec_factor=factor, **options)
        texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=29), max_size=5)  # all have room

        @settings(max_examples=60, deadline=None)
        @given(_HISTORIES, texts)
        def check(histories, texts):
            params = drafters.suffix(VOCAB, memory_tokens=150).params
            for text in texts:
                params = drafters.suffix(VOCAB).remember(params, tuple(text))
            follow = functools.partial(cases.suffix_reference, texts, factor=factor, **options)
            self.assertEqual(_look_up(propose, params, histories, 5), [follow(tokens)[:5] for tokens in histories])

        check()

    def test_the_latest_places_vote(self):
        drafter = drafters.suffix(VOCAB, memory_tokens=300)
        memory = drafter.remember(drafter.params, (1, 2) * 120 + (1, 3, 5, 1, 3, 5))
        propose = _lookup(drafters.suffix, 2, memory_tokens=300, max_places=2, max_spec_factor=2.0)
        self.assertEqual(_look_up(propose, memory, [[1], [9, 2], [5, 5, 1]], 2), [[3, 5], [1, 3], [3, 5]])

    def test_a_full_memory_does_not_run_into_the_history(self):
        propose = _lookup(drafters.suffix, 4, memory_tokens=4, max_spec_factor=4.0)
        memory = np.array([5, 6, 7, 8], np.int32)
        self.assertEqual(_look_up(propose, memory, [[9, 7], [9, 8], [9, 5, 6]], 4), [[8], [], [7, 8]])

    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 12), st.lists(st.lists(st.integers(0, 9), max_size=15), max_size=8))
    def test_remembers_the_latest_whole_texts_that_have_room(self, room, texts):
        drafter = drafters.suffix(VOCAB, memory_tokens=room)
        params, kept = drafter.params, []
        for text in texts:
            before = params.copy()
            after = drafter.remember(params, tuple(text))
            np.testing.assert_array_equal(params, before)
            params = after
            kept = [*kept, text[-room:]] if text else kept
            while sum(map(len, kept)) + len(kept) - 1 > room:
                kept = kept[1:]
            laid_out = [token for text in kept for token in (*text, -1)]
            np.testing.assert_array_equal(params, (laid_out + [-1] * room)[:room])
            self.assertEqual(params.dtype, np.int32)

    @parameterized.parameters({"memory_tokens": 0}, {"max_match": 0}, {"max_match": 128}, {"max_places": 0})
    def test_sizes_that_make_no_sense_are_refused(self, **options):
        ((name, value),) = options.items()
        with self.assertRaisesRegex(ValueError, f"{name}={value}"):
            drafters.suffix(VOCAB, **options)


class TliTest(parameterized.TestCase):
    def test_the_distribution_is_the_drafts_on_the_intersection(self):
        params = cases.table_params(cases.DRAFT_VOCAB)
        fns = drafters.tli_fns(cases.TABLE_FNS, cases.TARGET_TOKENS, cases.DRAFT_TOKENS, VOCAB, cases.DRAFT_VOCAB)
        hidden = jax.random.normal(jax.random.key(0), (3, 2, 6))
        own = np.asarray(jax.nn.softmax(cases.TABLE_FNS.logits(params, hidden)))
        expected = np.zeros((3, 2, VOCAB))
        for token, draft_id in cases.DRAFT_TOKENS.items():
            if token in cases.TARGET_TOKENS:
                expected[..., cases.TARGET_TOKENS[token]] = own[..., draft_id]
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(jax.nn.softmax(fns.logits(params, hidden)), expected, atol=1e-6)

    def test_ids_without_logits_are_left_out(self):
        target, draft = {"a": 0, "b": 5, "c": 1}, {"a": 7, "b": 0, "c": 1}
        fns = drafters.tli_fns(cases.TABLE_FNS, target, draft, 4, 5)
        logits = fns.logits(cases.table_params(5), jnp.ones((1, 6)))
        self.assertEqual(np.isfinite(logits).tolist(), [[False, True, False, False]])

    def test_vocabularies_without_a_common_token_are_refused(self):
        with self.assertRaisesRegex(ValueError, r"0 tokens in common between target \(2 tokens\) and draft \(1 tokens"):
            drafters.tli_fns(cases.TABLE_FNS, {"a": 0, "b": 1}, {"c": 0}, 2, 1)
        with self.assertRaisesRegex(ValueError, "unknown_id=9 is not among the draft's 3 tokens"):
            drafters.tli_fns(cases.TABLE_FNS, {"a": 0}, {"a": 0}, 2, 3, unknown_id=9)


if __name__ == "__main__":
    pytest.main([__file__])
