"""The page of a report: what it is made of, that it needs nothing else, and every bar on bad input."""

import contextlib
import html.parser
import io
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator
from unittest import mock

from absl import flags
from absl.testing import parameterized

from experiments import common, report, report_data, report_draw
from tests.experiments.report_workdir import CONFIG, Plot, rewrite, write_workdir

TITLES = (
    "Headline numbers",
    "Is the output exact?",
    "Latency",
    "Throughput against latency",
    "Attainment of the objective",
    "Depth over time",
    "Acceptance",
    "Arms by depth",
    "Routing",
    "Signals of the lanes",
    "Backlogs",
    "Hand-off from prefill to decode",
    "Configuration and machine",
)
HOSTILE = "</style><script>alert('x')</script> & \"quoted\" \ud800"


class _Page(html.parser.HTMLParser):
    """Takes a page apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} is closed out of turn"

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for name, value in attributes.items() if name in names]


def _figures(text: str) -> Iterator[tuple[str, str]]:
    """Give the title and the whole of each chart."""
    for figure in re.findall(r"<figure>.*?</figure>", text, re.DOTALL):
        yield re.search(r"<h3>(.*?)</h3>", figure)[1], figure


def _run(*paths: pathlib.Path, output: pathlib.Path | None = None) -> tuple[int, str, str]:
    """Report; gives the exit code and what was printed to each stream."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = report.report(paths, output)
    return code, out.getvalue(), err.getvalue()


class PageTest(parameterized.TestCase):
    """The page of one run with every file, rendered once."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        config = CONFIG | {"model": {"model": HOSTILE}}
        cls.workdir = write_workdir(cls.folder / "a<b>&", config=config)
        assert _run(cls.workdir)[0] == common.EXIT_OK
        cls.text = (cls.workdir / "report.html").read_text(encoding="utf-8")

    def test_a_run_with_every_file_shows_every_section_and_chart(self):
        heads = re.findall(r"<h2>(.*?)</h2>", self.text)
        self.assertEqual(heads, list(TITLES))
        self.assertLen([title for title, _ in _figures(self.text)], 27)
        self.assertNotIn("absent", self.text)

    def test_the_page_needs_nothing_else(self):
        page = _Page(self.text)
        self.assertEmpty(page.open, "every element is closed")
        self.assertNoCommonElements(
            {tag for tag, _ in page.tags}, {"script", "link", "img", "iframe", "object", "image"}
        )
        self.assertLen([tag for tag, _ in page.tags if tag == "style"], 1)
        self.assertEmpty(page.values("src", "onload", "onclick", "xlink:href", "srcset"))
        self.assertTrue(all(link.startswith("#") for link in page.values("href")))
        self.assertNoCommonElements(
            set(re.findall(r"@import|https?:|//[a-z]", self.text)), {"@import", "http:", "https:"}
        )
        self.assertTrue(all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", self.text)))

    def test_names_inside_are_unique_and_every_reference_has_its_target(self):
        page = _Page(self.text)
        names = page.values("id")
        self.assertLen(set(names), len(names))
        used = [link[1:] for link in page.values("href")] + re.findall(r"url\(#([^)]*)\)", self.text)
        self.assertContainsSubset(set(used), set(names))
        self.assertGreater(len(used), 100)

    def test_every_chart_has_a_title_units_on_its_axes_and_a_caption_with_n(self):
        for title, figure in _figures(self.text):
            with self.subTest(title):
                labels = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", figure) if text.endswith(")")]
                self.assertLen(labels, 3 if "load" in title else 2)
                self.assertTrue(all(re.search(r"\S \([^()]+\)$", label) for label in labels), labels)
                self.assertRegex(
                    figure, r"<p>[A-Z][^<]*, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}\d+[^<]*\.</p></figure>$"
                )
                self.assertIn(f'aria-label="{title}"', figure)

    def test_a_legend_is_there_where_more_than_one_thing_is_drawn(self):
        legends = {title: re.findall(r"</svg>([^<]*)</li>", figure) for title, figure in _figures(self.text)}
        self.assertEqual(legends["Depth and load of lane 0"], ["held slots (right)", "depth (left)"])
        self.assertEqual(legends["Time to first token (TTFT)"], ["TTFT", "objective 250 ms"])
        self.assertEqual(legends["Running requests of each lane"], ["lane 0", "lane 1"])
        self.assertEqual(legends["End-to-end latency (E2EL)"], [])

    def test_colours_follow_the_page_in_light_and_dark(self):
        self.assertIn("prefers-color-scheme: dark", self.text)
        defined = set(re.findall(r"(--[a-z0-9]+):", self.text))
        self.assertContainsSubset(set(re.findall(r"var\((--[a-z0-9]+)\)", self.text)), defined)
        charts = "".join(figure for _, figure in _figures(self.text))
        self.assertEmpty(re.findall(r"#[0-9a-f]{6}", charts), "a chart has a colour of its own")
        self.assertContainsSubset({"var(--c0)", "var(--ink)", "var(--line)"}, set(re.findall(r"var\([^)]*\)", charts)))

    def test_whatever_comes_from_files_is_escaped(self):
        self.assertIn("StreamServe: a&lt;b&gt;&amp;", self.text)
        self.assertIn(
            "&lt;/style&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quoted&quot; ?", self.text
        )

    def test_versions_commit_and_settings_are_shown(self):
        for field, value in (("versions.jax", "0.10"), ("git.commit", "abc"), ("routing.policy", "round_robin")):
            self.assertRegex(self.text, f'<td data-label="field">{field}</td><td data-label="value">{value}</td>')

    def test_the_same_files_give_the_same_bytes(self):
        code, out, _ = _run(self.workdir, output=self.folder / "again.html")
        self.assertEqual((code, out), (common.EXIT_OK, f"{self.folder / 'again.html'}\n"))
        self.assertEqual((self.folder / "again.html").read_text(encoding="utf-8"), self.text)


class InputTest(parameterized.TestCase):
    """Files that are absent, damaged, or several."""

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(
            mock.patch.object(report_draw, "draw", return_value="<svg></svg>")
        )  # it takes most of the time

    @parameterized.parameters(
        ("requests.jsonl", "requests.jsonl is absent", 4),
        ("decisions.jsonl", "decisions.jsonl is absent", 2),
        ("routes.jsonl", "routes.jsonl is absent", 3),
        ("config.json", "config.json is absent", 1),
        ("env.json", "env.json is absent", 1),
    )
    def test_a_section_without_its_file_says_so_and_stays(self, name, message, count):
        workdir = write_workdir(self.folder / "run", without=(name,))
        self.assertEqual(_run(workdir)[0], common.EXIT_OK)
        text = (workdir / "report.html").read_text(encoding="utf-8")
        self.assertEqual(re.findall(r"<h2>(.*?)</h2>", text), list(TITLES))
        self.assertEqual(text.count(message), count - (name == "requests.jsonl"))

    def test_results_alone_make_a_report(self):
        (self.folder / "results.json").write_text("{}")
        self.assertEqual(_run(self.folder)[0], common.EXIT_OK)
        text = (self.folder / "report.html").read_text(encoding="utf-8")
        self.assertEqual(re.findall(r"<h2>(.*?)</h2>", text), list(TITLES))

    @parameterized.parameters(
        ("results.json", "{", "results.json"),
        ("results.json", "[1]", "not an object"),
        ("results.json", '{"duration": NaN}', "NaN is not a number"),
        ("config.json", "\udcff", "config.json"),
        ("env.json", "", "env.json"),
        ("requests.jsonl", '{"id": 0}\n{"id', "requests.jsonl', line 2"),
        ("requests.jsonl", '{"ttft_ms": "fast"}\n', "line 1: field 'ttft_ms' is 'fast'"),
        ("requests.jsonl", '{"ttft_ms": 1e999}\n', "field 'ttft_ms' is 'inf'"),
        ("requests.jsonl", '{"itls_ms": [1, "x"]}\n', "field 'itls_ms'"),
        ("requests.jsonl", '{"lanes": 3}\n', "field 'lanes'"),
        ("requests.jsonl", '{"met": {"ttft": 1}}\n', "field 'met'"),
        ("routes.jsonl", "", "the file is empty"),
        ("decisions.jsonl", '{"format": 1, "header": {}}\n{"lane": 0}\n', "/run/decisions.jsonl': line 2: KeyError"),
        ("decisions.jsonl", "[" * 100_000, "decisions.jsonl"),
    )
    def test_a_damaged_file_ends_with_one_line_that_names_it(self, name, text, message):
        workdir = write_workdir(self.folder / "run")
        (workdir / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        code, out, err = _run(workdir)
        self.assertEqual((code, out), (common.EXIT_UNUSABLE, ""))
        self.assertRegex(err, rf"^error: [^\n]*{re.escape(message)}[^\n]*\n$")
        self.assertFalse((workdir / "report.html").exists())

    @parameterized.parameters(
        ({"duration": "long"}, "run, results.json: 'duration' must be a number, got 'long'"),
        ({"slo_ttft_ms": []}, "'slo_ttft_ms' must be a number"),
        ({"spec_decode_per_position_acceptance_rates": [0.5, None]}, "must be a list of numbers"),
    )
    def test_a_result_of_the_wrong_type_is_named(self, results, message):
        workdir = write_workdir(self.folder / "run", results=results, without=("decisions.jsonl",))
        code, _, err = _run(workdir)
        self.assertEqual(code, common.EXIT_UNUSABLE)
        self.assertIn(message, err)

    @parameterized.parameters(
        ("route", {"arm": 2}),
        ("route", {"arm": "0"}),
        ("context", {"running_A": [0.0]}),
        ("context", {"queue": "many"}),
        ("context", {"objective": {"ttft_s": 0, "tpot_s": 1}}),
        ("outcome", {"ttft_s": None}),
        (None, {"chosen_s": "now"}),
    )
    def test_a_route_that_its_reader_lets_pass_but_nobody_can_draw_is_refused(self, part, fields):
        workdir = write_workdir(self.folder / "run")
        self._change_second_line(workdir / "routes.jsonl", part, fields)
        code, _, err = _run(workdir)
        self.assertEqual(code, common.EXIT_UNUSABLE)
        self.assertIn("routes.jsonl': step 0: a field is no number, or not of 2 lanes", err)

    @parameterized.parameters(
        ("stats", {"accepted_BR": ["<i8", [[9], [-1], [-1], [-1]]]}),
        ("stats", {"accepted_BR": ["<i8", [[0]]]}),
        ("plan", {"depth_B": ["<i4", [1]]}),
    )
    def test_a_decision_whose_arrays_do_not_fit_is_refused(self, part, fields):
        workdir = write_workdir(self.folder / "run")
        self._change_second_line(workdir / "decisions.jsonl", part, fields)
        code, _, err = _run(workdir)
        self.assertEqual(code, common.EXIT_UNUSABLE)
        self.assertIn("decisions.jsonl': lane 0 step 0: its arrays do not fit together", err)

    def _change_second_line(self, path: pathlib.Path, part: str | None, fields: dict) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[1])
        (record if part is None else record[part]).update(fields)
        path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n", encoding="utf-8")

    def test_a_folder_stands_for_its_workdirs_in_the_order_of_numbers(self):
        for name in ("rate-10", "rate-2", "other"):
            write_workdir(self.folder / name)
        (self.folder / "no run").mkdir()
        found = report_data.find_workdirs([self.folder, self.folder / "rate-2"])
        self.assertEqual([path.name for path in found], ["other", "rate-2", "rate-10"])

    def test_runs_of_the_same_name_are_told_apart(self):
        found = [write_workdir(self.folder / parent / "run") for parent in ("a", "b")]
        self.assertEqual([run.name for run in report_data.read_runs(found)], ["a/run", "b/run"])

    def test_several_runs_are_compared_first_and_then_folded(self):
        for rate in (10.0, 20.0):
            write_workdir(self.folder / f"rate-{rate:.0f}", Plot(rate=rate))
        code, out, _ = _run(self.folder)
        self.assertEqual((code, out), (common.EXIT_OK, f"{self.folder / 'report.html'}\n"))
        text = (self.folder / "report.html").read_text(encoding="utf-8")
        compared = ["The runs compared", "Throughput against latency", "Latencies of the runs"]
        self.assertEqual(re.findall(r"<h2>(.*?)</h2>", text), [*compared, *TITLES, *TITLES])
        self.assertEqual(re.findall(r"<summary>(.*?)</summary>", text), ["rate-10", "rate-20"])
        self.assertEmpty(_Page(text).open)

    def test_what_is_no_workdir_is_refused(self):
        for path in (self.folder, self.folder / "missing"):
            code, _, err = _run(path)
            self.assertEqual(code, common.EXIT_UNUSABLE)
            self.assertRegex(err, r"^error: '[^\n]*' is no workdir of a run that has ended: no results.json[^\n]*\n$")

    def test_several_workdirs_need_an_output(self):
        workdirs = [write_workdir(self.folder / name) for name in "ab"]
        self.assertEqual(
            _run(*workdirs), (common.EXIT_UNUSABLE, "", "error: --output is needed with several --workdir\n")
        )

    def test_an_output_that_cannot_be_written_is_named(self):
        workdir = write_workdir(self.folder / "run")
        code, _, err = _run(workdir, output=self.folder / "missing" / "page.html")
        self.assertEqual(code, common.EXIT_UNUSABLE)
        self.assertRegex(err, r"^error: cannot write '[^\n]*page.html': No such file or directory\n$")

    def test_without_matplotlib_one_line_says_what_to_install(self):
        workdir = write_workdir(self.folder / "run")
        with mock.patch.object(report_draw, "mpl", None):
            code, _, err = _run(workdir)
        self.assertEqual(code, common.EXIT_UNUSABLE)
        self.assertRegex(err, r"^error: a report needs matplotlib: [^\n]*pip install -e '\.\[plots\]'\n$")

    @parameterized.parameters(
        (["--workdir=a", "--wokdir=b"], "Unknown command line flag 'wokdir'"),
        (["--output=b"], "--workdir"),
        (["--workdir=a", "b"], "unexpected argument 'b'"),
    )
    def test_wrong_flags_end_with_one_line_and_code_2(self, arguments, message):
        values, err = flags.FlagValues(), io.StringIO()
        report.define_flags(values)
        with contextlib.redirect_stderr(err), self.assertRaises(SystemExit) as ended:
            report.parse_flags(["report", *arguments], values)
        self.assertEqual(ended.exception.code, common.EXIT_UNUSABLE)
        self.assertRegex(err.getvalue(), rf"^error: [^\n]*{message}[^\n]*\n$")

    def test_a_changed_line_reaches_the_page(self):
        workdir = write_workdir(self.folder / "run")
        rewrite(workdir / "env.json", python="9.9")
        _run(workdir)
        self.assertIn(">9.9<", (workdir / "report.html").read_text(encoding="utf-8"))
