"""What a round costs on the lanes of an engine: measured once on a machine, and kept in a folder for the next start."""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax

from streamserve.config import Config
from streamserve.models import Model
from streamserve.pipeserve import LaneSizes, StreamPair, context_lengths, measure_costs
from streamserve.specustream import CostTable, nominal


def lane_costs(
    config: Config, pairs: Sequence[StreamPair], target: Model, draft: Model | None, *, use_tqdm: bool = False
) -> CostTable:
    """Find out what a round costs at every depth: from an earlier start on this machine, or by measuring.

    Nothing is measured where there is one depth alone.
    """
    pair = max(pairs, key=lambda pair: pair.num_slots)
    sizes, speculation = pair.sizes, config.speculation
    if len(sizes.tiers) == 1 or (speculation.policy == "fixed" and len(speculation.tiers) < 2):
        return nominal(sizes.tiers, sizes.batches)
    fingerprint = _fingerprint(config, sizes, target, draft)
    measure = functools.partial(
        measure_costs,
        pair,
        context_lengths(sizes.columns * sizes.page_size),
        fingerprint=fingerprint,
        use_tqdm=use_tqdm,
    )
    if config.compilation_cache_dir is None:
        return measure()
    path = pathlib.Path(config.compilation_cache_dir).expanduser() / f"costs-{_digest(fingerprint)}.json"
    with contextlib.suppress(OSError, ValueError):  # what cannot be read is measured again
        return CostTable.from_json(path.read_text(encoding="utf-8"), fingerprint)
    costs = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(costs.to_json(), encoding="utf-8")
    written.replace(path)
    return costs


def _fingerprint(config: Config, sizes: LaneSizes, target: Model, draft: Model | None) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "jax": jax.__version__,
        "topology": repr(config.topology),
        "sizes": repr(sizes),
        "dtype": config.model.dtype,
        "target": repr(target.config),
        "draft": config.speculation.method if draft is None else repr(draft.config),
    }


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]
