"""The judge: a small convolutional classifier of digits, trained once on the bundled rows and cached.

Its accuracy on class-conditional samples says whether they are what was asked for; its features carry the Frechet
distance. Seconds on a CPU, and nothing to download.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti import rng
from smalti.data.digits import load_digits
from smalti.data.order import batch_indices
from smalti.data.rows import PicturesInMemory, to_signed_unit
from smalti.run_folder import cache_folder

FEATURE_WIDTH = 64
_VERSION = 1  # of what is cached: raise it with any change to the network, its training or its data
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 12, 128, 4e-3


class Judge(nn.Module):
    """Three convolutions, a feature layer, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 96, 3, padding=1),
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.feature_layer = nn.Linear(96 * 9, FEATURE_WIDTH)
        self.classifier = nn.Linear(FEATURE_WIDTH, 10)

    def features(self, images: Tensor) -> Tensor:
        """Pictures [batch, 1, 28, 28] in [-1, 1] -> features [batch, 64]."""
        return F.relu(self.feature_layer(self.convolutions(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [batch, 1, 28, 28] in [-1, 1] -> logits [batch, 10]."""
        return self.classifier(self.features(images))  # type: ignore[no-any-return]


def distort(images: Tensor, step: int, seed: int) -> Tensor:
    """Small random shifts, turns, shears and scalings of each picture, addressed by (seed, step, row)."""
    u = 2 * rng.uniform((6,), seed=seed, purpose="judge/distort", index=torch.arange(len(images)), call=step) - 1
    angle, log_scale, shear = 0.2 * u[:, 0], 0.1 * u[:, 1], 0.15 * u[:, 2]
    cosine, sine, scale = angle.cos(), angle.sin(), log_scale.exp()
    matrix = torch.stack(
        [
            torch.stack([cosine * scale, -sine * scale + shear, 0.15 * u[:, 3]], dim=1),
            torch.stack([sine * scale, cosine * scale, 0.15 * u[:, 4]], dim=1),
        ],
        dim=1,
    ).float()
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_judge(seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Judge:
    """A judge trained on rows 0 .. 8999; progress(step, steps) is called after each step."""
    training_rows, _ = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    judge.train()
    steps = _EPOCHS * len(training_rows) // _BATCH_SIZE
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        images, labels = training_rows.labelled(batch_indices(step, _BATCH_SIZE, len(training_rows), seed))
        loss = F.cross_entropy(judge(distort(images, step, seed)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    return judge.eval()


@torch.inference_mode()
def judge_features(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features [rows, 64], predicted labels [rows]) of pictures in [-1, 1], in batches of 500."""
    features = torch.cat([judge.features(part) for part in images.split(500)])
    return features, judge.classifier(features).argmax(dim=1)


def held_out_accuracy(judge: Judge, held_out: PicturesInMemory) -> float:
    """Share of held-out rows that the judge reads right."""
    assert held_out.class_labels is not None
    _, predicted = judge_features(judge, to_signed_unit(held_out.images))
    return float((predicted == held_out.class_labels).float().mean())


def load_judge(progress: Callable[[int, int], None] | None = None) -> Judge:
    """The cached judge, trained first where there is none; a damaged cache is trained again."""
    from safetensors.torch import load_file, save_file

    path = cache_folder() / f"judge-v{_VERSION}.safetensors"
    judge = Judge().eval()
    if path.exists():
        try:
            judge.load_state_dict(load_file(path))
        except Exception:  # whatever is wrong with a cache file, training again cures it
            path.unlink(missing_ok=True)
        else:
            return judge
    judge = train_judge(progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(judge.state_dict(), partial)
    partial.replace(path)
    return judge
