"""The networks that forward.py times: diffusers' class at a size for a CPU, its call, and the same inputs for ours."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from smalti.types import Condition

Inputs = tuple[Tensor, Tensor, Condition | None]


@dataclass(frozen=True)
class Case:
    """reference: diffusers' network. inputs(batch): x, t and condition as ours takes them. call: the reference's."""

    reference: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    call: Callable[[Any, Inputs], Tensor]


def randomised(module: nn.Module) -> nn.Module:
    """Small random weights everywhere: what starts at zero would make all outputs zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if isinstance(module, diffusers.DiTTransformer2DModel):  # its copies of the embedders are one in checkpoints
            first = module.transformer_blocks[0].norm1.emb.state_dict()
            for block in module.transformer_blocks[1:]:
                block.norm1.emb.load_state_dict(first)
    return module.eval()


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _dit_s_2() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip


def _dit_inputs(batch: int) -> Inputs:
    return _noise(batch, 4, 32, 32), torch.full((batch,), 500.0), Condition(class_labels=torch.arange(batch))


def _call_dit(network: Any, inputs: Inputs) -> Tensor:
    x, t, cond = inputs
    assert cond is not None
    return network(x, timestep=t.long(), class_labels=cond.class_labels).sample  # type: ignore[no-any-return]


def _text(batch: int, width: int, tokens: int = 32, pooled: int | None = None) -> Condition:
    return Condition(
        text_embeds=_noise(batch, tokens, width), pooled_embeds=None if pooled is None else _noise(batch, pooled)
    )


def _times(batch: int, t: float) -> Tensor:
    return torch.full((batch,), t)


def _sd3(**fields: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32, num_layers=6, attention_head_dim=64, num_attention_heads=6, joint_attention_dim=512,
        caption_projection_dim=384, pooled_projection_dim=256, pos_embed_max_size=32, in_channels=16, out_channels=16,
        **fields,
    )  # fmt: skip


def _call_sd3(network: Any, inputs: Inputs) -> Tensor:
    x, t, cond = inputs
    assert cond is not None
    return network(x, cond.text_embeds, cond.pooled_embeds, t).sample  # type: ignore[no-any-return]


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=512, pooled_projection_dim=256, guidance_embeds=True, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip


def _flux_inputs(batch: int) -> Inputs:
    cond = replace(_text(batch, 512, pooled=256), guidance=_times(batch, 3.5))
    return _noise(batch, 16, 32, 32), _times(batch, 0.5), cond


def _call_flux(network: Any, inputs: Inputs) -> Tensor:
    """On latents: packed for it, with ids, as its pipeline does."""
    x, t, cond = inputs
    assert cond is not None
    batch, channels, height, width = x.shape
    packed = diffusers.FluxPipeline._pack_latents(x, batch, channels, height, width)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype)
    text_ids = torch.zeros(32, 3)
    output = network(packed, cond.text_embeds, cond.pooled_embeds, t, ids, text_ids, cond.guidance).sample
    return diffusers.FluxPipeline._unpack_latents(output, height * 8, width * 8, 8)  # type: ignore[no-any-return]


def _zimage() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=384, n_layers=6, n_refiner_layers=2, n_heads=6, n_kv_heads=6, cap_feat_dim=512,
        axes_dims=[16, 24, 24], axes_lens=[512, 64, 64],
    )  # fmt: skip


def _call_zimage(network: Any, inputs: Inputs) -> Tensor:
    x, t, cond = inputs
    assert cond is not None
    assert cond.text_embeds is not None
    return torch.stack(network(list(x[:, :, None]), t, list(cond.text_embeds)).sample)[:, :, 0]


def _unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=6, sample_size=32, caption_channels=512,
        cross_attention_dim=384, use_additional_conditions=False,
    )  # fmt: skip


def _call_pixart(network: Any, inputs: Inputs) -> Tensor:
    x, t, cond = inputs
    assert cond is not None
    sizes = {"resolution": None, "aspect_ratio": None}
    return network(x, cond.text_embeds, timestep=t, added_cond_kwargs=sizes).sample  # type: ignore[no-any-return]


def _sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        num_attention_heads=12, attention_head_dim=32, num_layers=6, num_cross_attention_heads=6,
        cross_attention_head_dim=64, cross_attention_dim=384, caption_channels=512, sample_size=16,
    )  # fmt: skip


def _call_sana(network: Any, inputs: Inputs) -> Tensor:
    x, t, cond = inputs
    assert cond is not None
    return network(x, cond.text_embeds, t).sample  # type: ignore[no-any-return]


def _cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=6, sample_width=16, sample_height=16, sample_frames=13,
        text_embed_dim=512, max_text_seq_length=32, time_embed_dim=256,
    )  # fmt: skip


def _call_cogvideox(network: Any, inputs: Inputs) -> Tensor:
    x, t, cond = inputs
    assert cond is not None
    return network(x.transpose(1, 2), cond.text_embeds, t).sample.transpose(1, 2)  # type: ignore[no-any-return]


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=32, out_channels=32, num_attention_heads=6, attention_head_dim=64, cross_attention_dim=384,
        num_layers=6, caption_channels=512,
    )  # fmt: skip


def _call_ltx(network: Any, inputs: Inputs) -> Tensor:
    """On latents: packed for it, at LTXPipeline's rope_interpolation_scale for 25 frames a second."""
    x, t, cond = inputs
    assert cond is not None
    frames, height, width = x.shape[2:]
    packed = x.flatten(2).transpose(1, 2)
    scale = (8 / 25, 32, 32)
    output = network(packed, cond.text_embeds, t, None, frames, height, width, rope_interpolation_scale=scale).sample
    return output.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def _amused() -> nn.Module:
    return diffusers.UVit2DModel(
        hidden_size=384, cond_embed_dim=256, micro_cond_encode_dim=64, micro_cond_embed_dim=320,
        encoder_hidden_size=512, vocab_size=1025, codebook_size=1024, in_channels=384, block_out_channels=384,
        num_res_blocks=2, block_num_heads=6, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024,
    )  # fmt: skip


def _amused_inputs(batch: int) -> Inputs:
    tokens = torch.randint(0, 1025, (batch, 16, 16), generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]]).repeat(batch, 1)
    return tokens, _times(batch, 0.0), replace(_text(batch, 512, pooled=256), micro_conditions=sizes)


def _call_amused(network: Any, inputs: Inputs) -> Tensor:
    x, _, cond = inputs
    assert cond is not None
    return network(x, cond.text_embeds, cond.pooled_embeds, cond.micro_conditions)  # type: ignore[no-any-return]


CASES = {
    "dit-s-2": Case(_dit_s_2, _dit_inputs, _call_dit),
    "unet": Case(_unet, lambda b: (_noise(b, 3, 32, 32), _times(b, 500.0), None), lambda n, i: n(i[0], i[1]).sample),
    "sd3": Case(_sd3, lambda b: (_noise(b, 16, 32, 32), _times(b, 500.0), _text(b, 512, pooled=256)), _call_sd3),
    "sd3.5": Case(
        partial(_sd3, qk_norm="rms_norm", dual_attention_layers=(0, 1, 2)),
        lambda b: (_noise(b, 16, 32, 32), _times(b, 500.0), _text(b, 512, pooled=256)),
        _call_sd3,
    ),
    "flux": Case(_flux, _flux_inputs, _call_flux),
    "z-image": Case(_zimage, lambda b: (_noise(b, 16, 32, 32), _times(b, 0.5), _text(b, 512)), _call_zimage),
    "pixart": Case(_pixart, lambda b: (_noise(b, 4, 32, 32), _times(b, 500.0), _text(b, 512)), _call_pixart),
    "sana": Case(_sana, lambda b: (_noise(b, 32, 16, 16), _times(b, 500.0), _text(b, 512)), _call_sana),
    "cogvideox": Case(
        _cogvideox, lambda b: (_noise(b, 16, 4, 16, 16), _times(b, 500.0), _text(b, 512)), _call_cogvideox
    ),
    "ltx": Case(_ltx, lambda b: (_noise(b, 32, 4, 8, 8), _times(b, 500.0), _text(b, 512)), _call_ltx),
    "amused": Case(_amused, _amused_inputs, _call_amused),
}
