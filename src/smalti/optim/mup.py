"""muP: initial weights and learning rates that follow the width, so that the best rate of a narrow network is the best
rate of a wide one.

Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), table 3 (Adam), counted from a base width, at which nothing
changes. Zheng et al. 2025 (arXiv 2505.15270) prove that the table holds for DiT, MM-DiT and U-ViT. Every multiplier is
absorbed into initial weights and rates (the paper's lemma J.1), so that checkpoints are ordinary networks; the
attention's, sqrt(base head width) / head width in place of 1 / sqrt(head width), is the model's attention_scale.

r: a weight's inputs over the inputs of the same weight at the base width.

role      its inputs and outputs                    initial std   AdamW's rate   Muon's rate
input     outputs grow with the width               1             1
hidden    both grow                                 1 / sqrt(r)   1 / r          1 / sqrt(r)
readout   inputs grow                               1 / r         1 / r
vector    one axis, which grows: biases, norms      1             1
fixed     nothing grows                             the same      1

"initial std" is beside that of the base network as its own initialise() makes it, measured on its weights: a weight
that starts at zero does so at every width. Muon: its update has a spectral norm of 0.2 rate sqrt(larger side), and the
spectral norm of a hidden matrix's update is to stay the same (Yang et al. 2023, "A spectral condition for feature
learning", condition 1). Weight decay acts as rate x decay: it is divided by the rate's factor, so that it stays.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smalti.conditioning.prompted import PromptedNetwork
from smalti.errors import UserError
from smalti.models.dit import DiTConfig
from smalti.models.mmdit import MMDiTConfig
from smalti.models.registry import ModelConfig, build_model, network_of
from smalti.models.uvit import UViTConfig

Role = Literal["input", "hidden", "readout", "vector", "fixed"]
ScalableModelConfig = DiTConfig | MMDiTConfig | UViTConfig

_ROLES: dict[tuple[bool, bool], Role] = {
    (False, True): "input",
    (True, True): "hidden",
    (True, False): "readout",
    (False, False): "fixed",
}  # by whether (inputs, outputs) grow

_SCALE_TOLERANCE = 1e-4  # a scale typed by hand has a few digits


@dataclass(frozen=True)
class MuP:
    """Rates and initial weights as tuned at base_width serve any width.

    base_head_width: of the network that was tuned; None: the width of a head is the same at every width.
    """

    kind: ClassVar[str] = "mup"
    base_width: int = 64
    base_head_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("base_width", "base_head_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"parametrisation.{name}={value} must be at least 1")


@dataclass(frozen=True)
class WidthScale:
    """What a parameter's width makes of it. fan_in: its inputs over those at the base width (1 for vector, fixed)."""

    role: Role
    fan_in: float = 1.0

    @property
    def initial(self) -> float:
        """Factor on the standard deviation of the initial weight."""
        return math.pow(self.fan_in, {"hidden": -0.5, "readout": -1.0}.get(self.role, 0.0))

    @property
    def adamw_rate(self) -> float:
        """Factor on AdamW's learning rate."""
        return math.pow(self.fan_in, {"hidden": -1.0, "readout": -1.0}.get(self.role, 0.0))

    @property
    def muon_rate(self) -> float:
        """Factor on Muon's learning rate."""
        return math.pow(self.fan_in, {"hidden": -0.5}.get(self.role, 0.0))


def head_width(model: ScalableModelConfig) -> int:
    """Width of an attention head."""
    return model.width // model.num_heads


def attention_scale(mup: MuP, model: ScalableModelConfig) -> float:
    """What muP multiplies the logits q k^T / sqrt(head width) by: 1 at the base head width, then 1 / head width."""
    return math.sqrt((mup.base_head_width or head_width(model)) / head_width(model))


def scalable(model: ModelConfig) -> ScalableModelConfig:
    """The config, of a network that has muP rules. Raises UserError for others."""
    if not isinstance(model, ScalableModelConfig):
        raise UserError(f"muP: there are rules for model=dit, mmdit and uvit, and this is {model.kind}")
    if isinstance(model, DiTConfig) and model.conditioning != "adaln_zero":
        raise UserError(
            f"muP: model.conditioning={model.conditioning} has no rules that were checked; set conditioning=adaln_zero"
        )
    return model


def base_model(mup: MuP, model: ModelConfig) -> ScalableModelConfig:
    """The config of the same network at the base width.

    Raises UserError for networks without muP rules and for a base width that does not divide into heads.
    """
    network = scalable(model)
    base_head_width = mup.base_head_width or head_width(network)
    if mup.base_width % base_head_width:
        raise UserError(
            f"parametrisation.base_width={mup.base_width} must divide by the head width, {base_head_width}: "
            "set another base_width or base_head_width"
        )
    return with_width(network, mup.base_width, mup.base_width // base_head_width, "parametrisation.base_width:")


def check_mup(mup: MuP, model: ModelConfig) -> None:
    """Raise UserError where a run's network cannot be scaled so, or has another attention scale than muP's."""
    base_model(mup, model)
    network = scalable(model)
    wanted = attention_scale(mup, network)
    if not math.isclose(network.attention_scale, wanted, rel_tol=_SCALE_TOLERANCE):
        raise UserError(
            f"model.attention_scale={network.attention_scale:g} must be {wanted:.6g} under parametrisation=mup: heads "
            f"are {head_width(network)} wide and {mup.base_head_width or head_width(network)} at the base width"
        )


def with_width(model: ScalableModelConfig, width: int, num_heads: int, name: str) -> ScalableModelConfig:
    """The config at another width, its logits unscaled. Raises UserError, which begins with name and width, where the
    network cannot have it."""
    try:
        return replace(model, width=width, num_heads=num_heads, attention_scale=1.0)
    except UserError as error:
        raise UserError(f"{name} {width}: {error}") from None


def parameter_roles(model: ScalableModelConfig) -> dict[str, Role]:
    """The role of each parameter by name: which of its axes grow when the network is twice as wide."""
    with torch.device("meta"):
        network = network_of(model)
        wider = network_of(replace(model, width=2 * model.width, num_heads=2 * model.num_heads))
    shapes = {name: parameter.shape for name, parameter in wider.named_parameters()}
    roles: dict[str, Role] = {}
    for part, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{part}.{leaf}".removeprefix(".")
            grows = [a != b for a, b in zip(parameter.shape, shapes[name], strict=True)]
            if len(grows) == 1:
                roles[name] = "vector" if grows[0] else "fixed"
                continue
            # Tables, of labels and of positions, are [entries, width]; matrices and kernels [outputs, inputs, ...].
            is_table = not isinstance(module, nn.Linear | nn.Conv2d)
            inputs, outputs = (grows[0], grows[1]) if is_table else (grows[1], grows[0])
            roles[name] = _ROLES[inputs, outputs]
    return roles


def _prefix(network: nn.Module) -> str:
    """What the names of the scaled network's parameters begin with: a prompted one has a text encoder beside it."""
    return "network." if isinstance(network, PromptedNetwork) else ""


def width_scales(mup: MuP, network: nn.Module) -> dict[str, WidthScale]:
    """How each parameter of a network (as build_model or build_prompted_network gives it) is scaled, by name.

    A text encoder that is trained along keeps its width, so that its parameters are "fixed". Raises UserError as
    base_model does.
    """
    model: Any = network.config
    base = base_model(mup, model)
    with torch.device("meta"):
        base_shapes = {name: parameter.shape for name, parameter in network_of(base).named_parameters()}
    prefix, roles = _prefix(network), parameter_roles(base)
    scales = {}
    for name, parameter in network.named_parameters():
        role = roles[name.removeprefix(prefix)] if name.startswith(prefix) else "fixed"
        grown = role in ("hidden", "readout")
        fan_in = parameter.shape[1] / base_shapes[name.removeprefix(prefix)][1] if grown else 1.0
        scales[name] = WidthScale(role, fan_in)
    return scales


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


@torch.no_grad()
def rescale_initial_weights(network: nn.Module, mup: MuP, seed: int) -> dict[str, WidthScale]:
    """Give a freshly initialised network muP's initial weights, in place; returns width_scales.

    At the base width nothing is touched. What does not grow is the base network's own draw: U-ViT's last convolution is
    nine numbers, by which networks of one seed would differ. seed: of the base network. Raises UserError as base_model
    does.
    """
    scales, prefix = width_scales(mup, network), _prefix(network)
    model: Any = network.config
    base = dict(build_model(base_model(mup, model), seed).named_parameters())
    for name, parameter in network.named_parameters():
        counterpart = base.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if counterpart is None:  # a text encoder's
            continue
        present = _root_mean_square(parameter)
        if parameter.shape == counterpart.shape:
            parameter.copy_(counterpart)
        elif parameter.ndim > 1 and present > 0:  # vectors start as large at every width
            parameter.mul_(scales[name].initial * _root_mean_square(counterpart) / present)
    return scales
