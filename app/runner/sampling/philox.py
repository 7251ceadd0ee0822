"""The random numbers: Philox4x32-10 (Salmon et al., 2011), a function of (seed, position) alone.

The key is the request's 64-bit seed, low word first. The counter's first two words are the absolute
position of the token to draw, low word first. Its last word tells the streams apart: 0 is the uniform
number of the inverse-CDF draw, 1 the Gumbel noise over the vocabulary (third word = token id >> 2,
result word = token id & 3). So a row draws the same numbers whatever ran before or beside it.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
UNIFORM_STREAM = 0
GUMBEL_STREAM = 1

Words = tuple[int, int, int, int]


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Four random 32-bit words for a 128-bit counter and a 64-bit key, words lowest first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A multiple of 2**-24 in [0, 1): the top 24 bits of the first word for (seed, position)."""
    words = philox4x32_10((*split(position), 0, UNIFORM_STREAM), split(seed))
    return (words[0] >> 8) * 2.0**-24


def gumbel_noise(seed: int, position: int, vocab_size: int) -> NDArray[np.float32]:
    """Standard Gumbel noise for every token id, (vocab_size,): -log(-log(u)), u in (0, 1) of 23 bits."""
    groups = np.arange((vocab_size + 3) // 4, dtype=np.uint64)
    low, high = split(position)
    key = split(seed)
    words = _philox_groups(groups, (low, high), key)  # (groups, 4)
    bits = (words.reshape(-1)[:vocab_size] >> np.uint64(9)).astype(np.float32)
    u = (bits + np.float32(0.5)) * np.float32(2.0**-23)
    noise: NDArray[np.float32] = -np.log(-np.log(u))
    return noise


def split(value: int) -> tuple[int, int]:
    """Low and high 32-bit word of an unsigned 64-bit value."""
    return value & _MASK, (value >> 32) & _MASK


def _philox_groups(groups: NDArray[np.uint64], position: tuple[int, int], key: tuple[int, int]) -> NDArray[np.uint64]:
    """`philox4x32_10` for counters (position, group, GUMBEL_STREAM), one row of four words a group."""
    mask, shift = np.uint64(_MASK), np.uint64(32)
    c0 = np.full_like(groups, position[0])
    c1 = np.full_like(groups, position[1])
    c2 = groups
    c3 = np.full_like(groups, GUMBEL_STREAM)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = np.uint64(_MULTIPLIER_0) * c0
        product_1 = np.uint64(_MULTIPLIER_1) * c2
        c0 = (product_1 >> shift) ^ c1 ^ np.uint64(k0)
        c2 = (product_0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = product_1 & mask, product_0 & mask
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1)
