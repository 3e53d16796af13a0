"""The one table between our parameters and the tensors of a Hugging Face checkpoint, used in both directions.

Shapes are spelled in letters: E model, V vocabulary, G key/value heads, M query heads a group, D head size, F gated
layer; X is the dimension along which several tensors are fused into one parameter. A stored tensor is a list of
groups: "GXD" is one stored dimension, row-major over its letters. Knows no file and no mesh.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from streamserve.models.config import ModelConfig

Path = tuple[str | int, ...]
ReadFn = Callable[[str, tuple[slice, ...]], np.ndarray]  # (tensor name, slices) -> the part of the stored tensor


class Part(NamedTuple):
    """One stored tensor inside a parameter.

    Attributes:
      name: in the checkpoint.
      stored: letters of each stored dimension.
      first: where it starts along X.
      width: how much of X it takes.
    """

    name: str
    stored: tuple[str, ...]
    first: int = 0
    width: int = 1


class Entry(NamedTuple):
    """One parameter.

    Attributes:
      letters: of its dimensions.
      sizes: of every letter but X.
      parts: stored tensors that it is made of, in the order of X.
    """

    letters: str
    sizes: Mapping[str, int]
    parts: tuple[Part, ...]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        sizes = {**self.sizes, "X": part.width}
        return tuple(math.prod(sizes[letter] for letter in group) for group in part.stored)


def make_table(config: ModelConfig) -> dict[Path, Entry]:
    """List every parameter of a model by its path in the tree.

    Args:
      config: the model.

    Returns:
      Path of keys to its entry.
    """
    sizes = {
        "V": config.vocab_size,
        "E": config.hidden_size,
        "G": config.num_kv_heads,
        "M": config.heads_per_group,
        "D": config.head_dim,
        "F": config.intermediate_size,
    }
    table = {
        ("embedding",): Entry("VE", sizes, (Part("model.embed_tokens.weight", ("V", "E")),)),
        ("final_norm", "scale"): Entry("E", sizes, (Part("model.norm.weight", ("E",)),)),
    }
    if not config.tied_head:
        table["head",] = Entry("VE", sizes, (Part("lm_head.weight", ("V", "E")),))
    for index in range(config.num_layers):
        for path, (letters, parts) in _layer_table(config).items():
            named = tuple(part._replace(name=f"model.layers.{index}.{part.name}") for part in parts)
            table["layers", index, *path] = Entry(letters, sizes, named)
    return table


def _layer_table(config: ModelConfig) -> dict[Path, tuple[str, tuple[Part, ...]]]:
    def qkv(kind: str, *rest: str) -> tuple[Part, ...]:
        M = config.heads_per_group
        widths = (("q", 0, M), ("k", M, 1), ("v", M + 1, 1))
        return tuple(Part(f"self_attn.{n}_proj.{kind}", ("GXD", *rest), first, width) for n, first, width in widths)

    gate_up = tuple(Part(f"mlp.{name}_proj.weight", ("XF", "E"), first) for first, name in enumerate(("gate", "up")))
    table: dict[Path, tuple[str, tuple[Part, ...]]] = {
        ("attention_norm", "scale"): ("E", (Part("input_layernorm.weight", ("E",)),)),
        ("attention", "qkv_kernel"): ("EGXD", qkv("weight", "E")),
        ("attention", "out_kernel"): ("GMDE", (Part("self_attn.o_proj.weight", ("E", "GMD")),)),
        ("mlp_norm", "scale"): ("E", (Part("post_attention_layernorm.weight", ("E",)),)),
        ("mlp", "gate_up_kernel"): ("EXF", gate_up),
        ("mlp", "down_kernel"): ("FE", (Part("mlp.down_proj.weight", ("E", "F")),)),
    }
    if config.attention.qkv_bias:
        table["attention", "qkv_bias"] = ("GXD", qkv("bias"))
    if config.attention.output_bias:
        table["attention", "out_bias"] = ("E", (Part("self_attn.o_proj.bias", ("E",)),))
    if config.attention.qk_norm:
        for name in ("q_norm", "k_norm"):
            table["attention", name, "scale"] = ("D", (Part(f"self_attn.{name}.weight", ("D",)),))
    return table


def read_shard(entry: Entry, index: tuple[slice, ...], read: ReadFn, dtype: jax.typing.DTypeLike) -> np.ndarray:
    """Read the piece of a parameter that one device holds, and nothing else.

    Args:
      entry: of the parameter.
      index: slices of the parameter's dimensions; X must be whole.
      read: reads a part of a stored tensor.
      dtype: of the result.

    Returns:
      The piece, in our layout.
    """
    width = sum(part.width for part in entry.parts)
    bounds = {
        letter: piece.indices(width if letter == "X" else entry.sizes[letter])[:2]
        for letter, piece in zip(entry.letters, index, strict=True)
    }
    piece = np.empty([stop - start for start, stop in bounds.values()], dtype)
    for part in entry.parts:
        span = {**bounds, "X": (0, part.width)}
        sizes = {**entry.sizes, "X": part.width}
        block = read(part.name, tuple(_stored_slice(group, span, sizes) for group in part.stored))
        stored = "".join(part.stored)
        block = block.reshape([span[letter][1] - span[letter][0] for letter in stored])
        block = block.transpose([stored.index(letter) for letter in entry.letters])
        piece[_fused(entry, part)] = block
    return piece


def stored_tensor(entry: Entry, part: Part, whole: np.ndarray) -> np.ndarray:
    """Cut a stored tensor out of a whole parameter: the inverse of `read_shard`."""
    stored = "".join(part.stored)
    block = whole[_fused(entry, part)].transpose([entry.letters.index(letter) for letter in stored])
    return np.ascontiguousarray(block.reshape(entry.part_shape(part)))


def _fused(entry: Entry, part: Part) -> tuple[slice, ...]:
    taken = slice(part.first, part.first + part.width)
    return tuple(taken if letter == "X" else slice(None) for letter in entry.letters)


def _stored_slice(group: str, span: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> slice:
    """Slice of a stored dimension, given a span of each of its letters that lies in one piece."""
    first = last = 0
    for letter in group:
        low, high = span[letter]
        first, last = first * sizes[letter] + low, last * sizes[letter] + high - 1
    count = math.prod(span[letter][1] - span[letter][0] for letter in group)
    assert last + 1 - first == count, f"{group} is not contiguous at {span}"
    return slice(first, last + 1)
