"""Which sampler settings suit a run at a fixed number of network calls: a search by successive halving, and a frontier.

Every setting draws the same labels from the same seeds, so that settings differ by themselves and not by their luck.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from smalti.data.digits import load_digits
from smalti.data.rows import to_signed_unit
from smalti.errors import UserError
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.judge import Judge, judge_features, load_judge
from smalti.pipeline import Pipeline, load
from smalti.run_folder import RunFolder, finite_json, write_json

_FIRST_IMAGES = 100  # samples of every setting in the first round; each round keeps a third and doubles them
_SOLVERS = ("dpmpp_2m", "dpmpp_3m", "unipc_2", "dpmpp_sde_2m", "edm_heun", "ddim")
_SPACINGS = ("time", "lambda", "karras")
_SCALES = (1.5, 2.0)  # and the run's own
_INTERVALS = ((0.0, 1.0), (0.2, 0.9))


@dataclass(frozen=True)
class Setting:
    """How to sample."""

    solver: str
    num_inference_steps: int
    spacing: str
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver_options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Score:
    """What a setting gives: judge accuracy in [0, 1] and Frechet distance on num_images samples."""

    setting: Setting
    network_calls: int
    num_images: int
    accuracy: float
    frechet: float

    @property
    def loss(self) -> float:
        """Lower is better: the Frechet distance, raised by what the accuracy lacks (1 % is worth 5 % of distance)."""
        return self.frechet * (1 + 5 * (1 - self.accuracy))


@dataclass(frozen=True)
class TuneResult:
    """The run's own setting, the frontier (best setting at each number of calls) and everything that was tried."""

    own: Score
    frontier: tuple[Score, ...]
    tried: tuple[Score, ...] = field(repr=False)
    picture: Path | None = None

    @property
    def best(self) -> Score:
        """The best of the frontier."""
        return min(self.frontier, key=lambda score: score.loss)

    def command(self, run: Path) -> str:
        """The command line that samples with the best setting."""
        s = self.best.setting
        interval = ""
        if s.guidance_interval != (0.0, 1.0):
            interval = " --guidance-interval {:g} {:g}".format(*s.guidance_interval)
        options = "".join(f" {name}={value}" for name, value in s.solver_options)
        return (
            f"smalti sample {run} --solver {s.solver} --num-inference-steps {s.num_inference_steps} "
            f"--spacing {s.spacing} --guidance-scale {s.guidance_scale:g}{interval}"
            + (f" --solver-options{options}" if options else "")
        )


@dataclass(frozen=True)
class _Judging:
    """The pipeline, the judge and the real features that every setting is measured with."""

    pipe: Pipeline
    judge: Judge
    real: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    seed: int

    def score(self, setting: Setting, num_images: int) -> Score:
        """Draw and judge."""
        labels: Tensor = torch.arange(num_images) % 10
        output = self.pipe(
            labels,
            seed=self.seed,
            solver=setting.solver,
            num_inference_steps=setting.num_inference_steps,
            spacing=setting.spacing,
            guidance_scale=setting.guidance_scale,
            guidance=replace(self.pipe.config.sampling.guidance, interval=setting.guidance_interval),
            batch_size=100,
            **dict(setting.solver_options),
        )
        features, predicted = judge_features(self.judge, output.tensor)
        accuracy = float((predicted == labels).double().mean())
        frechet = frechet_distance(features.double().numpy(), self.real)
        return Score(setting, output.plan.num_calls, num_images, accuracy, frechet)


def steps_for_calls(pipe: Pipeline, solver: str, spacing: str, calls: int, **solver_options: Any) -> int | None:
    """The most steps of a solver that cost at most `calls` network calls; None where it cannot run on them."""
    for steps in range(calls, 0, -1):
        try:
            plan = pipe.plan(steps, solver, spacing, **solver_options)
        except UserError:
            return None
        if plan.num_calls <= calls:
            return steps
    return None


def candidates(pipe: Pipeline, calls: int, ems: Path | None = None) -> list[Setting]:
    """Every setting of the search at a number of network calls that the run's process allows.

    ems: the network's statistics, with which DPM-Solver-v3 is among them.
    """
    solvers: list[tuple[str, dict[str, Any]]] = [(solver, {}) for solver in _SOLVERS]
    if ems is not None:
        solvers.append(("dpm_solver_v3", {"ems": str(ems)}))
    settings = []
    for solver, options in solvers:
        for spacing in _SPACINGS:
            steps = steps_for_calls(pipe, solver, spacing, calls, **options)
            if steps is None:
                continue
            for scale in sorted({*_SCALES, pipe.config.sampling.guidance_scale}):
                settings += [
                    Setting(solver, steps, spacing, scale, interval, tuple(options.items())) for interval in _INTERVALS
                ]
    return settings


def frontier_calls(budget: int) -> list[int]:
    """The numbers of calls of the frontier: the budget and about four smaller ones."""
    return sorted({max(2, round(budget * share)) for share in (0.3, 0.4, 0.6, 0.8, 1.0)})


def tune_run(
    run: Path,
    *,
    budget: int = 10,
    num_images: int = 1000,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TuneResult:
    """Search at `budget` network calls, then run the best few settings at fewer; writes RUN/tune.json and RUN/tune.png.

    DPM-Solver-v3 is tried where RUN/ems.npz is there, see evaluation.ems.
    progress(done, total) counts network calls times pictures. Raises UserError for a budget below 2, for num_images
    below 100, and where the run does not draw digits conditionally.
    """
    if budget < 2:
        raise UserError(f"budget={budget} must be at least 2 network calls")
    if num_images < _FIRST_IMAGES:
        raise UserError(f"num_images={num_images} must be at least {_FIRST_IMAGES}: the distance needs its covariances")
    pipe = load(run, checkpoint=checkpoint)
    if pipe.config.num_classes != 10:
        raise UserError(f"{run} is not conditional on the ten digits: nothing to judge")
    if pipe.tokenizer is not None:
        raise UserError(
            f"{run} is a masked model: tune searches the solvers of noise; try `smalti eval {run} --solver-options "
            "choice_temperature=4` and other values"
        )
    judge = load_judge()
    real = judge_features(judge, to_signed_unit(load_digits()[1].images))[0].double().numpy()
    judging = _Judging(pipe, judge, real, seed)
    ems = RunFolder(run).ems
    settings, images = candidates(pipe, budget, ems if ems.exists() else None), _FIRST_IMAGES
    counts = frontier_calls(budget)
    own_setting = _own_setting(pipe)
    rounds = _round_sizes(len(settings), num_images)
    own_calls = pipe.plan().num_calls * num_images
    total = sum(n * m for n, m in rounds) * budget + own_calls + sum(3 * c * num_images for c in counts)
    done = 0

    def measured(setting: Setting, num: int) -> Score:
        nonlocal done
        score = judging.score(setting, num)
        done += score.network_calls * num
        if progress is not None:
            progress(min(done, total), total)
        return score

    own = measured(own_setting, num_images)
    tried: list[Score] = []
    for count, images in rounds:
        scores = [measured(setting, images) for setting in settings[:count]]
        tried += scores
        settings = [score.setting for score in sorted(scores, key=lambda score: score.loss)]
    frontier = []
    for calls in counts:
        at_calls = []
        for setting in settings[:3]:
            steps = steps_for_calls(pipe, setting.solver, setting.spacing, calls, **dict(setting.solver_options))
            if steps is not None:
                at_calls.append(measured(replace(setting, num_inference_steps=steps), num_images))
        tried += at_calls
        if at_calls:
            frontier.append(min(at_calls, key=lambda score: score.loss))
    if not frontier:
        raise UserError(f"budget={budget}: no solver of the search runs on process {pipe.process.name!r} with it")
    folder = RunFolder(run).path
    body = {name: [asdict(s) for s in scores] for name, scores in (("frontier", frontier), ("tried", tried))}
    write_json(folder / "tune.json", finite_json({"own": asdict(own), **body}))
    return TuneResult(own, tuple(frontier), tuple(tried), plot_frontier(own, frontier, tried, folder / "tune.png"))


def read_tune(run: Path) -> TuneResult:
    """What tune_run wrote into a run. Raises UserError where there is nothing, or something else."""
    folder = RunFolder(run).path
    path, picture = folder / "tune.json", folder / "tune.png"
    try:
        body = json.loads(path.read_text())
        scores = {name: tuple(_score_from(row) for row in body[name]) for name in ("frontier", "tried")}
        return TuneResult(_score_from(body["own"]), **scores, picture=picture if picture.exists() else None)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `smalti tune {run}` writes it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None


def _score_from(row: dict[str, Any]) -> Score:
    """A score from its JSON, where null is a sampler that diverged: infinitely far."""
    setting = dict(row["setting"])
    setting["guidance_interval"] = tuple(setting["guidance_interval"])
    setting["solver_options"] = tuple((name, value) for name, value in setting["solver_options"])
    frechet = math.inf if row["frechet"] is None else float(row["frechet"])
    return Score(**{**row, "setting": Setting(**setting), "frechet": frechet})


def _own_setting(pipe: Pipeline) -> Setting:
    s = pipe.config.sampling
    return Setting(s.solver, s.num_inference_steps, s.spacing, s.guidance_scale, s.guidance.interval)


def _round_sizes(count: int, num_images: int) -> list[tuple[int, int]]:
    """(settings, images each) of the rounds: a third goes on with twice the images, until three are left."""
    rounds, images = [], _FIRST_IMAGES
    while count > 3:
        rounds.append((count, min(images, num_images)))
        count, images = max(3, count // 3), 2 * images
    return rounds


def _describe(setting: Setting) -> Sequence[str]:
    interval = "all" if setting.guidance_interval == (0.0, 1.0) else "{:g} .. {:g}".format(*setting.guidance_interval)
    return setting.solver, str(setting.num_inference_steps), setting.spacing, f"{setting.guidance_scale:g}", interval


def frontier_table(result: TuneResult) -> Table:
    """The frontier beside the run's own setting, for a person."""
    table = Table(title="quality against network calls (the best setting at each)")
    for column in ("", "calls", "accuracy", "Frechet", "solver", "steps", "spacing", "guidance", "for t in"):
        table.add_column(column, justify="left" if column in ("", "solver", "spacing") else "right")
    for name, score in [("the run's own", result.own), *(("frontier", score) for score in result.frontier)]:
        marker = f"{name} *" if score is result.best else name
        figures = str(score.network_calls), f"{score.accuracy:.1%}", f"{score.frechet:.2f}"
        table.add_row(marker, *figures, *_describe(score.setting))
    return table


def plot_frontier(own: Score, frontier: Sequence[Score], tried: Sequence[Score], path: Path) -> Path | None:
    """Frechet distance against network calls, everything tried in grey; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([s.network_calls for s in tried], [s.frechet for s in tried], s=12, color="0.8", label="tried")
    axes.plot([s.network_calls for s in frontier], [s.frechet for s in frontier], "o-", label="frontier")
    axes.plot([own.network_calls], [own.frechet], "D", color="C3", label="the run's own setting")
    for score in frontier:
        place = (score.network_calls, score.frechet)
        text = f"{score.setting.solver}, {score.accuracy:.1%}"
        axes.annotate(text, place, xytext=(0, 8), textcoords="offset points", fontsize=8, rotation=50)
    axes.set(xlabel="network calls", ylabel="judge Frechet distance", yscale="log", title="what the calls buy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
