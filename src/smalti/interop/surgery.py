"""Checkpoint surgery on a DiT: another number of classes, resolution, patch size or depth, with what can be kept."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.interop.load import Weights
from smalti.models.dit import DiTConfig
from smalti.models.registry import ModelConfig, build_model
from smalti.types import UserError

_CHANGEABLE = ("num_classes", "image_size", "patch_size", "depth")


@dataclass(frozen=True)
class Reuse:
    """What became of one tensor. how: in words; kept: the share of its numbers that come from the old network."""

    name: str
    how: str
    kept: float


def _resize_matrix(old: int, new: int) -> Tensor:
    """[new^2, old^2]: bilinear resizing of an old x old patch, as a matrix, float64."""
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    return F.interpolate(basis, (new, new), mode="bilinear", align_corners=False, antialias=new < old).flatten(1).T


def _patch_embedding(weight_DP: Tensor, channels: int, old: int, new: int) -> Tensor:
    """Kernels that answer to a resized patch as the old ones did to the patch.

    Source: Beyer et al. 2023 (FlexiViT), eq. 4 (pseudo-inverse resize).
    """
    kernels = weight_DP.double().unflatten(1, (channels, old * old))
    inverse = torch.linalg.pinv(_resize_matrix(old, new)).T  # [new^2, old^2]
    return torch.einsum("dcp,qp->dcq", kernels, inverse).flatten(1).to(weight_DP)


def _output(rows_P: Tensor, channels: int, old: int, new: int) -> Tensor:
    """Rows of the output layer (row, column, channel) whose patches are the old ones resized."""
    patches = rows_P.double().reshape(old * old, channels, -1)
    resized = torch.einsum("qp,pcd->qcd", _resize_matrix(old, new), patches)
    return resized.reshape(new * new * channels, *rows_P.shape[1:]).to(rows_P)


def _labels(table: Tensor, fresh: Tensor) -> Tensor:
    """The classes that both have, and the null label as the last row."""
    both = min(len(table), len(fresh)) - 1
    result = fresh.clone()
    result[:both], result[-1] = table[:both], table[-1]
    return result


def block_sources(old: int, new: int) -> list[tuple[int, bool]]:
    """For each of `new` blocks: the old block it comes from, and whether it is a repetition of the one before."""
    if new <= old:
        return [(round(i * (old - 1) / max(1, new - 1)), False) for i in range(new)]
    sources = [i * old // new for i in range(new)]
    return [(source, i > 0 and sources[i - 1] == source) for i, source in enumerate(sources)]


def _modulation(rows: Tensor, sources: list[tuple[int, bool]], width: int) -> Tensor:
    """The modulation rows of the chosen blocks; a repeated block's gates (third and sixth) are zero."""
    per_block = rows[: -2 * width].reshape(-1, 6, width, *rows.shape[1:])
    chosen = torch.stack([per_block[source] for source, _ in sources])
    for i, (_, repeated) in enumerate(sources):
        if repeated:
            chosen[i, [2, 5]] = 0
    return torch.cat([chosen.reshape(-1, *rows.shape[1:]), rows[-2 * width :]])


def adapt(weights: Weights, seed: int = 0, **changes: int | tuple[int, int]) -> tuple[Weights, list[Reuse]]:
    """The network with num_classes, image_size, patch_size or depth changed, and what each tensor was made of.

    Classes that both have are kept, with the null label; new ones start fresh from seed. Learned positions are
    interpolated (bicubic), fixed ones computed anew; patch kernels are resized. A deeper network repeats blocks with
    their gates at zero and so computes what the old one did; a shallower one keeps evenly spread blocks. Raises
    UserError for other fields and other architectures.
    """
    old = weights.config
    if not isinstance(old, DiTConfig):
        raise UserError(f"a network of kind {old.kind!r} cannot be adapted: only a dit can")
    unknown = sorted(set(changes) - set(_CHANGEABLE))
    if unknown:
        raise UserError(f"{unknown[0]} cannot be changed: only {', '.join(_CHANGEABLE)} can")
    new: DiTConfig = replace(old, **changes)  # type: ignore[arg-type]
    if bool(old.num_classes) != bool(new.num_classes):
        raise UserError(f"num_classes={new.num_classes}: an unconditional network stays one, and the other way round")
    fresh = {name: tensor.to(weights.tensors[next(iter(weights.tensors))].dtype)
             for name, tensor in build_model(new, seed).state_dict().items()}  # fmt: skip
    sources = block_sources(old.depth, new.depth)
    tensors: dict[str, Tensor] = {}
    report: list[Reuse] = []

    def put(name: str, tensor: Tensor, how: str, kept: float = 1.0) -> None:
        assert tensor.shape == fresh[name].shape
        tensors[name] = tensor
        report.append(Reuse(name, how, kept))

    for name in fresh:
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            source, repeated = sources[int(number)]
            put(name, weights.tensors[f"blocks.{source}.{part}"].clone(),
                f"block {source}" + (" again, gated off" if repeated else ""))  # fmt: skip
            continue
        given = weights.tensors[name]
        if name.startswith("modulation."):
            put(name, _modulation(given, sources, old.width), "follows the blocks")
        elif name == "label_embed.weight" and old.num_classes != new.num_classes:
            both = min(old.num_classes, new.num_classes)
            kept = (both + 1) / (new.num_classes + 1)
            put(name, _labels(given, fresh[name]), f"{both} classes and the null label kept", kept)
        elif name == "positions_ND" and old.grid != new.grid:
            grid = given.T.reshape(1, old.width, *old.grid).float()
            resized = F.interpolate(grid, new.grid, mode="bicubic", align_corners=False).flatten(2)[0].T
            put(name, resized.to(given), f"interpolated from {old.grid} to {new.grid}")
        elif name == "patch_embed.weight" and old.patch_size != new.patch_size:
            put(name, _patch_embedding(given, old.in_channels, old.patch_size, new.patch_size), "kernels resized")
        elif name.startswith("output.") and old.patch_size != new.patch_size:
            put(name, _output(given, old.out_channels, old.patch_size, new.patch_size), "patches resized")
        else:
            put(name, given.clone(), "kept")
    return Weights(new, tensors, weights.source), report


def changed_fields(old: ModelConfig, new: ModelConfig) -> list[str]:
    """What adapt changed, in words."""
    return [
        f"{f.name}: {getattr(old, f.name)} -> {getattr(new, f.name)}"
        for f in fields(old)
        if getattr(old, f.name) != getattr(new, f.name)
    ]
