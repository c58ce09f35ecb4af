"""A step whose loss or gradient is not finite: what is kept of it, and the step run again to find where it began."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.config import RunConfig
from smalti.diffusion.objective import per_sample_loss
from smalti.diffusion.processes import make_process
from smalti.errors import UserError
from smalti.run_folder import RunFolder, read_config, write_json
from smalti.training.batch import Batch
from smalti.training.forward import product_precision
from smalti.training.state import new_state
from smalti.types import Backbone, Condition

_NAMED = 8  # rows, modules and gradients that are listed one by one


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite; the message says where the batch and the last good state lie."""


@dataclass(frozen=True)
class Replay:
    """What a failed step did when it was run again.

    losses: of each sample. bad_rows: samples whose loss is not finite. first_module: the first whose output is not
    finite, None where all are. bad_gradients: parameters whose gradient is not finite. recorded: failure.json.
    """

    losses: Tensor
    bad_rows: tuple[int, ...]
    first_module: str | None
    bad_gradients: tuple[str, ...]
    gradient_norm: float
    recorded: Mapping[str, Any]

    @property
    def reproduced(self) -> bool:
        """Whether it failed again."""
        return bool(self.bad_rows or self.bad_gradients) or not math.isfinite(self.gradient_norm)

    def text(self) -> str:
        """What happened, in lines."""
        step, rank = self.recorded["step"], self.recorded["rank"]
        lines = [
            f"step {step}, part {rank + 1} of {self.recorded['ranks']} of its batch: it had loss "
            f"{self.recorded['loss']}, gradient norm {self.recorded['gradient_norm']}",
            f"run again: loss {float(self.losses.mean())}, gradient norm {self.gradient_norm}",
            f"samples whose loss is not finite: {_listed(self.bad_rows)} of {len(self.losses)}",
            f"first module whose output is not finite: {self.first_module or 'none'}",
            f"gradients that are not finite: {_listed(self.bad_gradients)}",
            "reproduced" if self.reproduced else "not reproduced: all is finite here",
        ]
        return "\n".join(lines)


def _listed(names: tuple[object, ...]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as named tensors; the condition's fields by their own names."""
    tensors = {"x0": batch.x0, "eps": batch.eps, "t": batch.t}
    if batch.cond is not None:
        given = {f.name: getattr(batch.cond, f.name) for f in fields(batch.cond)}
        tensors |= {name: tensor for name, tensor in given.items() if tensor is not None}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def batch_from_tensors(tensors: Mapping[str, Tensor]) -> Batch:
    """batch_tensors() back."""
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("x0", "eps", "t")}
    return Batch(tensors["x0"], tensors["eps"], tensors["t"], Condition(**rest) if rest else None)


def join_batches(batches: list[Batch]) -> Batch:
    """Micro-batches of one step as one batch."""
    parts = [batch_tensors(batch) for batch in batches]
    return batch_from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def keep_failure(
    folder: RunFolder, batch: Batch, weights: Mapping[str, Tensor], numbers: Mapping[str, Any], rank: int
) -> None:
    """Write what replay() needs: this rank's batch, the weights that met it, and the step, seed, loss and norm."""
    folder.failure.mkdir(exist_ok=True)
    save_file(batch_tensors(batch), _batch_file(folder, rank))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder.failure / "model.safetensors")
    write_json(folder.failure / _record_name(rank), dict(numbers))


def _batch_file(folder: RunFolder, rank: int) -> Path:
    return folder.failure / ("batch.safetensors" if rank == 0 else f"batch_rank{rank}.safetensors")


def _record_name(rank: int) -> str:
    return "failure.json" if rank == 0 else f"failure_rank{rank}.json"


def replay(run: Path, device: str = "cpu", rank: int = 0) -> Replay:
    """Run the step that stopped a run again, eagerly, and find where the first value that is not finite came from.

    rank: whose part of the batch, for a run on several. Raises UserError where the run has no such failure.
    """
    config, folder = read_config(run), RunFolder(run)
    record, batch_file = folder.failure / _record_name(rank), _batch_file(folder, rank)
    if not (record.is_file() and batch_file.is_file()):
        raise UserError(f"{run} has no failed step{f' of rank {rank}' if rank else ''}: {record} is missing")
    recorded = json.loads(record.read_text())
    state = new_state(config, torch.device(device))
    state.model.load_state_dict(load_file(folder.failure / "model.safetensors", device=str(state.device)))
    tensors = load_file(batch_file, device=str(state.device))
    return _run_again(config, state.model, batch_from_tensors(tensors), recorded)


def _run_again(config: RunConfig, model: nn.Module, batch: Batch, recorded: Mapping[str, Any]) -> Replay:
    first: list[str] = []

    def look(name: str, output: object) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        finite = all(bool(torch.isfinite(o).all()) for o in outputs if isinstance(o, Tensor) and o.is_floating_point())
        if not finite and not first:
            first.append(name)

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    process = make_process(config.process)
    assert isinstance(model, Backbone)
    try:
        with product_precision(config.loop, batch.x0.device):
            losses = per_sample_loss(model, process, config.objective, batch.x0, batch.eps, batch.t, batch.cond)
    finally:
        for handle in handles:
            handle.remove()
    (losses.mean() * recorded["loss_scale"]).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= recorded["loss_scale"]
    bad = tuple(n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    rows = tuple(int(row) for row in torch.nonzero(~torch.isfinite(losses)).flatten())
    return Replay(losses.detach(), rows, first[0] if first else None, bad, norm, recorded)
