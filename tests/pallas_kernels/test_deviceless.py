"""The kernels for GPUs that are not there: every shape is lowered, and compiled where a compiler is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import arg_specs, backend, deviceless, tune
from pallas_kernels.attention import KVScales, attention, rotate_and_write

ROOT = pathlib.Path(__file__).parents[2]
HAS_COMPILER = all(map(importlib.util.find_spec, ("jax_plugins", "nvidia"))) and bool(
    importlib.util.find_spec("jax_plugins.xla_cuda13")
)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="pip install -e '.[gpu-aot]'; .ci/run does")


def _lowered(spec, chip, config=None):
    def call(*arrays):
        return attention(*arrays, scale=1.0, config=config)

    return deviceless.lower(call, *spec.shapes(), chip=chip)


@pytest.mark.parametrize("chip", deviceless.CHIPS.values(), ids=deviceless.CHIPS)
@pytest.mark.parametrize("spec", arg_specs.SPECS.values(), ids=arg_specs.SPECS)
def test_every_shape_becomes_kernels_on_a_gpu_without_being_asked_for(spec, chip):
    text = _lowered(spec, chip)
    names = ("paged_decode", "paged_decode_merge") if spec.case.decodes else ("paged_prefill",)
    assert text.count(backend.CUSTOM_CALL) == len(names)
    for name in names:
        assert f'name = "{name}"' in text


@pytest.mark.parametrize("name", ["llama3_8b_b8_4k", "llama3_8b_b8_16k_t8", "llama3_8b_tiles_b8", "bundled_b8_512_t5"])
def test_candidates_of_tuning_are_lowered(name):
    spec = arg_specs.SPECS[name]
    found = tune.candidates(spec.case)
    assert len(found) > 10
    for config in found[::5]:
        assert backend.CUSTOM_CALL in _lowered(spec, deviceless.H200, config)


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize(
    ("changes", "pages", "options"),
    [
        ({}, "int8", {}),
        ({}, "float8_e4m3fn", {}),
        ({}, "", {"window": 1000}),
        ({}, "", {"soft_cap": 30.0}),
        ({"head_dim": 256, "heads": 16}, "", {}),
        ({"heads": 64}, "", {}),
        ({"dtype": "float16"}, "", {}),
    ],
)
def test_every_format_and_option_is_lowered(changes, pages, options, tokens):
    spec = arg_specs.SPECS["llama3_8b_b8_4k"]._replace(tokens=tokens, context=512, **changes)
    queries, keys, values, table, start = spec.shapes()
    scales = None
    if pages:
        keys = values = jax.ShapeDtypeStruct(keys.shape, jnp.dtype(pages))
        scales = KVScales(*[jax.ShapeDtypeStruct(keys.shape[:3], jnp.float32)] * 2)

    def call(*arrays):
        return attention(*arrays[:5], scales=arrays[5], scale=1.0, implementation="pallas", **options)

    text = deviceless.lower(call, queries, keys, values, table, start, scales, chip=deviceless.H200)
    assert backend.CUSTOM_CALL in text


def test_the_write_becomes_one_kernel_in_place():
    shape = jax.ShapeDtypeStruct
    pages = shape((9, 8, 64, 128), jnp.bfloat16)
    arguments = (
        shape((8, 5, 8, 6, 128), jnp.bfloat16),
        shape((8, 5, 64), jnp.float32),
        shape((8, 5, 64), jnp.float32),
        pages,
        pages,
        shape((8, 2), jnp.int32),
        shape((8,), jnp.int32),
    )
    text = deviceless.lower(rotate_and_write, *arguments, chip=deviceless.H200, donate_argnums=(3, 4))
    assert text.count(backend.CUSTOM_CALL) == 1
    call = next(line for line in text.splitlines() if backend.CUSTOM_CALL in line)
    assert call.count("operand_index = ") == 2, "keys and values"


def test_what_no_kernel_does_goes_through_xla_on_a_gpu():
    spec = arg_specs.SPECS["bundled_b8_512"]._replace(head_dim=96)
    assert backend.CUSTOM_CALL not in _lowered(spec, deviceless.H200)
    with pytest.raises(NotImplementedError, match="head size 96"):
        deviceless.lower(
            lambda *arrays: attention(*arrays, scale=1.0, implementation="pallas"), *spec.shapes(), chip=deviceless.H200
        )


def test_on_a_cpu_nothing_becomes_a_kernel():
    spec = arg_specs.SPECS["bundled_b8_512"]
    text = jax.jit(lambda *arrays: attention(*arrays, scale=1.0)).lower(*spec.shapes()).as_text()
    assert backend.CUSTOM_CALL not in text


def test_lists_of_what_a_program_does_are_read():
    lines = (
        "001:  kWhile [x] while.1",
        "  001:    kKernel [y] fusion.1 grid: [4, 1, 1]",
        "  002:    kCopy [z] c.3",
        "no",
    )
    text = "\n".join(lines)
    thunks = deviceless.read_thunks(text)
    assert [(thunk.depth, thunk.kind) for thunk in thunks] == [(0, "kWhile"), (2, "kKernel"), (2, "kCopy")]


def _run(module, *arguments):
    """Run a command in a process of its own, whose compiler is not told, as this one's is, to leave out its work."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@needs_compiler
@pytest.mark.parametrize("chip", deviceless.CHIPS.values(), ids=deviceless.CHIPS)
def test_every_shape_compiles_to_machine_code_within_the_chips_limits(chip):
    done = _run("pallas_kernels.deviceless", "--json", "--chips", chip.name)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["spec"] for row in rows} == set(arg_specs.SPECS)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= chip.block_shared_bytes, row
        assert row["threads"] >= 64, row


@needs_compiler
@pytest.mark.parametrize("devices", [1, 2])
def test_the_engines_programs_run_the_kernels_and_copy_neither_weights_nor_pages(devices, tmp_path):
    path = tmp_path / "programs.json"
    depths = "0,2" if devices == 1 else "0"
    options = ["--layers=2", f"--depths={depths}", "--slots=2", "--max_model_len=256", f"--devices={devices}"]
    _run("experiments.compile_for_gpu", *options, f"--output={path}")
    *ticks, prefill = json.loads(path.read_text())["programs"]
    smallest_weight = 4096 * 1024 * 2 // devices  # of a layer's matrices: keys or values of the target
    for program in (*ticks, prefill):
        assert 0 < program["kernels_a_layer"] <= 19, program
        assert program["largest_copy_bytes"] < smallest_weight, program
        assert program["alias_bytes"] >= program["pool_bytes"] > 0, program
        assert not program["spill_bytes"], program
    for tick in ticks:
        assert {"paged_decode", "paged_decode_merge"} <= set(tick["attention_kernels"])
    assert "paged_prefill" in prefill["attention_kernels"]
