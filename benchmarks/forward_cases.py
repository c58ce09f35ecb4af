"""The networks that forward.py times: diffusers' class at a size for a CPU, its call, and the same inputs for ours."""

from collections.abc import Callable
from dataclasses import dataclass
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


CASES = {"dit-s-2": Case(_dit_s_2, _dit_inputs, _call_dit)}
