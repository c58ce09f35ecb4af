"""The command `smalti compare`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smalti.cli_compare_arguments import Compare
from smalti.cli_options import set_threads


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar for what is being done on a terminal; a line for each thing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    if not sys.stderr.isatty():
        told: set[str] = set()

        def tell(text: str, share: float) -> None:
            what = text.split(":", 1)[0]
            if what not in told:
                told.add(what)
                print(what, flush=True)

        yield tell
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("comparing", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def compare_command(command: Compare) -> int:
    """smalti compare SPEC."""
    from smalti.comparison.bundled import find_spec
    from smalti.comparison.report import conclusion_lines, read_comparison, write_report
    from smalti.comparison.run import run_comparison
    from smalti.pages.figures import charts_available
    from smalti.training.memory import keep_freed_memory

    spec = find_spec(command.spec)
    out = command.out or Path("runs") / f"compare-{spec.name}"
    charts_available()  # before the minutes are spent
    if not command.report_only:
        set_threads(command.threads)
        keep_freed_memory()
        with _progress() as progress:
            run_comparison(spec, out, minutes=command.minutes, overwrite=command.overwrite, progress=progress)
    report = write_report(out)
    for line in conclusion_lines(read_comparison(out)):
        print(line)
    print(f"report: {report}")
    return 0
