"""The main command with a fake engine: every bar on bad input, interrupts and unusable files."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from experiments import common, generate
from streamserve.tokenizer import load_tokenizer
from tests import fakes

ROOT = pathlib.Path(generate.__file__).parent.parent
CONFIG = {"topology": {"num_pairs": 1}, "sampling": {"max_tokens": 8, "temperature": 0.0}}
GOOD = [{"id": f"r{number}", "prompt": f"prompt {number}"} for number in range(5)]


def write_lines(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def read_lines(path):
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def start(tmp_path):
    """Run the command on lines with a fake engine; returns exit code and options."""

    def run(lines, *, engine=None, config=None, make_engine=None, **paths):
        engine = engine or fakes.FakeEngine()
        options = generate.Options(
            **{
                "config": CONFIG if config is None else config,
                "input": write_lines(tmp_path / "in.jsonl", lines),
                "output": tmp_path / "out.jsonl",
                "workdir": tmp_path / "work",
                "command": ("generate", "--flag"),
                **paths,
            }
        )
        return generate.run(options, make_engine or (lambda config, **_: engine)), options

    return run


def test_every_line_is_answered_once_and_in_order(start, capsys):
    code, options = start(GOOD)
    lines = read_lines(options.output)
    assert code == 0
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3", "r4"]
    assert [line["outputs"][0]["text"] for line in lines] == [f"{number} tpmorp" for number in range(5)]
    shown = capsys.readouterr()
    assert "Successful requests:" in shown.out
    assert "tok/s" in shown.err
    assert "5/5" in shown.err


def test_the_record_of_an_earlier_run_is_removed(start, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for name in ("decisions.jsonl", "routes.jsonl", "trace.json", "notes.txt"):
        (work / name).write_text("of an earlier run")
    code, _ = start(GOOD)
    assert code == 0
    assert {path.name for path in work.iterdir()} == {
        *("config.json", "env.json", "requests.jsonl", "results.json", "notes.txt")
    }


@pytest.mark.parametrize(("pairs", "names"), [(1, set()), (2, {"routes"})])
def test_routes_are_logged_where_there_is_a_choice(start, pairs, names):
    given = {}

    def make(config, **paths):
        given.update(paths)
        return fakes.FakeEngine()

    assert start(GOOD, config=CONFIG | {"topology": {"num_pairs": pairs}}, make_engine=make)[0] == 0
    assert {name for name in ("decisions", "routes") if given[name] is not None} == names


def test_the_live_view_takes_the_place_of_the_bar_and_changes_no_answer(start, capsys):
    code, options = start(GOOD, live=True)
    assert code == 0
    assert [line["id"] for line in read_lines(options.output)] == ["r0", "r1", "r2", "r3", "r4"]
    assert "tok/s" not in capsys.readouterr().err


def test_the_workdir_records_the_run(start):
    _, options = start(GOOD)
    assert json.loads((options.workdir / "config.json").read_text()) == CONFIG
    environment = json.loads((options.workdir / "env.json").read_text())
    assert environment["versions"]["jax"]
    assert environment["devices"]
    assert environment["command"] == "generate --flag"
    assert environment["share_devices"] is False
    assert environment["git"] is None or len(environment["git"]["commit"]) == 40
    requests = read_lines(options.workdir / "requests.jsonl")
    assert sorted(request["id"] for request in requests) == ["r0", "r1", "r2", "r3", "r4"]
    assert {"line", "ttft_ms", "num_output_tokens", "finish_reasons", "error"} <= requests[0].keys()
    results = json.loads((options.workdir / "results.json").read_text())
    assert (results["completed"], results["failed"], results["kv_transfer_bytes"]) == (5, 0, 50)
    assert "interrupted" not in results


def test_sampling_defaults_reach_the_requests(start):
    engine = fakes.FakeEngine()
    start([*GOOD[:1], {"prompt": "a", "max_tokens": 3}], engine=engine)
    assert [(prompt.params.max_tokens, prompt.params.temperature) for prompt in engine.seen] == [(8, 0.0), (3, 0.0)]


def test_input_is_pulled_with_the_engine_and_not_ahead_of_it(start):
    _, options = start([*GOOD[:4], {"id": "bad"}, *GOOD[4:]])
    requests = read_lines(options.workdir / "requests.jsonl")
    assert [request["id"] for request in requests] == ["r1", "r0", "r3", "r2", "bad", "r4"], (
        "a bad line is answered when it is read, which must be after the engine has taken what comes before it"
    )


def test_bad_lines_become_error_lines_and_the_rest_runs(start, capsys):
    lines = [
        GOOD[0],
        b"{broken\n",
        b"\n",
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": "too long for this model"},
        {"id": "field", "prompt": "a", "max_tokes": 1},
        {"id": "range", "prompt": "a", "top_p": 7},
        {"id": "r0", "prompt": "again"},
        GOOD[1],
    ]
    code, options = start(lines)
    out = read_lines(options.output)
    assert code == 1
    assert [line["id"] for line in out] == ["r0", "line-2", "empty", "long", "field", "range", "r0", "r1"]
    assert ["error" in line for line in out] == [False, True, True, True, True, True, True, False]
    assert [line["error"]["line"] for line in out if "error" in line] == [2, 4, 5, 6, 7, 8]
    assert "takes at most 63" in out[3]["error"]["message"]
    assert "did you mean max_tokens" in out[4]["error"]["message"]
    assert "top_p must be in" in out[5]["error"]["message"]
    assert "duplicate id 'r0': line 1" in out[6]["error"]["message"]
    shown = capsys.readouterr().err
    assert "6 of 8 lines failed:" in shown
    assert "line 2: not valid JSON" in shown
    assert "and 1 more" in shown
    results = json.loads((options.workdir / "results.json").read_text())
    assert (results["completed"], results["failed"]) == (2, 6)
    assert len(read_lines(options.workdir / "requests.jsonl")) == 8


def test_openai_lines_are_answered_in_their_form(start, tmp_path):
    tokenizer = load_tokenizer(fakes.save_tokenizer(tmp_path / "tok", chat_template=fakes.CHAT_TEMPLATE))
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc"}},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}},
    ]
    engine = fakes.FakeEngine(tokenizer=tokenizer)
    code, options = start(lines, engine=engine)
    out = read_lines(options.output)
    assert code == 1
    assert out[0]["response"]["body"]["choices"][0]["text"] == "cba"
    assert out[1]["response"]["body"]["object"] == "chat.completion"
    assert tokenizer.decode(engine.seen[1].token_ids, False) == "<user>hello<eos><assistant>"
    assert (out[2]["custom_id"], out[2]["error"]["code"]) == ("c", "invalid_request")


def test_ctrl_c_leaves_complete_lines_and_a_marked_summary(start):
    code, options = start(GOOD, engine=fakes.FakeEngine(raise_after=3))
    assert code == 130
    assert [line["id"] for line in read_lines(options.output)] == ["r0", "r1", "r3"], "r3 had finished before r2"
    assert len(read_lines(options.workdir / "requests.jsonl")) == 3
    results = json.loads((options.workdir / "results.json").read_text())
    assert (results["completed"], results["interrupted"]) == (3, True)


def test_ctrl_c_while_the_model_loads_leaves_an_older_output_alone(start, tmp_path):
    (tmp_path / "out.jsonl").write_text("older\n")

    def interrupt(config, **_):
        raise KeyboardInterrupt

    assert start(GOOD, make_engine=interrupt)[0] == 130
    assert (tmp_path / "out.jsonl").read_text() == "older\n"


def test_a_failing_engine_keeps_what_was_answered(start, tmp_path):
    with pytest.raises(RuntimeError):
        start(GOOD, engine=fakes.FakeEngine(raise_after=3, exception=RuntimeError))
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == ["r0", "r1", "r3"]


def test_a_full_disk_does_not_hide_why_the_engine_failed(start):
    with pytest.raises(RuntimeError):
        start(
            GOOD,
            output=pathlib.Path("/dev/full"),
            engine=fakes.FakeEngine(raise_after=1, exception=RuntimeError),
        )


@pytest.mark.parametrize("error", [FileNotFoundError("model folder 'x' does not exist"), ValueError("vocabularies")])
def test_a_model_that_cannot_be_loaded_is_one_line_and_code_2(start, tmp_path, capsys, error):
    (tmp_path / "out.jsonl").write_text("older\n")

    def fail(config, **_):
        raise error

    assert start(GOOD, make_engine=fail)[0] == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    assert (tmp_path / "out.jsonl").read_text() == "older\n"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modle": {}}, "config has no field 'modle'; did you mean model?"),
        ({"model": {"dtyp": "float32"}}, "config has no field 'model.dtyp'; did you mean dtype?"),
        ({"model": {"dtype": "int3"}}, "model.dtype must be one of"),
        ({"sampling": {"temprature": 0}}, "config field 'sampling': unknown field 'temprature'"),
        ({"sampling": {"top_p": 0}}, "config field 'sampling': top_p must be in"),
        ({"sampling": 3}, "config field 'sampling' must be a mapping"),
    ],
)
def test_a_wrong_config_is_one_line_and_code_2(start, capsys, config, message):
    def never(config, **_):
        raise AssertionError("the engine must not be built")

    assert start(GOOD, config=config, make_engine=never)[0] == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_an_unreadable_input_is_code_2(start, tmp_path, capsys):
    for path, reason in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        assert start(GOOD, input=path)[0] == 2
        assert f"cannot read the input '{path}': {reason}" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_code_2_before_the_model_loads(start, tmp_path, capsys):
    def never(config, **_):
        raise AssertionError("the engine must not be built")

    for path, reason in ((tmp_path / "no" / "out.jsonl", "there is no folder"), (tmp_path, "it is a folder")):
        assert start(GOOD, output=path, make_engine=never)[0] == 2
        assert reason in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert start(GOOD, workdir=tmp_path / "file", make_engine=never)[0] == 2
    assert f"cannot write '{tmp_path / 'file'}'" in capsys.readouterr().err


def test_the_input_is_never_overwritten(start, tmp_path, capsys):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    os.link(write_lines(tmp_path / "in.jsonl", GOOD), tmp_path / "hard.jsonl")
    (tmp_path / "work").mkdir()
    for name in ("in.jsonl", "link.jsonl", "hard.jsonl"):
        assert start(GOOD, output=tmp_path / name)[0] == 2
        assert "would be overwritten" in capsys.readouterr().err
    assert read_lines(tmp_path / "in.jsonl") == GOOD
    assert start(GOOD, input=write_lines(tmp_path / "work" / "requests.jsonl", GOOD))[0] == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert start(GOOD, output=tmp_path / "work" / "requests.jsonl")[0] == 2
    assert "is a file that the workdir's record needs" in capsys.readouterr().err


def test_a_full_disk_is_code_2_and_one_line(start, capsys):
    assert start(GOOD, output=pathlib.Path("/dev/full"))[0] == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == "error: cannot write '/dev/full': No space left on device"


def run_script(*arguments, name="generate"):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.dtyp=x", "config has no field 'model.dtyp'"),
        ("--config.nothing=x", "config has no field 'nothing'"),
        ("--config.seed=x", "flag --config.seed=x: invalid literal"),
        ("--config=nowhere.py", "cannot load the config: "),
        ("--inptu=x", "Unknown command line flag 'inptu'"),
        ("in.jsonl", "unexpected argument 'in.jsonl'"),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(capsys, argument, message):
    with pytest.raises(SystemExit) as stopped:
        common.parse_flags(["generate", argument], default_config=generate.DEFAULT_CONFIG, values=flags.FlagValues())
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_overrides_reach_the_config():
    values = flags.FlagValues()
    arguments = ["generate", "--config.seed=3", "--config.model.tokenizer=folder", "--config.sampling.max_tokens=5"]
    common.parse_flags(arguments, default_config=generate.DEFAULT_CONFIG, values=values)
    config, sampling = common.split_config(values.config.to_dict())
    assert (config.seed, config.model.tokenizer, sampling["max_tokens"]) == (3, "folder", 5)


@pytest.mark.parametrize("name", ["serve_trace", "reproduce_paper", "compare_depth"])
def test_help_lists_flags_that_a_module_of_their_own_defines(name):
    assert re.search(r"^  --num_prompts: First lines", run_script("--help", name=name).stdout, re.MULTILINE)


def test_the_script_itself_ends_with_one_line_and_code_2():
    done = run_script("--config.model.dtyp=x")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: config has no field 'model.dtyp'")
    assert "Traceback" not in done.stderr
