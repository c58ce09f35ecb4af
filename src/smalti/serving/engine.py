"""The engine: one network on one device, and all pictures that it draws, a network call of many of them at a time.

A tick chooses pictures (scheduling.py), asks each what it wants of the network, runs one forward over all of it, and
gives each its answer. Pictures may be at any step of any plan with any solver and guidance. Where a forward fails, it
is tried again in halves, so that a picture which cannot be drawn fails alone. An engine belongs to one thread.
"""

import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from smalti import __version__
from smalti.diffusion.denoiser import x0_and_variance
from smalti.errors import UserError
from smalti.images import to_pil
from smalti.pipeline import Pipeline
from smalti.rng import widest_float
from smalti.sampling.plan import AnyPlan
from smalti.serving.checkpoint_slots import CheckpointSlots
from smalti.serving.faults import Faults
from smalti.serving.messages import (
    Admitted,
    Draw,
    Failed,
    FailureCode,
    Finished,
    ModelCard,
    PictureEvent,
    PictureOrder,
    Preview,
    Tick,
)
from smalti.serving.picture import Answer, Picture, Question, prepare
from smalti.serving.receipts import receipt_of, stamp
from smalti.serving.scheduling import Candidate, FairClock, SchedulingSettings, choose
from smalti.types import Condition, Denoiser, concat_conditions

_log = logging.getLogger(__name__)

_SMOOTHING = 0.1  # of the mean step time
_MEMORY_STAYS_SHORT = 200  # ticks after which larger forwards are tried again


@dataclass(frozen=True)
class EngineSettings:
    """checkpoint_every: network calls between two checkpoints of a picture. max_calls: steps of a plan, or
    entries of an option.

    bucket_rows: forwards are padded up to one of these numbers of rows; empty for no padding. one_forward_each: share
    none, for a network whose rows would not come out the same to the bit.
    """

    scheduling: SchedulingSettings = field(default_factory=SchedulingSettings)
    checkpoint_every: int = 5
    max_calls: int = 2000
    bucket_rows: tuple[int, ...] = ()
    one_forward_each: bool = False


@dataclass
class _Live:
    """A picture in the engine, with what is known of it beside its trajectory."""

    task: Draw
    picture: Picture
    candidate: Candidate
    resumed_from: int
    first_step: float | None = None
    previews: tuple[int, ...] = ()  # calls after which one is due

    @property
    def number(self) -> int:
        return self.task.number


@dataclass
class Engine:
    """Draws pictures with a pipeline. emit: takes what happens to them. clock: seconds that only go forward.

    slots: where checkpoints go. card: what receipts name. faults: misbehaves as orders say, in tests.
    """

    pipeline: Pipeline
    card: ModelCard
    emit: Callable[[PictureEvent], None]
    settings: EngineSettings = field(default_factory=EngineSettings)
    slots: CheckpointSlots | None = None
    faults: Faults | None = None
    clock: Callable[[], float] = time.monotonic
    _live: dict[int, _Live] = field(default_factory=dict)
    _plans: dict[tuple[object, ...], AnyPlan] = field(default_factory=dict)
    _fair: FairClock = field(default_factory=FairClock)
    _step_seconds: float = 0.0
    _express_lead: float = 0.0
    _ticks: int = 0
    _largest_forward: int = 0  # rows that memory was found to suffice for; 0: not known to be bounded
    _bounded_until: int = 0  # the tick from which on it is forgotten

    def __post_init__(self) -> None:
        self.network: Denoiser = self.pipeline.unguided()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to draw."""
        return not self._live

    @torch.inference_mode()
    def draw(self, task: Draw) -> None:
        """Take a picture: emits Admitted, or Failed where its order is unsound."""
        order, now = task.order, self.clock()
        try:
            if order.fault is not None and self.faults is None:
                raise UserError(f"fault={order.fault!r}: this server allows none")
            if not order.weight > 0:
                raise UserError(f"weight={order.weight} must be above 0")
            _check_length(order, self.settings.max_calls)
            picture = prepare(self.pipeline, order, self._plans)
            if task.resume is not None:
                picture.go_on_from(task.resume)
            key = picture.question().key
        except UserError as error:
            self.emit(Failed(task.number, "invalid_request", str(error), _field_of(str(error))))
            return
        except Exception as error:  # an order that breaks something must not take the others along
            _log.exception("picture %d cannot be begun", task.number)
            self.emit(Failed(task.number, "internal_error", f"{type(error).__name__}: {error}"))
            return
        if len(self._plans) > 256:  # of callers who vary an option endlessly
            self._plans.clear()
        calls = picture.plan.num_calls
        previews = tuple(math.ceil((i + 1) * calls / (order.partial_images + 1)) for i in range(order.partial_images))
        deadline = None if order.deadline_seconds is None else now + order.deadline_seconds
        candidate = Candidate(
            task.number,
            order.tenant,
            key,
            picture.rows,
            self._step_cost(picture),
            order.weight,
            calls,
            picture.calls_left,
            arrived=now,
            last_step=now,
            deadline=deadline,
        )
        self._live[task.number] = _Live(
            task, picture, candidate, picture.call, previews=tuple(c for c in previews if c > picture.call)
        )
        if all(live.task.order.tenant != order.tenant for n, live in self._live.items() if n != task.number):
            self._fair.arrive(order.tenant)
        self.emit(Admitted(task.number, self._step_cost(picture) * calls, calls))

    @torch.inference_mode()
    def warm_up(self, rows: int) -> None:
        """A forward of so many rows whose result nobody needs, so that the first real one is as fast as later ones."""
        pipeline = self.pipeline
        x = pipeline.start_noise(torch.zeros(rows, dtype=torch.int64, device=pipeline.device))
        t = torch.full((rows,), 0.5, dtype=widest_float(pipeline.device), device=pipeline.device)
        self.network(x, t, pipeline.null_condition(rows))

    def cancel(self, number: int) -> None:
        """Drop a picture that is there."""
        if number in self._live:
            self._fail(self._live[number], "cancelled", "cancelled")

    @torch.inference_mode()
    def tick(self) -> Tick:
        """One network call for the pictures whose turn it is."""
        begun = self.clock()
        self._expire(begun)
        settings = self.settings.scheduling
        if self._ticks >= self._bounded_until:  # what else held the memory may be gone
            self._largest_forward = 0
        if self._largest_forward:
            settings = replace(settings, max_rows=min(settings.max_rows, self._largest_forward))
        choice = choose(
            [live.candidate for live in self._live.values()],
            self._fair,
            settings,
            begun,
            self._step_seconds,
            self._express_lead,
        )
        chosen = [self._live[number] for number in choice.numbers]
        rows = sum(live.picture.rows for live in chosen)
        if chosen:
            self._step(chosen)
            seconds = self.clock() - begun
            self._ticks += 1
            weight = _SMOOTHING if self._step_seconds else 1.0
            self._step_seconds += weight * (seconds - self._step_seconds)
            self._express_lead = max(0.0, self._express_lead + (seconds if choice.express else -seconds))
        return self._heartbeat(rows, self.clock() - begun)

    def _heartbeat(self, rows: int, seconds: float) -> Tick:
        live = self._live.values()
        begun = sum(one.first_step is not None for one in live)
        left = sum(one.candidate.step_cost * one.candidate.calls_left for one in live)
        return Tick(self._ticks, rows, self._padded(rows), seconds, begun, len(self._live) - begun, left)

    def _step_cost(self, picture: Picture) -> float:
        return float(picture.rows * self.card.tokens)

    def _expire(self, now: float) -> None:
        for live in list(self._live.values()):
            if live.candidate.deadline is not None and now > live.candidate.deadline:
                done, calls = live.picture.call, live.picture.plan.num_calls
                self._fail(live, "deadline_exceeded", f"{done} of {calls} network calls were done by the deadline")

    def _step(self, chosen: Sequence[_Live]) -> None:
        """One network call of each, in one forward, or in two where that one fails."""
        if self.slots is not None:
            for live in chosen:
                self.slots.mark(live.task.slot, live.number, live.picture.call)
        try:
            if self.faults is not None:
                self.faults.before_forward([live.task.order for live in chosen], [live.picture for live in chosen])
            questions = [live.picture.question() for live in chosen]
            groups = [[q] for q in questions] if self.settings.one_forward_each else [questions]
            answers = [answer for group in groups for answer in self._answers(group)]
        except Exception as error:  # whatever the network raises: none of it may take the others along
            self._split(chosen, error)
            return
        now = self.clock()
        for live, answer in zip(chosen, answers, strict=True):
            order = live.task.order
            self._fair.charge(order.tenant, live.candidate.step_cost, order.weight)
            live.first_step = now if live.first_step is None else live.first_step
            live.candidate.last_step = now
            live.candidate.calls_left -= 1
            try:
                self._advance(live, answer)
            except Exception as error:  # as above: of this picture alone
                _log.exception("picture %d", live.number)
                if live.number in self._live:
                    self._fail(live, "internal_error", f"{type(error).__name__}: {error}")
            if self.slots is not None:
                self.slots.unmark(live.task.slot)
        self._fair.settle({live.task.order.tenant for live in self._live.values()})

    def _split(self, chosen: Sequence[_Live], error: Exception) -> None:
        out_of_memory = _is_out_of_memory(error)
        if out_of_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(chosen) == 1:
            code: FailureCode = "out_of_memory" if out_of_memory else "internal_error"
            self._fail(chosen[0], code, f"{type(error).__name__}: {error}")
            return
        half = len(chosen) // 2
        if out_of_memory:
            self._largest_forward = max(1, sum(live.picture.rows for live in chosen[:half]))
            self._bounded_until = self._ticks + _MEMORY_STAYS_SHORT
        self._step(chosen[:half])
        self._step(chosen[half:])

    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        """One forward over the rows of all questions, which are of one key."""
        sizes = [len(question.x) for question in questions]
        conds = [question.cond for question in questions if question.cond is not None]
        x = torch.cat([question.x for question in questions])
        t = torch.cat([question.t for question in questions])
        cond = concat_conditions(*conds) if conds else None
        learned = questions[0].learned_variance
        x0, logits = _padded_forward(self.network, x, t, cond, learned, self._padded(len(x)))
        parts = x0.split(sizes)
        logits_parts = [None] * len(sizes) if logits is None else logits.split(sizes)
        return [Answer(part, logits_part) for part, logits_part in zip(parts, logits_parts, strict=True)]

    def _padded(self, rows: int) -> int:
        return next((bucket for bucket in self.settings.bucket_rows if bucket >= rows), rows) if rows else 0

    def _advance(self, live: _Live, answer: Answer) -> None:
        picture, order = live.picture, live.task.order
        x0 = picture.advance(answer)
        if not picture.is_finite():
            where = f"network call {picture.call} of {picture.plan.num_calls}"
            self._fail(live, "not_finite", f"the picture's values were not finite after {where}")
            return
        if picture.calls_left == 0:
            self._finish(live)
            return
        if live.previews and picture.call >= live.previews[0]:
            index = order.partial_images - len(live.previews)
            live.previews = live.previews[1:]
            image, _, _ = self._encoded(live, x0)
            self.emit(Preview(live.number, index, picture.call, picture.plan.num_calls, image))
        if self.slots is not None and picture.call % self.settings.checkpoint_every == 0:
            self.slots.write(live.task.slot, live.number, picture.state())

    def _finish(self, live: _Live) -> None:
        picture, now = live.picture, self.clock()
        image, width, height = self._encoded(live, picture.trajectory.x)
        card = self.card
        receipt = receipt_of(
            live.task.order, model=card.name, version=card.version, smalti=__version__, torch=str(torch.__version__)
        )
        calls = picture.plan.num_calls
        del self._live[live.number]
        self.emit(
            Finished(
                live.number,
                stamp(image, receipt),
                width,
                height,
                calls,
                live.candidate.step_cost * calls,
                live.resumed_from,
                (live.first_step or now) - live.candidate.arrived,
                now - live.candidate.arrived,
            )
        )

    def _encoded(self, live: _Live, x0: torch.Tensor) -> tuple[bytes, int, int]:
        """A file of the order's format, its width and its height."""
        order, file = live.task.order, io.BytesIO()
        picture = to_pil(self.pipeline.pictures(x0))[0]
        if order.output_format == "png":
            picture.save(file, "png")
        else:
            picture.save(file, order.output_format, quality=order.output_compression)
        return file.getvalue(), picture.width, picture.height

    def _fail(self, live: _Live, code: FailureCode, message: str) -> None:
        del self._live[live.number]
        self.emit(Failed(live.number, code, message))


def _padded_forward(
    network: Denoiser, x: torch.Tensor, t: torch.Tensor, cond: Condition | None, learned: bool, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The estimate of x [batch, ...], with copies of the first row to make it `rows` rows."""
    missing, batch = rows - len(x), len(x)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) if missing else tensor

    x, t, cond = padded(x), padded(t), None if cond is None else cond.map(padded)
    x0, logits = x0_and_variance(network, x, t, cond) if learned else (network(x, t, cond), None)
    return x0[:batch], None if logits is None else logits[:batch]


def _check_length(order: PictureOrder, most: int) -> None:
    """Raise UserError for a plan that is too long, before it is made."""
    if order.num_inference_steps is not None and order.num_inference_steps > most:
        raise UserError(f"num_inference_steps={order.num_inference_steps} must be at most {most}")
    for name, value in order.solver_options.items():
        if isinstance(value, list) and len(value) > most:
            raise UserError(f"{name} has {len(value)} entries, at most {most} are allowed")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # what a CPU's allocator says


def _field_of(message: str) -> str | None:
    """The field that a UserError's message begins with."""
    name = message.split("=")[0].split(":")[0].split(" ")[0]
    return name if name.isidentifier() else None
