"""The judge: a small convolutional classifier, trained once on labelled rows and cached: the bundled digits or any.

Its accuracy on class-conditional samples says whether they are what was asked for; its features carry the Frechet
distance. Seconds on a CPU, and nothing to download.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti import rng
from smalti.data.digits import load_digits
from smalti.data.fingerprint import fingerprint
from smalti.data.order import batch_indices
from smalti.data.rows import PicturesInMemory, TrainingRows
from smalti.errors import UserError
from smalti.evaluation.resizing import resized
from smalti.run_folder import cache_folder

FEATURE_WIDTH = 64
_VERSION = 1  # of what is cached: raise it with any change to the network, its training or its data
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 12, 128, 4e-3
_FEWEST_STEPS = 300  # of a few pictures: more epochs
_SMALLEST, _LARGEST = 8, 32  # sides of what the judge looks at


class Judge(nn.Module):
    """Three convolutions, a feature layer, a logit a class. Pictures of another size are resized to image_size."""

    def __init__(self, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), num_classes: int = 10) -> None:
        super().__init__()
        self.in_channels, self.image_size = in_channels, image_size
        places = [((side + 1) // 2) // 2 // 2 for side in image_size]
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_channels, 24, 5, stride=2, padding=2),
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
        self.feature_layer = nn.Linear(96 * places[0] * places[1], FEATURE_WIDTH)
        self.classifier = nn.Linear(FEATURE_WIDTH, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Pictures [batch, channels, height, width] in [-1, 1] -> features [batch, 64]."""
        return F.relu(self.feature_layer(self.convolutions(resized(images, self.image_size))))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [batch, channels, height, width] in [-1, 1] -> logits [batch, classes]."""
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


def _untrained_judge(rows: TrainingRows, num_classes: int) -> Judge:
    channels, height, width = rows.shape
    size = (min(max(height, _SMALLEST), _LARGEST), min(max(width, _SMALLEST), _LARGEST))
    return Judge(channels, size, num_classes)


def train_judge(
    rows: TrainingRows, num_classes: int = 10, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Judge:
    """A judge of rows with class labels; progress(step, steps) is called after each step.

    Looks at the rows' own size, but at sides of at least 8 and at most 32 pixels.
    """
    assert rows.class_labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = _untrained_judge(rows, num_classes)
    judge.train()
    steps = max(_FEWEST_STEPS, _EPOCHS * len(rows) // _BATCH_SIZE)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        batch = batch_indices(step, _BATCH_SIZE, len(rows), seed)
        images = resized(rows.read(batch), judge.image_size)
        loss = F.cross_entropy(judge(distort(images, step, seed)), rows.class_labels[batch])
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


def held_out_accuracy(judge: Judge, held_out: TrainingRows) -> float:
    """Share of held-out rows that the judge reads right."""
    assert held_out.class_labels is not None
    _, predicted = judge_features(judge, held_out.read(torch.arange(len(held_out))))
    return float((predicted == held_out.class_labels).float().mean())


def load_judge(progress: Callable[[int, int], None] | None = None) -> Judge:
    """The cached judge of the bundled digits, trained first where there is none."""
    return _cached(cache_folder() / f"judge-v{_VERSION}.safetensors", load_digits()[0], 10, progress)


def load_class_judge(
    rows: PicturesInMemory, num_classes: int, progress: Callable[[int, int], None] | None = None
) -> Judge:
    """The cached judge of any rows with class labels, by the SHA-256 of pictures and labels; trained first where there
    is none. Raises UserError for rows without labels, of fewer than two classes."""
    if rows.class_labels is None or num_classes < 2:
        raise UserError(f"num_classes={num_classes}: a judge needs pictures of two classes or more, with labels")
    own = fingerprint(f"{num_classes} classes", {"images": rows.images, "labels": rows.class_labels})
    path = cache_folder() / f"judge-v{_VERSION}-{own[:16]}.safetensors"
    return _cached(path, rows, num_classes, progress)


def _cached(path: Path, rows: TrainingRows, num_classes: int, progress: Callable[[int, int], None] | None) -> Judge:
    """The judge in a file; trained on rows and written where there is none or it is damaged."""
    from safetensors.torch import load_file, save_file

    judge = _untrained_judge(rows, num_classes).eval()
    if path.exists():
        try:
            judge.load_state_dict(load_file(path))
        except Exception:  # whatever is wrong with a cache file, training again cures it
            path.unlink(missing_ok=True)
        else:
            return judge
    judge = train_judge(rows, num_classes, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(judge.state_dict(), partial)
    partial.replace(path)
    return judge
