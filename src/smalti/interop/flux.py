"""FLUX.1: diffusers' FluxTransformer2DModel, and Black Forest Labs' own files."""

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
    rules_for_blocks,
    swapped_halves,
    with_bias,
)
from smalti.models.flux import FluxConfig

_CLASS = "FluxTransformer2DModel"
_PACKED = 4  # values of a 2 x 2 patch of one channel: their channels count packed latents


def _read_config(body: Mapping[str, Any]) -> FluxConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56),
        },
        {"patch_size": 1},
    )  # fmt: skip
    packed_in, packed_out = values["in_channels"], values["out_channels"] or values["in_channels"]
    for name, packed in (("in_channels", packed_in), ("out_channels", packed_out)):
        if packed % _PACKED:
            raise UserError(f"config field {name}={packed} of {_CLASS} must divide by {_PACKED}: latents packed 2 x 2")
    return FluxConfig(
        in_channels=packed_in // _PACKED,
        out_channels=None if packed_out == packed_in else packed_out // _PACKED,
        width=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        single_depth=values["num_single_layers"],
        num_heads=values["num_attention_heads"],
        text_width=values["joint_attention_dim"],
        pooled_width=values["pooled_projection_dim"],
        guidance=values["guidance_embeds"],
        rope_widths=tuple(values["axes_dims_rope"]),
    )


def _write_config(config: FluxConfig) -> dict[str, Any]:
    return {
        "patch_size": 1, "in_channels": _PACKED * config.in_channels,
        "out_channels": None if config.out_channels is None else _PACKED * config.out_channels,
        "num_layers": config.depth, "num_single_layers": config.single_depth,
        "attention_head_dim": config.width // config.num_heads, "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_width, "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance, "axes_dims_rope": list(config.rope_widths),
    }  # fmt: skip


def _diffusers(config: FluxConfig) -> Layout:
    embedders = [("time", "timestep"), ("pooled", "text"), *([("guidance", "guidance")] if config.guidance else [])]

    def double_block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        return (
            *with_bias(renamed, f"{ours}.image_modulation", f"{theirs}.norm1.linear"),
            *with_bias(renamed, f"{ours}.text_modulation", f"{theirs}.norm1_context.linear"),
            *joined_with_bias(f"{ours}.attn.image.qkv", [f"{theirs}.attn.to_{part}" for part in "qkv"]),
            *joined_with_bias(f"{ours}.attn.text.qkv", [f"{theirs}.attn.add_{part}_proj" for part in "qkv"]),
            *(renamed(f"{ours}.attn.image.{x}_norm.weight", f"{theirs}.attn.norm_{x}.weight") for x in "qk"),
            *(renamed(f"{ours}.attn.text.{x}_norm.weight", f"{theirs}.attn.norm_added_{x}.weight") for x in "qk"),
            *with_bias(renamed, f"{ours}.attn.image.out", f"{theirs}.attn.to_out.0"),
            *with_bias(renamed, f"{ours}.attn.text.out", f"{theirs}.attn.to_add_out"),
            *with_bias(renamed, f"{ours}.image_mlp.fc1", f"{theirs}.ff.net.0.proj"),
            *with_bias(renamed, f"{ours}.image_mlp.fc2", f"{theirs}.ff.net.2"),
            *with_bias(renamed, f"{ours}.text_mlp.fc1", f"{theirs}.ff_context.net.0.proj"),
            *with_bias(renamed, f"{ours}.text_mlp.fc2", f"{theirs}.ff_context.net.2"),
        )

    def single_block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        parts = [*(f"{theirs}.attn.to_{part}" for part in "qkv"), f"{theirs}.proj_mlp"]
        return (
            *with_bias(renamed, f"{ours}.modulation", f"{theirs}.norm.linear"),
            *joined_with_bias(f"{ours}.qkv_mlp", parts, [config.width] * 3 + [4 * config.width]),
            *(renamed(f"{ours}.{x}_norm.weight", f"{theirs}.attn.norm_{x}.weight") for x in "qk"),
            *with_bias(renamed, f"{ours}.out", f"{theirs}.proj_out"),
        )

    return Layout((
        *with_bias(renamed, "patch_embed", "x_embedder"),
        *with_bias(renamed, "text_embed", "context_embedder"),
        *(
            rule
            for ours, theirs in embedders
            for n in (1, 2)
            for rule in with_bias(renamed, f"{ours}_embed.fc{n}", f"time_text_embed.{theirs}_embedder.linear_{n}")
        ),
        *rules_for_blocks(config.depth, double_block),
        *rules_for_blocks(config.single_depth, single_block),
        *with_bias(swapped_halves, "output_modulation", "norm_out.linear"),  # they have (scale, shift)
        *with_bias(renamed, "output", "proj_out"),
    ))  # fmt: skip


def _rope_widths(head_width: int) -> tuple[int, int, int]:
    """The published split, 16 + 56 + 56 of 128, for another head width: 7/16 of the pairs an image axis."""
    image_axis = 2 * (7 * (head_width // 2) // 16)
    return head_width - 2 * image_axis, image_axis, image_axis


def _original_config(tensors: Mapping[str, Tensor]) -> FluxConfig | None:
    needed = {"img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight"}
    norms = [name for name in tensors if name.endswith("norm.query_norm.scale")]
    if not needed <= set(tensors) or not norms:
        return None
    width, packed_in = tensors["img_in.weight"].shape
    packed_out = tensors["final_layer.linear.weight"].shape[0]
    head_width = tensors[norms[0]].shape[0]

    def count(blocks: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(rf"{blocks}\.(\d+)\.", name))})

    return FluxConfig(
        in_channels=packed_in // _PACKED,
        out_channels=None if packed_out == packed_in else packed_out // _PACKED,
        width=width,
        depth=count("double_blocks"),
        single_depth=count("single_blocks"),
        num_heads=width // head_width,
        text_width=tensors["txt_in.weight"].shape[1],
        pooled_width=tensors["vector_in.in_layer.weight"].shape[1],
        guidance="guidance_in.in_layer.weight" in tensors,
        rope_widths=_rope_widths(head_width),
    )


def _original(config: FluxConfig) -> Layout:
    embedders = [("time", "time"), ("pooled", "vector"), *([("guidance", "guidance")] if config.guidance else [])]
    norms = (("q_norm.weight", "query_norm.scale"), ("k_norm.weight", "key_norm.scale"))

    def double_block(i: int) -> tuple[Rule, ...]:
        name = f"double_blocks.{i}"
        return tuple(
            rule
            for stream, theirs in (("image", f"{name}.img"), ("text", f"{name}.txt"))
            for rule in (
                *with_bias(renamed, f"{name}.{stream}_modulation", f"{theirs}_mod.lin"),
                *with_bias(renamed, f"{name}.attn.{stream}.qkv", f"{theirs}_attn.qkv"),
                *(renamed(f"{name}.attn.{stream}.{norm}", f"{theirs}_attn.norm.{scale}") for norm, scale in norms),
                *with_bias(renamed, f"{name}.attn.{stream}.out", f"{theirs}_attn.proj"),
                *with_bias(renamed, f"{name}.{stream}_mlp.fc1", f"{theirs}_mlp.0"),
                *with_bias(renamed, f"{name}.{stream}_mlp.fc2", f"{theirs}_mlp.2"),
            )
        )

    def single_block(i: int) -> tuple[Rule, ...]:
        name = f"single_blocks.{i}"
        return (
            *with_bias(renamed, f"{name}.modulation", f"{name}.modulation.lin"),
            *with_bias(renamed, f"{name}.qkv_mlp", f"{name}.linear1"),
            *(renamed(f"{name}.{norm}", f"{name}.norm.{scale}") for norm, scale in norms),
            *with_bias(renamed, f"{name}.out", f"{name}.linear2"),
        )

    return Layout((
        *with_bias(renamed, "patch_embed", "img_in"),
        *with_bias(renamed, "text_embed", "txt_in"),
        *(
            rule
            for ours, theirs in embedders
            for fc, layer in (("fc1", "in_layer"), ("fc2", "out_layer"))
            for rule in with_bias(renamed, f"{ours}_embed.{fc}", f"{theirs}_in.{layer}")
        ),
        *rules_for_blocks(config.depth, double_block),
        *rules_for_blocks(config.single_depth, single_block),
        *with_bias(renamed, "output_modulation", "final_layer.adaLN_modulation.1"),
        *with_bias(renamed, "output", "final_layer.linear"),
    ))  # fmt: skip


FLUX = Format(
    class_name=_CLASS,
    config_type=FluxConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("FLUX.1", _original_config, _original),),
)
