"""Measure block sizes on the device at hand and write its table.

  python -m pallas_kernels.tune --output=pallas_kernels/tuned        # on a GPU: nvidia_h200.json, or what it is
  python -m pallas_kernels.tune --output=DIR --specs=bundled_b8_512 --quick

For every shape of `arg_specs.py`, candidates around the rule's choice are compiled, checked against the specification,
and timed in turns; the fastest is kept, with all times beside it. A candidate that is wrong is an error, one that does
not compile is left out and named. Without a GPU the kernels are interpreted: that shows that the script runs, and its
table is for nobody.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend
from pallas_kernels.arg_specs import SPECS, Spec
from pallas_kernels.attention import BlockConfig, attention, config, reference
from pallas_kernels.attention.config import Case

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
FLUSH_BYTES = 256 * 2**20  # written between two runs: more than any cache holds


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


def entry(case: Case, chosen: BlockConfig, microseconds: dict[str, float]) -> dict[str, Any]:
    """Lay out a row of the table."""
    return {"case": case._asdict(), "config": dataclasses.asdict(chosen), "microseconds": microseconds}


def timed(run: Callable[[], Any], *, repeats: int, flush: Callable[[], Any]) -> list[float]:
    """Time a compiled call, in seconds, with the caches emptied before each; dispatch counts.

    Args:
      run: dispatches the call.
      repeats: calls.
      flush: overwrites the caches.
    """
    seconds = []
    for _ in range(repeats):
        jax.block_until_ready(flush())
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return seconds


def tune(spec: Spec, *, repeats: int, limit: int | None, seed: int) -> dict[str, Any]:
    """Measure the candidates of a shape; gives its row of the table.

    Raises:
      ValueError: a candidate is wrong.
    """
    arrays, scale = spec.arrays(seed), spec.head_dim**-0.5
    want = np.asarray(specification(spec, arrays), np.float32)
    flushed = jnp.zeros((FLUSH_BYTES // 4,), jnp.float32)
    flush = functools.partial(jax.jit(lambda x: x + 1.0).lower(flushed).compile(), flushed)
    runs: dict[BlockConfig, Callable[[], Any]] = {}
    for one in candidates(spec.case)[:limit]:
        call = functools.partial(attention, scale=scale, implementation="pallas", config=one)
        try:
            runs[one] = functools.partial(jax.jit(call).lower(*arrays).compile(), *arrays)
            got = np.asarray(runs[one](), np.float32)
        except Exception as error:  # what a compiler says has no common type
            runs.pop(one, None)
            print(f"{spec.name}: {one} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if not np.abs(got - want).max() <= TOLERANCE[spec.dtype]:
            raise ValueError(f"{spec.name}: {one} is wrong by {np.abs(got - want).max()}")
    seconds: dict[BlockConfig, list[float]] = {one: [] for one in runs}
    for _ in range(repeats):  # in turns, so that what changes on the machine strikes all
        for one, run in runs.items():
            seconds[one] += timed(run, repeats=1, flush=flush)
    medians = {one: 1e6 * statistics.median(times) for one, times in seconds.items()}
    chosen = min(medians, key=lambda one: medians[one])
    return entry(spec.case, chosen, {_label(one): round(medians[one], 2) for one in sorted(medians, key=medians.get)})


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
    rows = []
    for name in options.specs:
        rows.append(tune(SPECS[name], repeats=repeats, limit=limit, seed=options.seed))
        best = next(iter(rows[-1]["microseconds"].items()))
        print(f"{name}: {best[1]} us with {best[0]}", file=sys.stderr)
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
