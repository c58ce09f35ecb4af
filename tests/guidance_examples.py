"""What guidance is tested on: a denoiser of labels, and a small DiT with random weights."""

from dataclasses import dataclass, field, replace

import torch

from smalti.diffusion import make_process
from smalti.models import DiTConfig, build_model
from smalti.types import Condition

NULL_LABEL = 10
SHAPE = (2, 3, 4)  # channels, height, width
PROCESS = make_process("vp_cosine")
SPACES = ["eps", "v", "velocity"]


@dataclass(frozen=True)
class LabelledDenoiser:
    """A denoiser with a pattern of its own a label; it counts the rows of each call."""

    seed: int = 0
    rows: list[int] = field(default_factory=list)

    def __call__(self, x, t, cond=None):
        self.rows.append(len(x))
        table = torch.randn(NULL_LABEL + 1, 2, *SHAPE, generator=torch.Generator().manual_seed(self.seed)).double()
        gain, offset = table[cond.class_labels].to(x.dtype).unbind(1)
        return gain * x + offset * t.to(x.dtype)[:, None, None, None]

    def with_variance(self, x, t, cond=None):
        return self(x, t, cond), cond.class_labels[:, None, None, None].expand_as(x).to(x.dtype)


def example(batch=3, seed=0):
    """x, t, cond, null of a batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(batch, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, NULL_LABEL, (batch,), generator=generator)
    return x, t, Condition(class_labels=labels), Condition(class_labels=torch.full((batch,), NULL_LABEL))


def random_dit(**changes):
    config = DiTConfig(image_size=(8, 8), in_channels=2, patch_size=2, width=32, depth=3, num_heads=4)
    model = build_model(replace(config, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def dit_inputs(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.config.in_channels, *model.config.image_size, generator=generator)
    return x, 1000 * torch.rand(batch, generator=generator), Condition(class_labels=torch.arange(batch))
