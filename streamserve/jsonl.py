"""Writing JSON lines so that a file holds complete lines only, and answers in the order of their questions."""

import json
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any


class JsonLinesFile:
    """A file of JSON lines. Each line goes out in one write; one that does not fit is taken back.

    So what an interrupted run or a full disk leaves behind holds complete lines.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Create the file, or empty it.

        Raises:
          OSError: it cannot be written.
        """
        self.path = pathlib.Path(path)
        self._file = self.path.open("wb", buffering=0)
        self._complete = (0, 0)  # lines and bytes; one value, so that an interrupt never sees half of a change

    @property
    def num_lines(self) -> int:
        """Lines written."""
        return self._complete[0]

    def write(self, value: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
          OSError: the disk is full, or the file cannot be written any more; the line is not in the file then.
        """
        line = memoryview(_encoded(value))
        num_lines, num_bytes = self._complete
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
            self._complete = (num_lines + 1, num_bytes + len(line))
        except BaseException:  # an interrupt may come in the middle of a line, too
            self._cut()
            raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def _cut(self) -> None:
        """Cut what is beyond the complete lines. A pipe or a device cannot be cut, and keeps what it got."""
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.truncate(self._complete[1])
            self._file.seek(self._complete[1])


class OrderedWriter:
    """Writes answers in input order as soon as all earlier ones are written.

    It holds back what finished before an earlier line did, which is bounded by what the engine runs meanwhile. The next
    index is the file's count of lines, so an interrupt between any two statements neither drops nor doubles an answer.
    """

    def __init__(self, file: JsonLinesFile):
        self._file = file
        self._waiting: dict[int, Mapping[str, Any]] = {}

    @property
    def num_waiting(self) -> int:
        """Answers held back."""
        return len(self._waiting)

    def put(self, index: int, answer: Mapping[str, Any]) -> None:
        """Hand in the answer to the line of this index, counted from 0; each index exactly once.

        Raises:
          OSError: the file cannot be written.
        """
        assert index >= self._file.num_lines, f"line {index} was answered twice"
        assert index not in self._waiting, f"line {index} was answered twice"
        self._waiting[index] = answer
        while (ready := self._file.num_lines) in self._waiting:
            self._file.write(self._waiting[ready])
            del self._waiting[ready]

    def close(self) -> None:
        """Write what was held back, still in input order and with gaps where a run was cut short, and close the file.

        Raises:
          OSError: the file cannot be written; it is closed all the same.
        """
        try:
            for index in sorted(index for index in self._waiting if index >= self._file.num_lines):
                self._file.write(self._waiting[index])
            self._waiting = {}
        finally:
            self._file.close()


def _encoded(value: Mapping[str, Any]) -> bytes:
    """Encode as one line of UTF-8; text that UTF-8 cannot hold, half a surrogate pair, is escaped."""
    try:
        return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(value) + "\n").encode("ascii")
