"""Traces: what is read is what the lines say, scaled as stated, and prompts share what the trace says they share."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from experiments import traces
from experiments.traces import TraceFormat, TraceRow, TraceScale

AZURE = b"""\xef\xbb\xbfTIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,3180,8\r
\r
2023-11-17 00:00:00,110,27""".splitlines(keepends=True)
MOONCAKE = [
    b'{"timestamp": 0, "input_length": 700, "output_length": 500, "hash_ids": [46, 47]}\n',
    b"\n",
    b'{"timestamp": 0, "input_length": 5, "output_length": 1}\n',
    b'{"timestamp": 3000.5, "input_length": 1025, "output_length": 0, "hash_ids": [46, 47, 9]}\n',
]
VOCABULARY = np.arange(1000, 5000)
CSV, JSONL = pathlib.Path("t.csv"), pathlib.Path("t.jsonl")


def read(lines, path=CSV, form=TraceFormat.AUTO):
    return list(traces.read_trace(lines, path, form))


def row(prompt_tokens, hash_ids=(), *, line=2, output_tokens=1):
    return TraceRow(
        at_s=0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        hash_ids=tuple(hash_ids),
        line_number=line,
    )


def shared(one, other):
    """Count the tokens that two prompts begin with in common."""
    same = np.asarray(one[: len(other)]) == np.asarray(other[: len(one)])
    return len(same) if same.all() else int(np.argmin(same))


class ReadTest(parameterized.TestCase):
    def test_azure_lines_are_read_with_all_their_digits(self):
        rows = read(AZURE)
        self.assertEqual([one.line_number for one in rows], [2, 3, 5])
        self.assertEqual([one.prompt_tokens for one in rows], [4808, 3180, 110])
        self.assertEqual([one.output_tokens for one in rows], [10, 8, 27])
        self.assertAlmostEqual(rows[1].at_s - rows[0].at_s, 0.052, delta=2e-6)
        self.assertAlmostEqual(rows[2].at_s - rows[0].at_s, 20576.02004, delta=2e-6)
        self.assertEqual({one.hash_ids for one in rows}, {()})

    def test_columns_may_come_in_any_order_and_times_with_a_zone(self):
        lines = [
            b"GeneratedTokens, region ,TIMESTAMP,ContextTokens\n",
            b"7,x,2024-05-10 02:00:00+02:00,5\n",
            b"9,y,2024-05-10 00:00:01.25+00:00,6\n",
        ]
        rows = read(lines)
        self.assertEqual([(one.prompt_tokens, one.output_tokens) for one in rows], [(5, 7), (6, 9)])
        self.assertAlmostEqual(rows[1].at_s - rows[0].at_s, 1.25)

    def test_mooncake_lines_are_read_in_seconds(self):
        want = [(1, 0.0, 700, 500, (46, 47)), (3, 0.0, 5, 1, ()), (4, 3.0005, 1025, 0, (46, 47, 9))]
        got = [
            (one.line_number, one.at_s, one.prompt_tokens, one.output_tokens, one.hash_ids)
            for one in read(MOONCAKE, JSONL)
        ]
        self.assertEqual(got, want)

    @parameterized.parameters(
        (AZURE, "trace.csv"), (AZURE, "trace.txt"), (MOONCAKE, "trace.jsonl"), (MOONCAKE, "trace")
    )
    def test_the_format_is_told_by_the_suffix_else_by_the_first_line(self, lines, name):
        self.assertLen(read(lines, pathlib.Path(name)), 3)

    def test_a_format_that_is_given_counts_more_than_the_suffix(self):
        self.assertLen(read(AZURE, JSONL, TraceFormat.AZURE), 3)
        self.assertLen(read(MOONCAKE, CSV, TraceFormat.MOONCAKE), 3)
        with self.assertRaisesRegex(ValueError, "t.csv, line 1: not valid JSON"):
            read(AZURE, CSV, TraceFormat.MOONCAKE)

    def test_lines_are_read_as_they_are_pulled(self):
        rows = traces.read_trace([*AZURE, b"broken"], CSV)
        for _ in range(3):
            next(rows)
        with self.assertRaisesRegex(ValueError, "t.csv, line 6: 1 cells for 3 columns"):
            next(rows)

    @parameterized.parameters(
        ("2023-11-16 18:17:05,1", "2 cells for 3 columns"),
        ("2023-11-16 18:17:05,1,2,3", "4 cells for 3 columns"),
        ("yesterday,1,2", "Invalid isoformat string: 'yesterday'"),
        ("2023-11-16 18:17:05,many,2", "invalid literal for int"),
        ("2023-11-16 18:17:05,1.5,2", "invalid literal for int"),
        ("2023-11-16 18:17:05,-1,2", "ContextTokens must be an integer of at least 0, got -1"),
        ("2023-11-16 18:17:05,1,-2", "GeneratedTokens must be an integer of at least 0, got -2"),
        ("2023-11-16 18:17:04,1,2", "it is earlier than the line before"),
        ("\xff", "'utf-8' codec can't decode"),
    )
    def test_a_malformed_azure_line_names_file_and_line(self, line, message):
        with self.assertRaisesRegex(ValueError, f"^t.csv, line 4: {message}"):
            read([*AZURE[:3], line.encode("latin-1")])

    @parameterized.parameters(
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object but list"),
        ('{"input_length": 1, "output_length": 1}', "timestamp must be a number of milliseconds, got None"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}', "timestamp must be a number"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "timestamp must be a number"),
        (f'{{"timestamp": 1{"0" * 400}, "input_length": 1, "output_length": 1}}', "int too large"),
        ('{"timestamp": 3, "output_length": 1}', "input_length must be an integer of at least 0, got None"),
        ('{"timestamp": 3, "input_length": 1, "output_length": 1.0}', "output_length must be an integer"),
        ('{"timestamp": 3, "input_length": 1, "output_length": true}', "output_length must be an integer"),
        ('{"timestamp": 3, "input_length": 1, "output_length": 1, "hash_ids": 3}', "hash_ids must be a list, got 3"),
        ('{"timestamp": 3, "input_length": 1, "output_length": 1, "hash_ids": ["3"]}', "hash_ids must be an integer"),
        ('{"timestamp": 3, "input_length": 1, "output_length": 1, "hash_ids": [-3]}', "hash_ids must be an integer"),
        (
            '{"timestamp": 3, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2, 3]}',
            "3 hash_ids for 1024 tokens in blocks of 512",
        ),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "it is earlier than the line before"),
    )
    def test_a_malformed_mooncake_line_names_file_and_line(self, line, message):
        with self.assertRaisesRegex(ValueError, f"^t.jsonl, line 4: {message}"):
            read([*MOONCAKE[:3], line.encode()], JSONL)

    def test_a_header_without_the_columns_is_refused(self):
        with self.assertRaisesRegex(
            ValueError, "^t.csv, line 1: the first line must name .*; ContextTokens is missing"
        ):
            read([b"TIMESTAMP,GeneratedTokens\n"])
        with self.assertRaisesRegex(ValueError, "^t.txt, line 1: neither the columns of an Azure trace nor"):
            read([b"time,prompt,answer\n"], pathlib.Path("t.txt"))


class FitTest(parameterized.TestCase):
    def test_lengths_are_multiplied_rounded_and_at_least_1(self):
        rows = [row(1000, output_tokens=26), row(3, output_tokens=0)]
        fitted = traces.fit(rows, 0.1, max_model_len=1000)
        self.assertEqual([(one.prompt_tokens, one.output_tokens) for one in fitted.rows], [(100, 3), (1, 1)])
        self.assertEqual(fitted.block_tokens, 51)
        self.assertEqual((fitted.clipped_prompts, fitted.clipped_outputs), (0, 0))
        self.assertEqual(traces.fit(rows, 1e-6, max_model_len=1000).block_tokens, 1)

    def test_what_does_not_fit_is_cut_from_the_prompt_first_and_counted(self):
        rows = [row(60, output_tokens=4), row(61, output_tokens=4), row(5, output_tokens=99), row(1, output_tokens=63)]
        fitted = traces.fit(rows, 1.0, max_model_len=64)
        got = [(one.prompt_tokens, one.output_tokens) for one in fitted.rows]
        self.assertEqual(got, [(60, 4), (60, 4), (1, 63), (1, 63)])
        self.assertEqual((fitted.clipped_prompts, fitted.clipped_outputs), (2, 1))

    @parameterized.parameters({"time": 0.0}, {"length": -1.0}, {"time": float("inf")}, {"length": float("nan")})
    def test_factors_must_be_positive_and_finite(self, **factors):
        with self.assertRaisesRegex(ValueError, f"{next(iter(factors))}_scale must be positive and finite"):
            TraceScale(**factors)


class PromptTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
    @hypothesis.given(
        st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=2, max_size=2),
        st.lists(st.integers(1, 200), min_size=2, max_size=2),
        st.integers(16, 40),
        st.integers(0, 3),
    )
    def test_prompts_share_exactly_what_their_hash_ids_share(self, ids, lengths, block, seed):
        hypothesis.assume(all(len(own) * block < length + block for own, length in zip(ids, lengths, strict=True)))
        one, other = (
            traces.prompt_of(row(length, own, line=line), block, VOCABULARY, seed)
            for line, (own, length) in enumerate(zip(ids, lengths, strict=True), start=2)
        )
        leading = next((k for k, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        want = min(leading * block, *lengths)
        # A token after what is shared may be the same by chance, one in 4,000.
        self.assertBetween(shared(one, other), want, want + 2)
        self.assertEqual([len(one), len(other)], lengths)
        self.assertContainsSubset({*one, *other}, VOCABULARY.tolist())

    def test_a_block_is_made_from_seed_and_hash_id_alone(self):
        long, short = row(40, (7, 8, 9), line=2), row(25, (8, 7), line=90)
        a = traces.prompt_of(long, 10, VOCABULARY, 3)
        b = traces.prompt_of(short, 10, VOCABULARY, 3)
        self.assertEqual((a[:10], a[10:20]), (b[10:20], b[:10]), "wherever a block stands")
        self.assertNotEqual(a[:10], traces.prompt_of(long, 10, VOCABULARY, 4)[:10])

    def test_the_rest_of_a_prompt_is_its_own(self):
        one, other = (traces.prompt_of(row(40, (7, 8), line=line), 10, VOCABULARY, 3) for line in (2, 3))
        self.assertEqual(one[:20], other[:20])
        self.assertFalse(set(one[20:]) & set(other[20:]))

    def test_prompts_without_hash_ids_share_nothing(self):
        one, other = (traces.prompt_of(row(30, line=line), 10, VOCABULARY, 0) for line in (2, 3))
        self.assertFalse(set(one) & set(other))

    def test_a_hash_id_and_a_line_of_the_same_number_have_tokens_of_their_own(self):
        block = traces.prompt_of(row(10, (7,), line=1), 10, VOCABULARY, 0)
        self.assertNotEqual(block, traces.prompt_of(row(10, line=7), 10, VOCABULARY, 0))

    def test_a_prompt_that_was_cut_still_begins_as_the_others_do(self):
        whole, cut = (traces.prompt_of(row(length, (1, 2, 3)), 10, VOCABULARY, 0) for length in (30, 13))
        self.assertEqual(cut, whole[:13])

    def test_the_same_arguments_give_the_same_tokens(self):
        again = [traces.prompt_of(row(50, (1, 2)), 10, VOCABULARY, 0) for _ in range(2)]
        self.assertEqual(*again)
        self.assertTrue(all(type(token) is int for token in again[0]))
