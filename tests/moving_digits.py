"""Digits that move by a pixel a frame: the smallest videos that have something to learn across frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.types import Condition


def moving_digits(images: Tensor, frames: int = 4, side: int = 14) -> Tensor:
    """Digits [batch, 1, 28, 28] to videos [batch, 1, frames, side, side], pooled and moving right."""
    pooled = F.adaptive_avg_pool2d(images, side)
    return torch.stack([pooled.roll(frame, dims=-1) for frame in range(frames)], dim=2)


def text_of_labels(labels: Tensor) -> Condition:
    """One-hot labels as a text of one token of width 10."""
    return Condition(text_embeds=F.one_hot(labels, 10).float()[:, None])
