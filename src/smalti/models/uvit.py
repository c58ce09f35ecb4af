"""U-ViT (Bao et al. 2023, "All are worth words: a ViT backbone for diffusion models").

A ViT in which time, class and patches are all tokens, and blocks of the first half are joined to those of the second
by long skip connections: concatenate, then a linear layer.

Shapes: B batch, C channels, N tokens (E extra ones, for class and time, before the patches), D width, P values of a
patch.

Initialisation            published (the repository's libs/uvit.py)
    Linear                N(0, 0.02), zero bias
    patch embedding, 3x3  uniform within 1 / sqrt(fan in), bias too: PyTorch's own for convolutions
    label table           N(0, 1): PyTorch's own
    positions             N(0, 0.02)
    LayerNorm             1, 0
Nothing starts at zero: the blocks are not the identity, and there is no gate.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import SelfAttention, attention_flops
from smalti.nn.embeddings import VectorEmbedder, patchify, sinusoid, unpatchify
from smalti.nn.feedforward import FeedForward, feedforward_flops
from smalti.types import Condition

_NORM_EPS = 1e-5


@dataclass(frozen=True)
class UViTConfig:
    """The shape of a U-ViT. The defaults are a tiny one for the bundled digits."""

    kind: ClassVar[str] = "uvit"
    image_size: tuple[int, int] = (28, 28)  # height, width of the input in pixels (or latents)
    in_channels: int = 1
    patch_size: int = 4
    width: int = 128
    depth: int = 4  # blocks besides the middle one, half of them before it: even
    num_heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int = 10  # 0: unconditional; the null label is num_classes
    null_label: bool = True  # False: the label table ends at the last class, as in the ImageNet 64 checkpoints
    qkv_bias: bool = False
    time_mlp: bool = False  # Linear, SiLU, Linear on the time token; published networks feed the bare sinusoid
    final_conv: bool = True  # 3x3 convolution on the output pixels; U-ViT-H has none
    attention_scale: float = 1.0  # of the attention's logits, beside 1 / sqrt(head width): muP's, docs/mup.md
    long_skips: bool = True  # False: a plain ViT, the paper's ablation (the repository's skip=False)

    def __post_init__(self) -> None:
        height, width = self.image_size
        for name in ("in_channels", "patch_size", "width", "depth", "num_heads", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if height % self.patch_size or width % self.patch_size or height <= 0 or width <= 0:
            raise UserError(f"model.image_size={self.image_size} must divide by model.patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        if self.depth % 2:
            raise UserError(f"model.depth={self.depth} must be even: half before the middle block, half after it")
        if not self.attention_scale > 0:
            raise UserError(f"model.attention_scale={self.attention_scale} must be above 0")
        if self.num_classes < 0:
            raise UserError(f"model.num_classes={self.num_classes} must not be negative")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches: the class (where there are classes), then the time."""
        return 2 if self.num_classes else 1


class UViTBlock(nn.Module):
    """A pre-norm ViT block; with a long skip it first takes in what its partner of the first half gave."""

    def __init__(self, config: UViTConfig, long_skip: bool = False) -> None:
        super().__init__()
        width = config.width
        self.skip_linear = nn.Linear(2 * width, width) if long_skip else None
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn = SelfAttention(
            width, config.num_heads, bias=config.qkv_bias, out_bias=True, logit_scale=config.attention_scale
        )
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = FeedForward(width, int(width * config.mlp_ratio), "gelu")

    def forward(
        self, x_BND: Float[Tensor, "B N D"], skip_BND: Float[Tensor, "B N D"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; skip_BND: the partner's output."""
        if self.skip_linear is not None:
            assert skip_BND is not None
            # Where products run in lower precision the residual stream keeps its own.
            x_BND = self.skip_linear(torch.cat([x_BND, skip_BND], dim=-1)).to(x_BND.dtype)
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))  # type: ignore[no-any-return]


class UViT(nn.Module):
    """The U-shaped ViT. Positions are learned, so a network takes pictures of one size."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        width, patch_values = config.width, config.in_channels * config.patch_size**2
        self.patch_embed = nn.Linear(patch_values, width)
        self.time_embed = VectorEmbedder(width, width, hidden_width=4 * width) if config.time_mlp else None
        labels = config.num_classes + (1 if config.null_label else 0)
        self.label_embed = nn.Embedding(labels, width) if config.num_classes else None
        self.positions_ND = nn.Parameter(torch.zeros(config.extra_tokens + rows * columns, width))
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, config.long_skips) for _ in range(half))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.output = nn.Linear(width, patch_values)
        channels = config.in_channels
        self.final_conv = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.patch_embed, self.final_conv):
            if layer is not None:
                assert layer.bias is not None
                bound = layer.weight[0].numel() ** -0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, generator=generator)
        nn.init.normal_(self.positions_ND, std=0.02, generator=generator)

    def null_condition(self, batch_size: int) -> Condition | None:
        """The null label for each row; None for a network that has no such label."""
        if self.label_embed is None or not self.config.null_label:
            return None
        device = self.label_embed.weight.device
        return Condition(class_labels=torch.full((batch_size,), self.config.num_classes, device=device))

    def embed_condition(self, t: Float[Tensor, " B"], cond: Condition | None) -> Float[Tensor, "B E D"]:
        """The extra tokens: class (where there are classes), then time. No condition means the null label."""
        h_BD = sinusoid(t, self.config.width).to(self.positions_ND.dtype)
        time_BD = h_BD if self.time_embed is None else self.time_embed(h_BD)
        if self.label_embed is None:
            return time_BD[:, None]
        if cond is None:
            cond = self.null_condition(t.shape[0])
        if cond is None or cond.class_labels is None:
            raise UserError("class_labels is missing: this network is class-conditional")
        return torch.stack([self.label_embed(cond.class_labels), time_BD], dim=1)

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B C height width"]:
        """Noisy pictures [B, C, height, width] at network time t [B] to raw output of the same shape.

        t runs over 0 .. 999 (the published latent networks with discrete time: 1 .. 1000). cond: class_labels.
        Raises UserError where the network has classes and neither labels nor a null label are given.
        """
        height, width = x.shape[-2:]
        if (height, width) != self.config.image_size:
            raise UserError(f"input size {height}x{width}: positions are learned for {self.config.image_size} alone")
        patches_BND = self.patch_embed(patchify(x, self.config.patch_size))
        x_BND = torch.cat([self.embed_condition(t, cond), patches_BND], dim=1) + self.positions_ND
        skips = []
        for block in self.in_blocks:
            x_BND = block(x_BND)
            skips.append(x_BND)
        x_BND = self.mid_block(x_BND)
        for block in self.out_blocks:
            x_BND = block(x_BND, skips.pop())
        x_BNP = self.output(self.norm(x_BND[:, self.config.extra_tokens :]))
        x = unpatchify(x_BNP, self.config.patch_size, height, width)
        return x if self.final_conv is None else self.final_conv(x)


def forward_flops(config: UViTConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products and convolutions only.

    A U-ViT has one input size and reads no text: the other arguments are those of every architecture (registry).
    """
    assert input_size in (None, config.image_size)
    assert text_tokens == 0
    rows, columns = config.grid
    width, channels, patches = config.width, config.in_channels, rows * columns
    tokens = config.extra_tokens + patches
    mlp = feedforward_flops(width, int(width * config.mlp_ratio), "gelu")
    block = tokens * (8 * width * width + mlp) + attention_flops(width, tokens, tokens)
    skip = 4 * tokens * width * width if config.long_skips else 0
    time = 16 * width * width if config.time_mlp else 0
    ends = 4 * patches * width * channels * config.patch_size**2
    convolution = 18 * channels * channels * patches * config.patch_size**2 if config.final_conv else 0
    return (config.depth + 1) * block + config.depth // 2 * skip + time + ends + convolution


_SIZES = {"S": (12, 512, 8), "M": (16, 768, 12), "L": (20, 1024, 16), "H": (28, 1152, 16)}  # table 1: less one layer
_DATA = {  # image size, channels, classes, null label: as the paper trained each
    "S/2": ((32, 32), 3, 0, True),  # CIFAR10
    "S/4": ((64, 64), 3, 0, True),  # CelebA
    "M/2": ((32, 32), 4, 1000, True),  # not trained in the paper: as L/2
    "M/4": ((64, 64), 3, 1000, False),  # ImageNet 64
    "L/2": ((32, 32), 4, 1000, True),  # ImageNet 256, latents
    "L/4": ((64, 64), 4, 1000, True),  # ImageNet 512, latents
    "H/2": ((32, 32), 4, 1000, True),
    "H/4": ((64, 64), 4, 1000, True),
}  # fmt: skip


def uvit_presets() -> dict[str, UViTConfig]:
    """The paper's networks on the data they were trained on: "U-ViT-S/2" on CIFAR10, "U-ViT-H/2" on ImageNet 256 ..."""
    presets = {}
    for name, (image_size, channels, num_classes, null_label) in _DATA.items():
        size, patch_size = name.split("/")
        depth, width, num_heads = _SIZES[size]
        presets[f"U-ViT-{name}"] = UViTConfig(
            image_size=image_size,
            in_channels=channels,
            patch_size=int(patch_size),
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            null_label=null_label,
            final_conv=size != "H",
        )
    return presets
