"""Networks that others wrote: diffusers folders and instances, original repositories' files, both ways."""

from smalti.interop.load import load_backbone

__all__ = ["load_backbone"]
