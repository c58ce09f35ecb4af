"""Embeddings: timesteps, positions (sin-cos tables and rotary angles), and pixels to tokens and back.

Shapes: B batch, C channels, N tokens, D width, K head width, P = C * patch_size^2.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def sinusoid(
    t: Float[Tensor, " B"], width: int, frequency_shift: float = 0.0, max_period: float = 10000.0
) -> Float[Tensor, "B D"]:
    """[cos(t w) | sin(t w)] with w_i = max_period^(-i / (width/2 - frequency_shift)), float32.

    frequency_shift is 0 in the papers' code and 1 in diffusers' DiT. Source: DiT (Peebles and Xie 2023), models.py.
    """
    half = width // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponents / (half - frequency_shift))
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class TimestepEmbedder(nn.Module):
    """Sinusoid of the network time, then Linear, SiLU, Linear."""

    def __init__(self, width: int, sinusoid_width: int = 256, frequency_shift: float = 0.0) -> None:
        super().__init__()
        self.sinusoid_width, self.frequency_shift = sinusoid_width, frequency_shift
        self.fc1 = nn.Linear(sinusoid_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Network time [batch] to an embedding."""
        h = sinusoid(t, self.sinusoid_width, self.frequency_shift).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(h)))  # type: ignore[no-any-return]


def sincos_positions_2d(width: int, rows: int, columns: int) -> Float[Tensor, "N D"]:
    """Fixed positions [rows * columns, width]: [sin x | cos x | sin y | cos y], x the column, float64 inside.

    Source: DiT's get_2d_sincos_pos_embed (after MAE). width must divide by 4.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles_x, angles_y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1).float()


def rope_angles_2d(head_width: int, rows: int, columns: int, theta: float = 100.0) -> Float[Tensor, "2 N K"]:
    """cos and sin of rotary angles for a grid, the first half of the pairs turned by row, the rest by column.

    Each angle stands twice (for both members of an adjacent pair). head_width must divide by 4. theta is small since
    picture grids have tens of positions, not thousands (Heo et al. 2024, "Rotary position embedding for ViT", eq. 5).
    """
    frequencies = theta ** (-torch.arange(head_width // 4, dtype=torch.float64) / (head_width // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], dim=1)
    angles = angles.repeat_interleave(2, dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def patchify(x_BCHW: Float[Tensor, "B C height width"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Pictures to tokens, row-major; inside a token the order is (channel, row, column), as a patch convolution's."""
    batch, channels, height, width = x_BCHW.shape
    p = patch_size
    tiles = x_BCHW.reshape(batch, channels, height // p, p, width // p, p)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(
    x_BNP: Float[Tensor, "B N P"], patch_size: int, height: int, width: int
) -> Float[Tensor, "B C height width"]:
    """Tokens to pictures; inside a token the order is (row, column, channel), as DiT's final layer has it."""
    batch, _, values = x_BNP.shape
    p = patch_size
    tiles = x_BNP.reshape(batch, height // p, width // p, p, p, values // (p * p))
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, values // (p * p), height, width)
