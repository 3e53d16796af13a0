"""Reads a Hugging Face folder: its config, and any part of any tensor of its safetensors files.

Knows no model: which tensors there should be comes from the caller.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_READABLE_DTYPES = ("F32", "BF16", "F16")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


class TensorFiles:
    """Open safetensors files of one checkpoint."""

    def __init__(self, handles: Mapping[str, Any]):
        self._handles = handles

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def check_dtypes(self) -> None:
        """Refuse numbers that are not plain floating point.

        Raises:
          ValueError: names the tensors, say those of a quantized checkpoint.
        """
        kinds = {name: handle.get_slice(name).get_dtype() for name, handle in self._handles.items()}
        odd = {name: kind for name, kind in kinds.items() if kind not in _READABLE_DTYPES}
        if odd:
            raise ValueError(f"tensors must be stored as one of {_READABLE_DTYPES}, got {odd}")

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Read part of a tensor from its file."""
        return self._handles[name].get_slice(name)[slices]


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[TensorFiles]:
    """Open `model.safetensors`, or the files that `model.safetensors.index.json` lists.

    Raises:
      FileNotFoundError: there is neither, or a listed file is missing.
      ValueError: the index or a file cannot be read, or the index names a tensor that its file lacks.
    """
    names = _files(folder)
    with contextlib.ExitStack() as stack:
        handles = {}
        for file, listed in names.items():
            try:
                handle = stack.enter_context(safetensors.safe_open(folder / file, framework="np"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"{folder / file} is not a valid safetensors file: {error}") from error
            held = set(handle.keys())
            absent = sorted(listed - held)
            if absent:
                raise ValueError(f"{INDEX_NAME} lists tensors that {file} lacks: {', '.join(absent)}")
            handles.update(dict.fromkeys(listed or held, handle))
        yield TensorFiles(handles)


def _files(folder: pathlib.Path) -> dict[str, set[str]]:
    """File name to the tensors that the index lists for it; an empty set means all that it holds."""
    if (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or any(not isinstance(f, str) for f in weight_map.values())
        ):
            raise ValueError(f"{folder / INDEX_NAME} has no weight_map from tensors to files")
        names: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            names.setdefault(file, set()).add(tensor)
    elif (folder / WEIGHTS_NAME).is_file():
        names = {WEIGHTS_NAME: set()}
    else:
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; weights in other formats are not read"
        )
    for file in names:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}, which {INDEX_NAME} lists")
    return names
