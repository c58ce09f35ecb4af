"""What is compared: contenders, what is held equal between them, and at how many network calls each is sampled."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from smalti.autoencoders.registry import LearnedTokenizer
from smalti.config import RunConfig, apply_overrides
from smalti.data.sources.digits import DigitsData
from smalti.errors import UserError, unknown_name
from smalti.models.registry import count_parameters, network_of
from smalti.recipes import recipe
from smalti.run_folder import read_json

Match = Literal["flops", "parameters", "minutes"]
FEWEST_SAMPLES = 100  # the Frechet distance of fewer says nothing
_SAME_PARAMETERS = 0.1  # contenders matched by parameters differ by no more than this share
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Of every contender: no time goes into compilers, trackers and previews, so that seconds are of training alone.
_SAME_FOR_ALL = ("loop.compile=false", "loop.writers=")


@dataclass(frozen=True)
class Contender:
    """A recipe with overrides, under a name. How it is sampled is part of it: sampling.solver, sampling.guidance_scale.

    set: as `smalti train RECIPE --set` takes them. tokenizer_share: of the comparison's time, for the tokenizer of a
    contender that predicts learned tokens; it is trained first, and its work is in no contender's FLOPs.
    """

    name: str
    recipe: str = "mnist"
    set: tuple[str, ...] = ()
    tokenizer_share: float = 0.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"contender name {self.name!r} must be letters, digits, '.', '_' and '-'")
        if not 0 <= self.tokenizer_share <= 0.5:
            raise UserError(f"contender {self.name!r}: tokenizer_share={self.tokenizer_share:g} must lie in 0 .. 0.5")
        for override in self.set:
            if override.split("=")[0].strip() in ("compile", "loop.compile", "writers", "loop.writers"):
                raise UserError(f"contender {self.name!r}: {override} is the same for all: no compiling, no trackers")

    def config(self) -> RunConfig:
        """The run's config. Raises UserError, which begins with the contender's name."""
        try:
            config = apply_overrides(recipe(self.recipe), [*_SAME_FOR_ALL, *self.set])
        except UserError as error:
            raise UserError(f"contender {self.name!r}: {error}") from None
        if isinstance(config.autoencoder, LearnedTokenizer) != (self.tokenizer_share > 0):
            raise UserError(
                f"contender {self.name!r}: tokenizer_share={self.tokenizer_share:g} with autoencoder="
                f"{config.autoencoder.kind}: those of learned tokens, and no others, need a share, such as 0.1"
            )
        return config


@dataclass(frozen=True)
class ComparisonSpec:
    """A question, who is to answer it, and on what terms.

    match: every contender gets the same training FLOPs (a forward's times 3, times pictures seen), or the same steps at
    equal parameters, or the same minutes. calls: network calls a picture; guidance, which doubles the work of a call,
    is not counted apart. num_samples: pictures drawn at each number of calls, fewer where the time is short.
    """

    name: str
    question: str
    contenders: tuple[Contender, ...]
    match: Match = "flops"
    calls: tuple[int, ...] = (4, 8, 16)
    num_samples: int = 1000

    def __post_init__(self) -> None:
        where = f"comparison {self.name!r}:"
        if not _NAME.fullmatch(self.name):
            raise UserError(f"comparison name {self.name!r} must be letters, digits, '.', '_' and '-'")
        if len(self.contenders) < 2:
            raise UserError(f"{where} contenders has {len(self.contenders)}: give at least two")
        names = [contender.name for contender in self.contenders]
        if len(set(names)) != len(names):
            raise UserError(f"{where} contenders have names twice: {', '.join(names)}")
        if self.match not in get_args(Match):
            raise unknown_name("match", self.match, get_args(Match))
        if not self.calls or any(c < 1 for c in self.calls) or list(self.calls) != sorted(set(self.calls)):
            raise UserError(f"{where} calls={self.calls} must rise and be at least 1")
        if self.num_samples < FEWEST_SAMPLES:
            raise UserError(
                f"{where} num_samples={self.num_samples} must be at least {FEWEST_SAMPLES}: distances need so many"
            )

    def configs(self) -> dict[str, RunConfig]:
        """Each contender's config by name. Raises UserError where one is not fit for this comparison."""
        configs = {contender.name: contender.config() for contender in self.contenders}
        for name, config in configs.items():
            if not isinstance(config.data, DigitsData) or config.num_classes != 10:
                raise UserError(
                    f"contender {name!r}: data={config.data.kind}, {config.num_classes} classes: the judge reads the "
                    "bundled digits by class; take a recipe such as mnist"
                )
        if self.match == "parameters":
            counts = {name: parameter_count(config) for name, config in configs.items()}
            if max(counts.values()) > (1 + _SAME_PARAMETERS) * min(counts.values()):
                told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                raise UserError(
                    f"match=parameters: contenders differ by more than {_SAME_PARAMETERS:.0%} ({told}): change width "
                    "or depth, or take match=flops"
                )
        return configs

    def to_json(self) -> dict[str, Any]:
        """As read_spec reads it."""
        body = asdict(self)
        body["contenders"] = [{**asdict(contender), "set": list(contender.set)} for contender in self.contenders]
        return {**body, "calls": list(self.calls)}


def parameter_count(config: RunConfig) -> int:
    """Parameters of a run's network."""
    with torch.device("meta"):
        return sum(count_parameters(network_of(config.model, config.codebook_size)).values())


def _known_keys(cls: type, body: Any, where: str) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    if not isinstance(body, Mapping):
        raise UserError(f"{where} must be an object, not {body!r}")
    unknown = sorted(set(body) - set(names))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(names)}")
    return dict(body)


def _list_of(kind: type, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise UserError(f"{where} must be a list of {'whole numbers' if kind is int else 'texts'}, not {value!r}")
    return tuple(value)


def spec_from_json(body: Any, where: str = "comparison") -> ComparisonSpec:
    """A spec from to_json's output. Raises UserError that begins with `where`."""
    values = _known_keys(ComparisonSpec, body, where)
    for name in ("name", "question", "contenders"):
        if name not in values:
            raise UserError(f"{where}: {name} is missing")
    for name in ("name", "question", "match"):
        if not isinstance(values.get(name, ""), str):
            raise UserError(f"{where}: {name}={values[name]!r} must be a text")
    if type(values.get("num_samples", 0)) is not int:
        raise UserError(f"{where}: num_samples={values['num_samples']!r} must be a whole number")
    if not isinstance(values["contenders"], list):
        raise UserError(f"{where}: contenders must be a list, not {values['contenders']!r}")
    contenders = []
    for number, item in enumerate(values["contenders"]):
        place = f"{where}: contenders[{number}]"
        given = _known_keys(Contender, item, place)
        for name in ("name", "recipe"):
            if not isinstance(given.get(name, "" if name == "recipe" else None), str):
                raise UserError(f"{place}: {name}={given.get(name)!r} must be a text")
        if "set" in given:
            given["set"] = _list_of(str, given["set"], f"{place}: set")
        if type(given.get("tokenizer_share", 0.0)) not in (int, float):
            raise UserError(f"{place}: tokenizer_share={given['tokenizer_share']!r} must be a number")
        contenders.append(Contender(**given))
    if "calls" in values:
        values["calls"] = _list_of(int, values["calls"], f"{where}: calls")
    return ComparisonSpec(**{**values, "contenders": tuple(contenders)})


def read_spec(path: Path) -> ComparisonSpec:
    """A spec of one's own. Raises UserError where the file cannot be read or does not parse."""
    return spec_from_json(read_json(path), str(path))
