"""When requests are sent: seeded, pure, decided before the run.

An open loop sends at these times whatever the server does. Gaps are gamma distributed: burstiness 1 is
Poisson, below 1 comes in bursts, far above 1 is nearly even.
"""

import math
import random


def arrival_offsets(rate: float, num_requests: int, *, seed: int, burstiness: float = 1.0) -> list[float]:
    """Seconds after the start, rising, the first at 0; `rate` in requests per second. Raises ValueError."""
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"the rate is {rate}; give requests per second above 0")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ValueError(f"the burstiness is {burstiness}; give a number above 0 (1 is Poisson)")
    source = random.Random(f"arrivals {seed}")
    offsets, now = [], 0.0
    for _ in range(num_requests):
        offsets.append(now)
        now += source.gammavariate(burstiness, 1 / (rate * burstiness))
    return offsets
