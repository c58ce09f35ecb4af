"""An epoch of latents from the cache against encoding the pictures on the fly, with an autoencoder of SD's size.

    python benchmarks/latent_cache.py [--pictures 24] [--size 64] [--batch-size 8] [--rounds 3] [--threads 2]

AutoencoderKL with Stable Diffusion's widths (83.7 million weights) and random values. On the fly means: pictures that
are decoded already are encoded, sampled and normalised, batch by batch. From the cache means the same latents drawn
from stored moments; "opened anew" also reads the index and checks every entry, as the first epoch of a run does. The
outputs are compared first.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from timing import interleaved, machine, write_row
from torch import Tensor

from smalti import rng
from smalti.autoencoders.caching import open_latents
from smalti.autoencoders.registry import KLAutoencoder, load_autoencoder
from smalti.data.cache import Cache
from smalti.data.cached_rows import CachedLatents
from smalti.data.latents import LatentStatistics, sample_moments
from smalti.data.opening import open_rows
from smalti.data.sources import FolderData


def prepare(folder: Path, pictures: int, size: int) -> None:
    """Write pictures of noise, and an AutoencoderKL of Stable Diffusion's size."""
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(pictures):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:04}.png")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    network.save_pretrained(folder / "autoencoder")


def data_of(folder: Path) -> FolderData:
    return FolderData(str(folder / "pictures"), held_out=0.0)


def on_the_fly(folder: Path, size: int, batch_size: int, statistics: LatentStatistics) -> Callable[[], Tensor]:
    """An epoch that encodes."""
    autoencoder = load_autoencoder(KLAutoencoder(str(folder / "autoencoder")))
    rows = open_rows(data_of(folder), 3, (size, size)).training
    shape = (autoencoder.latent_channels, size // autoencoder.factor, size // autoencoder.factor)

    @torch.inference_mode()
    def epoch() -> Tensor:
        parts = []
        for indices in torch.arange(len(rows)).split(batch_size):
            moments = autoencoder.encode_moments(rows.read(indices))
            eps = rng.normal(shape, seed=0, purpose="data/latent", index=indices, call=0)
            parts.append(statistics.normalise(sample_moments(moments, eps)))
        return torch.cat(parts)

    return epoch


def from_cache(
    folder: Path,
    shape: tuple[int, int, int],
    keys: list[str],
    batch_size: int,
    statistics: LatentStatistics,
    anew: bool,
) -> Callable[[], Tensor]:
    """An epoch that reads; anew: with a cache that is opened for it."""
    cache = Cache(folder / "cache")

    def epoch() -> Tensor:
        rows = CachedLatents(Cache(folder / "cache") if anew else cache, shape, keys, statistics)
        return torch.cat([rows.read(indices, draw=0) for indices in torch.arange(len(rows)).split(batch_size)])

    return epoch


def main(pictures: int = 24, size: int = 64, batch_size: int = 8, rounds: int = 3, threads: int = 2) -> None:
    """Measure, print a table and append a row to benchmarks/results/latent_cache.jsonl."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, pictures, size)
        config = KLAutoencoder(str(folder / "autoencoder"))
        opened = open_latents(folder / "cache", data_of(folder), config, (size, size), batch_size=batch_size)
        rows, statistics = opened.training, opened.statistics
        read = partial(from_cache, folder, rows.shape, list(rows.keys), batch_size, statistics)
        ways = {
            "on the fly": partial(on_the_fly, folder, size, batch_size, statistics),
            "cache": partial(read, False),
            "cache, opened anew": partial(read, True),
        }
        expected, output = ways["on the fly"]()(), ways["cache, opened anew"]()()
        assert (output - expected).abs().max() <= 1e-3 * expected.abs().max(), "other latents"
        seconds = interleaved(ways, rounds, threads, warmup=1)
    encoding = seconds["on the fly"]
    results = {
        way: {
            "seconds": round(s["median"], 5),
            "times_faster": round(encoding["median"] / s["median"], 1),
            "times_faster_fastest": round(encoding["fastest"] / s["fastest"], 1),
        }
        for way, s in seconds.items()
    }
    setting = {"pictures": pictures, "size": size, "batch_size": batch_size, "rounds": rounds}
    write_row("latent_cache", {**setting, "diffusers": diffusers.__version__, **machine(threads), "results": results})
    table = Table("an epoch", "seconds", "times faster", title=f"{pictures} pictures of {size} x {size}")
    for way, row in results.items():
        table.add_row(way, f"{row['seconds']:.4f}", f"{row['times_faster']:.1f}")
    Console().print(table)
    slowest = min(results["cache"]["times_faster"], results["cache, opened anew"]["times_faster"])
    assert slowest >= 5, f"the cache is only {slowest} times faster"


if __name__ == "__main__":
    tyro.cli(main)
