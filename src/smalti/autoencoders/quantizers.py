"""Latents to the codes of a finite codebook, and their indices: vector quantization (VQ), finite scalars (FSQ).

Both give a straight-through gradient: the decoder's gradient with respect to a code is taken for the latent's.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError

_MOST_CODES = 65_536


@dataclass(frozen=True)
class VQ:
    """A learned codebook. code_width: channels of a code.

    decay: of the averages that codes are, of the latents nearest to them. commitment: weight of the loss that draws
    latents to their codes. restart_below: a code used less than this share of the mean use is replaced by a latent of
    the batch; 0: never. distance: cosine compares directions alone.
    """

    kind: ClassVar[str] = "vq"
    codebook_size: int = 256
    code_width: int = 8
    distance: Literal["euclidean", "cosine"] = "euclidean"
    decay: float = 0.99
    commitment: float = 0.25
    restart_below: float = 0.03

    def __post_init__(self) -> None:
        if not 2 <= self.codebook_size <= _MOST_CODES:
            raise UserError(f"quantizer.codebook_size={self.codebook_size} must lie in 2 .. {_MOST_CODES}")
        if self.code_width < 1:
            raise UserError(f"quantizer.code_width={self.code_width} must be at least 1")
        if self.distance not in ("euclidean", "cosine"):
            raise UserError(f"quantizer.distance={self.distance!r} must be euclidean or cosine")
        if not 0 <= self.decay < 1:
            raise UserError(f"quantizer.decay={self.decay} must lie in [0, 1)")
        if self.commitment < 0:
            raise UserError(f"quantizer.commitment={self.commitment} must not be negative")
        if not 0 <= self.restart_below < 1:
            raise UserError(f"quantizer.restart_below={self.restart_below} must lie in [0, 1); 0 is never")


@dataclass(frozen=True)
class FSQ:
    """Each channel rounded to a few values, levels[i] of them in channel i; a code is one combination of values."""

    kind: ClassVar[str] = "fsq"
    levels: tuple[int, ...] = (8, 6, 5)

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise UserError(f"quantizer.levels={self.levels} must be numbers of at least 3, such as (8, 6, 5)")
        if self.codebook_size > _MOST_CODES:
            raise UserError(
                f"quantizer.levels={self.levels} make {self.codebook_size} codes: a codebook has at most {_MOST_CODES}"
            )

    @property
    def codebook_size(self) -> int:
        """Combinations of values."""
        return math.prod(self.levels)

    @property
    def code_width(self) -> int:
        """Channels of a code."""
        return len(self.levels)


QuantizerConfig = VQ | FSQ


@dataclass(frozen=True)
class Quantized:
    """Latents as codes [batch, code_width, height, width], with the straight-through gradient.

    tokens: int64 [batch, height, width], the codes' indices. loss: what the quantizer adds to the training's loss.
    """

    codes: Tensor
    tokens: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """A latent becomes the nearest of codebook_size codes, which are running means of the latents they are nearest to.

    Source: van den Oord et al. 2017, "Neural discrete representation learning", section 3.2 and appendix A.1 (codes as
    averages); codes that die are put where latents are, Dhariwal et al. 2020 (Jukebox), section 3.2; cosine distance,
    Yu et al. 2022 (improved VQGAN), section 3.2.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, config: VQ) -> None:
        super().__init__()
        self.config = config
        codes = self._placed(torch.randn(config.codebook_size, config.code_width))
        self.codebook = nn.Parameter(codes, requires_grad=False)  # set by learn(), and averaged as weights are
        self.register_buffer("counts", torch.zeros(config.codebook_size), persistent=False)
        self.register_buffer("sums", torch.zeros_like(codes), persistent=False)

    def _placed(self, rows: Tensor) -> Tensor:
        """Rows where codes may lie: anywhere, or on the unit sphere."""
        return F.normalize(rows, dim=-1) if self.config.distance == "cosine" else rows

    def _rows(self, latents: Tensor) -> Tensor:
        """[batch, code_width, height, width] -> [batch height width, code_width]."""
        return self._placed(latents.movedim(1, -1).flatten(0, -2))

    def _nearest(self, rows: Tensor) -> Tensor:
        """Index of the nearest code for each row."""
        codebook = self._placed(self.codebook)  # an average of unit vectors is none
        return (codebook.square().sum(1) - 2 * rows @ codebook.mT).argmin(1)

    def tokens_of(self, latents: Tensor) -> Tensor:
        """Latents [batch, code_width, height, width] to indices [batch, height, width]."""
        return self._nearest(self._rows(latents)).view(len(latents), *latents.shape[2:])

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Indices [batch, height, width] to codes [batch, code_width, height, width]."""
        return self._placed(F.embedding(tokens, self.codebook)).movedim(-1, 1)

    def forward(self, latents: Tensor) -> Quantized:
        """Latents to their codes, with the commitment loss."""
        tokens = self.tokens_of(latents)
        codes, placed = self.codes_of(tokens), self._placed(latents.movedim(1, -1)).movedim(-1, 1)
        # Section 3.2, eq. 3: the third term; the second, which moves the codes, is learn().
        loss = self.config.commitment * F.mse_loss(placed, codes)
        return Quantized(placed + (codes - placed).detach(), tokens, loss)

    @torch.no_grad()
    def learn(self, latents: Tensor, u: Tensor | None = None) -> None:
        """Move the codes towards a batch's latents. u: codebook_size uniform numbers, where codes may be restarted.

        Before the first call no code has been used: with u, all are then latents of the batch.
        """
        rows, decay, size = self._rows(latents), self.config.decay, self.config.codebook_size
        if u is not None and self.config.restart_below:
            fair = len(rows) / size  # uses of a code in a batch, were all used alike
            dead = self.counts < self.config.restart_below * fair
            chosen = rows[(u.to(rows.device) * len(rows)).long().clamp_max(len(rows) - 1)]
            self.codebook.copy_(torch.where(dead[:, None], chosen, self.codebook))
            self.counts.copy_(torch.where(dead, fair, self.counts))
            self.sums.copy_(torch.where(dead[:, None], chosen * fair, self.sums))
        tokens = self._nearest(rows)
        # Appendix A.1, eq. 6 to 8.
        self.counts.lerp_(torch.bincount(tokens, minlength=size).to(rows.dtype), 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, tokens, rows), 1 - decay)
        used = self.counts > 1e-6
        means = self._placed(self.sums / self.counts.clamp_min(1e-6)[:, None])
        self.codebook.copy_(torch.where(used[:, None], means, self.codebook))


class FiniteScalarQuantizer(nn.Module):
    """Each channel bounded by a tanh and rounded; nothing is learned, so no code can die for good.

    A code's channel i has levels[i] evenly spaced values in [-1, 1]; its index is a number with the values' ranks as
    digits, the first channel's the lowest. Source: Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made
    simple", section 3.1 and appendix A.1. Of an even number of levels one lies lower than those of an odd number do;
    the shift that makes room for it is atanh(offset / half) here, with which 0 stays 0, where the paper has tan.
    """

    def __init__(self, config: FSQ) -> None:
        super().__init__()
        self.config = config

    def _by_channel(self, values: list[float] | list[int], like: Tensor) -> Tensor:
        dtype = like.dtype if like.is_floating_point() else torch.int64
        return torch.tensor(values, device=like.device, dtype=dtype).view(1, -1, 1, 1)

    def _rounded(self, latents: Tensor) -> Tensor:
        """Whole numbers from -(levels // 2), with the straight-through gradient."""
        halves = [(levels - 1) * (1 - 1e-3) / 2 for levels in self.config.levels]
        offsets = [0.5 if levels % 2 == 0 else 0.0 for levels in self.config.levels]
        shifts = [math.atanh(offset / half) for offset, half in zip(offsets, halves, strict=True)]
        half, offset, shift = (self._by_channel(values, latents) for values in (halves, offsets, shifts))
        bounded = (latents + shift).tanh() * half - offset
        return bounded + (bounded.round() - bounded).detach()

    def _tokens(self, whole: Tensor) -> Tensor:
        levels = self.config.levels
        places = self._by_channel([math.prod(levels[:i]) for i in range(len(levels))], whole.long())
        return ((whole.round().long() + self._by_channel([n // 2 for n in levels], whole.long())) * places).sum(1)

    def tokens_of(self, latents: Tensor) -> Tensor:
        """Latents [batch, code_width, height, width] to indices [batch, height, width]."""
        return self._tokens(self._rounded(latents))

    def index_of(self, codes: Tensor) -> Tensor:
        """Codes as codes_of makes them to their indices."""
        return self._tokens(codes * self._by_channel([n // 2 for n in self.config.levels], codes))

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Indices [batch, height, width] to codes [batch, code_width, height, width]."""
        levels, rest, digits = self.config.levels, tokens, []
        for count in levels:
            digits.append((rest % count - count // 2) / (count // 2))
            rest = rest // count
        return torch.stack(digits, dim=1)

    def forward(self, latents: Tensor) -> Quantized:
        """Latents to their codes; there is no loss to add."""
        whole = self._rounded(latents)
        codes = whole / self._by_channel([float(n // 2) for n in self.config.levels], latents)
        return Quantized(codes, self._tokens(whole), latents.new_zeros(()))


def make_quantizer(config: QuantizerConfig) -> VectorQuantizer | FiniteScalarQuantizer:
    """The quantizer of a config; a codebook's first codes come from PyTorch's global generator, as weights do."""
    return VectorQuantizer(config) if isinstance(config, VQ) else FiniteScalarQuantizer(config)
