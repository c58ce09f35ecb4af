"""What smalti knows of each foreign format: one Format an architecture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smalti.interop.layout import Layout
from smalti.models.registry import ModelConfig
from smalti.types import UserError, unknown_name

Config = Any  # the config of the format's own architecture: each Format's functions agree on it


@dataclass(frozen=True)
class Original:
    """A format of an original repository, recognised by the names of its tensors.

    name: how users call it. config: from the tensors (prefix already cut) to our config, or None where they are not of
    this format. layout: of such a config.
    """

    name: str
    config: Callable[[Mapping[str, Tensor]], Config | None]
    layout: Callable[[Config], Layout]


@dataclass(frozen=True)
class Format:
    """How others write one architecture.

    class_name: diffusers' `_class_name`. config_type: our config's class. read_config: diffusers' config.json to ours;
    raises UserError for values that our network does not have. write_config: ours to diffusers', without the fields
    that begin with "_"; raises UserError for what their class cannot express. diffusers, originals: the layouts.
    """

    class_name: str
    config_type: type
    read_config: Callable[[Mapping[str, Any]], Config]
    write_config: Callable[[Config], dict[str, Any]]
    diffusers: Callable[[Config], Layout]
    originals: tuple[Original, ...] = ()


def formats() -> tuple[Format, ...]:
    """Every architecture that has a foreign format."""
    from smalti.interop.dit import DIT
    from smalti.interop.unet import UNET
    from smalti.interop.zimage import ZIMAGE

    return (DIT, UNET, ZIMAGE)


def format_of_class(class_name: str) -> Format:
    """The format of a diffusers class. Raises UserError that lists what is known."""
    by_class = {f.class_name: f for f in formats()}
    if class_name not in by_class:
        raise unknown_name("_class_name", class_name, by_class)
    return by_class[class_name]


def format_of_config(config: ModelConfig) -> Format:
    """The format of one of our networks. Raises UserError for a network that only smalti has."""
    for candidate in formats():
        if isinstance(config, candidate.config_type):
            return candidate
    raise UserError(f"a network of kind {config.kind!r} has no diffusers class")


def original_of_tensors(tensors: Mapping[str, Tensor], source: str) -> tuple[Config, Original]:
    """Our config and the format of an original repository's tensors. Raises UserError where none fits."""
    for candidate in formats():
        for original in candidate.originals:
            config = original.config(tensors)
            if config is not None:
                return config, original
    known = sorted(original.name for f in formats() for original in f.originals)
    first = ", ".join(sorted(tensors)[:3])
    raise UserError(f"{source} is of no known original format (its tensors: {first} ...); known: {', '.join(known)}")


def config_values(
    body: Mapping[str, Any], class_name: str, defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a diffusers config that a reader asks for: defaults names them, with the class's own defaults.

    fixed: fields that our network has in one value only (a tuple: in one of these). Raises UserError for another value
    of those, and for a field that neither names: it could change what the network computes.
    """
    for name, value in body.items():
        if name.startswith("_") or name in defaults:
            continue
        if name not in fixed:
            raise UserError(f"config field {name}={value!r} of {class_name} is not known to smalti")
        allowed = fixed[name] if isinstance(fixed[name], tuple) else (fixed[name],)
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"config field {name}={value!r} of {class_name} is not supported: only {choices} is")
    return {name: body.get(name, default) for name, default in defaults.items()}
