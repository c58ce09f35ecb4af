"""Reading and writing tensor files: safetensors (one or sharded) and PyTorch's pickles, nothing of them executed."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti.data.fingerprint import tensor_digest
from smalti.errors import UserError

_INDEX = ".safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model"  # the stem that diffusers gives a network's files
_CHECKSUM = "smalti_sha256"
_MAX_SHARD_BYTES = 10 * 2**30  # as diffusers splits


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises UserError for a missing or damaged one: files that smalti wrote carry a checksum of their values; in others
    damage inside a tensor shows only where it leaves a value that is not finite.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get(_CHECKSUM)
    except (SafetensorError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if digest is not None and digest != tensor_digest(tensors):
        raise UserError(f"{path} is damaged: its checksum does not match")
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise UserError(f"{path} is damaged: {broken[0]} holds values that are not finite")
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, from one file or from shards. Raises UserError naming what is missing."""
    index = folder / f"{WEIGHTS}{_INDEX}"
    if not index.is_file():
        single = folder / f"{WEIGHTS}.safetensors"
        legacy = folder / f"{WEIGHTS}.bin"
        if not single.is_file() and legacy.is_file():
            return read_pickle(legacy)
        return read_safetensors(single)
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged: it does not parse") from None
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        tensors |= read_safetensors(folder / Path(name).name)
    lost = sorted(set(places) - set(tensors))
    if lost:
        raise UserError(f"{folder}: {len(lost)} tensors of the index are in no shard: {', '.join(lost[:8])}")
    return tensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file: a state dict, or one inside a checkpoint ("ema" first, as DiT's samplers take it).

    Only tensors and plain containers are read. A file with other objects (old training checkpoints carry their
    argparse.Namespace) is read with those left out as inert stand-ins: nothing of it is ever called. Raises UserError
    for what holds no tensors or is not such a file.
    """
    from smalti.interop.safe_pickle import read_tensors_only

    try:
        body = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except pickle.UnpicklingError:
        body = read_tensors_only(path)
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{path} is damaged or no PyTorch file: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    return _state_dict(body, path)


def _state_dict(body: Any, path: Path) -> dict[str, Tensor]:
    for key in ("ema", "ema_model", "state_dict", "model", "module"):
        if isinstance(body, Mapping) and isinstance(body.get(key), Mapping):
            body = body[key]
            break
    tensors = {k: v for k, v in body.items() if isinstance(v, Tensor)} if isinstance(body, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} holds no state dict")
    return tensors


def write_folder(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
    """Write a network's tensors as diffusers names and shards them. Raises UserError where it cannot be written."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / f"{WEIGHTS}.safetensors", shards[0])
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file_name = f"{WEIGHTS}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file_name, shard)
        places |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / f"{WEIGHTS}{_INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, path, metadata={"format": "pt", _CHECKSUM: tensor_digest(plain)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
