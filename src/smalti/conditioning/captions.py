"""Which caption of a picture a training step reads, and how long captions are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from smalti import rng
from smalti.errors import UserError


@dataclass(frozen=True)
class CaptionPolicy:
    """What a training step makes of a picture's captions.

    dropout: share of pictures that are shown with the empty prompt, which is what guidance needs (Ho and Salimans
    2022). choose: which of several captions. shuffle: put a caption's comma-separated parts in a random order.
    """

    dropout: float = 0.1
    choose: Literal["random", "first"] = "random"
    shuffle: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UserError(f"captions.dropout={self.dropout} must lie in [0, 1)")
        if self.choose not in ("random", "first"):
            raise UserError(f"captions.choose={self.choose!r} must be 'random' or 'first'")


FIRST_CAPTIONS = CaptionPolicy(dropout=0.0, choose="first")  # for validation and previews: the same at every step


def pick_captions(
    captions: Sequence[tuple[str, ...]], indices: Tensor, slots: Tensor, seed: int, step: int, policy: CaptionPolicy
) -> list[str]:
    """One caption for each row of a batch; "" where it is dropped or the row has none.

    captions: those of every row of the data set. indices: int64 [batch], the rows; slots: int64 [batch], their places
    in the step's batch, over all ranks. What a slot reads is a function of (seed, step, slot, its row) alone.
    """
    slots = slots.cpu()
    u = rng.uniform((2,), seed=seed, purpose="train/caption", index=slots, call=step).tolist()
    picked: list[str] = []
    for row, (u_drop, u_choice) in zip(indices.tolist(), u, strict=True):
        choices = captions[row]
        if u_drop < policy.dropout or not choices:
            picked.append("")
        else:
            picked.append(choices[int(u_choice * len(choices)) if policy.choose == "random" else 0])
    return _shuffled(picked, slots, seed, step) if policy.shuffle else picked


def _shuffled(picked: list[str], slots: Tensor, seed: int, step: int) -> list[str]:
    """Each caption with its comma-separated parts in a random order, addressed by (seed, step, slot)."""
    parts = [caption.split(",") for caption in picked]
    most = max((len(p) for p in parts), default=0)
    if most < 2:
        return picked
    words = rng.random_words(most, seed=seed, purpose="train/caption_order", index=slots, call=step).tolist()
    # Sorting by random words: zip stops at the shorter, and word j does not depend on how many are drawn.
    return [
        ", ".join(part.strip() for _, part in sorted(zip(keys, own, strict=False))) if len(own) > 1 else caption
        for caption, own, keys in zip(picked, parts, words, strict=True)
    ]


def valid_unicode(caption: str) -> str:
    """The caption with a "?" for each lone surrogate, which Python's strings may hold and tokenizers refuse."""
    return caption.encode("utf-8", errors="replace").decode()


@runtime_checkable
class CountsTokens(Protocol):
    """What knows how many tokens a caption has: a tokenizer, or a text encoder with its own."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that are read of a caption, start and end included."""
        ...

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before truncation, start and end included."""
        ...


@dataclass(frozen=True)
class CaptionLengths:
    """How long captions are, in tokens with start and end. limit: what is read of one; truncated: captions past it."""

    captions: int
    mean: float
    longest: int
    longest_caption: str
    truncated: int
    limit: int


def caption_lengths(tokenizer: CountsTokens, captions: Sequence[str]) -> CaptionLengths:
    """The lengths of captions against what the tokenizer (or text encoder) reads. No captions: all zero."""
    counts = tokenizer.token_counts(captions)
    longest = max(range(len(counts)), key=counts.__getitem__, default=None)
    return CaptionLengths(
        captions=len(counts),
        mean=sum(counts) / len(counts) if counts else 0.0,
        longest=0 if longest is None else counts[longest],
        longest_caption="" if longest is None else captions[longest],
        truncated=sum(count > tokenizer.max_tokens for count in counts),
        limit=tokenizer.max_tokens,
    )
