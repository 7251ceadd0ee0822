"""Gumbel noise keyed by (seed, position, token id), for all rows at once. Bit for bit `sampling.philox`.

32-bit words live in int64: a product of two wraps at 64 bits, and its words come out right all the same.
"""

import torch

from app.runner.sampling.philox import GUMBEL_STREAM

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


Words = tuple[torch.Tensor, torch.Tensor]
"""Of seeds and of positions: each (2, num_rows) int64, low and high 32-bit words."""


def gumbel_noise(words: Words, vocab_size: int) -> torch.Tensor:
    """(num_rows, vocab_size) float32."""
    (k0, k1), counters = (one[:, :, None] for one in words)  # each word (num_rows, 1)
    groups = torch.arange((vocab_size + 3) // 4, device=counters.device)[None]  # (1, num_groups)
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters, groups, torch.full_like(groups, GUMBEL_STREAM))
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIERS[0], c0)
        high_1, low_1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    bits = torch.stack([c0, c1, c2, c3], dim=-1).reshape(len(k0), -1)[:, :vocab_size]
    u = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def _multiply(multiplier: int, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = words * multiplier
    return (product >> 32) & _MASK, product & _MASK
