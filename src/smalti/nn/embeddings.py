"""Embeddings: timesteps and other vectors, and pixels to tokens and back.

Shapes: B batch, C channels, N tokens, D width, P values of a patch: C * patch_size^2, of videos times its frames.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PatchOrder = Literal["channel_first", "channel_last"]


def sinusoid(
    t: Float[Tensor, "*batch"],
    width: int,
    frequency_shift: float = 0.0,
    max_period: float = 10000.0,
    sin_first: bool = False,
) -> Float[Tensor, "*batch D"]:
    """[cos(t w) | sin(t w)] with w_i = max_period^(-i / (width/2 - frequency_shift)), float32; an odd width ends in 0.

    frequency_shift is 0 in the papers' code and 1 in diffusers' DiT; sin_first swaps the halves, as DDPM has them.
    Source: DiT (Peebles and Xie 2023), models.py.
    """
    half = width // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[..., None] * torch.exp(exponents / (half - frequency_shift))
    halves = [angles.sin(), angles.cos()] if sin_first else [angles.cos(), angles.sin()]
    return F.pad(torch.cat(halves, dim=-1), (0, width % 2))


class VectorEmbedder(nn.Module):
    """Linear, SiLU, Linear: a pooled text vector or a sinusoid to the network's width."""

    def __init__(self, in_width: int, width: int, hidden_width: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, hidden_width or width, bias=bias)
        self.fc2 = nn.Linear(hidden_width or width, width, bias=bias)

    def forward(self, z: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch D"]:
        """Vectors [..., in_width] to embeddings [..., width]."""
        return self.fc2(F.silu(self.fc1(z)))  # type: ignore[no-any-return]


class TimestepEmbedder(VectorEmbedder):
    """Sinusoid of the network time, then Linear, SiLU, Linear."""

    def __init__(
        self,
        width: int,
        sinusoid_width: int = 256,
        frequency_shift: float = 0.0,
        sin_first: bool = False,
        hidden_width: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(sinusoid_width, width, hidden_width, bias)
        self.sinusoid_width, self.frequency_shift, self.sin_first = sinusoid_width, frequency_shift, sin_first

    def forward(self, t: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Network time [batch] (or one a token) to an embedding."""
        h = sinusoid(t, self.sinusoid_width, self.frequency_shift, sin_first=self.sin_first)
        return super().forward(h.to(self.fc1.weight.dtype))


def patchify(
    x_BCHW: Float[Tensor, "B C height width"], patch_size: int, order: PatchOrder = "channel_first"
) -> Float[Tensor, "B N P"]:
    """Pictures to tokens, row-major.

    Inside a token the order is (channel, row, column), as a patch convolution's, or (row, column, channel).
    """
    batch, channels, height, width = x_BCHW.shape
    p = patch_size
    tiles = x_BCHW.reshape(batch, channels, height // p, p, width // p, p)
    axes = (0, 2, 4, 1, 3, 5) if order == "channel_first" else (0, 2, 4, 3, 5, 1)
    return tiles.permute(axes).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(
    x_BNP: Float[Tensor, "B N P"], patch_size: int, height: int, width: int, order: PatchOrder = "channel_last"
) -> Float[Tensor, "B C height width"]:
    """Tokens to pictures; inside a token the order is (row, column, channel), as DiT's final layer has it, or
    (channel, row, column)."""
    batch, _, values = x_BNP.shape
    p = patch_size
    channels = values // (p * p)
    inside, axes = ((p, p, channels), (0, 5, 1, 3, 2, 4)) if order == "channel_last" else (
        (channels, p, p), (0, 3, 1, 4, 2, 5)
    )  # fmt: skip
    tiles = x_BNP.reshape(batch, height // p, width // p, *inside)
    return tiles.permute(axes).reshape(batch, channels, height, width)


def patchify_video(
    x_BCFHW: Float[Tensor, "B C frames height width"], patch_size: tuple[int, int, int]
) -> Float[Tensor, "B N P"]:
    """Videos to tokens, frame by frame and row-major; patch_size is (frames, rows, columns).

    Inside a token the order is (channel, frame, row, column), as a patch convolution's.
    """
    batch, channels, frames, height, width = x_BCFHW.shape
    f, p, q = patch_size
    tiles = x_BCFHW.reshape(batch, channels, frames // f, f, height // p, p, width // q, q)
    return tiles.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * f * p * q)


def unpatchify_video(
    x_BNP: Float[Tensor, "B N P"], patch_size: tuple[int, int, int], frames: int, height: int, width: int
) -> Float[Tensor, "B C frames height width"]:
    """Tokens to videos of that many frames, rows and columns: the inverse of patchify_video."""
    batch, _, values = x_BNP.shape
    f, p, q = patch_size
    tiles = x_BNP.reshape(batch, frames // f, height // p, width // q, values // (f * p * q), f, p, q)
    return tiles.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, -1, frames, height, width)
