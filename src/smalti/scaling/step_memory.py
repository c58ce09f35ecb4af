"""What a training step holds in memory: the step itself, run on tensors that have shapes and no values.

Not a formula of the network: forward, backward, clipping, optimiser and average are the training loop's own functions,
on PyTorch's fake tensors, and every storage that they make is counted from its making to its end. A step of DiT-XL/2
takes seconds and no memory.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from smalti.conditioning.encoders import SD3Text
from smalti.conditioning.tiny import TinyTextConfig
from smalti.config import RunConfig
from smalti.diffusion.objective import per_sample_loss
from smalti.diffusion.processes import make_process
from smalti.optim.ema import PostHocEma
from smalti.optim.optimizers import Muon, build_optimizers
from smalti.training.activation_checkpointing import checkpoint_activations
from smalti.training.batch import VALIDATION_ROWS, Batch
from smalti.training.parallel import Sharding, repeated_blocks
from smalti.training.state import TrainingState, new_network
from smalti.training.step import clip_gradients, compute_gradients, squared_sizes, update_weights, weights_copy
from smalti.types import Backbone, Condition

Moment = Literal["forward", "backward", "update", "validation"]
STEP_MOMENTS: tuple[Moment, ...] = ("forward", "backward", "update")
_CLIP_TOKENS = 77  # that SD3's condition holds in front of T5's


@dataclass(frozen=True)
class MemoryByPart:
    """Bytes on one device. averages: of the weights, one or two. activations: kept by a forward for its backward.

    workspace: what lives shorter, results on their way and copies of the optimiser. framework: Python, PyTorch and the
    device's libraries.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    activations: int = 0
    batch: int = 0
    workspace: int = 0
    framework: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class StepMemory:
    """Of one device that trains alone. peaks: the parts when most is held, in each moment of a step, and in a
    validation. whole: each part at its largest, which no moment holds together.

    largest_block, outside_blocks, orthogonalised: bytes of weights, which several devices gather (see spread()).
    """

    peaks: Mapping[Moment, MemoryByPart]
    whole: MemoryByPart
    parameters: int
    largest_block: int
    outside_blocks: int
    orthogonalised: int


def text_tokens(config: RunConfig) -> int:
    """Tokens of text that the network reads of a picture; 0 without text."""
    if config.text is None:
        return 0
    return config.text.max_tokens + (_CLIP_TOKENS if isinstance(config.text, SD3Text) else 0)


def step_memory(config: RunConfig, precision: str, cpu: bool) -> StepMemory:
    """What a step of config.loop.batch_size pictures holds, and the validation after it.

    precision: of the products. cpu: whether it runs on a CPU, which smalti multiplies and attends on in ways of its
    own; other devices are counted as if they had fused attention, with the CPU's rules of autocast.
    """
    parts = config.loop.gradient_accumulation_steps
    rows, parts = config.loop.batch_size // parts, min(2, parts)  # a third micro-batch holds what the second does
    loop = replace(config.loop, precision=cast(Any, precision), gradient_accumulation_steps=parts)
    config = replace(config, loop=loop, initial_weights=None)
    process = make_process(config.process)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Valueless(pretend_gpu=not cpu))
        state = _state(config)
        storages = stack.enter_context(_Storages())
        model, averages = state.model, state.averages().values()
        batch = _batch(config, rows)
        storages.belong("weights", _tensors_of([model]))
        storages.belong("averages", _tensors_of(averages))
        storages.belong("batch", _tensors_in(batch))
        if config.loop.activation_checkpointing:
            checkpoint_activations(model)
        for _ in range(2):  # the first makes the optimiser's state
            storages.forget_peaks()
            with _watched(model, storages):
                compute_gradients(config, process, state, model, [batch] * parts)
            storages.moment = "update"
            clip_gradients(config, state)
            before = weights_copy(state)  # as of the steps that are logged
            update_weights(config, state, progress=0.5)
            squared_sizes(state, before)
            del before
            storages.belong("optimizer", _optimizer_tensors(state))
        whole = replace(storages.held(), activations=storages.activations, workspace=0)
        storages.moment = "validation"
        checked = _batch(config, VALIDATION_ROWS)
        storages.belong("batch", _tensors_in(checked))
        with torch.no_grad():
            network = cast(Backbone, state.average)
            per_sample_loss(network, process, config.objective, checked.x0, checked.eps, checked.t, checked.cond)
        peaks = dict(storages.peaks)
        peaks["forward"] = _with_activations(peaks["forward"], whole.activations)
        largest = max(peak.workspace for moment, peak in peaks.items() if moment != "validation")
        blocks = [_bytes(block.parameters()) for block in repeated_blocks(model)]
        muon = [
            p for o in state.optimizers.values() if isinstance(o, Muon) for g in o.param_groups for p in g["params"]
        ]
        return StepMemory(
            peaks,
            replace(whole, workspace=largest),
            sum(p.numel() for p in model.parameters()),
            max(blocks, default=0),
            _bytes(model.parameters()) - sum(blocks),
            _bytes(muon),
        )


def spread(step: StepMemory, devices: int, sharding: Sharding) -> dict[Moment, MemoryByPart]:
    """A step's peaks on each of several devices, of which each runs the batch that `step` is of.

    ddp: DistributedDataParallel keeps its buckets of gradients through the whole step. fsdp: weights, gradients,
    averages and optimiser state in equal parts; gathered are what is in no block, the block that runs and the next one,
    and a block's gradients on their way (Zhao et al. 2023); Muon orthogonalises whole matrices on every rank.
    """
    if devices == 1:
        return dict(step.peaks)
    if sharding == "ddp":
        return {name: replace(peak, gradients=step.whole.gradients) for name, peak in step.peaks.items()}

    def part(amount: int) -> int:
        return -(-amount // devices)

    spread_peaks = {}
    for name, peak in step.peaks.items():
        workspace = peak.workspace + step.outside_blocks + 3 * step.largest_block
        if name == "update":
            whole = step.orthogonalised > 0
            workspace = peak.workspace + step.orthogonalised if whole else part(peak.workspace)
        spread_peaks[name] = replace(
            peak,
            weights=part(peak.weights),
            gradients=part(peak.gradients),
            optimizer=part(peak.optimizer),
            averages=part(peak.averages),
            workspace=workspace,
        )
    return spread_peaks


def _with_activations(forward: MemoryByPart, kept: int) -> MemoryByPart:
    """A forward's results that are alive at its peak, near its end: those that it keeps, and the rest."""
    activations = min(kept, forward.workspace)
    return replace(forward, activations=activations, workspace=forward.workspace - activations)


class _Valueless(TorchFunctionMode):
    """Lets code run on tensors without values: a number read from one is 1. pretend_gpu: tensors say that they are on
    a GPU, for code that chooses by it, and are made on the CPU all the same, since fake GPU tensors need a GPU's
    PyTorch."""

    def __init__(self, pretend_gpu: bool) -> None:
        super().__init__()
        self._pretend_gpu = pretend_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.item, torch.Tensor.__float__):
            return 1.0
        if not self._pretend_gpu:
            return func(*args, **kwargs)
        if func is torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*(torch.device("cpu") if isinstance(a, torch.device) else a for a in args), **kwargs)


class _Storages(TorchDispatchMode):
    """Every storage that is alive, by part, and the moments at which most was."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._bytes = {f.name: 0 for f in fields(MemoryByPart)}
        self._total = 0
        self.moment: Moment = "forward"
        self.activations = 0
        self.peaks: dict[Moment, MemoryByPart] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, "workspace")
        peak = self.peaks.get(self.moment)
        if peak is None or self._total > peak.total:
            self.peaks[self.moment] = self.held()
        return result

    def held(self) -> MemoryByPart:
        """What is alive now."""
        return MemoryByPart(**self._bytes)

    def forget_peaks(self) -> None:
        """Begin anew, in the forward."""
        self.peaks, self.moment, self.activations = {}, "forward", 0

    def belong(self, part: str, tensors: Iterable[Tensor]) -> None:
        """These tensors' storages are of a part."""
        for tensor in tensors:
            key = self._see(tensor, part)
            reference, old, size = self._alive[key]
            self._bytes[old] -= size
            self._bytes[part] += size
            self._alive[key] = (reference, part, size)

    def keep_activations(self) -> None:
        """A forward has ended: what is alive of its results is kept for the backward."""
        for key, (reference, part, size) in self._alive.items():
            if part == "workspace":
                self._alive[key] = (reference, "activations", size)
        self._bytes["activations"] += self._bytes["workspace"]
        self._bytes["workspace"] = 0
        self.activations = max(self.activations, self._bytes["activations"])

    def _see(self, tensor: Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = (weakref.ref(storage, lambda _: self._gone(key)), part, size)
            self._bytes[part] += size
            self._total += size
        return key

    def _gone(self, key: int) -> None:
        _, part, size = self._alive.pop(key)
        self._bytes[part] -= size
        self._total -= size


@contextmanager
def _watched(model: nn.Module, storages: _Storages) -> Iterator[None]:
    """Tells the storages when the model's forward begins and ends, and what is a gradient."""

    def begins(module: nn.Module, inputs: Any) -> None:
        storages.moment = "forward"

    def ends(module: nn.Module, inputs: Any, output: Any) -> None:
        storages.keep_activations()
        storages.moment = "backward"

    def accumulated(parameter: Tensor) -> None:
        assert parameter.grad is not None
        storages.belong("gradients", [parameter.grad])

    hooks = [model.register_forward_pre_hook(begins), model.register_forward_hook(ends)]
    hooks += [p.register_post_accumulate_grad_hook(accumulated) for p in model.parameters()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _state(config: RunConfig) -> TrainingState:
    """new_state() without copies and moves, which fake tensors refuse."""
    model = new_network(config)
    average, second = (new_network(config).requires_grad_(False).eval() for _ in range(2))
    optimizers = build_optimizers(config.optimizer, model, None, average)
    return TrainingState(
        model, average, optimizers, second_average=second if isinstance(config.ema, PostHocEma) else None
    )


def _batch(config: RunConfig, rows: int) -> Batch:
    """A batch as training/batch.py makes it, of any values."""
    model, (height, width) = config.model, config.model.image_size
    t = torch.empty(rows, dtype=torch.float64)
    cond = _condition(config, rows)
    if config.codebook_size is not None:
        return Batch(torch.empty(rows, height, width, dtype=torch.int64), torch.empty(rows, height, width), t, cond)
    x0, eps = (torch.empty(rows, model.in_channels, height, width) for _ in range(2))
    return Batch(x0, eps, t, cond)


def _condition(config: RunConfig, rows: int) -> Condition | None:
    if config.text is None:
        return Condition(class_labels=torch.empty(rows, dtype=torch.int64)) if config.num_classes else None
    tokens, model = text_tokens(config), cast(Any, config.model)
    mask = torch.empty(rows, tokens, dtype=torch.bool)
    if isinstance(config.text, TinyTextConfig):
        return Condition(token_ids=torch.empty(rows, tokens, dtype=torch.int64), text_mask=mask)
    return Condition(
        text_embeds=torch.empty(rows, tokens, model.text_width),
        text_mask=None if isinstance(config.text, SD3Text) else mask,
        pooled_embeds=torch.empty(rows, model.pooled_width) if hasattr(model, "pooled_width") else None,
        micro_conditions=torch.empty(rows, 3) if getattr(model, "micro_conditions", False) else None,
        guidance=torch.empty(rows) if getattr(model, "guidance_embeds", False) else None,
    )


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def _tensors_in(batch: Batch) -> list[Tensor]:
    of_condition: list[Tensor] = []
    if batch.cond is not None:
        batch.cond.map(lambda tensor: of_condition.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return [batch.x0, batch.eps, batch.t, *of_condition]


def _optimizer_tensors(state: TrainingState) -> list[Tensor]:
    entries = [entry for optimizer in state.optimizers.values() for entry in optimizer.state.values()]
    return [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
