"""The commands on latents: data cache, train-autoencoder."""

import sys

from smalti.cli_arguments import TrainAutoencoder
from smalti.cli_data_arguments import DataCache
from smalti.cli_options import check_device, chosen_budget, set_threads
from smalti.cli_progress import progress_bar, skipped_lines
from smalti.errors import UserError


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
    from smalti.data.opening import open_rows
    from smalti.data.sources import source_of
    from smalti.optim.optimizers import AdamWConfig
    from smalti.training.autoencoder import PICTURE, AutoencoderTraining, train_autoencoder
    from smalti.training.failure import TrainingDiverged
    from smalti.training.memory import keep_freed_memory

    config = AutoencoderTraining(
        model=SmallKLConfig(command.channels, command.latent_channels, command.factor, command.width),
        budget=chosen_budget(command) or AutoencoderTraining().budget,
        seed=command.seed,
        batch_size=command.batch_size,
        gradient_weight=command.gradient_weight,
        kl_weight=command.kl_weight,
        optimizer=AdamWConfig(learning_rate=command.learning_rate, beta2=AutoencoderTraining().optimizer.beta2),
    )
    set_threads(command.threads)
    check_device(command.device)
    keep_freed_memory()
    with progress_bar("reading") as progress:
        rows = open_rows(source_of(command.source), command.channels, command.size, progress=progress)
    try:
        result = train_autoencoder(
            config, rows.training, rows.held_out, command.out, overwrite=command.overwrite, device=command.device
        )
    except TrainingDiverged as error:
        print(f"smalti: {error}", file=sys.stderr)
        return 1
    print("\n".join(skipped_lines(rows.skipped)))
    print(f"{result.outcome} after {result.steps} steps in {result.seconds:.0f} s -> {command.out}")
    print(f"PSNR on held-out pictures: {result.psnr_before:.1f} dB before, {result.psnr_after:.1f} dB after")
    print(f"originals over reconstructions: {command.out / PICTURE}")
    height, width = command.size
    print(f"next: smalti data cache {command.source} --encoder {command.out} --size {height} {width}")
    return 0
