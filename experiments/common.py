"""What experiments share: flags to configuration, errors without tracebacks, files, and the record of a run.

Importing it touches no device. A `ConfigDict` stops here: everything below receives frozen dataclasses.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import streamserve
from streamserve.config import Config, from_mapping

EXIT_OK, EXIT_SOME_FAILED, EXIT_UNUSABLE, EXIT_INTERRUPTED = 0, 1, 2, 130
BUNDLED_PROMPTS = pathlib.Path(streamserve.__file__).parent / "assets" / "prompts.jsonl"
MAX_LISTED_FAILURES = 5
# What a run writes into its workdir, besides answers.
RECORD_FILES = (
    "config.json",
    "env.json",
    "requests.jsonl",
    "results.json",
    "trace.json",
    "decisions.jsonl",
    "routes.jsonl",
)
PACKAGES = ("streamserve", "jax", "jaxlib", "flax", "numpy", "tokenizers", "transformers")


class RunError(Exception):
    """The run cannot start or go on for a reason that its user can mend; the message is all they need."""


def exit_code(work: Callable[[], int]) -> int:
    """Do a script's work; gives its exit code, or that of the error or the Ctrl-C that ended it."""
    try:
        return work()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run_main(main: Callable[[Sequence[str]], int], *, default_config: pathlib.Path) -> None:
    """Parse the command line, run `main`, and exit with its code; wrong flags end with one line and code 2."""
    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which platforms it did not find
    app.run(main, flags_parser=functools.partial(parse_flags, default_config=default_config))


def parse_flags(
    argv: Sequence[str], *, default_config: pathlib.Path, values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """Parse flags; `--config=FILE` and `--config.field=value` are among them.

    The config flag is defined here, not on import, because its definition already reads the command line.

    Returns:
      The arguments that are left: the program's name.
    """
    given = any(argument.lstrip("-").split("=")[0] == "config" for argument in argv[1:])
    arguments = [argv[0], *([] if given else [f"--config={default_config}"]), *argv[1:]]
    try:
        config_flags.DEFINE_config_file(
            "config", None, f"Config file; {default_config.name} by default.", flag_values=values, sys_argv=arguments
        )
        rest = values(arguments)
        values.config.to_dict()  # a file that is missing is reported on access only
    except Exception as error:  # the config file is a program: whatever it raises is about the user's file
        stop(f"{_flag_problem(argv, error)} (--helpfull lists the flags, configs/{default_config.name} the fields)")
    if len(rest) > 1:
        stop(f"unexpected argument {rest[1]!r} (flags start with --)")
    return rest


def stop(message: str) -> NoReturn:
    """End the program: the arguments are of no use."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_UNUSABLE)


def _flag_problem(argv: Sequence[str], error: Exception) -> str:
    """Say what is wrong with the flags; ml_collections reports an unknown field as a bare `AttributeError: 'name'`."""
    if isinstance(error, (AttributeError, KeyError)):
        overrides = [argument.lstrip("-").split("=")[0] for argument in argv if argument.startswith("--config.")]
        for field in (override.removeprefix("config.") for override in overrides):
            if any(f"'{part}" in str(error) for part in field.split(".")):
                close = re.findall(r'Did you mean "(\w+)"', str(error))
                return f"config has no field {field!r}" + (f"; did you mean {close[0]}?" if close else "")
    if isinstance(error, flags.Error):
        return _one_line(error)
    if isinstance(error, OSError) and isinstance(error.__cause__, OSError):  # ml_collections wraps what it met
        return f"cannot load the config: {_one_line(error.__cause__)}"
    return f"cannot load the config: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).strip('"').split())


def split_config(values: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Divide a script's configuration into the engine's and the default sampling parameters of requests.

    Raises:
      RunError: an unknown field, a wrong type, or a value out of range.
    """
    engine = {name: value for name, value in values.items() if name != "sampling"}
    sampling = values.get("sampling", {})
    if not isinstance(sampling, Mapping):
        raise RunError(f"config field 'sampling' must be a mapping, got {sampling!r}")
    try:
        return from_mapping(Config, engine), dict(sampling)
    except ValueError as error:
        raise RunError(str(error)) from None


def open_input(path: pathlib.Path, written: Iterable[pathlib.Path]) -> BinaryIO:
    """Open the input, unless it is one of the files that the run will write.

    Raises:
      RunError: it is one of them, or cannot be read.
    """
    if any(path.resolve() == other.resolve() or _same(path, other) for other in written):
        raise RunError(f"the input {str(path)!r} would be overwritten; choose another output or workdir")
    try:
        return path.open("rb")
    except OSError as error:
        raise RunError(f"cannot read the input {str(path)!r}: {error.strerror or error}") from None


def _same(first: pathlib.Path, second: pathlib.Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def readable(lines: BinaryIO, path: pathlib.Path) -> Iterator[bytes]:
    """Pass the lines of an input on.

    Raises:
      RunError: it cannot be read any more.
    """
    try:
        yield from lines
    except OSError as error:
        raise RunError(f"cannot read the input {str(path)!r}: {error.strerror or error}") from None


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Generator[None]:
    """Turn what the system says when a file or folder cannot be written into a `RunError`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def tell_failures(first: Sequence[str], failed: int, total: int) -> None:
    """Say on the console how many lines failed, and why the first did; nothing if none did."""
    if failed:
        more = f"\n  and {failed - len(first)} more" if failed > len(first) else ""
        print(f"{failed} of {total} lines failed:\n  " + "\n  ".join(first) + more, file=sys.stderr)


def environment(*, share_devices: bool, command: Sequence[str]) -> dict[str, Any]:
    """Record what a run depends on besides its config: versions, devices, platform and commit."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        "share_devices": share_devices,
        "git": _git(),
    }


def portable(value: Any) -> Any:
    """Leave out the folders of absolute paths, and of those from home or from a folder above: they are a machine's."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w./])(?:~|\.\.)?/(?!/)(?:[^/\s'\"=]+/)*", "", value)
    if isinstance(value, Mapping):
        return {name: portable(one) for name, one in value.items()}
    return [portable(one) for one in value] if isinstance(value, (list, tuple)) else value


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object to a file.

    Raises:
      RunError: it cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a file that `write_json` has written.

    Raises:
      RunError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {str(path)!r}: {error}") from None


def read_json_lines(path: pathlib.Path, *, what: str = "") -> list[Any]:
    """Read a file of JSON lines, but for blank ones.

    Args:
      path: of the file.
      what: it is, for the message.

    Raises:
      RunError: it cannot be read, or a line of it, which is named by its number in the file.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot read {what}{str(path)!r}: {error.strerror or error}") from None
    values = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                values.append(json.loads(line.decode("utf-8")))
        except ValueError as error:  # the "line" of a JSONDecodeError would be that of this one line
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise RunError(f"cannot read {what}{str(path)!r}: line {number}: not valid JSON: {reason}") from None
    return values


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this file belongs to, and whether it was changed; None outside a checkout."""
    tracked = _git_says("ls-files", "--error-unmatch", __file__)  # an installed copy may lie in a foreign checkout
    commit = None if tracked is None else _git_says("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(_git_says("status", "--porcelain"))}


def _git_says(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(pathlib.Path(__file__).parent), *arguments],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
