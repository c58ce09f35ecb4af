"""The statistics that DPM-Solver-v3 needs of a run, measured on its training digits."""

from collections.abc import Callable
from pathlib import Path

from smalti import rng
from smalti.data.digits import load_digits
from smalti.pipeline import load
from smalti.sampling.ems import EMS, estimate_ems
from smalti.types import Condition, UserError


def estimate_run_ems(
    run: Path,
    *,
    num_images: int = 256,
    num_nodes: int = 120,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EMS:
    """EMS of a run's denoiser, guided at guidance_scale (default: the run's) towards each digit's own label.

    num_images: training digits, drawn by seed. Raises UserError for a number that the digits do not have.
    """
    pipe = load(run, checkpoint=checkpoint)
    pictures, _ = load_digits()
    if not 2 <= num_images <= len(pictures):
        raise UserError(f"num_images={num_images} must lie in 2 .. {len(pictures)}, the training digits")
    x0, labels = pictures.rows(rng.permutation(len(pictures), seed=seed, purpose="ems/rows")[:num_images])
    conditional = pipe.config.model.num_classes > 0
    scale = pipe.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
    return estimate_ems(
        lambda rows: pipe.denoiser(len(rows), scale if conditional or guidance_scale is not None else 1.0),
        pipe.process,
        x0.to(pipe.device),
        Condition(class_labels=labels.to(pipe.device)) if conditional else None,
        num_nodes=num_nodes,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
