"""What `configs/train_pair.py` says, as frozen dataclasses."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Text and tokens.

    Attributes:
      held_out_share: of questions and modules, never trained on.
      shares: probability that a document of a kind is used in an epoch, 1 where absent.
      tokenizer_source_share: share of source files that the tokenizer learns from.
      eval_rows: most held-out rows a kind.
      eval_length: tokens a held-out row.
    """

    held_out_share: float
    shares: dict
    tokenizer_source_share: float
    eval_rows: int
    eval_length: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Steps over rows of one length.

    Attributes:
      steps: optimizer steps.
      rows: rows a step.
      micro_rows: rows whose activations live together; divides `rows`.
      length: tokens a row that are predicted.
      chunk: tokens that go through the model together; divides `length`.
    """

    steps: int
    rows: int
    micro_rows: int
    length: int
    chunk: int

    def __post_init__(self) -> None:
        if self.rows % self.micro_rows or self.length % self.chunk:
            raise ValueError(f"micro_rows must divide rows, and chunk length: {self}")

    @property
    def tokens(self) -> int:
        """Tokens that are predicted, over all steps."""
        return self.steps * self.rows * self.length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseConfig:
    """Training of one model: mostly short rows, then some long ones.

    Attributes:
      short: first stage.
      long: second stage.
      learning_rate: peak.
      warmup_steps: linear from zero to the peak, which is then held.
      decay_steps: linear from the peak to zero at the end. Until it begins a run does not depend on its length.
      weight_decay: decoupled, of matrices.
      clip: largest global norm of the gradient.
      kl_weight: share of the divergence from the target in the loss, the rest is the data's; 0 without a teacher.
      save_every: steps between checkpoints.
    """

    short: StageConfig
    long: StageConfig
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    weight_decay: float
    clip: float
    kl_weight: float
    save_every: int

    @property
    def steps(self) -> int:
        """Steps of both stages."""
        return self.short.steps + self.long.steps

    @property
    def tokens(self) -> int:
        """Tokens that are predicted, in both stages."""
        return self.short.tokens + self.long.tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """The whole run.

    Attributes:
      seed: of parameters and of the order of documents.
      export_dtype: of the tensors on disk.
      corpus: text.
      target: contents of the target's `config.json`.
      draft: contents of the draft's.
      target_phase: training of the target, on text.
      draft_phase: training of the draft, on the target's distributions.
    """

    seed: int
    export_dtype: str
    corpus: CorpusConfig
    target: dict
    draft: dict
    target_phase: PhaseConfig
    draft_phase: PhaseConfig
