"""MM-DiT: diffusers' SD3Transformer2DModel, and the single files of Stability AI's SD3 and SD3.5."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import Format, Original, config_values
from smalti.interop.layout import (
    Layout,
    Rule,
    joined_with_bias,
    renamed,
    reshaped,
    rules_for_blocks,
    swapped_halves,
    with_bias,
)
from smalti.models.mmdit import MMDiTConfig

_CLASS = "SD3Transformer2DModel"
_NATIVE_SIDE = 128  # latents of every published size
_HEAD_WIDTH = 64  # of every published size; a file without QK-norm does not say


def _read_config(body: Mapping[str, Any]) -> MMDiTConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
            "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
            "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96, "dual_attention_layers": (),
            "qk_norm": None,
        },
        {},
    )  # fmt: skip
    width = values["num_attention_heads"] * values["attention_head_dim"]
    for name, allowed in (
        ("caption_projection_dim", (width,)),
        ("qk_norm", (None, "rms_norm")),
    ):
        if values[name] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"config field {name}={values[name]!r} of {_CLASS} is not supported: only {choices} is")
    if values["pos_embed_max_size"] is None:
        raise UserError(f"config field pos_embed_max_size=None of {_CLASS} is not supported: a number is")
    return MMDiTConfig(
        image_size=(values["sample_size"], values["sample_size"]),
        in_channels=values["in_channels"],
        out_channels=_unless(values["out_channels"], values["in_channels"]),
        patch_size=values["patch_size"],
        width=width,
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        text_width=values["joint_attention_dim"],
        pooled_width=values["pooled_projection_dim"],
        position_grid=values["pos_embed_max_size"],
        qk_norm=values["qk_norm"] is not None,
        dual_attention_blocks=tuple(values["dual_attention_layers"]),
    )


def _unless(value: int | None, same: int) -> int | None:
    return None if value == same else value


def _write_config(config: MMDiTConfig) -> dict[str, Any]:
    height, width = config.image_size
    if height != width:
        raise UserError(f"diffusers' {_CLASS} cannot express model.image_size={config.image_size}: it has a square one")
    return {
        "sample_size": height, "patch_size": config.patch_size, "in_channels": config.in_channels,
        "num_layers": config.depth, "attention_head_dim": config.width // config.num_heads,
        "num_attention_heads": config.num_heads, "joint_attention_dim": config.text_width,
        "caption_projection_dim": config.width, "pooled_projection_dim": config.pooled_width,
        "out_channels": config.output_channels, "pos_embed_max_size": config.position_grid,
        "dual_attention_layers": list(config.dual_attention_blocks),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }  # fmt: skip


def _patches(config: MMDiTConfig, kernel: str, table: str) -> tuple[Rule, ...]:
    """The patch embedding, a convolution with them, and the table of positions, a batch of one with them."""
    stored = (config.width, config.in_channels, config.patch_size, config.patch_size)
    matrix = (config.width, config.in_channels * config.patch_size**2)
    grid = (config.position_grid**2, config.width)
    return (
        reshaped("patch_embed.weight", f"{kernel}.weight", matrix, stored),
        renamed("patch_embed.bias", f"{kernel}.bias"),
        reshaped("positions_ND", table, grid, (1, *grid)),
    )


def _diffusers(config: MMDiTConfig) -> Layout:
    def qk_norm(ours: str, theirs: str, q: str, k: str) -> tuple[Rule, ...]:
        names = (("q_norm", q), ("k_norm", k)) if config.qk_norm else ()
        return tuple(renamed(f"{ours}.{mine}.weight", f"{theirs}.{name}.weight") for mine, name in names)

    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        last = i == config.depth - 1
        rules = [
            *with_bias(renamed, f"{ours}.image_modulation", f"{theirs}.norm1.linear"),
            # In the last block they have (scale, shift) for the text.
            *with_bias(
                swapped_halves if last else renamed, f"{ours}.text_modulation", f"{theirs}.norm1_context.linear"
            ),
            *joined_with_bias(f"{ours}.attn.image.qkv", [f"{theirs}.attn.to_{part}" for part in "qkv"]),
            *joined_with_bias(f"{ours}.attn.text.qkv", [f"{theirs}.attn.add_{part}_proj" for part in "qkv"]),
            *qk_norm(f"{ours}.attn.image", f"{theirs}.attn", "norm_q", "norm_k"),
            *qk_norm(f"{ours}.attn.text", f"{theirs}.attn", "norm_added_q", "norm_added_k"),
            *with_bias(renamed, f"{ours}.attn.image.out", f"{theirs}.attn.to_out.0"),
            *with_bias(renamed, f"{ours}.image_mlp.fc1", f"{theirs}.ff.net.0.proj"),
            *with_bias(renamed, f"{ours}.image_mlp.fc2", f"{theirs}.ff.net.2"),
        ]
        if i in config.dual_attention_blocks:
            rules += [
                *joined_with_bias(f"{ours}.image_attn.qkv", [f"{theirs}.attn2.to_{part}" for part in "qkv"]),
                *qk_norm(f"{ours}.image_attn", f"{theirs}.attn2", "norm_q", "norm_k"),
                *with_bias(renamed, f"{ours}.image_attn.out", f"{theirs}.attn2.to_out.0"),
            ]
        if not last:
            rules += [
                *with_bias(renamed, f"{ours}.attn.text.out", f"{theirs}.attn.to_add_out"),
                *with_bias(renamed, f"{ours}.text_mlp.fc1", f"{theirs}.ff_context.net.0.proj"),
                *with_bias(renamed, f"{ours}.text_mlp.fc2", f"{theirs}.ff_context.net.2"),
            ]
        return tuple(rules)

    return Layout((
        *_patches(config, "pos_embed.proj", "pos_embed.pos_embed"),
        *with_bias(renamed, "time_embed.fc1", "time_text_embed.timestep_embedder.linear_1"),
        *with_bias(renamed, "time_embed.fc2", "time_text_embed.timestep_embedder.linear_2"),
        *with_bias(renamed, "pooled_embed.fc1", "time_text_embed.text_embedder.linear_1"),
        *with_bias(renamed, "pooled_embed.fc2", "time_text_embed.text_embedder.linear_2"),
        *with_bias(renamed, "text_embed", "context_embedder"),
        *rules_for_blocks(config.depth, block),
        *with_bias(swapped_halves, "output_modulation", "norm_out.linear"),  # they have (scale, shift)
        *with_bias(renamed, "output", "proj_out"),
    ))  # fmt: skip


def _native_side(table: Tensor, position_grid: int, patch_size: int) -> int:
    """The latents' side that a position table was made for: its second token's first value is sin(tokens / grid)."""
    tokens = 0
    if table.device.type != "meta" and position_grid > 1:
        tokens = round(math.asin(max(-1.0, min(1.0, float(table[0, 1, 0])))) * position_grid)
    published = min(_NATIVE_SIDE // patch_size, position_grid)
    return patch_size * (tokens if 0 < tokens <= position_grid else published)


def _original_config(tensors: Mapping[str, Tensor]) -> MMDiTConfig | None:
    needed = {"x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight", "context_embedder.weight"}
    if not needed <= set(tensors) or not any(name.startswith("joint_blocks.") for name in tensors):
        return None
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    position_grid = math.isqrt(tensors["pos_embed"].shape[1])
    q_norm = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight")
    side = _native_side(tensors["pos_embed"], position_grid, patch_size)

    def blocks_with(pattern: str) -> list[int]:
        return sorted({int(m[1]) for name in tensors if (m := re.match(rf"joint_blocks\.(\d+)\.{pattern}", name))})

    return MMDiTConfig(
        image_size=(side, side),
        in_channels=channels,
        out_channels=_unless(tensors["final_layer.linear.weight"].shape[0] // patch_size**2, channels),
        patch_size=patch_size,
        width=width,
        depth=1 + blocks_with("")[-1],
        num_heads=max(1, width // (_HEAD_WIDTH if q_norm is None else q_norm.shape[0])),
        text_width=tensors["context_embedder.weight"].shape[1],
        pooled_width=tensors["y_embedder.mlp.0.weight"].shape[1],
        position_grid=position_grid,
        qk_norm=q_norm is not None,
        dual_attention_blocks=tuple(blocks_with("x_block.attn2")),
    )


def _original(config: MMDiTConfig) -> Layout:
    def attention(ours: str, theirs: str, output: bool) -> tuple[Rule, ...]:
        norms = (("q_norm", "ln_q"), ("k_norm", "ln_k")) if config.qk_norm else ()
        return (
            *with_bias(renamed, f"{ours}.qkv", f"{theirs}.qkv"),
            *(renamed(f"{ours}.{mine}.weight", f"{theirs}.{name}.weight") for mine, name in norms),
            *(with_bias(renamed, f"{ours}.out", f"{theirs}.proj") if output else ()),
        )

    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"joint_blocks.{i}"
        rules = list[Rule]()
        for stream, name in (("image", "x_block"), ("text", "context_block")):
            goes_on = stream == "image" or i < config.depth - 1
            rules += with_bias(renamed, f"{ours}.{stream}_modulation", f"{theirs}.{name}.adaLN_modulation.1")
            rules += attention(f"{ours}.attn.{stream}", f"{theirs}.{name}.attn", goes_on)
            if goes_on:
                rules += with_bias(renamed, f"{ours}.{stream}_mlp.fc1", f"{theirs}.{name}.mlp.fc1")
                rules += with_bias(renamed, f"{ours}.{stream}_mlp.fc2", f"{theirs}.{name}.mlp.fc2")
        if i in config.dual_attention_blocks:
            rules += attention(f"{ours}.image_attn", f"{theirs}.x_block.attn2", True)
        return tuple(rules)

    return Layout((
        *_patches(config, "x_embedder.proj", "pos_embed"),
        *with_bias(renamed, "time_embed.fc1", "t_embedder.mlp.0"),
        *with_bias(renamed, "time_embed.fc2", "t_embedder.mlp.2"),
        *with_bias(renamed, "pooled_embed.fc1", "y_embedder.mlp.0"),
        *with_bias(renamed, "pooled_embed.fc2", "y_embedder.mlp.2"),
        *with_bias(renamed, "text_embed", "context_embedder"),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "output_modulation", "final_layer.adaLN_modulation.1"),
        *with_bias(renamed, "output", "final_layer.linear"),
    ))  # fmt: skip


MMDIT = Format(
    class_name=_CLASS,
    config_type=MMDiTConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("SD3", _original_config, _original),),
)
