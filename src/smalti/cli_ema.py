"""smalti ema: averages of other widths, made after training."""

from smalti.cli_ema_arguments import Ema
from smalti.cli_options import check_device, set_threads
from smalti.cli_progress import progress_bar
from smalti.errors import UserError


def ema_command(command: Ema) -> int:
    """smalti ema."""
    from rich.console import Console

    from smalti.evaluation.ema_widths import plot_widths, validation_losses, weights_table, widths_table
    from smalti.training.snapshots import reconstruct_averages, save_reconstruction

    if not command.relative_std:
        raise UserError("--relative-std is empty: give at least one width, such as 0.05")
    if command.plot is not None and not command.validate:
        raise UserError(f"--plot {command.plot} has no effect without --validate: it draws the validation losses")
    set_threads(command.threads)
    check_device(command.device)
    with progress_bar("reading snapshots") as progress:
        made = reconstruct_averages(command.run, command.relative_std, command.step, progress)
    for entry in made:
        save_reconstruction(command.run, entry)
    losses = None
    if command.validate:
        with progress_bar("validating") as progress:
            losses = validation_losses(command.run, made, command.device, progress)
    console = Console(highlight=False, width=120)
    if command.weights:
        for entry in made:
            console.print(weights_table(entry))
    console.print(widths_table(made, losses))
    if losses is not None and command.plot is not None:
        plot_widths(made, losses, command.plot)
        print(f"picture: {command.plot}")
    best = made[0] if losses is None else min(zip(losses, made, strict=True), key=lambda pair: pair[0])[1]
    print(f"next: smalti sample {command.run} --checkpoint {best.name}")
    return 0
