"""A run's config at another width, under the standard parametrisation or muP, for studies across widths."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from smalti.config import RunConfig, check_parts
from smalti.errors import UserError
from smalti.optim.mup import MuP, attention_scale, head_width, scalable, with_width

Parametrisation = Literal["standard", "mup"]
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("standard", "mup")


def at_width(
    config: RunConfig, width: int, parametrisation: Parametrisation, base_width: int, keep_heads: bool = False
) -> RunConfig:
    """The run with a network of this width: more heads of the same width, or with keep_heads as many wider ones.

    At the base width both parametrisations are the same run, and give the same config. Raises UserError for networks
    without muP rules and widths that do not divide into heads.
    """
    model = scalable(config.model)
    if not keep_heads and width % head_width(model):
        raise UserError(
            f"--widths {width}: must divide by the width of a head, {head_width(model)} "
            "(model.width / model.num_heads), or give --keep-heads"
        )
    heads = model.num_heads if keep_heads else width // head_width(model)
    model = with_width(model, width, heads, "--widths")
    mup = None
    if parametrisation == "mup" and width != base_width:
        mup = MuP(base_width, base_width // heads if keep_heads else None)
        model = replace(model, attention_scale=attention_scale(mup, model))
    scaled = replace(config, model=model, parametrisation=mup)
    check_parts(scaled)
    return scaled


def check_widths(widths: Sequence[int]) -> None:
    """Raise UserError for fewer than two widths, and for one that is given twice or not above 0."""
    if len(set(widths)) != len(widths) or len(widths) < 2 or min(widths) < 1:
        raise UserError(f"--widths {' '.join(map(str, widths))}: give at least two different widths above 0")
