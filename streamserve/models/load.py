"""Loads a model from a Hugging Face folder onto a mesh, moves it to another, and writes it back.

Owns `Model` and the two directions between files and parameters. Which tensor is which stands in `hf_names`, which
config is understood in `hf_config`; nothing here knows the layers' mathematics.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from streamserve.config import BUNDLED_DRAFT, BUNDLED_TARGET
from streamserve.models import hf_files, hf_names, transformer
from streamserve.models.config import ModelConfig
from streamserve.models.hf_config import from_hf
from streamserve.models.sharding import param_shardings
from streamserve.types import ForwardFns, KVShape, Params

_ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
_BUNDLED: Mapping[str, pathlib.Path] = {BUNDLED_TARGET: _ASSETS / "target", BUNDLED_DRAFT: _ASSETS / "draft"}
_DUMMY_STD = 0.02  # of random weights, transformers' usual initializer_range
_MAX_NAMED = 8  # tensors that an error message lists of each kind


class Model(NamedTuple):
    """A model on a mesh.

    Attributes:
      config: its numbers.
      fns: its pure functions.
      params: tree of parameters, sharded over the mesh.
      kv_shape: what its cache needs.
    """

    config: ModelConfig
    fns: ForwardFns
    params: Params
    kv_shape: KVShape


def resolve_path(name: str) -> pathlib.Path:
    """Find the folder of a model.

    Args:
      name: "bundled:target", "bundled:draft", or a folder.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    folder = _BUNDLED.get(name, pathlib.Path(name))
    if not folder.is_dir():
        known = ", ".join(_BUNDLED)
        raise FileNotFoundError(
            f"model {name!r}: {folder} is not a folder; give a Hugging Face folder, or one of {known}"
        )
    return folder


def load_config(path: str) -> ModelConfig:
    """Read a model's numbers alone; arguments and errors as `load_model`'s."""
    folder = resolve_path(path)
    try:
        return from_hf(hf_files.read_json(folder / hf_files.CONFIG_NAME))
    except ValueError as error:
        raise ValueError(f"model {path!r}: {error}") from error


def load_model(
    path: str,
    mesh: Mesh,
    *,
    dtype: jax.typing.DTypeLike,
    load_format: str,
    seed: int = 0,
    attention_implementation: str | None = None,
) -> Model:
    """Load a model onto a mesh; each device reads only what it holds.

    Args:
      path: a Hugging Face folder, "bundled:target" or "bundled:draft".
      mesh: with the tensor axis.
      dtype: of weights and cache in memory, whatever it is on disk.
      load_format: "auto" reads safetensors; "dummy" makes random weights from the config alone.
      seed: of the random weights.
      attention_implementation: passed to the attention's door; None takes the best.

    Raises:
      FileNotFoundError: the folder, its config or its weights are missing.
      ValueError: the config is not supported, tensors do not fit it, or the mesh does not divide the model.
    """
    config = load_config(path)
    abstract = transformer.abstract_params(config, dtype)
    shardings = param_shardings(abstract, mesh)
    if load_format == "dummy":
        key = jax.random.key(seed)
        params = transformer.init_params(config, key, dtype=dtype, std=_DUMMY_STD, shardings=shardings)
    elif load_format == "auto":
        try:
            params = read_params(resolve_path(path), config, shardings, dtype)
        except ValueError as error:
            raise ValueError(f"model {path!r}: {error}") from error
    else:
        raise ValueError(f"load_format must be 'auto' or 'dummy', got {load_format!r}")
    fns = transformer.forward_fns(config, attention_implementation=attention_implementation)
    return Model(config=config, fns=fns, params=params, kv_shape=transformer.kv_shape(config, dtype))


def place(model: Model, mesh: Mesh) -> Model:
    """Copy a model's parameters to another mesh.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    return model._replace(params=jax.device_put(model.params, param_shardings(model.params, mesh)))


def read_params(folder: pathlib.Path, config: ModelConfig, shardings: Any, dtype: jax.typing.DTypeLike) -> Params:
    """Read parameters from safetensors, straight into shards.

    Args:
      folder: of the checkpoint.
      config: the model.
      shardings: tree of `NamedSharding`, as `param_shardings` gives.
      dtype: of the parameters.

    Raises:
      FileNotFoundError: files are missing.
      ValueError: tensors are missing, superfluous or misshapen; the message names them.
    """
    table, dtype = hf_names.make_table(config), jnp.dtype(dtype)
    with hf_files.open_tensors(folder) as tensors:
        _check_tensors(table, tensors.shapes())
        tensors.check_dtypes()

        def make(path: Any, sharding: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            entry = table[tuple(step.key for step in path)]
            read = lambda index: hf_names.read_shard(entry, index, tensors.read, dtype)  # noqa: E731
            return jax.make_array_from_callback(leaf.shape, sharding, read)

        abstract = transformer.abstract_params(config, dtype)
        return jax.tree_util.tree_map_with_path(make, shardings, abstract)


def export_hf(
    params: Params,
    config: ModelConfig,
    folder: pathlib.Path,
    hf_config: Mapping[str, Any],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> None:
    """Write `config.json` and `model.safetensors` that transformers loads unchanged.

    The whole model passes through host memory.

    Args:
      params: tree of parameters.
      config: the model.
      folder: made if it does not exist; files in it are replaced.
      hf_config: contents of `config.json`; its `dtype` is set to what is written.
      dtype: on disk, float32 or bfloat16.

    Raises:
      ValueError: `hf_config` describes another model than `config`, or the dtype is neither.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype.name}")
    if from_hf(hf_config) != config:
        raise ValueError(f"hf_config describes {from_hf(hf_config)}, not {config}")
    stored = {}
    for path, entry in hf_names.make_table(config).items():
        leaf = params
        for step in path:
            leaf = leaf[step]
        whole = np.asarray(jax.device_get(leaf)).astype(dtype)
        stored.update({part.name: hf_names.stored_tensor(entry, part, whole) for part in entry.parts})
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(stored, folder / hf_files.WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps({**hf_config, "dtype": dtype.name}, indent=2, sort_keys=True)
    (folder / hf_files.CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _check_tensors(table: Mapping[hf_names.Path, hf_names.Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {part.name: entry.part_shape(part) for entry in table.values() for part in entry.parts}
    # A tied model may store its head once more, and older versions of transformers stored the rotary frequencies.
    harmless = ("lm_head.weight", "rotary_emb.inv_freq")
    extra = [name for name in shapes if name not in wanted and not name.endswith(harmless)]
    misshapen = [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = (("missing", [name for name in wanted if name not in shapes]), ("extra", extra), ("misshapen", misshapen))
    messages = [f"{kind} tensors: {_listing(names)}" for kind, names in faults if names]
    if messages:
        raise ValueError(f"the checkpoint does not fit its config; {'; '.join(messages)}")


def _listing(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(sorted(names)[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
