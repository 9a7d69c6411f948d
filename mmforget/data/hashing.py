"""Uniform numbers that are a pure function of a sample id: the base of all frozen draws."""

from __future__ import annotations

import numpy as np

from mmforget.seeds import derive


def uniform(ids: np.ndarray, seed: int, purpose: str, *keys: int | str) -> np.ndarray:
    """Draw one number per id that depends on nothing but the id, the seed, the purpose and keys.

    The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
    generators", 2014) mixes the bits, vectorised over the ids; a generator per sample would cost
    some 100 times as much.

    Args:
        ids: (N,) integers.
        seed: base seed.
        purpose: what the numbers are for.
        keys: anything else they shall depend on, for example the epoch.

    Returns:
        (N,) float64 in [0, 1).
    """
    key = np.uint64(derive(seed, purpose, *keys))
    mixed = _mix(_mix(np.asarray(ids, dtype=np.int64).view(np.uint64)) ^ key)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) / 2**53)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every input bit over all 64 output bits; arithmetic is modulo 2**64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
