"""What a scaling study trains: sizes of one network, at compute budgets in equal ratios (isoFLOP slices).

All sizes differ in width alone and are scaled by muP, so that the base width's learning rate serves them all.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from smalti.config import RunConfig, apply_overrides, from_json
from smalti.errors import UserError, unknown_name
from smalti.models.registry import count_parameters, forward_flops, network_of
from smalti.recipes import recipe
from smalti.run_folder import read_json
from smalti.training.widths import at_width

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Of every run: no compiling, which takes longer than a small run trains, no trackers.
_SAME_FOR_ALL = ("loop.compile=false", "loop.writers=")
_FEWEST_SIZES = 3


@dataclass(frozen=True)
class ScalingSpec:
    """A study of one recipe.

    set: as `smalti train RECIPE --set` takes it. base_width: where the recipe's learning rate was tuned. slices:
    compute budgets that the law is fitted to, sizes_per_slice runs at each. compute_range: the largest budget over the
    smallest; the largest is that of one run, held out to test the law's prediction. samples: pictures drawn of the best
    run of each budget for their Frechet distance, 0 for none; only the bundled digits have what judges them.
    """

    name: str
    recipe: str = "mnist"
    set: tuple[str, ...] = ()
    widths: tuple[int, ...] = (24, 32, 40, 48, 64, 80, 96, 128, 160)
    base_width: int = 128
    slices: int = 4
    sizes_per_slice: int = 4
    compute_range: float = 32.0
    seed: int = 0
    samples: int = 500

    def __post_init__(self) -> None:
        where = f"scaling study {self.name!r}:"
        if not _NAME.fullmatch(self.name):
            raise UserError(f"scaling study name {self.name!r} must be letters, digits, '.', '_' and '-'")
        if len(self.widths) < _FEWEST_SIZES or list(self.widths) != sorted(set(self.widths)):
            raise UserError(f"{where} widths={self.widths} must rise and be at least {_FEWEST_SIZES}")
        if not _FEWEST_SIZES <= self.sizes_per_slice <= len(self.widths):
            raise UserError(
                f"{where} sizes_per_slice={self.sizes_per_slice} must lie in {_FEWEST_SIZES} .. {len(self.widths)}, "
                "the number of widths"
            )
        if self.slices < 2:
            raise UserError(f"{where} slices={self.slices} must be at least 2: one budget says nothing of a law")
        if not (math.isfinite(self.compute_range) and self.compute_range > 1):
            raise UserError(
                f"{where} compute_range={self.compute_range:g} must be above 1: budgets all equal say nothing"
            )
        if self.samples and self.samples < 100:
            raise UserError(f"{where} samples={self.samples} must be 0 or at least 100: distances need so many")

    @property
    def ratio(self) -> float:
        """Of a budget to the one below it."""
        return math.pow(self.compute_range, 1 / self.slices)

    def budgets(self, smallest: float) -> tuple[float, ...]:
        """FLOPs of each slice and, last, of the held-out run."""
        return tuple(smallest * self.ratio**number for number in range(self.slices + 1))

    def config(self) -> RunConfig:
        """The recipe with what is set, at its own width. Raises UserError, which begins with the study's name."""
        try:
            config = apply_overrides(recipe(self.recipe), [*_SAME_FOR_ALL, *self.set])
            if config.parametrisation is not None:
                raise UserError("set: parametrisation is the study's own; give base_width")
        except UserError as error:
            raise UserError(f"scaling study {self.name!r}: {error}") from None
        return replace(config, seed=self.seed)

    def sizes(self) -> tuple["Size", ...]:
        """The networks, smallest first. Raises UserError for a network without muP rules and widths that do not fit."""
        config = self.config()
        try:
            return tuple(size_of(config, width, self.base_width) for width in self.widths)
        except UserError as error:
            raise UserError(f"scaling study {self.name!r}: {error}") from None


@dataclass(frozen=True)
class Size:
    """A network of the study. flops_per_image: of training, a backward counting two forwards."""

    width: int
    parameters: int
    flops_per_image: float
    batch_size: int

    def steps(self, flops: float) -> int:
        """Training steps that a budget buys, at least 1."""
        return max(1, round(flops / (self.flops_per_image * self.batch_size)))


def size_of(config: RunConfig, width: int, base_width: int) -> Size:
    """The run's network at another width."""
    scaled = at_width(config, width, "mup", base_width)
    with torch.device("meta"):
        parameters = sum(count_parameters(network_of(scaled.model, scaled.codebook_size)).values())
    tokens = 0 if scaled.text is None else scaled.text.max_tokens
    forward = forward_flops(scaled.model, None, tokens, scaled.codebook_size)
    return Size(width, parameters, 3.0 * forward, scaled.loop.batch_size)


# Heads are 8 wide, so that narrow networks have several. At batches of 64 the smallest budgets train for so few steps
# that they say more of the batch than of the size: of 1.8e12 FLOPs width 64 has a loss of 0.257 at 64, 0.221 at 16.
_SMALL = ("model.num_heads=16", "loop.batch_size=16")


def bundled_specs() -> dict[str, ScalingSpec]:
    """The studies that come with smalti, by name."""
    return {
        "digits": ScalingSpec("digits", set=_SMALL),
        "fashion": ScalingSpec("fashion", recipe="fashion", set=_SMALL, samples=0),
    }


def find_spec(name_or_path: str) -> ScalingSpec:
    """A bundled study by name, or one's own from a .json file. Raises UserError with the nearest names."""
    specs = bundled_specs()
    if name_or_path in specs:
        return specs[name_or_path]
    if name_or_path.endswith(".json"):
        return read_spec(Path(name_or_path))
    raise unknown_name("scaling study (or give a .json file)", name_or_path, specs)


def read_spec(path: Path) -> ScalingSpec:
    """A study of one's own. Raises UserError where the file cannot be read or does not parse."""
    body = read_json(path)
    if not isinstance(body, dict) or "name" not in body:
        raise UserError(f"{path}: must be an object with at least a name")
    try:
        spec = from_json(ScalingSpec, body)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    assert isinstance(spec, ScalingSpec)
    return spec


def with_overrides(spec: ScalingSpec, overrides: Sequence[str]) -> ScalingSpec:
    """The study with more of its recipe set."""
    return replace(spec, set=(*spec.set, *overrides))
