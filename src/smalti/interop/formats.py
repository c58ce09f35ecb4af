"""What smalti knows of each foreign format: one Format an architecture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smalti.errors import UserError, unknown_name
from smalti.interop.layout import Layout
from smalti.models.registry import ModelConfig

# The published DiT and PixArt folders were written when diffusers had one class for both, told apart by norm_type.
LEGACY_CLASSES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
# Fields that only the old class has, in the one value that DiT and PixArt use.
LEGACY_FIELDS = {
    "cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False,
    "double_self_attention": False, "use_linear_projection": False, "attention_type": "default",
    "caption_channels": None, "interpolation_scale": None, "use_additional_conditions": None,
}  # fmt: skip

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

    class_name: diffusers' `_class_name`, None where it has no class; the functions that need one then raise UserError.
    config_type: our config's class. read_config: diffusers' config.json to ours;
    raises UserError for values that our network does not have. write_config: ours to diffusers', without the fields
    that begin with "_"; raises UserError for what their class cannot express. diffusers, originals: the layouts.
    """

    class_name: str | None
    config_type: type
    read_config: Callable[[Mapping[str, Any]], Config]
    write_config: Callable[[Config], dict[str, Any]]
    diffusers: Callable[[Config], Layout]
    originals: tuple[Original, ...] = ()


def formats() -> tuple[Format, ...]:
    """Every architecture that has a foreign format."""
    from smalti.interop.amused import AMUSED
    from smalti.interop.dit import DIT
    from smalti.interop.flux import FLUX
    from smalti.interop.ltx import LTX
    from smalti.interop.mmdit import MMDIT
    from smalti.interop.pixart import PIXART
    from smalti.interop.sana import SANA
    from smalti.interop.unet import UNET
    from smalti.interop.uvit import UVIT
    from smalti.interop.video_dit import VIDEO_DIT
    from smalti.interop.zimage import ZIMAGE

    return (DIT, UVIT, UNET, MMDIT, FLUX, ZIMAGE, PIXART, SANA, VIDEO_DIT, LTX, AMUSED)


def format_of_class(class_name: str, norm_type: str | None = None) -> Format:
    """The format of a diffusers class. Raises UserError that lists what is known.

    norm_type: the config's field of that name: it tells apart what Transformer2DModel once stood for (LEGACY_CLASSES).
    """
    by_class = {f.class_name: f for f in formats() if f.class_name is not None}
    if class_name == "Transformer2DModel":
        class_name = LEGACY_CLASSES.get(str(norm_type), class_name)
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


def depth_of(tensors: Mapping[str, Tensor], blocks: str = "blocks") -> int:
    """The number of blocks that original tensors have: those named "blocks.0...." to "blocks.{depth - 1}....".

    Raises ValueError where there is none.
    """
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith(f"{blocks}."))


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
