"""The exactness audit, on an engine that answers as told and on the tiny model."""

import dataclasses

from absl.testing import parameterized

from streamserve.audit import audit
from streamserve.sampling_params import SamplingParams
from streamserve.types import Logprob, Prompt, RequestOutput
from tests import fakes


def _answer(name: str, tokens, margins=None) -> RequestOutput:
    """An output whose two largest log-probabilities differ by `margins` at each position."""
    logprobs = None
    if margins is not None:
        logprobs = tuple(
            {
                token: Logprob(logprob=-1.0, rank=1),
                token + 1: Logprob(logprob=-1.0 - margin, rank=2),
            }
            for token, margin in zip(tokens, margins, strict=True)
        )
    return fakes.make_output(name, tokens=tuple(tokens), logprobs=logprobs)


class _ToldEngine:
    """Answers by what it is pinned to."""

    def __init__(self, by_pin):
        self.by_pin, self.pins, self.asked = by_pin, [], []

    def pin_depth(self, depth, *, tier=None):
        self.pins.append((depth, tier))

    def stream(self, prompts):
        prompts = list(prompts)
        self.asked.append(prompts)
        for prompt in reversed(prompts):
            yield self.by_pin[self.pins[-1]][prompt.request_id]


def _prompt(name: str, **params) -> Prompt:
    return Prompt(request_id=name, params=SamplingParams(**{"temperature": 0.0, **params}), token_ids=(1,))


class AuditTest(parameterized.TestCase):
    def test_every_divergence_is_reported_with_its_margins(self):
        wide = {"a": _answer("a", (1, 2, 3), (0.5, 0.5, 0.5)), "b": _answer("b", (4, 5, 7), (1.0, 0.25, 0.125))}
        one = {"a": _answer("a", (1, 2, 3), (0.5, 0.5, 0.75)), "b": _answer("b", (4, 5, 6), (1.0, 0.25, 0.0625))}
        engine = _ToldEngine({(0, 3): wide, (0, None): one})
        answered = [(_prompt("a"), _answer("a", (1, 2, 3))), (_prompt("b"), _answer("b", (4, 5, 7)))]
        report = audit(engine, answered, depth=3)
        self.assertEqual((report.completions, report.identical, report.wide_identical, report.tokens), (2, 1, 1, 6))
        self.assertEqual(engine.pins, [(0, 3), (0, None), (None, None)])
        self.assertAlmostEqual(report.largest_logprob_difference, 0.25)
        (found,) = report.divergences
        self.assertEqual((found.request_id, found.position, found.got, found.plain), ("b", 2, 7, 6))
        self.assertAlmostEqual(found.margin, 0.0625)
        self.assertAlmostEqual(found.wide_margin, 0.125)
        self.assertIn("1 of 2 greedy completions", str(report))
        self.assertIn("6.25e-02", str(report))
        self.assertTrue(all(prompt.params.logprobs == 2 for prompt in engine.asked[0]))

    def test_an_answer_that_ends_early_diverges_where_it_ends(self):
        plain = {"a": _answer("a", (1, 2, 3), (0.5, 0.5, 0.5))}
        engine = _ToldEngine({(0, 2): plain, (0, None): plain})
        (found,) = audit(engine, [(_prompt("a"), _answer("a", (1, 2)))], depth=2).divergences
        self.assertEqual((found.position, found.got, found.plain), (2, None, 3))

    def test_sampled_and_failed_answers_are_left_out(self):
        engine = _ToldEngine({(0, 2): {}, (0, None): {}})
        answered = [
            (_prompt("a", temperature=1.0), _answer("a", (1,))),
            (_prompt("b"), fakes.make_output("b", error="too long")),
        ]
        report = audit(engine, answered, depth=2)
        self.assertEqual((report.completions, report.left_out, engine.asked), (0, 1, [[], []]))

    def test_the_policy_decides_again_after_an_audit_that_failed(self):
        engine = _ToldEngine({(0, 2): {"a": fakes.make_output("a", error="no page")}})
        with self.assertRaisesRegex(RuntimeError, "could not decode a again: no page"):
            audit(engine, [(_prompt("a"), _answer("a", (1, 2)))], depth=2)
        self.assertEqual(engine.pins[-1], (None, None))

    def test_log_probabilities_are_compared_up_to_the_token_that_differs_and_it_too(self):
        wide = {"a": _answer("a", (1, 7, 3), (0.5, 0.5, 0.5))}
        one = {"a": _answer("a", (1, 6, 3), (0.5, 0.75, 9.0))}  # it lists 7 as the second best; then all is different
        report = audit(_ToldEngine({(0, 2): wide, (0, None): one}), [(_prompt("a"), _answer("a", (1, 7, 3)))], depth=2)
        self.assertAlmostEqual(report.largest_logprob_difference, 0.75)

    def test_the_wide_margin_is_unknown_where_wide_decoding_went_another_way_before(self):
        wide = {"a": _answer("a", (9, 2, 3), (0.5, 0.5, 0.5))}
        one = {"a": _answer("a", (1, 2, 4), (0.5, 0.5, 0.25))}
        report = audit(_ToldEngine({(0, 2): wide, (0, None): one}), [(_prompt("a"), _answer("a", (1, 2, 3)))], depth=2)
        (found,) = report.divergences
        self.assertEqual((found.position, found.margin, found.wide_margin), (2, 0.25, None))

    def test_the_largest_margin_is_told(self):
        margins = {"a": 0.5, "b": 0.0625}
        one = {name: _answer(name, (1,), (margin,)) for name, margin in margins.items()}
        engine = _ToldEngine({(0, 2): one, (0, None): one})
        report = audit(engine, [(_prompt(name), _answer(name, (2,))) for name in margins], depth=2)
        self.assertIn("largest top-2 margin at a divergence 5.00e-01", str(report))

    def test_what_is_decoded_again_has_all_the_time_and_the_log_probabilities_that_were_asked_for(self):
        one = {"a": _answer("a", (1,), (0.5,))}
        engine = _ToldEngine({(0, 2): one, (0, None): one})
        prompt = dataclasses.replace(_prompt("a", logprobs=5), timeout_s=1.0)
        audit(engine, [(prompt, _answer("a", (1,)))], depth=2)
        self.assertEqual([(asked.timeout_s, asked.params.logprobs) for (asked,) in engine.asked], [(None, 5)] * 2)
