"""The arguments of the commands that judge samples; the docstrings are what `smalti COMMAND --help` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Sampler:
    """How to sample; what is not given is the run's own."""

    solver: str | None = None
    """Solver, such as dpmpp_2m, ddim, unipc_2, edm_heun; `smalti explain` lists all (default: the run's)."""
    num_inference_steps: int | None = None
    """Solver steps (default: the run's)."""
    spacing: str | None = None
    """Time grid: time, lambda, karras, quadratic, beta, ays ... (default: the run's, or the solver's own)."""
    solver_options: tuple[str, ...] = ()
    """The solver's own options and the grid's as name=value: eta=1 lower_order_final=false shift=3 t_end=0.01."""
    process: str | None = None
    """Sample on another process than was trained on, at equal log-SNR: edm, vp_cosine ... (default: the run's)."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off (default: the run's)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only for t between LOW and HIGH (0 is data, 1 is noise)."""
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None
    """How the scale runs from t = 1 to 0, with the given scale as its mean."""
    guidance_rescale: float | None = None
    """Keep the unguided contrast by this share, 0 to 1 (Lin et al. 2023)."""
    apg_eta: float | None = None
    """Projected guidance with this share of the parallel part; 0 is perpendicular guidance."""
    pag_scale: float | None = None
    """Perturbed-attention guidance, in the layers of --pag-layers."""
    pag_layers: tuple[int, ...] = ()
    """Layers (from 0) whose attention is perturbed."""


@dataclass(frozen=True)
class Eval:
    """Judge a run: do its pictures show what was asked for, and how far are they from real ones?

    Example: smalti eval runs/mnist --guidance-scale 2 --guidance-interval 0.3 1

    Draws class-conditional samples and prints the judge's accuracy on them and the Frechet distance in the judge's
    features against the held-out digits, each with a bootstrap 95 % interval. The judge is a small classifier, trained
    once on the bundled digits (about a minute) and cached. Other pictures with classes get a judge of their own.

    Of a run that reads prompts: how often a judge of pictures and captions, trained once on the run's own data and
    cached, puts a picture's own prompt among the first 10 of 200; RUN/prompts.png shows 48 of them.

    Of every run: --metrics of the features that --features computes, against the run's held-out rows, and how near the
    samples lie to training rows. Each figure is a card in RUN/evaluation.json (docs/evaluation.md), which
    `smalti compare-cards` reads; RUN/nearest.png shows the samples nearest to training rows above those rows.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    num_images: int = 1000
    """Samples to judge, an equal number of each class or prompt."""
    features: Literal["judge", "pixels", "inception", "dinov2", "clip"] = "judge"
    """What computes the features; judge and pixels need no download."""
    weights: str | None = None
    """Of --features inception: the weights' file; dinov2 and clip: a folder or a hub's owner/name."""
    metrics: tuple[Literal["fd", "kid", "precision", "recall", "density", "coverage", "memorisation"], ...] = ()
    """What to measure (default: all that there are enough samples and rows for)."""
    reference: Literal["held-out", "training"] | None = None
    """Against which rows (default: held-out ones, or training rows where fewer than 500 are held out)."""
    sampler: Sampler = Sampler()
    seed: int = 0
    """Seed of the first sample."""
    checkpoint: str | None = None
    """A folder's name under checkpoints/ (default: the newest)."""
    threads: int | None = None
    """CPU threads (default: all cores)."""


@dataclass(frozen=True)
class CompareCards:
    """Compare two evaluations: which run is better, where the intervals tell?

    Example: smalti compare-cards runs/a runs/b

    Reads the cards that `smalti eval` wrote. Cards of another feature network, reference or (where a metric's bias
    depends on it) number of samples are refused, with what differs.
    """

    a: Annotated[Positional[Path], arg(metavar="A")]
    """A run directory or an evaluation.json."""
    b: Annotated[Positional[Path], arg(metavar="B")]
    """The other."""
