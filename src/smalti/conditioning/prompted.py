"""A network that reads prompts: any that takes text embeddings, with the tiny text encoder trained along."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from smalti.conditioning.tiny import TinyTextConfig, TinyTextEncoder, empty_prompt
from smalti.errors import UserError
from smalti.models.registry import ModelConfig, network_of
from smalti.types import Backbone, Condition


class PromptedNetwork(nn.Module):
    """A Backbone of token ids: the text encoder, then the network.

    network: a Backbone that takes text_embeds, such as MM-DiT, FLUX, PixArt, Sana or Z-Image, as wide as the encoder.
    Raises UserError for one that takes no text or another width.
    """

    def __init__(self, network: nn.Module, text: TinyTextEncoder) -> None:
        super().__init__()
        check_text_width(cast(ModelConfig, network.config), text.config.width)
        self.network = network
        self.text = text

    @property
    def config(self) -> Any:
        """The network's own config, with its image_size and in_channels."""
        return self.network.config

    @property
    def blocks(self) -> nn.Module:
        """The network's blocks, for those who compile them one by one."""
        return self.network.blocks  # type: ignore[return-value]

    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight, the network's first, as their files say."""
        cast(Any, self.network).initialise(generator)
        self.text.initialise(generator)

    def encode(self, cond: Condition) -> Condition:
        """The condition with text_embeds in place of its token_ids; as it is where it has none.

        Sampling encodes a prompt once and calls the network with the result.
        """
        return cond if cond.token_ids is None else self.text.encode(cond)

    def null_condition(self, batch_size: int) -> Condition:
        """The empty prompt, encoded."""
        encoded = self.encode(empty_prompt(1, self.text.config.max_tokens, self.text.positions_MD.device))
        return encoded.map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Noisy input [B, C, height, width] at network time t [B] to the network's raw output.

        cond: token_ids with text_mask, or what encode() made of them; None: the empty prompt.
        """
        cond = self.null_condition(x.shape[0]) if cond is None else self.encode(cond)
        return cast(Backbone, self.network)(x, t, cond)


def check_text_width(model: ModelConfig, width: int) -> None:
    """Raise UserError where a network of this config does not take text of the encoder's width."""
    if not hasattr(model, "text_width"):
        raise UserError(f"model={model.kind} takes no text: choose mmdit, flux, pixart, sana or zimage")
    for name in ("text_width", "pooled_width"):
        if getattr(model, name, width) != width:
            raise UserError(f"model.{name}={getattr(model, name)} must be text.width={width}")


def with_text_width(model: ModelConfig, width: int, pooled_width: int | None = None) -> ModelConfig:
    """The network's config for text embeddings of this width, and a pooled vector, if it takes one, of pooled_width
    (None: as wide)."""
    given = {"text_width": width, "pooled_width": width if pooled_width is None else pooled_width}
    widths: dict[str, Any] = {name: value for name, value in given.items() if hasattr(model, name)}
    return replace(model, **widths)


def build_prompted_network(
    model: ModelConfig, text: TinyTextConfig, seed: int = 0, codebook_size: int | None = None
) -> PromptedNetwork:
    """The network of a config and its text encoder with their published initialisation, a function of the seed alone.

    codebook_size: of a network of tokens. Raises UserError as PromptedNetwork does.
    """
    with torch.random.fork_rng(devices=[]):  # as in build_model
        prompted = PromptedNetwork(network_of(model, codebook_size), TinyTextEncoder(text))
    prompted.initialise(torch.Generator().manual_seed(seed))
    return prompted
