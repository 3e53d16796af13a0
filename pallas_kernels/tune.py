"""Measure block sizes on the device at hand and write its table.

  python -m pallas_kernels.tune --output=pallas_kernels/tuned        # on a GPU: nvidia_h200.json, or what it is
  python -m pallas_kernels.tune --output=DIR --specs=bundled_b8_512 --quick

Shapes of `arg_specs.py` that share their block sizes (all but batch and context) are measured together: candidates
around the rule's choice are compiled, checked against the specification, and timed in turns; kept is the one that is
fastest on the geometric mean over the shapes, with all times beside it. A candidate that is wrong is an error; one that
does not run for all shapes is left out and named. Without a GPU the kernels are interpreted: that shows that the script
runs, and its table is for nobody.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, measure
from pallas_kernels.arg_specs import SPECS, Spec
from pallas_kernels.attention import BlockConfig, attention, config, reference
from pallas_kernels.attention.config import Case


def candidates(case: Case) -> tuple[BlockConfig, ...]:
    """List block sizes around the rule's choice, that first."""
    base = config.heuristic(case)
    found = [base]
    for keys in (base.block_keys // 2, base.block_keys, base.block_keys * 2):
        for warps in (4, 8):
            for stages in (2, 3, 4):
                for programs in (1, 2, 4) if case.decodes else (base.programs_per_core,):
                    fields = {"block_keys": keys, "num_warps": warps, "num_stages": stages}
                    if keys >= backend.MIN_DOT:
                        found.append(dataclasses.replace(base, programs_per_core=programs, **fields))
    if not case.decodes:
        found += [dataclasses.replace(base, block_rows=rows) for rows in (32, 64, 128) if rows <= case.rows]
    return tuple(dict.fromkeys(found))


def entry(case: Case, chosen: BlockConfig, microseconds: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Lay out a row of the table."""
    return {"case": case.shared._asdict(), "config": dataclasses.asdict(chosen), "microseconds": microseconds}


def tune(specs: Sequence[Spec], *, repeats: int, limit: int | None, seed: int) -> dict[str, Any]:
    """Measure the candidates of shapes that share their block sizes; gives their row of the table.

    Raises:
      ValueError: a candidate is wrong, or none runs.
    """
    found = candidates(specs[0].case)[:limit]
    times: dict[BlockConfig, dict[str, float]] = {one: {} for one in found}
    for spec in specs:
        for one, value in _times(spec, found, repeats=repeats, seed=seed).items():
            times[one][spec.name] = value
    whole = {one: by_spec for one, by_spec in times.items() if len(by_spec) == len(specs)}
    if not whole:
        raise ValueError(f"no candidate runs for {', '.join(spec.name for spec in specs)}")
    ranked = sorted(whole, key=lambda one: statistics.geometric_mean(whole[one].values()))
    told = {_label(one): {name: round(1e6 * value, 2) for name, value in whole[one].items()} for one in ranked}
    return entry(specs[0].case, ranked[0], told)


def _times(spec: Spec, found: Sequence[BlockConfig], *, repeats: int, seed: int) -> dict[BlockConfig, float]:
    """Median seconds of a call by candidate, for one shape."""
    queries, keys, values, table, start = arrays = spec.arrays(seed)
    want = np.asarray(specification(spec, arrays), np.float32)
    others = [spec.arrays(seed + index)[1:3] for index in range(1, measure.num_caches(spec.kv_bytes))]
    runs: dict[BlockConfig, Callable[[], Any]] = {}
    for one in found:

        def call(queries: Any, cache: Any, table: Any, start: Any, one: BlockConfig = one) -> jax.Array:
            options = {"scale": spec.head_dim**-0.5, "implementation": "pallas", "config": one}
            return attention(queries, cache[0], cache[1], table, start, **options)

        try:
            got = np.asarray(jax.jit(call)(queries, (keys, values), table, start), np.float32)
            runs[one] = measure.chain(call, queries, [(keys, values), *others], table, start)
        except Exception as error:  # what a compiler says has no common type
            print(f"{spec.name}: {one} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if not np.abs(got - want).max() <= measure.TOLERANCE[spec.dtype]:
            raise ValueError(f"{spec.name}: {one} is wrong by {np.abs(got - want).max()}")
    seconds: dict[BlockConfig, list[float]] = {one: [] for one in runs}
    for turn in range(repeats + 1):  # in turns: what changes on the machine strikes all; the first does not count
        for one, run in runs.items():
            value = measure.seconds(run)
            seconds[one] += [value] if turn else []
    return {one: statistics.median(values) for one, values in seconds.items()}


def specification(spec: Spec, arrays: Sequence[jax.Array]) -> jax.Array:
    """Compute what is right; long prompts a row at a time and in blocks, since all scores would fill the memory."""
    scale = spec.head_dim**-0.5
    if spec.tokens < 1024:
        return jax.jit(functools.partial(reference.attention, scale=scale))(*arrays)
    xla = jax.jit(functools.partial(attention, scale=scale, implementation="xla"))
    q, k, v, table, start = arrays
    rows = [xla(q[row : row + 1], k, v, table[row : row + 1], start[row : row + 1]) for row in range(spec.batch)]
    return jnp.concatenate(rows)


def _label(one: BlockConfig) -> str:
    return ",".join(f"{name}={value}" for name, value in dataclasses.asdict(one).items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the table")
    parser.add_argument("--specs", nargs="*", default=list(SPECS), choices=list(SPECS), help="shapes; all by default")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two candidates, two repeats: does it run?")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    gpu = backend.gpu()
    repeats, limit = (2, 2) if options.quick else (options.repeats, None)
    groups: dict[Case, list[Spec]] = {}
    for name in options.specs:
        groups.setdefault(SPECS[name].case.shared, []).append(SPECS[name])
    rows = []
    for specs in groups.values():
        rows.append(tune(specs, repeats=repeats, limit=limit, seed=options.seed))
        label, microseconds = next(iter(rows[-1]["microseconds"].items()))
        print(f"{label}: {microseconds} us", file=sys.stderr)
    record = {
        "device": {"kind": device.device_kind, "num_cores": 0 if gpu is None else gpu.num_cores},
        "interpreted": gpu is None,
        "versions": {"jax": jax.__version__},
        "seed": options.seed,
        "repeats": repeats,
        "entries": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / backend.file_name(device.device_kind)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
