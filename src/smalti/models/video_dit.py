"""Video DiT: text and video tokens in one sequence under full space-time attention, as CogVideoX has it (Yang et al.
2024, "CogVideoX: text-to-video diffusion models with an expert transformer").

One file holds the network from latent videos to raw output. Text and video share every layer; only their
modulations differ (the paper's "expert adaptive LayerNorm"). Sizes of CogVideoX: 2B adds a fixed table of positions,
5B turns queries and keys, 1.5 joins two frames in a patch, the image-to-video networks read the image's latents as
further channels and add a learned table.

attention="factorised" is ours, after Latte (Ma et al. 2024) and OpenSora: with the same weights, blocks attend by turns
within a frame and across the frames of a place; each such group also sees the text, the text sees itself alone.

Shapes: B batch, C channels, M text tokens, N video tokens, S = M + N, D width, K head width, P values of a patch,
E time width, G groups of a factorised attention, n tokens of each.

Initialisation            published (the authors' SAT code; the paper gives none)
    patch embedding       xavier uniform as a matrix, zero bias
    text, time, ofs       PyTorch's default
    qkv, mlp.fc1          N(0, 0.02), zero bias
    attn.out, mlp.fc2     N(0, 0.02 / sqrt(2 depth)), zero bias
    block modulations     zero: each block is the identity
    output modulation     PyTorch's default
    output                xavier uniform, zero bias
    learned positions     zero
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import SelfAttention, attention, attention_flops, merge_heads
from smalti.nn.embeddings import TimestepEmbedder, patchify_video, unpatchify_video
from smalti.nn.feedforward import FeedForward, feedforward_flops
from smalti.nn.modulation import scale_and_shift
from smalti.nn.positions import (
    rope_angles_grid,
    rotate_pairs,
    sincos_positions_1d,
    sincos_positions_2d,
    spread_over_grid,
)
from smalti.rng import widest_float
from smalti.types import Condition

_QK_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0
_OFS = 2.0  # what CogVideoX 1.5's image-to-video pipelines feed, always


@dataclass(frozen=True)
class VideoDiTConfig:
    """The shape of a video DiT. The defaults are CogVideoX-2B's.

    patch_frames: frames of a patch; None takes frames one by one with CogVideoX 1.0's rotary positions, which are
    rescaled to the grid of video_size; with a number they are 0, 1, 2 ... (CogVideoX 1.5).
    positions: "rope+learned" is what CogVideoX-5B-I2V has.
    """

    kind: ClassVar[str] = "video_dit"
    video_size: tuple[int, int, int] = (13, 60, 90)  # latent frames, height, width it is trained on; others work too
    in_channels: int = 16  # for image-to-video twice the latents': the image's are concatenated
    out_channels: int = 16
    patch_size: int = 2
    patch_frames: int | None = None
    width: int = 1920
    depth: int = 30
    num_heads: int = 30
    text_width: int = 4096
    text_tokens: int = 226  # learned positions need exactly so many
    time_width: int = 512
    ofs_width: int | None = None  # CogVideoX1.5-5B-I2V embeds a second number
    positions: Literal["sincos", "rope", "rope+learned"] = "sincos"
    attention: Literal["full", "factorised"] = "full"
    norm_eps: float = 1e-5
    spatial_interpolation: float = 1.875  # sin-cos positions are divided by these
    temporal_interpolation: float = 1.0
    temporal_compression: int = 4  # frames that the autoencoder makes one of; diffusers' configs count those

    def __post_init__(self) -> None:
        for name in (
            "in_channels", "out_channels", "patch_size", "width", "depth", "num_heads", "text_width", "text_tokens",
            "time_width", "norm_eps", "spatial_interpolation", "temporal_interpolation", "temporal_compression",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.patch_frames is not None and self.patch_frames <= 0:
            raise UserError(f"model.patch_frames={self.patch_frames} must be above 0, or None")
        if self.ofs_width is not None and self.ofs_width != self.time_width:
            raise UserError(f"model.ofs_width={self.ofs_width} must be model.time_width={self.time_width}, or None")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        if self.positions == "sincos" and self.width % 16:
            raise UserError(f"model.width={self.width} must divide by 16 for positions='sincos'")
        if "rope" in self.positions and self.width // self.num_heads % 16:
            head_width = self.width // self.num_heads
            raise UserError(f"model.width/num_heads={head_width} must divide by 16 for positions={self.positions!r}")
        frames, height, width = self.video_size
        if frames <= 0:
            raise UserError(f"model.video_size={self.video_size} must have a frame")
        self.grid((self.patch[0], height, width))

    @property
    def training_grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens at video_size, whose frames are filled up to whole patches."""
        frames, height, width = self.video_size
        return self.grid((frames + -frames % self.patch[0], height, width))

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        return self.patch_frames or 1, self.patch_size, self.patch_size

    def grid(self, video_size: tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of a video. Raises UserError for one that patches do not fill."""
        if len(video_size) != 3 or any(n <= 0 or n % p for n, p in zip(video_size, self.patch, strict=True)):
            raise UserError(f"video_size={video_size} (frames, height, width) must divide by the patch {self.patch}")
        frames, rows, columns = (n // p for n, p in zip(video_size, self.patch, strict=True))
        return frames, rows, columns


def _resized_positions(size: int, start: int, stop: int, device: torch.device) -> Float[Tensor, " size"]:
    # `stop (n - 1) / n`, not `stop - (stop - start) / n`: so diffusers' pipelines have it, and checkpoints were tuned.
    return torch.linspace(start, stop * (size - 1) / size, size, dtype=widest_float(device), device=device)


def rotary_axes(
    config: VideoDiTConfig, grid: tuple[int, int, int], device: torch.device
) -> tuple[Float[Tensor, " frames"], Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """The positions of a grid's frames, rows and columns for rotary angles.

    CogVideoX 1.0 fits the grid into that of config.video_size, the sides' ratio kept and centred; 1.5 counts.
    Source: diffusers' CogVideoX pipelines, get_resize_crop_region_for_grid.
    """
    frames, rows, columns = grid
    time = torch.arange(frames, dtype=widest_float(device), device=device)
    if config.patch_frames is not None:
        y, x = (torch.arange(size, dtype=widest_float(device), device=device) for size in (rows, columns))
        return time, y, x
    _, base_rows, base_columns = config.training_grid
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)
    return (
        time,
        _resized_positions(rows, top, top + height, device),
        _resized_positions(columns, left, left + width, device),
    )


def sincos_positions_3d(
    config: VideoDiTConfig, grid: tuple[int, int, int], device: torch.device
) -> Float[Tensor, "N D"]:
    """The fixed table of CogVideoX-2B: a quarter of each row speaks of the frame, the rest of row and column."""
    time, y, x = (torch.arange(size, dtype=widest_float(device), device=device) for size in grid)
    temporal = sincos_positions_1d(config.width // 4, time / config.temporal_interpolation)
    spatial = sincos_positions_2d(
        3 * config.width // 4, y / config.spatial_interpolation, x / config.spatial_interpolation
    )
    return torch.cat(spread_over_grid(temporal, spatial), dim=-1)


class FactorisedAttention(SelfAttention):
    """Attention of video tokens to the text and to their own frame ("space") or place ("time"); of text to text."""

    def __init__(self, config: VideoDiTConfig, axis: Literal["space", "time"]) -> None:
        super().__init__(config.width, config.num_heads, True, True, _QK_NORM_EPS, nn.LayerNorm)
        self.axis = axis

    def forward_groups(
        self,
        x_BSD: Float[Tensor, "B S D"],
        rope_2SK: Float[Tensor, "2 S K"] | None,
        mask_BM: Bool[Tensor, "B M"] | None,
        frames: int,
        text_tokens: int,
    ) -> Float[Tensor, "B S D"]:
        """[text | video] tokens of so many frames through the attention; text where mask_BM is False is not seen."""
        q_BHSK, k_BHSK, v_BHSK = self.project(x_BSD)
        if rope_2SK is not None:
            q_BHSK, k_BHSK = rotate_pairs(q_BHSK, rope_2SK), rotate_pairs(k_BHSK, rope_2SK)
        lengths = (text_tokens, x_BSD.shape[1] - text_tokens)
        (q_text, q_video), (k_text, k_video), (v_text, v_video) = (
            part.split(lengths, dim=2) for part in (q_BHSK, k_BHSK, v_BHSK)
        )
        batch, _, tokens, _ = q_video.shape
        groups = frames if self.axis == "space" else tokens // frames

        def grouped(video: Tensor) -> Tensor:  # BHNK to BGHnK
            parts: Tensor = video.unflatten(2, (frames, -1))
            return parts.transpose(1, 2) if self.axis == "space" else parts.permute(0, 3, 1, 2, 4)

        def with_text(text: Tensor, video: Tensor) -> Tensor:
            everywhere = text[:, None].expand(-1, groups, -1, -1, -1)
            return torch.cat([everywhere, grouped(video)], dim=3).flatten(0, 1)

        mask = None
        if mask_BM is not None:
            mask = F.pad(mask_BM, (0, tokens // groups), value=True).repeat_interleave(groups, dim=0)
        video = attention(
            grouped(q_video).flatten(0, 1), with_text(k_text, k_video), with_text(v_text, v_video), mask
        ).unflatten(0, (batch, groups))  # BGHnK
        order = (0, 1, 3, 2, 4) if self.axis == "space" else (0, 3, 1, 2, 4)
        video_BND = video.permute(order).reshape(batch, tokens, -1)
        text_BMD = merge_heads(attention(q_text, k_text, v_text, mask_BM))
        return self.out(torch.cat([text_BMD, video_BND], dim=1))  # type: ignore[no-any-return]


class VideoDiTBlock(nn.Module):
    """Attention and feed-forward over text and video, both gated by the time; each kind has its own modulation."""

    attn: SelfAttention

    def __init__(self, config: VideoDiTConfig, index: int) -> None:
        super().__init__()
        width = config.width
        self.attn_norm = nn.LayerNorm(width, config.norm_eps)
        if config.attention == "factorised":
            self.attn = FactorisedAttention(config, "time" if index % 2 else "space")
        else:
            self.attn = SelfAttention(width, config.num_heads, True, True, _QK_NORM_EPS, nn.LayerNorm)
        self.mlp_norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp = FeedForward(width, 4 * width, "gelu_tanh")

    def forward(
        self,
        video_BND: Float[Tensor, "B N D"],
        text_BMD: Float[Tensor, "B M D"],
        modulation: Float[Tensor, "B 12 D"],
        rope_2SK: Float[Tensor, "2 S K"] | None,
        mask_BM: Bool[Tensor, "B M"] | None,
        frames: int,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B M D"]]:
        """Video and text through one block.

        modulation: shift, scale, gate of the attention for video, then for text; the same of the feed-forward.
        """
        rows = modulation.unsqueeze(2).unbind(1)  # each B1D
        lengths = (text_BMD.shape[1], video_BND.shape[1])
        attended = self._attend(self._joined(self.attn_norm, video_BND, text_BMD, rows[:6]), rope_2SK, mask_BM,
                                frames, lengths[0])  # fmt: skip
        text_out, video_out = attended.split(lengths, dim=1)
        video_BND = torch.addcmul(video_BND, rows[2], video_out)
        text_BMD = torch.addcmul(text_BMD, rows[5], text_out)
        text_out, video_out = self.mlp(self._joined(self.mlp_norm, video_BND, text_BMD, rows[6:])).split(lengths, dim=1)
        return torch.addcmul(video_BND, rows[8], video_out), torch.addcmul(text_BMD, rows[11], text_out)

    def _attend(
        self, x_BSD: Tensor, rope_2SK: Tensor | None, mask_BM: Tensor | None, frames: int, text_tokens: int
    ) -> Tensor:
        if isinstance(self.attn, FactorisedAttention):
            return self.attn.forward_groups(x_BSD, rope_2SK, mask_BM, frames, text_tokens)
        mask_BS = None if mask_BM is None else F.pad(mask_BM, (0, x_BSD.shape[1] - text_tokens), value=True)
        return self.attn(x_BSD, rope_2SK, mask_BS)  # type: ignore[no-any-return]

    @staticmethod
    def _joined(norm: nn.Module, video_BND: Tensor, text_BMD: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """[text | video], normed and modulated."""
        text = scale_and_shift(norm(text_BMD), rows[3], rows[4])
        return torch.cat([text, scale_and_shift(norm(video_BND), rows[0], rows[1])], dim=1)


class VideoDiT(nn.Module):
    """The video DiT. The modulations of all blocks come from one matrix product a forward."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        frames, rows, columns = config.patch
        width, patch_area = config.width, frames * rows * columns
        self.patch_embed = nn.Linear(config.in_channels * patch_area, width)
        self.text_embed = nn.Linear(config.text_width, width)
        self.time_embed = TimestepEmbedder(config.time_width, sinusoid_width=width)
        self.ofs_embed = TimestepEmbedder(config.ofs_width, config.ofs_width) if config.ofs_width else None
        if config.positions == "rope+learned":
            frames, rows, columns = config.training_grid
            tokens = config.text_tokens + frames * rows * columns
            self.positions_SD: nn.Parameter | None = nn.Parameter(torch.zeros(tokens, width))
        else:
            self.positions_SD = None
        self.modulation = nn.Linear(config.time_width, (12 * config.depth + 2) * width)
        self.blocks = nn.ModuleList(VideoDiTBlock(config, i) for i in range(config.depth))
        self.last_norm = nn.LayerNorm(width, config.norm_eps)
        self.output_norm = nn.LayerNorm(width, config.norm_eps)
        self.output = nn.Linear(width, config.out_channels * patch_area)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):  # PyTorch's default, from the generator given
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith(("attn.out", "mlp.fc2"))
                std = 0.02 / (2 * self.config.depth) ** 0.5 if last else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
                nn.init.zeros_(module.bias)
        for layer in (self.patch_embed, self.output):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        of_blocks = 12 * self.config.depth * self.config.width
        self.modulation.weight[:of_blocks].zero_()
        self.modulation.bias[:of_blocks].zero_()
        if self.positions_SD is not None:
            nn.init.zeros_(self.positions_SD)

    def null_condition(self, batch_size: int) -> Condition | None:
        """None: what an empty prompt is, only the text encoder knows."""
        return None

    def embed_time(self, t: Float[Tensor, " B"], cond: Condition) -> Float[Tensor, "B E"]:
        """Network time and, where the network has it, ofs to one vector a row."""
        c_BE: Tensor = self.time_embed(t)
        if self.ofs_embed is None:
            return c_BE
        given = cond.micro_conditions
        ofs = torch.full_like(t, _OFS) if given is None else given[:, 0]
        return c_BE + self.ofs_embed(ofs)  # type: ignore[no-any-return]

    def _with_positions(
        self, video_BND: Float[Tensor, "B N D"], text_BMD: Float[Tensor, "B M D"], grid: tuple[int, int, int]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B M D"]]:
        if self.config.positions == "sincos":
            return video_BND + sincos_positions_3d(self.config, grid, video_BND.device).to(video_BND.dtype), text_BMD
        if self.positions_SD is None:
            return video_BND, text_BMD
        longest, *sides = self.config.training_grid
        if list(grid[1:]) != sides or grid[0] > longest or text_BMD.shape[1] != self.config.text_tokens:
            raise UserError(
                f"positions='rope+learned' take {self.config.text_tokens} text tokens and a grid of {sides} with up "
                f"to {longest} frames, not {text_BMD.shape[1]} and {list(grid[1:])} with {grid[0]}"
            )
        # A shorter video takes the first frames. Files of diffusers may hold the table in float64.
        table = self.positions_SD.to(video_BND.dtype)
        text_tokens = text_BMD.shape[1]
        return video_BND + table[text_tokens:][: video_BND.shape[1]], text_BMD + table[:text_tokens]

    def _rotary_angles(self, text_tokens: int, grid: tuple[int, int, int], x: Tensor) -> Tensor | None:
        """Angles of [text | video]: text is not turned."""
        if self.config.positions == "sincos":
            return None
        head_width = self.config.width // self.config.num_heads
        widths = (head_width // 4, head_width * 3 // 8, head_width * 3 // 8)
        video = rope_angles_grid(rotary_axes(self.config, grid, x.device), widths, _ROPE_THETA)
        text = video.new_zeros(2, text_tokens, head_width)
        text[0] = 1
        return torch.cat([text, video], dim=1)

    def forward(
        self, x: Float[Tensor, "B C frames height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out frames height width"]:
        """Noisy latent videos [B, C, frames, height, width] at step t [B] (0 .. 1000) to raw output.

        cond: text_embeds [B, M, text_width]; text_mask [B, M], where False text is not seen (CogVideoX was trained
        without); micro_conditions [B, 1], the ofs of CogVideoX1.5-5B-I2V, 2 by default. Raises UserError without
        text_embeds and for a size that patches do not fill.
        """
        if cond is None or cond.text_embeds is None:
            raise UserError("text_embeds is missing: this network reads text")
        frames, height, width = x.shape[2:]
        grid = self.config.grid((frames, height, width))
        video_BND = self.patch_embed(patchify_video(x, self.config.patch))
        text_BMD = self.text_embed(cond.text_embeds)
        video_BND, text_BMD = self._with_positions(video_BND, text_BMD, grid)
        rope_2SK = self._rotary_angles(text_BMD.shape[1], grid, x)
        modulation = self.modulation(F.silu(self.embed_time(t, cond))).view(x.shape[0], -1, self.config.width)
        for i, block in enumerate(self.blocks):
            rows = modulation[:, 12 * i : 12 * i + 12]
            video_BND, text_BMD = block(video_BND, text_BMD, rows, rope_2SK, cond.text_mask, grid[0])
        shift_BD, scale_BD = modulation[:, -2:].unbind(1)
        normed = self.output_norm(self.last_norm(video_BND))
        x_BNP = self.output(scale_and_shift(normed, shift_BD[:, None], scale_BD[:, None]))
        return unpatchify_video(x_BNP, self.config.patch, frames, height, width)


def forward_flops(config: VideoDiTConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only.

    input_size: (frames, height, width) of the latent video, config.video_size by default.
    """
    frames, rows, columns = config.grid(input_size) if input_size else config.training_grid
    tokens, width = frames * rows * columns, config.width
    joint = text_tokens + tokens
    layers = joint * (8 * width * width + feedforward_flops(width, 4 * width, "gelu_tanh"))
    attentions = config.depth * attention_flops(width, joint, joint)
    if config.attention == "factorised":
        in_space = attention_flops(width, tokens, text_tokens + rows * columns)
        in_time = attention_flops(width, tokens, text_tokens + frames)
        of_text = attention_flops(width, text_tokens, text_tokens)
        attentions = (config.depth + 1) // 2 * in_space + config.depth // 2 * in_time + config.depth * of_text
    patch_frames, patch_size, _ = config.patch
    patch_values = patch_frames * patch_size**2 * (config.in_channels + config.out_channels)
    ends = tokens * width * patch_values + text_tokens * width * config.text_width
    condition = config.time_width * (width + config.time_width + (12 * config.depth + 2) * width)
    if config.ofs_width:
        condition += 2 * config.ofs_width**2
    return config.depth * layers + attentions + 2 * (ends + condition)


def video_dit_presets() -> dict[str, VideoDiTConfig]:
    """CogVideoX by the authors' names."""
    large = VideoDiTConfig(width=3072, depth=42, num_heads=48, positions="rope")
    return {"CogVideoX-2B": VideoDiTConfig(), "CogVideoX-5B": large}
