"""Where pictures come from: one file a source, each with its config and the function that lists its rows."""

from smalti.data.listing import Listing
from smalti.data.sources.digits import DigitsData, list_digits
from smalti.data.sources.folder import FolderData, list_folder
from smalti.data.sources.hub import HubData, list_hub
from smalti.data.sources.idx import IdxData, list_idx
from smalti.data.sources.tar import TarData, list_tar

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
