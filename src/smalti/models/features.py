"""Intermediate features of a network by the names of its parts, for probing, distillation and steering."""

import threading
from collections.abc import Sequence

from torch import Tensor, nn

from smalti.errors import unknown_name
from smalti.types import Condition


def feature_names(model: nn.Module) -> list[str]:
    """The parts whose outputs forward_with_features can give, such as "blocks.3" and "blocks.3.attn"."""
    return [name for name, _ in model.named_modules() if name]


def forward_with_features(
    model: nn.Module, names: Sequence[str], x: Tensor, t: Tensor, cond: Condition | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """model(x, t, cond), and the output of each named part (a part that gives several: the first).

    A part that runs more than once gives its last output. Other threads may use the network meanwhile. Raises
    UserError for an unknown name.
    """
    parts = dict(model.named_modules())
    for name in names:
        if name not in parts or not name:
            raise unknown_name("feature", name, feature_names(model))
    caller, features = threading.get_ident(), dict[str, Tensor]()

    def keep(name: str, output: Tensor | tuple[Tensor | None, ...]) -> None:
        if threading.get_ident() == caller:
            first = output if isinstance(output, Tensor) else output[0]
            assert first is not None
            features[name] = first

    handles = [
        parts[name].register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        return model(x, t, cond), features
    finally:
        for handle in handles:
            handle.remove()
