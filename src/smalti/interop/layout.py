"""Two-way maps between our state dicts and another library's: a layout is a list of rules, each of them invertible.

A rule says which tensors of ours and which of theirs hold the same numbers, and how to go from one to the other. A
layout must name every tensor on both sides once, so that what is missing, surplus or wrongly shaped is always seen:
the shapes that a file must have are those of our network on the meta device, sent through the same rules.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import UserError

Tensors = tuple[Tensor, ...]
_LISTED = 8  # keys that an error names before it only counts


@dataclass(frozen=True)
class Rule:
    """Tensors of ours and tensors of theirs that hold the same numbers.

    optional: theirs may lack them (a table that their program can compute); they are written all the same.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]
    optional: bool = False


def _same(tensors: Tensors) -> Tensors:
    return tensors


def renamed(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule((ours,), (theirs,), _same, _same)


def changed(ours: str, theirs: str, to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor]) -> Rule:
    """One tensor that is stored in another shape or order."""
    return Rule((ours,), (theirs,), lambda t: (to_ours(t[0]),), lambda t: (to_theirs(t[0]),))


def joined(ours: str, theirs: Sequence[str], sizes: Sequence[int] | None = None) -> Rule:
    """Ours is theirs stacked along the first axis. sizes: rows of each of theirs; equal ones by default."""

    def split(tensors: Tensors) -> Tensors:
        rows = tensors[0].shape[0]
        # Clones: what shares its storage with a neighbour cannot be written to safetensors.
        return tuple(part.clone() for part in tensors[0].split(list(sizes) if sizes else rows // len(theirs)))

    return Rule((ours,), tuple(theirs), lambda tensors: (torch.cat(tensors),), split)


def reshaped(ours: str, theirs: str, our_shape: Sequence[int], their_shape: Sequence[int]) -> Rule:
    """The same numbers in the same order in another shape, such as a patch convolution's kernel as a matrix."""
    return changed(ours, theirs, lambda t: t.reshape(tuple(our_shape)), lambda t: t.reshape(tuple(their_shape)))


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def swapped_halves(ours: str, theirs: str) -> Rule:
    """The two halves of the first axis trade places: (shift, scale) against (scale, shift), gate against value."""
    return changed(ours, theirs, _swap_halves, _swap_halves)


def copied(ours: str, theirs: Sequence[str]) -> Rule:
    """One tensor of ours that they store several times; copies that differ are an error."""

    def one(tensors: Tensors) -> Tensors:
        different = [name for name, t in zip(theirs, tensors, strict=True) if not torch.equal(t, tensors[0])]
        if different:
            raise UserError(f"{different[0]} differs from {theirs[0]}: they must be copies of one tensor")
        return tensors[:1]

    return Rule((ours,), tuple(theirs), one, lambda tensors: tuple(tensors[0].clone() for _ in theirs))


def computed(theirs: str, value: Callable[[], Tensor], optional: bool = False) -> Rule:
    """A tensor that they store and we compute, such as a fixed table of positions; another value is an error.

    optional: some of their files lack it.
    """

    def drop(tensors: Tensors) -> Tensors:
        expected = value()
        if tensors[0].device.type != "meta" and not torch.equal(tensors[0], expected.to(tensors[0].dtype)):
            raise UserError(f"{theirs} is not the table that its config calls for")
        return ()

    return Rule((), (theirs,), drop, lambda _: (value(),), optional)


def with_bias(rule: Callable[[str, str], Rule], ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A rule for the weight and one for the bias of a layer: with_bias(renamed, "output", "proj_out")."""
    return rule(f"{ours}.weight", f"{theirs}.weight"), rule(f"{ours}.bias", f"{theirs}.bias")


def joined_with_bias(ours: str, theirs: Sequence[str], sizes: Sequence[int] | None = None) -> tuple[Rule, Rule]:
    """joined() for the weights and for the biases of layers."""
    weight, bias = (joined(f"{ours}.{kind}", [f"{t}.{kind}" for t in theirs], sizes) for kind in ("weight", "bias"))
    return weight, bias


def patch_convolution(ours: str, theirs: str, width: int, channels: int, patch_size: int) -> tuple[Rule, Rule]:
    """A patch embedding: a matrix with us, a convolution's kernel with them; and its bias."""
    matrix, kernel = (width, channels * patch_size**2), (width, channels, patch_size, patch_size)
    return reshaped(f"{ours}.weight", f"{theirs}.weight", matrix, kernel), renamed(f"{ours}.bias", f"{theirs}.bias")


@dataclass(frozen=True)
class Layout:
    """The rules of one network in one foreign format. Raises AssertionError if a tensor is named twice.

    ignored: tensors that some of their files have and no forward reads, such as a head for training; never written.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not any(rule.ours for rule in self.rules if rule.optional), "an optional rule has nothing of ours"
        for names in ([n for r in self.rules for n in r.ours], [n for r in self.rules for n in r.theirs]):
            twice = {name for name, group in itertools.groupby(sorted(names)) if len(list(group)) > 1}
            assert not twice, f"named twice in one layout: {sorted(twice)[:3]}"

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict from theirs, which must be whole (check says so)."""
        ours: dict[str, Tensor] = {}
        for rule in self.rules:
            if rule.optional and not tensors.keys() >= set(rule.theirs):
                continue
            ours.update(zip(rule.ours, rule.to_ours(tuple(tensors[name] for name in rule.theirs)), strict=True))
        return ours

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their state dict from ours."""
        theirs: dict[str, Tensor] = {}
        for rule in self.rules:
            theirs.update(zip(rule.theirs, rule.to_theirs(tuple(tensors[name] for name in rule.ours)), strict=True))
        return theirs

    def check(self, tensors: Mapping[str, Tensor], our_shapes: Mapping[str, Tensor], source: str) -> None:
        """Compare theirs with what our network needs. Raises UserError that lists what is missing, surplus, misshapen.

        our_shapes: our state dict, on the meta device.
        """
        optional = {name for rule in self.rules if rule.optional for name in rule.theirs}
        expected = self.to_theirs(our_shapes)
        given = {name: tensor for name, tensor in tensors.items() if name not in self.ignored}
        check_tensors(given, {n: t for n, t in expected.items() if n in given or n not in optional}, source)


def _listing(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    rest = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return [f"{len(entries)} {title}: {', '.join(entries[:_LISTED])}{rest}"]


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes. Raises UserError that lists what is missing, surplus and wrongly shaped."""
    missing = sorted(set(expected) - set(given))
    surplus = sorted(set(given) - set(expected))
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(given) & set(expected))
        if given[name].shape != expected[name].shape
    ]
    complaints = [
        *_listing("missing", missing), *_listing("surplus", surplus), *_listing("wrongly shaped", misshapen)
    ]  # fmt: skip
    if complaints:
        raise UserError(f"{source} does not fit this network: {'; '.join(complaints)}")


def rules_for_blocks(depth: int, rules: Callable[[int], Iterable[Rule]]) -> tuple[Rule, ...]:
    """The rules of blocks 0 .. depth - 1."""
    return tuple(itertools.chain.from_iterable(rules(i) for i in range(depth)))
