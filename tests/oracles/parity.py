"""Our network against a reference's with the same weights: outputs, and gradients by the input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import smalti
from smalti.types import Condition


def randomised(module: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Every parameter random: zero initialisations would hide what they multiply. Norm weights stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(one + torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


def assert_same_function(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], z: Tensor, limit: float = 1e-5
) -> None:
    """Both give the same output at z and the same gradient by z, within limit of the largest value."""
    z_ours, z_theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    output, expected = ours(z_ours), theirs(z_theirs)
    assert output.shape == expected.shape
    error = float((output - expected).detach().abs().max() / expected.detach().abs().max())
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), z_theirs)
    (gradient,) = torch.autograd.grad((output * weight).sum(), z_ours)
    gradient_error = float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max())
    assert error <= limit, f"output: {error:.2e}"
    assert gradient_error <= limit, f"gradient: {gradient_error:.2e}"


def assert_parity(
    reference: nn.Module,
    call: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    cond: Condition | None,
    limit: float = 1e-5,
) -> nn.Module:
    """Ours, loaded from reference, gives call(x, t) and its gradient by x, within limit of the largest value.

    call: the reference in our layout of tensors. Returns our network.
    """
    ours = smalti.load_backbone(reference)
    assert_same_function(lambda x: ours(x, t, cond), lambda x: call(x, t), x, limit)
    return ours


def assert_round_trip(reference: nn.Module) -> None:
    """diffusers -> smalti -> diffusers, keys, bytes and config fields; and ours -> theirs -> ours."""
    from smalti.interop.formats import format_of_class

    form = format_of_class(type(reference).__name__)
    config = form.read_config(dict(reference.config))
    layout, theirs = form.diffusers(config), reference.state_dict()
    ours = layout.to_ours(theirs)
    back = layout.to_theirs(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    again = layout.to_ours(back)
    assert set(again) == set(ours)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    network = smalti.load_backbone(reference)
    assert set(network.state_dict()) == set(ours)
    written = form.write_config(config)
    assert form.read_config(written) == config
    rebuilt = type(reference)(**written)
    rebuilt.load_state_dict(back)
