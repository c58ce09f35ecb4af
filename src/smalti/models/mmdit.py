"""MM-DiT: the double-stream transformer of Stable Diffusion 3 and 3.5.

Esser et al. 2024, "Scaling rectified flow transformers for high-resolution image synthesis"; the second attention of
3.5's first blocks is that of Stability AI's sd3.5 repository. Text and image tokens have weights of their own and meet
in each block's joint attention; a pooled text vector joins the time in the modulation.

Shapes: B batch, C channels in, N image tokens, M text tokens, S = M + N of both, D width, P values of a patch.

Initialisation            published (the paper does not say; DiT's)      wide
    Linear                xavier uniform, zero bias                      the same
    patch embedding       xavier uniform as a matrix                     the same
    time and pooled MLPs  N(0, 0.02)                                     N(0, 1 / sqrt(inputs))
    modulations           zero: each block is the identity               the same
    output                zero: the network starts at 0                  the same
"wide" lets the prompt speak from the first step, as in dit.py.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.double_stream import DoubleStreamBlock, double_stream_flops, joint_mask, modulation_rows
from smalti.nn.embeddings import TimestepEmbedder, VectorEmbedder, patchify, unpatchify
from smalti.nn.modulation import modulate
from smalti.nn.positions import sincos_positions_2d
from smalti.types import Condition, required_field

_NORM_EPS = 1e-6
_MLP_RATIO = 4


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of an MM-DiT. The defaults are SD3-medium's."""

    kind: ClassVar[str] = "mmdit"
    image_size: tuple[int, int] = (128, 128)  # height, width of the latents it is made for; it takes others too
    in_channels: int = 16
    out_channels: int | None = None  # None: as many as in_channels
    patch_size: int = 2
    width: int = 1536
    depth: int = 24
    num_heads: int = 24
    text_width: int = 4096  # of the text tokens
    pooled_width: int = 2048  # of the pooled text vector
    position_grid: int = 192  # rows and columns of the position table: the largest input, in tokens
    qk_norm: bool = False
    dual_attention_blocks: tuple[int, ...] = ()  # blocks with a second attention among the image's tokens alone
    initialisation: Literal["published", "wide"] = "published"
    attention_scale: float = 1.0  # of the attention's logits, beside 1 / sqrt(head width): muP's, docs/mup.md

    def __post_init__(self) -> None:
        counts = ("in_channels", "patch_size", "width", "depth", "num_heads", "text_width", "pooled_width")
        for name in (*counts, "position_grid"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.out_channels is not None and self.out_channels <= 0:
            raise UserError(f"model.out_channels={self.out_channels} must be above 0 (none: as many as in_channels)")
        if self.width % self.num_heads or self.width % 4:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads} and by 4")
        if not self.attention_scale > 0:
            raise UserError(f"model.attention_scale={self.attention_scale} must be above 0")
        blocks = self.dual_attention_blocks
        if len(set(blocks)) != len(blocks) or any(not 0 <= i < self.depth for i in blocks):
            raise UserError(f"model.dual_attention_blocks={blocks} must be different ones of 0 .. {self.depth - 1}")
        try:
            self.grid_of(*self.image_size)
        except UserError as error:
            raise UserError(f"model.image_size={self.image_size}: {error}") from None

    @property
    def output_channels(self) -> int:
        """Channels of the raw output."""
        return self.out_channels or self.in_channels

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an input. Raises UserError for a size that the network cannot take."""
        patch, most = self.patch_size, self.position_grid * self.patch_size
        if height % patch or width % patch or not 0 < height <= most or not 0 < width <= most:
            raise UserError(f"an input of {height} x {width} does not fit: multiples of {patch} up to {most} do")
        return height // patch, width // patch


class MMDiT(nn.Module):
    """The double-stream diffusion transformer.

    The table of positions is the largest grid's; an input takes the crop in its middle. It is part of the state dict,
    as checkpoints have it.
    """

    positions_ND: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_area = config.width, config.patch_size**2
        self.patch_embed = nn.Linear(config.in_channels * patch_area, width)
        self.time_embed = TimestepEmbedder(width)
        self.pooled_embed = VectorEmbedder(config.pooled_width, width)
        self.text_embed = nn.Linear(config.text_width, width)
        self.blocks = nn.ModuleList(
            DoubleStreamBlock(
                width,
                config.num_heads,
                _MLP_RATIO * width,
                config.qk_norm,
                image_attention=i in config.dual_attention_blocks,
                last=i == config.depth - 1,
                logit_scale=config.attention_scale,
            )
            for i in range(config.depth)
        )
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, config.output_channels * patch_area)
        self.register_buffer("positions_ND", _position_table(config))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for embedder in (self.time_embed, self.pooled_embed):
            for layer in (embedder.fc1, embedder.fc2):
                std = layer.in_features**-0.5 if self.config.initialisation == "wide" else 0.02
                nn.init.normal_(layer.weight, std=std, generator=generator)
        modulations = [layer for name, layer in self.named_modules() if name.endswith("modulation")]
        for layer in (*modulations, self.output):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)

    def null_condition(self, batch_size: int) -> Condition | None:
        """None: only the text encoders know what an empty prompt is."""
        return None

    def positions_of(self, rows: int, columns: int) -> Float[Tensor, "N D"]:
        """The middle of the position table."""
        side = self.config.position_grid
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.positions_ND.view(side, side, -1)
        return table[top : top + rows, left : left + columns].flatten(0, 1)

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out height width"]:
        """Noisy latents [B, C, height, width] at network time t [B] (1000 sigma) to raw output [B, out, height, width].

        cond: text_embeds [B, M, text_width] and pooled_embeds [B, pooled_width]; text_mask [B, M] hides padding.
        Raises UserError for a missing field and for a size that does not divide into patches or exceeds the table.
        """
        height, width = x.shape[-2:]
        rows, columns = self.config.grid_of(height, width)
        text_embeds, pooled = required_field(cond, "text_embeds"), required_field(cond, "pooled_embeds")
        mask_BS = joint_mask(None if cond is None else cond.text_mask, rows * columns)
        x_BND = self.patch_embed(patchify(x, self.config.patch_size)) + self.positions_of(rows, columns)
        text_BMD = self.text_embed(text_embeds)
        c_BD = F.silu(self.time_embed(t) + self.pooled_embed(pooled))
        for block in self.blocks:
            x_BND, text_BMD = block(x_BND, text_BMD, c_BD, mask_BS=mask_BS)
        shift, scale = modulation_rows(self.output_modulation, c_BD)
        x_BNP = self.output(modulate(x_BND, shift, scale, _NORM_EPS))
        return unpatchify(x_BNP, self.config.patch_size, height, width)


def _position_table(config: MMDiTConfig) -> Float[Tensor, "N D"]:
    """Sin-cos positions of the largest grid, counted in tokens of the native one. Built where parameters are: a state
    dict always brings it."""
    side, device = config.position_grid, torch.get_default_device()
    native_rows, native_columns = (size // config.patch_size for size in config.image_size)
    index = torch.arange(side, dtype=torch.float32, device=device)
    return sincos_positions_2d(config.width, index / (side / native_rows), index / (side / native_columns))


def forward_flops(config: MMDiTConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only."""
    height, columns = input_size or config.image_size
    tokens, width = height * columns // config.patch_size**2, config.width
    patch_values = config.patch_size**2 * (config.in_channels + config.output_channels)
    embedders = (256 + width) * width + (config.pooled_width + width) * width + 2 * width * width
    ends = text_tokens * config.text_width * width + tokens * width * patch_values
    blocks = sum(
        double_stream_flops(
            width,
            _MLP_RATIO * width,
            tokens,
            text_tokens,
            image_attention=i in config.dual_attention_blocks,
            last=i == config.depth - 1,
        )
        for i in range(config.depth)
    )
    return blocks + 2 * (embedders + ends)


def mmdit_presets() -> dict[str, MMDiTConfig]:
    """Stability AI's published sizes: "SD3-medium", "SD3.5-medium", "SD3.5-large"."""
    return {
        "SD3-medium": MMDiTConfig(),
        "SD3.5-medium": MMDiTConfig(position_grid=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
        "SD3.5-large": MMDiTConfig(width=2432, depth=38, num_heads=38, qk_norm=True),
    }
