"""Random numbers as pure functions of integers, so that nothing about them has to be saved.

A value is the splitmix64 finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014;
constants of Stafford's variant 13) folded over its arguments. Unlike the generators of a library, it is the same in
every version of everything, for any order of evaluation.
"""

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalize(z: UInt64) -> None:
    """In place: `z` is only this module's, and large."""
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= np.uint64(0x94D049BB133111EB)
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted


def bits(*key: int | npt.NDArray[np.integer]) -> UInt64:
    """Uniform uint64 for each element of the broadcast `key`."""
    return more_bits(np.zeros(1, dtype=np.uint64), *key)


def more_bits(value: UInt64, *key: int | npt.NDArray[np.integer]) -> UInt64:
    """The bits of a longer key, of those of its beginning: what many keys begin with is mixed once."""
    with np.errstate(over="ignore"):
        for part in key:
            value = value ^ np.asarray(part).astype(np.uint64)
            value += _GOLDEN
            _finalize(value)
    return value


def uniform(*key: int | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Uniform float64 in [0, 1) for each element of the broadcast `key`."""
    return (bits(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1, int64 [n]."""
    return np.argsort(bits(*key, np.arange(n)), kind="stable")
