"""Random numbers as pure functions of integers, so that nothing about them has to be saved.

A value is the splitmix64 finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014;
constants of Stafford's variant 13) folded over its arguments. Unlike the generators of a library, it is the same in
every version of everything, for any order of evaluation.
"""

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalize(z: UInt64) -> UInt64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(*key: int | npt.NDArray[np.integer]) -> UInt64:
    """Uniform uint64 for each element of the broadcast `key`."""
    with np.errstate(over="ignore"):
        value = np.zeros(1, dtype=np.uint64)
        for part in key:
            value = _finalize((value ^ np.asarray(part).astype(np.uint64)) + _GOLDEN)
    return value


def uniform(*key: int | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Uniform float64 in [0, 1) for each element of the broadcast `key`."""
    return (bits(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1, int64 [n]."""
    return np.argsort(bits(*key, np.arange(n)), kind="stable")
