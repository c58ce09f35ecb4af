"""aMUSEd: diffusers' UVit2DModel, and the files of huggingface/open-muse (MaskGiTUViT)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smalti.errors import UserError
from smalti.interop.formats import Format, Original, config_values
from smalti.interop.layout import Layout, Rule, joined, renamed, reshaped, rules_for_blocks, swapped_halves
from smalti.models.amused import AmusedConfig

_CLASS = "UVit2DModel"


def _read_config(body: Mapping[str, Any]) -> AmusedConfig:
    values = config_values(
        body,
        _CLASS,
        {
            "hidden_size": 1024, "cond_embed_dim": 768, "micro_cond_encode_dim": 256, "micro_cond_embed_dim": 1280,
            "encoder_hidden_size": 768, "vocab_size": 8256, "codebook_size": 8192, "in_channels": 768,
            "block_out_channels": 768, "num_res_blocks": 3, "downsample": False, "upsample": False,
            "block_num_heads": 12, "num_hidden_layers": 22, "num_attention_heads": 16, "intermediate_size": 2816,
            "layer_norm_eps": 1e-6, "sample_size": 64,
        },
        {"use_bias": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "ln_elementwise_affine": True},
    )  # fmt: skip
    if values["downsample"] != values["upsample"]:
        raise UserError(
            f"config fields downsample={values['downsample']}, upsample={values['upsample']} of {_CLASS}: "
            "only both or neither is supported"
        )
    encoded, embedded = values["micro_cond_encode_dim"], values["micro_cond_embed_dim"]
    if embedded % encoded:
        raise UserError(f"config field micro_cond_embed_dim={embedded} of {_CLASS} must divide by {encoded}")
    return AmusedConfig(
        codebook_size=values["codebook_size"],
        vocabulary_size=values["vocab_size"],
        grid_size=values["sample_size"],
        width=values["hidden_size"],
        depth=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        token_width=values["in_channels"],
        conv_width=values["block_out_channels"],
        conv_depth=values["num_res_blocks"],
        conv_heads=values["block_num_heads"],
        downsample=values["downsample"],
        text_width=values["encoder_hidden_size"],
        pooled_width=values["cond_embed_dim"],
        num_micro_conditions=embedded // encoded,
        micro_condition_width=encoded,
        norm_eps=values["layer_norm_eps"],
    )


def _write_config(config: AmusedConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width, "use_bias": False, "hidden_dropout": 0.0, "cond_embed_dim": config.pooled_width,
        "micro_cond_encode_dim": config.micro_condition_width,
        "micro_cond_embed_dim": config.num_micro_conditions * config.micro_condition_width,
        "encoder_hidden_size": config.text_width, "vocab_size": config.vocabulary_size,
        "codebook_size": config.codebook_size, "in_channels": config.token_width,
        "block_out_channels": config.conv_width, "num_res_blocks": config.conv_depth,
        "downsample": config.downsample, "upsample": config.downsample, "block_num_heads": config.conv_heads,
        "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads, "attention_dropout": 0.0,
        "intermediate_size": config.mlp_width, "layer_norm_eps": config.norm_eps, "ln_elementwise_affine": True,
        "sample_size": config.grid_size,
    }  # fmt: skip


@dataclass(frozen=True)
class _Names:
    """What a format calls the parts, where diffusers and open-muse differ. Pairs and triples are in order of use."""

    condition_embed: tuple[str, str]
    stages: tuple[str, str]
    downsample: tuple[str, str]  # norm, convolution
    upsample: tuple[str, str]
    conv_norm: str
    conv_fc1: str
    response_norm: str
    conv_fc2: str
    conv_modulation: str
    text_norms: tuple[str, str]
    attentions: tuple[str, str]
    q_k_v_out: tuple[str, str, str, str]
    block_norms: tuple[str, str, str]
    block_modulations: tuple[str, str, str]
    mlp_fc1: tuple[str, ...]  # one layer of [value | gate], or those of gate and of value
    mlp_fc2: str
    head_norm: str


_DIFFUSERS = _Names(
    condition_embed=("cond_embed.linear_1", "cond_embed.linear_2"),
    stages=("down_block", "up_block"),
    downsample=("down_block.downsample.norm", "down_block.downsample.conv"),
    upsample=("up_block.upsample.norm", "up_block.upsample.conv"),
    conv_norm="norm",
    conv_fc1="channelwise_linear_1",
    response_norm="channelwise_norm",
    conv_fc2="channelwise_linear_2",
    conv_modulation="cond_embeds_mapper",
    text_norms=("norm1", "norm2"),
    attentions=("attn1", "attn2"),
    q_k_v_out=("to_q", "to_k", "to_v", "to_out.0"),
    block_norms=("norm1.norm", "norm2.norm", "norm3.norm"),
    block_modulations=("norm1.linear", "norm2.linear", "norm3.linear"),
    mlp_fc1=("ff.net.0.proj",),
    mlp_fc2="ff.net.2",
    head_norm="mlm_layer.layer_norm",
)
_OPEN_MUSE = _Names(
    condition_embed=("cond_embed.0", "cond_embed.2"),
    stages=("down_blocks.0", "up_blocks.0"),
    downsample=("down_blocks.0.downsample.0.norm", "down_blocks.0.downsample.1"),
    upsample=("up_blocks.0.upsample.0.norm", "up_blocks.0.upsample.1"),
    conv_norm="norm.norm",
    conv_fc1="channelwise.0",
    response_norm="channelwise.2",
    conv_fc2="channelwise.4",
    conv_modulation="adaLN_modulation.mapper",
    text_norms=("attn_layer_norm", "crossattn_layer_norm"),
    attentions=("attention", "crossattention"),
    q_k_v_out=("query", "key", "value", "out"),
    block_norms=("attn_layer_norm", "crossattn_layer_norm", "ffn.pre_mlp_layer_norm"),
    block_modulations=(
        "self_attn_adaLN_modulation.mapper", "cross_attn_adaLN_modulation.mapper", "ffn.adaLN_modulation.mapper",
    ),
    mlp_fc1=("ffn.wi_0", "ffn.wi_1"),
    mlp_fc2="ffn.wo",
    head_norm="mlm_layer.layer_norm.norm",
)  # fmt: skip


def _weight(ours: str, theirs: str) -> Rule:
    return renamed(f"{ours}.weight", f"{theirs}.weight")


def _one_by_one(ours: str, theirs: str, outputs: int, inputs: int) -> Rule:
    """A linear layer that they store as a 1x1 convolution."""
    return reshaped(f"{ours}.weight", f"{theirs}.weight", (outputs, inputs), (outputs, inputs, 1, 1))


def _modulations(config: AmusedConfig, names: _Names) -> Rule:
    """All modulations are one layer with us."""
    first, last = (
        [f"{stage}.res_blocks.{i}.{names.conv_modulation}" for i in range(config.conv_depth)] for stage in names.stages
    )
    blocks = [f"transformer_layers.{i}.{name}" for i in range(config.depth) for name in names.block_modulations]
    rows = [2 * config.conv_width] * len(first)
    sizes = [*rows, *[2 * config.width] * len(blocks), *rows]
    return joined("modulation.weight", [f"{name}.weight" for name in (*first, *blocks, *last)], sizes)


def _text_attention(ours: str, theirs: str, names: _Names) -> tuple[Rule, ...]:
    q, k, v, out = (f"{theirs}.{name}" for name in names.q_k_v_out)
    return (
        _weight(f"{ours}.q", q),
        joined(f"{ours}.kv.weight", [f"{k}.weight", f"{v}.weight"]),
        _weight(f"{ours}.out", out),
    )


def _stage(config: AmusedConfig, ours: str, theirs: str, names: _Names) -> tuple[Rule, ...]:
    response_shapes = (4 * config.conv_width,), (1, 1, 1, 4 * config.conv_width)

    def pair(i: int) -> tuple[Rule, ...]:
        conv, their_conv = f"{ours}.conv_blocks.{i}", f"{theirs}.res_blocks.{i}"
        attention, their_attention = f"{ours}.attention_blocks.{i}", f"{theirs}.attention_blocks.{i}"
        context = (_weight(f"{attention}.context_proj", f"{their_attention}.kv_mapper"),)
        return (
            _weight(f"{conv}.depthwise", f"{their_conv}.depthwise"),
            _weight(f"{conv}.norm", f"{their_conv}.{names.conv_norm}"),
            _weight(f"{conv}.fc1", f"{their_conv}.{names.conv_fc1}"),
            *(
                reshaped(f"{conv}.response_norm.{n}", f"{their_conv}.{names.response_norm}.{n}", *response_shapes)
                for n in ("gamma", "beta")
            ),
            _weight(f"{conv}.fc2", f"{their_conv}.{names.conv_fc2}"),
            *(context if config.width != config.conv_width else ()),
            *(_weight(f"{attention}.norm{n}", f"{their_attention}.{names.text_norms[n - 1]}") for n in (1, 2)),
            *_text_attention(f"{attention}.attn1", f"{their_attention}.{names.attentions[0]}", names),
            *_text_attention(f"{attention}.attn2", f"{their_attention}.{names.attentions[1]}", names),
        )

    return rules_for_blocks(config.conv_depth, pair)


def _block(i: int, names: _Names) -> tuple[Rule, ...]:
    ours, theirs = f"blocks.{i}", f"transformer_layers.{i}"
    self_attention, cross_attention = (f"{theirs}.{name}" for name in names.attentions)
    *qkv, out = (f"{self_attention}.{name}" for name in names.q_k_v_out)
    mlp_fc1 = [f"{theirs}.{name}.weight" for name in names.mlp_fc1]
    return (
        *(renamed(f"{ours}.norm{n}_weight", f"{theirs}.{names.block_norms[n - 1]}.weight") for n in (1, 2, 3)),
        joined(f"{ours}.attn1.qkv.weight", [f"{name}.weight" for name in qkv]),
        _weight(f"{ours}.attn1.out", out),
        *_text_attention(f"{ours}.attn2", cross_attention, names),
        swapped_halves(f"{ours}.mlp.fc1.weight", *mlp_fc1)
        if len(mlp_fc1) == 1
        else joined(f"{ours}.mlp.fc1.weight", mlp_fc1),
        _weight(f"{ours}.mlp.fc2", f"{theirs}.{names.mlp_fc2}"),
    )


def _layout(config: AmusedConfig, names: _Names) -> Layout:
    conv, embed = config.conv_width, config.token_width
    resampling = (
        _weight("downsample_norm", names.downsample[0]),
        _weight("downsample", names.downsample[1]),
        _weight("upsample_norm", names.upsample[0]),
        _weight("upsample", names.upsample[1]),
    )
    return Layout((
        _weight("text_proj", "encoder_proj"),
        _weight("text_norm", "encoder_proj_layer_norm"),
        _weight("condition_embed.fc1", names.condition_embed[0]),
        _weight("condition_embed.fc2", names.condition_embed[1]),
        _modulations(config, names),
        _weight("token_embed", "embed.embeddings"),
        _weight("token_norm", "embed.layer_norm"),
        _one_by_one("token_proj", "embed.conv", conv, embed),
        *(resampling if config.downsample else ()),
        *_stage(config, "first_convs", names.stages[0], names),
        _weight("blocks_norm", "project_to_hidden_norm"),
        _weight("blocks_proj", "project_to_hidden"),
        *rules_for_blocks(config.depth, lambda i: _block(i, names)),
        _weight("convs_norm", "project_from_hidden_norm"),
        _weight("convs_proj", "project_from_hidden"),
        *_stage(config, "last_convs", names.stages[1], names),
        _one_by_one("head_proj", "mlm_layer.conv1", embed, conv),
        _weight("head_norm", names.head_norm),
        _one_by_one("output", "mlm_layer.conv2", config.codebook_size, embed),
    ))  # fmt: skip


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})


def _original_config(tensors: Mapping[str, Tensor]) -> AmusedConfig | None:
    needed = {
        "encoder_proj.weight", "cond_embed.0.weight", "embed.embeddings.weight", "embed.conv.weight",
        "down_blocks.0.res_blocks.0.depthwise.weight", "transformer_layers.0.ffn.wi_0.weight", "mlm_layer.conv2.weight",
    }  # fmt: skip
    if not needed <= set(tensors):
        return None
    width, text_width = tensors["encoder_proj.weight"].shape
    conv_width, token_width = tensors["embed.conv.weight"].shape[:2]
    published = AmusedConfig()
    micro_conditions = published.num_micro_conditions * published.micro_condition_width
    return AmusedConfig(
        codebook_size=len(tensors["mlm_layer.conv2.weight"]),
        vocabulary_size=len(tensors["embed.embeddings.weight"]),
        grid_size=32 if "down_blocks.0.downsample.1.weight" in tensors else 16,
        width=width,
        depth=_count(tensors, r"transformer_layers\.(\d+)\."),
        # The file says neither the heads nor what of the condition is pooled text: heads are of 64 and the
        # micro-conditions five of 256, as published.
        num_heads=max(1, width // 64),
        mlp_width=len(tensors["transformer_layers.0.ffn.wi_0.weight"]),
        token_width=token_width,
        conv_width=conv_width,
        conv_depth=_count(tensors, r"down_blocks\.0\.res_blocks\.(\d+)\."),
        conv_heads=max(1, conv_width // 64),
        downsample="down_blocks.0.downsample.1.weight" in tensors,
        text_width=text_width,
        pooled_width=tensors["cond_embed.0.weight"].shape[1] - micro_conditions,
    )


AMUSED = Format(
    class_name=_CLASS,
    config_type=AmusedConfig,
    read_config=_read_config,
    write_config=_write_config,
    diffusers=lambda config: _layout(config, _DIFFUSERS),
    originals=(Original("open-muse", _original_config, lambda config: _layout(config, _OPEN_MUSE)),),
)
