"""What joins the rooms of the house: conditions, the Backbone and Denoiser protocols.

Shape legend used in names all over smalti: B batch, N tokens, D width, H heads, K head width, C channels, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from smalti.errors import UserError

MASKED = -1  # a hidden token in a grid of indices


@dataclass(frozen=True)
class Condition:
    """What a picture should be of: one row a sample; a network reads the fields it knows.

    class_labels: int64 [batch]. text_embeds: [batch, tokens, width]. text_mask: bool [batch, tokens].
    pooled_embeds: [batch, width]. guidance: [batch], for networks that are fed a distilled guidance scale.
    micro_conditions: [batch, values], sizes, crops and scores as SDXL and aMUSEd take them. token_ids: int64
    [batch, tokens], a prompt that the network itself encodes (conditioning/prompted.py); text_mask then is theirs.
    """

    class_labels: Tensor | None = None
    text_embeds: Tensor | None = None
    text_mask: Tensor | None = None
    pooled_embeds: Tensor | None = None
    guidance: Tensor | None = None
    micro_conditions: Tensor | None = None
    token_ids: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same condition with change(tensor) in place of each field that is set."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in present.items() if value is not None})

    def to(self, device: torch.device | str) -> Self:
        """The same condition on another device."""
        return self.map(lambda tensor: tensor.to(device))


def concat_conditions(*parts: Condition) -> Condition:
    """Join conditions along the batch. All must set the same fields (UserError otherwise)."""
    joined: dict[str, Any] = {}
    for f in fields(parts[0]):  # of an instance: torch.compile traces that, not the class
        values = [getattr(part, f.name) for part in parts]
        present = [value for value in values if value is not None]
        if present and len(present) != len(values):
            raise UserError(f"{f.name} is set in some of the joined conditions and missing in others")
        joined[f.name] = torch.cat(present) if present else None
    return Condition(**joined)


def required_field(cond: Condition | None, name: str) -> Tensor:
    """A field of the condition that a network cannot do without. Raises UserError naming it where it is missing."""
    value: Tensor | None = None if cond is None else getattr(cond, name)
    if value is None:
        raise UserError(f"condition.{name} is missing: this network needs it")
    return value


@runtime_checkable
class Backbone(Protocol):
    """A network: raw output from a noisy input, its time in the network's own unit, and a condition."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, channels, height, width], t [batch] -> raw output of the same height and width."""
        ...

    def null_condition(self, batch_size: int) -> Condition | None:
        """The condition that says nothing, for guidance; None where the network takes no condition."""
        ...


class Denoiser(Protocol):
    """An estimate of the clean sample: a network joined with a process, possibly guided."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x [batch, ...] at time t [batch] in [0, 1] -> x0 estimate of the shape of x."""
        ...
