"""The statistics that DPM-Solver-v3 needs of a run, measured on its training digits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from smalti import rng
from smalti.checkpoint import list_checkpoints
from smalti.data.digits import load_digits
from smalti.errors import UserError
from smalti.pipeline import load
from smalti.run_folder import RunFolder
from smalti.sampling.ems import EMS, SECANT_WIDTH, estimate_ems
from smalti.types import Condition


def estimate_run_ems(
    run: Path,
    *,
    num_images: int = 128,
    num_nodes: int = 40,
    guidance_scale: float | None = None,
    secant_width: float = SECANT_WIDTH,
    seed: int = 0,
    batch_size: int = 64,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EMS:
    """EMS of a run's denoiser, guided at guidance_scale (default: the run's) towards each digit's own label.

    num_images: training digits, drawn by seed. num_nodes, secant_width: see sampling.ems.estimate_ems. The origin
    records the checkpoint, prediction and guidance. progress(done, total) counts nodes times batches.
    Raises UserError for a number that the digits do not have.
    """
    pipe = load(run, checkpoint=checkpoint)
    pictures, _ = load_digits()
    if not 3 <= num_images <= len(pictures):
        raise UserError(f"num_images={num_images} must lie in 3 .. {len(pictures)}, the training digits")
    x0, labels = pictures.labelled(rng.permutation(len(pictures), seed=seed, purpose="ems/rows")[:num_images])
    conditional = pipe.config.num_classes > 0
    scale = pipe.scale_or_default(guidance_scale, conditional)
    ems = estimate_ems(
        lambda rows: pipe.denoiser(len(rows), scale),
        pipe.process,
        x0.to(pipe.device),
        Condition(class_labels=labels.to(pipe.device)) if conditional else None,
        num_nodes=num_nodes,
        secant_width=secant_width,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    origin = replace(
        ems.origin,
        prediction_type=pipe.config.objective.prediction_type,
        checkpoint=checkpoint or list_checkpoints(RunFolder(run).checkpoints)[-1].name,
        guidance_scale=scale,
    )
    return replace(ems, origin=origin)
