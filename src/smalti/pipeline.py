"""From a run directory to pictures: load(path) -> Pipeline. Immutable, thread-safe, no hidden state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from smalti import rng
from smalti.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from smalti.config import RunConfig
from smalti.diffusion.denoiser import NetworkDenoiser
from smalti.diffusion.processes import make_process
from smalti.images import to_pil
from smalti.models.registry import build_model
from smalti.run_folder import RunFolder, read_config
from smalti.sampling.guidance import ClassifierFreeGuidance
from smalti.sampling.plan import Plan, run_plan
from smalti.sampling.solvers import make_plan
from smalti.sampling.thresholding import ClippedDenoiser
from smalti.types import Backbone, Condition, Denoiser, UserError

_MAX_SEED = 2**63


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline call gives: the pictures and what made them.

    tensor: [batch, channels, height, width] in [-1, 1]. seeds, class_labels: one a picture.
    """

    tensor: Tensor
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    plan: Plan

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return to_pil(self.tensor)


@dataclass(frozen=True)
class Pipeline:
    """A trained network with its process and sampling defaults. Calls share nothing that changes."""

    backbone: Backbone
    config: RunConfig
    compile: bool = False

    def compiled(self) -> "Pipeline":
        """The same pipeline with its estimates (network, prediction, guidance) under torch.compile: the first call of
        each batch size compiles (tens of seconds on a CPU), later ones are faster. Results agree to rounding."""
        return replace(self, compile=True)

    def plan(
        self,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        **solver_options: Any,
    ) -> Plan:
        """The plan that a call with these arguments runs; None takes the run's default."""
        defaults = self.config.sampling
        own_solver = solver is None or solver == defaults.solver
        return make_plan(
            solver or defaults.solver,
            process=make_process(self.config.process),
            num_inference_steps=defaults.num_inference_steps if num_inference_steps is None else num_inference_steps,
            spacing=spacing or (defaults.spacing if own_solver else None),
            **solver_options,
        )

    def denoiser(self, batch_size: int, guidance_scale: float, clip_x0: bool = False) -> Denoiser:
        """The x0 estimator of batch_size samples: network, guidance (1 = off), clipping."""
        denoiser: Denoiser = NetworkDenoiser(
            self.backbone, make_process(self.config.process), self.config.objective.prediction_type
        )
        if guidance_scale != 1.0:
            null = self.backbone.null_condition(batch_size)
            if null is None:
                raise UserError(f"guidance_scale={guidance_scale}: this network is unconditional, only 1 makes sense")
            # As a tensor the scale is an input of the compiled graph and not a constant in it.
            scale = torch.tensor(guidance_scale) if self.compile else guidance_scale
            denoiser = ClassifierFreeGuidance(denoiser, null, scale)
        if clip_x0:
            denoiser = ClippedDenoiser(denoiser)
        return torch.compile(denoiser, dynamic=False) if self.compile else denoiser

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor | None = None,
        *,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
        **solver_options: Any,
    ) -> PipelineOutput:
        """Draw pictures.

        class_labels: one a picture; num_images instead for an unconditional network. guidance_scale: 1 = off.
        seed: an int (picture i takes seed + i) or one int a picture; a picture depends on its own seed and label alone.
        batch_size: pictures that share a forward. progress(done, total) is called after each batch. What is None takes
        the run's default. Raises UserError naming the argument.
        """
        labels = self._labels(class_labels, num_images)
        count = len(labels) if labels is not None else num_images or 0
        seeds = self._seeds(seed, count)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        sampling, model = self.config.sampling, self.config.model
        scale = sampling.guidance_scale if guidance_scale is None else float(guidance_scale)
        if labels is None and guidance_scale is None:
            scale = 1.0
        plan = self.plan(num_inference_steps, solver, spacing, **solver_options)
        parts = []
        device = _device_of(self.backbone)
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            row_seeds = torch.tensor(seeds[rows], device=device)
            noise = rng.normal(
                (model.in_channels, *model.image_size), seed=row_seeds, purpose="sampling/start", device=device
            )
            cond = Condition(class_labels=labels[rows].to(device)) if labels is not None else None
            denoiser = self.denoiser(len(row_seeds), scale, sampling.clip_x0)
            parts.append(run_plan(plan, denoiser, noise, cond, row_seeds))
            if progress is not None:
                progress(rows.stop, count)
        tensor = torch.cat(parts).clamp(-1, 1)
        return PipelineOutput(tensor, seeds, tuple(labels.tolist()) if labels is not None else None, plan)

    def _labels(self, class_labels: Sequence[int] | Tensor | None, num_images: int | None) -> Tensor | None:
        num_classes = self.config.model.num_classes
        if not num_classes:
            if class_labels is not None:
                raise UserError("class_labels has no effect: this network is unconditional; give num_images")
            if num_images is None or num_images < 1:
                raise UserError(f"num_images={num_images} must be at least 1 for an unconditional network")
            return None
        if class_labels is None:
            raise UserError(f"class_labels is missing: one label of 0 .. {num_classes - 1} a picture")
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.numel() == 0 or labels.is_floating_point():
            raise UserError(f"class_labels={class_labels!r} must be integers, one a picture")
        if num_images is not None and num_images != len(labels):
            raise UserError(f"num_images={num_images} contradicts the {len(labels)} class_labels")
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise UserError(f"class_labels={labels.tolist()} must lie in 0 .. {num_classes - 1}")
        return labels.long()

    def _seeds(self, seed: int | Sequence[int], count: int) -> tuple[int, ...]:
        seeds = tuple(seed + i for i in range(count)) if isinstance(seed, int) else tuple(int(s) for s in seed)
        if len(seeds) != count:
            raise UserError(f"seed has {len(seeds)} entries for {count} pictures: give one each, or one int")
        if any(not 0 <= s < _MAX_SEED for s in seeds):
            raise UserError(f"seed={seed} must lie in 0 .. 2^63 - 1")
        return seeds


def _device_of(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device if isinstance(backbone, nn.Module) else torch.device("cpu")


def _checkpoint_folder(run: RunFolder, name: str | None) -> Path:
    folders = list_checkpoints(run.checkpoints)
    if not folders:
        raise CheckpointError(f"no checkpoint in {run.checkpoints}: the run has not saved one yet")
    if name is None:
        return folders[-1]
    chosen = run.checkpoints / name
    if chosen not in folders:
        raise CheckpointError(
            f"no checkpoint {name!r} in {run.checkpoints}; there: {', '.join(f.name for f in folders)}"
        )
    return chosen


def load_backbone(path: str | Path, *, checkpoint: str | None = None, ema: bool = True) -> nn.Module:
    """The bare network of a run with its EMA weights (ema=False: the raw ones), in eval mode.

    checkpoint: a folder's name under checkpoints/, the newest by default. Raises UserError naming what is missing or
    damaged, and the older checkpoint that is whole.
    """
    run = RunFolder(Path(path))
    config = read_config(run.path)
    folder = _checkpoint_folder(run, checkpoint)
    group = "ema" if ema else "model"
    try:
        weights = read_checkpoint(folder, (group,)).tensors[group]
    except CheckpointError as error:
        older = [f.name for f in list_checkpoints(run.checkpoints) if f.name < folder.name]
        hint = f"; an older one is there: pass checkpoint={older[-1]!r}" if older else ""
        raise CheckpointError(f"{error}{hint}") from None
    model = build_model(config.model, config.seed)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def load(path: str | Path, *, checkpoint: str | None = None, ema: bool = True, device: str = "cpu") -> Pipeline:
    """The Pipeline of a run directory, ready to be called from any thread. Arguments and errors as load_backbone's."""
    backbone = load_backbone(path, checkpoint=checkpoint, ema=ema).to(device)
    assert isinstance(backbone, Backbone)
    return Pipeline(backbone, read_config(Path(path)))
