"""From a run directory to pictures: load(path) -> Pipeline. Immutable, thread-safe, no hidden state."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from smalti import rng
from smalti.autoencoders.protocol import Autoencoder, Tokenizer
from smalti.autoencoders.registry import TokenizerConfig, load_autoencoder, load_tokenizer
from smalti.conditioning.encoders import build_text_encoder
from smalti.conditioning.prompted import PromptedNetwork
from smalti.conditioning.tiny import CaptionTokenizer
from smalti.config import RunConfig, SamplingConfig
from smalti.data.latents import LatentStatistics
from smalti.diffusion.denoiser import MaskedDenoiser, NetworkDenoiser
from smalti.diffusion.masking import Masking
from smalti.diffusion.prediction import usable_at_pure_noise
from smalti.diffusion.processes import Process, make_process
from smalti.diffusion.switch import SwitchedDenoiser
from smalti.errors import UserError
from smalti.images import to_pil
from smalti.interop.load import load_backbone
from smalti.pipeline_arguments import PromptEncoder, checked_seeds, to_move_away_from, wanted_pictures
from smalti.pipeline_editing import Editing, tokens_at_start
from smalti.run_folder import RunFolder, read_config
from smalti.sampling.compiled import CompiledDenoiser, CompiledEstimate, compiled_estimate
from smalti.sampling.editing import InpaintDenoiser, noised, strength_to_start
from smalti.sampling.guidance import perturbed_attention
from smalti.sampling.guided import GuidanceOptions, guide
from smalti.sampling.masked import MASKED_SOLVER, MaskedPlan, check_masked_options, masked_plan
from smalti.sampling.plan import AnyPlan, run_plan, run_plans
from smalti.sampling.solvers import check_option_names, make_plan
from smalti.sampling.thresholding import ClippedDenoiser
from smalti.types import MASKED, Backbone, Condition, Denoiser

Value = TypeVar("Value")
Decoder = Callable[[Tensor], Tensor]
"""Latents as the network denoises them to pictures in [-1, 1]."""


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline call gives: the pictures and what made them.

    tensor: [batch, channels, height, width] in [-1, 1]. seeds, class_labels, prompts, plans: one a picture.
    """

    tensor: Tensor
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    prompts: tuple[str, ...] | None
    plans: tuple[AnyPlan, ...]

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return to_pil(self.tensor)

    @property
    def plan(self) -> AnyPlan:
        """The plan of the first picture, which is that of all unless the batch was mixed."""
        return self.plans[0]


@dataclass(frozen=True)
class ImageRequest:
    """One picture of a mixed batch. None takes the run's default.

    class_label or prompt: as the network takes, neither for an unconditional one. solver_options: what Pipeline.plan
    takes beside the named fields, such as {"eta": 1.0, "shift": 3.0}.
    """

    class_label: int | None = None
    seed: int = 0
    solver: str | None = None
    num_inference_steps: int | None = None
    spacing: str | None = None
    guidance_scale: float | None = None
    solver_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prompt: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """A trained network with its process and sampling defaults. Calls share nothing that changes.

    encode_prompts: for a network that reads text. decode: for one that denoises latents. sampled_process: the process
    to sample on, where it is not the one trained on (see diffusion.switch). tokenizer: of a masked model, whose
    estimates are logits and whose plans are sampling.masked's.
    """

    backbone: Backbone
    config: RunConfig
    encode_prompts: PromptEncoder | None = None
    decode: Decoder | None = None
    compile: bool = False
    sampled_process: str | None = None
    tokenizer: Tokenizer | None = None

    def compiled(self) -> "Pipeline":
        """The same pipeline with its estimates (network, prediction, guidance) under torch.compile: the first call of
        each batch size compiles (tens of seconds on a CPU), later ones are faster. Results agree to rounding."""
        return replace(self, compile=True)

    def on_process(self, name: str | None) -> "Pipeline":
        """The network sampled on another process, by matching log-SNR; None: as it is. UserError where it cannot be."""
        if name is not None and (self.tokenizer is not None or isinstance(make_process(name), Masking)):
            raise UserError(f"process={name!r}: masked models and others cannot be sampled on each other's processes")
        return self if name is None else replace(self, sampled_process=name)

    @cached_property
    def process(self) -> Process:
        """The process that is sampled on."""
        return make_process(self.sampled_process or self.config.process)

    def plan(
        self,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        **solver_options: Any,
    ) -> AnyPlan:
        """The plan that a call with these arguments runs; None takes the run's default.

        solver_options: t_start, t_end, shift, times (the grid itself) and the solver's own, see sampling.make_plan;
        of a masked model those of sampling.masked_plan.
        """
        defaults = self.config.sampling
        if isinstance(self.process, Masking):
            return _masked_plan(self.process, defaults, num_inference_steps, solver, spacing, solver_options)
        if solver == MASKED_SOLVER:
            raise UserError(f"solver={solver!r} decodes tokens: this network denoises; take {defaults.solver!r}")
        check_option_names(solver or defaults.solver, solver_options)
        own_solver = solver is None or solver == defaults.solver
        gridded = solver_options.get("times") is not None
        steps = defaults.num_inference_steps if num_inference_steps is None and not gridded else num_inference_steps
        plan = make_plan(
            solver or defaults.solver,
            process=self.process,
            num_inference_steps=steps,
            spacing=spacing or (defaults.spacing if own_solver and not gridded else None),
            **solver_options,
        )
        alpha_start = float(self.process.alpha(torch.tensor(float(plan.times[0]), dtype=torch.float64)))
        prediction = self.config.objective.prediction_type
        if alpha_start == 0.0 and self.sampled_process is None and not usable_at_pure_noise(prediction):
            raise UserError(f"t_start={plan.times[0]} is pure noise, where a network of {prediction!r} knows no x0")
        return plan

    def denoiser(
        self,
        batch_size: int,
        guidance_scale: float | Tensor,
        guidance: GuidanceOptions | None = None,
        negative: Condition | None = None,
    ) -> Denoiser:
        """The x0 estimator of batch_size samples: network, process switch, guidance (1 = off), clipping.

        guidance_scale: a number or one a sample. negative: what to move away from, a row a sample, in place of the
        network's null condition.
        """
        options = guidance or self.config.sampling.guidance
        network = self.unguided()
        perturbed = self._perturbed(options.pag_layers) if options.pag_scale else None
        denoiser = self.guided(network, batch_size, guidance_scale, options, negative, perturbed)
        return CompiledDenoiser(denoiser, self._compiled_estimate) if self.compile else denoiser

    def unguided(self) -> Denoiser:
        """The x0 estimator of network and process alone."""
        if self.tokenizer is not None:
            return MaskedDenoiser(self.backbone, self.process)
        return self._on_sampled_process(self._network_denoiser())

    def guided(
        self,
        denoiser: Denoiser,
        batch_size: int,
        guidance_scale: float | Tensor,
        options: GuidanceOptions,
        negative: Condition | None = None,
        perturbed: Denoiser | None = None,
    ) -> Denoiser:
        """denoiser() around another estimator than the network's own, such as a server's that shares its forwards.

        perturbed: the estimator with identity attention, which options.pag_scale needs.
        """
        null = None
        if isinstance(guidance_scale, Tensor) or guidance_scale != 1.0:
            null = self.null_condition(batch_size) if negative is None else negative
            if null is None:
                scale = guidance_scale if isinstance(guidance_scale, float | int) else "one a picture"
                raise UserError(f"guidance_scale={scale}: this network is unconditional, only 1 makes sense")
        if self.compile and null is not None and not isinstance(guidance_scale, Tensor):
            # As a tensor the scale is an input of the compiled graph and not a constant in it.
            guidance_scale = torch.full((batch_size,), guidance_scale)
        guided = guide(denoiser, null, guidance_scale, options, self.process, perturbed)
        return ClippedDenoiser(guided) if self.config.sampling.clip_x0 else guided

    def _network_denoiser(self) -> NetworkDenoiser:
        trained = make_process(self.config.process)
        return NetworkDenoiser(self.backbone, trained, self.config.objective.prediction_type)

    def _on_sampled_process(self, denoiser: NetworkDenoiser) -> Denoiser:
        return SwitchedDenoiser(denoiser, denoiser.process, self.process) if self.sampled_process else denoiser

    def _perturbed(self, layers: tuple[int, ...]) -> Denoiser:
        return self._on_sampled_process(perturbed_attention(self._network_denoiser(), layers))

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceOptions | None = None,
        negative_class_labels: Sequence[int] | Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        editing: Editing | None = None,
        image_size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
        **solver_options: Any,
    ) -> PipelineOutput:
        """Draw pictures.

        class_labels: one a picture; prompts for a network that reads text, one a picture or one for num_images;
        num_images alone for an unconditional network. guidance_scale: 1 = off; guidance: interval, schedule and method;
        negative_class_labels, negative_prompt: one for all or one a picture, in place of the null label or prompt.
        editing: a picture to begin from, and what of it to keep. image_size: height and width, for a network that takes
        others than its own (of the latents, where it denoises latents). seed: an int (picture i takes seed + i) or one
        int a picture; a picture depends on its own seed and label or prompt alone. batch_size: pictures that share a
        forward. progress(done, total) is called after each batch. solver_options: as in plan(). What is None takes the
        run's default. Raises UserError naming the argument.
        """
        num_classes, encode = self.num_classes, self.encode_prompts
        wanted = wanted_pictures(class_labels, prompts, num_images, num_classes, encode)
        count = wanted.count
        seeds = checked_seeds(seed, count)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        negative = to_move_away_from(negative_class_labels, negative_prompt, count, num_classes, encode)
        scale = self.scale_or_default(guidance_scale, wanted.cond is not None)
        if editing is not None:
            if self.decode is not None:  # a tokenizer can, see at_start
                raise UserError("editing: this network denoises latents, of which pictures cannot be edited yet")
            editing.check(count)
        if editing is not None and editing.strength != 1.0:
            if solver_options.get("t_start") is not None:
                raise UserError(
                    f"t_start={solver_options['t_start']} and strength={editing.strength} both say where to begin: "
                    "give one of them"
                )
            solver_options["t_start"] = strength_to_start(self.process, editing.strength)
        plan = self.plan(num_inference_steps, solver, spacing, **solver_options)
        parts = []
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            row_seeds = torch.tensor(seeds[rows], device=self.device)
            noise = self.start_noise(row_seeds, image_size)
            cond = self._rows_of(wanted.cond, rows)
            denoiser = self.denoiser(len(row_seeds), scale, guidance, self._rows_of(negative, rows))
            x = self.at_start(plan, noise, editing, rows, row_seeds)
            denoiser = self.inpainting(denoiser, editing, rows, noise)
            parts.append(self.pictures(run_plan(plan, denoiser, x, cond, row_seeds)))
            if progress is not None:
                progress(rows.stop, count)
        return PipelineOutput(torch.cat(parts), seeds, wanted.class_labels, wanted.prompts, (plan,) * count)

    @torch.inference_mode()
    def mixed(
        self,
        requests: Sequence[ImageRequest],
        *,
        guidance: GuidanceOptions | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PipelineOutput:
        """Draw a batch whose members have their own solvers, steps, guidance scales and seeds, in shared forwards.

        Each picture is the one that its request gives alone, up to the rounding of other batch sizes.
        progress(done, total) counts forwards. Raises UserError naming the argument.
        """
        if not requests:
            raise UserError("requests is empty: give at least one")
        labels = _all_or_none("class_label", [request.class_label for request in requests])
        prompts = _all_or_none("prompt", [request.prompt for request in requests])
        num_images = None if labels or prompts else len(requests)
        wanted = wanted_pictures(labels, prompts, num_images, self.num_classes, self.encode_prompts)
        seeds = checked_seeds([request.seed for request in requests], len(requests))
        conditional = wanted.cond is not None
        scales = torch.tensor(
            [self.scale_or_default(r.guidance_scale, conditional) for r in requests], device=self.device
        )
        by_settings: dict[Any, AnyPlan] = {}
        plans = []
        for r in requests:
            key = _plan_key(r)
            if key not in by_settings:
                check_option_names(r.solver or self.config.sampling.solver, r.solver_options)
                by_settings[key] = self.plan(r.num_inference_steps, r.solver, r.spacing, **r.solver_options)
            plans.append(by_settings[key])
        all_seeds = torch.tensor(seeds, device=self.device)
        noise = self.start_noise(all_seeds)
        x = torch.cat(
            [
                self.at_start(plan, noise[i : i + 1], None, slice(i, i + 1), all_seeds[i : i + 1])
                for i, plan in enumerate(plans)
            ]
        )
        guided = bool((scales != 1).any())

        def denoiser_for(rows: Tensor) -> Denoiser:
            return self.denoiser(len(rows), scales[rows] if guided else 1.0, guidance)

        cond = self._rows_of(wanted.cond, slice(None))
        tensor = self.pictures(run_plans(plans, denoiser_for, x, cond, all_seeds, progress))
        return PipelineOutput(tensor, seeds, wanted.class_labels, wanted.prompts, tuple(plans))

    @cached_property
    def _compiled_estimate(self) -> CompiledEstimate:
        return compiled_estimate()

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.backbone.parameters()).device if isinstance(self.backbone, nn.Module) else torch.device("cpu")

    @cached_property
    def picture_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is drawn at the run's own size."""
        model = self.config.model
        height, width = model.image_size
        if self.tokenizer is not None:
            return self.tokenizer.in_channels, height * self.tokenizer.factor, width * self.tokenizer.factor
        if self.decode is None:
            return model.in_channels, height, width
        with torch.inference_mode():
            picture = self.pictures(torch.zeros(1, model.in_channels, height, width, device=self.device))
        return picture.shape[1], picture.shape[2], picture.shape[3]

    @property
    def num_classes(self) -> int:
        """Labels that the network takes; 0 where it takes none."""
        return int(getattr(self.config.model, "num_classes", 0))

    def null_condition(self, batch_size: int) -> Condition | None:
        """The condition that says nothing, a row a sample; None from an unconditional network."""
        if self.encode_prompts is None:
            return self.backbone.null_condition(batch_size)
        empty = self.encode_prompts([""]).to(self.device)
        return empty.map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    def _rows_of(self, cond: Condition | None, rows: slice) -> Condition | None:
        return None if cond is None else cond.map(lambda tensor: tensor[rows].to(self.device))

    def pictures(self, x: Tensor) -> Tensor:
        """What a network denoises, [batch, ...], as pictures in [-1, 1]."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(x).clamp(-1, 1)
        return (x if self.decode is None else self.decode(x)).clamp(-1, 1)

    def start_noise(self, seeds: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Noise of variance 1 for each of seeds [batch], of the shape that the network denoises; tokens all masked."""
        model = self.config.model
        if self.tokenizer is not None:
            return torch.full((len(seeds), *(image_size or model.image_size)), MASKED, device=self.device)
        shape = (model.in_channels, *(image_size or model.image_size))
        return rng.normal(shape, seed=seeds, purpose="sampling/start", device=self.device)

    def at_start(self, plan: AnyPlan, noise: Tensor, editing: Editing | None, rows: slice, seeds: Tensor) -> Tensor:
        """Where a plan begins, from start_noise() of seeds [batch] and, where there is one, the rows of an editing.

        alpha x0 + sigma noise at the plan's first time; without a picture x0 is 0. Of tokens: tokens_at_start.
        """
        if isinstance(plan, MaskedPlan):
            if editing is None:
                return noise
            assert self.tokenizer is not None
            return tokens_at_start(plan, self.tokenizer, self.config.model.image_size, editing, rows, seeds)
        t = float(plan.times[0])
        if editing is None or editing.strength == 1.0:
            return float(self.process.sigma(torch.tensor(t, dtype=torch.float64))) * noise
        return noised(self.process, editing.images(rows, noise), t, noise)

    def inpainting(self, denoiser: Denoiser, editing: Editing | None, rows: slice, noise: Tensor) -> Denoiser:
        """The denoiser, keeping what an editing's mask keeps, if it has one; a masked model keeps tokens by itself."""
        if editing is None or editing.mask is None or self.tokenizer is not None:
            return denoiser
        return InpaintDenoiser(denoiser, self.process, editing.images(rows, noise), editing.masks(rows, noise), noise)

    def scale_or_default(self, guidance_scale: float | None, conditional: bool) -> float:
        """The guidance scale asked for, or the run's; 1 without a condition."""
        if guidance_scale is None:
            return self.config.sampling.guidance_scale if conditional else 1.0
        return float(guidance_scale)


def _masked_plan(
    process: Masking,
    defaults: SamplingConfig,
    num_inference_steps: int | None,
    solver: str | None,
    spacing: str | None,
    options: Mapping[str, Any],
) -> MaskedPlan:
    if solver not in (None, MASKED_SOLVER):
        raise UserError(f"solver={solver!r} is for noise: this network predicts masked tokens, its solver is 'masked'")
    if spacing not in (None, defaults.spacing):
        raise UserError(f"spacing={spacing!r} has no effect on masked tokens: leave it out")
    check_masked_options(options)
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    given = {name: value for name, value in options.items() if value is not None}
    own = {"temperature": defaults.temperature, "choice_temperature": defaults.choice_temperature}
    return masked_plan(process, steps, **{**own, **given})


def _all_or_none(name: str, given: Sequence[Value | None]) -> list[Value] | None:
    """What requests set where all do, None where none does. Raises UserError where only some do."""
    present = [value for value in given if value is not None]
    if present and len(present) != len(given):
        raise UserError(f"{name} is set in some requests and missing in others")
    return present or None


def _plan_key(request: ImageRequest) -> tuple[Any, ...]:
    """Equal for requests of one plan."""
    # As text, since True == 1 and only one of them is an option's value; lists, since an array's text leaves some out.
    options = tuple(sorted((name, repr(np.asarray(v).tolist())) for name, v in request.solver_options.items()))
    return request.num_inference_steps, request.solver, request.spacing, options


def load(path: str | Path, *, checkpoint: str | None = None, ema: bool = True, device: str = "cpu") -> Pipeline:
    """The Pipeline of a run directory, ready to be called from any thread. Arguments and errors as load_backbone's."""
    backbone = load_backbone(path, checkpoint=checkpoint, ema=ema).to(device)
    assert isinstance(backbone, Backbone)
    config = read_config(Path(path))
    folder = RunFolder(Path(path))
    prompts = prompt_encoder(config, backbone, folder)
    if isinstance(config.autoencoder, TokenizerConfig):
        return Pipeline(backbone, config, prompts, tokenizer=load_tokenizer(config.autoencoder, device))
    autoencoder = load_autoencoder(config.autoencoder, device)
    decode = None if autoencoder is None else latent_decoder(autoencoder, read_statistics(folder.latents))
    return Pipeline(backbone, config, prompts, decode)


def read_statistics(path: Path) -> LatentStatistics:
    """The mean and standard deviation of a run's latents. Raises UserError where they are missing or damaged."""
    try:
        return LatentStatistics.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: without it latents cannot be decoded ({error})") from None


def latent_decoder(autoencoder: Autoencoder, statistics: LatentStatistics) -> Decoder:
    """Latents as a network sees them, of mean 0 and standard deviation 1 a channel, to pictures."""
    return lambda latents: autoencoder.decode(statistics.denormalise(latents))


def prompt_encoder(config: RunConfig, backbone: Backbone, folder: RunFolder) -> PromptEncoder | None:
    """What encodes prompts for a run's network: its own text encoder or the pretrained ones; None where it reads none.

    Raises UserError where the run's tokenizer is missing or a pretrained encoder is not to be had.
    """
    if config.text is None:
        return None
    if isinstance(backbone, PromptedNetwork):
        return own_prompt_encoder(backbone, read_tokenizer(folder))
    assert isinstance(backbone, nn.Module)
    return build_text_encoder(config.text, next(backbone.parameters()).device)


def read_tokenizer(folder: RunFolder) -> CaptionTokenizer:
    """The tokenizer of a run's own text encoder. Raises UserError where it is missing or damaged."""
    if not folder.tokenizer.is_file():
        raise UserError(f"{folder.tokenizer} is missing: without it the run's text encoder cannot read prompts")
    return CaptionTokenizer(folder.tokenizer.read_text())


def own_prompt_encoder(network: PromptedNetwork, tokenizer: CaptionTokenizer) -> PromptEncoder:
    """Prompts to the condition that the text encoder trained along with the network makes of them."""

    @torch.inference_mode()
    def encode(prompts: Sequence[str]) -> Condition:
        return network.encode(tokenizer.encode(prompts).to(next(network.parameters()).device))

    return encode
