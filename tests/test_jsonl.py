"""Files hold complete lines only, in input order, whatever goes wrong."""

import contextlib
import errno
import itertools
import json
import pathlib

import pytest

from streamserve.jsonl import JsonLinesFile, OrderedWriter


def lines_of(path):
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


class _Disk:
    """An open file on a disk that has room for some more bytes, or an interrupt in place of the error."""

    def __init__(self, file, room, error):
        self._file, self._room, self._error = file, room, error

    def write(self, data):
        if not self._room:
            raise self._error
        written = self._file.write(data[: self._room])
        self._room -= written
        return written

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_answers_come_in_input_order_as_soon_as_all_earlier_ones_have(tmp_path, order):
    path = tmp_path / "out.jsonl"
    writer = OrderedWriter(JsonLinesFile(path))
    done = set()
    for index in order:
        writer.put(index, {"i": index})
        done.add(index)
        ready = next(count for count in range(5) if count not in done)
        assert lines_of(path) == [{"i": i} for i in range(ready)]
        assert writer.num_waiting == len(done) - ready
    writer.close()
    assert lines_of(path) == [{"i": i} for i in range(4)]


def test_closing_early_writes_what_was_held_back_in_order(tmp_path):
    writer = OrderedWriter(JsonLinesFile(tmp_path / "out.jsonl"))
    for index in (0, 4, 2):
        writer.put(index, {"i": index})
    writer.close()
    assert lines_of(tmp_path / "out.jsonl") == [{"i": 0}, {"i": 2}, {"i": 4}]


def test_an_answer_is_taken_once(tmp_path):
    writer = OrderedWriter(JsonLinesFile(tmp_path / "out.jsonl"))
    writer.put(0, {})
    writer.put(2, {})
    for index in (0, 2):
        with pytest.raises(AssertionError, match="twice"):
            writer.put(index, {})
    writer.close()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_line_that_does_not_fit_is_taken_back(tmp_path, error, room):
    path = tmp_path / "out.jsonl"
    file = JsonLinesFile(path)
    file.write({"a": 1})
    whole, file._file = file._file, _Disk(file._file, room, error)
    with pytest.raises(type(error)):
        file.write({"a": 2})
    assert lines_of(path) == [{"a": 1}]
    file._file = whole  # room again
    file.write({"a": 3})
    assert lines_of(path) == [{"a": 1}, {"a": 3}]
    file.close()


def test_an_interrupted_answer_is_written_once_when_the_writer_closes(tmp_path):
    path = tmp_path / "out.jsonl"
    file = JsonLinesFile(path)
    writer = OrderedWriter(file)
    whole, file._file = file._file, _Disk(file._file, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        writer.put(0, {"a": 1})
    file._file = whole
    writer.close()
    assert lines_of(path) == [{"a": 1}]


def test_an_answer_whose_write_was_complete_when_the_interrupt_came_is_not_written_again(tmp_path):
    class InterruptedAfterwards(JsonLinesFile):
        def write(self, value):
            super().write(value)
            if value == {"a": 1} and self.num_lines == 1:
                raise KeyboardInterrupt

    path = tmp_path / "out.jsonl"
    writer = OrderedWriter(InterruptedAfterwards(path))
    with pytest.raises(KeyboardInterrupt):
        writer.put(0, {"a": 1})
    writer.close()
    assert lines_of(path) == [{"a": 1}]


def test_a_full_device_is_an_error():
    file = JsonLinesFile(pathlib.Path("/dev/full"))
    with contextlib.closing(file), pytest.raises(OSError, match="No space left"):
        file.write({})


def test_text_is_written_as_it_is_and_half_a_surrogate_pair_escaped(tmp_path):
    file = JsonLinesFile(tmp_path / "out.jsonl")
    file.write({"a": "é\n😀"})
    file.write({"a": "\ud800"})
    file.close()
    assert "é\\n😀" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert lines_of(tmp_path / "out.jsonl") == [{"a": "é\n😀"}, {"a": "\ud800"}]


def test_opening_replaces_an_older_file(tmp_path):
    (tmp_path / "out.jsonl").write_text("old\n")
    JsonLinesFile(tmp_path / "out.jsonl").close()
    assert (tmp_path / "out.jsonl").read_text() == ""
