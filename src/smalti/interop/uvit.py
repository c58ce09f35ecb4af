"""U-ViT: the files of baofff/U-ViT. diffusers has no class for it."""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import Format, Original
from smalti.interop.layout import Layout, Rule, renamed, reshaped, rules_for_blocks, with_bias
from smalti.models.uvit import UViTConfig, uvit_presets


def _no_diffusers_class(_: Any) -> NoReturn:
    raise UserError("diffusers has no class for U-ViT: write it in the original repository's format (U-ViT)")


def _original_config(tensors: Mapping[str, Tensor]) -> UViTConfig | None:
    needed = {"patch_embed.proj.weight", "pos_embed", "mid_block.attn.qkv.weight", "decoder_pred.weight"}
    if not needed <= set(tensors) or "context_embed.weight" in tensors:  # that one is the text-to-image variant
        return None
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    labels = len(tensors["label_emb.weight"]) if "label_emb.weight" in tensors else 0
    side = int((tensors["pos_embed"].shape[1] - (2 if labels else 1)) ** 0.5)
    published = {c.width: c.num_heads for c in uvit_presets().values()}
    # The file does not say whether the last label means "no class": with 1000 labels they are ImageNet's classes.
    null_label = labels not in (0, 1000)
    return UViTConfig(
        image_size=(side * patch_size, side * patch_size),
        in_channels=channels,
        patch_size=patch_size,
        width=width,
        depth=2 * sum(name.startswith("out_blocks.") and name.endswith(".norm1.weight") for name in tensors),
        # Nor does it say the number of heads: the paper's sizes do, others have heads of 64.
        num_heads=published.get(width, max(1, width // 64)),
        mlp_ratio=len(tensors["mid_block.mlp.fc1.weight"]) / width,
        num_classes=labels - 1 if null_label else labels,
        null_label=null_label or not labels,
        qkv_bias="mid_block.attn.qkv.bias" in tensors,
        time_mlp="time_embed.0.weight" in tensors,
        final_conv="final_layer.weight" in tensors,
        long_skips="out_blocks.0.skip_linear.weight" in tensors,
    )


def _original(config: UViTConfig) -> Layout:
    def block(name: str, long_skip: bool = False) -> tuple[Rule, ...]:
        return (
            *(with_bias(renamed, f"{name}.skip_linear", f"{name}.skip_linear") if long_skip else ()),
            *with_bias(renamed, f"{name}.norm1", f"{name}.norm1"),
            renamed(f"{name}.attn.qkv.weight", f"{name}.attn.qkv.weight"),
            *([renamed(f"{name}.attn.qkv.bias", f"{name}.attn.qkv.bias")] if config.qkv_bias else ()),
            *with_bias(renamed, f"{name}.attn.out", f"{name}.attn.proj"),
            *with_bias(renamed, f"{name}.norm2", f"{name}.norm2"),
            *with_bias(renamed, f"{name}.mlp.fc1", f"{name}.mlp.fc1"),
            *with_bias(renamed, f"{name}.mlp.fc2", f"{name}.mlp.fc2"),
        )

    kernel = (config.width, config.in_channels, config.patch_size, config.patch_size)
    matrix = (config.width, config.in_channels * config.patch_size**2)
    tokens = config.extra_tokens + config.grid[0] * config.grid[1]
    half = config.depth // 2
    return Layout((
        reshaped("patch_embed.weight", "patch_embed.proj.weight", matrix, kernel),
        renamed("patch_embed.bias", "patch_embed.proj.bias"),
        *(with_bias(renamed, "time_embed.fc1", "time_embed.0") if config.time_mlp else ()),
        *(with_bias(renamed, "time_embed.fc2", "time_embed.2") if config.time_mlp else ()),
        *([renamed("label_embed.weight", "label_emb.weight")] if config.num_classes else ()),
        reshaped("positions_ND", "pos_embed", (tokens, config.width), (1, tokens, config.width)),
        *rules_for_blocks(half, lambda i: block(f"in_blocks.{i}")),
        *block("mid_block"),
        *rules_for_blocks(half, lambda i: block(f"out_blocks.{i}", config.long_skips)),
        *with_bias(renamed, "norm", "norm"),
        *with_bias(renamed, "output", "decoder_pred"),
        *(with_bias(renamed, "final_conv", "final_layer") if config.final_conv else ()),
    ))  # fmt: skip


UVIT = Format(
    class_name=None,
    config_type=UViTConfig,
    read_config=_no_diffusers_class,
    write_config=_no_diffusers_class,
    diffusers=_no_diffusers_class,
    originals=(Original("U-ViT", _original_config, _original),),
)
