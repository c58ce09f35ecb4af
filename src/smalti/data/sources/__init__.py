"""Where pictures come from: one file a source, each with its config and the function that lists its rows."""

import glob
from pathlib import Path

from smalti.data.listing import Listing
from smalti.data.sources.digits import DigitsData, list_digits
from smalti.data.sources.folder import FolderData, list_folder
from smalti.data.sources.hub import HubData, list_hub
from smalti.data.sources.idx import IdxData, list_idx
from smalti.data.sources.tar import TarData, list_tar

__all__ = [
    "DataConfig", "DigitsData", "FolderData", "HubData", "IdxData", "TarData", "list_pictures", "source_of",
]  # fmt: skip

DataConfig = DigitsData | IdxData | FolderData | HubData | TarData


def list_pictures(config: DataConfig) -> Listing:
    """What a source holds, no picture decoded yet. Raises UserError for a source that is not there or empty."""
    match config:
        case DigitsData():
            return list_digits(config)
        case IdxData():
            return list_idx(config)
        case FolderData():
            return list_folder(config)
        case HubData():
            return list_hub(config)
        case TarData():
            return list_tar(config)


def source_of(text: str) -> DataConfig:
    """The source that a path or name most likely means.

    "digits"; hf://owner/name, a dataset on the hub; a folder that save_to_disk wrote; .tar files, a folder or a pattern
    of them; a folder of IDX files; or any other folder, as pictures.
    """
    if text == "digits":
        return DigitsData()
    if text.startswith("hf://"):
        return HubData(text.removeprefix("hf://"))
    folder = Path(text)
    if text.endswith(".tar") or (not folder.exists() and ("{" in text or glob.has_magic(text))):
        return TarData(text)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return HubData(text)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any("-ubyte" in name for name in names):
        return IdxData(text)
    if any(name.endswith(".tar") for name in names):
        return TarData(text)
    return FolderData(text)
