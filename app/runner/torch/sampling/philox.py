"""Gumbel noise keyed by (seed, position, token id), for all rows at once. Bit for bit `sampling.philox`.

32-bit words live in int64: a product of two wraps at 64 bits, and its words come out right all the same.
"""

import torch

from app.runner.sampling.philox import GUMBEL_STREAM, split

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def gumbel_noise(seeds: list[int], positions: list[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """(num_rows, vocab_size) float32."""
    keys = _words(seeds, device)
    counters = _words(positions, device)
    groups = torch.arange((vocab_size + 3) // 4, device=device)[None]  # (1, num_groups)
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters, groups, torch.full_like(groups, GUMBEL_STREAM))
    k0, k1 = keys
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIERS[0], c0)
        high_1, low_1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    words = torch.stack([c0, c1, c2, c3], dim=-1).reshape(len(seeds), -1)[:, :vocab_size]
    u = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def _multiply(multiplier: int, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = words * multiplier
    return (product >> 32) & _MASK, product & _MASK


def _words(values: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high words of 64-bit values, each (num_rows, 1)."""
    low, high = zip(*(split(value) for value in values), strict=True)
    return torch.tensor(low, device=device)[:, None], torch.tensor(high, device=device)[:, None]
