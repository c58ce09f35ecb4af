"""One door for weights: a smalti run or network, a diffusers folder or instance, an original repository's file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.checkpoint import CheckpointError, list_checkpoints, named_checkpoints, read_checkpoint
from smalti.conditioning.prompted import PromptedNetwork
from smalti.conditioning.tiny import TinyTextConfig, TinyTextEncoder
from smalti.config import model_from_json, to_json
from smalti.errors import UserError
from smalti.interop.files import read_folder, read_pickle, read_safetensors, write_safetensors
from smalti.interop.formats import format_of_class, original_of_tensors
from smalti.interop.layout import Layout, check_tensors
from smalti.models.registry import ModelConfig, network_of
from smalti.run_folder import RunFolder, read_config, write_json

_NETWORK, _WEIGHTS = "network.json", "network.safetensors"  # of a bare network in our own format
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "model.")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Weights:
    """A network as read from somewhere: our config, our state dict, and the prefix that its file put before each name.

    source: "smalti", "diffusers" or an original format's name. text, text_tensors: the text encoder that a run trained
    along with the network. codebook_size: of a network of tokens.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    source: str
    prefix: str = ""
    text: TinyTextConfig | None = None
    text_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    codebook_size: int | None = None


def _our_shapes(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(network_of(config).state_dict())


def _translated(tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout, source: str) -> dict[str, Tensor]:
    layout.check(tensors, _our_shapes(config), source)
    return layout.to_ours(tensors)


def _read_run(folder: Path, checkpoint: str | None, ema: bool) -> Weights:
    run = RunFolder(folder)
    config = read_config(run.path)
    chosen = _checkpoint_folder(run, checkpoint)
    group = "ema" if ema else "model"
    try:
        tensors = read_checkpoint(chosen, (group,)).tensors[group]
    except CheckpointError as error:
        older = [f.name for f in list_checkpoints(run.checkpoints) if f.name < chosen.name]
        hint = f"; an older one is there: pass checkpoint={older[-1]!r}" if older else ""
        raise CheckpointError(f"{error}{hint}") from None
    except KeyError:
        raise CheckpointError(f"{chosen} holds averaged weights only: pass ema=True") from None
    if not isinstance(config.text, TinyTextConfig):
        return Weights(config.model, tensors, "smalti", codebook_size=config.codebook_size)
    network, text = (
        {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        for part in ("network.", "text.")
    )
    return Weights(
        config.model, network, "smalti", text=config.text, text_tensors=text, codebook_size=config.codebook_size
    )


def _checkpoint_folder(run: RunFolder, name: str | None) -> Path:
    folders = list_checkpoints(run.checkpoints)
    if not folders:
        raise CheckpointError(f"no checkpoint in {run.checkpoints}: the run has not saved one yet")
    if name is None:
        return folders[-1]
    chosen, folders = run.checkpoints / name, [*folders, *named_checkpoints(run.checkpoints)]
    if chosen not in folders:
        raise CheckpointError(
            f"no checkpoint {name!r} in {run.checkpoints}; there: {', '.join(f.name for f in folders)}"
        )
    return chosen


def _json_object(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return body


def _read_diffusers(folder: Path, body: Mapping[str, Any]) -> Weights:
    form = format_of_class(str(body["_class_name"]), body.get("norm_type"))
    config = form.read_config(body)
    tensors = read_folder(folder)
    return Weights(config, _translated(tensors, config, form.diffusers(config), str(folder)), "diffusers")


def _read_module(module: nn.Module) -> Weights:
    body = dict(getattr(module, "config", {}))
    form = format_of_class(type(module).__name__, body.get("norm_type"))
    config = form.read_config(body)
    name = type(module).__name__
    return Weights(config, _translated(module.state_dict(), config, form.diffusers(config), name), "diffusers")


def _common_prefix(tensors: Mapping[str, Tensor]) -> str:
    return next((p for p in _PREFIXES if any(name.startswith(p) for name in tensors)), "")


def _read_original(path: Path, given: ModelConfig | None) -> Weights:
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    prefix = _common_prefix(tensors)
    # A whole checkpoint (of SD3, say) also holds the autoencoder and text encoders beside what has the prefix.
    cut = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    config, original = original_of_tensors(cut, str(path))
    config = given or config
    return Weights(config, _translated(cut, config, original.layout(config), str(path)), original.name, prefix)


def _read_network(folder: Path) -> Weights:
    config = model_from_json(_json_object(folder / _NETWORK))
    tensors = read_safetensors(folder / _WEIGHTS)
    check_tensors(tensors, _our_shapes(config), str(folder))
    return Weights(config, tensors, "smalti")


def write_network(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a bare network in our own format. Raises UserError where it cannot be written."""
    write_safetensors(folder / _WEIGHTS, tensors)
    write_json(folder / _NETWORK, to_json(config))


def read_weights(
    source: str | Path | nn.Module,
    *,
    checkpoint: str | None = None,
    ema: bool = True,
    config: ModelConfig | None = None,
) -> Weights:
    """Our config and state dict from anything that load_backbone takes; errors as there."""
    if isinstance(source, nn.Module):
        return _read_module(source)
    path = _fetched(source) if str(source).startswith("hf://") else Path(source)
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in _PICKLES:
            raise UserError(f"{path}: a file of weights ends in .safetensors or {', '.join(_PICKLES)}")
        return _read_original(path, config)
    if (path / _NETWORK).is_file():
        return _read_network(path)
    if (path / "model_index.json").is_file():
        path = next((path / part for part in ("transformer", "unet") if (path / part).is_dir()), path)
    if (path / "config.json").is_file():
        body = _json_object(path / "config.json")
        if "_class_name" in body:
            return _read_diffusers(path, body)
    elif path.is_dir() and any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} has weights and no config.json: a diffusers folder needs one (for a single file of an original "
            "repository give the file's path)"
        )
    return _read_run(path, checkpoint, ema)


def _fetched(source: str | Path) -> Path:
    """A hub repository's network, hf://owner/name or hf://owner/name/subfolder, from the local cache if it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, *rest = str(source).removeprefix("hf://").split("/")
    within = "/".join(rest)
    patterns = [f"{within}/*"] if within else ["*.json", "*.safetensors", "transformer/*", "unet/*"]
    try:
        folder = Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"cannot fetch {source}: {str(error).splitlines()[0]}") from None
    return folder / within


def check_precision(device: str | torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where the device cannot compute in dtype, by trying what a transformer needs."""
    try:
        x = torch.ones(1, 1, 8, 8, device=device, dtype=dtype)
        F.layer_norm(F.scaled_dot_product_attention(x, x, x) @ x, (8,)).sum().item()
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"dtype={dtype} does not work on device {str(device)!r}: {reason}; use float32") from None


def load_backbone(
    source: str | Path | nn.Module,
    *,
    checkpoint: str | None = None,
    ema: bool = True,
    config: ModelConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Our network with the weights of source, in eval mode; a PromptedNetwork from a run that trained a text encoder.

    source: a smalti run or a network written by `smalti convert`; a diffusers folder, or a pipeline's whose
    transformer/ or unet/ it takes; an instance of a diffusers class; a file of an original repository (.safetensors
    or .pt, of which only tensors are read); hf://owner/name of the hub. checkpoint: of a run, a folder's name under
    checkpoints/, the newest by default; ema=False: its raw weights. config: for an original file whose tensors leave
    something open, such as the number of heads. dtype: None keeps the file's.

    Raises UserError naming what is missing, surplus, wrongly shaped or damaged, and classes that smalti does not know.
    """
    if dtype is not None:
        check_precision(device, dtype)
    weights = read_weights(source, checkpoint=checkpoint, ema=ema, config=config)
    with torch.device("meta"):
        model = network_of(weights.config, weights.codebook_size)
        text = None if weights.text is None else TinyTextEncoder(weights.text)
    # Copies where the tensors are another module's own: two networks must not share what one of them may train.
    tensors = {k: v.clone() for k, v in weights.tensors.items()} if isinstance(source, nn.Module) else weights.tensors
    model.load_state_dict(tensors, assign=True)
    if text is not None:
        text.load_state_dict(weights.text_tensors, assign=True)
        model = PromptedNetwork(model, text)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
