"""The command line: parses, calls, prints. Heavy imports wait inside the commands."""

import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from smalti.cli_arguments import (
    COMMANDS,
    DESCRIPTION,
    Adapt,
    Completion,
    Convert,
    Doctor,
    Ems,
    Explain,
    Export,
    Info,
    ReplayNan,
    Sample,
    Train,
    Tune,
)
from smalti.cli_chaos import chaos_command
from smalti.cli_compare import compare_command
from smalti.cli_compare_arguments import Compare
from smalti.cli_data import data_command
from smalti.cli_data_arguments import Data
from smalti.cli_doctor import doctor_command, replay_nan_command
from smalti.cli_ema import ema_command
from smalti.cli_ema_arguments import Ema
from smalti.cli_evaluate import compare_cards_command, eval_command, judged
from smalti.cli_evaluate_arguments import CompareCards, Eval
from smalti.cli_latents import train_autoencoder_command, train_tokenizer_command
from smalti.cli_latents_arguments import TrainAutoencoder, TrainTokenizer
from smalti.cli_mup import mup_command
from smalti.cli_mup_arguments import Mup
from smalti.cli_options import as_arguments, check_device, chosen_budget, set_threads
from smalti.cli_plan import plan_command
from smalti.cli_plan_arguments import Plan
from smalti.cli_progress import progress_bar
from smalti.cli_sampler import sampling_arguments, solver_options
from smalti.cli_scaling import scaling_command
from smalti.cli_scaling_arguments import Scaling
from smalti.cli_serve import replay_command, serve_command
from smalti.cli_serve_arguments import Chaos, Replay, Serve, Top
from smalti.cli_top import top_command
from smalti.cli_weights import adapt_command, convert_command, export_command
from smalti.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from smalti.pipeline_editing import Editing
    from smalti.sampling.ems import EMSOrigin

Result = TypeVar("Result")

_EXIT_USER_ERROR, _EXIT_FAILURE, _EXIT_INTERRUPTED = 2, 1, 130


def _console() -> "Console":
    from rich.console import Console

    # Pipes and files have no width of their own: leave room for whole rows.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _train(command: Train) -> int:
    from dataclasses import replace

    from smalti.config import apply_overrides
    from smalti.recipes import recipe
    from smalti.training.failure import TrainingDiverged
    from smalti.training.loop import train
    from smalti.training.memory import keep_freed_memory
    from smalti.training.parallel import check_divisible, is_first_rank, launched_ranks
    from smalti.training.watch import RankLost, end_process

    budget = chosen_budget(command)
    if command.resume and command.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    config = apply_overrides(recipe(command.recipe), command.set)
    if budget is not None:
        config = replace(config, budget=budget)
    out = command.out or Path("runs") / command.recipe
    if command.nproc is not None:
        if command.nproc < 1:
            raise UserError(f"--nproc {command.nproc} must be at least 1")
        if launched_ranks() > 1:
            raise UserError(f"--nproc {command.nproc}: torchrun has started {launched_ranks()} processes; leave it out")
        check_divisible(config.loop.batch_size, config.loop.gradient_accumulation_steps, command.nproc)
        if command.nproc > 1:
            return _train_on_ranks(command, command.nproc)
    set_threads(command.threads)
    check_device(command.device)
    keep_freed_memory()
    try:
        result = train(
            config,
            out,
            resume=command.resume,
            overwrite=command.overwrite,
            device=command.device,
            sharding=command.sharding,
        )
    except TrainingDiverged as error:
        if is_first_rank():
            print(f"smalti: {error}", file=sys.stderr)
        return _EXIT_FAILURE
    except RankLost as error:
        if not error.told:
            print(f"smalti: {error}", file=sys.stderr)
        end_process(_EXIT_FAILURE)
    if result.outcome == "interrupted":  # one that no signal reached stops for another rank's
        return _EXIT_INTERRUPTED if result.stopped_by == signal.SIGINT else 0
    if not is_first_rank():
        return 0
    print(f"trained {result.step} steps in {result.seconds:.0f} s -> {out}")
    print(f"samples: {result.folder.newest_grid}")
    print(f"next: smalti eval {out}")
    return 0


def _train_on_ranks(command: Train, count: int) -> int:
    """The command again, as `count` processes that share its threads."""
    from dataclasses import replace

    from smalti.training.launching import launch

    check_device(command.device)
    threads = max(1, (command.threads or os.cpu_count() or 1) // count)
    return launch(["train", *as_arguments(replace(command, nproc=None, threads=threads))], count, threads)


def _editing(command: Sample, channels: int) -> "Editing | None":
    """The picture to begin from, if one is given."""
    from smalti.images import read_picture
    from smalti.pipeline_editing import Editing

    if command.image is None:
        if command.mask is not None or command.strength != 1.0:
            raise UserError("--mask and --strength have no effect without --image")
        return None
    mask = None if command.mask is None else (read_picture(command.mask, "--mask", 1)[0] + 1) / 2
    return Editing(read_picture(command.image, "--image", channels), command.strength, mask)


def _ems_origin(path: str, guidance_scale: float) -> "EMSOrigin":
    """What a file of statistics was measured on. Says so where that is another guidance than is sampled with: the
    solver is right with any statistics, and a few steps are more accurate with the right ones."""
    from smalti.sampling.ems import load_ems

    origin = load_ems(path).origin
    if origin.guidance_scale not in (None, guidance_scale):
        print(
            f"smalti: {path} was measured at guidance {origin.guidance_scale:g}, and this samples at "
            f"{guidance_scale:g}: `smalti ems RUN --guidance-scale {guidance_scale:g}` may do better",
            file=sys.stderr,
        )
    return origin


def _sample(command: Sample) -> int:
    import json
    from dataclasses import asdict

    import smalti
    from smalti.config import to_json
    from smalti.images import grid_picture
    from smalti.run_folder import finite_json
    from smalti.training.memory import keep_freed_memory

    set_threads(command.threads)
    keep_freed_memory()
    check_device(command.device)
    pipe = smalti.load(command.run, checkpoint=command.checkpoint, device=command.device)
    num_classes = getattr(pipe.config.model, "num_classes", 0)
    each = command.num_images_per_label
    if each < 1:
        raise UserError(f"--num-images-per-label {each} must be at least 1")
    labels: list[int] | None = None
    if num_classes or command.class_labels:
        labels = [c for c in command.class_labels or range(num_classes) for _ in range(each)]
    prompts = [prompt for prompt in command.prompts for _ in range(each)] or None
    defaults = pipe.config.sampling
    sampler = command.sampler
    pipe = pipe.on_process(sampler.process)
    sampling = sampling_arguments(sampler, defaults)
    with progress_bar("sampling") as progress:
        output = pipe(
            labels,
            prompts=prompts,
            num_images=None if labels or prompts or pipe.encode_prompts is not None else each,
            negative_class_labels=command.negative_class_labels or None,
            negative_prompt=command.negative_prompt,
            editing=_editing(command, pipe.config.model.in_channels),
            image_size=command.image_size,
            seed=command.seed,
            batch_size=command.batch_size,
            progress=progress,
            **sampling,
        )
    scale = defaults.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
    options = solver_options(sampler.solver_options, output.plan.solver)
    if "ems" in options:
        options["ems_origin"] = asdict(_ems_origin(options["ems"], scale))
    settings = {
        "run": str(command.run),
        "solver": output.plan.solver,
        "num_inference_steps": sampler.num_inference_steps or defaults.num_inference_steps,
        "network_calls": output.plan.num_calls,
        "times": output.plan.times.round(6).tolist(),
        "guidance_scale": scale if labels or prompts else 1.0,
        "guidance": to_json(sampling["guidance"]),
        "negative_class_labels": command.negative_class_labels,
        "negative_prompt": command.negative_prompt,
        "image_size": command.image_size,
        "image": str(command.image) if command.image else None,
        "strength": command.strength,
        "mask": str(command.mask) if command.mask else None,
        **options,
        "process": pipe.process.name,
        "checkpoint": command.checkpoint or "newest",
        "smalti": smalti.__version__,
    }
    try:
        command.out.mkdir(parents=True, exist_ok=True)
        with (command.out / "manifest.jsonl").open("w") as manifest:
            for i, image in enumerate(output.images):
                image.save(command.out / f"{i:05}.png")
                label = output.class_labels[i] if output.class_labels is not None else None
                prompt = output.prompts[i] if output.prompts is not None else None
                asked = {"class_label": label, "prompt": prompt, "seed": output.seeds[i]}
                row = {"file": f"{i:05}.png", **asked, **settings}
                manifest.write(json.dumps(finite_json(row)) + "\n")
        columns = min(each, 16)
        grid_picture(output.tensor, columns, zoom=2).save(command.out / "grid.png")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"cannot write to --out {command.out}: {error.strerror}") from None
    print(f"{len(output.images)} pictures -> {command.out / 'grid.png'}, {command.out / 'manifest.jsonl'}")
    return 0


def _explain(command: Explain) -> int:
    from smalti.diffusion.processes import make_process
    from smalti.sampling.explain import plan_table, solver_table
    from smalti.sampling.plot import plot_plan
    from smalti.sampling.solvers import make_plan

    if command.solver == "list":
        _console().print(solver_table())
        return 0
    plan = make_plan(
        command.solver,
        process=make_process(command.process),
        num_inference_steps=command.steps,
        spacing=command.spacing,
        **solver_options(command.solver_options, command.solver),
    )
    _console().print(plan_table(plan))
    if command.plot is not None:
        plot_plan(plan, command.plot)
        print(f"picture: {command.plot}")
    return 0


def _tune(command: Tune) -> int:
    from smalti.evaluation.tune import frontier_table, tune_run

    result = judged(command, "tuning", tune_run, budget=command.budget)
    _console().print(frontier_table(result))
    print(f"use it: {result.command(command.run)}")
    print(f"written: {command.run / 'tune.json'}" + (f", {result.picture}" if result.picture else ""))
    return 0


def _ems(command: Ems) -> int:
    from smalti.evaluation.ems import estimate_run_ems
    from smalti.run_folder import RunFolder
    from smalti.sampling.ems import save_ems
    from smalti.training.memory import keep_freed_memory

    set_threads(command.threads)
    keep_freed_memory()
    with progress_bar("measuring") as progress:
        ems = estimate_run_ems(
            command.run,
            num_images=command.num_images,
            num_nodes=command.num_nodes,
            guidance_scale=command.guidance_scale,
            secant_width=command.secant_width,
            seed=command.seed,
            batch_size=command.batch_size,
            checkpoint=command.checkpoint,
            progress=progress,
        )
    out = command.out or RunFolder(command.run).ems
    save_ems(ems, out)
    scale = ems.origin.guidance_scale
    print(f"statistics of {ems.origin.checkpoint} at guidance {scale:g}: {out}")
    print(
        f"use them: smalti sample {command.run} --solver dpm_solver_v3 --solver-options ems={out} "
        f"--num-inference-steps 8 --guidance-scale {scale:g}"
    )
    return 0


def _info(command: Info) -> int:
    from smalti.describe import describe

    _console().print(describe(command.run))
    return 0


def _completion(command: Completion) -> int:
    import shtab

    parser: Any = tyro.extras.get_parser(_subcommands(), prog="smalti", description=DESCRIPTION)
    print(shtab.complete(parser, shell=command.shell))
    return 0


_RUNNERS: dict[type[Any], Callable[[Any], int]] = {
    Train: _train,
    TrainAutoencoder: train_autoencoder_command,
    TrainTokenizer: train_tokenizer_command,
    Sample: _sample,
    Eval: eval_command,
    CompareCards: compare_cards_command,
    Explain: _explain,
    Tune: _tune,
    Ems: _ems,
    Ema: ema_command,
    Convert: convert_command,
    Export: export_command,
    Adapt: adapt_command,
    Data: data_command,
    Doctor: doctor_command,
    ReplayNan: replay_nan_command,
    Serve: serve_command,
    Replay: replay_command,
    Chaos: chaos_command,
    Top: top_command,
    Mup: mup_command,
    Compare: compare_command,
    Scaling: scaling_command,
    Plan: plan_command,
    Info: _info,
    Completion: _completion,
}


def _subcommands() -> Any:
    from typing import Union

    members = tuple(Annotated[cls, tyro.conf.subcommand(name, prefix_name=False)] for name, cls in COMMANDS.items())
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
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown command {arguments[0]!r}: {hint}known: {', '.join(COMMANDS)}")
    command = tyro.cli(
        _subcommands(),
        prog="smalti",
        description=DESCRIPTION,
        args=join_repeated_set(arguments) or ["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return _RUNNERS[type(command)](command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `smalti` command. Exit codes: 0 done, 1 failed, 2 the caller's mistake, 130 stopped by Ctrl-C."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        if not error.told:
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
