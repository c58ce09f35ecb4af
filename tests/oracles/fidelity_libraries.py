"""torchmetrics and torch_fidelity without torchvision, which both import and whose metrics of features never use it."""

import importlib
import sys
import types


class _Stub(types.ModuleType):
    """A module that has every name, each an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_without_torchvision(*names):
    """The modules of those names, imported while torchvision is a stub if it is not installed."""
    stubs = []
    try:
        importlib.import_module("torchvision")
    except ImportError:
        stubs = ["torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"]
        sys.modules.update({name: _Stub(name) for name in stubs})
        for name in stubs[1:]:
            package, _, own = name.rpartition(".")
            setattr(sys.modules[package], own, sys.modules[name])
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for name in stubs:
            del sys.modules[name]
