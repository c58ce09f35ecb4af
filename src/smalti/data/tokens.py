"""Pictures as grids of tokens, encoded once and kept in memory: what masked models train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from smalti.data.rows import TrainingRows

_BATCH = 256


@dataclass(frozen=True)
class TokensInMemory:
    """Tokens int32 [rows, height, width], with what is known of the rows (see TrainingRows)."""

    tokens: Tensor
    class_labels: Tensor | None = None
    captions: Sequence[tuple[str, ...]] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """1, and the rows and columns of a grid."""
        height, width = self.tokens.shape[1:]
        return 1, height, width

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, indices: Tensor, draw: int | None = None) -> Tensor:
        """Tokens int64 [len(indices), height, width]; nothing is random in them."""
        return self.tokens[indices.to(self.tokens.device)].long()

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device."""
        labels = None if self.class_labels is None else self.class_labels.to(device)
        return replace(self, tokens=self.tokens.to(device), class_labels=labels)


@torch.inference_mode()
def tokenized(
    rows: TrainingRows,
    encode: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TokensInMemory:
    """All rows as tokens. encode: pictures [batch, channels, height, width] to int64 [batch, height, width]; run on
    device. progress(done, total) is called after each batch."""
    parts = []
    for begin in range(0, len(rows), _BATCH):
        end = min(begin + _BATCH, len(rows))
        parts.append(encode(rows.read(torch.arange(begin, end)).to(device)).int().cpu())
        if progress is not None:
            progress(end, len(rows))
    height, width = rows.shape[1:]
    tokens = torch.cat(parts) if parts else torch.zeros(0, height, width, dtype=torch.int32)
    return TokensInMemory(tokens.clone(), rows.class_labels, rows.captions)
