"""Sana: a diffusion transformer with linear attention that reads text (Xie et al. 2024, "SANA"; 2025, "SANA 1.5").

One file holds the network from latents to raw output. Its cost grows with the number of tokens, not with its square.

    text    y = RMS(fc2(gelu_tanh(fc1(text)))) * weight
    time    c = MLP(sinusoid(t)) [+ MLP(sinusoid(guidance))]          guidance: of the distilled Sprint networks
    adaLN-single, as PixArt: m = Linear(silu(c)), and six learned rows a block
    block   x += gate1 * LinearAttention(LN(x) (1 + scale1) + shift1)
            x += CrossAttention(x, y)                                 neither normed nor gated
            x += gate2 * MixFFN(LN(x) (1 + scale2) + shift2)
    linear attention (section 3.2; no softmax), n and m tokens of one head, r = relu:
            out_n = r(q_n) (sum_m r(k_m) v_m^T) / (r(q_n) . sum_m r(k_m) + 1e-15)
    Mix-FFN a, g = depthwise 3x3 convolution(silu(Linear(x))) on the grid of tokens; Linear(a silu(g)). The convolution
            sees the neighbours, so that no positions are needed; from 2048 pixels on sin-cos positions are added.
    output  Linear(LN(x) (1 + scale) + shift) with shift, scale = c + two learned rows: c itself, not m

Shapes: B batch, C channels in, N tokens, M text tokens, W text width, D width, H heads, K head width, P values of a
patch, L blocks, G channels inside the Mix-FFN (2 * hidden width).

Initialisation (published): neither blocks nor output start at zero.
    Linear, patch embedding     xavier uniform, zero bias
    Mix-FFN                     uniform to 1 / sqrt(fan in), its biases too (PyTorch's for convolutions)
    time and text MLPs          N(0, 0.02)
    guidance MLP                N(0, 0.02), second layer zero
    modulation                  N(0, 0.02), zero bias
    learned modulation rows     N(0, 1 / sqrt(D))
    text norm                   0.01
    null text                   N(0, 1 / sqrt(W)), never trained
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import CrossAttention, RMSNorm, attention_flops, merge_heads
from smalti.nn.embeddings import TimestepEmbedder, patchify, unpatchify
from smalti.nn.feedforward import FeedForward
from smalti.nn.modulation import modulate
from smalti.nn.positions import rescaled_sincos_grid
from smalti.types import Condition

_OUTPUT_NORM_EPS = 1e-6
_RMS_EPS = 1e-5
_SINUSOID_WIDTH = 256


@dataclass(frozen=True)
class SanaConfig:
    """The shape of a Sana. The defaults are Sana-1.6B for 1024-pixel pictures (32x32 latents)."""

    kind: ClassVar[str] = "sana"
    image_size: tuple[int, int] = (32, 32)  # height, width of the latents whose positions others are stretched to
    in_channels: int = 32
    out_channels: int = 32
    patch_size: int = 1
    width: int = 2240
    depth: int = 20
    num_heads: int = 70  # of the linear attention
    num_cross_heads: int = 20
    text_width: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False  # of the linear attention's q, k, v
    qk_norm: bool = False  # RMS over all heads together, in both attentions
    guidance_embeds: bool = False  # the condition's guidance: a distilled guidance scale, times guidance_embeds_scale
    interpolation_scale: float | None = None  # positions are divided by it; None: no positions
    norm_eps: float = 1e-6  # of the blocks' LayerNorms
    null_text_tokens: int = 0  # of the stored text for no prompt, as original files have it; 0: none
    timestep_scale: float = 1.0  # for who calls the network: t is the process's step (0 .. 1000) times this
    guidance_embeds_scale: float = 0.1  # for who calls the network: guidance is the guidance scale times this

    def __post_init__(self) -> None:
        positive = (
            "in_channels", "out_channels", "patch_size", "width", "depth", "num_heads", "num_cross_heads", "text_width",
            "mlp_ratio",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size or height <= 0 or width <= 0:
            raise UserError(f"model.image_size={self.image_size} must divide by model.patch_size={self.patch_size}")
        for name in ("num_heads", "num_cross_heads"):
            if self.width % getattr(self, name):
                raise UserError(f"model.width={self.width} must divide by model.{name}={getattr(self, name)}")
        if self.interpolation_scale is not None and self.interpolation_scale <= 0:
            raise UserError(f"model.interpolation_scale={self.interpolation_scale} must be above 0, or None")
        if self.interpolation_scale is not None and self.width % 4:
            raise UserError(f"model.width={self.width} must divide by 4 for sin-cos positions")
        if self.null_text_tokens < 0:
            raise UserError(f"model.null_text_tokens={self.null_text_tokens} must not be negative")

    @property
    def hidden_width(self) -> int:
        """Width inside the Mix-FFN, after its gate."""
        return int(self.mlp_ratio * self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the config's own size."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class LinearAttention(nn.Module):
    """Multi-head self-attention with relu in the place of the softmax, so that keys and values are summed up once."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)
        self.q_norm = RMSNorm(width, _RMS_EPS) if qk_norm else None
        self.k_norm = RMSNorm(width, _RMS_EPS) if qk_norm else None

    def forward(self, x_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Tokens attend to all tokens of their own row, at a cost of N K^2 a head."""
        batch, tokens, width = x_BND.shape
        qkv_BN3D = self.qkv(x_BND).view(batch, tokens, 3, width)
        if self.q_norm is not None and self.k_norm is not None:
            q_BND, k_BND, v_BND = qkv_BN3D.unbind(2)
            qkv_BN3D = torch.stack([self.q_norm(q_BND), self.k_norm(k_BND), v_BND], dim=2)
        qkv_3BHNK = qkv_BN3D.unflatten(-1, (self.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        q_BHNK, k_BHNK, v_BHNK = qkv_3BHNK.float().unbind(0)  # sums over all tokens overflow in half precision
        q_BHNK, k_BHNK = F.relu(q_BHNK), F.relu(k_BHNK)
        kv_BHKK = k_BHNK.transpose(2, 3) @ v_BHNK
        total_BHK1 = k_BHNK.sum(2).unsqueeze(-1)
        out_BHNK = (q_BHNK @ kv_BHKK) / (q_BHNK @ total_BHK1 + 1e-15)
        return self.out(merge_heads(out_BHNK).to(x_BND.dtype))  # type: ignore[no-any-return]


class MixFeedForward(nn.Module):
    """Linear, SiLU, depthwise 3x3 convolution, gate, Linear. Source: SANA, section 3.2 (GLUMBConv in its code)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        channels = 2 * hidden_width
        self.fc1 = nn.Linear(width, channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.fc2 = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x_BND: Float[Tensor, "B N D"], rows: int, columns: int) -> Float[Tensor, "B N D"]:
        """Tokens of a rows x columns grid in row-major order, mixed with their eight neighbours."""
        # Tokens with their channels last are a picture in the channels-last memory format: no permute copies. SiLU
        # comes after it, so that torch.compile gives the convolution that format at batch 1 as well.
        h_BGhw = F.silu(self.fc1(x_BND).unflatten(1, (rows, columns)).permute(0, 3, 1, 2))
        h_BGhw = self.depthwise(h_BGhw)
        value, gate = h_BGhw.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))  # type: ignore[no-any-return]


class SanaBlock(nn.Module):
    """Linear attention, cross-attention to the text, Mix-FFN; the first and last modulated and gated."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = LinearAttention(config.width, config.num_heads, config.qk_norm, config.attention_bias)
        self.cross_attn = CrossAttention(
            config.width,
            config.width,
            config.num_cross_heads,
            qk_norm=config.qk_norm,
            norm_eps=_RMS_EPS,
            norm_across_heads=True,
        )
        self.mlp = MixFeedForward(config.width, config.hidden_width)

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        modulation_B6D: Float[Tensor, "B 6 D"],
        text_BMD: Float[Tensor, "B M D"],
        text_mask_BM: Bool[Tensor, "B M"] | None,
        grid: tuple[int, int],
    ) -> Float[Tensor, "B N D"]:
        """Tokens of a grid through one block; modulation holds shift, scale, gate for attention, then for Mix-FFN."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_B6D.unsqueeze(2).unbind(1)  # each B1D
        x_BND = torch.addcmul(x_BND, gate1, self.attn(modulate(x_BND, shift1, scale1, self.norm_eps)))
        x_BND = x_BND + self.cross_attn(x_BND, text_BMD, text_mask_BM)
        return torch.addcmul(x_BND, gate2, self.mlp(modulate(x_BND, shift2, scale2, self.norm_eps), *grid))


class Sana(nn.Module):
    """The linear-attention diffusion transformer."""

    positions_ND: Tensor | None
    null_text_MW: Tensor | None

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_area = config.width, config.patch_size**2
        self.patch_embed = nn.Linear(config.in_channels * patch_area, width)
        self.time_embed = TimestepEmbedder(width, _SINUSOID_WIDTH)
        self.guidance_embed = TimestepEmbedder(width, _SINUSOID_WIDTH) if config.guidance_embeds else None
        self.text_embed = FeedForward(config.text_width, width, "gelu_tanh", out_width=width)
        self.text_norm = RMSNorm(width, _RMS_EPS)
        self.modulation = nn.Linear(width, 6 * width)
        self.modulation_rows = nn.Parameter(torch.zeros(6 * config.depth + 2, width))  # the last two: of the output
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.depth))
        self.output = nn.Linear(width, config.out_channels * patch_area)
        scale = config.interpolation_scale
        table = None if scale is None else rescaled_sincos_grid(width, *config.grid, config.grid, scale)
        self.register_buffer("positions_ND", table, persistent=False)
        null_text = torch.zeros(config.null_text_tokens, config.text_width) if config.null_text_tokens else None
        self.register_buffer("null_text_MW", null_text)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            mlp: MixFeedForward = block.mlp  # type: ignore[assignment]
            for layer, fan_in in ((mlp.fc1, mlp.fc1.in_features), (mlp.depthwise, 9), (mlp.fc2, mlp.fc2.in_features)):
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        small = [self.time_embed.fc1, self.time_embed.fc2, self.text_embed.fc1, self.text_embed.fc2, self.modulation]
        for linear in (*small, *([self.guidance_embed.fc1] if self.guidance_embed is not None else [])):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        if self.guidance_embed is not None:
            nn.init.zeros_(self.guidance_embed.fc2.weight)
        nn.init.constant_(self.text_norm.weight, 0.01)
        nn.init.normal_(self.modulation_rows, std=self.config.width**-0.5, generator=generator)
        if self.null_text_MW is not None:
            nn.init.normal_(self.null_text_MW, std=self.config.text_width**-0.5, generator=generator)

    def null_condition(self, batch_size: int) -> Condition | None:
        """The stored text for no prompt; None without one: then only the text encoder knows what an empty prompt is."""
        if self.null_text_MW is None:
            return None
        return Condition(text_embeds=self.null_text_MW.expand(batch_size, -1, -1))

    def embed_time(self, t: Float[Tensor, " B"], cond: Condition) -> Float[Tensor, "B D"]:
        """Network time and, where the network takes it, the guidance scale to one vector a row."""
        c_BD = self.time_embed(t)
        if self.guidance_embed is None:
            return c_BD  # type: ignore[no-any-return]
        if cond.guidance is None:
            raise UserError("guidance is missing: this network is distilled and reads its guidance scale")
        return c_BD + self.guidance_embed(cond.guidance)  # type: ignore[no-any-return]

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out height width"]:
        """Noisy latents [B, C, height, width] at t [B] to raw output [B, out_channels, height, width].

        t: in the unit that the diffusers class takes, with timestep_scale applied. cond: text_embeds [B, M, W],
        text_mask where texts are padded, guidance [B] where the config has it, with guidance_embeds_scale applied.
        Height and width must divide by the patch size.
        """
        config, (height, width) = self.config, x.shape[2:]
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"input size {height}x{width} must divide by model.patch_size={config.patch_size}")
        cond = self.null_condition(x.shape[0]) if cond is None else cond
        if cond is None or cond.text_embeds is None:
            raise UserError("text_embeds is missing: this network reads text")
        grid = height // config.patch_size, width // config.patch_size
        x_BND = self.patch_embed(patchify(x, config.patch_size))
        if config.interpolation_scale is not None:
            positions_ND = (
                self.positions_ND
                if grid == config.grid
                else rescaled_sincos_grid(config.width, *grid, config.grid, config.interpolation_scale, x.device).to(
                    x.dtype
                )
            )
            x_BND = x_BND + positions_ND
        text_BMD = self.text_norm(self.text_embed(cond.text_embeds))
        c_BD = self.embed_time(t, cond)
        shared_B16D = self.modulation(F.silu(c_BD)).view(x.shape[0], 1, 6, config.width)
        modulation_BL6D = self.modulation_rows[:-2].view(-1, 6, config.width) + shared_B16D
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, modulation_BL6D[:, i], text_BMD, cond.text_mask, grid)
        shift_B1D, scale_B1D = (self.modulation_rows[-2:] + c_BD[:, None]).chunk(2, dim=1)
        x_BNP = self.output(modulate(x_BND, shift_B1D, scale_B1D, _OUTPUT_NORM_EPS))
        return unpatchify(x_BNP, config.patch_size, height, width)


def forward_flops(config: SanaConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products and convolutions only.

    input_size: height, width; None takes image_size. text_tokens: of the text that cross-attention reads.
    """
    height, picture_width = input_size or config.image_size
    width, hidden, patch_area = config.width, config.hidden_width, config.patch_size**2
    tokens = height * picture_width // patch_area
    head_width = width // config.num_heads
    linear_attention = tokens * (8 * width * width + 2 * width * (2 * head_width + 1))
    cross_attention = (tokens + text_tokens) * 4 * width * width + attention_flops(width, tokens, text_tokens)
    mix = tokens * 2 * (2 * hidden * width + 2 * hidden * 9 + hidden * width)
    text = text_tokens * (config.text_width * width + width * width)
    embedders = 2 if config.guidance_embeds else 1
    condition = text + embedders * (_SINUSOID_WIDTH * width + width * width) + 6 * width * width
    ends = tokens * width * patch_area * (config.in_channels + config.out_channels)
    return config.depth * (linear_attention + cross_attention + mix) + 2 * (condition + ends)


def sana_presets() -> dict[str, SanaConfig]:
    """The paper's networks for 1024-pixel pictures."""
    return {
        "Sana-0.6B": SanaConfig(width=1152, depth=28, num_heads=36, num_cross_heads=16),
        "Sana-1.6B": SanaConfig(),
    }
