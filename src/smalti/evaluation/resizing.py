"""Pictures at the size that a network looks at."""

import torch.nn.functional as F
from torch import Tensor


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures at (height, width): means over areas where they are larger, bilinear where smaller."""
    if tuple(images.shape[-2:]) == size:
        return images
    if images.shape[-2] >= size[0] and images.shape[-1] >= size[1]:
        return F.interpolate(images, size, mode="area")
    return F.interpolate(images, size, mode="bilinear", antialias=True)
