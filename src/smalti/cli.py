"""The command line: parses, calls, prints. Heavy imports wait inside the commands."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from smalti.types import UserError

if TYPE_CHECKING:
    from rich.console import Console

_EXIT_USER_ERROR, _EXIT_FAILURE, _EXIT_INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Train:
    """Train a recipe into a run directory.

    Example: smalti train mnist --minutes 3 --out runs/mnist

    The run directory holds the full config, checkpoints, metrics (JSONL and TensorBoard) and sample grids. Ctrl-C saves
    and stops; --resume goes on where a run stopped, also after a crash. Recipes: mnist (the best three minutes on a
    CPU), mnist-ddpm (DiT's published recipe on the same digits). `smalti info RECIPE` shows every field --set takes.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name, such as mnist."""
    out: Path | None = None
    """Run directory (default: runs/RECIPE)."""
    minutes: float | None = None
    """Budget: minutes of training. Give at most one budget; the default is the recipe's."""
    steps: int | None = None
    """Budget: optimiser steps. The result is then a function of the config alone."""
    epochs: float | None = None
    """Budget: passes over the pictures."""
    resume: bool = False
    """Go on with the run in --out (or begin it, if nothing is there yet)."""
    overwrite: bool = False
    """Replace the run in --out."""
    set: tuple[str, ...] = ()
    """Config fields as field=value, by unique name or dotted path: --set batch_size=32 optimizer=adamw."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class Sample:
    """Draw pictures from a run.

    Example: smalti sample runs/mnist --class-labels 0 1 2 --num-images-per-label 8 --out samples

    Writes 00000.png ..., grid.png and manifest.jsonl (a row a picture: file, label, seed, every setting). A picture
    depends on its own seed and label alone, so any row of a manifest can be drawn again by itself.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    class_labels: tuple[int, ...] = ()
    """Labels to draw (default: each class once)."""
    num_images_per_label: int = 8
    """Pictures for each label (or in all, for an unconditional network)."""
    solver: str | None = None
    """Solver, such as dpmpp_2m, ddim, ddpm, flow_euler (default: the run's)."""
    num_inference_steps: int | None = None
    """Solver steps (default: the run's)."""
    spacing: str | None = None
    """Time grid: time, lambda, quadratic (default: the run's, or the solver's own)."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off (default: the run's)."""
    eta: float | None = None
    """Noise of the ddim solver: 0 none, 1 ancestral."""
    seed: int = 0
    """Seed of the first picture; picture i takes seed + i."""
    batch_size: int = 64
    """Pictures that share a forward."""
    checkpoint: str | None = None
    """A folder's name under checkpoints/ (default: the newest)."""
    out: Path = Path("samples")
    """Where to write."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    device: str = "cpu"
    """Where to sample: cpu, cuda, mps."""


@dataclass(frozen=True)
class Eval:
    """Judge a run: are its digits what was asked for, and how far are they from real ones?

    Example: smalti eval runs/mnist

    Draws class-conditional samples and prints the judge's accuracy on them and the Frechet distance in the judge's
    features against the held-out digits, each with a bootstrap 95 % interval; writes RUN/evaluation.json. The judge is
    a small classifier, trained once on the bundled digits (about a minute) and cached.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    num_images: int = 1000
    """Samples to judge, an equal number of each class."""
    solver: str | None = None
    """Solver (default: the run's)."""
    num_inference_steps: int | None = None
    """Solver steps (default: the run's)."""
    spacing: str | None = None
    """Time grid (default: the run's)."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off (default: the run's)."""
    seed: int = 0
    """Seed of the first sample."""
    checkpoint: str | None = None
    """A folder's name under checkpoints/ (default: the newest)."""
    threads: int | None = None
    """CPU threads (default: all cores)."""


@dataclass(frozen=True)
class Explain:
    """Print a solver's table: where the network is called, and what becomes of its answers.

    Example: smalti explain --solver dpmpp_2m --steps 20 --process vp_cosine

    Every solver in smalti is such a table. x is where the network looks, x0 its estimate of the clean picture, h1 an
    earlier estimate, z fresh noise.
    """

    solver: str = "dpmpp_2m"
    """The solver's name."""
    steps: Annotated[int, arg(aliases=["--num-inference-steps"])] = 20
    """Solver steps."""
    process: str = "rectified_flow"
    """The noise process: rectified_flow, vp_linear, vp_cosine ..."""
    spacing: str | None = None
    """Time grid: time, lambda, quadratic (default: the solver's own)."""


@dataclass(frozen=True)
class Info:
    """Describe a run or a recipe: parameters by part, FLOPs, config, how it was trained.

    Example: smalti info runs/mnist
    """

    run: Annotated[Positional[str], arg(metavar="RUN|RECIPE")]
    """A run directory, or a recipe's name."""


@dataclass(frozen=True)
class Completion:
    """Print a shell completion script.

    Example: smalti completion bash > ~/.local/share/bash-completion/completions/smalti
    """

    shell: Annotated[Positional[Literal["bash", "zsh", "tcsh"]], arg(metavar="SHELL")]
    """bash, zsh or tcsh."""


Command = Train | Sample | Eval | Explain | Info | Completion

_COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "sample": Sample,
    "eval": Eval,
    "explain": Explain,
    "info": Info,
    "completion": Completion,
}

_DESCRIPTION = """smalti: train, sample and measure diffusion transformers.

Five minutes, from nothing to judged digits:

    smalti train mnist --minutes 3       train DiT-Tiny on the bundled digits -> runs/mnist
    smalti sample runs/mnist             draw digits -> samples/grid.png
    smalti eval runs/mnist               how good are they?
    smalti explain --steps 5             what did the solver do?
    smalti info runs/mnist               what is this model?

`smalti COMMAND --help` teaches each command."""


def _console() -> "Console":
    from rich.console import Console

    # Pipes and files have no width of their own: leave room for whole rows.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not to be had here: {str(error).splitlines()[0]}") from None


def _train(command: Train) -> int:
    from dataclasses import replace

    from smalti.config import Budget, BudgetUnit, apply_overrides
    from smalti.recipes import recipe
    from smalti.training.loop import TrainingDiverged, train
    from smalti.training.memory import keep_freed_memory

    amounts: dict[BudgetUnit, float | None] = {
        "minutes": command.minutes,
        "steps": command.steps,
        "epochs": command.epochs,
    }
    given = [Budget(unit, amount) for unit, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        raise UserError("give one budget: --minutes, --steps or --epochs, not several")
    if command.resume and command.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    config = apply_overrides(recipe(command.recipe), command.set)
    if given:
        config = replace(config, budget=given[0])
    out = command.out or Path("runs") / command.recipe
    _set_threads(command.threads)
    _check_device(command.device)
    keep_freed_memory()
    try:
        result = train(config, out, resume=command.resume, overwrite=command.overwrite, device=command.device)
    except TrainingDiverged as error:
        print(f"smalti: {error}", file=sys.stderr)
        return _EXIT_FAILURE
    if result.outcome == "interrupted":
        return _EXIT_INTERRUPTED
    print(f"trained {result.step} steps in {result.seconds:.0f} s -> {out}")
    print(f"samples: {result.folder.newest_grid}")
    print(f"next: smalti eval {out}")
    return 0


def _sample(command: Sample) -> int:
    import json

    import smalti
    from smalti.images import grid_picture
    from smalti.training.memory import keep_freed_memory

    _set_threads(command.threads)
    keep_freed_memory()
    _check_device(command.device)
    pipe = smalti.load(command.run, checkpoint=command.checkpoint, device=command.device)
    num_classes = pipe.config.model.num_classes
    if command.num_images_per_label < 1:
        raise UserError(f"--num-images-per-label {command.num_images_per_label} must be at least 1")
    labels: list[int] | None = None
    if num_classes or command.class_labels:
        labels = [c for c in command.class_labels or range(num_classes) for _ in range(command.num_images_per_label)]
    options = {} if command.eta is None else {"eta": command.eta}
    with _progress_bar("sampling") as progress:
        output = pipe(
            labels,
            num_images=None if labels is not None else command.num_images_per_label,
            num_inference_steps=command.num_inference_steps,
            solver=command.solver,
            spacing=command.spacing,
            guidance_scale=command.guidance_scale,
            seed=command.seed,
            batch_size=command.batch_size,
            progress=progress,
            **options,
        )
    defaults = pipe.config.sampling
    scale = defaults.guidance_scale if command.guidance_scale is None else command.guidance_scale
    settings = {
        "run": str(command.run),
        "solver": output.plan.solver,
        "num_inference_steps": command.num_inference_steps or defaults.num_inference_steps,
        "network_calls": output.plan.num_calls,
        "times": output.plan.times.round(6).tolist(),
        "guidance_scale": scale if labels is not None else 1.0,
        **options,
        "process": pipe.config.process,
        "checkpoint": command.checkpoint or "newest",
        "smalti": smalti.__version__,
    }
    try:
        command.out.mkdir(parents=True, exist_ok=True)
        with (command.out / "manifest.jsonl").open("w") as manifest:
            for i, image in enumerate(output.images):
                image.save(command.out / f"{i:05}.png")
                label = output.class_labels[i] if output.class_labels is not None else None
                row = {"file": f"{i:05}.png", "class_label": label, "seed": output.seeds[i], **settings}
                manifest.write(json.dumps(row) + "\n")
        columns = min(command.num_images_per_label, 16)
        grid_picture(output.tensor, columns, zoom=2).save(command.out / "grid.png")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"cannot write to --out {command.out}: {error.strerror}") from None
    print(f"{len(output.images)} pictures -> {command.out / 'grid.png'}, {command.out / 'manifest.jsonl'}")
    return 0


def _eval(command: Eval) -> int:
    from smalti.evaluation.digits import evaluate_run
    from smalti.training.memory import keep_freed_memory

    _set_threads(command.threads)
    keep_freed_memory()
    with _progress_bar("judging") as progress:
        report = evaluate_run(
            command.run,
            num_images=command.num_images,
            seed=command.seed,
            checkpoint=command.checkpoint,
            progress=progress,
            num_inference_steps=command.num_inference_steps,
            solver=command.solver,
            spacing=command.spacing,
            guidance_scale=command.guidance_scale,
        )
    print(report.text())
    return 0


def _explain(command: Explain) -> int:
    from smalti.diffusion.processes import make_process
    from smalti.sampling.explain import plan_table
    from smalti.sampling.solvers import make_plan

    plan = make_plan(
        command.solver,
        process=make_process(command.process),
        num_inference_steps=command.steps,
        spacing=command.spacing,
    )
    _console().print(plan_table(plan))
    return 0


def _info(command: Info) -> int:
    from smalti.describe import describe

    _console().print(describe(command.run))
    return 0


def _completion(command: Completion) -> int:
    import shtab

    parser: Any = tyro.extras.get_parser(_subcommands(), prog="smalti", description=_DESCRIPTION)
    print(shtab.complete(parser, shell=command.shell))
    return 0


_RUNNERS: dict[type[Any], Callable[[Any], int]] = {
    Train: _train,
    Sample: _sample,
    Eval: _eval,
    Explain: _explain,
    Info: _info,
    Completion: _completion,
}


class _progress_bar:
    """A rich bar over progress(done, total) calls; silent where nobody watches."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._bar.start()
        task = self._bar.add_task(self._text, total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _subcommands() -> Any:
    from typing import Union

    members = tuple(Annotated[cls, tyro.conf.subcommand(name, prefix_name=False)] for name, cls in _COMMANDS.items())
    return Union[members]  # noqa: UP007 (built from a tuple)


def join_repeated_set(arguments: Sequence[str]) -> list[str]:
    """One --set with all values in place of several: `--set a=1 --set b=2` means `--set a=1 b=2`."""
    joined: list[str] = []
    values: list[str] = []
    in_set = False
    for argument in arguments:
        if argument == "--set" or argument.startswith("--set="):
            in_set = True
            if argument != "--set":
                values.append(argument.removeprefix("--set="))
        elif in_set and not argument.startswith("-") and "=" in argument:
            values.append(argument)
        else:
            in_set = False
            joined.append(argument)
    return [*joined, "--set", *values] if values else joined


def _run(arguments: Sequence[str]) -> int:
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        near = difflib.get_close_matches(arguments[0], _COMMANDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown command {arguments[0]!r}: {hint}known: {', '.join(_COMMANDS)}")
    command = tyro.cli(
        _subcommands(),
        prog="smalti",
        description=_DESCRIPTION,
        args=join_repeated_set(arguments) or ["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return _RUNNERS[type(command)](command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `smalti` command. Exit codes: 0 done, 1 failed, 2 the caller's mistake, 130 stopped by Ctrl-C."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"smalti: {error}", file=sys.stderr)
        code = _EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("smalti: interrupted", file=sys.stderr)
        code = _EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _EXIT_FAILURE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and "No space left" not in str(error):
            raise
        print(f"smalti: {error}: free some space and go on with --resume; what was saved is kept", file=sys.stderr)
        code = _EXIT_FAILURE
    sys.exit(code)
