"""U-Net: diffusers' UNet2DModel."""

from collections.abc import Mapping
from typing import Any

from smalti.errors import UserError
from smalti.interop.formats import Format, config_values
from smalti.interop.layout import Layout, Rule, joined_with_bias, renamed, with_bias
from smalti.models.unet import UNetConfig

_CLASS = "UNet2DModel"
_PLAIN = {"conv": ("DownBlock2D", "UpBlock2D"), "residual": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
_ATTENDED = ("AttnDownBlock2D", "AttnUpBlock2D")
_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "down_block_types": ("DownBlock2D", *(["AttnDownBlock2D"] * 3)),
    "up_block_types": (*(["AttnUpBlock2D"] * 3), "UpBlock2D"), "mid_block_type": "UNetMidBlock2D",
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "downsample_padding": 1,
    "downsample_type": "conv", "upsample_type": "conv", "attention_head_dim": 8, "norm_num_groups": 32,
    "attn_norm_num_groups": None, "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
    "num_class_embeds": None,
}  # fmt: skip


def _refused(field: str, value: Any, allowed: str) -> UserError:
    return UserError(f"config field {field}={value!r} of {_CLASS} is not supported: only {allowed}")


def _resampling(values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each change of resolution is inside a residual block, downwards and then upwards."""
    # The last level of each direction changes nothing; plain levels always convolve, whatever downsample_type says.
    down = [(t, values["downsample_type"]) for t in values["down_block_types"][:-1]]
    up = [(t, values["upsample_type"]) for t in values["up_block_types"][:-1]]
    return tuple(t in _PLAIN["residual"] or (t in _ATTENDED and kind == "resnet") for t, kind in down + up)


def _read_config(body: Mapping[str, Any]) -> UNetConfig:
    values = config_values(
        body,
        _CLASS,
        _DEFAULTS,
        {
            "center_input_sample": False, "time_embedding_type": "positional", "mid_block_scale_factor": (1, 1.0),
            "act_fn": ("silu", "swish"), "class_embed_type": None,
            "dropout": body.get("dropout"),  # acts in training only, where our networks have none
            "num_train_timesteps": body.get("num_train_timesteps"),  # of learned time embeddings alone
        },
    )  # fmt: skip
    down, up, widths = values["down_block_types"], values["up_block_types"], tuple(values["block_out_channels"])
    known = {*_ATTENDED, *_PLAIN["conv"], *_PLAIN["residual"]}
    for field, types in (("down_block_types", down), ("up_block_types", up)):
        if set(types) - known:
            raise _refused(field, tuple(types), ", ".join(sorted(known)))
    attention_levels = tuple(i for i, block in enumerate(down) if block in _ATTENDED)
    if attention_levels != tuple(i for i, block in enumerate(reversed(up)) if block in _ATTENDED):
        raise _refused("up_block_types", tuple(up), "attention at the same levels as in down_block_types")
    residual = _resampling(values)
    if any(residual) and not all(residual):
        raise _refused("down_block_types", tuple(down), "one way of resampling, by resnets or by convolutions, in all")
    channels, out_channels = values["in_channels"], values["out_channels"]
    if out_channels not in (channels, 2 * channels):
        raise _refused("out_channels", out_channels, f"{channels} or {2 * channels}")
    if values["downsample_padding"] not in (0, 1):
        raise _refused("downsample_padding", values["downsample_padding"], "0 or 1")
    if values["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise _refused("resnet_time_scale_shift", values["resnet_time_scale_shift"], "'default' or 'scale_shift'")
    if values["mid_block_type"] not in (None, "UNetMidBlock2D"):
        raise _refused("mid_block_type", values["mid_block_type"], "None or 'UNetMidBlock2D'")
    scale_shift = values["resnet_time_scale_shift"] == "scale_shift"
    groups = values["attn_norm_num_groups"]
    # A config may say nothing of its size, since the network takes any: then a small one that it takes.
    size = values["sample_size"] or 8 * 2 ** (len(widths) - 1)
    return UNetConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        in_channels=channels,
        widths=widths,
        blocks_per_level=values["layers_per_block"],
        attention_levels=attention_levels,
        middle=_middle(values["mid_block_type"], values["add_attention"]),
        head_width=values["attention_head_dim"],
        # The class does not say whether one of its labels means "no class": none does, as in ADM's ImageNet networks.
        num_classes=values["num_class_embeds"] or 0,
        null_label=not values["num_class_embeds"],
        learn_sigma=out_channels == 2 * channels,
        time_modulation="scale_shift" if scale_shift else "add",
        resampling="residual" if any(residual) else "conv",
        downsample_padding=values["downsample_padding"],
        norm_groups=values["norm_num_groups"],
        norm_eps=values["norm_eps"],
        middle_norm_groups=0 if groups is None and scale_shift else groups,
        time_width=values["time_embedding_dim"],
        frequency_shift=float(values["freq_shift"]),
        sin_first=not values["flip_sin_to_cos"],
    )


def _middle(block_type: str | None, attention: bool) -> Any:
    if block_type is None:
        return "none"
    return "attention" if attention else "residual"


def _write_config(config: UNetConfig) -> dict[str, Any]:
    height, width = config.image_size
    plain_down, plain_up = _PLAIN[config.resampling]
    attended = [i in config.attention_levels for i in range(len(config.widths))]
    scale_shift, groups = config.time_modulation == "scale_shift", config.middle_norm_groups
    if config.middle == "attention" and groups == 0 and not scale_shift:
        raise UserError(f"diffusers' {_CLASS} cannot express model.middle_norm_groups=0 with time_modulation='add'")
    if config.middle == "attention" and groups is None and scale_shift:
        groups = config.norm_groups  # where their None means no normalisation
    resample_type = "resnet" if config.resampling == "residual" else "conv"
    shift = config.frequency_shift
    return {
        "sample_size": height if height == width else [height, width], "in_channels": config.in_channels,
        "out_channels": config.out_channels, "center_input_sample": False, "time_embedding_type": "positional",
        "time_embedding_dim": config.time_width, "freq_shift": int(shift) if shift.is_integer() else shift,
        "flip_sin_to_cos": not config.sin_first,
        "down_block_types": [_ATTENDED[0] if here else plain_down for here in attended],
        "mid_block_type": None if config.middle == "none" else "UNetMidBlock2D",
        "up_block_types": [_ATTENDED[1] if here else plain_up for here in reversed(attended)],
        "block_out_channels": list(config.widths), "layers_per_block": config.blocks_per_level,
        "mid_block_scale_factor": 1, "downsample_padding": config.downsample_padding,
        "downsample_type": resample_type, "upsample_type": resample_type, "dropout": 0.0, "act_fn": "silu",
        "attention_head_dim": config.head_width, "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": groups or None, "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "add_attention": config.middle != "residual", "class_embed_type": None,
        "num_class_embeds": config.num_classes + config.null_label if config.num_classes else None,
        "num_train_timesteps": None,
    }  # fmt: skip


def _their_name(ours: str) -> str:
    """diffusers' name of a residual or attention block of ours."""
    for mine, theirs in (
        ("down.", "down_blocks."), ("up.", "up_blocks."), ("middle.attention", "mid_block.attentions.0"),
        ("middle.", "mid_block."), (".blocks.", ".resnets."),
    ):  # fmt: skip
        ours = ours.replace(mine, theirs, 1)
    sampler = "downsamplers.0" if ours.startswith("down") else "upsamplers.0"
    return ours.replace("resample", sampler)


def _residual(ours: str, shortcut: bool) -> tuple[Rule, ...]:
    theirs = _their_name(ours)
    parts = ["norm1", "conv1", "norm2", "conv2"]
    same = [rule for part in parts for rule in with_bias(renamed, f"{ours}.{part}", f"{theirs}.{part}")]
    extra = with_bias(renamed, f"{ours}.shortcut", f"{theirs}.conv_shortcut") if shortcut else ()
    return *same, *extra


def _attention(ours: str, normalised: bool = True) -> tuple[Rule, ...]:
    theirs = _their_name(ours)
    norm = with_bias(renamed, f"{ours}.norm", f"{theirs}.group_norm") if normalised else ()
    return (
        *norm,
        *joined_with_bias(f"{ours}.attn.qkv", [f"{theirs}.to_{part}" for part in "qkv"]),
        *with_bias(renamed, f"{ours}.attn.out", f"{theirs}.to_out.0"),
    )


def _level(name: str, widths: list[tuple[int, int]], attention: bool, resampled: bool, residual: bool) -> list[Rule]:
    rules = [rule for j, (a, b) in enumerate(widths) for rule in _residual(f"{name}.blocks.{j}", a != b)]
    if attention:
        rules += [rule for j in range(len(widths)) for rule in _attention(f"{name}.attentions.{j}")]
    if resampled and residual:
        rules += _residual(f"{name}.resample", False)
    elif resampled:
        rules += with_bias(renamed, f"{name}.resample", f"{_their_name(f'{name}.resample')}.conv")
    return rules


def _diffusers(config: UNetConfig) -> Layout:
    last, residual, attended = len(config.widths) - 1, config.resampling == "residual", config.attention_levels
    rows = config.modulation_rows()
    rules = [
        *with_bias(renamed, "conv_in", "conv_in"),
        *with_bias(renamed, "time_embed.fc1", "time_embedding.linear_1"),
        *with_bias(renamed, "time_embed.fc2", "time_embedding.linear_2"),
        *joined_with_bias("modulation", [f"{_their_name(n)}.time_emb_proj" for n in rows], list(rows.values())),
        *with_bias(renamed, "norm_out", "conv_norm_out"),
        *with_bias(renamed, "conv_out", "conv_out"),
    ]
    if config.num_classes:
        rules.append(renamed("label_embed.weight", "class_embedding.weight"))
    for i in range(last + 1):
        rules += _level(f"down.{i}", config.down_widths(i), i in attended, i < last, residual)
        rules += _level(f"up.{last - i}", config.up_widths(i), i in attended, i > 0, residual)
    if config.middle != "none":
        rules += [rule for j in range(2) for rule in _residual(f"middle.blocks.{j}", False)]
    if config.middle == "attention":
        rules += _attention("middle.attention", config.middle_norm_groups != 0)
    return Layout(tuple(rules))


UNET = Format(
    class_name=_CLASS,
    config_type=UNetConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=_diffusers,
)
