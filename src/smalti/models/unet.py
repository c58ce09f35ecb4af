"""U-Net: the convolutional network of DDPM (Ho et al. 2020) and ADM (Dhariwal and Nichol 2021), pixels to raw output.

One level a resolution: residual blocks that are told the time, attention at chosen levels, then half the resolution;
on the way up each block reads, beside its input, what the way down left at its place (last in, first out).

Shapes: B batch, C channels, T time width, M modulation rows of all residual blocks together.

Initialisation
    Conv2d, Linear        xavier uniform, zero bias (DDPM's fan-average variance scaling; ADM keeps PyTorch's own)
    label table           N(0, 1), as ADM
    second convolution    zero: each residual block is its shortcut
    attention's output    zero: each attention block is the identity
    last convolution      zero: the network starts at 0
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import SelfAttention, attention_flops
from smalti.nn.embeddings import TimestepEmbedder
from smalti.types import Condition


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. The defaults are a small one for the bundled digits, with about DiT-Tiny's operations."""

    kind: ClassVar[str] = "unet"
    image_size: tuple[int, int] = (28, 28)  # what it is trained on; it takes any size that halves often enough
    in_channels: int = 1
    widths: tuple[int, ...] = (16, 24, 48)  # channels of each level, the finest first
    blocks_per_level: int = 1  # on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (2,)  # 0 is the finest
    middle: Literal["attention", "residual", "none"] = "attention"  # at the coarsest level: with attention, without
    head_width: int | None = 16  # channels of a head; None: one head
    num_classes: int = 10  # 0: unconditional
    null_label: bool = True  # the table has a row more: num_classes says nothing of the class
    learn_sigma: bool = False  # twice the output channels: the second half are variance logits
    time_modulation: Literal["add", "scale_shift"] = "scale_shift"  # DDPM, ADM
    resampling: Literal["conv", "residual"] = "conv"  # by a convolution, or inside a residual block as in BigGAN
    downsample_padding: Literal[0, 1] = field(default=1, metadata={"only_if": ("resampling", ("conv",))})  # 0: DDPM's
    norm_groups: int = 8
    norm_eps: float = 1e-5
    middle_norm_groups: int | None = None  # of the middle's attention: None as norm_groups, 0 no normalisation
    time_width: int | None = None  # None: 4 widths[0]
    frequency_shift: float = 0.0  # of the time sinusoid: 1 in DDPM
    sin_first: bool = False  # True in DDPM

    def __post_init__(self) -> None:
        for name in ("in_channels", "blocks_per_level", "norm_groups"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if not self.widths or any(w <= 0 or w % self.norm_groups for w in self.widths):
            raise UserError(f"model.widths={self.widths} must divide by model.norm_groups={self.norm_groups}")
        if any(not 0 <= level < len(self.widths) for level in self.attention_levels):
            raise UserError(f"model.attention_levels={self.attention_levels} must lie in 0 .. {len(self.widths) - 1}")
        for width in self.attended_widths:
            if self.head_width is not None and (self.head_width <= 0 or width % self.head_width):
                raise UserError(f"model.head_width={self.head_width} must divide the channels of attention, {width}")
        if min(self.image_size) <= 0 or any(side % self.shrinkage for side in self.image_size):
            raise UserError(f"model.image_size={self.image_size} must divide by {self.shrinkage}, for model.widths")
        if self.num_classes < 0:
            raise UserError(f"model.num_classes={self.num_classes} must not be negative")
        groups = self.middle_norm_groups
        if groups is not None and (groups < 0 or (groups and self.widths[-1] % groups)):
            raise UserError(f"model.middle_norm_groups={groups} must be None, 0 or divide {self.widths[-1]}")

    @property
    def shrinkage(self) -> int:
        """How many times smaller the coarsest level is: both sides of an input must divide by it."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def attended_widths(self) -> list[int]:
        """Channels that some attention works on."""
        return [self.widths[i] for i in self.attention_levels] + [self.widths[-1]] * (self.middle == "attention")

    @property
    def out_channels(self) -> int:
        """Channels of the raw output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def embedding_width(self) -> int:
        """Width of the vector of time and label."""
        return self.time_width or 4 * self.widths[0]

    def down_widths(self, level: int) -> list[tuple[int, int]]:
        """Channels into and out of each residual block of a level on the way down, without the resampling."""
        first, width = self.widths[max(level - 1, 0)], self.widths[level]
        return [(first if j == 0 else width, width) for j in range(self.blocks_per_level)]

    def up_widths(self, level: int) -> list[tuple[int, int]]:
        """The same on the way up, where each block also reads what the way down left."""
        above, width = self.widths[min(level + 1, len(self.widths) - 1)], self.widths[level]
        below = self.widths[max(level - 1, 0)]
        skips = [width] * self.blocks_per_level + [below]
        return [((above if j == 0 else width) + skip, width) for j, skip in enumerate(skips)]

    def modulation_rows(self) -> dict[str, int]:
        """Rows of the time's projection for each residual block, by the block's name in the order of the forward."""
        last, blocks = len(self.widths) - 1, list[tuple[str, int]]()
        inside = self.resampling == "residual"
        for i, width in enumerate(self.widths):
            blocks += [(f"down.{i}.blocks.{j}", width) for j in range(self.blocks_per_level)]
            blocks += [(f"down.{i}.resample", width)] * (inside and i < last)
        blocks += [(f"middle.blocks.{j}", self.widths[-1]) for j in range(2) if self.middle != "none"]
        for k, i in enumerate(reversed(range(len(self.widths)))):
            blocks += [(f"up.{k}.blocks.{j}", self.widths[i]) for j in range(self.blocks_per_level + 1)]
            blocks += [(f"up.{k}.resample", self.widths[i])] * (inside and i > 0)
        return {name: width * (2 if self.time_modulation == "scale_shift" else 1) for name, width in blocks}


class ResidualBlock(nn.Module):
    """Two convolutions, the time between them, and a shortcut; optionally at half or twice the resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, resample: Literal["down", "up"] | None = None
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = config.time_modulation == "scale_shift", resample
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, config.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def _resampled(self, x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C out_H out_W"]:
        if self.resample is None:
            return x_BCHW
        return F.avg_pool2d(x_BCHW, 2) if self.resample == "down" else doubled(x_BCHW)

    def forward(
        self, x_BCHW: Float[Tensor, "B C H W"], modulation_BM: Float[Tensor, "B M"]
    ) -> Float[Tensor, "B out out_H out_W"]:
        """modulation: a shift a channel before the second norm (DDPM), or scale and shift after it (ADM)."""
        h_BCHW = self.conv1(self._resampled(F.silu(self.norm1(x_BCHW))))
        if self.scale_shift:
            scale_BC11, shift_BC11 = modulation_BM[:, :, None, None].chunk(2, dim=1)
            h_BCHW = torch.addcmul(shift_BC11, self.norm2(h_BCHW), 1 + scale_BC11)
        else:
            h_BCHW = self.norm2(h_BCHW + modulation_BM[:, :, None, None])
        h_BCHW = self.conv2(F.silu(h_BCHW))
        x_BCHW = self._resampled(x_BCHW)
        return (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW)) + h_BCHW  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Every pixel attends to every pixel, added to the input. norm_groups=0: without normalisation."""

    def __init__(self, channels: int, config: UNetConfig, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, config.norm_eps) if norm_groups else None
        self.attn = SelfAttention(channels, channels // (config.head_width or channels))

    def forward(self, x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Pictures as rows of pixels, and back."""
        h_BCHW = x_BCHW if self.norm is None else self.norm(x_BCHW)
        h_BND: Tensor = self.attn(h_BCHW.flatten(2).transpose(1, 2))
        return x_BCHW + h_BND.transpose(1, 2).view_as(x_BCHW)


class Downsample(nn.Conv2d):
    """A convolution of stride 2 with padding 1; padding=0 means zeros below and on the right alone (DDPM)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C out_H out_W"]:
        """Half the resolution."""
        return super().forward(x_BCHW if self.padding != (0, 0) else F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C out_H out_W"]:
        """Twice the resolution."""
        return super().forward(doubled(x_BCHW))


def doubled(x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C out_H out_W"]:
    """Each pixel as a square of four."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class Level(nn.Module):
    """The blocks of one resolution, in one direction; each residual block is followed by its attention (or nothing)."""

    def __init__(
        self, widths: list[tuple[int, int]], config: UNetConfig, attention: bool, resample: Literal["down", "up"] | None
    ) -> None:
        super().__init__()
        channels = widths[-1][1]
        self.blocks = nn.ModuleList(ResidualBlock(into, out, config) for into, out in widths)
        self.attentions = nn.ModuleList(
            AttentionBlock(out, config, config.norm_groups) if attention else nn.Identity() for _, out in widths
        )
        self.resample: nn.Module | None = None
        if resample is not None and config.resampling == "residual":
            self.resample = ResidualBlock(channels, channels, config, resample)
        elif resample == "down":
            self.resample = Downsample(channels, config.downsample_padding)
        elif resample == "up":
            self.resample = Upsample(channels)

    def resampled(
        self, x_BCHW: Float[Tensor, "B C H W"], modulations: Iterator[Tensor]
    ) -> Float[Tensor, "B C out_H out_W"]:
        """To the next resolution; a residual block takes its own modulation."""
        assert self.resample is not None
        if isinstance(self.resample, ResidualBlock):
            return self.resample(x_BCHW, next(modulations))  # type: ignore[no-any-return]
        return self.resample(x_BCHW)  # type: ignore[no-any-return]


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution, with attention between them (or nothing)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, groups = config.widths[-1], config.middle_norm_groups
        self.blocks = nn.ModuleList(ResidualBlock(channels, channels, config) for _ in range(2))
        self.attention = (
            AttentionBlock(channels, config, config.norm_groups if groups is None else groups)
            if config.middle == "attention"
            else nn.Identity()
        )

    def forward(self, x_BCHW: Float[Tensor, "B C H W"], modulations: Iterator[Tensor]) -> Float[Tensor, "B C H W"]:
        """Takes two modulations."""
        x_BCHW = self.attention(self.blocks[0](x_BCHW, next(modulations)))
        return self.blocks[1](x_BCHW, next(modulations))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """The U-Net. The modulations of all residual blocks come from one matrix product a forward."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, last, embedding_width = config.widths, len(config.widths) - 1, config.embedding_width
        self.modulation_rows = list(config.modulation_rows().values())
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embed = TimestepEmbedder(embedding_width, widths[0], config.frequency_shift, config.sin_first)
        rows = config.num_classes + config.null_label
        self.label_embed = nn.Embedding(rows, embedding_width) if config.num_classes else None
        self.modulation = nn.Linear(embedding_width, sum(self.modulation_rows))
        self.down = nn.ModuleList(
            Level(config.down_widths(i), config, i in config.attention_levels, "down" if i < last else None)
            for i in range(len(widths))
        )
        self.middle = Middle(config) if config.middle != "none" else None
        self.up = nn.ModuleList(
            Level(config.up_widths(i), config, i in config.attention_levels, "up" if i > 0 else None)
            for i in reversed(range(len(widths)))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, generator=generator)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, AttentionBlock):
                nn.init.zeros_(module.attn.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def null_condition(self, batch_size: int) -> Condition | None:
        """The null label for each row; None for an unconditional network.

        Raises UserError where the label table has no row for it.
        """
        if self.label_embed is None:
            return None
        if not self.config.null_label:
            raise UserError(f"model.null_label=False: of the {self.config.num_classes} labels none means no class")
        return Condition(
            class_labels=torch.full((batch_size,), self.config.num_classes, device=self.label_embed.weight.device)
        )

    def embed_condition(self, t: Float[Tensor, " B"], cond: Condition | None) -> Float[Tensor, "B T"]:
        """Network time and label to one vector a row. A missing condition means the null label."""
        c_BT = self.time_embed(t)
        if self.label_embed is None:
            return c_BT  # type: ignore[no-any-return]
        if cond is None and self.config.null_label:
            cond = self.null_condition(t.shape[0])
        if cond is None or cond.class_labels is None:
            raise UserError("class_labels is missing: this network is class-conditional")
        return c_BT + self.label_embed(cond.class_labels)  # type: ignore[no-any-return]

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out height width"]:
        """Noisy pictures [B, C, height, width] at network time t [B] to raw output [B, out_channels, height, width].

        height and width are free but for UserError where they do not divide by config.shrinkage.
        """
        if x.shape[2] % self.config.shrinkage or x.shape[3] % self.config.shrinkage:
            raise UserError(f"x of {tuple(x.shape[2:])} pixels: both sides must divide by {self.config.shrinkage}")
        if x.device.type == "cpu":
            # The CPU doubles, normalises and joins pictures up to 40 times faster with channels innermost.
            x = x.contiguous(memory_format=torch.channels_last)
        modulations = iter(self.modulation(F.silu(self.embed_condition(t, cond))).split(self.modulation_rows, dim=1))
        x_BCHW = self.conv_in(x)
        skips = [x_BCHW]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions, strict=True):  # type: ignore[arg-type]
                x_BCHW = attention(block(x_BCHW, next(modulations)))
                skips.append(x_BCHW)
            if level.resample is not None:
                x_BCHW = level.resampled(x_BCHW, modulations)  # type: ignore[operator]
                skips.append(x_BCHW)
        if self.middle is not None:
            x_BCHW = self.middle(x_BCHW, modulations)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions, strict=True):  # type: ignore[arg-type]
                x_BCHW = attention(block(torch.cat([x_BCHW, skips.pop()], dim=1), next(modulations)))
            if level.resample is not None:
                x_BCHW = level.resampled(x_BCHW, modulations)  # type: ignore[operator]
        output: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        return output.contiguous()


def forward_flops(config: UNetConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), convolutions and matrix products only.

    input_size: (height, width), None for config.image_size. A U-Net reads no text.
    """
    assert text_tokens == 0
    height, width = input_size or config.image_size
    last = len(config.widths) - 1
    total = 0
    for i, channels in enumerate(config.widths):
        pixels = height * width // 4**i
        blocks = config.down_widths(i) + config.up_widths(i)
        attentions = len(blocks) if i in config.attention_levels else 0
        if i == last and config.middle != "none":
            blocks = [*blocks, (channels, channels), (channels, channels)]
            attentions += config.middle == "attention"
        for into, out in blocks:
            shortcut = into * out if into != out else 0
            total += 2 * pixels * (9 * (into + out) * out + shortcut)
        total += attentions * (8 * pixels * channels**2 + attention_flops(channels, pixels, pixels))
        # To a level from the finer one, and back; a residual block has two convolutions.
        convolutions = 2 if config.resampling == "residual" else 1
        total += convolutions * 18 * channels**2 * ((i < last) * pixels // 4 + (i > 0) * pixels * 4)
    width_in, embedding_width = config.widths[0], config.embedding_width
    total += 18 * height * width * width_in * (config.in_channels + config.out_channels)
    return total + 2 * embedding_width * (width_in + embedding_width + sum(config.modulation_rows().values()))


def unet_presets() -> dict[str, UNetConfig]:
    """DDPM's network for CIFAR-10 (Ho et al. 2020, appendix B), ADM's for ImageNet at 64 pixels (Dhariwal and Nichol
    2021, table 4 and appendix I; without its dropout), and "UNet-Tiny" for 28x28x1 digits."""
    return {
        "UNet-Tiny": UNetConfig(),
        "DDPM-CIFAR10": UNetConfig(
            image_size=(32, 32),
            in_channels=3,
            widths=(128, 256, 256, 256),
            blocks_per_level=2,
            attention_levels=(1,),
            head_width=None,
            num_classes=0,
            time_modulation="add",
            downsample_padding=0,
            norm_groups=32,
            norm_eps=1e-6,
            frequency_shift=1.0,
            sin_first=True,
        ),
        "ADM-ImageNet64": UNetConfig(
            image_size=(64, 64),
            in_channels=3,
            widths=(192, 384, 576, 768),
            blocks_per_level=3,
            attention_levels=(1, 2, 3),
            head_width=64,
            num_classes=1000,
            null_label=False,
            learn_sigma=True,
            resampling="residual",
            norm_groups=32,
            middle_norm_groups=32,
        ),
    }
