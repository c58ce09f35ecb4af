"""The tensors of a PyTorch file that also holds pickled objects, with nothing of those objects executed.

torch.load(weights_only=True) refuses such files whole (DiT's own training checkpoints hold an argparse.Namespace).
Here every global that is not on a short list becomes an inert stand-in class: it can be built, but it does nothing
and calls nothing. What would do more than hold data (a reduce with a function: os.system and the like) is refused.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.errors import UserError

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_HARMLESS = {"argparse.Namespace": "arguments", "omegaconf.dictconfig.DictConfig": "a config"}


class _Inert:
    """A stand-in for an object that is not wanted: holds nothing, whatever it is given."""

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *rest: Any) -> Tensor:
    return data


class _TensorsOnly(pickle.Unpickler):
    """Resolves the few globals that a state dict is made of; data holders become inert, the rest is an error."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, prefix: str, path: Path) -> None:
        super().__init__(file)
        self.archive, self.prefix, self.path = archive, prefix, path
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The global of this name, if it is one that only holds data."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
            "torch.Size": tuple,
        }
        full = f"{module}.{name}"
        if full in known:
            return known[full]
        if full in _HARMLESS:
            return _Inert
        raise UserError(f"{self.path} holds a pickled {full}: it could run code when opened, so it was not opened")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage of the archive, flat."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UserError(f"{self.path} holds a storage of an unknown kind")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.prefix}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
        return self.storages[key]


def read_tensors_only(path: Path) -> Any:
    """The containers and tensors of a file of torch.save, other data left out.

    Raises UserError for a file with a global that could run code, and for one that is damaged or older than
    PyTorch 1.6 (not a zip archive).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            return _TensorsOnly(io.BytesIO(archive.read(name)), archive, name.removesuffix("/data.pkl"), path).load()
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is damaged, or a pickle from before PyTorch 1.6 with more in it than tensors: not opened"
        ) from None
    except Exception as error:  # damaged pickles raise what they like (the pickle module's documentation says so)
        raise UserError(f"{path} is damaged: {error}") from None
