"""SpecuStream: speculative decoding, lossless and in one jitted program a depth."""
