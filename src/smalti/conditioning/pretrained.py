"""A pretrained text model and its tokenizer, from a folder or the hub, through transformers."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from smalti.conditioning.captions import valid_unicode
from smalti.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model")
_READ_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class TextModel:
    """A frozen text model of transformers, its tokenizer, the folders that both came from."""

    model: Any
    tokenizer: Any
    folders: tuple[Path, ...]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def tokens(self, captions: Sequence[str], max_tokens: int, padding: Literal["max_length", "longest"]) -> Any:
        """The tokenizer's output with input_ids and attention_mask [captions, tokens], cut at max_tokens."""
        texts = [valid_unicode(caption) for caption in captions]
        encoded = self.tokenizer(
            texts, padding=padding, max_length=max_tokens, truncation=True, return_attention_mask=True,
            return_tensors="pt",
        )  # fmt: skip
        return encoded.to(self.device)

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before truncation, those that begin and end it included."""
        texts = [valid_unicode(caption) for caption in captions]
        return [len(ids) for ids in self.tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the names and bytes of the files that the model and its tokenizer were read from."""
        digest = hashlib.sha256()
        for folder in self.folders:
            for path in sorted({path for pattern in _READ_FILES for path in folder.glob(pattern)}):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                digest.update(path.name.encode() + b"\0" + content)
        return digest.digest()


def load_text_model(
    class_name: str, source: str, field: str, precision: Precision, device: torch.device | str
) -> TextModel:
    """A class of transformers with the weights of source, in eval mode, and the tokenizer beside them.

    source: a folder with config.json, *.safetensors and the tokenizer's files, where a pipeline's text_encoder_2 has
    its tokenizer in tokenizer_2 beside it; or such a folder of the hub: owner/name or owner/name/text_encoder_2.
    field: of the config, for the errors. Raises UserError for a source that is not there or does not fit the class.
    """
    import transformers
    from safetensors import SafetensorError

    folder = text_model_folder(source, field)
    tokenizer_folder = _tokenizer_folder(folder)
    if tokenizer_folder is None:
        raise UserError(
            f"{field}={source!r} has no tokenizer: {' or '.join(_TOKENIZER_FILES[:2])} must lie in that folder or in "
            f"{_sibling(folder.name)!r} beside it"
        )
    try:
        with _silence():
            model, loading = getattr(transformers, class_name).from_pretrained(
                folder, dtype=getattr(torch, precision), local_files_only=True, output_loading_info=True,
                use_safetensors=True,
            )  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{field}={source!r} is no {class_name} with its tokenizer: {_first_line(error)}") from None
    # transformers fills what is missing or of another shape with random numbers and goes on.
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if wrong:
        raise UserError(
            f"{field}={source!r} is no {class_name}: it lacks {len(wrong)} tensors, the first is {wrong[0]}"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"{field}={source!r}: its tokenizer has no padding token")
    tokenizer.padding_side = "right"
    folders = (folder,) if tokenizer_folder == folder else (folder, tokenizer_folder)
    return TextModel(model.to(device).eval().requires_grad_(False), tokenizer, folders)


def text_model_folder(source: str, field: str) -> Path:
    """The local folder of a source: itself, or the hub's files in their cache, fetched if need be."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            parts = sorted(part.parent.name for part in folder.glob("text_encoder*/config.json"))
            hint = f"; give {folder / parts[0]}" if parts else ""
            raise UserError(f"{field}={source!r} holds no config.json: it is not the folder of a text model{hint}")
        return folder
    owner, _, rest = source.removeprefix("hf://").partition("/")
    name, _, within = rest.partition("/")
    how = "give a local folder with config.json, *.safetensors and the tokenizer's files, as save_pretrained writes it"
    if source.startswith((".", "/", "~")) or not owner or not name:
        raise UserError(f"{field}={source!r}: there is no such folder; {how}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folders = [within, _sibling(within)] if within else [""]
    patterns = [f"{part}/{pattern}".lstrip("/") for part in folders for pattern in _READ_FILES]
    try:
        cached = snapshot_download(f"{owner}/{name}", allow_patterns=patterns, ignore_patterns="*.fp16*")
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"{field}={source!r} is no folder here and cannot be had from the hub ({_first_line(error)}): {how}"
        ) from None
    fetched = Path(cached) / within
    if not (fetched / "config.json").is_file():
        raise UserError(f"{field}={source!r}: the hub's repository has no text model there; {how}")
    return fetched


def _sibling(name: str) -> str:
    return name.replace("text_encoder", "tokenizer")


def _tokenizer_folder(folder: Path) -> Path | None:
    """Where the tokenizer of a text model lies: in its own folder, or in a pipeline's beside it; None: nowhere.

    transformers makes an empty tokenizer where there is none, and says nothing.
    """
    places = (folder, folder.with_name(_sibling(folder.name)))
    return next((place for place in places if any((place / name).is_file() for name in _TOKENIZER_FILES)), None)


@contextmanager
def _silence() -> Iterator[None]:
    """transformers without progress bars and load reports: what matters in them is raised as an error here."""
    from transformers.utils import logging as messages

    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.CRITICAL)
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def padded_tokens(hidden: Tensor, mask: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states [batch, tokens, width] and their mask, with zeros up to max_tokens and where the mask is False."""
    missing = max_tokens - hidden.shape[1]
    hidden = torch.where(mask[..., None], hidden, 0)
    return torch.nn.functional.pad(hidden, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))
