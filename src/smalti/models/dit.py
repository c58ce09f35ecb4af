"""DiT: the diffusion transformer with adaLN-Zero (Peebles and Xie 2023, "Scalable diffusion models with transformers").

One file holds the network from pixels to raw output. SiT is this network with another process.

Shapes: B batch, C channels in, N tokens, D width, K head width, P values of a patch, M modulation rows (of width D),
I tokens of the condition: time, and the label where there is one.

How blocks are told time and label (`conditioning`, the paper's section 3.2)
    adaln_zero            each layer shifted, scaled and gated by the sum of both: M = 6 * depth + 2
    adaln                 shifted and scaled, no gates: M = 4 * depth + 2
    cross_attention       a further attention in each block, from the tokens to time and label
    in_context            time and label are tokens in front of the picture's, taken away before the output
The last two have layer norms with weights of their own, as a ViT.

Initialisation            published                        wide
    Linear                xavier uniform, zero bias        the same
    patch embedding       xavier uniform as a matrix       the same
    label table           N(0, 0.02)                       N(0, 0.5)
    time MLP              N(0, 0.02)                       N(0, 1 / sqrt(fan in))
    modulation            zero: each block is the identity the same
      of "adaln"          xavier uniform block by block     the same
    output                zero: the network starts at 0    the same
"wide" lets the condition speak from the first step: with 10,000 pictures it halves the images that class
conditioning needs (docs/LOG.md).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.attention import CrossAttention, SelfAttention, attention_flops, shallow_copy
from smalti.nn.embeddings import TimestepEmbedder, patchify, unpatchify
from smalti.nn.feedforward import Activation, FeedForward, feedforward_flops, gated_width
from smalti.nn.modulation import modulate
from smalti.nn.positions import rope_angles_2d, sincos_grid
from smalti.types import Condition

_NORM_EPS = 1e-6
Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
_BLOCK_ROWS: dict[Conditioning, int] = {"adaln_zero": 6, "adaln": 4}  # modulation rows of a block


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT. The defaults are DiT-Tiny for the bundled digits."""

    kind: ClassVar[str] = "dit"
    image_size: tuple[int, int] = (28, 28)  # height, width of the input in pixels (or latents)
    in_channels: int = 1
    patch_size: int = 4
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int = 10  # 0: unconditional; the null label is num_classes
    learn_sigma: bool = False  # twice the output channels: the second half are variance logits
    positions: Literal["sincos", "learned", "rope", "sincos+rope"] = "sincos"
    qk_norm: bool = False
    activation: Activation = "gelu_tanh"
    initialisation: Literal["published", "wide"] = "published"
    frequency_shift: float = 0.0  # of the time sinusoid: 0 in the papers' code, 1 in diffusers' DiT
    mlp_norm_eps: float = _NORM_EPS  # 1e-5 in diffusers' DiT
    attention_scale: float = 1.0  # of the attention's logits, beside 1 / sqrt(head width): muP's, docs/mup.md
    conditioning: Conditioning = "adaln_zero"

    def __post_init__(self) -> None:
        height, width = self.image_size
        for name in ("in_channels", "patch_size", "width", "depth", "num_heads", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if height % self.patch_size or width % self.patch_size or height <= 0 or width <= 0:
            raise UserError(f"model.image_size={self.image_size} must divide by model.patch_size={self.patch_size}")
        if self.width % self.num_heads:
            raise UserError(f"model.width={self.width} must divide by model.num_heads={self.num_heads}")
        if "sincos" in self.positions and self.width % 4:
            raise UserError(f"model.width={self.width} must divide by 4 for positions={self.positions!r}")
        if "rope" in self.positions and self.width // self.num_heads % 4:
            head_width = self.width // self.num_heads
            raise UserError(f"model.width/num_heads={head_width} must divide by 4 for positions={self.positions!r}")
        if not self.attention_scale > 0:
            raise UserError(f"model.attention_scale={self.attention_scale} must be above 0")
        if self.num_classes < 0:
            raise UserError(f"model.num_classes={self.num_classes} must not be negative")

    @property
    def block_rows(self) -> int:
        """Modulation rows of one block; 0 where the condition comes as tokens."""
        return _BLOCK_ROWS.get(self.conditioning, 0)

    @property
    def condition_tokens(self) -> int:
        """Tokens of the condition: time, and the label where there is one."""
        return 2 if self.num_classes else 1

    @property
    def out_channels(self) -> int:
        """Channels of the raw output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def hidden_width(self) -> int:
        """Width inside the feed-forward layers; a gated one is narrower, so that the parameters stay as many."""
        hidden = int(self.width * self.mlp_ratio)
        return gated_width(hidden) if self.activation in ("swiglu", "geglu") else hidden

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class _Block(nn.Module):
    """Self-attention and feed-forward; how a condition reaches them is a subclass's."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.mlp_norm_eps = config.mlp_norm_eps
        self.attn = SelfAttention(config.width, config.num_heads, config.qk_norm, logit_scale=config.attention_scale)
        self.mlp = FeedForward(config.width, config.hidden_width, config.activation)

    def with_identity_attention(self) -> "_Block":
        """A view on the same weights in which each token attends to itself alone."""
        view = shallow_copy(self)
        view.attn = self.attn.as_identity_map()
        return view


class DiTBlock(_Block):
    """Each layer shifted, scaled and gated by the condition (adaLN-Zero)."""

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        modulation_B6D: Float[Tensor, "B 6 D"],
        rope_2NK: Float[Tensor, "2 N K"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; modulation holds shift, scale, gate for attention, then for the MLP."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_B6D.unsqueeze(2).unbind(1)  # each B1D
        x_BND = torch.addcmul(x_BND, gate1, self.attn(modulate(x_BND, shift1, scale1, _NORM_EPS), rope_2NK))
        return torch.addcmul(x_BND, gate2, self.mlp(modulate(x_BND, shift2, scale2, self.mlp_norm_eps)))


class AdaLNBlock(_Block):
    """Each layer shifted and scaled by the condition, without gates (adaLN)."""

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        modulation_B4D: Float[Tensor, "B 4 D"],
        rope_2NK: Float[Tensor, "2 N K"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block; modulation holds shift and scale for attention, then for the MLP."""
        shift1, scale1, shift2, scale2 = modulation_B4D.unsqueeze(2).unbind(1)  # each B1D
        x_BND = x_BND + self.attn(modulate(x_BND, shift1, scale1, _NORM_EPS), rope_2NK)
        return x_BND + self.mlp(modulate(x_BND, shift2, scale2, self.mlp_norm_eps))  # type: ignore[no-any-return]


class InContextBlock(_Block):
    """The block of a ViT: what it is told stands among its tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.norm1 = nn.LayerNorm(config.width, _NORM_EPS)
        self.norm2 = nn.LayerNorm(config.width, config.mlp_norm_eps)

    def forward(
        self, x_BND: Float[Tensor, "B N D"], rope_2NK: Float[Tensor, "2 N K"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block."""
        x_BND = x_BND + self.attn(self.norm1(x_BND), rope_2NK)
        return x_BND + self.mlp(self.norm2(x_BND))  # type: ignore[no-any-return]


class CrossAttentionBlock(_Block):
    """Between the two layers every token attends to time and label."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width = config.width
        self.norm1 = nn.LayerNorm(width, _NORM_EPS)
        self.cross_norm = nn.LayerNorm(width, _NORM_EPS)
        self.cross_attn = CrossAttention(width, width, config.num_heads, config.qk_norm)
        self.norm2 = nn.LayerNorm(width, config.mlp_norm_eps)

    def forward(
        self,
        x_BND: Float[Tensor, "B N D"],
        condition_BID: Float[Tensor, "B I D"],
        rope_2NK: Float[Tensor, "2 N K"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens through one block."""
        x_BND = x_BND + self.attn(self.norm1(x_BND), rope_2NK)
        x_BND = x_BND + self.cross_attn(self.cross_norm(x_BND), condition_BID)
        return x_BND + self.mlp(self.norm2(x_BND))  # type: ignore[no-any-return]


_BLOCKS: dict[Conditioning, type[_Block]] = {
    "adaln_zero": DiTBlock,
    "adaln": AdaLNBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


class DiT(nn.Module):
    """The diffusion transformer. Modulations of all blocks, where there are any, come from one matrix product."""

    rope_2NK: Tensor | None
    positions_ND: Tensor | nn.Parameter | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        width, patch_values = config.width, config.in_channels * config.patch_size**2
        self.patch_embed = nn.Linear(patch_values, width)
        self.time_embed = TimestepEmbedder(width, frequency_shift=config.frequency_shift)
        self.label_embed = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        rows_of_all = config.block_rows * config.depth + 2
        self.modulation = nn.Linear(width, rows_of_all * width) if config.block_rows else None
        self.blocks = nn.ModuleList(_BLOCKS[config.conditioning](config) for _ in range(config.depth))
        self.norm_out = None if config.block_rows else nn.LayerNorm(width, _NORM_EPS)
        self.output = nn.Linear(width, config.out_channels * config.patch_size**2)
        if config.positions == "learned":
            self.positions_ND = nn.Parameter(torch.zeros(rows * columns, width))
        else:
            table = sincos_grid(width, rows, columns) if "sincos" in config.positions else None
            self.register_buffer("positions_ND", table, persistent=False)
        rope = rope_angles_2d(width // config.num_heads, rows, columns) if "rope" in config.positions else None
        self.register_buffer("rope_2NK", rope, persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        wide = self.config.initialisation == "wide"
        for layer in (self.time_embed.fc1, self.time_embed.fc2):
            std = layer.in_features**-0.5 if wide else 0.02
            nn.init.normal_(layer.weight, std=std, generator=generator)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.5 if wide else 0.02, generator=generator)
        if isinstance(self.positions_ND, nn.Parameter):
            nn.init.normal_(self.positions_ND, std=0.02, generator=generator)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        if self.config.conditioning == "adaln":
            assert self.modulation is not None
            rows = self.config.block_rows * self.config.width
            for weight_of_block in self.modulation.weight[: rows * self.config.depth].split(rows):
                nn.init.xavier_uniform_(weight_of_block, generator=generator)

    def null_condition(self, batch_size: int) -> Condition | None:
        """The null label for each row; None for an unconditional network."""
        if self.label_embed is None:
            return None
        device = self.label_embed.weight.device
        return Condition(class_labels=torch.full((batch_size,), self.config.num_classes, device=device))

    def with_identity_attention(self, layers: tuple[int, ...]) -> "DiT":
        """A view for perturbed-attention guidance: in `layers` each token attends to itself alone.

        It shares every weight and this network is left as it is; building it copies no tensor. Raises UserError for
        layers that do not exist and for none at all.
        """
        depth = self.config.depth
        if not layers or any(not 0 <= layer < depth for layer in layers):
            raise UserError(f"layers={layers} must name at least one of 0 .. {depth - 1}")
        view = shallow_copy(self)
        view.blocks = nn.ModuleList(
            block.with_identity_attention() if i in layers else block  # type: ignore[operator]
            for i, block in enumerate(self.blocks)
        )
        return view

    def embed_label(self, batch_size: int, cond: Condition | None) -> Float[Tensor, "B D"] | None:
        """Label to one vector a row; None from an unconditional network. A missing condition means the null label."""
        if self.label_embed is None:
            return None
        if cond is None:
            cond = self.null_condition(batch_size)
        if cond is None or cond.class_labels is None:
            raise UserError("class_labels is missing: this network is class-conditional")
        return self.label_embed(cond.class_labels)  # type: ignore[no-any-return]

    def embed_condition(self, t: Float[Tensor, " B"], cond: Condition | None) -> Float[Tensor, "B D"]:
        """Network time and label to one vector a row: their sum."""
        c_BD, label_BD = self.time_embed(t), self.embed_label(t.shape[0], cond)
        return c_BD if label_BD is None else c_BD + label_BD  # type: ignore[no-any-return]

    def condition_as_tokens(self, t: Float[Tensor, " B"], cond: Condition | None) -> Float[Tensor, "B I D"]:
        """Network time and label as tokens beside each other."""
        c_BD, label_BD = self.time_embed(t), self.embed_label(t.shape[0], cond)
        return torch.stack([c_BD] if label_BD is None else [c_BD, label_BD], dim=1)

    def _positions_of(self, height: int, width: int) -> tuple[Tensor | None, Tensor | None]:
        """(added to the tokens, rotating queries and keys): the tables of the config's size, or made for another."""
        config = self.config
        if (height, width) == config.image_size:
            return self.positions_ND, self.rope_2NK
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"input size {height}x{width} must divide by model.patch_size={config.patch_size}")
        if config.positions == "learned":
            raise UserError(f"input size {height}x{width}: positions are learned for {config.image_size} alone")
        rows, columns = height // config.patch_size, width // config.patch_size
        device = self.output.weight.device
        added = sincos_grid(config.width, rows, columns).to(device) if "sincos" in config.positions else None
        rope = rope_angles_2d(config.width // config.num_heads, rows, columns) if "rope" in config.positions else None
        return added, None if rope is None else rope.to(device)

    def forward(
        self, x: Float[Tensor, "B C height width"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B out height width"]:
        """Noisy pictures [B, C, height, width] at network time t [B] to raw output [B, out_channels, height, width].

        Raises UserError for a size that does not divide into patches, or another than the config's where positions are
        learned.
        """
        height, width = x.shape[-2:]
        positions_ND, rope_2NK = self._positions_of(height, width)
        x_BND = self.patch_embed(patchify(x, self.config.patch_size))
        if positions_ND is not None:
            x_BND = x_BND + positions_ND
        if self.modulation is not None:
            x_BND = self._modulated_blocks(x_BND, self.embed_condition(t, cond), rope_2NK)
        else:
            x_BND = self._blocks_told_by_tokens(x_BND, self.condition_as_tokens(t, cond), rope_2NK)
        return unpatchify(self.output(x_BND), self.config.patch_size, height, width)

    def _modulated_blocks(
        self, x_BND: Float[Tensor, "B N D"], c_BD: Float[Tensor, "B D"], rope_2NK: Float[Tensor, "2 N K"] | None
    ) -> Float[Tensor, "B N D"]:
        """Blocks and last norm under adaLN and adaLN-Zero."""
        assert self.modulation is not None
        rows = self.config.block_rows
        modulation_BMD = self.modulation(F.silu(c_BD)).view(x_BND.shape[0], -1, self.config.width)
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, modulation_BMD[:, rows * i : rows * i + rows], rope_2NK)
        shift_BD, scale_BD = modulation_BMD[:, -2:].unbind(1)
        return modulate(x_BND, shift_BD[:, None], scale_BD[:, None], _NORM_EPS)

    def _blocks_told_by_tokens(
        self, x_BND: Float[Tensor, "B N D"], c_BID: Float[Tensor, "B I D"], rope_2NK: Float[Tensor, "2 N K"] | None
    ) -> Float[Tensor, "B N D"]:
        """Blocks and last norm where the condition comes as tokens, to attend to or among the picture's."""
        assert self.norm_out is not None
        if self.config.conditioning == "cross_attention":
            for block in self.blocks:
                x_BND = block(x_BND, c_BID, rope_2NK)
            return self.norm_out(x_BND)  # type: ignore[no-any-return]
        told = c_BID.shape[1]
        x_BND = torch.cat([c_BID, x_BND], dim=1)
        if rope_2NK is not None:  # tokens without a place are not turned: cosine 1, sine 0
            unturned = torch.zeros_like(rope_2NK[:, :1]).expand(-1, told, -1).clone()
            unturned[0] = 1
            rope_2NK = torch.cat([unturned, rope_2NK], dim=1)
        for block in self.blocks:
            x_BND = block(x_BND, rope_2NK)
        return self.norm_out(x_BND[:, told:])  # type: ignore[no-any-return]


def forward_flops(config: DiTConfig, input_size: tuple[int, ...] | None = None, text_tokens: int = 0) -> int:
    """Operations of one forward at batch 1 (a multiply-add counts two), matrix products only.

    A DiT has one input size and reads no text: the other arguments are those of every architecture (registry).
    """
    assert input_size in (None, config.image_size)
    assert text_tokens == 0
    rows, columns = config.grid
    tokens, width, patch_area = rows * columns, config.width, config.patch_size**2
    mlp = feedforward_flops(width, config.hidden_width, config.activation)
    told = config.condition_tokens
    in_blocks = tokens + told if config.conditioning == "in_context" else tokens
    block = in_blocks * (8 * width * width + mlp) + attention_flops(width, in_blocks, in_blocks)
    if config.conditioning == "cross_attention":
        block += 4 * width * width * (tokens + told) + attention_flops(width, tokens, told)
    condition = 256 * width + width * width
    if config.block_rows:
        condition += (config.block_rows * config.depth + 2) * width * width
    ends = tokens * width * patch_area * (config.in_channels + config.out_channels)
    return config.depth * block + 2 * (condition + ends)


_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # DiT, table 1


def dit_presets() -> dict[str, DiTConfig]:
    """The paper's sizes on 32x32x4 latents ("DiT-XL/2" ...) and "DiT-Tiny" for 28x28x1 digits."""
    presets = {"DiT-Tiny": DiTConfig()}
    for name, (depth, width, num_heads) in _SIZES.items():
        for patch_size in (2, 4, 8):
            presets[f"DiT-{name}/{patch_size}"] = DiTConfig(
                image_size=(32, 32),
                in_channels=4,
                patch_size=patch_size,
                width=width,
                depth=depth,
                num_heads=num_heads,
                num_classes=1000,
                learn_sigma=True,
            )
    return presets
