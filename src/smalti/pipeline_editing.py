"""A picture that sampling begins from, and what of it is kept: checked, and made a batch's rows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.autoencoders.protocol import Tokenizer
from smalti.errors import UserError
from smalti.sampling.masked import MaskedPlan, begin_at


@dataclass(frozen=True)
class Editing:
    """A picture to begin from. image: [channels, height, width] or one a picture [batch, ...], in [-1, 1].

    strength in (0, 1]: how far it is noised before it is drawn anew. At 1 nothing of it is in the start, which is noise
    as of any picture: there a mask is needed, without which the image would have no effect. mask: 1 where to paint, 0
    where to keep, of the image's height and width ([height, width], or with leading axes that broadcast against
    [batch, channels]). Raises UserError for a strength of 1 without a mask.
    """

    image: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is None and self.strength == 1.0:
            raise UserError(f"strength={self.strength} leaves nothing of the image: give one below 1, or a mask")

    def check(self, count: int) -> None:
        """Raise UserError for an image or a mask that is not of count pictures (or one for all), and for NaN.

        What a picture's shape must be is checked where the noise is drawn, which has it.
        """
        for name, value in (("editing.image", self.image), ("editing.mask", self.mask)):
            if value is not None and value.ndim == 4 and len(value) not in (1, count):
                raise UserError(
                    f"{name} has shape {tuple(value.shape)} for {count} pictures: give one, or one a picture"
                )
        if self.image.ndim not in (3, 4):
            raise UserError(f"editing.image has shape {tuple(self.image.shape)}: needed is [channels, height, width]")
        if not bool(torch.isfinite(self.image).all()):
            raise UserError("editing.image has entries that are NaN or infinite: needed are finite numbers")

    def images(self, rows: slice, like: Tensor) -> Tensor:
        """The images of a batch's rows, of the shape of `like`. Raises UserError for another shape."""
        image = self.image.to(like)
        if image.ndim == 3:
            image = image[None]
        elif len(image) > 1:
            image = image[rows]
        if image.shape[1:] != like.shape[1:]:
            raise UserError(
                f"editing.image has shape {tuple(self.image.shape)}, needed is {tuple(like.shape[1:])} "
                "or one such a picture"
            )
        return image.expand_as(like)

    def masks(self, rows: slice, like: Tensor) -> Tensor:
        """The mask of a batch's rows, [1 or batch, 1 or channels, height, width]."""
        assert self.mask is not None
        mask = self.mask.to(like)
        if mask.ndim == 4 and len(mask) > 1:
            mask = mask[rows]
        return mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)


def tokens_at_start(
    plan: MaskedPlan, tokenizer: Tokenizer, grid: tuple[int, int], editing: Editing, rows: slice, seeds: Tensor
) -> Tensor:
    """An editing's pictures as tokens [batch, *grid], as many hidden, by seeds [batch], as the plan begins with.

    A token may change where any of its pixels is to be painted; the others are never hidden.
    """
    factor, channels = tokenizer.factor, tokenizer.in_channels
    pixels = torch.empty(len(seeds), channels, grid[0] * factor, grid[1] * factor, device=seeds.device)
    tokens = tokenizer.encode(editing.images(rows, pixels))
    if editing.mask is None:
        return begin_at(plan, tokens, seeds)
    painted = F.max_pool2d(editing.masks(rows, pixels).expand(-1, channels, *pixels.shape[2:]), factor)
    return begin_at(plan, tokens, seeds, keep=painted.amax(dim=1) == 0)
