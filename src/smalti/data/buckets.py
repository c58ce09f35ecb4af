"""Aspect-ratio buckets: pictures of near shapes share batches of one size, and no size has more tokens than a budget.

The idea is NovelAI's (2022, "Improvements on Stable Diffusion"). The order of batches is addressed, as in order.py.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from smalti import rng
from smalti.data.order import cut_batch
from smalti.errors import UserError

Size = tuple[int, int]  # (height, width)


def make_buckets(token_budget: int, patch: int, *, max_aspect: float = 2.0, step: int = 1) -> tuple[Size, ...]:
    """Sizes (height, width) in pixels for a network that sees a token for each patch x patch pixels, widest first.

    Every size has at most token_budget tokens, its sides are multiples of step * patch and their ratio is at most
    max_aspect; and none is another's part: none can grow within these bounds. For a network on latents, patch is
    its patch size times the autoencoder's factor. A larger step gives fewer sizes. Raises UserError where nothing fits.
    """
    if token_budget < 1 or patch < 1 or step < 1 or max_aspect < 1:
        raise UserError(
            f"buckets of token_budget={token_budget}, patch={patch}, step={step}, max_aspect={max_aspect}: "
            "each must be at least 1"
        )
    most = token_budget // step**2  # squares of step x step tokens
    if not most:
        raise UserError(f"token_budget={token_budget} is too small for a bucket of {step} x {step} tokens")
    sizes: list[Size] = []
    widest = 0
    for rows in range(most, 0, -1):
        columns = min(most // rows, math.floor(rows * max_aspect))
        if rows <= columns * max_aspect and columns > widest:  # no taller size is as wide
            sizes.append((rows * step * patch, columns * step * patch))
            widest = columns
    return tuple(sorted(sizes))


def assign_buckets(sizes: Tensor, buckets: Sequence[Size]) -> tuple[Tensor, Tensor]:
    """(bucket of each row int64 [rows], its enlargement float64 [rows]) for pictures' sizes, int64 [rows, 2].

    A row goes to the bucket whose aspect ratio is nearest on a logarithmic scale: that is where a centre crop loses the
    least. enlargement: how much the picture must grow to fill its bucket; above 1 it is blurred: the caller says so.
    """
    wanted = torch.tensor(buckets, dtype=torch.float64)
    given = sizes.double()
    distance = ((given[:, 0] / given[:, 1]).log()[:, None] - (wanted[:, 0] / wanted[:, 1]).log()[None]).abs()
    bucket = distance.argmin(dim=1)
    return bucket, (wanted[bucket] / given).amax(dim=1)


def bucket_batch(step: int, batch_size: int, num_rows: Sequence[int], seed: int) -> tuple[int, Tensor]:
    """(bucket, its rows int64 [batch_size]) of the batch of a step (0, 1, ...); num_rows: the rows of each bucket.

    A bucket's rows form one endless sequence as in data/order.py: every row once a pass, each pass in its own random
    order. It is cut into batches, and epoch e of the run reads, in random order, the batches that end within each
    bucket's pass e. So no batch is short or mixed, and rows left over at the end of a pass are in the bucket's next
    batch, an epoch later. A bucket with fewer rows than a batch has one every few epochs, with its rows repeated.
    """
    assert sum(num_rows) > 0
    epoch = _epoch_of(step, batch_size, num_rows)
    first = [epoch * rows // batch_size for rows in num_rows]
    counts = [(epoch + 1) * rows // batch_size - start for rows, start in zip(num_rows, first, strict=True)]
    position = step - sum(first)
    place = int(_order(sum(counts), seed, epoch, "data/buckets")[position])
    bucket = 0
    while place >= counts[bucket]:
        place -= counts[bucket]
        bucket += 1
    size, number = num_rows[bucket], bucket
    rows = cut_batch(
        first[bucket] + place, batch_size, size, lambda lap: _order(size, seed, lap, f"data/bucket/{number}")
    )  # fmt: skip
    return bucket, rows


@lru_cache(maxsize=64)  # two passes of thirty buckets; together these are no longer than two epochs of all rows
def _order(length: int, seed: int, epoch: int, purpose: str) -> Tensor:
    """A random order of the rows of a bucket, or of the batches of an epoch, kept while it is read."""
    return rng.permutation(length, seed=seed, purpose=purpose, call=epoch)


def _epoch_of(step: int, batch_size: int, num_rows: Sequence[int]) -> int:
    """The epoch whose batches include a step's: the last with no more than `step` batches before it."""

    def batches_before(epoch: int) -> int:
        return sum(epoch * rows // batch_size for rows in num_rows)

    # e * n / b - 1 < floor(e * n / b) <= e * n / b, for each of the buckets.
    low = step * batch_size // sum(num_rows)
    high = (step + len(num_rows)) * batch_size // sum(num_rows) + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if batches_before(middle) <= step else (low, middle - 1)
    return low
