"""The training loop: one function that a reader can follow from the first step to the last checkpoint."""

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import smalti
from smalti.autoencoders.protocol import Tokenizer
from smalti.checkpoint import CheckpointError, list_checkpoints, newest_checkpoint
from smalti.conditioning.prompted import PromptedNetwork
from smalti.config import Budget, RunConfig, check_parts
from smalti.data.rows import TrainingRows
from smalti.diffusion.objective import loss_by_timestep_bin
from smalti.diffusion.processes import Process, make_process
from smalti.models.registry import forward_flops
from smalti.nn.sharded import whole_tensor
from smalti.pipeline import Decoder, Pipeline, own_prompt_encoder
from smalti.pipeline_arguments import PromptEncoder
from smalti.run_folder import RunFolder, read_record, write_json
from smalti.training.activation_checkpointing import checkpoint_activations
from smalti.training.append_log import outlasting_a_full_disk
from smalti.training.batch import Batch, training_batch, validation_batches
from smalti.training.data import caption_features, kept_tokenizer, open_run_data, pretrained_encoder, report_skipped
from smalti.training.display import SilentDisplay, TrainingDisplay, terminal_display
from smalti.training.failure import TrainingDiverged, join_batches, keep_failure
from smalti.training.forward import (
    compiled_or_eager,
    needs_loss_scale,
    product_dtype,
    repays_compilation,
    retry_uncompiled,
)
from smalti.training.health import mean_interval, verdict
from smalti.training.metrics import MetricLogs, truncate_log
from smalti.training.parallel import Ranks, Sharding, check_divisible, is_sharded, joined_ranks, rank_device, replicated
from smalti.training.peak import matmul_peak
from smalti.training.preparing import prepared_folder
from smalti.training.preview import preview_picture, save_preview
from smalti.training.saving import CheckpointWriter, restore
from smalti.training.snapshots import remove_later_snapshots, take_snapshot_if_due
from smalti.training.state import TrainingState, new_state
from smalti.training.step import (
    clip_gradients,
    compute_gradients,
    squared_sizes,
    update_ratio,
    update_weights,
    weights_copy,
)
from smalti.training.stopping import StopRequest, stop_requests
from smalti.training.validation import held_out_losses
from smalti.training.writers import check_writers, open_writers
from smalti.types import Backbone

Outcome = str  # "finished", "interrupted"


@dataclass(frozen=True)
class TrainingResult:
    """How a call of train() ended."""

    folder: RunFolder
    outcome: Outcome
    step: int
    seconds: float
    stopped_by: int | None = None  # the signal that interrupted it


def budget_progress(budget: Budget, step: int, seconds: float, batch_size: int, num_rows: int) -> float:
    """Share of the budget that is spent after so many steps and seconds, in [0, 1]."""
    if budget.unit == "minutes":
        return min(1.0, seconds / (60 * budget.amount))
    steps = budget.amount if budget.unit == "steps" else budget.amount * num_rows / batch_size
    return min(1.0, step / math.ceil(steps))


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    sharding: Sharding = "ddp",
    display: TrainingDisplay | None = None,
) -> TrainingResult:
    """Train a run into the folder `out`, or go on with the one there (resume=True).

    With a budget in steps or epochs the result is a function of the config: a run killed at any moment and resumed ends
    with the same bytes of weights, averages and metrics. With a budget in minutes the schedule follows the clock.
    Under torchrun every process calls this alike and they train one run together: sharding says how its network is
    spread over them; data, noise and times of each step do not depend on how many they are.
    Raises UserError for the caller's mistakes, TrainingDiverged for a loss that is not finite, OSError for a full disk.
    """
    check_parts(config)
    check_writers(config.loop.writers)
    own_device = torch.device(rank_device(device))
    with joined_ranks(own_device, config.loop.hang_seconds) as ranks:
        check_divisible(config.loop.batch_size, config.loop.gradient_accumulation_steps, ranks.size)
        display = (display or terminal_display()) if ranks.first else SilentDisplay()
        # All that may be the caller's mistake comes before the folder is made.
        data = ranks.first_before_others(
            lambda: open_run_data(config, own_device, out if resume else None), "opening the data"
        )
        state = new_state(config, own_device, ranks, sharding)
        text_encoder = pretrained_encoder(config, state.device)
        claim = prepared_folder(config, out, resume=resume, overwrite=overwrite)
        with _claimed_by_first(claim, ranks, out) as folder:
            if ranks.first:
                if data.statistics is not None:
                    write_json(folder.latents, data.statistics.to_json())
                report_skipped(data, display)
            encode_captions: PromptEncoder | None = None
            encode_prompts: PromptEncoder | None = text_encoder
            if text_encoder is not None:
                encoder = text_encoder
                encode_captions = ranks.first_before_others(
                    lambda: caption_features(config, data, encoder), "encoding the captions"
                )
            tokenizer = ranks.first_before_others(
                lambda: kept_tokenizer(config, data.training, folder), "training the tokenizer"
            )
            if tokenizer is not None:
                assert isinstance(state.average, PromptedNetwork)
                encode_captions, encode_prompts = tokenizer.encode, own_prompt_encoder(state.average, tokenizer)
            log_size = _restore_newest(state, folder, display) if resume else 0
            if ranks.first:
                truncate_log(folder.metrics, log_size)
                _write_record(folder, config, state, "running", ranks)
                remove_later_snapshots(folder, state.step)
            logs = None
            if ranks.first:
                logs = MetricLogs(folder, open_writers(config, folder, state.step, display.message))
            training, held_out = ([rows.to(own_device) for rows in part] for part in (data.training, data.held_out))
            in_parts = is_sharded(ranks, sharding)
            writer = CheckpointWriter(folder.checkpoints, config.loop.keep_checkpoints, ranks, in_parts)
            with stop_requests() as stop, logs or nullcontext(), display:
                run = _Run(
                    config,
                    folder,
                    make_process(config.process),
                    state,
                    ranks,
                    sharding,
                    writer,
                    logs,
                    display,
                    training,
                    held_out,
                    encode_captions,
                    encode_prompts,
                    data.decode,
                    data.tokenizer,
                )
                outcome = run.until_done(stop)
                # Before the process group: freed after it, DDP takes the group's threads down while it holds Python's
                # lock, for which one of them may wait.
                del run
            if ranks.first:
                _write_record(folder, config, state, outcome, ranks)
        return TrainingResult(folder, outcome, state.step, state.seconds, stop.signal_number)


@contextmanager
def _claimed_by_first(claim: AbstractContextManager[RunFolder], ranks: Ranks, out: Path) -> Iterator[RunFolder]:
    """The run directory that the first rank prepares and locks."""
    with ExitStack() as stack:
        ranks.from_first(lambda: str(stack.enter_context(claim).path), "preparing the run directory")
        yield RunFolder(out)


def _restore_newest(state: TrainingState, folder: RunFolder, display: TrainingDisplay) -> int:
    """Restore the newest whole checkpoint; returns the size of the metrics log at that time."""
    if not list_checkpoints(folder.checkpoints):
        display.message(f"no checkpoint in {folder.checkpoints} yet: starting from the first step")
        return 0
    checkpoint, complaints = newest_checkpoint(folder.checkpoints)
    for complaint in complaints:
        display.message(f"warning: {complaint}; going on from the older {checkpoint.folder.name}")
    try:
        restore(state, checkpoint)
    except (KeyError, RuntimeError) as error:
        first_lines = " ".join(str(error).split("\n")[:2])
        raise CheckpointError(f"{checkpoint.folder} does not fit this config: {first_lines}") from None
    display.message(f"resuming at step {state.step}")
    return int(checkpoint.state["metrics_bytes"])


def _write_record(folder: RunFolder, config: RunConfig, state: TrainingState, outcome: str, ranks: Ranks) -> None:
    record = read_record(folder)
    record.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    record |= {
        "command": " ".join(sys.argv),
        "outcome": outcome,
        "step": state.step,
        "images": state.step * config.loop.batch_size,
        "seconds": round(state.seconds, 1),
        "smalti": smalti.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "ranks": ranks.size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    write_json(folder.record, record)


@dataclass(frozen=True)
class StepReport:
    """What a step did; loss and gradient_norm are of the whole batch, update_ratio of the steps that are logged."""

    loss: float
    gradient_norm: float
    learning_rate: float
    update_ratio: float | None
    seconds: float  # of training so far
    stop_asked: bool


@dataclass
class _Run:
    """One session of training; the methods are the parts of the loop, in the order they are reached."""

    config: RunConfig
    folder: RunFolder
    process: Process
    state: TrainingState
    ranks: Ranks
    sharding: Sharding
    writer: CheckpointWriter
    logs: MetricLogs | None  # of the first rank
    display: TrainingDisplay
    training_rows: Sequence[TrainingRows]  # a bucket for each size
    held_out_rows: Sequence[TrainingRows]
    encode_captions: PromptEncoder | None = None  # captions to what a training step feeds the network
    encode_prompts: PromptEncoder | None = None  # prompts to what the averaged network is sampled with
    decode: Decoder | None = None
    tokenizer: Tokenizer | None = None
    compiled: bool = field(init=False, default=False)
    sizes_seen: set[torch.Size] = field(init=False, default_factory=set)  # what the compiled blocks are ready for
    network: nn.Module = field(init=False)  # what a step calls: the model, or what replicates it

    def until_done(self, stop: StopRequest) -> Outcome:
        """Steps until the budget is spent or a stop is asked for; saves at the end either way."""
        state, loop = self.state, self.config.loop
        window: list[float] = []  # seconds of the last steps, without validation and pictures
        progress = self._progress()
        if progress >= 1:
            self.display.message(f"already finished: {state.step} steps; a larger budget goes on")
            return "finished"
        if loop.activation_checkpointing:
            checkpoint_activations(state.model)
        if loop.compile and repays_compilation(self.config.budget):
            self.compiled = compiled_or_eager(state.model, state.device, self.display.message)
        self.ranks.doing("spreading the network")
        self.network = replicated(state.model, self.ranks, self.sharding)
        earlier, began, asked = state.seconds, time.perf_counter(), False
        while progress < 1 and not asked:
            started = time.perf_counter()
            report = self._step(progress, stop.asked, lambda: earlier + time.perf_counter() - began)
            asked = report.stop_asked
            window = [*window[-49:], time.perf_counter() - started]
            state.step += 1
            state.seconds = report.seconds
            before, progress = progress, self._progress()
            speed = loop.batch_size * len(window) / sum(window)
            if state.step % loop.log_every == 0:
                self._log(report, speed)
            self.display.update(state.step, progress, report.loss, speed, self._seconds_left(progress, window))
            self.writer.complain(self.display.message)
            if state.step % loop.validate_every == 0 or progress >= 1:
                self._validate()
            if state.step % loop.preview_every == 0 or progress >= 1:
                self._draw()
            with outlasting_a_full_disk("the snapshot of the averages", self.display.message):  # before its checkpoint
                take_snapshot_if_due(self.config.ema, state, self.folder, before, progress, self.ranks)
            if state.step % loop.checkpoint_every == 0 or progress >= 1:
                self._save()
        if progress < 1:
            self._save()
        self.ranks.doing("writing the last checkpoint", long=True)
        self.writer.wait()
        self.ranks.wait("writing the last checkpoint")
        if self.writer.failure is not None:  # the run's result is not on the disk
            raise self.writer.failure
        if progress < 1:
            path = list_checkpoints(self.folder.checkpoints)[-1]
            self.display.message(f"stopped at step {state.step}; saved {path}; go on with --resume")
            return "interrupted"
        return "finished"

    def _progress(self) -> float:
        budget, size, state = self.config.budget, self.config.loop.batch_size, self.state
        return budget_progress(budget, state.step, state.seconds, size, sum(map(len, self.training_rows)))

    def _seconds_left(self, progress: float, window: list[float]) -> float:
        budget = self.config.budget
        if budget.unit == "minutes":
            return 60 * budget.amount - self.state.seconds
        steps_left = self.state.step / max(progress, 1e-9) * (1 - progress)
        return steps_left * sum(window) / len(window)

    def _step(self, progress: float, stop_asked: bool, seconds: Callable[[], float]) -> StepReport:
        """Forward, backward, clip, update, average. seconds(): the run's clock."""
        config, state, ranks = self.config, self.state, self.ranks
        step = state.step
        ranks.doing(f"the gradients of step {step}")
        loss = self._gradients()
        norm = clip_gradients(config, state)
        # One small collective a step: the whole batch's loss, whether anybody wants to stop, the first rank's clock.
        shared = (loss / ranks.size, float(stop_asked), seconds() if ranks.first else 0.0)
        loss, stops, now = ranks.sum(shared, f"the loss of step {step}")
        finite = math.isfinite(loss) and math.isfinite(norm)
        if needs_loss_scale(config.loop):
            state.loss_scale = state.loss_scale.after(finite)
        if not finite and not (needs_loss_scale(config.loop) and not state.loss_scale.exhausted):
            self._diverged(loss, norm)
        measured = (step + 1) % config.loop.log_every == 0
        before = weights_copy(state) if measured else None
        rate = update_weights(config, state, progress) if finite else 0.0
        ratio = None
        if before is not None:
            squares: Sequence[float] = squared_sizes(state, before)
            if is_sharded(self.ranks, self.sharding):
                squares = ranks.sum(squares, f"the update's size at step {step}")
            ratio = update_ratio(*squares)
        return StepReport(loss, norm, rate, ratio, now, stops > 0)

    def _gradients(self) -> float:
        """Leave the step's gradients in the parameters; returns this rank's mean loss."""

        def attempt() -> float:
            return compute_gradients(self.config, self.process, self.state, self.network, self._micro_batches())

        # Ranks that combine their gradients cannot begin a backward again, each for itself.
        if self.ranks.size > 1:
            return attempt()
        return retry_uncompiled(self.state.model, attempt, self.display.message)

    def _micro_batches(self) -> Iterator[Batch]:
        """This rank's parts of the step's batch; made anew whenever they are asked for, and the same."""
        config, ranks, step = self.config, self.ranks, self.state.step
        parts = config.loop.gradient_accumulation_steps
        for number in range(parts):
            part = (number * ranks.size + ranks.rank, parts * ranks.size)
            batch = training_batch(config, self.process, self.training_rows, step, self.encode_captions, part)
            if self.compiled and batch.x0.shape not in self.sizes_seen:
                ranks.doing(f"compiling for the size of step {step}", long=True)
                self.sizes_seen.add(batch.x0.shape)
            else:
                ranks.tick()
            yield batch

    def _log(self, report: StepReport, speed: float) -> None:
        if self.logs is None:
            return
        step = self.state.step
        values = {"loss": report.loss, "gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
        if report.update_ratio is not None:
            values["update_ratio"] = report.update_ratio
        if needs_loss_scale(self.config.loop):
            values["loss_scale"] = self.state.loss_scale.factor
        self.logs.write(step, values)
        self.logs.write_timing(
            step, {"images_per_second": speed, "seconds": self.state.seconds, "mfu": self._utilisation(speed)}
        )

    def _utilisation(self, images_per_second: float) -> float:
        """Model FLOPs utilisation: the share of the device's measured matrix product rate that the step's products
        amount to, a backward counting two forwards (Chowdhery et al. 2022, appendix B)."""
        config, device = self.config, self.state.device
        tokens = 0 if config.text is None else config.text.max_tokens
        peak = matmul_peak(device, product_dtype(config.loop, device)) * self.ranks.size
        return float(3 * forward_flops(config.model, None, tokens, config.codebook_size) * images_per_second / peak)

    def _diverged(self, loss: float, norm: float) -> None:
        """Keep the batch, its address and the weights that met it, then stop."""
        config, state, ranks = self.config, self.state, self.ranks
        weights = {name: whole_tensor(tensor) for name, tensor in state.model.state_dict().items()}
        numbers = {
            "step": state.step,
            "seed": config.seed,
            "rank": ranks.rank,
            "ranks": ranks.size,
            "loss": repr(loss),
            "gradient_norm": repr(norm),
            "loss_scale": state.loss_scale.factor if needs_loss_scale(config.loop) else 1.0,
            "torch": torch.__version__,
        }
        keep_failure(self.folder, join_batches(list(self._micro_batches())), weights, numbers, ranks.rank)
        (broken,) = ranks.sum([float(not state.weights_are_finite())], "looking for the last good state")
        if not broken:
            self._save()
        self.writer.wait()
        ranks.wait("saving the failed step")
        good = list_checkpoints(self.folder.checkpoints)
        last_good = f"the last good state is {good[-1]}" if good else "no checkpoint had been written yet"
        raise TrainingDiverged(
            f"loss {loss}, gradient norm {norm} at step {state.step}: the batch and the weights are in "
            f"{self.folder.failure} (`smalti replay-nan {self.folder.path}` runs the step again); {last_good}; try a "
            "lower learning rate (--set learning_rate=...)"
        )

    def _validate(self) -> None:
        assert isinstance(self.state.average, Backbone)
        activity = f"the validation of step {self.state.step}"
        self.ranks.doing(activity)
        parts = []
        for batch in validation_batches(self.config, self.process, self.held_out_rows, self.encode_captions):
            # Batch by batch, so that the other ranks see each as progress.
            own = held_out_losses(self.config, self.process, self.state.average, [batch], self.ranks, activity)
            parts.append((own, batch.t))
        if not parts:
            return
        losses, t = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.state.keep_validation(losses.cpu().clone())
        interval = mean_interval(losses)
        means, counts = loss_by_timestep_bin(losses, t)
        per_bin = {
            f"validation_loss_t{i}": mean
            for i, (mean, count) in enumerate(zip(means.tolist(), counts.tolist(), strict=True))
            if count
        }
        if self.logs is not None:
            ends = {"validation_loss_low": interval.low, "validation_loss_high": interval.high}
            self.logs.write(self.state.step, {"validation_loss": losses.mean().item(), **ends, **per_bin})
        self.display.message(f"step {self.state.step}: {verdict(self.state.validations).text}")

    def _draw(self) -> None:
        """A grid of samples from the averaged weights. The first rank draws; where weights are sharded all must."""
        if not (self.ranks.first or is_sharded(self.ranks, self.sharding)):
            return
        assert isinstance(self.state.average, Backbone)
        pipeline = Pipeline(self.state.average, self.config, self.encode_prompts, self.decode, tokenizer=self.tokenizer)
        captions = [row[0] for rows in self.training_rows for row in rows.captions or () if row]
        self.ranks.doing(f"the samples of step {self.state.step}")
        ticking = self.state.average.register_forward_pre_hook(lambda module, inputs: self.ranks.tick())
        picture = preview_picture(pipeline, captions)
        ticking.remove()
        if self.logs is None:
            return
        with outlasting_a_full_disk("the picture", self.display.message):
            path = save_preview(self.folder, picture, self.state.step, captions)
            self.display.picture(str(path))
        self.logs.write_picture(self.state.step, np.asarray(picture))

    def _save(self) -> None:
        self.writer.begin(self.state, {"metrics_bytes": 0 if self.logs is None else self.logs.metrics_size()})
