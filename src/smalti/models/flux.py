"""FLUX.1: double-stream blocks, then single-stream blocks on text and image together.

Black Forest Labs 2024, the flux repository (no paper); the double-stream blocks are MM-DiT's (Esser et al. 2024) with
QK-norm and rotary positions, the single-stream ones the parallel layers of ViT-22B (Dehghani et al. 2023, section 2).

Shapes: B batch, C channels in, N image tokens, M text tokens, S = M + N of both (text first), D width, H heads,
K head width, P values of a patch.

Initialisation                      here (not published; DiT's)
    Linear                          xavier uniform, zero bias
    time, guidance and pooled MLPs  N(0, 0.02)
    modulations                     zero: each block is the identity
    output                          zero: the network starts at 0
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import RMSNorm, attention, attention_flops, merge_heads, split_qkv
from smalti.nn.double_stream import DoubleStreamBlock, double_stream_flops, joint_mask, modulation_rows
from smalti.nn.embeddings import TimestepEmbedder, VectorEmbedder, patchify, unpatchify
from smalti.nn.feedforward import gelu_tanh
from smalti.nn.modulation import modulate
from smalti.nn.positions import rope_grid, rotate_pairs
from smalti.types import Condition, required_field

_NORM_EPS = 1e-6
_MLP_RATIO = 4
_PATCH_SIZE = 2
_ROPE_THETA = 10000.0
_TIME_SCALE = 1000.0  # of the time and of the guidance, before their sinusoids


@dataclass(frozen=True)
class FluxConfig:
    """The shape of a FLUX.1. The defaults are FLUX.1-dev's."""

    kind: ClassVar[str] = "flux"
    image_size: tuple[int, int] = (128, 128)  # height, width of the latents it is made for; it takes others too
    in_channels: int = 16
    out_channels: int | None = None  # None: as many as in_channels
    width: int = 3072
    depth: int = 19  # double-stream blocks
    single_depth: int = 38
    num_heads: int = 24
    text_width: int = 4096  # of the text tokens
    pooled_width: int = 768  # of the pooled text vector
    guidance: bool = True  # is fed the guidance scale that it was distilled with
    rope_widths: tuple[int, int, int] = (16, 56, 56)  # features of a head turned by frame (always 0), row and column

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "num_heads", "text_width", "pooled_width"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        for name in ("depth", "single_depth"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)} must not be negative")
        if self.out_channels is not None and self.out_channels <= 0:
            raise UserError(f"model.out_channels={self.out_channels} must be above 0 (none: as many as in_channels)")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        head_width = self.width // self.num_heads
        if sum(self.rope_widths) != head_width or any(width % 2 or width < 0 for width in self.rope_widths):
            raise UserError(
                f"model.rope_widths={self.rope_widths} must be even and sum to model.width/num_heads={head_width}"
            )
        try:
            grid_of(*self.image_size)
        except UserError as error:
            raise UserError(f"model.image_size={self.image_size}: {error}") from None

    @property
    def output_channels(self) -> int:
        """Channels of the raw output."""
        return self.out_channels or self.in_channels


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of an input. Raises UserError for a size that does not divide into patches."""
    if height % _PATCH_SIZE or width % _PATCH_SIZE or height <= 0 or width <= 0:
        raise UserError(f"an input of {height} x {width} does not fit: multiples of {_PATCH_SIZE} do")
    return height // _PATCH_SIZE, width // _PATCH_SIZE


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward side by side on the same tokens, with one product in and one out for both."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv_mlp = nn.Linear(width, (3 + _MLP_RATIO) * width)
        self.q_norm = RMSNorm(width // num_heads, _NORM_EPS)
        self.k_norm = RMSNorm(width // num_heads, _NORM_EPS)
        self.out = nn.Linear((1 + _MLP_RATIO) * width, width)

    def forward(
        self,
        x_BSD: Float[Tensor, "B S D"],
        condition_BD: Float[Tensor, "B D"],
        rope_2SK: Float[Tensor, "2 S K"],
        mask_BS: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Text and image tokens through one block; condition_BD: already past its SiLU."""
        width = x_BSD.shape[-1]
        shift, scale, gate = modulation_rows(self.modulation, condition_BD)
        h_BSD = modulate(x_BSD, shift, scale, _NORM_EPS)
        # Each layer is applied in two parts: no buffer of their joint width has to be filled, split or copied.
        weights, biases = (w.split([3 * width, _MLP_RATIO * width]) for w in (self.qkv_mlp.weight, self.qkv_mlp.bias))
        from_attention, from_mlp = self.out.weight.split([width, _MLP_RATIO * width], dim=1)
        q_BHSK, k_BHSK, v_BHSK = split_qkv(F.linear(h_BSD, weights[0], biases[0]), self.num_heads).unbind(0)
        q_BHSK, k_BHSK = (rotate_pairs(h, rope_2SK) for h in (self.q_norm(q_BHSK), self.k_norm(k_BHSK)))
        attended_BSD = merge_heads(attention(q_BHSK, k_BHSK, v_BHSK, mask_BS))
        mlp_BSE = gelu_tanh(F.linear(h_BSD, weights[1], biases[1]))
        out_BSD = F.linear(mlp_BSE, from_mlp, self.out.bias) + F.linear(attended_BSD, from_attention)
        return torch.addcmul(x_BSD, gate, out_BSD)


def _within_half_range(x: Tensor) -> Tensor:
    """float16 that overflowed to infinity, back at the largest number, as the reference has it; others as they are."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Flux(nn.Module):
    """The FLUX.1 transformer. Latents are packed into tokens of 2 x 2 inside."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Linear(config.in_channels * _PATCH_SIZE**2, width)
        self.time_embed = TimestepEmbedder(width)
        self.guidance_embed = TimestepEmbedder(width) if config.guidance else None
        self.pooled_embed = VectorEmbedder(config.pooled_width, width)
        self.text_embed = nn.Linear(config.text_width, width)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(width, config.num_heads, _MLP_RATIO * width, qk_norm=True) for _ in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(width, config.num_heads) for _ in range(config.single_depth)
        )
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, config.output_channels * _PATCH_SIZE**2)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for embedder in (self.time_embed, self.guidance_embed, self.pooled_embed):
            if embedder is not None:
                for layer in (embedder.fc1, embedder.fc2):
                    nn.init.normal_(layer.weight, std=0.02, generator=generator)
        modulations = [layer for name, layer in self.named_modules() if name.endswith("modulation")]
        for layer in (*modulations, self.output):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)

    def null_condition(self, batch_size: int) -> Condition | None:
        """None: only the text encoders know what an empty prompt is."""
        return None

    def embed_condition(self, t: Float[Tensor, " B"], cond: Condition | None) -> Float[Tensor, "B D"]:
        """Time, guidance and pooled text to one vector a row."""
        dtype = self.patch_embed.weight.dtype
        # Rounded to the network's dtype before they are scaled, as in the reference: bfloat16 weights know no other.
        c_BD = self.time_embed(_TIME_SCALE * t.to(dtype))
        if self.guidance_embed is not None:
            c_BD = c_BD + self.guidance_embed(_TIME_SCALE * required_field(cond, "guidance").to(dtype))
        return c_BD + self.pooled_embed(required_field(cond, "pooled_embeds"))  # type: ignore[no-any-return]

    def rope_of(self, text_tokens: int, rows: int, columns: int, device: torch.device) -> Float[Tensor, "2 S K"]:
        """Rotary angles of [text | image]: text stands at the origin, image tokens at (0, row, column)."""
        image = rope_grid((1, rows, columns), self.config.rope_widths, _ROPE_THETA, device)
        origin = image[:, :1].expand(2, text_tokens, image.shape[-1])
        return torch.cat([origin, image], dim=1)

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out height width"]:
        """Noisy latents [B, C, height, width] at network time t [B] (sigma in 0 .. 1) to raw output of their size.

        cond: text_embeds [B, M, text_width] and pooled_embeds [B, pooled_width]; guidance [B] where the network has
        it; text_mask [B, M] hides padding (the published networks attend to theirs). Raises UserError for a missing
        field and for odd sizes.
        """
        height, width = x.shape[-2:]
        rows, columns = grid_of(height, width)
        text_BMD = self.text_embed(required_field(cond, "text_embeds"))
        mask_BS = joint_mask(None if cond is None else cond.text_mask, rows * columns)
        rope_2SK = self.rope_of(text_BMD.shape[1], rows, columns, x.device)
        x_BND = self.patch_embed(patchify(x, _PATCH_SIZE))
        c_BD = F.silu(self.embed_condition(t, cond))
        for block in self.double_blocks:
            x_BND, text_BMD = block(x_BND, text_BMD, c_BD, rope_2SK, mask_BS)
            text_BMD = _within_half_range(text_BMD)
        x_BSD = torch.cat([text_BMD, x_BND], dim=1)
        for block in self.single_blocks:
            x_BSD = _within_half_range(block(x_BSD, c_BD, rope_2SK, mask_BS))
        shift, scale = modulation_rows(self.output_modulation, c_BD)
        x_BND = x_BSD[:, text_BMD.shape[1] :]
        x_BNP = self.output(modulate(x_BND, shift, scale, _NORM_EPS))
        return unpatchify(x_BNP, _PATCH_SIZE, height, width, "channel_first")


def forward_flops(config: FluxConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only."""
    height, columns = input_size or config.image_size
    tokens, width = height * columns // _PATCH_SIZE**2, config.width
    joint = tokens + text_tokens
    embedders = (2 if config.guidance else 1) * (256 + width) * width + (config.pooled_width + width) * width
    patch_values = _PATCH_SIZE**2 * (config.in_channels + config.output_channels)
    ends = text_tokens * config.text_width * width + tokens * width * patch_values + 2 * width * width
    double = double_stream_flops(width, _MLP_RATIO * width, tokens, text_tokens)
    single = 2 * width * width * (3 + joint * (4 + 2 * _MLP_RATIO)) + attention_flops(width, joint, joint)
    return config.depth * double + config.single_depth * single + 2 * (embedders + ends)


def flux_presets() -> dict[str, FluxConfig]:
    """Black Forest Labs' published networks: "FLUX.1-dev" and "FLUX.1-schnell"."""
    return {"FLUX.1-dev": FluxConfig(), "FLUX.1-schnell": FluxConfig(guidance=False)}
