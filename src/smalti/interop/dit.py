"""DiT and SiT: diffusers' DiTTransformer2DModel, and the files of facebookresearch/DiT and willisma/SiT."""

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
    copied,
    joined_with_bias,
    patch_convolution,
    renamed,
    reshaped,
    rules_for_blocks,
    with_bias,
)
from smalti.models.dit import DiTConfig, dit_presets
from smalti.nn.positions import sincos_grid

_CLASS = "DiTTransformer2DModel"


def _read_config(body: Mapping[str, Any]) -> DiTConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None,
            "num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5,
        },
        {
            "dropout": 0.0, "norm_num_groups": body.get("norm_num_groups"), "attention_bias": True,
            "activation_fn": "gelu-approximate", "upcast_attention": False, "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False, **LEGACY_FIELDS,
        },
    )  # fmt: skip
    channels, out_channels = values["in_channels"], values["out_channels"]
    if out_channels not in (None, channels, 2 * channels):
        raise UserError(f"config field out_channels={out_channels} of {_CLASS}: only {channels} or {2 * channels}")
    return DiTConfig(
        image_size=(values["sample_size"], values["sample_size"]),
        in_channels=channels,
        patch_size=values["patch_size"],
        width=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        num_classes=values["num_embeds_ada_norm"],
        learn_sigma=out_channels == 2 * channels,
        frequency_shift=1.0,
        mlp_norm_eps=values["norm_eps"],
    )


def _write_config(config: DiTConfig) -> dict[str, Any]:
    wrong = [
        f"{name}={value!r} (it has {needed!r})"
        for name, value, needed in (
            ("positions", config.positions, "sincos"),
            ("qk_norm", config.qk_norm, False),
            ("activation", config.activation, "gelu_tanh"),
            ("mlp_ratio", config.mlp_ratio, 4.0),
            ("frequency_shift", config.frequency_shift, 1.0),
            ("conditioning", config.conditioning, "adaln_zero"),
            ("image_size", config.image_size, (config.image_size[0],) * 2),
        )
        if value != needed
    ]
    if not config.num_classes:
        wrong.append("num_classes=0 (it has classes)")
    if wrong:
        raise UserError(f"diffusers' {_CLASS} cannot express model.{', model.'.join(wrong)}; train with those values")
    return {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.width // config.num_heads,
        "in_channels": config.in_channels, "out_channels": config.out_channels, "num_layers": config.depth,
        "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": config.image_size[0],
        "patch_size": config.patch_size, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": config.num_classes, "upcast_attention": False, "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "norm_eps": config.mlp_norm_eps,
    }  # fmt: skip


def _patch_embedding(config: DiTConfig, theirs: str) -> tuple[Rule, Rule]:
    return patch_convolution("patch_embed", theirs, config.width, config.in_channels, config.patch_size)


def _modulations(config: DiTConfig, blocks: str, final: str) -> tuple[Rule, Rule]:
    """All modulations are one layer with us: six rows of width a block, two for the output."""
    sizes = [6 * config.width] * config.depth + [2 * config.width]
    return joined_with_bias("modulation", [*(blocks.format(i=i) for i in range(config.depth)), final], sizes)


def _diffusers(config: DiTConfig) -> Layout:
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(config.depth)]  # one copy in each block

    def embedder(ours: str, theirs: str) -> Rule:
        return copied(ours, [f"{e}.{theirs}" for e in embedders])

    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        return (
            *joined_with_bias(f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"]),
            *with_bias(renamed, f"{ours}.attn.out", f"{theirs}.attn1.to_out.0"),
            *with_bias(renamed, f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj"),
            *with_bias(renamed, f"{ours}.mlp.fc2", f"{theirs}.ff.net.2"),
        )

    return Layout((
        *_patch_embedding(config, "pos_embed.proj"),
        *with_bias(embedder, "time_embed.fc1", "timestep_embedder.linear_1"),
        *with_bias(embedder, "time_embed.fc2", "timestep_embedder.linear_2"),
        embedder("label_embed.weight", "class_embedder.embedding_table.weight"),
        *_modulations(config, "transformer_blocks.{i}.norm1.linear", "proj_out_1"),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "output", "proj_out_2"),
    ))  # fmt: skip


def _original_config(tensors: Mapping[str, Tensor]) -> DiTConfig | None:
    needed = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed"}
    if not needed <= set(tensors):
        return None
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    side = int(tensors["pos_embed"].shape[1] ** 0.5)
    published = {c.width: c.num_heads for c in dit_presets().values() if c.num_classes == 1000}
    # Only the very table is computed anew: one that was trained, or rounded to half precision, is kept as it is.
    fixed = torch.equal(tensors["pos_embed"][0], sincos_grid(width, side, side))
    return DiTConfig(
        image_size=(side * patch_size, side * patch_size),
        in_channels=channels,
        patch_size=patch_size,
        width=width,
        depth=depth_of(tensors),
        # The file does not say the number of heads: the paper's sizes do, others have heads of 64.
        num_heads=published.get(width, max(1, width // 64)),
        num_classes=tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        learn_sigma=tensors["final_layer.linear.weight"].shape[0] == 2 * channels * patch_size**2,
        positions="sincos" if fixed else "learned",
    )


def _original(config: DiTConfig) -> Layout:
    if config.conditioning != "adaln_zero":
        raise UserError(
            f"the original DiT's format cannot express model.conditioning={config.conditioning!r}: only adaln_zero was "
            "published; train with that"
        )

    def block(i: int) -> tuple[Rule, ...]:
        name = f"blocks.{i}"
        return (
            *with_bias(renamed, f"{name}.attn.qkv", f"{name}.attn.qkv"),
            *with_bias(renamed, f"{name}.attn.out", f"{name}.attn.proj"),
            *with_bias(renamed, f"{name}.mlp.fc1", f"{name}.mlp.fc1"),
            *with_bias(renamed, f"{name}.mlp.fc2", f"{name}.mlp.fc2"),
        )

    tokens = config.grid[0] * config.grid[1]
    stored, ours = (1, tokens, config.width), (tokens, config.width)
    positions = (
        reshaped("positions_ND", "pos_embed", ours, stored)
        if config.positions == "learned"
        else computed("pos_embed", lambda: sincos_grid(config.width, *config.grid)[None])
    )
    return Layout((
        positions,
        *_patch_embedding(config, "x_embedder.proj"),
        *with_bias(renamed, "time_embed.fc1", "t_embedder.mlp.0"),
        *with_bias(renamed, "time_embed.fc2", "t_embedder.mlp.2"),
        renamed("label_embed.weight", "y_embedder.embedding_table.weight"),
        *_modulations(config, "blocks.{i}.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "output", "final_layer.linear"),
    ))  # fmt: skip


DIT = Format(
    class_name=_CLASS,
    config_type=DiTConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("DiT", _original_config, _original),),
)
