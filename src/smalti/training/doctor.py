"""A run's check-up before it starts: its real data, its settings, and what a step costs. Seconds instead of a day."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from smalti.autoencoders.codebook_usage import codebook_usage, token_counts
from smalti.conditioning.captions import CountsTokens, caption_lengths
from smalti.config import RunConfig, check_parts
from smalti.diffusion.processes import make_process
from smalti.models.registry import forward_flops
from smalti.pipeline_arguments import PromptEncoder
from smalti.training.batch import training_batch
from smalti.training.data import RunData, caption_tokenizer, open_run_data, pretrained_encoder
from smalti.training.parallel import check_divisible
from smalti.training.state import TrainingState, new_state
from smalti.training.step import clip_gradients, compute_gradients, update_weights

Severity = Literal["fine", "look", "wrong"]
_LONG_CAPTIONS = 0.05  # share of truncated captions that deserves a look
_SMALL_CLASS = 0.2  # of the mean class: a class this small deserves a look
_FEW_PICTURES = 100
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. severity: wrong means that training would fail or be wasted."""

    topic: str
    text: str
    severity: Severity = "fine"


@dataclass(frozen=True)
class StepCost:
    """What a training step costs here, not compiled. memory: bytes at its peak, on a CPU the whole process's."""

    seconds: float
    memory: int
    loss: float


def examine(config: RunConfig, device: str = "cpu", progress: Callable[[Finding], None] | None = None) -> list[Finding]:
    """Look at all that can be looked at before a run starts; progress(finding) is called as each is known.

    Raises UserError where the data or the encoder cannot be opened at all.
    """
    findings: list[Finding] = []

    def found(topic: str, text: str, severity: Severity = "fine") -> None:
        findings.append(Finding(topic, text, severity))
        if progress is not None:
            progress(findings[-1])

    check_parts(config)
    check_divisible(config.loop.batch_size, config.loop.gradient_accumulation_steps, ranks=1)
    data = open_run_data(config, torch.device(device))
    found(*_pictures(data))
    _classes(config, data, found)
    state = new_state(config, torch.device(device))
    tokenizer = caption_tokenizer(config, data.training)
    encoder = pretrained_encoder(config, state.device)
    encode = encoder if tokenizer is None else tokenizer.encode
    counter = encoder if tokenizer is None else tokenizer
    if counter is not None:
        found(*_captions(data, counter))
    _settings(config, found)
    _values(data, found)
    cost = _step_cost(config, state, data, encode, device)
    found(*_cost(config, data, cost))
    return findings


def _pictures(data: RunData) -> tuple[str, str, Severity]:
    skipped = f", {len(data.skipped)} skipped" if data.skipped else ""
    text = f"{data.num_training:,} to train on, {data.num_held_out:,} held out{skipped}"
    if len(data.training) > 1:
        counts = sorted(((len(rows), rows.shape[1:]) for rows in data.training), reverse=True)
        sizes = ", ".join(f"{height} x {width} ({count:,})" for count, (height, width) in counts)
        text += f"; height x width: {sizes}"
    if data.enlarged:
        text += f"; {len(data.enlarged):,} are smaller than what they are trained at"
    few = data.num_training < _FEW_PICTURES
    look = few or bool(skipped) or bool(data.enlarged)
    return "pictures", text + ("; so few are learned by heart" if few else ""), "look" if look else "fine"


def _classes(config: RunConfig, data: RunData, found: Callable[..., None]) -> None:
    labels = [rows.class_labels.cpu() for rows in data.training if rows.class_labels is not None]
    if not config.num_classes or not labels:
        return
    counts = torch.bincount(torch.cat(labels), minlength=config.num_classes)
    empty = int((counts == 0).sum())
    small = int((counts < _SMALL_CLASS * counts.float().mean()).sum()) - empty
    text = f"{config.num_classes}, of {int(counts.min()):,} to {int(counts.max()):,} pictures"
    if empty:
        text += f"; {empty} have none and will draw noise"
    if small > 0:
        text += f"; {small} have less than a fifth of the mean"
    found("classes", text, "look" if empty or small > 0 else "fine")


def _captions(data: RunData, counter: CountsTokens) -> tuple[str, str, Severity]:
    rows = [row for bucket in data.training for row in bucket.captions or ()]
    lengths = caption_lengths(counter, [text for row in rows for text in row])
    without = sum(not row for row in rows)
    text = f"{lengths.captions:,}, {lengths.mean:.1f} tokens on average, {lengths.longest} at most of {lengths.limit}"
    if lengths.truncated:
        text += f"; {lengths.truncated:,} lose their ends, such as {lengths.longest_caption[:60]!r}"
    if without:
        text += f"; {without:,} pictures have none"
    long = lengths.truncated > _LONG_CAPTIONS * max(lengths.captions, 1)
    return "captions", text, "look" if long or without else "fine"


def _settings(config: RunConfig, found: Callable[..., None]) -> None:
    process, prediction = make_process(config.process), config.objective.prediction_type
    found("process", f"{process.name} with {prediction} prediction")  # RunConfig refuses what cannot work
    if config.text is not None:
        dropped, what = config.captions.dropout, "captions"
    elif config.num_classes:
        dropped, what = config.loop.label_dropout, "labels"
    else:
        found("null condition", "the network is unconditional: guidance is off")
        return
    scale = config.sampling.guidance_scale
    if dropped == 0 and scale != 1:
        found("null condition", f"never trained ({what} are never dropped), and guidance {scale:g} needs it", "wrong")
    else:
        found("null condition", f"{dropped:.0%} of the {what} are dropped; sampled with guidance {scale:g}")


def _values(data: RunData, found: Callable[..., None]) -> None:
    rows = max(data.training, key=len)
    count = min(256, len(rows))
    x0 = rows.read(torch.arange(count) * len(rows) // count)
    if data.tokenizer is not None:
        usage = codebook_usage(token_counts(x0, data.tokenizer.codebook_size))
        text = (
            f"{usage.used} of {usage.codebook_size} tokens used in {count} pictures, perplexity {usage.perplexity:.1f}"
        )
        if usage.collapsed:
            found("tokens", f"{text}: the codebook has collapsed, docs/masked.md says what to change", "look")
        else:
            found("tokens", text)
        return
    mean, std = x0.mean(dim=(0, 2, 3)), x0.std(dim=(0, 2, 3))
    parts = ((mean, "+.2f"), (std, ".2f"))
    means, stds = (", ".join(f"{value:{form}}" for value in part.tolist()) for part, form in parts)
    text = f"mean {means}; std {stds}"
    if not bool(torch.isfinite(x0).all()):
        found("values", f"{text}: not finite", "wrong")
    elif float(std.min()) < 1e-3:
        found("values", f"{text}: a channel that never changes", "look")
    else:
        found("values", f"{text} by channel, of {count} pictures of {' x '.join(map(str, rows.shape))}")


def _step_cost(
    config: RunConfig, state: TrainingState, data: RunData, encode: PromptEncoder | None, device: str
) -> StepCost:
    process, rows = make_process(config.process), [rows.to(device) for rows in data.training]
    seconds, loss, parts = [], math.nan, config.loop.gradient_accumulation_steps
    for step in range(_TIMED_STEPS):
        started = time.perf_counter()
        micro_batches = (training_batch(config, process, rows, step, encode, (part, parts)) for part in range(parts))
        loss = compute_gradients(config, process, state, state.model, micro_batches)
        clip_gradients(config, state)
        update_weights(config, state, progress=0.0)
        seconds.append(time.perf_counter() - started)
    if state.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(state.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return StepCost(min(seconds), memory, loss)


def _cost(config: RunConfig, data: RunData, cost: StepCost) -> tuple[str, str, Severity]:
    batch, budget = config.loop.batch_size, config.budget
    per_second = batch / cost.seconds
    tokens = 0 if config.text is None else config.text.max_tokens
    flops = 3 * forward_flops(config.model, None, tokens, config.codebook_size) * per_second
    epoch = data.num_training / per_second
    if budget.unit == "minutes":
        epochs, hours = budget.amount * 60 / epoch, budget.amount / 60
    elif budget.unit == "epochs":
        epochs, hours = budget.amount, budget.amount * epoch / 3600
    else:
        hours = budget.amount * cost.seconds / 3600
        epochs = budget.amount * batch / data.num_training
    text = (
        f"{cost.seconds * 1000:,.0f} ms for {batch} pictures: {per_second:,.1f} a second, {flops / 1e9:,.0f} GFLOP/s, "
        f"{cost.memory / 2**30:.1f} GiB; the budget of {budget.amount:g} {budget.unit} is {epochs:,.1f} passes over "
        f"the pictures in {_duration(hours)}"
    )
    if not math.isfinite(cost.loss):
        return "a step", f"{text}; its loss is {cost.loss}", "wrong"
    return "a step", text + ("; less than one pass" if epochs < 1 else ""), "look" if epochs < 1 else "fine"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def verdict(findings: list[Finding]) -> str:
    """The check-up in a sentence."""
    wrong = [f.topic for f in findings if f.severity == "wrong"]
    look = [f.topic for f in findings if f.severity == "look"]
    if wrong:
        return f"do not start yet: {', '.join(wrong)}"
    return f"ready; have a look at {', '.join(look)}" if look else "ready"
