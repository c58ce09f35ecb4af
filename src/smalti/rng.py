"""Addressed random numbers: each draw is a function of its address, never of what was drawn before.

An address is (seed, purpose, index, call). Seed and purpose name a stream ("the noise of image 7's sampler"),
index names a row (an image in a batch), call names a moment (a training step, a network call). No generator state is
carried along, so resuming, re-batching and re-sharding cannot change a number.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
written on int64 tensors so that one call serves a whole batch on any device. The key holds the seed, the counter
(block, call, index, purpose). Its integers are the published ones on every device; normals may differ between
devices in the last place, as the logarithms and cosines do.
"""

import math
import zlib

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WITHOUT_FLOAT64 = ("mps",)  # kinds of device

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten Philox rounds over broadcastable int64 tensors that hold 32-bit words.

    Four counter words and two key words in, four random words in [0, 2^32) out.
    Source: Salmon et al. 2011, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap in int64, which is right modulo 2^64; masking after the shift makes it a logical one.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK32, (product1 >> 32) & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK32, high0 ^ c3 ^ k1, product0 & _MASK32
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK32, (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def _rows(value: int | Tensor, device: torch.device) -> Tensor:
    """An address part as an int64 column [rows, 1] (one row for a plain int)."""
    return torch.as_tensor(value, dtype=torch.int64, device=device).reshape(-1, 1)


def random_words(
    count: int,
    *,
    seed: int | Tensor,
    purpose: str,
    index: int | Tensor = 0,
    call: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random 32-bit words as int64 [rows, count]; word j of a row does not depend on count.

    seed, index and call are ints or int64 tensors of one entry a row. seed may be any int64 that is not negative;
    index and call must lie in [0, 2^32).
    """
    device = torch.device(device)
    seeds, indices, calls = _rows(seed, device), _rows(index, device), _rows(call, device)
    blocks = torch.arange(-(-count // 4), dtype=torch.int64, device=device).reshape(1, -1)
    purpose_word = torch.full((1, 1), zlib.crc32(purpose.encode()), dtype=torch.int64, device=device)
    key = (seeds & _MASK32, (seeds >> 32) & _MASK32)
    words = philox4x32((blocks, calls & _MASK32, indices & _MASK32, purpose_word), key)
    rows = max(seeds.shape[0], indices.shape[0], calls.shape[0])
    stacked = torch.stack([w.expand(rows, blocks.shape[1]) for w in words], dim=-1)  # [rows, blocks, 4]
    return stacked.reshape(rows, -1)[:, :count]


def widest_float(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on mps, which has no float64: what random numbers, times t and angles are computed in."""
    return torch.float32 if torch.device(device).type in _WITHOUT_FLOAT64 else torch.float64


def uniform(
    shape: tuple[int, ...] = (),
    *,
    seed: int | Tensor,
    purpose: str,
    index: int | Tensor = 0,
    call: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in the open interval (0, 1): widest_float [rows, *shape], a row for each address."""
    device = torch.device(device)
    words = random_words(math.prod(shape), seed=seed, purpose=purpose, index=index, call=call, device=device)
    return ((words.to(widest_float(device)) + 0.5) * 2.0**-32).reshape(-1, *shape)


def normal(
    shape: tuple[int, ...] = (),
    *,
    seed: int | Tensor,
    purpose: str,
    index: int | Tensor = 0,
    call: int | Tensor = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers [rows, *shape], a row for each address. Source: Box and Muller 1958."""
    device = torch.device(device)
    count = math.prod(shape)
    words = random_words(2 * ((count + 1) // 2), seed=seed, purpose=purpose, index=index, call=call, device=device)
    u = (words.to(widest_float(device)) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
    angle = (2.0 * math.pi) * u[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.reshape(pairs.shape[0], -1)[:, :count].reshape(-1, *shape).to(dtype)


def permutation(length: int, *, seed: int, purpose: str, call: int = 0) -> Tensor:
    """A random order of 0..length-1 as int64 [length], addressed by (seed, purpose, call)."""
    words = random_words(2 * length, seed=seed, purpose=purpose, call=call).reshape(length, 2)
    return torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)
