"""Optimisers: AdamW as the papers use it, and Muon for the matrices inside the blocks with AdamW for the rest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.nn.sharded import is_sharded, like_shard, local_tensor, whole_tensor
from smalti.optim.mup import WidthScale
from smalti.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeConfig

# Coefficients of Newton-Schulz steps on the singular values, each optimal for the range the step before leaves.
# Source: Amsel et al. 2025, "The Polar Express", algorithm 2 (with its safety factor), for five steps.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW on every parameter (Loshchilov and Hutter 2019)."""

    kind: ClassVar[str] = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_learning_rate("optimizer.learning_rate", self.learning_rate)


@dataclass(frozen=True)
class MuonConfig:
    """Muon on the matrices inside the blocks, AdamW on embeddings, modulation, output and vectors.

    learning_rate is Muon's, in the units of AdamW's (updates are scaled to AdamW's usual size, see Muon);
    adamw_learning_rate serves the rest. Source: Jordan et al. 2024; Liu et al. 2025 ("Muon is scalable"), eq. 4.
    """

    kind: ClassVar[str] = "muon"
    learning_rate: float = 2e-3
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    adamw_learning_rate: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_learning_rate("optimizer.learning_rate", self.learning_rate)
        _check_learning_rate("optimizer.adamw_learning_rate", self.adamw_learning_rate)
        if not 1 <= self.newton_schulz_steps <= len(_POLAR_EXPRESS):
            raise UserError(
                f"optimizer.newton_schulz_steps={self.newton_schulz_steps} must be in 1..{len(_POLAR_EXPRESS)}"
            )


OptimizerConfig = AdamWConfig | MuonConfig | ScheduleFreeConfig

# What the names of the matrices inside blocks begin with.
_BLOCKS = ("blocks.", "network.blocks.", "network.network.blocks.", "text.blocks.")


def _check_learning_rate(name: str, value: float) -> None:
    if value <= 0:
        raise UserError(f"{name}={value} must be above 0")


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each [count, rows, columns], rows <= columns, by Newton-Schulz steps.

    For wide matrices the polynomials are multiplied up on the small Gram matrices and applied to the matrices once,
    which takes fewer operations than iterating on the matrices; for nearly square ones it is the other way round.
    """
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) * 1.02 + 1e-7)
    coefficients = _POLAR_EXPRESS[:steps]
    rows, columns = x.shape[-2:]
    if 2 * columns <= 3 * rows:
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram = x @ x.mT
    product: Tensor | None = None
    for number, (a, b, c) in enumerate(coefficients):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if number + 1 < len(coefficients):
            gram = polynomial @ gram @ polynomial
    assert product is not None
    update: Tensor = product @ x
    return update


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix's update has singular values of about 1.

    Matrices of one shape are orthogonalised in one batch. The update is scaled by 0.2 sqrt(max(rows, columns)), which
    gives it the root mean square of a typical AdamW update. A parameter group with pieces=3 holds fused q, k, v: each
    third of the rows counts as a matrix of its own. Source: Jordan et al. 2024; Liu et al. 2025, eq. 4.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        steps: int,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": weight_decay, "pieces": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; every parameter must have a gradient."""
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            directions = _nesterov(grads, buffers, group["momentum"])
            # A sharded matrix is orthogonalised whole, on every rank; its update is gathered here, then cut.
            targets = [torch.zeros_like(d) if is_sharded(p) else p for p, d in zip(params, directions, strict=True)]
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for target, direction in zip(targets, directions, strict=True):
                for piece, part in zip(direction.chunk(group["pieces"]), target.chunk(group["pieces"]), strict=True):
                    wide = piece.shape[0] <= piece.shape[1]
                    piece, part = (piece, part) if wide else (piece.mT, part.mT)
                    by_shape.setdefault((piece.shape[0], piece.shape[1]), []).append((piece, part))
            if group["weight_decay"]:
                torch._foreach_mul_([local_tensor(p) for p in params], 1 - group["lr"] * group["weight_decay"])
            for (_, columns), entries in by_shape.items():
                updates = orthogonalise(torch.stack([piece for piece, _ in entries]), group["steps"])
                scale = 0.2 * columns**0.5
                torch._foreach_add_([part for _, part in entries], updates.unbind(0), alpha=-group["lr"] * scale)
            for p, target in zip(params, targets, strict=True):
                if is_sharded(p):
                    local_tensor(p).add_(local_tensor(like_shard(target, p)))


def _nesterov(grads: list[Tensor], buffers: list[Tensor], momentum: float) -> list[Tensor]:
    """Move the buffers towards the gradients; returns the look-ahead directions, whole."""
    if not any(is_sharded(buffer) for buffer in buffers):
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        return list(torch._foreach_lerp(grads, buffers, momentum))
    directions = []
    for grad, buffer in zip(grads, buffers, strict=True):
        buffer.lerp_(grad, 1 - momentum)
        directions.append(whole_tensor(torch.lerp(grad, buffer, momentum)))
    return directions


def _groups(
    named: Mapping[str, nn.Parameter], rate: float, weight_decay: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups by the factor on their rate (1 where there is none), those of factor 1 last.

    The last group's rate is what a run logs. Weight decay acts as rate x decay, which is to be the same in all.
    """
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        by_factor.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [
        {"params": by_factor[factor], "lr": rate * factor, "weight_decay": weight_decay / factor}
        for factor in sorted(by_factor, key=lambda factor: (factor == 1, factor))
    ]


def build_optimizers(
    config: OptimizerConfig,
    model: nn.Module,
    scales: Mapping[str, WidthScale] | None = None,
    average: nn.Module | None = None,
) -> dict[str, torch.optim.Optimizer]:
    """The optimisers of a run by name. Muon takes the matrices inside the blocks, a prompted network's and its text's.

    A network without such matrices, as a U-Net, has AdamW alone, with MuonConfig's adamw_learning_rate. scales: of
    parameters by name, where rates follow the width (optim/mup.py). average: the network of averaged weights, equal to
    the model's; schedule_free updates it too.
    """
    if isinstance(config, ScheduleFreeConfig):
        assert average is not None
        betas = (config.beta1, config.beta2)
        return {
            "schedule_free": ScheduleFreeAdamW(
                model.parameters(),
                average.parameters(),
                config.learning_rate,
                betas,
                weight_decay=config.weight_decay,
            )
        }
    named = dict(model.named_parameters())
    fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
    matrices = (
        {name: p for name, p in named.items() if name.startswith(_BLOCKS) and p.ndim == 2}
        if isinstance(config, MuonConfig)
        else {}
    )
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if isinstance(config, MuonConfig) and matrices:
        factors = {name: scale.muon_rate for name, scale in (scales or {}).items()}
        fused_qkv = {name: p for name, p in matrices.items() if name.endswith("qkv.weight")}
        others = {name: p for name, p in matrices.items() if name not in fused_qkv}
        groups = [
            {**group, "pieces": pieces}
            for part, pieces in ((fused_qkv, 3), (others, 1))
            for group in _groups(part, config.learning_rate, config.weight_decay, factors)
        ]
        optimizers["muon"] = Muon(
            groups, config.learning_rate, config.momentum, config.newton_schulz_steps, config.weight_decay
        )
    rate = config.adamw_learning_rate if isinstance(config, MuonConfig) else config.learning_rate
    factors = {name: scale.adamw_rate for name, scale in (scales or {}).items()}
    rest = {name: p for name, p in named.items() if name not in matrices}
    optimizers["adamw"] = torch.optim.AdamW(
        _groups(rest, rate, config.weight_decay, factors), lr=rate, betas=(config.beta1, config.beta2), fused=fused
    )
    return optimizers
