"""Packing: what comes out is what went in, bit for bit, from the host into programs and back."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from streamserve import sampling
from streamserve.pipeserve import packing
from streamserve.sampling_params import SamplingParams
from streamserve.types import Request


def _record(batch):
    rng = np.random.default_rng(0)
    return {
        "counts": rng.integers(-(2**31), 2**31 - 1, (batch, 5), dtype=np.int32),
        "flag": rng.random((batch,)) < 0.5,
        "key": rng.integers(0, 2**32 - 1, (batch, 2), dtype=np.uint32),
        "nothing": np.zeros((batch, 0), np.float32),
        "seen": rng.random((batch, 3, 7)) < 0.5,
        "weights": np.resize(np.array([np.nan, -0.0, np.inf, 1e-45, -1.5], np.float32), (batch, 2, 2)),
    }


def _bits(tree):
    return [(leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


class PackingTest(parameterized.TestCase):
    @parameterized.product(batch=(1, 3), packs=(packing.pack, jax.jit(packing.pack)), on_host=(True, False))
    def test_what_is_unpacked_is_what_was_packed(self, batch, packs, on_host):
        record = _record(batch)
        packed = packs(record)
        self.assertEqual(packed.words.shape, (batch, 5 + 2 + 4))
        self.assertEqual(packed.flags.shape, (batch, 1 + 3 * 7))
        if on_host:
            got = packing.unpack(packing.Packed(*(np.asarray(part) for part in packed)), record)
        else:
            got = jax.jit(lambda packed: packing.unpack(packed, record))(packed)
        self.assertEqual(_bits(got), _bits(record))

    def test_host_and_program_lay_out_alike(self):
        request = Request(
            request_id="a", prompt_token_ids=(1,), params=SamplingParams(top_p=0.9), seed=7, stop_ids=(3,)
        )
        row = sampling.make_row(request, max_stop_ids=2, max_logit_bias=3)
        host, program = packing.pack(row), jax.jit(packing.pack)(row)
        self.assertIsInstance(host.words, np.ndarray)
        self.assertEqual(_bits(host), _bits(program))

    def test_other_widths_are_refused(self):
        with self.assertRaisesRegex(AssertionError, "bfloat16 is not of 32 bits"):
            packing.pack({"weights": jnp.zeros((1, 2), jnp.bfloat16)})
