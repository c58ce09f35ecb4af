"""PixArt: a diffusion transformer with cross-attention to text (Chen et al. 2023, "PixArt-alpha"; 2024, "-Sigma").

One file holds the network from latents to raw output. PixArt-alpha and PixArt-Sigma are the same network at other
sizes; alpha at 1024 pixels is also told the picture's size (micro conditions).

    text    y = fc2(gelu_tanh(fc1(text)))
    time    c = MLP(sinusoid(t)) [+ size MLP(height) | size MLP(width) | ratio MLP(aspect ratio)]
    adaLN-single (PixArt-alpha, section 2.3): m = Linear(silu(c)) for all blocks together, and six learned rows a block:
            shift1, scale1, gate1, shift2, scale2, gate2 = m + rows
    block   x += gate1 * SelfAttention(LN(x) (1 + scale1) + shift1)
            x += CrossAttention(x, y)                                 neither normed nor gated
            x += gate2 * MLP(LN(x) (1 + scale2) + shift2)
    output  Linear(LN(x) (1 + scale) + shift) with shift, scale = c + two learned rows: c itself, not m

Shapes: B batch, C channels in, N tokens, M text tokens, W text width, D width, P values of a patch, L blocks.

Initialisation (published): blocks are not the identity, their gates are random; the network starts at 0.
    Linear, patch embedding     xavier uniform, zero bias
    time, size and text MLPs    N(0, 0.02)
    modulation                  N(0, 0.02), zero bias
    learned modulation rows     N(0, 1 / sqrt(D))
    cross-attention's output    zero
    output                      zero
    null text                   N(0, 1 / sqrt(W)), never trained
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import CrossAttention, SelfAttention, attention_flops
from smalti.nn.embeddings import TimestepEmbedder, patchify, unpatchify
from smalti.nn.feedforward import FeedForward, feedforward_flops
from smalti.nn.modulation import modulate
from smalti.nn.positions import rescaled_sincos_grid
from smalti.types import Condition

_OUTPUT_NORM_EPS = 1e-6
_SINUSOID_WIDTH = 256


@dataclass(frozen=True)
class PixArtConfig:
    """The shape of a PixArt. The defaults are PixArt-XL/2 for 512-pixel pictures (64x64 latents)."""

    kind: ClassVar[str] = "pixart"
    image_size: tuple[int, int] = (64, 64)  # height, width of the latents whose positions others are stretched to
    in_channels: int = 4
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    text_width: int = 4096
    text_projection: bool = True  # False: cross-attention reads the text as it comes
    learn_sigma: bool = True  # twice the output channels: the second half are variance logits
    micro_conditions: bool = False  # the condition's micro_conditions: picture height, width and height / width
    interpolation_scale: float = 1.0  # positions are divided by it
    norm_eps: float = 1e-6  # of the blocks' LayerNorms
    null_text_tokens: int = 0  # of the stored text for no prompt, as original files have it; 0: none

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_size", "width", "depth", "num_heads", "text_width", "interpolation_scale"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size or height <= 0 or width <= 0:
            raise UserError(f"model.image_size={self.image_size} must divide by model.patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        if self.width % 4:
            raise UserError(f"model.width={self.width} must divide by 4 for sin-cos positions")
        if self.micro_conditions and self.width % 3:
            raise UserError(f"model.width={self.width} must divide by 3 for micro_conditions=True")
        if self.null_text_tokens < 0:
            raise UserError(f"model.null_text_tokens={self.null_text_tokens} must not be negative")

    @property
    def out_channels(self) -> int:
        """Channels of the raw output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the config's own size."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated and gated."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        context_width = config.width if config.text_projection else config.text_width
        self.attn = SelfAttention(config.width, config.num_heads)
        self.cross_attn = CrossAttention(config.width, context_width, config.num_heads)
        self.mlp = FeedForward(config.width, 4 * config.width, "gelu_tanh")

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        modulation_B6D: Float[Tensor, "B 6 D"],
        text_BMI: Float[Tensor, "B M I"],
        text_mask_BM: Bool[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; modulation holds shift, scale, gate for self-attention, then for the MLP."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_B6D.unsqueeze(2).unbind(1)  # each B1D
        x_BND = torch.addcmul(x_BND, gate1, self.attn(modulate(x_BND, shift1, scale1, self.norm_eps)))
        x_BND = x_BND + self.cross_attn(x_BND, text_BMI, text_mask_BM)
        return torch.addcmul(x_BND, gate2, self.mlp(modulate(x_BND, shift2, scale2, self.norm_eps)))


class PixArt(nn.Module):
    """The cross-attention diffusion transformer."""

    positions_ND: Tensor
    null_text_MW: Tensor | None

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_area = config.width, config.patch_size**2
        self.patch_embed = nn.Linear(config.in_channels * patch_area, width)
        self.time_embed = TimestepEmbedder(width, _SINUSOID_WIDTH)
        self.size_embed = TimestepEmbedder(width // 3, _SINUSOID_WIDTH) if config.micro_conditions else None
        self.aspect_ratio_embed = TimestepEmbedder(width // 3, _SINUSOID_WIDTH) if config.micro_conditions else None
        self.text_embed = (
            FeedForward(config.text_width, width, "gelu_tanh", out_width=width) if config.text_projection else None
        )
        self.modulation = nn.Linear(width, 6 * width)
        self.modulation_rows = nn.Parameter(torch.zeros(6 * config.depth + 2, width))  # the last two: of the output
        self.blocks = nn.ModuleList(PixArtBlock(config) for _ in range(config.depth))
        self.output = nn.Linear(width, config.out_channels * patch_area)
        table = rescaled_sincos_grid(width, *config.grid, config.grid, config.interpolation_scale)
        self.register_buffer("positions_ND", table, persistent=False)
        null_text = torch.zeros(config.null_text_tokens, config.text_width) if config.null_text_tokens else None
        self.register_buffer("null_text_MW", null_text)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        embedders = (self.time_embed, self.size_embed, self.aspect_ratio_embed, self.text_embed)
        layers = [layer for e in embedders if e is not None for layer in (e.fc1, e.fc2)]
        for layer in (*layers, self.modulation):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
        nn.init.normal_(self.modulation_rows, std=self.config.width**-0.5, generator=generator)
        if self.null_text_MW is not None:
            nn.init.normal_(self.null_text_MW, std=self.config.text_width**-0.5, generator=generator)
        outputs = [block.cross_attn.out for block in self.blocks]  # type: ignore[union-attr]
        for layer in (*outputs, self.output):  # type: ignore[assignment]
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def null_condition(self, batch_size: int) -> Condition | None:
        """The stored text for no prompt; None without one: then only the text encoder knows what an empty prompt is.

        Where the network takes micro conditions the caller adds them: they are the picture's size, not its content.
        """
        if self.null_text_MW is None:
            return None
        return Condition(text_embeds=self.null_text_MW.expand(batch_size, -1, -1))

    def embed_time(self, t: Float[Tensor, " B"], cond: Condition) -> Float[Tensor, "B D"]:
        """Network time (a step 0 .. 999) and, where the network takes them, micro conditions to one vector a row."""
        c_BD = self.time_embed(t)
        if self.size_embed is None or self.aspect_ratio_embed is None:
            return c_BD  # type: ignore[no-any-return]
        if cond.micro_conditions is None:
            raise UserError("micro_conditions is missing: this network reads picture height, width and height / width")
        size_B2E = self.size_embed(cond.micro_conditions[:, :2])
        ratio_BE = self.aspect_ratio_embed(cond.micro_conditions[:, 2])
        return c_BD + torch.cat([size_B2E.flatten(1), ratio_BE], dim=1)  # type: ignore[no-any-return]

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out height width"]:
        """Noisy latents [B, C, height, width] at t [B] (0 .. 1000) to raw output [B, out_channels, height, width].

        cond: text_embeds [B, M, W], text_mask where texts are padded, micro_conditions [B, 3] where the config has
        them. Height and width must divide by the patch size.
        """
        config, (height, width) = self.config, x.shape[2:]
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"input size {height}x{width} must divide by model.patch_size={config.patch_size}")
        cond = self.null_condition(x.shape[0]) if cond is None else cond
        if cond is None or cond.text_embeds is None:
            raise UserError("text_embeds is missing: this network reads text")
        rows, columns = height // config.patch_size, width // config.patch_size
        positions_ND = (
            self.positions_ND
            if (rows, columns) == config.grid
            else rescaled_sincos_grid(
                config.width, rows, columns, config.grid, config.interpolation_scale, x.device
            ).to(x.dtype)
        )
        x_BND = self.patch_embed(patchify(x, config.patch_size)) + positions_ND
        text_BMI = cond.text_embeds if self.text_embed is None else self.text_embed(cond.text_embeds)
        c_BD = self.embed_time(t, cond)
        shared_B16D = self.modulation(F.silu(c_BD)).view(x.shape[0], 1, 6, config.width)
        modulation_BL6D = self.modulation_rows[:-2].view(-1, 6, config.width) + shared_B16D
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, modulation_BL6D[:, i], text_BMI, cond.text_mask)
        shift_B1D, scale_B1D = (self.modulation_rows[-2:] + c_BD[:, None]).chunk(2, dim=1)
        x_BNP = self.output(modulate(x_BND, shift_B1D, scale_B1D, _OUTPUT_NORM_EPS))
        return unpatchify(x_BNP, config.patch_size, height, width)


def forward_flops(config: PixArtConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only.

    input_size: height, width; None takes image_size. text_tokens: of the text that cross-attention reads.
    """
    height, picture_width = input_size or config.image_size
    width, patch_area = config.width, config.patch_size**2
    tokens = height * picture_width // patch_area
    self_attention = tokens * 8 * width * width + attention_flops(width, tokens, tokens)
    context_width = width if config.text_projection else config.text_width
    cross_attention = (
        tokens * 4 * width * width
        + text_tokens * 4 * context_width * width
        + attention_flops(width, tokens, text_tokens)
    )
    block = self_attention + cross_attention + tokens * feedforward_flops(width, 4 * width, "gelu_tanh")
    text = text_tokens * (config.text_width * width + width * width) if config.text_projection else 0
    size_width = width // 3
    sizes = 3 * size_width * (_SINUSOID_WIDTH + size_width) if config.micro_conditions else 0
    condition = text + sizes + _SINUSOID_WIDTH * width + width * width + 6 * width * width
    ends = tokens * width * patch_area * (config.in_channels + config.out_channels)
    return config.depth * block + 2 * (condition + ends)


def pixart_presets() -> dict[str, PixArtConfig]:
    """The papers' networks: alpha at 512 pixels, alpha at 1024 with micro conditions, Sigma at 1024."""
    return {
        "PixArt-XL/2": PixArtConfig(),
        "PixArt-XL/2-1024-MS": PixArtConfig(image_size=(128, 128), interpolation_scale=2.0, micro_conditions=True),
        "PixArt-Sigma-XL/2": PixArtConfig(image_size=(128, 128), interpolation_scale=2.0),
    }
