"""From nested mappings, as config files and command lines give them, to the dataclasses."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


def from_mapping(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
    """Build a config dataclass from nested mappings, checking names and types.

    Args:
      cls: `Config` or one of its parts.
      values: field name to value or nested mapping.
      path: dotted name of `cls` for messages.

    Raises:
      ValueError: an unknown field (the message lists close ones), a value of a wrong type, or one out of range.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        dotted = f"{path}{name}"
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(hints)}"
            raise ValueError(f"config has no field {dotted!r}{hint}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"config field {dotted!r} must be a mapping, got {value!r}")
            arguments[name] = from_mapping(typing.cast(type, hints[name]), value, path=f"{dotted}.")
        else:
            arguments[name] = _coerce(dotted, value, hints[name])
    return cls(**arguments)


def _coerce(dotted: str, value: Any, hint: Any) -> Any:
    """Check a leaf value against its annotation; lists become tuples, integers floats where meant."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is types.NoneType and value is None:
            return None
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_coerce(dotted, item, typing.get_args(option)[0]) for item in value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    raise ValueError(f"config field {dotted!r} must be {hint}, got {value!r}")
