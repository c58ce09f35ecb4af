"""Sana: diffusers' SanaTransformer2DModel, and the files of NVlabs/Sana (SANA, SANA 1.5, SANA-Sprint)."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import Format, Original, config_values, depth_of
from smalti.interop.layout import Layout, Rule, patch_convolution, renamed, reshaped, rules_for_blocks, with_bias
from smalti.interop.pixart import (
    attention_to_diffusers,
    common_original,
    modulation_rows,
    null_text_tokens,
    original_attention,
    original_image_side,
    original_interpolation_scale,
)
from smalti.models.sana import SanaConfig, sana_presets

_CLASS = "SanaTransformer2DModel"
_QK_NORM = "rms_norm_across_heads"


def _read_config(body: Mapping[str, Any]) -> SanaConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32,
            "num_layers": 20, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240, "caption_channels": 2304, "mlp_ratio": 2.5, "attention_bias": False,
            "sample_size": 32, "patch_size": 1, "norm_eps": 1e-6, "interpolation_scale": None,
            "guidance_embeds": False, "guidance_embeds_scale": 0.1, "qk_norm": None, "timestep_scale": 1.0,
        },
        {"dropout": 0.0, "norm_elementwise_affine": False},
    )  # fmt: skip
    width = values["num_attention_heads"] * values["attention_head_dim"]
    heads, head_width = values["num_cross_attention_heads"], values["cross_attention_head_dim"]
    if values["cross_attention_dim"] != width:
        raise UserError(f"config field cross_attention_dim={values['cross_attention_dim']} of {_CLASS}: only {width}")
    if heads is None or head_width is None or heads * head_width != width:
        raise UserError(
            f"config fields num_cross_attention_heads={heads}, cross_attention_head_dim={head_width} of {_CLASS}: "
            f"their product must be {width}"
        )
    if values["qk_norm"] not in (None, _QK_NORM):
        raise UserError(f"config field qk_norm={values['qk_norm']!r} of {_CLASS}: only None or {_QK_NORM!r}")
    return SanaConfig(
        image_size=(values["sample_size"],) * 2,
        in_channels=values["in_channels"],
        out_channels=values["out_channels"] or values["in_channels"],
        patch_size=values["patch_size"],
        width=width,
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        num_cross_heads=heads,
        text_width=values["caption_channels"],
        mlp_ratio=values["mlp_ratio"],
        attention_bias=values["attention_bias"],
        qk_norm=values["qk_norm"] is not None,
        guidance_embeds=values["guidance_embeds"],
        interpolation_scale=values["interpolation_scale"],
        norm_eps=values["norm_eps"],
        timestep_scale=values["timestep_scale"],
        guidance_embeds_scale=values["guidance_embeds_scale"],
    )


def _write_config(config: SanaConfig) -> dict[str, Any]:
    if config.image_size[0] != config.image_size[1]:
        raise UserError(f"diffusers' {_CLASS} cannot express model.image_size={config.image_size}: it has squares only")
    return {
        "in_channels": config.in_channels, "out_channels": config.out_channels,
        "num_attention_heads": config.num_heads, "attention_head_dim": config.width // config.num_heads,
        "num_layers": config.depth, "num_cross_attention_heads": config.num_cross_heads,
        "cross_attention_head_dim": config.width // config.num_cross_heads, "cross_attention_dim": config.width,
        "caption_channels": config.text_width, "mlp_ratio": config.mlp_ratio, "dropout": 0.0,
        "attention_bias": config.attention_bias, "sample_size": config.image_size[0],
        "patch_size": config.patch_size, "norm_elementwise_affine": False, "norm_eps": config.norm_eps,
        "interpolation_scale": config.interpolation_scale, "guidance_embeds": config.guidance_embeds,
        "guidance_embeds_scale": config.guidance_embeds_scale, "qk_norm": _QK_NORM if config.qk_norm else None,
        "timestep_scale": config.timestep_scale,
    }  # fmt: skip


def _mix_feed_forward(config: SanaConfig, ours: str, inverted: str, depth: str, point: str) -> tuple[Rule, ...]:
    """The convolutions of kernel 1 are matrices with us."""
    expand, contract = (2 * config.hidden_width, config.width), (config.width, config.hidden_width)
    return (
        reshaped(f"{ours}.fc1.weight", f"{inverted}.weight", expand, (*expand, 1, 1)),
        renamed(f"{ours}.fc1.bias", f"{inverted}.bias"),
        *with_bias(renamed, f"{ours}.depthwise", depth),
        reshaped(f"{ours}.fc2.weight", f"{point}.weight", contract, (*contract, 1, 1)),
    )


def _qk_norms(attention: str, q: str, k: str) -> tuple[Rule, Rule]:
    return renamed(f"{attention}.q_norm.weight", f"{q}.weight"), renamed(f"{attention}.k_norm.weight", f"{k}.weight")


def _diffusers(config: SanaConfig) -> Layout:
    def embedder(ours: str, theirs: str) -> tuple[Rule, ...]:
        return (
            *with_bias(renamed, f"{ours}.fc1", f"{theirs}.linear_1"),
            *with_bias(renamed, f"{ours}.fc2", f"{theirs}.linear_2"),
        )

    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        norms = (
            *_qk_norms(f"{ours}.attn", f"{theirs}.attn1.norm_q", f"{theirs}.attn1.norm_k"),
            *_qk_norms(f"{ours}.cross_attn", f"{theirs}.attn2.norm_q", f"{theirs}.attn2.norm_k"),
        )
        ff = f"{theirs}.ff"
        return (
            *attention_to_diffusers(i, config.attention_bias),
            *(norms if config.qk_norm else ()),
            *_mix_feed_forward(config, f"{ours}.mlp", f"{ff}.conv_inverted", f"{ff}.conv_depth", f"{ff}.conv_point"),
        )

    # A distilled network's embedder is another class, which holds the layers one level higher.
    time = (
        (
            *embedder("time_embed", "time_embed.timestep_embedder"),
            *embedder("guidance_embed", "time_embed.guidance_embedder"),
        )
        if config.guidance_embeds
        else embedder("time_embed", "time_embed.emb.timestep_embedder")
    )
    return Layout((
        *patch_convolution("patch_embed", "patch_embed.proj", config.width, config.in_channels, config.patch_size),
        *time,
        *with_bias(renamed, "modulation", "time_embed.linear"),
        modulation_rows(config.depth, "transformer_blocks.{i}.scale_shift_table", "scale_shift_table"),
        *embedder("text_embed", "caption_projection"),
        renamed("text_norm.weight", "caption_norm.weight"),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "output", "proj_out"),
    ))  # fmt: skip


def _mlp_ratio(hidden_width: int, width: int) -> float:
    """The ratio that gives hidden_width back: int(ratio * width) must not fall short by a rounding."""
    ratio = hidden_width / width
    return ratio if int(ratio * width) == hidden_width else math.nextafter(ratio, math.inf)


def _original_config(tensors: Mapping[str, Tensor]) -> SanaConfig | None:
    needed = {"x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight", "attention_y_norm.weight"}
    if not needed | {"blocks.0.mlp.point_conv.conv.weight", "final_layer.linear.weight"} <= set(tensors):
        return None
    width, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    side = original_image_side(tensors, patch_size, default=32)
    published = {c.width: c.num_cross_heads for c in sana_presets().values()}
    return SanaConfig(
        image_size=(side, side),
        in_channels=channels,
        out_channels=tensors["final_layer.linear.weight"].shape[0] // patch_size**2,
        patch_size=patch_size,
        width=width,
        depth=depth_of(tensors),
        num_heads=max(1, width // 32),
        # The file does not say the number of heads: the paper's sizes do, others have heads of 64.
        num_cross_heads=published.get(width, max(1, width // 64)),
        text_width=tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        mlp_ratio=_mlp_ratio(tensors["blocks.0.mlp.point_conv.conv.weight"].shape[1], width),
        attention_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        guidance_embeds="cfg_embedder.mlp.0.weight" in tensors,
        interpolation_scale=original_interpolation_scale(tensors) if "pos_embed" in tensors else None,
        null_text_tokens=null_text_tokens(tensors),
    )


def _original(config: SanaConfig) -> Layout:
    def block(i: int) -> tuple[Rule, ...]:
        name = f"blocks.{i}"
        norms = (
            *_qk_norms(f"{name}.attn", f"{name}.attn.q_norm", f"{name}.attn.k_norm"),
            *_qk_norms(f"{name}.cross_attn", f"{name}.cross_attn.q_norm", f"{name}.cross_attn.k_norm"),
        )
        mlp = f"{name}.mlp"
        return (
            *original_attention(i, config.attention_bias),
            *(norms if config.qk_norm else ()),
            *_mix_feed_forward(
                config, mlp, f"{mlp}.inverted_conv.conv", f"{mlp}.depth_conv.conv", f"{mlp}.point_conv.conv"
            ),
        )

    guidance = (
        *with_bias(renamed, "guidance_embed.fc1", "cfg_embedder.mlp.0"),
        *with_bias(renamed, "guidance_embed.fc2", "cfg_embedder.mlp.2"),
    )
    return Layout(
        (
            *common_original(config),
            renamed("text_norm.weight", "attention_y_norm.weight"),
            *(guidance if config.guidance_embeds else ()),
            *rules_for_blocks(config.depth, block),
        ),
        ignored=("logvar_linear.weight", "logvar_linear.bias"),  # SANA-Sprint's training weighs its loss by it
    )


SANA = Format(
    class_name=_CLASS,
    config_type=SanaConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("Sana", _original_config, _original),),
)
