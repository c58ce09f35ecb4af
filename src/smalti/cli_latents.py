"""The commands on latents and tokens: data cache, train-autoencoder, train-tokenizer."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from smalti.cli_data_arguments import DataCache
from smalti.cli_latents_arguments import ReconstructionArguments, TrainAutoencoder, TrainTokenizer
from smalti.cli_options import check_device, chosen_budget, set_threads
from smalti.cli_progress import progress_bar, skipped_lines
from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.autoencoders.quantizers import QuantizerConfig
    from smalti.training.reconstruction import NetworkT, Trained


def cache_command(command: DataCache) -> int:
    """smalti data cache."""
    from smalti.autoencoders.caching import open_latents
    from smalti.autoencoders.registry import autoencoder_of
    from smalti.data.sources import source_of
    from smalti.run_folder import cache_folder

    if command.jobs < 1 or command.batch_size < 1:
        raise UserError(f"--jobs {command.jobs} and --batch-size {command.batch_size} must be at least 1")
    check_device(command.device)
    folder = command.out or cache_folder() / "latents"
    with progress_bar("reading and encoding") as progress:
        opened = open_latents(
            folder,
            source_of(command.source),
            autoencoder_of(command.encoder, command.subfolder),
            command.size,
            flips=command.flips,
            jobs=command.jobs,
            batch_size=command.batch_size,
            device=command.device,
            reading=progress,
            encoding=progress,
            waiting=lambda: print(f"another process is filling {folder}: waiting for it", file=sys.stderr),
        )
    report, statistics = opened.report, opened.statistics
    print(f"{report.encoded} encoded, {report.reused} were there -> {folder}")
    print("\n".join([*report.damages, *skipped_lines(opened.skipped)]))
    channels, height, width = opened.training.shape
    print(f"{len(opened.training)} to train on, {len(opened.held_out)} held out: {channels} x {height} x {width} each")
    for name, values in (("mean", statistics.mean), ("std", statistics.std)):
        print(f"latent {name}: {' '.join(f'{value:.4g}' for value in values)}")
    return 0


def train_autoencoder_command(command: TrainAutoencoder) -> int:
    """smalti train-autoencoder."""
    from smalti.autoencoders.small_kl import SmallKLConfig
    from smalti.training.autoencoder import AutoencoderTraining, train_autoencoder

    model = SmallKLConfig(command.channels, command.factor, command.width, latent_channels=command.latent_channels)
    config = AutoencoderTraining(**_training_fields(command), model=model, kl_weight=command.kl_weight)
    if _train(command, partial(train_autoencoder, config)) is None:
        return 1
    height, width = command.size
    print(f"next: smalti data cache {command.source} --encoder {command.out} --size {height} {width}")
    return 0


def train_tokenizer_command(command: TrainTokenizer) -> int:
    """smalti train-tokenizer."""
    from smalti.autoencoders.small_tokenizer import SmallTokenizerConfig
    from smalti.training.tokenizer import TokenizerTraining, collapse_advice, train_tokenizer, usage_in

    quantizer = _quantizer(command)
    model = SmallTokenizerConfig(command.channels, command.factor, command.width, quantizer=quantizer)
    result = _train(command, partial(train_tokenizer, TokenizerTraining(**_training_fields(command), model=model)))
    if result is None:
        return 1
    usage = usage_in(result)
    print(f"codebook on held-out pictures: {usage}")
    if usage.collapsed:
        print(f"smalti: {collapse_advice(usage, quantizer)}", file=sys.stderr)
    settings = f"autoencoder.path={command.out} autoencoder.codebook_size={usage.codebook_size}"
    print(f"in a run's config: autoencoder=tokenizer {settings}")
    return 0


def _quantizer(command: TrainTokenizer) -> "QuantizerConfig":
    """--quantizer and its options. Raises UserError for an option of the other one."""
    from smalti.autoencoders.quantizers import FSQ, VQ

    options = {
        "vq": ("codebook_size", "code_width", "distance", "commitment", "restart_below"),
        "fsq": ("levels",),
    }
    defaults = TrainTokenizer(command.source)
    for quantizer, names in options.items():
        for name in names:
            if quantizer != command.quantizer and getattr(command, name) != getattr(defaults, name):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is for --quantizer {quantizer}, and this is {command.quantizer}")
    cls = VQ if command.quantizer == "vq" else FSQ
    return cls(**{name: getattr(command, name) for name in options[command.quantizer]})


def _training_fields(command: ReconstructionArguments) -> dict[str, Any]:
    """What a command says of ReconstructionTraining's fields."""
    from smalti.optim.optimizers import AdamWConfig
    from smalti.training.reconstruction import ReconstructionTraining

    defaults = ReconstructionTraining()
    return {
        "budget": chosen_budget(command) or defaults.budget,
        "seed": command.seed,
        "batch_size": command.batch_size,
        "gradient_weight": command.gradient_weight,
        "optimizer": AdamWConfig(learning_rate=command.learning_rate, beta2=defaults.optimizer.beta2),
    }


def _train(command: ReconstructionArguments, train: "Callable[..., Trained[NetworkT]]") -> "Trained[NetworkT] | None":
    """Open the pictures, train, and say how it went; None where the training diverged."""
    from smalti.data.opening import open_rows
    from smalti.data.sources import source_of
    from smalti.training.failure import TrainingDiverged
    from smalti.training.memory import keep_freed_memory
    from smalti.training.reconstruction import PICTURE

    set_threads(command.threads)
    check_device(command.device)
    keep_freed_memory()
    with progress_bar("reading") as progress:
        rows = open_rows(source_of(command.source), command.channels, command.size, progress=progress)
    try:
        result = train(rows.training, rows.held_out, command.out, overwrite=command.overwrite, device=command.device)
    except TrainingDiverged as error:
        print(f"smalti: {error}", file=sys.stderr)
        return None
    print("\n".join(skipped_lines(rows.skipped)))
    print(f"{result.outcome} after {result.steps} steps in {result.seconds:.0f} s -> {command.out}")
    print(f"PSNR on held-out pictures: {result.psnr_before:.1f} dB before, {result.psnr_after:.1f} dB after")
    print(f"originals over reconstructions: {command.out / PICTURE}")
    return result
