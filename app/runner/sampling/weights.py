"""What a token weighs in a draw: e^score, by operations that every implementation repeats bit for bit.

The exponential is written out in float32 operations that IEEE 754 defines, nothing fused, because those of numpy, torch
and C libraries differ in their last bits. A weight is rounded to a multiple of 2**-32 and is at most 1, so that up to
2**20 of them add up in float64 without an error, in any order: by blocks, vectors or threads, it is the same sum.
"""

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]

LOG2_E = np.float32(1.44269504)
COEFFICIENTS = (1.540353e-4, 1.3333558e-3, 9.618129e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
"""Of 2**x for |x| <= 1/2, the highest power first."""
LOWEST_POWER = np.float32(-40.0)
"""2**-40 is rounded to 0."""
GRAIN = np.float32(2.0**-9)
"""Adding it to a smaller float32 rounds that to multiples of 2**-32."""


def weights_of(scores: Scores) -> NDArray[np.float32]:
    """e^score of scores <= 0 within 2e-7; -inf weighs 0, 0 weighs 1."""
    power = scores * LOG2_E
    np.maximum(power, LOWEST_POWER, out=power)
    whole = np.rint(power)
    power -= whole
    weights = np.full_like(power, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        weights *= power
        weights += np.float32(coefficient)
    weights *= ((whole.astype(np.int32) + 127) << 23).view(np.float32)
    rounded = weights + GRAIN
    rounded -= GRAIN
    np.copyto(weights, rounded, where=weights < GRAIN)
    return weights
