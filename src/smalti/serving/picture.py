"""One picture in flight: its trajectory, what it asks of the network next, and its state as bytes.

A guided, clipped or inpainted estimate is a denoiser around the network's (sampling/). The engine shares one forward
between many pictures, so each of them is stepped in two halves: `question` runs its denoiser up to where the network is
asked and gives what it asks, `advance` runs it again with the network's answer. Denoisers are pure, so both runs agree.
Any guidance that asks the network once a step works, and nothing is written per method.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from smalti.diffusion.denoiser import x0_and_variance
from smalti.errors import UserError
from smalti.images import decode_picture
from smalti.pipeline import Pipeline
from smalti.pipeline_arguments import checked_seeds, to_move_away_from, wanted_pictures
from smalti.pipeline_editing import Editing
from smalti.sampling.editing import strength_to_start
from smalti.sampling.masked import MaskedTrajectories
from smalti.sampling.plan import AnyPlan, Trajectories, trajectories
from smalti.sampling.wrapped import Estimator, x0_alone
from smalti.serving.messages import PictureOrder
from smalti.types import Condition, Denoiser


@dataclass(frozen=True)
class Question:
    """What one picture asks of the network: x [rows, ...], t [rows], and a condition of as many rows, or none."""

    x: Tensor
    t: Tensor
    cond: Condition | None
    learned_variance: bool

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for questions that one forward can answer."""
        cond = () if self.cond is None else tuple(sorted(_shapes(self.cond).items()))
        return tuple(self.x.shape[1:]), self.x.dtype, cond, self.learned_variance


@dataclass(frozen=True)
class Answer:
    """The network's x0 estimate for a question [rows, ...], and its variance logits where they were asked for.

    A masked model's estimate is its logits [rows, codebook, height, width].
    """

    x0: Tensor
    variance_logits: Tensor | None


def _shapes(cond: Condition) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape[1:]) for name, v in vars(cond).items() if v is not None}


class _Asked(Exception):
    """Carries a question out of the denoisers that surround the network."""

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question


@dataclass(frozen=True)
class _Stand:
    """Stands where the network would: asks by raising _Asked, or gives the answer that it was made with."""

    answer: Answer | None = None

    def _estimate(self, x: Tensor, t: Tensor, cond: Condition | None, learned_variance: bool) -> Answer:
        if self.answer is None:
            raise _Asked(Question(x, t, cond, learned_variance))
        assert len(self.answer.x0) == len(x)
        return self.answer

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        return self._estimate(x, t, cond, False).x0

    def with_variance(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        answer = self._estimate(x, t, cond, True)
        assert answer.variance_logits is not None
        return answer.x0, answer.variance_logits


@dataclass
class Picture:
    """A picture's trajectory and the denoiser around the network that it is drawn with. Stepped by one thread."""

    pipeline: Pipeline
    trajectory: Trajectories | MaskedTrajectories
    cond: Condition | None
    guidance_scale: float
    negative: Condition | None
    editing: Editing | None
    noise: Tensor  # at the start [1, ...]
    rows: int  # of a forward that it takes
    finite: bool = True  # whether the last estimate was

    @property
    def plan(self) -> AnyPlan:
        """Its solver's table."""
        return self.trajectory.plan

    @property
    def call(self) -> int:
        """Network calls behind it."""
        return self.trajectory.call

    @property
    def calls_left(self) -> int:
        """Network calls before it."""
        return self.plan.num_calls - self.trajectory.call

    def _estimator(self) -> Estimator:
        return x0_and_variance if self.plan.noise_log_ratio is not None else x0_alone

    def _around(self, network: Denoiser) -> Denoiser:
        options = self.pipeline.config.sampling.guidance
        denoiser = self.pipeline.guided(network, 1, self.guidance_scale, options, self.negative)
        return self.pipeline.inpainting(denoiser, self.editing, slice(0, 1), self.noise)

    def question(self) -> Question:
        """What it asks of the network next."""
        try:
            self._estimator()(self._around(_Stand()), self.trajectory.x, self.trajectory.t, self.cond)
        except _Asked as asked:
            return asked.question
        raise AssertionError("a denoiser did not ask its network")

    def advance(self, answer: Answer) -> Tensor:
        """Take the answer and go on to the next call; gives the call's x0, or tokens, [1, ...]."""
        denoiser = self._around(_Stand(answer))
        estimate, logits = self._estimator()(denoiser, self.trajectory.x, self.trajectory.t, self.cond)
        self.finite = bool(torch.isfinite(estimate).all())
        return self.trajectory.advance(estimate, logits)

    def is_finite(self) -> bool:
        """Whether its state and the last estimate have neither NaN nor infinity."""
        return self.finite and all(
            register is None or bool(torch.isfinite(register).all()) for register in self.trajectory.registers()
        )

    def state(self) -> bytes:
        """Where it is, to go on from in another process."""
        registers = [None if r is None else r.cpu().numpy().tobytes() for r in self.trajectory.registers()]
        return msgspec.msgpack.encode((self.call, registers))

    def go_on_from(self, state: bytes) -> None:
        """Take the place that `state` was made at, by a picture of the same order. Raises UserError where it is not."""
        like = self.trajectory.x
        shape, device, dtype = tuple(like.shape), like.device, like.cpu().numpy().dtype
        try:
            call, parts = msgspec.msgpack.decode(state, type=tuple[int, list[bytes | None]])
            arrays = [None if p is None else np.frombuffer(p, dtype).reshape(shape).copy() for p in parts]
        except (msgspec.MsgspecError, ValueError) as error:
            raise UserError(f"resume: the checkpoint does not fit the picture ({error})") from None
        if not 0 <= call < self.plan.num_calls or len(arrays) != len(self.plan.registers) or arrays[0] is None:
            raise UserError(f"resume: the checkpoint is of another plan ({call} calls, {len(arrays)} registers)")
        registers = [None if array is None else torch.from_numpy(array).to(device) for array in arrays]
        self.trajectory.go_on_from(call, registers)


def prepare(pipeline: Pipeline, order: PictureOrder, plans: dict[tuple[object, ...], AnyPlan]) -> Picture:
    """The picture that an order asks for, at its start.

    plans: made already, by what they were asked by; a new one is added. Raises UserError naming the order's field.
    """
    if pipeline.config.sampling.guidance.pag_scale:
        raise UserError("guidance pag_scale: perturbed attention asks two networks a step, which a server cannot batch")
    prompts = None if order.prompt is None else [order.prompt]
    labels = None if order.class_label is None else [order.class_label]
    conditional = pipeline.encode_prompts is not None or pipeline.num_classes > 0
    wanted = wanted_pictures(labels, prompts, None if conditional else 1, pipeline.num_classes, pipeline.encode_prompts)
    seeds = torch.tensor(checked_seeds([order.seed], 1), device=pipeline.device)
    negative = to_move_away_from(None, order.negative_prompt, 1, pipeline.num_classes, pipeline.encode_prompts)
    scale = pipeline.scale_or_default(order.guidance_scale, wanted.cond is not None)
    if not np.isfinite(scale):
        raise UserError(f"guidance_scale={scale} must be finite")
    editing = _editing(pipeline, order)
    plan = _plan(pipeline, order, editing, plans)
    noise = pipeline.start_noise(seeds, order.image_size)
    rows = torch.zeros(1, dtype=torch.int64, device=pipeline.device)
    start = pipeline.at_start(plan, noise, editing, slice(0, 1), seeds)
    trajectory = trajectories(plan, rows, seeds, start)
    cond = None if wanted.cond is None else wanted.cond.to(pipeline.device)
    picture = Picture(pipeline, trajectory, cond, scale, negative, editing, noise, rows=1)
    picture.rows = len(picture.question().x)
    return picture


def _editing(pipeline: Pipeline, order: PictureOrder) -> Editing | None:
    """The picture that an order begins from. Raises UserError."""
    if order.source is None:
        if order.mask is not None or order.strength != 1.0:
            raise UserError("mask and strength need a source picture")
        return None
    if pipeline.decode is not None:
        raise UserError("source: this network denoises latents, of which pictures cannot be edited yet")
    channels, height, width = pipeline.picture_shape
    size = order.image_size or (height, width)
    image = decode_picture(order.source, "source", channels, size)
    mask = None if order.mask is None else (decode_picture(order.mask, "mask", 1, size) + 1) / 2
    return Editing(image, order.strength, mask)


def _plan(
    pipeline: Pipeline, order: PictureOrder, editing: Editing | None, plans: dict[tuple[object, ...], AnyPlan]
) -> AnyPlan:
    options = dict(order.solver_options)
    if editing is not None and editing.strength != 1.0:
        if options.get("t_start") is not None:
            raise UserError(f"t_start={options['t_start']} and strength={order.strength}: give one of them")
        options["t_start"] = strength_to_start(pipeline.process, order.strength)
    key = (order.num_inference_steps, order.solver, order.spacing, msgspec.json.encode(sorted(options.items())))
    if key not in plans:
        plans[key] = pipeline.plan(order.num_inference_steps, order.solver, order.spacing, **options)
    return plans[key]
