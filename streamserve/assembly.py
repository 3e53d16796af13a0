"""How an engine is put together: models are loaded, stream pairs are built of them, and what decides over them is made.

Each function makes one kind of part from the config and the parts below it; `llm.py` calls them in their order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from streamserve import mesh as meshes
from streamserve import parts
from streamserve.config import Config, PipeServeConfig
from streamserve.flowguard import FlowGuard, Objective, RouteLog
from streamserve.models import Model, load_model, place, resolve_path
from streamserve.pair_protocol import Pair
from streamserve.pipeserve import Handicap, HandicappedPair, PairModels, Programs, StreamPair, lane_sizes
from streamserve.specustream import CostTable, DecisionLog, DraftWay, SpecuStream, drafters, synthetic
from streamserve.tokenizer import Tokenizer, load_tokenizer

# --- models -----------------------------------------------------------------------------------------------------------


def load_target(config: Config, mesh: jax.sharding.Mesh) -> Model:
    """Load the model that is served."""
    return _load(config, str(resolve_path(config.model.model)), mesh)


def load_draft(config: Config, target: Model, tokenizer: Tokenizer | None, mesh: jax.sharding.Mesh) -> Model | None:
    """Load the draft model, if there is one, and let it speak the target's vocabulary.

    Raises:
      ValueError: its vocabulary is another one, and there is no tokenizer to compare them by.
    """
    speculation = config.speculation
    if max(speculation.depths) == 0 or speculation.method not in parts.MODEL_METHODS:
        return None
    assert speculation.model is not None, "the config has checked it"
    path = resolve_path(speculation.model)
    draft = _load(config, str(path), mesh)
    same_size = draft.config.vocab_size == target.config.vocab_size
    if tokenizer is None or not (path / "tokenizer.json").exists():
        if not same_size:
            raise ValueError(
                f"the draft's vocabulary has {draft.config.vocab_size} tokens and the target's "
                f"{target.config.vocab_size}; without both tokenizers they cannot be matched"
            )
        return draft
    own, its = tokenizer.vocabulary(), load_tokenizer(path).vocabulary()
    if same_size and own == its:
        return draft
    fns = drafters.tli_fns(draft.fns, own, its, target.config.vocab_size, draft.config.vocab_size)
    return draft._replace(fns=fns)


def _load(config: Config, path: str, mesh: jax.sharding.Mesh) -> Model:
    dtype = np.dtype(jax.numpy.dtype(config.model.dtype))
    return load_model(path, mesh, dtype=dtype, load_format=config.model.load_format, seed=config.seed)


def max_model_len(config: Config, target: Model, draft: Model | None) -> int:
    """Decide how long a request may be.

    Raises:
      ValueError: the models were not made for what the config asks for.
    """
    longest = target.config.max_position
    if draft is not None:
        longest = min(longest, draft.config.max_position)
    wanted = config.model.max_model_len
    if wanted is not None and wanted > longest:
        raise ValueError(f"max_model_len={wanted} exceeds the {longest} positions that the model was made for")
    return longest if wanted is None else wanted


# --- stream pairs -----------------------------------------------------------------------------------------------------


def make_pairs(
    config: Config, pairs: Sequence[meshes.PairMeshes], target: Model, draft: Model | None, longest: int
) -> list[StreamPair]:
    """Build the lanes, for requests of `longest` tokens; nothing is compiled yet."""
    speculation = config.speculation
    colocated = config.topology.topology == "colocated"
    local_tokens = 0 if colocated else config.routing.local_prefill_tokens
    drafter = parts.make_drafter(speculation, draft, target.config.vocab_size)
    verifier = parts.make_verifier(speculation)
    lanes = []
    for index, pair in enumerate(pairs):
        models = PairModels(
            target=target.fns,
            kv_shape=target.kv_shape,
            vocab_size=target.config.vocab_size,
            drafter=drafter,
            verifier=verifier,
            prefill_params=_params_on(pair.prefill, target, draft, drafter),
            decode_params=_params_on(pair.decode, target, draft, drafter),
            synthetic=speculation.method == "synthetic",
        )
        settings = _lane_config(config, index)
        sizes = lane_sizes(settings, max_model_len=longest, tiers=speculation.depths, local_tokens=local_tokens)
        lanes.append(StreamPair(index, Programs(pair, models, settings, sizes)))
    return lanes


def _lane_config(config: Config, index: int) -> PipeServeConfig:
    """Sizes of one lane."""
    settings, lanes = config.pipeserve, config.lanes
    return dataclasses.replace(
        settings,
        max_num_seqs=_entry(lanes.slots, index, settings.max_num_seqs),
        decode_pool_tokens=_entry(lanes.decode_pool_tokens, index, settings.decode_pool_tokens),
    )


def _params_on(
    mesh: jax.sharding.Mesh, target: Model, draft: Model | None, drafter: drafters.Drafter
) -> tuple[Any, Any]:
    """Parameters of target and drafter on a mesh."""
    own = jax.device_put(drafter.params, meshes.replicated(mesh)) if draft is None else place(draft, mesh).params
    return place(target, mesh).params, own


def handicapped(config: Config, pairs: Sequence[StreamPair]) -> list[Pair]:
    """Put handicaps before the pairs that have one."""
    lanes = config.lanes
    if not lanes.are_handicapped:
        return list(pairs)
    return [
        HandicappedPair(
            pair,
            Handicap(
                slowdown=_entry(lanes.slowdown, pair.index, 1.0),
                transfer_delay_s=_entry(lanes.transfer_delay_s, pair.index, 0.0),
                down_from_s=_entry(lanes.down_from_s, pair.index, -1.0),
                down_until_s=_entry(lanes.down_until_s, pair.index, -1.0),
            ),
        )
        for pair in pairs
    ]


def _entry(entries: Sequence[Any], index: int, otherwise: Any) -> Any:
    """Give a lane's entry of a field of `LanesConfig`."""
    return entries[index] if entries else otherwise


# --- what decides over them -------------------------------------------------------------------------------------------


def make_specustreams(
    config: Config, pairs: Sequence[StreamPair], costs: CostTable, log: DecisionLog | None
) -> list[SpecuStream]:
    """Build what plans the ticks of each lane."""
    speculation = config.speculation
    ways = []
    for pair in pairs:
        told = _entry(config.lanes.acceptance, pair.index, speculation.acceptance)
        process = None if told is None else synthetic.parse(told, max(speculation.depths))
        ways.append(DraftWay(catches_up=speculation.method in parts.MODEL_METHODS, process=process))
    return [
        SpecuStream(
            parts.make_policy(speculation, pair.num_slots),
            costs,
            slots=pair.num_slots,
            rounds=pair.sizes.rounds,
            seed=config.seed,
            lane=pair.index,
            way=way,
            log=log,
        )
        for pair, way in zip(pairs, ways, strict=True)
    ]


def make_flowguard(config: Config, log: RouteLog | None) -> FlowGuard:
    """Build the router."""
    routing = config.routing
    return FlowGuard(
        parts.make_router(config),
        num_lanes=config.topology.num_pairs,
        seed=config.seed,
        objective=Objective(ttft_s=routing.ttft_s, tpot_s=routing.tpot_s),
        log=log,
    )
