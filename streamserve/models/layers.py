"""Layers of the decoder, as Flax NNX modules.

Owns weights' shapes and the mathematics of one layer. Weights that read the same input are fused into one kernel:
a decode step is bound by the number and size of matrix products. Knows no file format, mesh or scheduler; every number
comes from `ModelConfig`. X below: the M query heads of a group, then its key, then its value (M + 2 in all).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import attention, rotate_and_write
from streamserve.mesh import TENSOR_AXIS
from streamserve.models.config import ModelConfig, RopeConfig, RopeType
from streamserve.types import LayerKV


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angles in radians that one position turns each pair of dimensions by.

    `theta ** (-2 i / D)`; LINEAR divides by `factor`; LLAMA3 divides long wavelengths, keeps short ones, and
    interpolates between (Llama 3.1). In float32 throughout, as transformers computes them.

    Args:
      rope: rotary embedding.
      head_dim: D.

    Returns:
      float32 [D / 2].
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    frequency = 1.0 / np.float32(rope.theta) ** exponent
    if rope.rope_type is RopeType.LINEAR:
        return frequency / np.float32(rope.factor)
    if rope.rope_type is RopeType.DEFAULT:
        return frequency
    turns = rope.original_max_position * frequency / np.float32(2 * math.pi)  # over the original context
    spread = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / spread, 0.0, 1.0)
    return (kept * frequency + (1 - kept) * frequency / rope.factor).astype(np.float32)


def rotary_angles(position_BT: Int[Array, "B T"], rope: RopeConfig, head_dim: int) -> Float[Array, "B T half"]:
    """Angles in radians, float32, of each position and pair of dimensions."""
    return position_BT[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)[None, None]


def new_param(dtype: jax.typing.DTypeLike, *shape: int) -> nnx.Param:
    """Declare a parameter. Modules are made under `nnx.eval_shape` alone: values come from files or `init_params`."""
    return nnx.Param(jnp.zeros(shape, dtype))


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension; in float32, returned in the input's dtype."""

    def __init__(self, size: int, eps: float, dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.scale = new_param(dtype, size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., size]."""
        x_f32 = x.astype(jnp.float32)
        normal = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (normal * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over the cache.

    Attributes:
      qkv_kernel: [E, G, M + 2, D].
      qkv_bias: [G, M + 2, D], or None.
      out_kernel: [G, M, D, E].
      out_bias: [E], or None.
    """

    def __init__(
        self, config: ModelConfig, window: int | None, implementation: str | None, dtype: jax.typing.DTypeLike
    ):
        E, G, M, D = config.hidden_size, config.num_kv_heads, config.heads_per_group, config.head_dim
        self.config, self.window, self.implementation = config, window, implementation
        options = config.attention
        self.qkv_kernel = new_param(dtype, E, G, M + 2, D)
        self.qkv_bias = new_param(dtype, G, M + 2, D) if options.qkv_bias else None
        self.out_kernel = new_param(dtype, G, M, D, E)
        self.out_bias = new_param(dtype, E) if options.output_bias else None
        self.q_norm = RMSNorm(D, config.rms_norm_eps, dtype) if options.qk_norm else None
        self.k_norm = RMSNorm(D, config.rms_norm_eps, dtype) if options.qk_norm else None

    def __call__(
        self, x_BTE: Float[Array, "B T E"], layer: LayerKV, table_BM: Int[Array, "B M"], start_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T E"], LayerKV]:
        """Write the tokens' keys and values into the cache, then attend over it.

        Args:
          x_BTE: normalised input.
          layer: this layer's pages.
          table_BM: int32, the rows' pages.
          start_B: int32, position of each row's first token.

        Returns:
          The output, and the pages with `T` more tokens a row.
        """
        M, D = self.config.heads_per_group, self.config.head_dim
        with jax.named_scope("qkv"):
            qkv_BTGXD = jnp.einsum("bte,egxd->btgxd", x_BTE, self.qkv_kernel[...])
            if self.qkv_bias is not None:
                qkv_BTGXD += self.qkv_bias[...][None, None]
            if self.q_norm is not None and self.k_norm is not None:
                q_BTGMD, k_BTGXD = self.q_norm(qkv_BTGXD[..., :M, :]), self.k_norm(qkv_BTGXD[..., M : M + 1, :])
                qkv_BTGXD = jnp.concatenate([q_BTGMD, k_BTGXD, qkv_BTGXD[..., M + 1 :, :]], axis=-2)
        with jax.named_scope("write"):
            position_BT = start_B[:, None] + jnp.arange(x_BTE.shape[1])[None]
            angle_BTd = rotary_angles(position_BT, self.config.rope, D)
            options = {"heads_axis": TENSOR_AXIS, "implementation": self.implementation}
            q_BTHD, k_NGPD, v_NGPD = rotate_and_write(
                qkv_BTGXD, jnp.cos(angle_BTd), jnp.sin(angle_BTd), layer.k, layer.v, table_BM, start_B, **options
            )
        mixed_BTHD = attention(q_BTHD, k_NGPD, v_NGPD, table_BM, start_B, scale=D**-0.5, window=self.window, **options)
        with jax.named_scope("output"):
            # As one matrix product: an einsum over (G, M, D) made XLA transpose the weight in every step on CPU.
            kernel = self.out_kernel[...]
            out_BTE = mixed_BTHD.reshape(*x_BTE.shape[:2], -1) @ kernel.reshape(-1, kernel.shape[-1])
            out_BTE = out_BTE if self.out_bias is None else out_BTE + self.out_bias[...][None, None]
            return out_BTE, LayerKV(k=k_NGPD, v=v_NGPD)


class GatedMLP(nnx.Module):
    """`(silu(x gate) * (x up)) down`.

    Attributes:
      gate_up_kernel: [E, 2, F], the gate first.
      down_kernel: [F, E].
    """

    def __init__(self, config: ModelConfig, dtype: jax.typing.DTypeLike):
        E, F = config.hidden_size, config.intermediate_size
        self.gate_up_kernel = new_param(dtype, E, 2, F)
        self.down_kernel = new_param(dtype, F, E)

    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Apply to each position alone."""
        both_BT2F = jnp.einsum("bte,ezf->btzf", x_BTE, self.gate_up_kernel[...])
        inner_BTF = jax.nn.silu(both_BT2F[:, :, 0]) * both_BT2F[:, :, 1]
        return inner_BTF @ self.down_kernel[...]


class DecoderLayer(nnx.Module):
    """Attention and the gated layer, each normalised before and added to its input."""

    def __init__(
        self, config: ModelConfig, window: int | None, implementation: str | None, dtype: jax.typing.DTypeLike
    ):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, window, implementation, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = GatedMLP(config, dtype)

    def __call__(
        self, x_BTE: Float[Array, "B T E"], layer: LayerKV, table_BM: Int[Array, "B M"], start_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T E"], LayerKV]:
        """Apply the layer; arguments as `Attention`'s, `x_BTE` being the residual stream."""
        with jax.named_scope("attention"):
            mixed_BTE, layer = self.attention(self.attention_norm(x_BTE), layer, table_BM, start_B)
            x_BTE = x_BTE + mixed_BTE
        with jax.named_scope("mlp"):
            return x_BTE + self.mlp(self.mlp_norm(x_BTE)), layer
