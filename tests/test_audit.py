"""The exactness audit, on an engine that answers as told and on the tiny model."""

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
