"""The arguments of `smalti data ...`; the docstrings are what `smalti data COMMAND --help` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, subcommand


@dataclass(frozen=True)
class DataEmoji:
    """Write every emoji of the Noto colour font as a picture with captions: about 3,800 of them.

    Example: smalti data emoji --out emoji

    Skin tones, genders, families and flags included. The folder is in Hugging Face's ImageFolder layout: pictures/ and
    metadata.jsonl (file_name; text, a list of captions; emoji; base, the name without skin tone), with a contact sheet.
    Transparent pixels become white when the pictures are read.
    """

    out: Path = Path("emoji")
    """The folder to write."""
    font: Path | None = None
    """NotoColorEmoji.ttf (default: where Debian, Fedora, Arch and macOS keep it)."""
    size: int = 128
    """Height and width of the pictures; the font's own is 128."""
    overwrite: bool = False
    """Replace the folder in --out."""


@dataclass(frozen=True)
class DataShow:
    """Look at a source of pictures: how many, of which sizes, captions and classes, and what cannot be read and why.

    Example: smalti data show pictures --out sheet.png
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder of pictures, of IDX files or of .tar shards; a shard or a pattern of shards; a folder that datasets'
    save_to_disk wrote; hf://owner/name; or digits."""
    out: Path = Path("sheet.png")
    """Where to write a contact sheet."""
    num_images: int = 100
    """Pictures on the sheet, spread evenly over the source."""
    size: int = 64
    """Height and width of a picture on the sheet."""


@dataclass(frozen=True)
class DataCache:
    """Encode the pictures of a source once, into a cache of latents that training reads.

    Example: smalti data cache pictures --encoder runs/autoencoder --size 64 64 --jobs 2

    An entry is addressed by the picture's bytes, the encoder's weights, and size and crop. A second run encodes
    nothing; what changed, is new or is damaged is encoded; a run that was killed is gone on with. See
    docs/data-cache.md.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """What `smalti data show` takes."""
    encoder: str
    """An autoencoder's folder (diffusers', or of `smalti train-autoencoder`), a name on the hub, or kl, dc, tiny or
    vq."""
    subfolder: str | None = None
    """Where in it (default: vae or vqvae, where it has one of them)."""
    out: Path | None = None
    """The cache's folder (default: the one that `smalti train` reads). It serves any sources, encoders and sizes."""
    size: tuple[int, int] = (256, 256)
    """Height and width of the pictures that are encoded."""
    flips: bool = False
    """Also encode the mirror images, for training with flips."""
    jobs: int = 1
    """Processes that encode."""
    batch_size: int = 16
    """Pictures encoded at a time, in each process."""
    device: str = "cpu"
    """Where to encode: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Data:
    """Make, look at and encode sets of pictures.

    Examples: smalti data emoji --out emoji
              smalti data show emoji
              smalti data cache emoji --encoder runs/autoencoder --size 64 64
    """

    command: (
        Annotated[DataEmoji, subcommand("emoji")]
        | Annotated[DataShow, subcommand("show")]
        | Annotated[DataCache, subcommand("cache")]
    )
