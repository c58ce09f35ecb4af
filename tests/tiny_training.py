"""A few seconds of training on 256 bundled digits, for any network: does its fixed-t validation loss fall?"""

from collections.abc import Callable

import torch
from torch import Tensor

from smalti.data.digits import load_digits
from smalti.diffusion.objective import Objective, per_sample_loss
from smalti.diffusion.processes import make_process
from smalti.types import Condition


def validation_losses(
    network: Callable[[Tensor, Tensor, Condition | None], Tensor],
    parameters: list[torch.nn.Parameter],
    condition: Callable[[Tensor], Condition | None],
    *,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    to_input: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[float, float]:
    """Velocity loss on 64 held-out digits at fixed t and noise, before and after `steps` steps of AdamW.

    network: as a Backbone, fed t in 0 .. 1000 (rectified flow's network time); wrap one that takes another unit.
    condition: from class labels. to_input: from digits [batch, 1, 28, 28] to what the network takes (latents, videos).
    Zero prediction scores about 1 + the digits' mean square, 1.4.
    """
    torch.set_num_threads(1)  # layers this small gain nothing from a second
    process, objective = make_process("rectified_flow"), Objective("velocity")
    training, held_out = load_digits()
    generator = torch.Generator().manual_seed(0)

    def losses(x0: Tensor, labels: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return per_sample_loss(network, process, objective, x0, eps, t, condition(labels)).mean()

    def held_out_loss() -> float:
        images, labels = held_out.labelled(torch.arange(64))
        x0 = to_input(images)
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        t = (torch.arange(64, dtype=torch.float64) * 0.618 + 0.5) % 1.0
        with torch.inference_mode():
            return float(losses(x0, labels, eps, t))

    before = held_out_loss()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for _ in range(steps):
        images, labels = training.labelled(torch.randint(0, 256, (batch_size,), generator=generator))
        x0 = to_input(images)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        loss = losses(x0, labels, eps, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, held_out_loss()
