"""Video DiT: diffusers' CogVideoXTransformer3DModel, and the files of THUDM/CogVideo (SAT).

diffusers' class gets its rotary positions from the pipeline; ours makes those of the pipelines. It feeds videos as
[batch, frames, channels, height, width], ours as [batch, channels, frames, height, width].

Their one difference that no layout can carry: the authors' code normalises before the output with eps 1e-6, diffusers
with norm_eps, 1e-5. What reaches it is already normalised, so that nothing of float32's first five digits changes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import Format, Original, config_values
from smalti.interop.layout import (
    Layout,
    Rule,
    Tensors,
    joined_with_bias,
    renamed,
    reshaped,
    rules_for_blocks,
    with_bias,
)
from smalti.models.video_dit import VideoDiTConfig

_CLASS = "CogVideoXTransformer3DModel"


def _read_config(body: Mapping[str, Any]) -> VideoDiTConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "num_attention_heads": 30, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
            "time_embed_dim": 512, "ofs_embed_dim": None, "text_embed_dim": 4096, "num_layers": 30,
            "sample_width": 90, "sample_height": 60, "sample_frames": 49, "patch_size": 2, "patch_size_t": None,
            "temporal_compression_ratio": 4, "max_text_seq_length": 226, "norm_eps": 1e-5,
            "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0,
            "use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": False,
        },
        {
            "flip_sin_to_cos": True, "freq_shift": 0, "dropout": 0.0, "attention_bias": True,
            "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "norm_elementwise_affine": True,
            # The linear patch embedding of CogVideoX 1.5 has a bias whatever its config says, and it says False.
            "patch_bias": True if body.get("patch_size_t") is None else (True, False),
        },
    )  # fmt: skip
    rotary, learned = values["use_rotary_positional_embeddings"], values["use_learned_positional_embeddings"]
    if learned and not rotary:
        raise UserError(f"config field use_learned_positional_embeddings=True of {_CLASS} needs rotary ones as well")
    frames = (values["sample_frames"] - 1) // values["temporal_compression_ratio"] + 1
    return VideoDiTConfig(
        video_size=(frames, values["sample_height"], values["sample_width"]),
        in_channels=values["in_channels"],
        out_channels=values["out_channels"] or values["in_channels"],
        patch_size=values["patch_size"],
        patch_frames=values["patch_size_t"],
        width=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        text_width=values["text_embed_dim"],
        text_tokens=values["max_text_seq_length"],
        time_width=values["time_embed_dim"],
        ofs_width=values["ofs_embed_dim"],
        positions="rope+learned" if learned else "rope" if rotary else "sincos",
        norm_eps=values["norm_eps"],
        spatial_interpolation=values["spatial_interpolation_scale"],
        temporal_interpolation=values["temporal_interpolation_scale"],
        temporal_compression=values["temporal_compression_ratio"],
    )


def _write_config(config: VideoDiTConfig) -> dict[str, Any]:
    if config.attention != "full":
        raise UserError(f"diffusers' {_CLASS} cannot express model.attention={config.attention!r}: it has 'full'")
    frames, height, width = config.video_size
    return {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.width // config.num_heads,
        "in_channels": config.in_channels, "out_channels": config.out_channels, "flip_sin_to_cos": True,
        "freq_shift": 0, "time_embed_dim": config.time_width, "ofs_embed_dim": config.ofs_width,
        "text_embed_dim": config.text_width, "num_layers": config.depth, "dropout": 0.0, "attention_bias": True,
        "sample_width": width, "sample_height": height,
        "sample_frames": (frames - 1) * config.temporal_compression + 1, "patch_size": config.patch_size,
        "patch_size_t": config.patch_frames, "temporal_compression_ratio": config.temporal_compression,
        "max_text_seq_length": config.text_tokens, "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu", "norm_elementwise_affine": True, "norm_eps": config.norm_eps,
        "spatial_interpolation_scale": config.spatial_interpolation,
        "temporal_interpolation_scale": config.temporal_interpolation,
        "use_rotary_positional_embeddings": "rope" in config.positions,
        "use_learned_positional_embeddings": "learned" in config.positions,
        "patch_bias": True,
    }  # fmt: skip


def _patch_embedding(config: VideoDiTConfig, theirs: str) -> tuple[Rule, Rule]:
    """A convolution of frames in CogVideoX 1.0, a linear layer where patches have frames."""
    bias = renamed("patch_embed.bias", f"{theirs}.bias")
    if config.patch_frames is not None:
        return renamed("patch_embed.weight", f"{theirs}.weight"), bias
    kernel = (config.width, config.in_channels, config.patch_size, config.patch_size)
    matrix = (config.width, config.in_channels * config.patch_size**2)
    return reshaped("patch_embed.weight", f"{theirs}.weight", matrix, kernel), bias


def _learned_positions(config: VideoDiTConfig, theirs: str) -> tuple[Rule, ...]:
    if config.positions != "rope+learned":
        return ()
    frames, rows, columns = config.training_grid
    shape = (config.text_tokens + frames * rows * columns, config.width)
    return (reshaped("positions_SD", theirs, shape, (1, *shape)),)


def _time_embeddings(config: VideoDiTConfig, time: tuple[str, str], ofs: tuple[str, str]) -> tuple[Rule, ...]:
    pairs = [("time_embed.fc1", time[0]), ("time_embed.fc2", time[1])]
    if config.ofs_width:
        pairs += [("ofs_embed.fc1", ofs[0]), ("ofs_embed.fc2", ofs[1])]
    return tuple(rule for ours, theirs in pairs for rule in with_bias(renamed, ours, theirs))


def _diffusers(config: VideoDiTConfig) -> Layout:
    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        return (
            *with_bias(renamed, f"{ours}.attn_norm", f"{theirs}.norm1.norm"),
            *joined_with_bias(f"{ours}.attn.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"]),
            *with_bias(renamed, f"{ours}.attn.q_norm", f"{theirs}.attn1.norm_q"),
            *with_bias(renamed, f"{ours}.attn.k_norm", f"{theirs}.attn1.norm_k"),
            *with_bias(renamed, f"{ours}.attn.out", f"{theirs}.attn1.to_out.0"),
            *with_bias(renamed, f"{ours}.mlp_norm", f"{theirs}.norm2.norm"),
            *with_bias(renamed, f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj"),
            *with_bias(renamed, f"{ours}.mlp.fc2", f"{theirs}.ff.net.2"),
        )

    modulations = [f"transformer_blocks.{i}.norm{j}.linear" for i in range(config.depth) for j in (1, 2)]
    sizes = [6 * config.width] * (2 * config.depth) + [2 * config.width]
    return Layout((
        *_patch_embedding(config, "patch_embed.proj"),
        *with_bias(renamed, "text_embed", "patch_embed.text_proj"),
        *_learned_positions(config, "patch_embed.pos_embedding"),
        *_time_embeddings(
            config,
            ("time_embedding.linear_1", "time_embedding.linear_2"),
            ("ofs_embedding.linear_1", "ofs_embedding.linear_2"),
        ),
        *joined_with_bias("modulation", [*modulations, "norm_out.linear"], sizes),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "last_norm", "norm_final"),
        *with_bias(renamed, "output_norm", "norm_out.norm"),
        *with_bias(renamed, "output", "proj_out"),
    ))  # fmt: skip


_SAT_PATCH, _SAT_QUERY_NORM = "mixins.patch_embed.proj.weight", "mixins.adaln_layer.query_layernorm_list.0.weight"
_SAT_POSITIONS = "mixins.pos_embed.pos_embedding"
_SAT_ROTARY = ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos", "transformer.position_embeddings.weight")


def _sat_positions(tensors: Mapping[str, Tensor], width: int) -> Literal["sincos", "rope", "rope+learned"]:
    if _SAT_POSITIONS in tensors:
        first = tensors[_SAT_POSITIONS][0, 0]  # of the text, for which the fixed table holds zeros
        return "sincos" if first.device.type != "meta" and not first.any() else "rope+learned"
    # Files of CogVideoX-2B say nothing of positions, those of 5B sometimes do: the width tells them apart.
    return "sincos" if width == 1920 and not any(name in tensors for name in _SAT_ROTARY) else "rope"


def _original_config(tensors: Mapping[str, Tensor]) -> VideoDiTConfig | None:
    """What the file leaves open is as published: patches of 2, latents of 16 channels, the videos' size."""
    if _SAT_PATCH not in tensors or _SAT_QUERY_NORM not in tensors:
        return None
    patch, output = tensors[_SAT_PATCH], tensors["mixins.final_layer.linear.weight"]
    width, convolution = patch.shape[0], patch.ndim == 4
    patch_frames = None if convolution else max(1, output.shape[0] // (4 * 16))
    patch_area = 4 * (patch_frames or 1)
    ofs = tensors.get("ofs_embed.0.weight")
    return VideoDiTConfig(
        video_size=(13, 60, 90) if convolution else (21, 96, 170),
        in_channels=patch[0].numel() // patch_area,
        out_channels=output.shape[0] // patch_area,
        patch_frames=patch_frames,
        width=width,
        depth=1 + max(int(m[1]) for name in tensors if (m := re.match(r"transformer\.layers\.(\d+)\.", name))),
        num_heads=width // tensors[_SAT_QUERY_NORM].shape[0],
        text_width=tensors["mixins.patch_embed.text_proj.weight"].shape[1],
        text_tokens=226 if convolution else 224,
        time_width=tensors["time_embed.0.weight"].shape[0],
        ofs_width=None if ofs is None else ofs.shape[0],
        positions=_sat_positions(tensors, width),
    )


def _sat_modulations(config: VideoDiTConfig, kind: str) -> Rule:
    """Ours goes by layer and then by stream, theirs by stream and then by layer: the middle quarters trade places."""
    names = [f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}" for i in range(config.depth)]

    def swapped(tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = []
        for tensor in tensors[:-1]:
            first, second, third, fourth = tensor.chunk(4)
            parts.append(torch.cat([first, third, second, fourth]))
        return [*parts, tensors[-1]]

    def to_theirs(tensors: Tensors) -> Tensors:
        parts = tensors[0].split([12 * config.width] * config.depth + [2 * config.width])
        *blocks, last = swapped(parts)
        return (*blocks, last.clone())

    theirs = (*names, f"mixins.final_layer.adaLN_modulation.1.{kind}")
    return Rule((f"modulation.{kind}",), theirs, lambda tensors: (torch.cat(swapped(tensors)),), to_theirs)


def _original(config: VideoDiTConfig) -> Layout:
    def block(i: int) -> tuple[Rule, ...]:
        ours, theirs = f"blocks.{i}", f"transformer.layers.{i}"
        return (
            *with_bias(renamed, f"{ours}.attn_norm", f"{theirs}.input_layernorm"),
            *with_bias(renamed, f"{ours}.attn.qkv", f"{theirs}.attention.query_key_value"),
            *with_bias(renamed, f"{ours}.attn.q_norm", f"mixins.adaln_layer.query_layernorm_list.{i}"),
            *with_bias(renamed, f"{ours}.attn.k_norm", f"mixins.adaln_layer.key_layernorm_list.{i}"),
            *with_bias(renamed, f"{ours}.attn.out", f"{theirs}.attention.dense"),
            *with_bias(renamed, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm"),
            *with_bias(renamed, f"{ours}.mlp.fc1", f"{theirs}.mlp.dense_h_to_4h"),
            *with_bias(renamed, f"{ours}.mlp.fc2", f"{theirs}.mlp.dense_4h_to_h"),
        )

    rules = (
        *_patch_embedding(config, "mixins.patch_embed.proj"),
        *with_bias(renamed, "text_embed", "mixins.patch_embed.text_proj"),
        *_learned_positions(config, _SAT_POSITIONS),
        *_time_embeddings(config, ("time_embed.0", "time_embed.2"), ("ofs_embed.0", "ofs_embed.2")),
        *(_sat_modulations(config, kind) for kind in ("weight", "bias")),
        *rules_for_blocks(config.depth, block),
        *with_bias(renamed, "last_norm", "transformer.final_layernorm"),
        *with_bias(renamed, "output_norm", "mixins.final_layer.norm_final"),
        *with_bias(renamed, "output", "mixins.final_layer.linear"),
    )
    tables = _SAT_ROTARY if "learned" in config.positions else (*_SAT_ROTARY, _SAT_POSITIONS)
    return Layout(rules, ignored=tables)


VIDEO_DIT = Format(
    class_name=_CLASS,
    config_type=VideoDiTConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
    originals=(Original("CogVideoX (SAT)", _original_config, _original),),
)
