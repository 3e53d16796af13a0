"""What is read out of a program that was compiled for a GPU; tests/pallas_kernels/test_deviceless.py compiles some."""

from experiments import compile_for_gpu
from pallas_kernels import deviceless


def test_the_largest_copy_is_found_among_what_only_looks_like_one():
    lines = (
        "%copy.1 = f32[8,128]{1,0} copy(%a)",
        "%copy-start.2 = (bf16[4096,1024]{1,0}, bf16[4096,1024]{1,0}, u32[]) copy-start(%b)",
        "%fusion.3 = bf16[9000,9000]{1,0} fusion(%copy.1), kind=kLoop, calls=%copy_computation",
        "%copy.4 = pred[] copy(%c)",
    )
    assert compile_for_gpu.largest_copy("\n".join(lines)) == 4096 * 1024 * 2
    assert compile_for_gpu.largest_copy(lines[0]) == 8 * 128 * 4
    assert compile_for_gpu.largest_copy(lines[2]) == 0


def test_launches_are_kernels_and_not_loops_or_copies():
    lines = (
        "001: kWhile w",
        "  001: kKernel a grid: [1, 1, 1]",
        "  002: kCustomKernel b grid: [1, 1, 1]",
        "  003: kCopy c",
    )
    assert compile_for_gpu.launches(deviceless.read_thunks("\n".join(lines))).total() == 2
