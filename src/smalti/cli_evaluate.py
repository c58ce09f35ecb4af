"""smalti eval, compare-cards: how good is a run, and which of two is better?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from smalti.cli_arguments import Tune
from smalti.cli_evaluate_arguments import CompareCards, Eval
from smalti.cli_options import set_threads
from smalti.cli_progress import progress_bar
from smalti.cli_sampler import sampling_arguments

Result = TypeVar("Result")


def judged(command: Eval | Tune, text: str, judge: Callable[..., Result], **arguments: Any) -> Result:
    """judge on the samples that the command asks for, under a progress bar."""
    from smalti.training.memory import keep_freed_memory

    set_threads(command.threads)
    keep_freed_memory()
    with progress_bar(text) as progress:
        return judge(
            command.run,
            num_images=command.num_images,
            seed=command.seed,
            checkpoint=command.checkpoint,
            progress=progress,
            **arguments,
        )


def eval_command(command: Eval) -> int:
    """smalti eval."""
    from smalti.evaluation.digits import evaluate_run
    from smalti.evaluation.measuring import Measuring
    from smalti.evaluation.pictures import evaluate_pictures
    from smalti.evaluation.prompts import evaluate_prompted_run
    from smalti.run_folder import read_config

    config = read_config(command.run)
    measuring = Measuring(command.features, command.weights, command.metrics, command.reference)
    judge: Callable[..., Any] = evaluate_pictures
    if config.text is not None:
        judge = evaluate_prompted_run
    elif config.data.kind == "digits" and config.num_classes == 10:
        judge = evaluate_run
    sampling = sampling_arguments(command.sampler, config.sampling)
    process = command.sampler.process
    print(judged(command, "judging", judge, measuring=measuring, process=process, **sampling).text())
    print(f"written: {command.run / 'evaluation.json'}")
    return 0


def compare_cards_command(command: CompareCards) -> int:
    """smalti compare-cards."""
    from smalti.evaluation.cards import compare_all, read_cards

    def cards_at(path: Path) -> Any:
        return read_cards(path / "evaluation.json" if path.is_dir() else path)

    print(f"a: {command.a}\nb: {command.b}")
    for comparison in compare_all(cards_at(command.a), cards_at(command.b)):
        print(comparison.text())
    return 0
