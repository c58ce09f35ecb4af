"""Feature networks: pictures to the vectors that metrics compare. Offline: the judge's features and the pixels."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from smalti.data.fingerprint import fingerprint
from smalti.data.rows import TrainingRows, to_bytes, to_signed_unit
from smalti.evaluation.cards import Extractor, Reference
from smalti.evaluation.intervals import Features
from smalti.evaluation.judge import FEATURE_WIDTH, Judge
from smalti.evaluation.resizing import resized
from smalti.evaluation.retrieval import RetrievalJudge

_LARGEST_SIDE = 32  # of the pictures whose pixels are compared


class FeatureNetwork(Protocol):
    """What features are computed with. fingerprint: SHA-256 of the weights and of what is done before them."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [batch, width] of pictures [batch, 1 or 3, height, width] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class NamedFeatures:
    """A feature network from a function. Pictures and features as in FeatureNetwork."""

    name: str
    fingerprint: str
    width: int
    compute: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [batch, width]."""
        return self.compute(images)


def network_features(
    name: str, width: int, module: nn.Module, preparation: str, compute: Callable[[Tensor], Tensor]
) -> NamedFeatures:
    """NamedFeatures by a module's weights. preparation: what is done to a picture first, in words."""
    return NamedFeatures(name, fingerprint(f"{name}; {preparation}", module.state_dict()), width, compute)


def pixel_features(shape: tuple[int, int, int]) -> NamedFeatures:
    """The pixels themselves, of pictures [channels, height, width], as the bytes that a picture file has.

    For copies: a diffusion model's pictures are compared with the training rows as they are seen; those of more than 32
    pixels a side as means over areas.
    """
    channels, *sides = shape
    height, width = (min(side, _LARGEST_SIDE) for side in sides)
    text = f"pixels {channels}x{height}x{width} as bytes / 127.5 - 1, resized"
    return NamedFeatures(
        "pixels",
        hashlib.sha256(text.encode()).hexdigest(),
        channels * height * width,
        lambda images: resized(to_signed_unit(to_bytes(images)), (height, width)).flatten(1),
    )


def judge_feature_network(judge: Judge) -> NamedFeatures:
    """The features of a judge of labelled pictures, which it resizes itself."""
    return network_features("judge", FEATURE_WIDTH, judge, "pictures in [-1, 1]", judge.features)


def retrieval_feature_network(judge: RetrievalJudge) -> NamedFeatures:
    """The picture embeddings of a judge of pictures and captions, which it resizes itself."""
    width = judge.config.embed_width
    return network_features("retrieval-judge", width, judge, "pictures in [-1, 1]", judge.embed_pictures)


@torch.inference_mode()
def features_of(
    network: FeatureNetwork,
    images: Tensor,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features float64 [rows, width] of pictures [rows, channels, height, width] in [-1, 1], in batches.

    A picture that is not finite (of a sampler that diverged) has features that are not. progress(done, total) is called
    after each batch.
    """
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    parts = []
    for start in range(0, len(images), batch_size):
        batch = torch.nan_to_num(images[start : start + batch_size])
        parts.append(network(batch).float())
        if progress is not None:
            progress(min(start + batch_size, len(images)), len(images))
    features = torch.cat(parts)
    features[~finite.to(features.device)] = torch.nan
    return features.double().cpu().numpy()


def rows_features(
    network: FeatureNetwork,
    rows: TrainingRows,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features float64 [rows, width] of rows to train on or held-out ones (the first `limit` of them)."""
    count = len(rows) if limit is None else min(limit, len(rows))
    parts = []
    for start in range(0, count, 500):
        indices = torch.arange(start, min(start + 500, count))
        parts.append(torch.from_numpy(features_of(network, rows.read(indices))))
        if progress is not None:
            progress(start + len(indices), count)
    return torch.cat(parts).numpy()


def reference_of(name: str, rows: TrainingRows, limit: int | None = None) -> Reference:
    """What a card says of the first `limit` rows: their number and the SHA-256 of their bytes."""
    count = len(rows) if limit is None else min(limit, len(rows))
    digest = hashlib.sha256(f"{count} x {rows.shape}".encode())
    for start in range(0, count, 500):
        pictures = rows.read(torch.arange(start, min(start + 500, count)))
        digest.update(to_bytes(pictures).contiguous().numpy().tobytes())
    return Reference(name, count, digest.hexdigest())


def extractor_of(network: FeatureNetwork) -> Extractor:
    """What a card says of a feature network."""
    return Extractor(network.name, network.fingerprint)
