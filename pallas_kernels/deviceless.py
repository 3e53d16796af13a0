"""Lower and compile for a GPU that is not there, and read what came of it.

Lowering needs nothing but JAX: it finds what the kernels' compiler refuses. Compiling to the machine code of a real
chip needs the CUDA plug-in and the compiler's wheels (`pip install -e '.[gpu-aot]'`), and no GPU; do it in a process of
its own, because a compiler that lacks a part may end the process. Not covered: speed, autotuning, races.

  JAX_PLATFORMS=cpu python -m pallas_kernels.deviceless     # a table of registers, shared memory and spills
"""

import argparse
import contextlib
import functools
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.arg_specs import SPECS, Spec
from pallas_kernels.attention import BlockConfig, attention

AXIS = "tensor"


class Chip(NamedTuple):
    """A GPU by its numbers, as OpenXLA describes them.

    Attributes:
      name: for tables.
      kind: as JAX names the device.
      num_cores: streaming multiprocessors.
      arch: of the assembler.
      block_shared_bytes: shared memory that one block may ask for.
      target: the rest of the compiler's description, as a text proto.
    """

    name: str
    kind: str
    num_cores: int
    arch: str
    block_shared_bytes: int
    target: str


_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} {features} }}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {core_shared} shared_memory_per_block_optin: {block_shared}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
"""

H200 = Chip(
    name="h200",
    kind="NVIDIA H200",
    num_cores=132,
    arch="sm_90a",
    block_shared_bytes=232448,
    target=_TARGET.format(
        major=9,
        features="feature_extension: ACCELERATED_FEATURES",
        cores=132,
        fpus=128,
        clock=1.98,
        core_shared=233472,
        block_shared=232448,
        bandwidth=4_800_000_000_000,
        l2=52_428_800,
        memory=151_397_597_184,
    ),
)
A100 = Chip(
    name="a100",
    kind="NVIDIA A100-SXM4-40GB",
    num_cores=108,
    arch="sm_80",
    block_shared_bytes=166912,
    target=_TARGET.format(
        major=8,
        features="",
        cores=108,
        fpus=64,
        clock=1.41,
        core_shared=167936,
        block_shared=166912,
        bandwidth=1_555_200_000_000,
        l2=41_943_040,
        memory=42_331_013_120,
    ),
)
CHIPS = {chip.name: chip for chip in (H200, A100)}


def lower(function: Callable[..., Any], *shapes: Any, chip: Chip, **jit_options: Any) -> str:
    """Lower a function for a chip, by an abstract device; gives the text.

    Args:
      function: is jitted.
      *shapes: trees of `jax.ShapeDtypeStruct`.
      chip: for which.
      **jit_options: of `jax.jit`.
    """
    device = AbstractDevice(device_kind=chip.kind, num_cores=chip.num_cores, platform="gpu")
    mesh = AbstractMesh((1,), (AXIS,), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function, **jit_options).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def make_mesh(chip: Chip, *, devices: int = 1) -> Mesh:
    """Make a mesh of chips that are not there, to compile for.

    Raises:
      RuntimeError: the CUDA plug-in is not installed.
    """
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=chip.target, topology=f"1x1x{devices}")
    except Exception as error:  # which one depends on what is missing
        raise RuntimeError(f"no GPU can be compiled for here (pip install -e '.[gpu-aot]'): {error}") from error
    return topologies.make_mesh(topology, (devices,), (AXIS,))


def on_mesh(shapes: Any, mesh: Mesh) -> Any:
    """Attach a place to a tree of shapes: a whole copy on each device of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), shapes)


class KernelUse(NamedTuple):
    """What a kernel takes of the chip, as the assembler says.

    Attributes:
      name: of its entry.
      registers: a thread.
      spill_bytes: written to and read back from memory for want of registers, a thread.
      stack_bytes: a thread.
      shared_bytes: a block.
      threads: a block.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int


class Thunk(NamedTuple):
    """One thing the compiled program does: a kernel, a copy, a loop.

    Attributes:
      depth: how many loops and branches it stands in.
      kind: as XLA names it: kKernel, kCustomKernel, kGemm, kCopy, kWhile, kCommandBuffer, ...
      text: the whole line.
    """

    depth: int
    kind: str
    text: str


class Compiled(NamedTuple):
    """A program compiled for a chip.

    Attributes:
      text: of its optimised HLO.
      temp_bytes: it needs beside arguments and results.
      alias_bytes: of arguments that it reuses for results.
      thunks: what it does, in order.
      uses: what its kernels take, by name.
    """

    text: str
    temp_bytes: int
    alias_bytes: int
    thunks: tuple[Thunk, ...]
    uses: dict[str, KernelUse]


def compile_for(mesh: Mesh, chip: Chip, function: Callable[..., Any], *shapes: Any) -> Compiled:
    """Compile a function for the chips of a mesh and assemble its kernels.

    Args:
      mesh: from `make_mesh`.
      chip: of the mesh.
      function: is jitted.
      *shapes: trees of `jax.ShapeDtypeStruct` with a place on the mesh.

    Raises:
      RuntimeError: a part of the compiler is missing.
    """
    with tempfile.TemporaryDirectory() as folder, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*shapes)
        return read(lowered.compile(compiler_options=dump_options(folder)), chip, folder)


def dump_options(folder: str) -> dict[str, Any]:
    """Options of XLA by which a compilation leaves in a folder what `read` looks for; one compilation a folder."""
    return {"xla_dump_to": folder}


def read(compiled: Any, chip: Chip, folder: str) -> Compiled:
    """Read what a compilation with `dump_options` has left behind, and assemble its kernels.

    Args:
      compiled: what it gave.
      chip: it was for.
      folder: of the options.

    Raises:
      RuntimeError: a part of the compiler is missing.
    """
    memory, dump = compiled.memory_analysis(), pathlib.Path(folder)
    sequence = max(dump.glob("*thunk_sequence*.txt"), key=lambda path: len(path.name), default=None)
    if sequence is None:
        raise RuntimeError("the compiler left no list of what the program does")
    thunks = read_thunks(sequence.read_text())
    launches = {thunk.text.split(" grid:")[0].split()[-1]: thunk for thunk in thunks if " grid:" in thunk.text}
    files = [path for path in sorted(dump.glob("*.ptx")) if path.stat().st_size]
    return Compiled(
        text=compiled.as_text() or "",
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        thunks=thunks,
        uses={use.name: use for path in files for use in assemble(path, chip, launches)},
    )


def read_thunks(text: str) -> tuple[Thunk, ...]:
    """Read XLA's list of what a program does; what is inside loops and branches is indented."""
    found = []
    for line in text.splitlines():
        match = re.match(r"^(\s*)\d+:\s+(k\w+)", line)
        if match:
            found.append(Thunk(depth=len(match[1]), kind=match[2], text=line.strip()))
    return tuple(found)


def assemble(ptx: pathlib.Path, chip: Chip, thunks: dict[str, Thunk]) -> Iterator[KernelUse]:
    """Run the assembler over a PTX file and read what it says of each kernel.

    Raises:
      RuntimeError: it is not installed, or refuses the file.
    """
    command = [str(find_assembler()), "-v", f"-arch={chip.arch}", "-o", "/dev/null", str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the assembler refuses {ptx.name}: {done.stderr}")
    for block in done.stderr.split("Compiling entry function")[1:]:
        name = block.split("'")[1]
        launch = thunks[name].text if name in thunks else ""
        yield KernelUse(
            name=name,
            registers=_number(block, r"Used (\d+) registers"),
            spill_bytes=_number(block, r"(\d+) bytes spill stores") + _number(block, r"(\d+) bytes spill loads"),
            stack_bytes=_number(block, r"(\d+) bytes stack frame"),
            shared_bytes=max(_number(block, r"(\d+) bytes smem"), _number(launch, r"shared_memory: (\d+)")),
            threads=_number(launch, r"threads: \[(\d+)"),
        )


def _number(text: str, pattern: str) -> int:
    """Read a number out of what a tool has printed; 0 where it does not say."""
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def find_assembler() -> pathlib.Path:
    """Find the assembler among the installed wheels.

    Raises:
      RuntimeError: it is not installed.
    """
    with contextlib.suppress(ImportError):
        wheels = importlib.import_module("nvidia")  # a namespace of the compiler's wheels, absent without them
        for folder in wheels.__path__:
            for path in sorted(pathlib.Path(folder).glob("**/bin/ptxas")):
                return path
    raise RuntimeError("ptxas is not installed (pip install -e '.[gpu-aot]')")


def attention_uses(mesh: Mesh, chip: Chip, spec: Spec, config: BlockConfig | None = None) -> list[KernelUse]:
    """Compile a shape of attention and say what its kernels take.

    Args:
      mesh: from `make_mesh`.
      chip: of the mesh.
      spec: the shape.
      config: block sizes; None for those of the rule, or of a tuned table.
    """
    call = functools.partial(attention, scale=spec.head_dim**-0.5, implementation="pallas", config=config)
    compiled = compile_for(mesh, chip, call, *on_mesh(spec.shapes(), mesh))
    return [use for name, use in sorted(compiled.uses.items()) if name.startswith("paged_")]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the kernels take for every shape, as a table or as JSON lines; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--specs", nargs="*", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--json", action="store_true", help="a line of JSON each")
    options = parser.parse_args(argv)
    if not options.json:
        print("| chip | shape | kernel | registers | spilled, bytes | shared memory, bytes | threads |")
        print("|---|---|---|---|---|---|---|")
    for name in options.chips:
        chip = CHIPS[name]
        mesh = make_mesh(chip)
        for spec in options.specs:
            for use in attention_uses(mesh, chip, SPECS[spec]):
                if options.json:
                    print(json.dumps({"chip": name, "spec": spec, **use._asdict()}), flush=True)
                else:
                    fields = (use.name, use.registers, use.spill_bytes, use.shared_bytes, use.threads)
                    print(f"| {name} | {spec} | " + " | ".join(map(str, fields)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
