"""Checkpoint surgery: another number of classes, resolution, patch size, depth or text width, with what can be kept.

What is done to a tensor goes by the shared part that it is of, under the name that the networks give it: patch_embed,
positions_ND, label_embed, modulation, output. An anatomy says what differs between networks: the chains of their
blocks, and how a block that is there twice is made to do nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import UserError
from smalti.interop.load import Weights
from smalti.models.dit import DiTConfig
from smalti.models.mmdit import MMDiTConfig
from smalti.models.registry import ModelConfig, build_model, network_of
from smalti.models.uvit import UViTConfig

Sources = list[tuple[int, bool]]  # for each new block: the old one it comes from, and whether it is there again


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


def _labels(table: Tensor, fresh: Tensor, null_label: bool) -> Tensor:
    """The classes that both have, and the null label (where there is one) as the last row."""
    both = min(len(table), len(fresh)) - null_label
    result = fresh.clone()
    result[:both] = table[:both]
    if null_label:
        result[-1] = table[-1]
    return result


def block_sources(old: int, new: int) -> Sources:
    """For each of `new` blocks: the old block it comes from, and whether it is a repetition of the one before."""
    if new <= old:
        return [(round(i * (old - 1) / max(1, new - 1)), False) for i in range(new)]
    sources = [i * old // new for i in range(new)]
    return [(source, i > 0 and sources[i - 1] == source) for i, source in enumerate(sources)]


def _gates_off(rows: Tensor, width: int) -> Tensor:
    """Modulation rows (shift, scale, gate, shift, scale, gate ...) with the gates at zero."""
    parts = rows.clone().reshape(-1, width, *rows.shape[1:])
    parts[2::3] = 0
    return parts.reshape(rows.shape)


def _modulation(rows: Tensor, sources: Sources, width: int) -> Tensor:
    """A DiT's one modulation: the rows of the chosen blocks, of repeated ones without gates; then the output's."""
    blocks = rows[: -2 * width].unflatten(0, (-1, 6 * width))
    chosen = [_gates_off(blocks[source], width) if repeated else blocks[source] for source, repeated in sources]
    return torch.cat([*chosen, rows[-2 * width :]])


def _positions(table_ND: Tensor, extra: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of positions, its first `extra` rows kept and the grid's interpolated (bicubic)."""
    grid = table_ND[extra:].T.unflatten(1, old)[None].float()
    resized = F.interpolate(grid, new, mode="bicubic", align_corners=False).flatten(2)[0].T
    return torch.cat([table_ND[:extra], resized.to(table_ND)])


def _replaced(old: Any, changes: dict[str, Any]) -> Any:
    return replace(old, **changes)


@dataclass(frozen=True)
class _Anatomy:
    """What surgery must know of a kind of network.

    changeable: fields of its config. chains(old, new): for each list of blocks where its new ones come from, by the
    depths. switched_off(part, tensor, width): a tensor of a block that is there again, such that the block changes
    nothing. table(config): rows of the position table before the grid's, and that grid. changed(old, changes): the new
    config, with the fields that go with the changed ones. fresh: (field, prefix) of what starts anew with it.
    """

    changeable: tuple[str, ...]
    chains: Callable[[int, int], dict[str, Sources]]
    switched_off: Callable[[str, Tensor, int], Tensor]
    table: Callable[[Any], tuple[int, tuple[int, int]]]
    changed: Callable[[Any, dict[str, Any]], Any] = _replaced
    fresh: tuple[tuple[str, str], ...] = ()


def _dit_changed(old: DiTConfig, changes: dict[str, Any]) -> DiTConfig:
    if old.conditioning != "adaln_zero":
        raise UserError(f"a DiT with conditioning={old.conditioning!r} cannot be adapted: only adaln_zero can")
    return replace(old, **changes)


def _uvit_chains(old: int, new: int) -> dict[str, Sources]:
    """The second half mirrors the first, so that partners stay partners."""
    first = block_sources(old // 2, new // 2)
    return {"in_blocks": first, "out_blocks": [(old // 2 - 1 - source, again) for source, again in reversed(first)]}


def _uvit_switched_off(part: str, tensor: Tensor, width: int) -> Tensor:
    """There are no gates: what a block adds is zero, and the join takes the stream and leaves the skip."""
    if part == "skip_linear.weight":
        return torch.eye(*tensor.shape, dtype=tensor.dtype)
    adds = part.startswith(("attn.out.", "mlp.fc2.", "skip_linear."))
    return torch.zeros_like(tensor) if adds else tensor


def _mmdit_chains(old: int, new: int) -> dict[str, Sources]:
    """The last block, which gives the text nothing, stays the last."""
    if new > 1 == old:
        raise UserError(f"depth={new}: a network of one block, which leaves the text out, cannot be deepened")
    return {"blocks": [*(block_sources(old - 1, new - 1) if new > 1 else ()), (old - 1, False)]}


def _mmdit_changed(old: MMDiTConfig, changes: dict[str, Any]) -> MMDiTConfig:
    """The table of positions grows with the native size in tokens, so that its middle says what it said.

    Source: SD3 (Esser et al. 2024), section 5.3.2: the native crop of any resolution covers one range of positions.
    """
    image_size, patch_size = changes.get("image_size", old.image_size), changes.get("patch_size", old.patch_size)
    factors = {
        (theirs // max(1, patch_size)) / (ours // old.patch_size)
        for theirs, ours in zip(image_size, old.image_size, strict=True)
    }
    if len(factors) > 1:
        raise UserError(
            f"image_size={image_size} must scale both sides of {old.image_size} alike, as the table of positions is "
            f"square: any shape of up to {old.position_grid * old.patch_size} a side needs no surgery"
        )
    sources = _mmdit_chains(old.depth, changes.get("depth", old.depth))["blocks"]
    dual = tuple(i for i, (source, _) in enumerate(sources) if source in old.dual_attention_blocks)
    side = max(1, round(old.position_grid * factors.pop()))
    return replace(old, **changes, position_grid=side, dual_attention_blocks=dual)


_PICTURE = ("num_classes", "image_size", "patch_size", "depth")
_ANATOMIES: dict[str, _Anatomy] = {
    DiTConfig.kind: _Anatomy(
        _PICTURE,
        lambda old, new: {"blocks": block_sources(old, new)},
        lambda part, tensor, width: tensor,  # its gates are in the one modulation of all blocks
        lambda config: (0, config.grid),
        _dit_changed,
    ),
    UViTConfig.kind: _Anatomy(
        _PICTURE, _uvit_chains, _uvit_switched_off, lambda config: (config.extra_tokens, config.grid)
    ),
    MMDiTConfig.kind: _Anatomy(
        ("image_size", "patch_size", "depth", "text_width", "pooled_width"),
        _mmdit_chains,
        lambda part, tensor, width: _gates_off(tensor, width) if "_modulation." in part else tensor,
        lambda config: (0, (config.position_grid, config.position_grid)),
        _mmdit_changed,
        (("text_width", "text_embed."), ("pooled_width", "pooled_embed.fc1.")),
    ),
}


def _changed(old: ModelConfig, anatomy: _Anatomy, changes: dict[str, Any]) -> ModelConfig:
    unknown = sorted(set(changes) - set(anatomy.changeable))
    if unknown:
        raise UserError(f"{unknown[0]} cannot be changed: of a {old.kind} only {', '.join(anatomy.changeable)} can")
    classes = changes.get("num_classes")
    if classes is not None and bool(getattr(old, "num_classes", 0)) != bool(classes):
        raise UserError(f"num_classes={classes}: an unconditional network stays one, and the other way round")
    return anatomy.changed(old, changes)  # type: ignore[no-any-return]


def adapt(weights: Weights, seed: int = 0, **changes: int | tuple[int, int]) -> tuple[Weights, list[Reuse]]:
    """The network with some fields of its config changed, and what each tensor was made of.

    Of a DiT and a U-ViT num_classes, image_size, patch_size and depth; of an MM-DiT image_size, patch_size, depth,
    text_width and pooled_width. Classes that both have are kept, with the null label; new ones start fresh from seed,
    as do the projections of another text width. Positions are interpolated (bicubic) where they are in the weights and
    else computed anew; patch kernels are resized. A deeper network repeats blocks such that the repetitions change
    nothing, and so computes what the old one did; a shallower one keeps evenly spread blocks. Raises UserError for
    other fields and other architectures.
    """
    if weights.codebook_size is not None:
        raise UserError("a network of tokens cannot be adapted yet")
    old: Any = weights.config  # of the kind that the anatomy is of
    anatomy = _ANATOMIES.get(old.kind)
    if anatomy is None:
        raise UserError(f"a network of kind {old.kind!r} cannot be adapted: only {', '.join(_ANATOMIES)} can")
    new: Any = _changed(old, anatomy, changes)
    chains = anatomy.chains(old.depth, new.depth)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in network_of(new).state_dict().items()}
    anew = tuple(prefix for field, prefix in anatomy.fresh if getattr(old, field) != getattr(new, field))
    (old_extra, old_grid), (_, new_grid) = anatomy.table(old), anatomy.table(new)
    tensors: dict[str, Tensor] = {}
    report: list[Reuse] = []

    @cache
    def fresh() -> dict[str, Tensor]:
        dtype = next(iter(weights.tensors.values())).dtype
        return {name: tensor.to(dtype) for name, tensor in build_model(new, seed).state_dict().items()}

    def put(name: str, tensor: Tensor, how: str, kept: float = 1.0) -> None:
        assert tensor.shape == shapes[name], name
        tensors[name] = tensor
        report.append(Reuse(name, how, kept))

    for name in shapes:
        block = re.match(r"(\w+)\.(\d+)\.(.*)", name)
        if block is not None and block[1] in chains:
            source, repeated = chains[block[1]][int(block[2])]
            given = weights.tensors[f"{block[1]}.{source}.{block[3]}"].clone()
            kept = anatomy.switched_off(block[3], given, old.width) if repeated else given
            put(name, kept, f"block {source}" + (" again, switched off" if repeated else ""))
            continue
        if name.startswith(anew):
            put(name, fresh()[name].clone(), "fresh", 0.0)
            continue
        given = weights.tensors[name]
        if name.startswith("modulation."):
            put(name, _modulation(given, chains["blocks"], old.width), "follows the blocks")
        elif name == "label_embed.weight" and given.shape != shapes[name]:
            null_label = getattr(old, "null_label", True)
            both = min(len(given), shapes[name][0]) - null_label
            how = f"{both} classes{' and the null label' if null_label else ''} kept"
            put(name, _labels(given, fresh()[name], null_label), how, (both + null_label) / shapes[name][0])
        elif name == "positions_ND" and old_grid != new_grid:
            put(name, _positions(given, old_extra, old_grid, new_grid), f"interpolated from {old_grid} to {new_grid}")
        elif name == "patch_embed.weight" and old.patch_size != new.patch_size:
            channels = given.shape[1] // old.patch_size**2
            put(name, _patch_embedding(given, channels, old.patch_size, new.patch_size), "kernels resized")
        elif name.startswith("output.") and old.patch_size != new.patch_size:
            channels = given.shape[0] // old.patch_size**2
            put(name, _output(given, channels, old.patch_size, new.patch_size), "patches resized")
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


def without_attention_scale(weights: Weights) -> Weights:
    """The same function with attention_scale 1, which other libraries have: the scale goes into the queries, or into
    their norm where they have one."""
    config: Any = weights.config
    scale = getattr(config, "attention_scale", 1.0)
    if scale == 1:
        return weights
    normed = any(name.endswith("q_norm.weight") for name in weights.tensors)
    tensors = {}
    for name, tensor in weights.tensors.items():
        if normed and name.endswith("q_norm.weight"):
            tensors[name] = tensor * scale
        elif not normed and name.endswith(("qkv.weight", "qkv.bias")):
            queries, rest = tensor.tensor_split([len(tensor) // 3])
            tensors[name] = torch.cat([queries * scale, rest])
        else:
            tensors[name] = tensor
    return replace(weights, config=replace(config, attention_scale=1.0), tensors=tensors)
