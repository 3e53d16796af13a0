"""Exact distributions of what the tiny model says, by enumeration, and samples laid out for a chi-square test."""

import jax.numpy as jnp
import numpy as np

from tests import doubles
from tests.doubles import VOCAB


def exact_distribution(prompt, length, *, temperature, top_p=1.0, top_k=0) -> dict[tuple[int, ...], float]:
    """Probability of every continuation, by enumeration with numpy filters."""
    exact = {(): 1.0}
    for _ in range(length):
        stems = list(exact)
        tokens = jnp.asarray([list(prompt) + list(stem) for stem in stems])
        logits = np.asarray(doubles.whole_logits(doubles.tiny_params(0), tokens)[:, -1], np.float64) / temperature
        grown = {}
        for stem, row in zip(stems, logits, strict=True):
            p = np.exp(row - row.max())
            p /= p.sum()
            order = np.argsort(-p)
            if top_k:
                p[order[top_k:]] = 0
            before = np.cumsum(p[order]) - p[order]
            p[order[before >= top_p * p.sum()]] = 0
            p /= p.sum()
            grown |= {(*stem, token): exact[stem] * p[token] for token in range(VOCAB) if p[token] > 0}
        exact = grown
    return exact


def pooled(outputs, exact, length, trials):
    """Counts and expectations by continuation; rare continuations share one cell, impossible ones must not occur."""
    marginal: dict[tuple[int, ...], float] = {}
    for tokens, probability in exact.items():
        marginal[tokens[:length]] = marginal.get(tokens[:length], 0.0) + probability
    seen = [tokens[:length] for tokens in outputs]
    assert set(seen) <= set(marginal), set(seen) - set(marginal)
    common = [tokens for tokens, probability in marginal.items() if probability * trials >= 8]
    counts = [seen.count(tokens) for tokens in common]
    expected = [marginal[tokens] * trials for tokens in common]
    if len(common) < len(marginal) and (rest := trials - sum(expected)) > 1:
        counts, expected = [*counts, trials - sum(counts)], [*expected, rest]
    scale = sum(counts) / sum(expected)
    return counts, [value * scale for value in expected]
