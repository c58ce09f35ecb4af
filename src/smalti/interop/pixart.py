"""PixArt-alpha and -Sigma: diffusers' PixArtTransformer2DModel, and the files of PixArt-alpha/PixArt-alpha and -sigma.

Sana's repository grew out of PixArt's: what their files have in common is here for both.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import LEGACY_FIELDS, Format, Original, config_values, depth_of
from smalti.interop.layout import (
    Layout,
    Rule,
    computed,
    joined,
    joined_with_bias,
    patch_convolution,
    renamed,
    rules_for_blocks,
    with_bias,
)
from smalti.models.pixart import PixArtConfig, pixart_presets
from smalti.models.sana import SanaConfig
from smalti.nn.positions import rescaled_sincos_grid

_CLASS = "PixArtTransformer2DModel"


def _read_config(body: Mapping[str, Any]) -> PixArtConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "num_layers": 28, "cross_attention_dim": 1152, "sample_size": 128, "patch_size": 2, "norm_eps": 1e-6,
            "interpolation_scale": None, "use_additional_conditions": None, "caption_channels": None,
        },
        {
            "dropout": 0.0, "norm_num_groups": body.get("norm_num_groups"), "attention_bias": True,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": body.get("num_embeds_ada_norm"),
            "upcast_attention": False, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
            **LEGACY_FIELDS,
        },
    )  # fmt: skip
    channels, out_channels, side = values["in_channels"], values["out_channels"], values["sample_size"]
    width, text_width = values["num_attention_heads"] * values["attention_head_dim"], values["caption_channels"]
    if out_channels not in (None, channels, 2 * channels):
        raise UserError(f"config field out_channels={out_channels} of {_CLASS}: only {channels} or {2 * channels}")
    if values["cross_attention_dim"] is None or (text_width and values["cross_attention_dim"] != width):
        raise UserError(f"config field cross_attention_dim={values['cross_attention_dim']} of {_CLASS}: only {width}")
    micro_conditions, scale = values["use_additional_conditions"], values["interpolation_scale"]
    return PixArtConfig(
        image_size=(side, side),
        in_channels=channels,
        patch_size=values["patch_size"],
        width=width,
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        text_width=text_width or values["cross_attention_dim"],
        text_projection=text_width is not None,
        learn_sigma=out_channels == 2 * channels,
        micro_conditions=side == 128 if micro_conditions is None else micro_conditions,
        interpolation_scale=float(max(side // 64, 1) if scale is None else scale),
        norm_eps=values["norm_eps"],
    )


def _write_config(config: PixArtConfig) -> dict[str, Any]:
    if config.image_size[0] != config.image_size[1]:
        raise UserError(f"diffusers' {_CLASS} cannot express model.image_size={config.image_size}: it has squares only")
    return {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.width // config.num_heads,
        "in_channels": config.in_channels, "out_channels": config.out_channels, "num_layers": config.depth,
        "dropout": 0.0, "norm_num_groups": 32,
        "cross_attention_dim": config.width if config.text_projection else config.text_width, "attention_bias": True,
        "sample_size": config.image_size[0], "patch_size": config.patch_size, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "upcast_attention": False, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": config.norm_eps,
        "interpolation_scale": config.interpolation_scale, "use_additional_conditions": config.micro_conditions,
        "caption_channels": config.text_width if config.text_projection else None, "attention_type": "default",
    }  # fmt: skip


def modulation_rows(depth: int, blocks: str, output: str) -> Rule:
    """All learned modulation rows are one tensor with us: six of each block, two of the output."""
    return joined("modulation_rows", [*(blocks.format(i=i) for i in range(depth)), output], [6] * depth + [2])


def attention_to_diffusers(i: int, bias: bool = True) -> tuple[Rule, ...]:
    """Self- and cross-attention of block i of PixArt and Sana; bias: of the self-attention's q, k, v."""
    ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
    qkv = joined_with_bias(f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"])
    return (
        *(qkv if bias else qkv[:1]),
        *with_bias(renamed, f"{ours}.attn.out", f"{theirs}.attn1.to_out.0"),
        *with_bias(renamed, f"{ours}.cross_attn.q", f"{theirs}.attn2.to_q"),
        *joined_with_bias(f"{ours}.cross_attn.kv", [f"{theirs}.attn2.to_{part}" for part in "kv"]),
        *with_bias(renamed, f"{ours}.cross_attn.out", f"{theirs}.attn2.to_out.0"),
    )


def _diffusers(config: PixArtConfig) -> Layout:
    def embedder(ours: str, theirs: str) -> tuple[Rule, ...]:
        return (
            *with_bias(renamed, f"{ours}.fc1", f"{theirs}.linear_1"),
            *with_bias(renamed, f"{ours}.fc2", f"{theirs}.linear_2"),
        )

    def block(i: int) -> tuple[Rule, ...]:
        return (
            *attention_to_diffusers(i),
            *with_bias(renamed, f"blocks.{i}.mlp.fc1", f"transformer_blocks.{i}.ff.net.0.proj"),
            *with_bias(renamed, f"blocks.{i}.mlp.fc2", f"transformer_blocks.{i}.ff.net.2"),
        )

    sizes = (
        *embedder("size_embed", "adaln_single.emb.resolution_embedder"),
        *embedder("aspect_ratio_embed", "adaln_single.emb.aspect_ratio_embedder"),
    )
    return Layout((
        *patch_convolution("patch_embed", "pos_embed.proj", config.width, config.in_channels, config.patch_size),
        *embedder("time_embed", "adaln_single.emb.timestep_embedder"),
        *(sizes if config.micro_conditions else ()),
        *with_bias(renamed, "modulation", "adaln_single.linear"),
        modulation_rows(config.depth, "transformer_blocks.{i}.scale_shift_table", "scale_shift_table"),
        *(embedder("text_embed", "caption_projection") if config.text_projection else ()),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "output", "proj_out"),
    ))  # fmt: skip


def common_original(config: PixArtConfig | SanaConfig) -> tuple[Rule, ...]:
    """What the original files of PixArt and Sana have in common, outside the blocks."""
    tokens, scale = config.grid[0] * config.grid[1], config.interpolation_scale

    def positions() -> Tensor:
        if scale is None:
            return torch.zeros(1, tokens, config.width)
        return rescaled_sincos_grid(config.width, *config.grid, config.grid, scale)[None]

    return (
        computed("pos_embed", positions, optional=True),
        *patch_convolution("patch_embed", "x_embedder.proj", config.width, config.in_channels, config.patch_size),
        *with_bias(renamed, "time_embed.fc1", "t_embedder.mlp.0"),
        *with_bias(renamed, "time_embed.fc2", "t_embedder.mlp.2"),
        *with_bias(renamed, "modulation", "t_block.1"),
        modulation_rows(config.depth, "blocks.{i}.scale_shift_table", "final_layer.scale_shift_table"),
        *with_bias(renamed, "text_embed.fc1", "y_embedder.y_proj.fc1"),
        *with_bias(renamed, "text_embed.fc2", "y_embedder.y_proj.fc2"),
        *((renamed("null_text_MW", "y_embedder.y_embedding"),) if config.null_text_tokens else ()),
        *with_bias(renamed, "output", "final_layer.linear"),
    )


def original_attention(i: int, bias: bool = True) -> tuple[Rule, ...]:
    """Self- and cross-attention of block i in the original files; bias: of the self-attention's q, k, v."""
    name = f"blocks.{i}"
    qkv = with_bias(renamed, f"{name}.attn.qkv", f"{name}.attn.qkv")
    return (
        *(qkv if bias else qkv[:1]),
        *with_bias(renamed, f"{name}.attn.out", f"{name}.attn.proj"),
        *with_bias(renamed, f"{name}.cross_attn.q", f"{name}.cross_attn.q_linear"),
        *with_bias(renamed, f"{name}.cross_attn.kv", f"{name}.cross_attn.kv_linear"),
        *with_bias(renamed, f"{name}.cross_attn.out", f"{name}.cross_attn.proj"),
    )


def original_image_side(tensors: Mapping[str, Tensor], patch_size: int, default: int) -> int:
    """Side of the latents by the stored table of positions; default where the file has none."""
    tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else (default // patch_size) ** 2
    return math.isqrt(tokens) * patch_size


def original_interpolation_scale(tensors: Mapping[str, Tensor]) -> float | None:
    """By how much the stored table divides positions, to one decimal (published: 0.5, 1, 2, 4).

    1 where the file has no table or one without values, None where the table is zero.
    """
    table = tensors.get("pos_embed")
    if table is None or table.device.type == "meta" or table.shape[1] == 1:
        return 1.0
    sin, cos = float(table[0, 1, 0]), float(table[0, 1, table.shape[2] // 4])  # of the second column's position
    angle = math.atan2(sin, cos) % math.tau
    return round(1 / angle, 1) if angle > 0 else None


def null_text_tokens(tensors: Mapping[str, Tensor]) -> int:
    """Tokens of the stored text for no prompt."""
    return tensors["y_embedder.y_embedding"].shape[0] if "y_embedder.y_embedding" in tensors else 0


def _original_config(tensors: Mapping[str, Tensor]) -> PixArtConfig | None:
    needed = {"x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.mlp.fc1.weight"}
    if not needed | {"final_layer.linear.weight"} <= set(tensors):
        return None
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    side = original_image_side(tensors, patch_size, default=64)
    published = {c.width: c.num_heads for c in pixart_presets().values()}
    return PixArtConfig(
        image_size=(side, side),
        in_channels=channels,
        patch_size=patch_size,
        width=width,
        depth=depth_of(tensors),
        # The file does not say the number of heads: the paper's sizes do, others have heads of 64.
        num_heads=published.get(width, max(1, width // 64)),
        text_width=tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        learn_sigma=tensors["final_layer.linear.weight"].shape[0] == 2 * channels * patch_size**2,
        micro_conditions="csize_embedder.mlp.0.weight" in tensors,
        interpolation_scale=original_interpolation_scale(tensors) or 1.0,
        null_text_tokens=null_text_tokens(tensors),
    )


def _original(config: PixArtConfig) -> Layout:
    if not config.text_projection:
        raise UserError("the original PixArt format cannot express model.text_projection=False")

    def block(i: int) -> tuple[Rule, ...]:
        return (
            *original_attention(i),
            *with_bias(renamed, f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc1"),
            *with_bias(renamed, f"blocks.{i}.mlp.fc2", f"blocks.{i}.mlp.fc2"),
        )

    sizes = (
        *with_bias(renamed, "size_embed.fc1", "csize_embedder.mlp.0"),
        *with_bias(renamed, "size_embed.fc2", "csize_embedder.mlp.2"),
        *with_bias(renamed, "aspect_ratio_embed.fc1", "ar_embedder.mlp.0"),
        *with_bias(renamed, "aspect_ratio_embed.fc2", "ar_embedder.mlp.2"),
    )
    return Layout((
        *common_original(config),
        *(sizes if config.micro_conditions else ()),
        *rules_for_blocks(config.depth, block),
    ))  # fmt: skip


PIXART = Format(
    class_name=_CLASS,
    config_type=PixArtConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("PixArt", _original_config, _original),),
)
