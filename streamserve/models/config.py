"""What a model is, as numbers: the records that layers are built from.

Owns `ModelConfig`. It knows no file format: reading a Hugging Face `config.json` is `hf_config`'s business.
"""

import dataclasses
import enum


class RopeType(enum.Enum):
    """How rotary frequencies are changed for contexts longer than those trained on."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      rope_type: which formula.
      theta: base of the geometric series of wavelengths.
      factor: LINEAR and LLAMA3: what frequencies are divided by; 1 otherwise.
      low_freq_factor: LLAMA3: wavelengths above `original_max_position / low_freq_factor` are divided whole.
      high_freq_factor: LLAMA3: wavelengths below `original_max_position / high_freq_factor` stay.
      original_max_position: LLAMA3: context in tokens before scaling.
    """

    rope_type: RopeType
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """Parts of attention that some families have.

    Attributes:
      qkv_bias: queries, keys and values have a bias.
      output_bias: the output projection has a bias.
      qk_norm: each query and key head is RMS-normalised before rotation.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: pre-norm, rotary, grouped-query attention, gated SiLU.

    Attributes:
      model_type: family name.
      vocab_size: V.
      hidden_size: E.
      intermediate_size: F, width of the gated layer.
      num_layers: L.
      num_heads: H, query heads.
      num_kv_heads: G, key/value heads; divides H.
      head_dim: D, even.
      rms_norm_eps: added to the mean square.
      rope: rotary embedding.
      windows: per layer, sliding window in tokens, the query's own position included; None sees all.
      tied_head: logits use the embedding.
      attention: optional parts of attention.
      max_position: context in tokens that the model was made for.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tied_head: bool
    attention: AttentionOptions
    max_position: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} key/value heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {self.head_dim}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows were given for {self.num_layers} layers")
        for window in self.windows:
            if window is not None and window < 1:
                raise ValueError(f"a sliding window must be at least 1 token, got {window}")

    @property
    def heads_per_group(self) -> int:
        """M, query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads
