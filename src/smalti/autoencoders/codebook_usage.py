"""How much of a codebook is used, and whether it has collapsed."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALL_SHARE, _FEW = 0.05, 2.0  # 16 levels of the digits' pixels, nearly all black, have a perplexity of 2.5


@dataclass(frozen=True)
class CodebookUsage:
    """Of so many tokens: the codes that occur among them, and their perplexity.

    perplexity: exp of the entropy of the tokens' frequencies in nats, the number of codes that would be as uneven if
    all were used alike; from 1 to codebook_size.
    """

    codebook_size: int
    num_tokens: int
    used: int
    perplexity: float

    @property
    def share(self) -> float:
        """Codes used, as a share of those that so many tokens could use."""
        return self.used / max(1, min(self.codebook_size, self.num_tokens))

    @property
    def collapsed(self) -> bool:
        """Below 5 % of the codes, or a perplexity below 2 (of a very small codebook: a quarter of its size)."""
        return self.share < _SMALL_SHARE or self.perplexity < min(_FEW, self.codebook_size / 4)

    def __str__(self) -> str:
        return f"{self.used} of {self.codebook_size} codes used ({self.share:.0%}), perplexity {self.perplexity:.1f}"


def token_counts(tokens: Tensor, codebook_size: int) -> Tensor:
    """How often each token occurs: int64 [codebook_size]."""
    return torch.bincount(tokens.flatten(), minlength=codebook_size).cpu()


def codebook_usage(counts: Tensor) -> CodebookUsage:
    """The usage that token counts int64 [codebook_size] show."""
    total = int(counts.sum())
    shares = counts[counts > 0].double() / max(1, total)
    perplexity = float((-(shares * shares.log()).sum()).exp())
    return CodebookUsage(len(counts), total, len(shares), perplexity)
