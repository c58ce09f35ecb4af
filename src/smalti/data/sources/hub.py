"""A Hugging Face dataset, by its id on the hub or from a folder, through the datasets library."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from smalti.data.decode import Fit
from smalti.data.listing import (
    Listing,
    as_captions,
    captions_or_none,
    check_share,
    held_out_by_key,
    labels_of,
    read_file,
)
from smalti.errors import UserError, unknown_name


@dataclass(frozen=True)
class HubData:
    """A dataset with a column of pictures: owner/name on the hub, or a folder (what save_to_disk wrote, or any that
    load_dataset reads).

    text_column and label_column left at None are `text` or `caption` and `label`, where there are such columns. About
    the share `held_out` of the split is held out, by the hash of the row's number.
    """

    name: str = ""
    split: str = "train"
    image_column: str = "image"
    text_column: str | None = None
    label_column: str | None = None
    fit: Fit = "crop"
    held_out: float = 0.05
    kind: ClassVar[str] = "hub"

    def __post_init__(self) -> None:
        check_share(self.held_out)


def _load(config: HubData) -> Any:
    """The split as a datasets.Dataset. Raises UserError where there is none."""
    if not config.name:
        raise UserError(
            "data.name is empty: give owner/name of a dataset on the hub, or a folder that save_to_disk wrote"
        )
    try:
        import datasets
    except ImportError:
        raise UserError("data=hub needs the package datasets: pip install 'smalti[data]'") from None
    folder = Path(config.name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(config.name)
        else:
            loaded = datasets.load_dataset(config.name)
    except Exception as error:  # of the hub, the network, the files: as many kinds as reasons
        raise UserError(
            f"data.name={config.name!r} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}; "
            "without a connection, give a folder that save_to_disk wrote"
        ) from None
    if isinstance(loaded, Mapping):  # a DatasetDict
        if config.split not in loaded:
            raise unknown_name("data.split", config.split, map(str, loaded))
        loaded = loaded[config.split]
    return loaded


def _column(config: HubData, loaded: Any, field: str, defaults: tuple[str, ...]) -> str | None:
    """The column that a field names; where it names none, the first default that the dataset has."""
    name: str | None = getattr(config, field)
    if name is None:
        return next((default for default in defaults if default in loaded.column_names), None)
    if name not in loaded.column_names:
        raise unknown_name(f"data.{field}", name, loaded.column_names)
    return name


def _labels(loaded: Any, column: str) -> tuple[Tensor | None, tuple[str, ...]]:
    names = getattr(loaded.features[column], "names", None)
    labels, found = labels_of(list(loaded[column]))
    return labels, tuple(names) if names and labels is not None else found


def list_hub(config: HubData) -> Listing:
    """The rows of a dataset's split. Raises UserError for a dataset, split or column that is not there."""
    loaded = _load(config)
    import datasets

    image_column = _column(config, loaded, "image_column", ())
    assert image_column is not None
    is_image = isinstance(loaded.features[image_column], datasets.Image)
    if not is_image and getattr(loaded.features[image_column], "dtype", "") not in ("binary", "large_binary"):
        raise UserError(
            f"data.image_column={image_column!r} holds {loaded.features[image_column]}, no pictures; "
            f"columns: {', '.join(loaded.column_names)}"
        )
    if not len(loaded):
        raise UserError(f"data.name={config.name!r}: the split {config.split!r} is empty")
    text_column = _column(config, loaded, "text_column", ("text", "caption"))
    label_column = _column(config, loaded, "label_column", ("label",))
    try:
        captions = [as_captions(value) for value in loaded[text_column]] if text_column else []
    except ValueError as error:
        raise UserError(f"data.text_column={text_column!r} must hold {error}") from None
    labels, names = _labels(loaded, label_column) if label_column else (None, ())
    pictures = loaded.select_columns([image_column])
    if is_image:
        pictures = pictures.cast_column(image_column, datasets.Image(decode=False))

    def read_bytes(row: int, limit: int | None) -> bytes:
        cell = pictures[row][image_column]
        if isinstance(cell, Mapping):  # {"bytes", "path"}: either may be missing
            cell = cell["bytes"] if cell["bytes"] is not None else read_file(Path(cell["path"] or ""), limit)
        return b"" if cell is None else bytes(cell[:limit])

    keys = [f"{config.split}/{row:08}" for row in range(len(loaded))]
    return Listing(
        origin=f"the dataset {config.name}",
        keys=keys,
        read_bytes=read_bytes,
        held_out=held_out_by_key(keys, config.held_out),
        class_labels=labels,
        class_names=names,
        captions=captions_or_none(captions),
        fit=config.fit,
    )
