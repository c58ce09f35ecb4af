"""aMUSEd's masked token network (Patil et al. 2024, "aMUSEd: an open MUSE reproduction"; open-muse's MaskGiTUViT).

A text-to-image network over a picture's codebook indices: what is masked is predicted from the rest and the text.
Convolutions that attend to the text (and may halve the grid), a transformer on the grid's tokens, convolutions again,
and logits over the codebook. It is fed no time: the share of masked tokens says it.

Shapes: B batch, h, w rows and columns of tokens, N = h w (a quarter of it inside, where the grid is halved), M text
tokens, I text width, D width of the transformer, C width of the convolutions, E width of the token table, S conditions
of a modulation, V codebook size.

Initialisation            published (open-muse, modeling_transformer_v2.py)
    Linear, convolution   N(0, 0.02)
    token table           N(0, 1 / vocabulary_size)
    token_proj            xavier uniform with gain 0.02
    modulation            zero: the pooled condition starts silent; there are no gates, blocks are not the identity
    response norm         zero: it starts as the identity
    head                  head_proj zero: the logits start at 0; output: the token table's rows
    upsample              uniform within 1 / sqrt(4 C): PyTorch's own
Layers have no bias.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import CrossAttention, RMSNorm, SelfAttention, attention_flops
from smalti.nn.embeddings import VectorEmbedder, sinusoid
from smalti.nn.feedforward import FeedForward, feedforward_flops
from smalti.types import Condition

_TEXT_ATTENTION_EPS = 1e-6  # of the norms in the convolutional stages' attention: not norm_eps
_RESPONSE_EPS = 1e-6


@dataclass(frozen=True)
class AmusedConfig:
    """The shape of an aMUSEd network. The defaults are those of aMUSEd-256."""

    kind: ClassVar[str] = "amused"
    codebook_size: int = 8192  # classes of the logits
    vocabulary_size: int = 8256  # rows of the token table: the codebook, unused rows, and the mask token as the last
    grid_size: int = 16  # rows and columns that it was trained on; the network takes any
    width: int = 1024
    depth: int = 22
    num_heads: int = 16
    mlp_width: int = 2816
    token_width: int = 768
    conv_width: int = 768
    conv_depth: int = 3  # pairs of convolution and attention on each side of the transformer
    conv_heads: int = 12
    downsample: bool = False  # the transformer works on a grid of half the rows and columns
    text_width: int = 768
    pooled_width: int = 768
    num_micro_conditions: int = 5
    micro_condition_width: int = 256
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "codebook_size", "vocabulary_size", "grid_size", "width", "depth", "num_heads", "mlp_width", "token_width",
            "conv_width", "conv_depth", "conv_heads", "text_width", "pooled_width", "num_micro_conditions",
            "micro_condition_width", "norm_eps",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        if self.conv_width % self.conv_heads:
            raise UserError(f"model.conv_width={self.conv_width} must divide by model.conv_heads={self.conv_heads}")
        if self.vocabulary_size <= self.codebook_size:
            raise UserError(
                f"model.vocabulary_size={self.vocabulary_size} must be above model.codebook_size={self.codebook_size}: "
                "its last token is the mask"
            )
        if self.downsample and self.grid_size % 2:
            raise UserError(f"model.grid_size={self.grid_size} must be even with model.downsample=True")

    @property
    def mask_token(self) -> int:
        """The index that stands for a masked token."""
        return self.vocabulary_size - 1

    @property
    def modulation_widths(self) -> tuple[int, int, int]:
        """Outputs of the one modulation layer for the first convolutions, the transformer and the last convolutions."""
        convolutions = 2 * self.conv_depth * self.conv_width
        return convolutions, 6 * self.depth * self.width, convolutions


class GlobalResponseNorm(nn.Module):
    """x + gamma x n + beta, n: a channel's norm over the grid divided by the mean of the channels' norms.

    Source: Woo et al. 2023 (ConvNeXt V2), section 3.2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        """Each picture's grid on its own."""
        # vector_norm takes 15 times as long on a CPU. The clamp makes the slope at zero 0, as vector_norm's, not NaN.
        squares = x.float().square().sum(dim=(1, 2), keepdim=True)
        norms = squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        responses = norms / (norms.mean(dim=-1, keepdim=True) + _RESPONSE_EPS)
        return torch.addcmul(self.beta, x, 1 + self.gamma * responses.to(x.dtype))


class ConvNeXtBlock(nn.Module):
    """Depthwise 3x3 convolution and a two-layer perceptron; the sum is scaled and shifted by the condition."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        width = config.conv_width
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = RMSNorm(width, config.norm_eps)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.response_norm = GlobalResponseNorm(4 * width)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x_BhwC: Float[Tensor, "B h w C"], modulation_B2C: Float[Tensor, "B 2 C"]
    ) -> Float[Tensor, "B h w C"]:
        """A grid through one block; modulation holds scale, then shift."""
        scale, shift = modulation_B2C[:, :, None, None].unbind(1)  # each B11C
        h_BhwC = self.norm(convolved(self.depthwise, x_BhwC))
        h_BhwC = self.fc2(self.response_norm(F.gelu(self.fc1(h_BhwC))))
        return torch.addcmul(shift, x_BhwC + h_BhwC, 1 + scale)


class TextAttentionBlock(nn.Module):
    """Two attentions to the text, one after the other (the checkpoints call the first one self-attention)."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        width, heads = config.conv_width, config.conv_heads
        self.context_proj = nn.Linear(config.width, width, bias=False) if config.width != width else None
        self.norm1 = RMSNorm(width, _TEXT_ATTENTION_EPS)
        self.attn1 = CrossAttention(width, width, heads, bias=False, out_bias=False)
        self.norm2 = RMSNorm(width, _TEXT_ATTENTION_EPS)
        self.attn2 = CrossAttention(width, width, heads, bias=False, out_bias=False)

    def forward(
        self, x_BNC: Float[Tensor, "B N C"], text_BMD: Float[Tensor, "B M D"], mask_BM: Bool[Tensor, "B M"] | None
    ) -> Float[Tensor, "B N C"]:
        """Each token attends to the text of its picture."""
        context = text_BMD if self.context_proj is None else self.context_proj(F.silu(text_BMD))
        x_BNC = x_BNC + self.attn1(self.norm1(x_BNC), context, mask_BM)
        return x_BNC + self.attn2(self.norm2(x_BNC), context, mask_BM)  # type: ignore[no-any-return]


class ConvStage(nn.Module):
    """Convolutions and attentions to the text in turn."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        self.conv_blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.conv_depth))
        self.attention_blocks = nn.ModuleList(TextAttentionBlock(config) for _ in range(config.conv_depth))

    def forward(
        self,
        x_BhwC: Float[Tensor, "B h w C"],
        modulation_BR: Float[Tensor, "B R"],
        text_BMD: Float[Tensor, "B M D"],
        mask_BM: Bool[Tensor, "B M"] | None,
    ) -> Float[Tensor, "B h w C"]:
        """A grid through the stage; modulation holds scale and shift for each convolution."""
        batch, rows, columns, width = x_BhwC.shape
        modulations = modulation_BR.view(batch, -1, 2, width).unbind(1)
        for conv, attention, modulation in zip(self.conv_blocks, self.attention_blocks, modulations, strict=True):
            x_BNC = attention(conv(x_BhwC, modulation).flatten(1, 2), text_BMD, mask_BM)
            x_BhwC = x_BNC.view(batch, rows, columns, width)
        return x_BhwC


class AmusedBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each on tokens scaled and shifted by the condition."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.norm_eps = config.norm_eps
        self.norm1_weight = nn.Parameter(torch.ones(width))  # of RMS norms, the third of a LayerNorm
        self.norm2_weight = nn.Parameter(torch.ones(width))
        self.norm3_weight = nn.Parameter(torch.ones(width))
        self.attn1 = SelfAttention(width, heads, bias=False)
        self.attn2 = CrossAttention(width, width, heads, bias=False, out_bias=False)
        self.mlp = FeedForward(width, config.mlp_width, "geglu", bias=False)

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        modulation_B6D: Float[Tensor, "B 6 D"],
        text_BMD: Float[Tensor, "B M D"],
        mask_BM: Bool[Tensor, "B M"] | None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; modulation holds scale and shift for each of its three layers."""
        scale1, shift1, scale2, shift2, scale3, shift3 = modulation_B6D.unsqueeze(2).unbind(1)  # each B1D
        width, eps = (x_BND.shape[-1],), self.norm_eps
        # The norms' weights go into the scales, which have no tokens: one pass over the tokens less.
        h_BND = torch.addcmul(shift1, F.rms_norm(x_BND, width, eps=eps), self.norm1_weight * (1 + scale1))
        x_BND = x_BND + self.attn1(h_BND)
        h_BND = torch.addcmul(shift2, F.rms_norm(x_BND, width, eps=eps), self.norm2_weight * (1 + scale2))
        x_BND = x_BND + self.attn2(h_BND, text_BMD, mask_BM)
        h_BND = torch.addcmul(shift3, F.layer_norm(x_BND, width, eps=eps), self.norm3_weight * (1 + scale3))
        return x_BND + self.mlp(h_BND)  # type: ignore[no-any-return]


class Amused(nn.Module):
    """aMUSEd's network. The modulations of all blocks come from one matrix product a forward."""

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        self.config = config
        width, conv_width, token_width, eps = config.width, config.conv_width, config.token_width, config.norm_eps
        condition_width = config.pooled_width + config.num_micro_conditions * config.micro_condition_width
        self.text_proj = nn.Linear(config.text_width, width, bias=False)
        self.text_norm = RMSNorm(width, eps)
        self.condition_embed = VectorEmbedder(condition_width, width, bias=False)
        self.modulation = nn.Linear(width, sum(config.modulation_widths), bias=False)
        self.token_embed = nn.Embedding(config.vocabulary_size, token_width)
        self.token_norm = RMSNorm(token_width, eps)
        self.token_proj = nn.Linear(token_width, conv_width, bias=False)
        self.downsample_norm = RMSNorm(conv_width, eps) if config.downsample else None
        self.downsample = nn.Conv2d(conv_width, conv_width, 2, stride=2, bias=False) if config.downsample else None
        self.first_convs = ConvStage(config)
        self.blocks_norm = RMSNorm(conv_width, eps)
        self.blocks_proj = nn.Linear(conv_width, width, bias=False)
        self.blocks = nn.ModuleList(AmusedBlock(config) for _ in range(config.depth))
        self.convs_norm = RMSNorm(width, eps)
        self.convs_proj = nn.Linear(width, conv_width, bias=False)
        self.last_convs = ConvStage(config)
        self.upsample_norm = RMSNorm(conv_width, eps) if config.downsample else None
        self.upsample = (
            nn.ConvTranspose2d(conv_width, conv_width, 2, stride=2, bias=False) if config.downsample else None
        )
        self.head_proj = nn.Linear(conv_width, token_width, bias=False)
        self.head_norm = RMSNorm(token_width, eps)
        self.output = nn.Linear(token_width, config.codebook_size, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            elif isinstance(module, nn.ConvTranspose2d):
                bound = (4 * self.config.conv_width) ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
        table = self.token_embed.weight
        nn.init.normal_(table, std=self.config.vocabulary_size**-0.5, generator=generator)
        nn.init.xavier_uniform_(self.token_proj.weight, gain=0.02, generator=generator)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head_proj.weight)
        self.output.weight.copy_(table[: self.config.codebook_size])

    def null_condition(self, batch_size: int) -> Condition | None:
        """None: only the text encoder knows what an empty prompt is."""
        return None

    def embed_condition(self, cond: Condition) -> Float[Tensor, "B D"]:
        """Pooled text and micro-conditions to one vector a row."""
        assert cond.pooled_embeds is not None
        assert cond.micro_conditions is not None
        micro = sinusoid(cond.micro_conditions, self.config.micro_condition_width).flatten(1)
        return self.condition_embed(torch.cat([cond.pooled_embeds, micro.to(cond.pooled_embeds.dtype)], dim=1))  # type: ignore[no-any-return]

    def forward(
        self, x: Int[Tensor, "B h w"], t: Float[Tensor, " B"] | None = None, cond: Condition | None = None
    ) -> Float[Tensor, "B V h w"]:
        """Codebook indices with masked ones [B, h, w], any h and w, to logits [B, codebook_size, h, w].

        t is not read. cond: text_embeds [B, M, text_width], the text encoder's last hidden state but one;
        pooled_embeds [B, pooled_width], its projected output; micro_conditions [B, num_micro_conditions]: width and
        height of the original picture, the crop's left and top in pixels, the aesthetic score. text_mask: text tokens
        that are False are not seen; the published networks were trained without one, with all 77 seen.
        Raises UserError for a missing condition, and for an odd h or w where the network halves the grid.
        """
        for name in ("text_embeds", "pooled_embeds", "micro_conditions"):
            if cond is None or getattr(cond, name) is None:
                raise UserError(f"{name} is missing: this network reads text_embeds, pooled_embeds, micro_conditions")
        assert cond is not None
        if self.config.downsample and (x.shape[1] % 2 or x.shape[2] % 2):
            raise UserError(f"x of {x.shape[1]}x{x.shape[2]} tokens: this network halves the grid, both must be even")
        text_BMD, mask_BM = self.text_norm(self.text_proj(cond.text_embeds)), cond.text_mask
        modulation_BR = self.modulation(F.silu(self.embed_condition(cond)))
        first_BR, blocks_BR, last_BR = modulation_BR.split(self.config.modulation_widths, dim=1)

        x_BhwC = self.token_proj(self.token_norm(self.token_embed(x)))
        if self.downsample_norm is not None and self.downsample is not None:
            x_BhwC = convolved(self.downsample, self.downsample_norm(x_BhwC))
        x_BhwC = self.first_convs(x_BhwC, first_BR, text_BMD, mask_BM)

        x_BND = self.blocks_proj(self.blocks_norm(x_BhwC.flatten(1, 2)))
        modulation_BL6D = blocks_BR.view(len(x), -1, 6, self.config.width)
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, modulation_BL6D[:, i], text_BMD, mask_BM)
        x_BhwC = self.convs_proj(self.convs_norm(x_BND)).view(x_BhwC.shape)

        x_BhwC = self.last_convs(x_BhwC, last_BR, text_BMD, mask_BM)
        if self.upsample_norm is not None and self.upsample is not None:
            x_BhwC = convolved(self.upsample, self.upsample_norm(x_BhwC))
        return self.output(self.head_norm(self.head_proj(x_BhwC))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def convolved(
    convolution: nn.Conv2d | nn.ConvTranspose2d, x_BhwC: Float[Tensor, "B h w C"]
) -> Float[Tensor, "B rows columns C"]:
    """A convolution on a grid with its channels last; in memory they stay last."""
    return convolution(x_BhwC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def forward_flops(config: AmusedConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products and convolutions only.

    input_size: rows and columns of tokens, its training's by default.
    """
    rows, columns = input_size or (config.grid_size, config.grid_size)
    tokens, text = rows * columns, text_tokens
    inner = tokens // 4 if config.downsample else tokens
    width, conv, embed = config.width, config.conv_width, config.token_width
    condition = config.pooled_width + config.num_micro_conditions * config.micro_condition_width
    once = 2 * (text * config.text_width * width + width * (condition + width + sum(config.modulation_widths)))
    convolution = inner * (18 * conv + 16 * conv * conv)
    to_text = 4 * inner * conv * conv + 4 * text * conv * conv + attention_flops(conv, inner, text)
    context = 2 * text * width * conv if width != conv else 0
    stage = config.conv_depth * (convolution + context + 2 * to_text)
    block = (
        inner * (12 * width * width + feedforward_flops(width, config.mlp_width, "geglu"))
        + 4 * text * width * width
        + attention_flops(width, inner, inner + text)
    )
    resampling = 2 * 8 * inner * conv * conv if config.downsample else 0
    ends = 2 * (2 * tokens * embed * conv + 2 * inner * conv * width + tokens * embed * config.codebook_size)
    return once + 2 * stage + config.depth * block + resampling + ends


def amused_presets() -> dict[str, AmusedConfig]:
    """The published networks for pictures of 256x256 and 512x512 pixels, 16 to a token."""
    return {"aMUSEd-256": AmusedConfig(), "aMUSEd-512": AmusedConfig(grid_size=32, downsample=True)}
