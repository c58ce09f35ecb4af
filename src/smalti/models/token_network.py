"""A network of tokens: any of our backbones between an embedding and a classifier of each place.

What MaskGIT, Muse and aMUSEd build on a transformer of their own. Here the backbone stays what it is: it takes the
embeddings as a picture of as many channels as they are wide, and gives features of that shape. So a DiT, a U-ViT, an
MM-DiT with prompts or a U-Net of tokens has the shape and the operations of the one that denoises pictures.

Shapes: B batch, h rows, w columns, E width of an embedding, V size of the codebook.

Initialisation
    embedding   N(0, 1), as a picture's channels are about
    classifier  N(0, 0.02), zero bias; a backbone whose output starts at zero gives equal logits
    backbone    its own
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.types import MASKED, Backbone, Condition


class TokenNetwork(nn.Module):
    """Grids of tokens, some of them MASKED, to logits. network: a Backbone whose in_channels is the embedding's width.

    Raises UserError for a codebook below 2 and for a backbone with a learned variance.
    """

    def __init__(self, network: nn.Module, codebook_size: int) -> None:
        super().__init__()
        config = cast(Any, network.config)
        if codebook_size < 2:
            raise UserError(f"codebook_size={codebook_size} must be at least 2")
        if getattr(config, "learn_sigma", False):
            raise UserError("model.learn_sigma=True: a network of tokens has no variance to learn; leave it at false")
        self.codebook_size = codebook_size
        self.embed = nn.Embedding(codebook_size + 1, config.in_channels)  # the last one: a masked token
        self.network = network
        self.classifier = nn.Linear(config.in_channels, codebook_size)

    @property
    def config(self) -> Any:
        """The backbone's own config."""
        return self.network.config

    @property
    def blocks(self) -> nn.Module:
        """The backbone's blocks, for those who compile them one by one."""
        return self.network.blocks  # type: ignore[return-value]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every weight as the table on top of this file says."""
        cast(Any, self.network).initialise(generator)
        nn.init.normal_(self.embed.weight, generator=generator)
        nn.init.normal_(self.classifier.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def null_condition(self, batch_size: int) -> Condition | None:
        """The backbone's."""
        return cast(Backbone, self.network).null_condition(batch_size)

    def forward(
        self, x: Int[Tensor, "B h w"], t: Float[Tensor, " B"], cond: Condition | None = None
    ) -> Float[Tensor, "B V h w"]:
        """Token indices, MASKED where one is hidden, to logits; t is what the process feeds (0 for all maskings)."""
        x_BEhw = self.embed(torch.where(x == MASKED, self.codebook_size, x)).permute(0, 3, 1, 2)
        features_BEhw = cast(Backbone, self.network)(x_BEhw, t, cond)
        return self.classifier(features_BEhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def classifier_flops(width: int, codebook_size: int, tokens: int) -> int:
    """Operations of the classifier on so many tokens."""
    return 2 * tokens * width * codebook_size
