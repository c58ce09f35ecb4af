"""Options that several commands have: threads, device, budget."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol

from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.config import Budget, BudgetUnit


class HasBudget(Protocol):
    """A command with --minutes, --steps and --epochs."""

    @property
    def minutes(self) -> float | None: ...  # noqa: D102
    @property
    def steps(self) -> int | None: ...  # noqa: D102
    @property
    def epochs(self) -> float | None: ...  # noqa: D102


def chosen_budget(command: HasBudget) -> "Budget | None":
    """The budget that was given; None where none was. Raises UserError for several."""
    from smalti.config import Budget

    amounts: dict[BudgetUnit, float | None] = {
        "minutes": command.minutes,
        "steps": command.steps,
        "epochs": command.epochs,
    }
    given = [Budget(unit, amount) for unit, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        raise UserError("give one budget: --minutes, --steps or --epochs, not several")
    return given[0] if given else None


def as_arguments(command: Any) -> list[str]:
    """A command's dataclass as the arguments that it parses from: its first field's, then the options that are set."""
    positional, *options = fields(command)
    arguments = [str(getattr(command, positional.name))]
    for option in options:
        value, name = getattr(command, option.name), f"--{option.name.replace('_', '-')}"
        if value is True:
            arguments.append(name)
        elif isinstance(value, tuple):
            arguments += [name, *map(str, value)] if value else []
        elif value is not None and value is not False:
            arguments += [name, str(value)]
    return arguments


def set_threads(threads: int | None) -> None:
    """--threads: how many CPU threads PyTorch may use; None leaves them."""
    import torch

    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """--device: raises UserError where it is not to be had."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not to be had here: {str(error).splitlines()[0]}") from None
