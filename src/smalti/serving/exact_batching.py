"""A network whose rows come out the same, to the bit, whatever rows share their forward.

A matrix product chooses its kernel, and with it the order of its sums, by the number of its rows. Products over the
tokens of a picture have many rows even alone; those of the condition have one a picture, and one row takes another
kernel than two. So products of few rows a picture are done in pieces of a fixed height. `shares_exactly` then looks
whether that was enough for this network on this machine (with several threads it is not, docs/serving.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti import rng
from smalti.types import Condition, Denoiser

_HEIGHT = 8  # rows of a piece
_MANY = 16  # rows a picture from which products are done whole


class FixedHeightLinear(nn.Linear):
    """nn.Linear whose products over few rows a picture are made of pieces of _HEIGHT rows each."""

    def forward(self, x: Tensor) -> Tensor:
        """x weight^T + bias over the last axis of x [batch, ..., I]."""
        if x.ndim > 2 and x.shape[1:-1].numel() >= _MANY:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        pieces = F.pad(rows, (0, 0, 0, -len(rows) % _HEIGHT)).split(_HEIGHT)
        return torch.cat([F.linear(p, self.weight, self.bias) for p in pieces])[: len(rows)].reshape(*x.shape[:-1], -1)


def with_fixed_heights(network: nn.Module) -> None:
    """Make the linear layers of a network that nothing else uses FixedHeightLinear, in place."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = FixedHeightLinear


@torch.inference_mode()
def shares_exactly(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Condition | None, sizes: tuple[int, ...]) -> bool:
    """Whether each row of x [rows, ...] comes out of forwards of so many rows as it does alone, to the bit."""

    def rows_of(chosen: list[int]) -> Tensor:
        part = None if cond is None else cond.map(lambda tensor: tensor[chosen])
        return denoiser(x[chosen], t[chosen], part)

    alone = torch.cat([rows_of([i]) for i in range(len(x))])
    order = [int(i) for i in rng.permutation(len(x), seed=0, purpose="serving/exact_batching")]
    return all(torch.equal(rows_of(order[:size]), alone[order[:size]]) for size in sizes)
