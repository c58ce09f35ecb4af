"""The arguments of train-autoencoder and train-tokenizer; the docstrings are what their --help prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class ReconstructionArguments:
    """What both have."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """What `smalti data show` takes."""
    out: Path = Path("runs/autoencoder")
    """The folder to write."""
    size: tuple[int, int] = (64, 64)
    """Height and width of the pictures. What is trained takes others too."""
    channels: Literal[1, 3] = 3
    """1 (grey) or 3 (RGB)."""
    minutes: float | None = None
    """Budget: minutes of training (default: 3). Give at most one budget."""
    steps: int | None = None
    """Budget: optimiser steps."""
    epochs: float | None = None
    """Budget: passes over the pictures."""
    factor: int = 4
    """Pixels a latent or token, along each side: 2, 4, 8 or 16."""
    width: int = 48
    """Channels at half the pictures' size, a multiple of 8."""
    batch_size: int = 16
    """Pictures a step."""
    learning_rate: float = 2e-3
    """AdamW's, before its cosine decay."""
    gradient_weight: float = 0.5
    """Of the term that compares edges."""
    seed: int = 0
    """Of weights, noise and the order of pictures."""
    overwrite: bool = False
    """Replace what such a command left in --out."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class TrainAutoencoder(ReconstructionArguments):
    """Train a small autoencoder on your own pictures, for latent diffusion without a download.

    Example: smalti train-autoencoder emoji --size 64 64 --minutes 10 --out runs/autoencoder

    A convolutional encoder and decoder of a million weights with a small KL term. Prints the PSNR of held-out pictures
    before and after; reconstructions.png shows them above their reconstructions. Ctrl-C stops and keeps what is there.
    Then: smalti data cache SOURCE --encoder runs/autoencoder.
    """

    latent_channels: int = 4
    """Channels of a latent."""
    kl_weight: float = 1e-4
    """Of the KL term: more makes latents smoother and reconstructions blurrier."""


@dataclass(frozen=True)
class TrainTokenizer(ReconstructionArguments):
    """Train a small tokenizer on your own pictures: a picture becomes a grid of integers, for masked image models.

    Examples: smalti train-tokenizer digits --size 28 28 --channels 1 --out runs/tokenizer
              smalti train-tokenizer emoji --quantizer fsq --levels 8 5 5 5 --minutes 10

    A convolutional encoder and decoder of a million weights, and a codebook between them: vq learns its codes, fsq
    rounds each channel to a few values and cannot lose codes. Prints the PSNR of held-out pictures before and after,
    how many codes they use and their perplexity (the number of codes that would be as uneven if all were used alike),
    and says so where the codebook has collapsed; reconstructions.png shows pictures above their reconstructions.
    Ctrl-C stops and keeps what is there. See docs/masked.md.
    """

    out: Path = Path("runs/tokenizer")
    """The folder to write."""
    quantizer: Literal["vq", "fsq"] = "vq"
    """How a latent becomes one of finitely many codes."""
    codebook_size: int = 256
    """vq: codes."""
    code_width: int = 8
    """vq: channels of a code."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """vq: by which the nearest code is found; cosine compares directions alone."""
    commitment: float = 0.25
    """vq: weight of the loss that draws latents to their codes."""
    restart_below: float = 0.03
    """vq: a code used less than this share of the mean use begins anew at a latent of the batch; 0: never."""
    levels: tuple[int, ...] = (8, 6, 5)
    """fsq: values of each channel; their product is the number of codes, as 8 5 5 5 for 1,000."""
