"""LTX-Video: diffusers' LTXVideoTransformer3DModel, and the single files of Lightricks/LTX-Video.

diffusers' class gets frame rate and compression from its pipeline; ours has them in its config. Its tokens come packed,
so that its in_channels counts the values of a patch.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import Format, Original, config_values
from smalti.interop.layout import Layout, Rule, joined_with_bias, renamed, rules_for_blocks, with_bias
from smalti.models.ltx import LTXConfig

_CLASS = "LTXVideoTransformer3DModel"


def _read_config(body: Mapping[str, Any]) -> LTXConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 32,
            "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28, "norm_eps": 1e-6,
            "caption_channels": 4096,
        },
        {
            "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False,
            "attention_bias": True, "attention_out_bias": True,
        },
    )  # fmt: skip
    width = values["num_attention_heads"] * values["attention_head_dim"]
    if values["cross_attention_dim"] != width:
        raise UserError(f"config field cross_attention_dim={values['cross_attention_dim']} of {_CLASS}: only {width}")
    patch = (values["patch_size_t"], values["patch_size"], values["patch_size"])
    patch_area = math.prod(patch)
    in_values, out_values = values["in_channels"], values["out_channels"] or values["in_channels"]
    if in_values % patch_area or out_values % patch_area:
        raise UserError(
            f"config fields in_channels={in_values}, out_channels={out_values} of {_CLASS} must divide by the "
            f"{patch_area} places of a patch"
        )
    # A file does not say on which size it was trained: the usual one, filled up to whole patches.
    frames, rows, columns = (n + -n % p for n, p in zip(LTXConfig.video_size, patch, strict=True))
    return LTXConfig(
        video_size=(frames, rows, columns),
        in_channels=in_values // patch_area,
        out_channels=out_values // patch_area,
        patch_size=values["patch_size"],
        patch_frames=values["patch_size_t"],
        width=width,
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        text_width=values["caption_channels"],
        norm_eps=values["norm_eps"],
    )


def _write_config(config: LTXConfig) -> dict[str, Any]:
    patch_area = math.prod(config.patch)
    return {
        "in_channels": config.in_channels * patch_area, "out_channels": config.out_channels * patch_area,
        "patch_size": config.patch_size, "patch_size_t": config.patch_frames,
        "num_attention_heads": config.num_heads, "attention_head_dim": config.width // config.num_heads,
        "cross_attention_dim": config.width, "num_layers": config.depth, "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False, "norm_eps": config.norm_eps,
        "caption_channels": config.text_width, "attention_bias": True, "attention_out_bias": True,
    }  # fmt: skip


def _layout(config: LTXConfig, patches: str, time: str, query_norm: str, key_norm: str) -> Layout:
    """The two formats differ in the names of four parts only."""

    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        rules = [renamed(f"{ours}.table_6D", f"{theirs}.scale_shift_table")]
        for part, name in (("attn", "attn1"), ("cross_attn", "attn2")):
            rules += [
                renamed(f"{ours}.{part}.q_norm.weight", f"{theirs}.{name}.{query_norm}.weight"),
                renamed(f"{ours}.{part}.k_norm.weight", f"{theirs}.{name}.{key_norm}.weight"),
                *with_bias(renamed, f"{ours}.{part}.out", f"{theirs}.{name}.to_out.0"),
            ]
        return (
            *rules,
            *joined_with_bias(f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"]),
            *with_bias(renamed, f"{ours}.cross_attn.q", f"{theirs}.attn2.to_q"),
            *joined_with_bias(f"{ours}.cross_attn.kv", [f"{theirs}.attn2.to_{part}" for part in "kv"]),
            *with_bias(renamed, f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj"),
            *with_bias(renamed, f"{ours}.mlp.fc2", f"{theirs}.ff.net.2"),
        )

    return Layout((
        *with_bias(renamed, "patch_embed", patches),
        *with_bias(renamed, "time_embed.fc1", f"{time}.emb.timestep_embedder.linear_1"),
        *with_bias(renamed, "time_embed.fc2", f"{time}.emb.timestep_embedder.linear_2"),
        *with_bias(renamed, "modulation", f"{time}.linear"),
        *with_bias(renamed, "text_embed.fc1", "caption_projection.linear_1"),
        *with_bias(renamed, "text_embed.fc2", "caption_projection.linear_2"),
        *rules_for_blocks(config.depth, block),
        renamed("output_table_2D", "scale_shift_table"),
        *with_bias(renamed, "output", "proj_out"),
    ))  # fmt: skip


def _diffusers(config: LTXConfig) -> Layout:
    return _layout(config, "proj_in", "time_embed", "norm_q", "norm_k")


def _original(config: LTXConfig) -> Layout:
    return _layout(config, "patchify_proj", "adaln_single", "q_norm", "k_norm")


def _original_config(tensors: Mapping[str, Tensor]) -> LTXConfig | None:
    if not {"patchify_proj.weight", "adaln_single.linear.weight", "caption_projection.linear_1.weight"} <= set(tensors):
        return None
    width, in_channels = tensors["patchify_proj.weight"].shape
    return LTXConfig(
        in_channels=in_channels,
        out_channels=tensors["proj_out.weight"].shape[0],
        width=width,
        depth=1 + max(int(m[1]) for name in tensors if (m := re.match(r"transformer_blocks\.(\d+)\.", name))),
        # The file does not say the number of heads: 32 in the networks of 2B and 13B, others have heads of 64.
        num_heads=32 if width in (2048, 4096) else max(1, width // 64),
        text_width=tensors["caption_projection.linear_1.weight"].shape[1],
    )


LTX = Format(
    class_name=_CLASS,
    config_type=LTXConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("LTX-Video", _original_config, _original),),
)
