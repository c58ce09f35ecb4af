"""Masking: what noise means for tokens. At t a share of a picture's tokens is hidden, at t = 1 all, at t = 0 none.

A grid of tokens holds indices of a codebook, and MASKED where one is hidden. The network gives logits for each place,
and is trained by the cross-entropy of the hidden ones. It is not told t: how much is hidden it sees.
Sources: MaskGIT (Chang et al. 2022), section 3.2; Muse (Chang et al. 2023); aMUSEd (Patil et al. 2024).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.diffusion.process import Process
from smalti.types import MASKED, Backbone, Condition


@dataclass(frozen=True)
class Schedule:
    """The share of masked tokens over t, its slope, its inverse, and its mean over t in [0, 1]."""

    rate: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    mean: float


_HALF_PI = math.pi / 2

# MaskGIT, section 3.3, with their r = 1 - t.
_SCHEDULES: dict[str, Schedule] = {
    "masked_cosine": Schedule(
        lambda t: torch.sin(_HALF_PI * t),
        lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
        lambda rate: torch.asin(rate) / _HALF_PI,
        1 / _HALF_PI,
    ),
    "masked_linear": Schedule(lambda t: t, torch.ones_like, lambda rate: rate, 0.5),
    "masked_arccos": Schedule(
        lambda t: torch.acos(1 - t) / _HALF_PI,
        lambda t: 1 / (_HALF_PI * torch.sqrt(t * (2 - t))),
        lambda rate: 1 - torch.cos(_HALF_PI * rate),
        1 / _HALF_PI,
    ),
}


def masking_names() -> list[str]:
    """The known maskings."""
    return sorted(_SCHEDULES)


@dataclass(frozen=True)
class Masking(Process):
    """A process of tokens. alpha is the share that is kept, sigma the share that is masked."""

    name: str = "masked_cosine"
    t_min: float = 0.0
    t_max: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """The course of the masked share."""
        return _SCHEDULES[self.name]

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the tokens that are kept."""
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Share of the tokens that are masked."""
        return self.schedule.rate(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """-sigma'."""
        return -self.sigma_dot(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / d t; arccos rises without bound at t = 0."""
        return self.schedule.slope(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """sigma = 1 / (1 + exp(lambda))."""
        return self.schedule.inverse(torch.sigmoid(-log_snr)).clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        """0: the network sees how much is masked."""
        return torch.zeros_like(t)


def masked_count(rate: Tensor, tokens: int) -> Tensor:
    """How many of `tokens` are masked at a rate [...]: the nearest whole number, at least 1. int64 [...]."""
    return (rate * tokens).round().long().clamp(1, tokens)


def mask_tokens(x0: Tensor, count: Tensor, u: Tensor) -> Tensor:
    """x0 [batch, height, width] with MASKED at the `count` [batch] places of the smallest u, of x0's shape."""
    order = u.flatten(1).argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=u.device).expand_as(order))
    return torch.where((ranks < count[:, None]).view_as(x0), MASKED, x0)


def masked_token_loss(
    backbone: Backbone,
    process: Masking,
    label_smoothing: float,
    x0: Tensor,
    u: Tensor,
    t: Tensor,
    cond: Condition | None,
) -> Tensor:
    """Cross-entropy of the masked tokens, [batch], in nats a token: summed over a sample's, over their mean number.

    So each token counts alike, and where t is uniform the mean over samples is that of all masked tokens. x0: int64
    [batch, height, width]; u: uniform numbers of its shape, which say what is masked; t [batch].
    Source: MaskGIT, eq. 1.
    """
    x = mask_tokens(x0, masked_count(process.sigma(t), x0[0].numel()), u)
    logits = backbone(x, process.network_time(t).float(), cond)
    losses = F.cross_entropy(logits.float(), x0, reduction="none", label_smoothing=label_smoothing)
    total = torch.where(x == MASKED, losses, 0.0).flatten(1).sum(dim=1)
    return total / (process.schedule.mean * x0[0].numel())
