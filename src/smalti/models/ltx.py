"""LTX-Video: a transformer over strongly compressed video latents (HaCohen et al. 2024, "LTX-Video: realtime video
latent diffusion").

One file holds the network from latent videos to raw output. Text is read by cross-attention; one modulation of the
time serves all blocks, each of which adds a table of its own (adaLN-single, after PixArt-alpha); rotary positions are
seconds and pixels as fractions of the longest video.

Shapes: B batch, C channels, M text tokens, N video tokens, D width, H heads, K head width, P values of a patch.

Initialisation            published (the authors' code, mode "xora"; the paper gives none)
    Linear                xavier uniform, zero bias
    time, text, timetable N(0, 0.02), zero bias
    attention outputs     zero, so that each block is the identity
    mlp.fc2               zero
    tables                N(0, 1 / sqrt(D))
    output                zero: the network starts at 0
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import CrossAttention, SelfAttention, attention_flops
from smalti.nn.embeddings import TimestepEmbedder, patchify_video, unpatchify_video
from smalti.nn.feedforward import FeedForward, feedforward_flops
from smalti.nn.modulation import modulate, scale_and_shift
from smalti.nn.positions import spread_over_grid
from smalti.types import Condition

_QK_NORM_EPS = 1e-5
_OUTPUT_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0
_LONGEST = (20.0, 2048.0, 2048.0)  # seconds, rows, columns of pixels that rotary positions are fractions of


@dataclass(frozen=True)
class LTXConfig:
    """The shape of an LTX-Video network. The defaults are LTX-Video-2B's.

    frame_rate, temporal_compression, spatial_compression: of the videos and their autoencoder; rotary positions count
    seconds and pixels. causal_positions: the first latent frame stands for one frame, as the autoencoder has it (0.9.5
    and later); before, it stands for as many as the others.
    """

    kind: ClassVar[str] = "ltx"
    video_size: tuple[int, int, int] = (21, 16, 22)  # latent frames, height, width; others work too
    in_channels: int = 128
    out_channels: int = 128
    patch_size: int = 1
    patch_frames: int = 1
    width: int = 2048
    depth: int = 28
    num_heads: int = 32
    text_width: int = 4096
    norm_eps: float = 1e-6
    frame_rate: float = 25.0
    temporal_compression: int = 8
    spatial_compression: int = 32
    causal_positions: bool = False

    def __post_init__(self) -> None:
        for name in (
            "in_channels", "out_channels", "patch_size", "patch_frames", "width", "depth", "num_heads", "text_width",
            "norm_eps", "frame_rate", "temporal_compression", "spatial_compression",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise UserError(f"model.width={self.width} must divide by 2 model.num_heads={2 * self.num_heads}")
        if self.width < 6:
            raise UserError(f"model.width={self.width} must be at least 6, for rotary positions on three axes")
        self.grid(self.video_size)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return self.patch_frames, self.patch_size, self.patch_size

    def grid(self, video_size: tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of a video. Raises UserError for one that patches do not fill."""
        if len(video_size) != 3 or any(n <= 0 or n % p for n, p in zip(video_size, self.patch, strict=True)):
            raise UserError(f"video_size={video_size} (frames, height, width) must divide by the patch {self.patch}")
        frames, rows, columns = (n // p for n, p in zip(video_size, self.patch, strict=True))
        return frames, rows, columns


def fractional_positions(
    config: LTXConfig, grid: tuple[int, int, int], device: torch.device
) -> tuple[Float[Tensor, " frames"], Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Where a grid's frames, rows and columns lie in the longest video, 0 .. 1 on each axis.

    Source: LTX-Video, section 2.3; diffusers' pipelines (rope_interpolation_scale and video_coords).
    """
    time, y, x = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    if config.causal_positions:
        frame = time * config.patch_frames * config.temporal_compression
        seconds = (frame + 1 - config.temporal_compression).clamp(min=0) / config.frame_rate
    else:
        seconds = time * (config.temporal_compression / config.frame_rate) * config.patch_frames
    pixels = config.spatial_compression * config.patch_size
    return seconds / _LONGEST[0], y * pixels / _LONGEST[1], x * pixels / _LONGEST[2]


def rotary_angles(config: LTXConfig, grid: tuple[int, int, int], device: torch.device) -> Float[Tensor, "2 H N K"]:
    """cos and sin for each head: the heads' features share one list of angles, frequency by frequency and in each axis
    by axis; what a division by 6 leaves over is not turned, in front.

    Angles are f (2 p - 1) with f from pi / 2 to 10000 pi / 2 in equal ratios. Source: LTX-Video, section 2.3.
    """
    # In float32, as the published networks were trained: the largest angles are off by 1e-3, and so must ours be.
    exponents = torch.linspace(0, 1, config.width // 6, dtype=torch.float32, device=device)
    frequencies = _ROPE_THETA**exponents * math.pi / 2
    angles = [frequencies * (2 * p[:, None] - 1) for p in fractional_positions(config, grid, device)]

    def over_tokens(tables: list[Tensor], at_rest: float) -> Tensor:
        pairs = torch.stack(spread_over_grid(*tables), dim=-1).flatten(1)
        whole: Tensor = F.pad(pairs.repeat_interleave(2, dim=-1), (config.width % 6, 0), value=at_rest)
        return whole.view(len(whole), config.num_heads, -1).transpose(0, 1)

    return torch.stack([over_tokens([a.cos() for a in angles], 1.0), over_tokens([a.sin() for a in angles], 0.0)])


def _rms_modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float) -> Tensor:
    return scale_and_shift(F.rms_norm(x_BND, (x_BND.shape[-1],), eps=eps), shift_B1D, scale_B1D)


class LTXBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last gated by the time."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.norm_eps = config.norm_eps
        self.attn = SelfAttention(width, heads, True, norm_eps=_QK_NORM_EPS, norm_across_heads=True)
        self.cross_attn = CrossAttention(width, width, heads, True, norm_eps=_QK_NORM_EPS, norm_across_heads=True)
        self.mlp = FeedForward(width, 4 * width, "gelu_tanh")
        self.table_6D = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        text_BMD: Float[Tensor, "B M D"],
        modulation_B6D: Float[Tensor, "B 6 D"],
        rope_2HNK: Float[Tensor, "2 H N K"],
        mask_BM: Bool[Tensor, "B M"] | None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; modulation holds shift, scale, gate for attention, then for the MLP."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table_6D + modulation_B6D).unsqueeze(2).unbind(1)
        attended = self.attn(_rms_modulate(x_BND, shift1, scale1, self.norm_eps), rope_2HNK)
        x_BND = torch.addcmul(x_BND, gate1, attended)
        x_BND = x_BND + self.cross_attn(x_BND, text_BMD, mask_BM)
        return torch.addcmul(x_BND, gate2, self.mlp(_rms_modulate(x_BND, shift2, scale2, self.norm_eps)))


class LTX(nn.Module):
    """The LTX-Video transformer."""

    def __init__(self, config: LTXConfig) -> None:
        super().__init__()
        self.config = config
        frames, rows, columns = config.patch
        width, patch_area = config.width, frames * rows * columns
        self.patch_embed = nn.Linear(config.in_channels * patch_area, width)
        self.text_embed = FeedForward(config.text_width, width, "gelu_tanh", out_width=width)
        self.time_embed = TimestepEmbedder(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(LTXBlock(config) for _ in range(config.depth))
        self.output_table_2D = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.output = nn.Linear(width, config.out_channels * patch_area)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name.endswith(("attn.out", "mlp.fc2")) or module is self.output:
                    nn.init.zeros_(module.weight)
                elif name.startswith(("time_embed", "text_embed", "modulation")):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
        for name, table in self.named_parameters():
            if name.endswith(("table_6D", "table_2D")):
                nn.init.normal_(table, std=self.config.width**-0.5, generator=generator)

    def null_condition(self, batch_size: int) -> Condition | None:
        """None: what an empty prompt is, only the text encoder knows."""
        return None

    def forward(
        self, x: Float[Tensor, "B C frames height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out frames height width"]:
        """Noisy latent videos [B, C, frames, height, width] at time t [B] in 0 .. 1000 to raw output.

        cond: text_embeds [B, M, text_width]; text_mask [B, M], where False text is not seen. Raises UserError without
        text_embeds and for a size that patches do not fill.
        """
        if cond is None or cond.text_embeds is None:
            raise UserError("text_embeds is missing: this network reads text")
        frames, height, width = x.shape[2:]
        rope_2HNK = rotary_angles(self.config, self.config.grid((frames, height, width)), x.device)
        x_BND = self.patch_embed(patchify_video(x, self.config.patch))
        text_BMD = self.text_embed(cond.text_embeds)
        c_BD = self.time_embed(t)
        modulation_B6D = self.modulation(F.silu(c_BD)).unflatten(1, (6, -1))
        for block in self.blocks:
            x_BND = block(x_BND, text_BMD, modulation_B6D, rope_2HNK, cond.text_mask)
        shift_B1D, scale_B1D = (self.output_table_2D + c_BD[:, None]).split(1, dim=1)
        x_BNP = self.output(modulate(x_BND, shift_B1D, scale_B1D, _OUTPUT_NORM_EPS))
        return unpatchify_video(x_BNP, self.config.patch, frames, height, width)


def forward_flops(config: LTXConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only.

    input_size: (frames, height, width) of the latent video, config.video_size by default.
    """
    frames, rows, columns = config.grid(input_size or config.video_size)
    tokens, width = frames * rows * columns, config.width
    own = 8 * tokens * width * width + attention_flops(width, tokens, tokens)
    cross = 4 * (tokens + text_tokens) * width * width + attention_flops(width, tokens, text_tokens)
    block = own + cross + tokens * feedforward_flops(width, 4 * width, "gelu_tanh")
    patch_values = config.patch_frames * config.patch_size**2 * (config.in_channels + config.out_channels)
    ends = tokens * width * patch_values + text_tokens * width * (config.text_width + width)
    condition = 256 * width + width * width + 6 * width * width
    return config.depth * block + 2 * (ends + condition)


def ltx_presets() -> dict[str, LTXConfig]:
    """The networks by the authors' names."""
    return {"LTX-Video-2B": LTXConfig()}
