"""What a pipeline call asks for, checked and made a condition: class labels, prompts, seeds, what to move away from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.types import Condition

_MAX_SEED = 2**63

PromptEncoder = Callable[[Sequence[str]], Condition]
"""Prompts to the text fields of a condition, a row a prompt."""


@dataclass(frozen=True)
class Wanted:
    """The pictures that a call asks for. cond: a row a picture; None from an unconditional network."""

    count: int
    cond: Condition | None
    class_labels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None


def checked_labels(name: str, given: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """int64 [len(given)]. Raises UserError for labels that the network does not have."""
    labels = torch.as_tensor(given).reshape(-1)
    if labels.numel() == 0 or labels.is_floating_point():
        raise UserError(f"{name}={labels.tolist()} must be one or more integers")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(f"{name}={labels.tolist()} must lie in 0 .. {num_classes - 1}")
    return labels.long()


def _checked_prompts(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    prompts = (given,) if isinstance(given, str) else tuple(given)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{name}={given!r} must be one or more texts")
    return prompts


def wanted_pictures(
    class_labels: Sequence[int] | Tensor | None,
    prompts: str | Sequence[str] | None,
    num_images: int | None,
    num_classes: int,
    encode_prompts: PromptEncoder | None,
) -> Wanted:
    """What to draw, from what a network of num_classes (0: none) or with prompts can. Raises UserError."""
    if encode_prompts is not None:
        return _of_prompts(class_labels, prompts, num_images, encode_prompts)
    if prompts is not None:
        raise UserError(
            f"prompts={prompts!r} has no effect: this network reads no text; "
            + ("give class_labels" if num_classes else "it is unconditional, give num_images")
        )
    if not num_classes:
        if class_labels is not None:
            raise UserError("class_labels has no effect: this network is unconditional; give num_images")
        if num_images is None or num_images < 1:
            raise UserError(f"num_images={num_images} must be at least 1 for an unconditional network")
        return Wanted(num_images, None)
    if class_labels is None:
        raise UserError(f"class_labels is missing: one label of 0 .. {num_classes - 1} a picture")
    labels = checked_labels("class_labels", class_labels, num_classes)
    if num_images is not None and num_images != len(labels):
        raise UserError(f"num_images={num_images} contradicts the {len(labels)} class_labels")
    return Wanted(len(labels), Condition(class_labels=labels), tuple(labels.tolist()))


def _of_prompts(
    class_labels: Sequence[int] | Tensor | None,
    prompts: str | Sequence[str] | None,
    num_images: int | None,
    encode_prompts: PromptEncoder,
) -> Wanted:
    if class_labels is not None:
        raise UserError("class_labels has no effect: this network reads text; give prompts")
    if prompts is None:
        raise UserError("prompts is missing: one text a picture, or one for all with num_images")
    texts = _checked_prompts("prompts", prompts)
    if num_images is not None and len(texts) != num_images:
        if len(texts) != 1 or num_images < 1:
            raise UserError(f"num_images={num_images} contradicts the {len(texts)} prompts")
        texts = texts * num_images
    return Wanted(len(texts), _encoded_once(texts, encode_prompts), prompts=texts)


def _encoded_once(texts: Sequence[str], encode_prompts: PromptEncoder) -> Condition:
    """The condition of texts that may repeat, each different one encoded once."""
    different = sorted(set(texts))
    rows = torch.tensor([different.index(text) for text in texts])
    return encode_prompts(different).map(lambda tensor: tensor[rows.to(tensor.device)])


def to_move_away_from(
    negative_class_labels: Sequence[int] | Tensor | None,
    negative_prompt: str | Sequence[str] | None,
    count: int,
    num_classes: int,
    encode_prompts: PromptEncoder | None,
) -> Condition | None:
    """The condition of guidance's other side, a row a picture; None: the network's null condition. Raises UserError."""
    if negative_prompt is not None and encode_prompts is None:
        raise UserError("negative_prompt has no effect: this network reads no text")
    if negative_class_labels is not None and not num_classes:
        network = "reads text: give negative_prompt" if encode_prompts is not None else "is unconditional"
        raise UserError(f"negative_class_labels has no effect: this network {network}")
    if negative_prompt is not None and encode_prompts is not None:
        texts = _checked_prompts("negative_prompt", negative_prompt)
        _check_one_or_all("negative_prompt", len(texts), count)
        return _encoded_once(texts * (count // len(texts)), encode_prompts)
    if negative_class_labels is not None:
        labels = checked_labels("negative_class_labels", negative_class_labels, num_classes)
        _check_one_or_all("negative_class_labels", len(labels), count)
        return Condition(class_labels=labels.expand(count))
    return None


def _check_one_or_all(name: str, given: int, count: int) -> None:
    if given not in (1, count):
        raise UserError(f"{name} has {given} entries for {count} pictures: give 1 or {count}")


def checked_seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One seed a picture: seed, seed + 1, ... or as given. Raises UserError."""
    seeds = tuple(seed + i for i in range(count)) if isinstance(seed, int) else tuple(int(s) for s in seed)
    if len(seeds) != count:
        raise UserError(f"seed has {len(seeds)} entries for {count} pictures: give one each, or one int")
    if any(not 0 <= s < _MAX_SEED for s in seeds):
        raise UserError(f"seed={seed} must lie in 0 .. 2^63 - 1")
    return seeds
