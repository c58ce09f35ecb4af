"""Z-Image: diffusers' ZImageTransformer2DModel, its keys in one file, and the files of ComfyUI."""

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
    joined,
    joined_with_bias,
    renamed,
    reshaped,
    rules_for_blocks,
    with_bias,
)
from smalti.models.zimage import ZImageConfig

_CLASS = "ZImageTransformer2DModel"


def _read_config(body: Mapping[str, Any]) -> ZImageConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "all_patch_size": (2,), "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2,
            "n_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560, "rope_theta": 256.0,
            "t_scale": 1000.0, "axes_dims": (32, 48, 48), "axes_lens": (1024, 512, 512),
        },
        {
            "all_f_patch_size": ((1,), [1]), "siglip_feat_dim": None,
            "n_kv_heads": body.get("n_kv_heads"),  # not read by the class either: always n_heads
        },
    )  # fmt: skip
    patch_sizes = values["all_patch_size"]
    if len(patch_sizes) != 1:
        raise UserError(f"config field all_patch_size={patch_sizes!r} of {_CLASS} is not supported: only one size is")
    return ZImageConfig(
        in_channels=values["in_channels"],
        patch_size=patch_sizes[0],
        width=values["dim"],
        depth=values["n_layers"],
        refiner_depth=values["n_refiner_layers"],
        num_heads=values["n_heads"],
        text_width=values["cap_feat_dim"],
        rope_widths=tuple(values["axes_dims"]),
        rope_lengths=tuple(values["axes_lens"]),
        rope_theta=float(values["rope_theta"]),
        time_scale=float(values["t_scale"]),
        qk_norm=values["qk_norm"],
        norm_eps=values["norm_eps"],
    )


def _write_config(config: ZImageConfig) -> dict[str, Any]:
    return {
        "all_patch_size": [config.patch_size], "all_f_patch_size": [1], "in_channels": config.in_channels,
        "dim": config.width, "n_layers": config.depth, "n_refiner_layers": config.refiner_depth,
        "n_heads": config.num_heads, "n_kv_heads": config.num_heads, "norm_eps": config.norm_eps,
        "qk_norm": config.qk_norm, "cap_feat_dim": config.text_width, "siglip_feat_dim": None,
        "rope_theta": config.rope_theta, "t_scale": config.time_scale, "axes_dims": list(config.rope_widths),
        "axes_lens": list(config.rope_lengths),
    }  # fmt: skip


def _diffusers_attention(config: ZImageConfig, ours: str, theirs: str) -> tuple[Rule, ...]:
    norms = [renamed(f"{ours}.{p}_norm.weight", f"{theirs}.norm_{p}.weight") for p in "qk" if config.qk_norm]
    return (
        joined(f"{ours}.qkv.weight", [f"{theirs}.to_{part}.weight" for part in "qkv"]),
        renamed(f"{ours}.out.weight", f"{theirs}.to_out.0.weight"),
        *norms,
    )


def _comfyui_attention(config: ZImageConfig, ours: str, theirs: str) -> tuple[Rule, ...]:
    parts = ["qkv", "out", *(["q_norm", "k_norm"] if config.qk_norm else [])]
    return tuple(renamed(f"{ours}.{part}.weight", f"{theirs}.{part}.weight") for part in parts)


def _layout(config: ZImageConfig, patch_embed: str, final: str, comfyui: bool) -> Layout:
    attention = _comfyui_attention if comfyui else _diffusers_attention

    def block(ours: str, theirs: str) -> tuple[Rule, ...]:
        norms = (
            ("attn_norm_in", "attention_norm1"), ("attn_norm_out", "attention_norm2"),
            ("mlp_norm_in", "ffn_norm1"), ("mlp_norm_out", "ffn_norm2"),
        )  # fmt: skip
        return (
            *attention(config, f"{ours}.attn", f"{theirs}.attention"),
            joined(f"{ours}.mlp.fc1.weight", [f"{theirs}.feed_forward.w{i}.weight" for i in (1, 3)]),
            renamed(f"{ours}.mlp.fc2.weight", f"{theirs}.feed_forward.w2.weight"),
            *(renamed(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight") for mine, other in norms),
        )

    timed = [f"noise_refiner.{i}" for i in range(config.refiner_depth)] + [f"layers.{i}" for i in range(config.depth)]
    rules = (
        *with_bias(renamed, "patch_embed", patch_embed),
        reshaped("image_padding", "x_pad_token", (config.width,), (1, config.width)),
        *with_bias(renamed, "time_embed.fc1", "t_embedder.mlp.0"),
        *with_bias(renamed, "time_embed.fc2", "t_embedder.mlp.2"),
        renamed("text_norm.weight", "cap_embedder.0.weight"),
        *with_bias(renamed, "text_embed", "cap_embedder.1"),
        reshaped("text_padding", "cap_pad_token", (config.width,), (1, config.width)),
        *joined_with_bias("modulation", [f"{name}.adaLN_modulation.0" for name in timed]),
        *rules_for_blocks(config.refiner_depth, lambda i: block(f"noise_refiner.{i}", f"noise_refiner.{i}")),
        *rules_for_blocks(config.refiner_depth, lambda i: block(f"context_refiner.{i}", f"context_refiner.{i}")),
        *rules_for_blocks(config.depth, lambda i: block(f"blocks.{i}", f"layers.{i}")),
        *with_bias(renamed, "output_scale", f"{final}.adaLN_modulation.1"),
        *with_bias(renamed, "output", f"{final}.linear"),
    )
    return Layout(rules, ignored=("norm_final.weight",) if comfyui else ())  # no forward reads it


def _diffusers(config: ZImageConfig) -> Layout:
    size = f"{config.patch_size}-1"
    return _layout(config, f"all_x_embedder.{size}", f"all_final_layer.{size}", comfyui=False)


def _comfyui(config: ZImageConfig) -> Layout:
    return _layout(config, "x_embedder", "final_layer", comfyui=True)


def _config_of_tensors(
    tensors: Mapping[str, Tensor], patch_embed: str, patch_size: int, q_norm: str
) -> ZImageConfig | None:
    needed = {
        f"{patch_embed}.weight", "x_pad_token", "cap_pad_token", "cap_embedder.1.weight",
        "layers.0.adaLN_modulation.0.weight",
    }  # fmt: skip
    if not needed <= set(tensors):
        return None
    width, patch_values = tensors[f"{patch_embed}.weight"].shape
    norm = f"layers.0.attention.{q_norm}.weight"
    # Without QK-norm the file does not say how wide a head is (published: 128), nor ever how its features divide into
    # axes: 2 : 3 : 3 in the published network.
    head_width = tensors[norm].shape[0] if norm in tensors else math.gcd(width, 128)
    grid_width = 2 * (3 * head_width // 16)

    def depth(stack: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(rf"{stack}\.(\d+)\.", name))})

    return ZImageConfig(
        in_channels=patch_values // patch_size**2,
        patch_size=patch_size,
        width=width,
        depth=depth("layers"),
        refiner_depth=depth("noise_refiner"),
        num_heads=width // head_width,
        text_width=tensors["cap_embedder.1.weight"].shape[1],
        rope_widths=(head_width - 2 * grid_width, grid_width, grid_width),
        qk_norm=norm in tensors,
    )


def _comfyui_config(tensors: Mapping[str, Tensor]) -> ZImageConfig | None:
    return _config_of_tensors(tensors, "x_embedder", 2, "q_norm")


def _original_config(tensors: Mapping[str, Tensor]) -> ZImageConfig | None:
    sizes = {int(m[1]) for name in tensors if (m := re.match(r"all_x_embedder\.(\d+)-1\.weight", name))}
    if len(sizes) != 1:
        return None
    (size,) = sizes
    return _config_of_tensors(tensors, f"all_x_embedder.{size}-1", size, "norm_q")


ZIMAGE = Format(
    class_name=_CLASS,
    config_type=ZImageConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(
        Original("Z-Image", _original_config, _diffusers),
        Original("Z-Image (ComfyUI)", _comfyui_config, _comfyui),
    ),
)
