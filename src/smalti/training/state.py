"""Everything that changes while a run trains, and its way into a checkpoint and back."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smalti.checkpoint import Checkpoint
from smalti.conditioning.prompted import PromptedNetwork, build_prompted_network
from smalti.conditioning.tiny import TinyTextConfig
from smalti.config import RunConfig, flat_json
from smalti.errors import UserError
from smalti.interop.load import read_weights
from smalti.models.registry import build_model
from smalti.nn.sharded import like_shard, local_tensor
from smalti.optim.ema import EmaConfig, ExponentialEma, PostHocEma, PowerEma, update_ema
from smalti.optim.mup import rescale_initial_weights
from smalti.optim.optimizers import build_optimizers
from smalti.training.loss_scale import LossScale
from smalti.training.parallel import Ranks, Sharding, is_sharded, shard

_KEPT_VALIDATIONS = 4


@dataclass
class TrainingState:
    """Weights, their averages, optimisers, and how far the run is.

    average: what validates and draws samples. second_average: of ema=post_hoc.
    validations: (step, loss of each held-out row) of the last validations, oldest first.
    """

    model: nn.Module
    average: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0  # trained so far, over all sessions
    second_average: nn.Module | None = None
    loss_scale: LossScale = field(default_factory=LossScale)  # of float16 products; elsewhere it has no part
    validations: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained weights."""
        return list(self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def averages(self) -> dict[str, nn.Module]:
        """The averaged networks by their names in checkpoints."""
        second = {} if self.second_average is None else {"second_ema": self.second_average}
        return {"ema": self.average, **second}

    def update_averages(self, config: EmaConfig) -> None:
        """Move the averages towards the weights, after the update of step (0, 1, ...); not the optimiser's own."""
        weights = [local_tensor(p) for p in self.model.parameters()]
        kept = list[PowerEma | ExponentialEma](config.averages)
        for average, ema in zip(self.averages().values(), kept, strict=False):
            update_ema([local_tensor(p) for p in average.parameters()], weights, ema.decay(self.step + 1))

    def weights_are_finite(self) -> bool:
        """Whether none of this rank's weights is NaN or infinite."""
        return all(bool(torch.isfinite(local_tensor(p)).all()) for p in self.model.parameters())

    def keep_validation(self, losses: Tensor) -> None:
        """Remember the loss of each held-out row at this step, for the verdict on the next ones."""
        self.validations = [*self.validations, (self.step, losses)][-_KEPT_VALIDATIONS:]


def new_network(config: RunConfig) -> nn.Module:
    """The network that a run trains, with its published initialisation: with its text encoder, where it has one."""
    if isinstance(config.text, TinyTextConfig):
        return build_prompted_network(config.model, config.text, config.seed, config.codebook_size)
    return build_model(config.model, config.seed, config.codebook_size)


def new_state(
    config: RunConfig, device: torch.device, ranks: Ranks | None = None, sharding: Sharding = "ddp"
) -> TrainingState:
    """The state before the first step, in parts on the ranks where sharding is "fsdp".

    Raises UserError for initial weights of another network.
    """
    model, mup = new_network(config), config.parametrisation
    scales = None if mup is None else rescale_initial_weights(model, mup, config.seed)
    if config.initial_weights is not None:
        weights = read_weights(config.initial_weights)
        if weights.codebook_size != config.codebook_size:
            raise UserError(
                f"initial_weights={config.initial_weights}: its codebook is {weights.codebook_size or 'none'}, this "
                f"run's {config.codebook_size or 'none'}: networks of tokens begin from one of the same tokens"
            )
        if weights.config != config.model:
            ours, theirs = flat_json(config.model), flat_json(weights.config)
            name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
            raise UserError(
                f"initial_weights={config.initial_weights}: its {name} is {theirs.get(name)}, this run's is "
                f"{ours.get(name)}; `smalti adapt` changes classes, size, patch and depth"
            )
        network = model.network if isinstance(model, PromptedNetwork) else model
        network.load_state_dict(weights.tensors)
    model = model.to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    second_average = copy.deepcopy(average) if isinstance(config.ema, PostHocEma) else None
    if ranks is not None and is_sharded(ranks, sharding):
        shard(model, ranks, trained=True)
        for kept in (average, second_average):
            if kept is not None:
                shard(kept, ranks, trained=False)
    optimizers = build_optimizers(config.optimizer, model, scales, average)
    return TrainingState(model, average, optimizers, second_average=second_average)


def _optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {}
    for name, optimizer in optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                tensors[f"{name}/{index}/{key}"] = value
    return tensors


def _parameter(optimizer: torch.optim.Optimizer, index: int) -> Tensor:
    """The parameter that a state_dict calls by its number."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return parameters[index]


def _restore_optimizers(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            owner, index, key = path.split("/")
            if owner == name:
                parameter = _parameter(optimizer, int(index))
                state.setdefault(int(index), {})[key] = like_shard(tensor, parameter)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def state_tensors(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by group, sharded where the state is; they share memory with it."""
    groups = {
        "model": state.model.state_dict(),
        **{name: average.state_dict() for name, average in state.averages().items()},
        "optimizer": _optimizer_tensors(state.optimizers),
    }
    return groups | ({"validations": {str(step): losses for step, losses in state.validations}})


def empty_like_state(state: TrainingState, path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor for state_tensors()' entry "group/name", cut as the state is cut on this rank."""
    group, name = path.split("/", 1)
    if group == "optimizer":
        owner, index, _ = name.split("/")
        like = _parameter(state.optimizers[owner], int(index))
    else:
        like = {"model": state.model, **state.averages()}[group].state_dict()[name]
    return torch.empty_like(like) if like.shape == shape else torch.empty(shape, dtype=dtype)


def state_numbers(state: TrainingState) -> dict[str, Any]:
    """What of a state goes into a checkpoint's JSON."""
    return {"seconds": state.seconds, "loss_scale": [state.loss_scale.factor, state.loss_scale.good_steps]}


def _restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({name: like_shard(t, own[name]) if name in own else t for name, t in tensors.items()})


def restore_state(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's values into a state of the same config, whatever ranks either is spread over."""
    _restore_module(state.model, checkpoint.tensors["model"])
    for name, average in state.averages().items():
        _restore_module(average, checkpoint.tensors[name])
    _restore_optimizers(state.optimizers, checkpoint.tensors["optimizer"])
    state.step = checkpoint.step
    state.seconds = float(checkpoint.state["seconds"])
    # Checkpoints of earlier versions have neither.
    state.loss_scale = LossScale(*checkpoint.state.get("loss_scale", ()))
    losses = checkpoint.tensors.get("validations", {})
    state.validations = sorted(((int(step), rows) for step, rows in losses.items()), key=lambda entry: entry[0])
