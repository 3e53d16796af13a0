"""Training of the bundled pair: the optimizer, the step, and the two phases with their checkpoints.

The batch of a step is a function of the seed and the step alone, so a run that was killed goes on as if it had not
been. Text is `corpus`'s business; this module knows no file of the result.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from optax import contrib
from transformers import PreTrainedTokenizerFast

from experiments import corpus
from experiments.pair_config import PairConfig, PhaseConfig, StageConfig
from experiments.pair_model import TrainModel, logits_of
from streamserve.models import Checkpoints
from streamserve.types import Params

CURVE = "loss.jsonl"
LOG_LAG = 2  # steps: a loss is read when later steps were dispatched, so reading it never holds the device up
# How Muon sees a fused kernel as a stack of matrices; parameters not named here (embedding, norms) go to AdamW.
MATRICES = {
    "qkv_kernel": contrib.MuonDimensionNumbers(0, 3),  # [E, G, M + 2, D], one matrix a head
    "out_kernel": contrib.MuonDimensionNumbers((0, 1, 2), 3),  # [G, M, D, E]
    "gate_up_kernel": contrib.MuonDimensionNumbers(0, 2),  # [E, 2, F], gate and up apart
    "down_kernel": contrib.MuonDimensionNumbers(0, 1),  # [F, E]
}


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds. DONATED to every step."""

    step: jax.Array  # [] int32, steps done
    params: Params
    opt_state: optax.OptState


def make_optimizer(phase: PhaseConfig) -> optax.GradientTransformation:
    """Muon for matrices and AdamW for the rest, with clipping, warm-up and a decay at the end.

    Muon's updates are scaled to AdamW's usual size (arXiv 2502.16982), so that one learning rate serves both.
    """
    decay_start = phase.steps - phase.decay_steps
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, phase.learning_rate, phase.warmup_steps),
            optax.linear_schedule(phase.learning_rate, 0.0, phase.decay_steps, decay_start - phase.warmup_steps),
        ],
        [phase.warmup_steps],
    )

    def matrices(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: MATRICES.get(path[-1].key), params)

    muon = contrib.muon(
        rate,
        weight_decay=phase.weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(phase.clip), muon)


def make_loss(model: TrainModel, teacher: TrainModel | None, kl_weight: float, chunk: int) -> Callable:
    """Return `(params, teacher_params, rows_BS1) -> loss`, a mean over positions; a row has one token to spare."""

    def loss_fn(params: Params, teacher_params: Params, rows_BS1: jax.Array) -> jax.Array:
        tokens_BS, next_BS = rows_BS1[:, :-1], rows_BS1[:, 1:]
        logits_BSV = logits_of(model, params, tokens_BS, chunk)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, next_BS).mean()
        if teacher is None:
            return loss
        wanted_BSV = logits_of(teacher, teacher_params, tokens_BS, chunk)
        divergence = optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(logits_BSV), jax.nn.log_softmax(wanted_BSV)
        )
        return (1 - kl_weight) * loss + kl_weight * divergence.mean()

    return loss_fn


def make_step(loss_fn: Callable, optimizer: optax.GradientTransformation, stage: StageConfig) -> Callable:
    """Return a jitted `(state, teacher_params, rows) -> (state, loss)`, which DONATES `state`.

    Gradients add up over groups of `micro_rows`: on CPU activations that fit the cache are a third faster.
    """
    groups = stage.rows // stage.micro_rows

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, teacher_params: Params, rows_BS1: jax.Array) -> tuple[TrainState, jax.Array]:
        def add(total: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(state.params, teacher_params, part)), None

        begin = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        split = rows_BS1.astype(jnp.int32).reshape(groups, stage.micro_rows, stage.length + 1)
        total, _ = jax.lax.scan(add, begin, split)
        loss, grads = jax.tree.map(lambda leaf: leaf / groups, total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), loss

    return step


class LossLog:
    """A loss curve as JSON lines, written `LOG_LAG` steps late; a context manager.

    Attributes:
      last: the newest loss that is known, NaN before the first.
    """

    def __init__(self, path: pathlib.Path, first_step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A killed run may have logged steps that are done again now, and half a line.
        path.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] < first_step))
        self._file = path.open("a", buffering=1)
        self._waiting: list[tuple[dict[str, float], jax.Array]] = []
        self.last = float("nan")

    def __enter__(self) -> "LossLog":
        return self

    def __exit__(self, *unused: object) -> None:
        del unused
        self._file.close()

    def add(self, loss: jax.Array, **facts: float) -> None:
        """Take a step's loss; it may still be in the making."""
        self._waiting.append((facts, loss))
        self.flush(LOG_LAG)

    def flush(self, keep: int = 0) -> None:
        """Write all but the last `keep` losses."""
        while len(self._waiting) > keep:
            facts, loss = self._waiting.pop(0)
            self.last = float(jax.device_get(loss))
            self._file.write(json.dumps({**facts, "loss": round(self.last, 5)}) + "\n")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Where batches come from.

    Attributes:
      encoded: training documents.
      shares: of their kinds, see `corpus.pack_rows`.
      seed: of their order.
    """

    encoded: corpus.Encoded
    shares: dict
    seed: int

    def batches(self, stage: StageConfig, index: int) -> np.ndarray:
        """Lay out all batches of a phase's stage, uint16 [steps, rows, length + 1]."""
        count = stage.steps * stage.rows
        rows = corpus.pack_rows(
            self.encoded, count=count, length=stage.length + 1, seed=(self.seed, index), shares=self.shares
        )
        return rows.reshape(stage.steps, stage.rows, stage.length + 1)


def run_phase(
    folder: pathlib.Path,
    feed: Feed,
    phase: PhaseConfig,
    model: TrainModel,
    *,
    teacher: tuple[TrainModel, Params] | None = None,
) -> Params:
    """Train one model, from its last checkpoint if there is one.

    Args:
      folder: of checkpoints and the loss curve.
      feed: batches.
      phase: how.
      model: what.
      teacher: whom to imitate; None learns from text.

    Returns:
      The trained parameters.
    """
    teacher_model, teacher_params = (None, ()) if teacher is None else teacher
    optimizer = make_optimizer(phase)
    params = model.init(jax.random.key(feed.seed))
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
    with Checkpoints(folder / "checkpoints", max_to_keep=2) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        done = int(jax.device_get(state.step))
        bar = tqdm.tqdm(total=phase.steps, initial=done, desc=folder.name, mininterval=5.0)
        with LossLog(folder / CURVE, done) as log, bar:
            for index, stage in enumerate((phase.short, phase.long)):
                first = index * phase.short.steps
                loss_fn = make_loss(model, teacher_model, phase.kl_weight, stage.chunk)
                step_fn, batches = make_step(loss_fn, optimizer, stage), feed.batches(stage, index)
                for step in range(max(done, first), first + stage.steps):
                    state, loss = step_fn(state, teacher_params, batches[step - first])
                    log.add(loss, step=step, length=stage.length, time_s=round(time.time(), 2))
                    bar.set_postfix(loss=log.last, refresh=False)
                    bar.update()
                    if (step + 1) % phase.save_every == 0 or step + 1 == phase.steps:
                        checkpoints.save(step + 1, state)
            log.flush()
    return state.params


def prepare_tokenizer(
    folder: pathlib.Path, documents: Sequence[corpus.Document], vocab_size: int, source_share: float
) -> PreTrainedTokenizerFast:
    """Train the tokenizer on training documents, or load the one that the run began with."""
    if not folder.exists():
        kept = np.random.default_rng(vocab_size).random(len(documents)) < source_share
        texts = [
            document.text
            for document, keep in zip(documents, kept, strict=True)
            if not document.held_out and (document.kind != "source" or keep)
        ]
        corpus.train_tokenizer(texts, vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rounded(params: Params, dtype: str) -> Params:
    """Give parameters the values that they will have on disk."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype), params)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPair:
    """The result of both phases.

    Attributes:
      tokenizer: of both models.
      encoded: training documents as tokens.
      models: "target" and "draft", with parameters as they will be on disk.
      curves: their loss curves.
    """

    tokenizer: PreTrainedTokenizerFast
    encoded: corpus.Encoded
    models: dict[str, tuple[TrainModel, Params]]
    curves: dict[str, list[dict[str, float]]]


def train_pair(documents: Sequence[corpus.Document], config: PairConfig, workdir: pathlib.Path) -> TrainedPair:
    """Train both models; a second call with the same arguments resumes.

    Args:
      documents: the corpus.
      config: of everything.
      workdir: of tokenizer, checkpoints and loss curves.
    """
    tokenizer = prepare_tokenizer(
        workdir / "tokenizer", documents, config.target["vocab_size"], config.corpus.tokenizer_source_share
    )
    encoded = corpus.Encoded([document for document in documents if not document.held_out], tokenizer)
    feed = Feed(encoded=encoded, shares=config.corpus.shares, seed=config.seed)
    target, draft = TrainModel.from_hf(config.target), TrainModel.from_hf(config.draft)
    params = run_phase(workdir / "target", feed, config.target_phase, target)
    teacher = (target, rounded(params, config.export_dtype))
    params = run_phase(workdir / "draft", feed, config.draft_phase, draft, teacher=teacher)
    models = {"target": teacher, "draft": (draft, rounded(params, config.export_dtype))}
    curves = {name: [json.loads(x) for x in (workdir / name / CURVE).read_text().splitlines()] for name in models}
    return TrainedPair(tokenizer=tokenizer, encoded=encoded, models=models, curves=curves)
