"""Time attention kernels on the device at hand, against what else computes the same.

COMMAND   python -m experiments.bench_attention --output=benchmarks/h200/attention.json
          (options: --specs=llama3_8b_b8_4k,... --repeats=20 --tiny)
DURATION  on a GPU about five minutes for all shapes; with --tiny on a CPU about a minute.
EXPECTED  exit code 0; each implementation agrees with the specification or its row says by how much it does not.

Inputs are random, and calls under JAX get one of several caches in turn, together larger than any L2, so that nothing
is read from a cache (torch is given one). A measurement is a row of calls inside one program, timed from the host;
programs are timed in turns. Bytes are those of keys and values, each once. The yardsticks are measured in the same run:
a copy for bandwidth, a matrix product for arithmetic. Without a GPU kernels are interpreted: figures then say that the
script runs, and nothing else.

Exit codes: 0 done; 1 an implementation is wrong; 2 arguments are unusable.
"""

import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import bench_attention_peers, common
from experiments.bench_attention_peers import Contender
from experiments.bench_common import Yardstick, measure_yardstick, spread
from pallas_kernels import backend, measure, tune
from pallas_kernels.arg_specs import SPECS, Spec

TINY = Spec("tiny_b2_128", batch=2, tokens=1, context=127, heads=4, kv_heads=2, head_dim=64, dtype="float32")
TINY_VERIFY = TINY._replace(name="tiny_b2_128_t4", tokens=4, context=124)
TINY_PREFILL = TINY._replace(name="tiny_prefill_128", tokens=128, context=0)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_string("output", None, "JSON file.", required=True, flag_values=values)
    flags.DEFINE_list("specs", list(SPECS), "Shapes, of pallas_kernels/arg_specs.py.", flag_values=values)
    flags.DEFINE_integer("repeats", 20, "Measurements of each figure.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("tiny", False, "Three tiny shapes instead: does it run?", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the inputs.", lower_bound=0, flag_values=values)


def loop(contender: Contender, spec: Spec, seed: int) -> Callable[[], Any]:
    """Compile calls in a row, each on the next of several caches; gives what dispatches them."""
    queries, _, _, table, start = spec.arrays(seed)
    count = measure.num_caches(spec.kv_bytes)
    caches = [contender.prepare(*spec.arrays(seed + index)[1:3], table) for index in range(count)]
    return measure.chain(contender.call, queries, caches, table, start)


def contenders(spec: Spec) -> Mapping[str, Contender]:
    """List who computes this shape under JAX: ours, and the peers that can."""
    own = {name: bench_attention_peers.ours(spec, name) for name in ("pallas", "xla")}
    return {**own, **bench_attention_peers.able(spec)}


def compare(spec: Spec, yardstick: Yardstick, *, repeats: int, seed: int) -> dict[str, Any]:
    """Measure all implementations of a shape in turns; gives its row."""
    queries, keys, values, table, start = arrays = spec.arrays(seed)
    want = np.asarray(tune.specification(spec, arrays), np.float32)
    errors, runs, refused = {}, {}, {}
    for name, contender in contenders(spec).items():
        try:
            cache = contender.prepare(keys, values, table)
            got = np.asarray(jax.jit(contender.call)(queries, cache, table, start), np.float32)
            errors[name], runs[name] = float(np.abs(got - want).max()), loop(contender, spec, seed)
        except Exception as error:  # what a compiler or a peer says has no common type
            refused[name] = str(error).splitlines()[0][:200]
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(measure.seconds(run))
    torch = bench_attention_peers.torch_sdpa(spec, arrays, repeats=repeats, calls=measure.CALLS)
    if torch is not None:
        seconds["torch_sdpa"], errors["torch_sdpa"] = torch[0], float(np.abs(torch[1] - want).max())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "spec": spec.name,
        "kv_bytes": spec.kv_bytes,
        "flops": spec.flops,
        "microseconds": {name: spread([1e6 * value for value in values]) for name, values in seconds.items()},
        "tb_per_s": {name: spec.kv_bytes / value / 1e12 for name, value in medians.items()},
        "of_copy_bandwidth": {name: spec.kv_bytes / value / yardstick.bytes_per_s for name, value in medians.items()},
        "tflop_per_s": {name: spec.flops / value / 1e12 for name, value in medians.items()},
        "of_matrix_product": {name: spec.flops / value / yardstick.flops_per_s for name, value in medians.items()},
        "pallas_over": {name: value / medians["pallas"] for name, value in medians.items() if "pallas" in medians},
        "largest_error": errors,
        "wrong": sorted(name for name, error in errors.items() if not error <= measure.TOLERANCE[spec.dtype]),
        "refused": refused,
    }


def summary(row: Mapping[str, Any]) -> str:
    """Say a row in a line."""
    parts = []
    for name, figures in row["microseconds"].items():
        share = f"{100 * row['of_copy_bandwidth'][name]:.0f} % of copy, {row['tflop_per_s'][name]:.1f} TFLOP/s"
        parts.append(f"{name} {figures['median']:.1f} us ({row['tb_per_s'][name]:.2f} TB/s, {share})")
    return f"{row['spec']}: " + "; ".join(parts)


def main(argv: Sequence[str]) -> None:
    """Measure and write after each shape."""
    del argv
    values = flags.FLAGS
    unknown = sorted(set(values.specs) - set(SPECS))
    if unknown:
        common.stop(f"unknown shape {unknown[0]!r}; known: {', '.join(SPECS)}")
    path = pathlib.Path(values.output)
    if not path.parent.is_dir():
        common.stop(f"cannot write {str(path)!r}: there is no such folder")
    specs = (TINY, TINY_VERIFY, TINY_PREFILL) if values.tiny else tuple(map(SPECS.__getitem__, values.specs))
    yardstick = measure_yardstick(values.repeats, tiny=values.tiny)
    command = ("python", "-m", "experiments.bench_attention", *sys.argv[1:])
    record = {
        "environment": common.environment(share_devices=False, command=command),
        "interpreted": backend.gpu() is None,
        "seed": values.seed,
        "repeats": values.repeats,
        "yardstick": yardstick._asdict(),
        "rows": [],
    }
    print(f"copy {yardstick.bytes_per_s / 1e12:.3f} TB/s, product {yardstick.flops_per_s / 1e12:.1f} TFLOP/s")
    for spec in specs:
        row = compare(spec, yardstick, repeats=values.repeats, seed=values.seed)
        record["rows"].append(row)
        common.write_json(path, record)
        print(summary(row), flush=True)
        for name, reason in row["refused"].items():
            print(f"  {name} does not: {reason}", flush=True)
    wrong = [f"{row['spec']}: {name}" for row in record["rows"] for name in row["wrong"]]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
