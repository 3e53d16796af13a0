"""Compile the engine's programs for a GPU that is not there, and say what they would do on it.

COMMAND   JAX_PLATFORMS=cpu python -m experiments.compile_for_gpu --chip=h200 --shape=llama3_8b --layers=4
          (options: --draft=llama3_1b --depths=0,4 --slots=8 --max_model_len=4096 --devices=2 --output=FILE.json)
DURATION  some seconds a program.
EXPECTED  exit code 0, and for each program: that attention is our kernels, kernels a layer, bytes that are copied or
          needed beside the arguments, and the bytes of the cache that are changed in place.

Needs the CUDA plug-in and the compiler's wheels (`pip install -e '.[gpu-aot]'`), and no GPU. Kernels a layer are the
difference between programs of one layer more and less, so that what is there once a token does not count.

Exit codes: 0 done; 1 attention is not our kernels, or pages are not changed in place; 2 arguments are unusable or the
compiler is missing.
"""

import collections
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import common, model_shapes
from pallas_kernels import backend, deviceless
from streamserve import models, parts
from streamserve.config import PipeServeConfig, SpeculationConfig
from streamserve.kv import cache
from streamserve.mesh import PairMeshes
from streamserve.models.load import Model, load_config
from streamserve.models.sharding import param_shardings
from streamserve.pipeserve import PairModels, lane_sizes
from streamserve.pipeserve.compiler import Compiler
from streamserve.pipeserve.shapes import PairShapes
from streamserve.specustream.drafters import none

LAUNCHES = ("kKernel", "kCustomKernel", "kGemm", "kCublasLtMatmul", "kCuDnn", "kCustomCall", "kMemset")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags; on call and not on import, since other scripts have flags of the same names."""
    flags.DEFINE_enum("chip", "h200", list(deviceless.CHIPS), "Which GPU.", flag_values=values)
    flags.DEFINE_string("shape", "llama3_8b", "Target, of experiments/model_shapes.py.", flag_values=values)
    flags.DEFINE_string("draft", "llama3_1b", "Draft model, likewise.", flag_values=values)
    flags.DEFINE_integer("layers", 4, "Of the target; a draft has half.", lower_bound=2, flag_values=values)
    flags.DEFINE_list("depths", ["0", "4"], "Depths of speculation whose programs are compiled.", flag_values=values)
    flags.DEFINE_integer("slots", 8, "Decode batch.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_model_len", 4096, "Tokens of a request.", lower_bound=64, flag_values=values)
    flags.DEFINE_integer("devices", 1, "Of the mesh: tensor parallelism.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("dtype", "bfloat16", "Of weights and cache.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file.", flag_values=values)


class Plan(NamedTuple):
    """What is compiled: fields as the flags."""

    chip: deviceless.Chip
    mesh: jax.sharding.Mesh
    target: pathlib.Path
    draft: pathlib.Path | None
    depths: tuple[int, ...]
    slots: int
    max_model_len: int
    dtype: str


def abstract_model(path: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str) -> Model:
    """Describe a model on a mesh: all but its numbers."""
    config, kind = load_config(str(path)), jnp.dtype(dtype)
    shapes = models.abstract_params(config, kind)
    place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)  # noqa: E731
    params = jax.tree.map(place, shapes, param_shardings(shapes, mesh))
    return Model(config, models.forward_fns(config), params, models.kv_shape(config, kind))


def make_compiler(plan: Plan, folder: str) -> tuple[Compiler, int]:
    """Make what compiles the programs of a colocated pair; gives it and the bytes of all pages."""
    target = abstract_model(plan.target, plan.mesh, plan.dtype)
    draft = None if plan.draft is None else abstract_model(plan.draft, plan.mesh, plan.dtype)
    deepest = max(plan.depths)
    speculation = SpeculationConfig()
    if deepest:
        tiers = tuple(sorted(set(plan.depths)))
        speculation = SpeculationConfig(
            method="draft_model", model="draft", num_speculative_tokens=deepest, max_depth=max(8, deepest), tiers=tiers
        )
    drafter = none() if draft is None else parts.make_drafter(speculation, draft, target.config.vocab_size)
    params = (target.params, () if draft is None else draft.params)
    pair = PairModels(
        target=target.fns,
        kv_shape=target.kv_shape,
        vocab_size=target.config.vocab_size,
        drafter=drafter,
        verifier=parts.make_verifier(speculation),
        prefill_params=params,
        decode_params=params,
    )
    config = PipeServeConfig(max_num_seqs=plan.slots, rounds_per_tick=2, prefill_buckets=(512,))
    sizes = lane_sizes(config, max_model_len=plan.max_model_len, tiers=plan.depths)
    shapes = PairShapes(pair, config, sizes, colocated=True)
    meshes = PairMeshes(plan.mesh, plan.mesh, colocated=True)
    compiler = Compiler(meshes, pair, config, sizes, shapes, xla_options=deviceless.dump_options(folder))
    return compiler, cache.num_bytes(jax.eval_shape(shapes.decode_pools)) // plan.mesh.size


def compiled(plan: Plan, name: str, run: Callable[[Compiler], Any]) -> tuple[deviceless.Compiled, int]:
    """Compile one program; gives it and the bytes of pages that it must change in place."""
    print(f"compiling {name} of {plan.target.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        compiler, pool_bytes = make_compiler(plan, folder)
        return deviceless.read(run(compiler), plan.chip, folder), pool_bytes


def launches(thunks: Sequence[deviceless.Thunk]) -> collections.Counter[str]:
    """Count what is launched, by kind, each once however often a loop repeats it."""
    return collections.Counter(thunk.kind for thunk in thunks if thunk.kind in LAUNCHES)


def largest_copy(text: str) -> int:
    """Find the largest array, in bytes, that the compiled program copies."""
    found = [0]
    for kind, dims in re.findall(r"= \(?(\w+)\[([\d,]*)\][^=\n]*? copy(?:-start)?\(", text):
        size = _SIZES.get(kind, 4)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        found.append(size)
    return max(found)


def describe(plan: Plan, fewer: Plan, name: str, run: Callable[[Compiler], Any]) -> dict[str, Any]:
    """Compile a program of a plan and one with a layer less, and say what it does.

    Args:
      plan: what is compiled.
      fewer: the same with a target of one layer less.
      name: for the table.
      run: compiles it.
    """
    whole, pool_bytes = compiled(plan, name, run)
    less, _ = compiled(fewer, name, run)
    by_kind = launches(whole.thunks)
    return {
        "program": name,
        "kernels_a_layer": by_kind.total() - launches(less.thunks).total(),
        "launches": dict(by_kind),
        "attention_kernels": sorted({use for use in whole.uses if use.startswith("paged_")}),
        "custom_calls": whole.text.count(backend.CUSTOM_CALL),
        "largest_copy_bytes": largest_copy(whole.text),
        "temp_bytes": whole.temp_bytes,
        "alias_bytes": whole.alias_bytes,
        "pool_bytes": pool_bytes,
        "spill_bytes": {use.name: use.spill_bytes for use in whole.uses.values() if use.spill_bytes},
    }


def describe_all(plan: Plan, fewer: Plan) -> list[dict[str, Any]]:
    """Describe the ticks of a plan, and a prefill call."""
    rows = []
    for depth in plan.depths:
        step = lambda compiler, depth=depth: compiler.step(plan.slots, depth)[0]  # noqa: E731
        rows.append(describe(plan, fewer, f"decode of {plan.slots} slots at depth {depth}", step))
    rows.append(describe(plan, fewer, "prefill of 512 tokens", lambda compiler: compiler.prefill(8)))
    return rows


def main(argv: Sequence[str]) -> None:
    """Compile and print a table."""
    del argv
    values = flags.FLAGS
    chip = deviceless.CHIPS[values.chip]
    depths = tuple(sorted(map(int, values.depths)))
    with tempfile.TemporaryDirectory() as base:
        folder = pathlib.Path(base)
        try:
            mesh = deviceless.make_mesh(chip, devices=values.devices)
            draft = model_shapes.write(folder, values.draft, layers=values.layers // 2) if max(depths) else None
            targets = [
                model_shapes.write(folder, values.shape, layers=count) for count in (values.layers, values.layers - 1)
            ]
        except (common.RunError, RuntimeError) as error:
            common.stop(str(error))
        plan = Plan(chip, mesh, targets[0], draft, depths, values.slots, values.max_model_len, values.dtype)
        rows = describe_all(plan, plan._replace(target=targets[1]))
    for row in rows:
        print(f"{row['program']}: {row['kernels_a_layer']} kernels a layer, by {', '.join(row['attention_kernels'])}")
        print(f"  largest copy {row['largest_copy_bytes']:,} bytes, beside arguments {row['temp_bytes']:,} bytes")
        print(f"  changed in place {row['alias_bytes']:,} bytes, of them pages {row['pool_bytes']:,}")
    for row in (bad := [row for row in rows if not row["attention_kernels"] or row["alias_bytes"] < row["pool_bytes"]]):
        print(f"{row['program']}: attention is not by our kernels, or pages are copied", file=sys.stderr)
    if values.output is not None:
        command = ("python", "-m", "experiments.compile_for_gpu", *sys.argv[1:])
        record = common.environment(share_devices=False, command=command)
        common.write_json(pathlib.Path(values.output), {"environment": record, "chip": chip.name, "programs": rows})
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
