"""Z-Image: a single-stream transformer for text to image (Z-Image team 2025, "Z-Image: an efficient image generation
foundation model with single-stream diffusion transformer"), built on Lumina-Image 2.0.

Pictures and captions first pass blocks of their own (noise refiner, context refiner), then one stack of blocks reads
them as one sequence, pictures first. Rotary positions have three axes: caption tokens stand at (1, 0, 0), (2, 0, 0)
..., a picture's tokens at (caption length + 1, row, column). Both sequences are filled up to a multiple of 32 with
learned tokens, which are attended as any other.

Shapes: B batch, C channels, N tokens, M caption tokens, D width, K head width, A width of the time vector, L blocks
that know the time, I caption width.

Initialisation (not published for Z-Image; this is Lumina-Image 2.0's)
    Linear                xavier uniform, zero bias
    text embedding        N(0, 0.02)
    time MLP              N(0, 0.02)
    padding tokens        N(0, 0.02)
    modulation            zero: each block that knows the time is the identity
    output                zero: the network starts at 0
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import RMSNorm, SelfAttention, attention_flops
from smalti.nn.embeddings import TimestepEmbedder, patchify, unpatchify
from smalti.nn.feedforward import FeedForward, feedforward_flops
from smalti.nn.positions import rope_angles, rope_grid
from smalti.types import Condition, required_field

_TOKEN_MULTIPLE = 32  # both sequences are filled up to a multiple of this
_QK_NORM_EPS = 1e-5
_OUTPUT_NORM_EPS = 1e-6
_SINUSOID_WIDTH, _TIME_HIDDEN_WIDTH = 256, 1024
_NATIVE_SIZE = (128, 128)  # latents of 1024 x 1024 pixels


@dataclass(frozen=True)
class ZImageConfig:
    """The shape of a Z-Image transformer. The defaults are the published network's."""

    kind: ClassVar[str] = "zimage"
    in_channels: int = 16
    patch_size: int = 2
    width: int = 3840
    depth: int = 30
    refiner_depth: int = 2  # of each refiner
    num_heads: int = 30
    text_width: int = 2560  # of the caption's embeddings
    rope_widths: tuple[int, ...] = (32, 48, 48)  # features of a head turned by place in the caption, row, column
    rope_lengths: tuple[int, ...] = (1024, 512, 512)  # positions of each axis that the network is made for
    rope_theta: float = 256.0
    time_scale: float = 1000.0
    qk_norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_size", "width", "depth", "num_heads", "text_width"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.refiner_depth < 0:
            raise UserError(f"model.refiner_depth={self.refiner_depth} must not be negative")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        head_width = self.width // self.num_heads
        if len(self.rope_widths) != 3 or sum(self.rope_widths) != head_width or any(w % 2 for w in self.rope_widths):
            raise UserError(f"model.rope_widths={self.rope_widths} must be 3 even numbers whose sum is {head_width}")
        if len(self.rope_lengths) != 3 or min(self.rope_lengths) <= 0:
            raise UserError(f"model.rope_lengths={self.rope_lengths} must be 3 numbers above 0")

    @property
    def out_channels(self) -> int:
        """Channels of the raw output."""
        return self.in_channels

    @property
    def hidden_width(self) -> int:
        """Width inside the feed-forward layers."""
        return int(self.width / 3 * 8)

    @property
    def time_width(self) -> int:
        """Width of the time vector, small so that the modulations of all blocks are a low-rank map."""
        return min(self.width, 256)


class ZImageBlock(nn.Module):
    """Self-attention and feed-forward, each normed on its way in and on its way out.

    In a block that knows the time, the way in is scaled and the way out gated (gates are tanh, so within -1 .. 1).
    """

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.attn_norm_in = RMSNorm(config.width, config.norm_eps)
        self.attn = SelfAttention(config.width, config.num_heads, config.qk_norm, bias=False, norm_eps=_QK_NORM_EPS)
        self.attn_norm_out = RMSNorm(config.width, config.norm_eps)
        self.mlp_norm_in = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config.width, config.hidden_width, "swiglu", bias=False)
        self.mlp_norm_out = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        rope_2NK: Float[Tensor, "2 *rows N K"],
        mask_BN: Bool[Tensor, "B N"] | None = None,
        scales_B2D: Float[Tensor, "B 2 D"] | None = None,
        gates_B2D: Float[Tensor, "B 2 D"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; tokens where mask_BN is False are seen by none."""
        if scales_B2D is None or gates_B2D is None:
            x_BND = x_BND + self.attn_norm_out(self.attn(self.attn_norm_in(x_BND), rope_2NK, mask_BN))
            return x_BND + self.mlp_norm_out(self.mlp(self.mlp_norm_in(x_BND)))  # type: ignore[no-any-return]
        # The norms' weights go into scale and gate, which are one row a sample: a pass less over all tokens each.
        scale1, scale2 = scales_B2D.unsqueeze(2).unbind(1)  # each B1D
        gate1, gate2 = gates_B2D.unsqueeze(2).unbind(1)
        h_BND = self.attn(self._normed(x_BND) * (self.attn_norm_in.weight * scale1), rope_2NK, mask_BN)
        x_BND = torch.addcmul(x_BND, gate1 * self.attn_norm_out.weight, self._normed(h_BND))
        h_BND = self.mlp(self._normed(x_BND) * (self.mlp_norm_in.weight * scale2))
        return torch.addcmul(x_BND, gate2 * self.mlp_norm_out.weight, self._normed(h_BND))

    def _normed(self, x_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return F.rms_norm(x_BND, x_BND.shape[-1:], None, self.attn_norm_in.eps)


class ZImage(nn.Module):
    """The Z-Image transformer. The modulations of all blocks come from one matrix product a forward."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_values = config.width, config.in_channels * config.patch_size**2
        self.patch_embed = nn.Linear(patch_values, width)
        self.image_padding = nn.Parameter(torch.zeros(width))
        self.time_embed = TimestepEmbedder(config.time_width, _SINUSOID_WIDTH, hidden_width=_TIME_HIDDEN_WIDTH)
        self.text_norm = RMSNorm(config.text_width, config.norm_eps)
        self.text_embed = nn.Linear(config.text_width, width)
        self.text_padding = nn.Parameter(torch.zeros(width))
        self.modulation = nn.Linear(config.time_width, 4 * (config.refiner_depth + config.depth) * width)
        self.noise_refiner = nn.ModuleList(ZImageBlock(config) for _ in range(config.refiner_depth))
        self.context_refiner = nn.ModuleList(ZImageBlock(config) for _ in range(config.refiner_depth))
        self.blocks = nn.ModuleList(ZImageBlock(config) for _ in range(config.depth))
        self.output_scale = nn.Linear(config.time_width, width)
        self.output = nn.Linear(width, patch_values)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for weight in (
            self.text_embed.weight, self.time_embed.fc1.weight, self.time_embed.fc2.weight,
            self.image_padding, self.text_padding,
        ):  # fmt: skip
            nn.init.normal_(weight, std=0.02, generator=generator)
        for layer in (self.modulation, self.output_scale, self.output):
            nn.init.zeros_(layer.weight)

    def null_condition(self, batch_size: int) -> Condition | None:
        """None: only the text encoder knows what an empty caption is."""
        return None

    def embed_caption(
        self, text_BMI: Float[Tensor, "B M I"], mask_BM: Bool[Tensor, "B M"] | None
    ) -> Float[Tensor, "B padded D"]:
        """Caption tokens, filled up to a multiple of 32 and, where mask_BM is False, with the learned token."""
        c_BMD = self.text_embed(self.text_norm(text_BMI))
        if mask_BM is not None:
            c_BMD = torch.where(mask_BM[..., None], c_BMD, self.text_padding.to(c_BMD.dtype))
        return filled_up(c_BMD, self.text_padding)

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B C height width"]:
        """Noisy latents [B, C, height, width] at network time t [B] to raw output of the same shape.

        t is 1 - sigma: 1 is data and 0 is noise, and the output points from noise to data (the published pipeline
        negates it). cond: text_embeds [B, M, text_width], and text_mask [B, M] where captions differ in length. Raises
        UserError for a missing caption, for sides that do not divide by patch_size, and past config.rope_lengths.
        """
        config = self.config
        text_BMI = required_field(cond, "text_embeds")
        mask_BM = None if cond is None else cond.text_mask
        height, width = x.shape[2:]
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"x of {height} x {width}: both sides must divide by model.patch_size={config.patch_size}")
        grid = (height // config.patch_size, width // config.patch_size)
        images, captions = padded_length(grid[0] * grid[1]), padded_length(text_BMI.shape[1])
        if any(size > limit for size, limit in zip((captions + 2, *grid), config.rope_lengths, strict=True)):
            raise UserError(
                f"a caption of {captions} tokens and a picture of {grid[0]} x {grid[1]} patches are past "
                f"model.rope_lengths={config.rope_lengths}"
            )
        seen_BM, seen_BN = None, None  # without a mask every token is seen
        if mask_BM is None:
            places_M, length = torch.arange(1, captions + 1, device=x.device), torch.tensor(captions, device=x.device)
            rope_2NK = rope_of(grid, places_M, length, config.rope_widths, config.rope_theta)
        else:
            positions_BM, lengths_B = caption_positions(F.pad(mask_BM, (0, captions - mask_BM.shape[1])))
            rope_2NK = rope_of(grid, positions_BM, lengths_B, config.rope_widths, config.rope_theta)[:, :, None]
            attended_BM = positions_BM <= lengths_B[:, None]
            seen_BN = F.pad(attended_BM, (images, 0), value=True)
            # An empty caption has no token to attend to; what comes of it is seen by none.
            seen_BM = attended_BM | (lengths_B == 0)[:, None]

        c_BA = self.time_embed(t * config.time_scale).to(x.dtype)
        modulation_BL22D = self.modulation(c_BA).view(x.shape[0], -1, 2, 2, config.width)
        scales_BL2D, gates_BL2D = 1 + modulation_BL22D[:, :, :, 0], modulation_BL22D[:, :, :, 1].tanh()
        modulations = list(zip(scales_BL2D.unbind(1), gates_BL2D.unbind(1), strict=True))

        patches = patchify(x, config.patch_size, "channel_last")
        x_BND = filled_up(self.patch_embed(patches), self.image_padding)
        for block, (scales, gates) in zip(self.noise_refiner, modulations[: config.refiner_depth], strict=True):
            x_BND = block(x_BND, rope_2NK[..., :images, :], None, scales, gates)
        c_BMD = self.embed_caption(text_BMI, mask_BM)
        for block in self.context_refiner:
            c_BMD = block(c_BMD, rope_2NK[..., images:, :], seen_BM)
        x_BND = torch.cat([x_BND, c_BMD], dim=1)
        for block, (scales, gates) in zip(self.blocks, modulations[config.refiner_depth :], strict=True):
            x_BND = block(x_BND, rope_2NK, seen_BN, scales, gates)

        x_BND = F.layer_norm(x_BND[:, : patches.shape[1]], (config.width,), eps=_OUTPUT_NORM_EPS)
        x_BND = self.output(x_BND * (1 + self.output_scale(F.silu(c_BA)))[:, None])
        return unpatchify(x_BND, config.patch_size, height, width)


def padded_length(tokens: int) -> int:
    """The next multiple of 32."""
    return -(-tokens // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE


def filled_up(x_BND: Float[Tensor, "B N D"], token_D: Float[Tensor, " D"]) -> Float[Tensor, "B padded D"]:
    """Tokens, with copies of one behind them up to padded_length."""
    missing = padded_length(x_BND.shape[1]) - x_BND.shape[1]
    if not missing:
        return x_BND
    return torch.cat([x_BND, token_D.to(x_BND.dtype).expand(x_BND.shape[0], missing, -1)], dim=1)


def caption_positions(mask_BM: Bool[Tensor, "B M"]) -> tuple[Int[Tensor, "B M"], Int[Tensor, " B"]]:
    """Where each caption's tokens stand: the real ones at 1, 2 ... in order, the rest behind; and the padded lengths.

    A token past its caption's padded length is not to be seen. The real tokens may stand anywhere in a row.
    """
    count_BM = mask_BM.cumsum(1)
    length_B = count_BM[:, -1]
    positions_BM = torch.where(mask_BM, count_BM, length_B[:, None] + (~mask_BM).cumsum(1))
    return positions_BM, -(-length_B // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE


def rope_of(
    grid: tuple[int, int],
    captions_M: Int[Tensor, "*rows M"],
    lengths: Int[Tensor, "*rows"],
    widths: tuple[int, ...],
    theta: float,
) -> Float[Tensor, "2 *rows N K"]:
    """Rotary angles of a picture's tokens and then its caption's, for captions at these places and of these lengths."""
    batch, tokens = lengths.shape, grid[0] * grid[1]
    frame = rope_angles((lengths + 1)[..., None, None], widths[:1], theta)
    rows_columns = rope_grid(grid, widths[1:], theta, captions_M.device)
    rows_columns = rows_columns.view(2, *[1] * len(batch), *rows_columns.shape[1:])
    image_N = torch.cat([frame.expand(2, *batch, tokens, -1), rows_columns.expand(2, *batch, -1, -1)], dim=-1)
    caption_M = _unturned(rope_angles(captions_M[..., None], widths[:1], theta), 0, widths[1] + widths[2])
    return torch.cat([_unturned(image_N, padded_length(tokens) - tokens, 0), caption_M], dim=-2)


def _unturned(
    cos_sin: Float[Tensor, "2 *rows N K"], tokens: int, features: int
) -> Float[Tensor, "2 *rows padded wide"]:
    """The angles with so many tokens and features more at angle 0."""
    return torch.stack([F.pad(cos_sin[i], (0, features, 0, tokens), value=1.0 - i) for i in range(2)])


def forward_flops(config: ZImageConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only.

    input_size: (height, width) of the latents, None for those of 1024 x 1024 pixels.
    """
    height, width = input_size or _NATIVE_SIZE
    tokens = height * width // config.patch_size**2
    images, captions = padded_length(tokens), padded_length(text_tokens)
    mlp = feedforward_flops(config.width, config.hidden_width, "swiglu")

    def block(n: int) -> int:
        return n * (8 * config.width**2 + mlp) + attention_flops(config.width, n, n)

    blocks = config.refiner_depth * (block(images) + block(captions)) + config.depth * block(images + captions)
    ends = 2 * tokens * config.width * config.in_channels * config.patch_size**2 + (
        text_tokens * config.text_width * config.width
    )
    modulated = 4 * (config.refiner_depth + config.depth) + 1
    time = (_SINUSOID_WIDTH + config.time_width) * _TIME_HIDDEN_WIDTH + config.time_width * modulated * config.width
    return blocks + 2 * (ends + time)


def zimage_presets() -> dict[str, ZImageConfig]:
    """The published network (Z-Image and Z-Image-Turbo)."""
    return {"Z-Image": ZImageConfig()}
