"""Judging a run that reads prompts: does a picture show its own prompt rather than another?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smalti.data.rows import PicturesInMemory
from smalti.errors import UserError
from smalti.evaluation.cards import Card
from smalti.evaluation.features import retrieval_feature_network
from smalti.evaluation.intervals import Estimate
from smalti.evaluation.measuring import DataRows, Measuring, drawing_of
from smalti.evaluation.pictures import feature_network, measure_run
from smalti.evaluation.pretrained_features import ClipFeatures, clip_card
from smalti.evaluation.retrieval import (
    RetrievalConfig,
    RetrievalReport,
    load_retrieval_judge,
    prompt_ranks,
    prompt_rows,
    share_in_top,
)
from smalti.images import captioned_grid
from smalti.pipeline import load
from smalti.run_folder import RunFolder, cache_folder, write_json
from smalti.sampling.guided import GuidanceOptions
from smalti.training.data import open_run_rows

NUM_CANDIDATES = 200
_SHOWN = 48


@dataclass(frozen=True)
class PromptsReport:
    """How often the judge finds a picture's own prompt among num_candidates training prompts.

    real_top10: of the pictures that the prompts were written for, which is the most that can be had of this judge.
    """

    judge: RetrievalReport
    num_candidates: int
    top1: Estimate
    top10: Estimate
    real_top1: Estimate
    real_top10: Estimate
    num_images: int
    network_calls: int
    solver: str
    guidance_scale: float
    cards: tuple[Card, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The report in lines for a person."""
        return "\n".join(
            [
                self.judge.text(),
                f"samples: {self.num_images} of {self.num_candidates} training prompts, {self.solver}, "
                f"{self.network_calls} network calls, guidance {self.guidance_scale:g}",
                f"own prompt among the first 10 of {self.num_candidates}: {_share(self.top10)}; "
                f"real pictures: {self.real_top10.value:.1%}; chance: {10 / self.num_candidates:.1%}",
                f"own prompt first: {_share(self.top1)}; real pictures: {self.real_top1.value:.1%}",
                *(card.text() for card in self.cards),
                *self.notes,
            ]
        )


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%}  (95 %: {estimate.low:.1%} .. {estimate.high:.1%})"


def evaluate_prompted_run(
    run: Path,
    *,
    num_images: int = NUM_CANDIDATES,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    measuring: Measuring | None = None,
    guidance_scale: float | None = None,
    guidance: GuidanceOptions | None = None,
    process: str | None = None,
    **sampling: Any,
) -> PromptsReport:
    """Draw num_images pictures of training prompts and rank each one's prompt.

    Writes RUN/evaluation.json, RUN/nearest.png and RUN/prompts.png, the first pictures of the first 48 prompts, nothing
    picked out.

    The judge is trained on the run's own data, once, and cached. Arguments as evaluate_run's. Raises UserError where
    num_images is no multiple of the number of candidates, or the data has too few pictures with captions.
    """
    pipe = load(run, checkpoint=checkpoint).on_process(process)
    pipe.plan(**sampling)  # a mistake in the settings shows before a judge is trained
    measuring = measuring or Measuring()
    channels, height, width = pipe.picture_shape
    opened = open_run_rows(pipe.config, channels, (height, width))
    rows = opened.training
    if not isinstance(rows, PicturesInMemory) or rows.captions is None:
        raise UserError(f"{run} was not trained on captioned pictures that fit in memory: nothing to judge by")
    count = min(NUM_CANDIDATES, len({own[0] for own in rows.captions if own}))
    if num_images < count or num_images % count:
        raise UserError(f"num_images={num_images} must be a multiple of {count}, the number of prompts")
    _, height, width = rows.shape
    config = RetrievalConfig(channels=rows.shape[0], image_size=(min(height, 32), min(width, 32)))
    judge, judge_report = load_retrieval_judge(rows, cache_folder(), config, progress=progress)
    network = feature_network(measuring, rows.shape, lambda: retrieval_feature_network(judge))
    chosen = prompt_rows(rows.captions, count)
    prompts = [rows.captions[row][0] for row in chosen.tolist()]
    each = num_images // count
    output = pipe(
        prompts=[prompt for prompt in prompts for _ in range(each)],
        seed=seed,
        progress=progress,
        guidance_scale=guidance_scale,
        guidance=guidance,
        batch_size=100,
        **sampling,
    )
    ranks = prompt_ranks(judge, output.tensor, output.prompts or (), prompts).reshape(count, each)
    real = prompt_ranks(judge, rows.read(chosen), prompts, prompts)
    compared = DataRows(rows, opened.held_out, pipe.config.data.kind)
    measured = measure_run(pipe, run, output, compared, network, measuring, guidance_scale, progress)
    cards = measured.cards
    if isinstance(network, ClipFeatures):
        cards = (*cards, clip_card(network, output, compared, drawing_of(pipe, run, output, guidance_scale)))
    report = PromptsReport(
        judge=judge_report,
        num_candidates=count,
        top1=share_in_top(ranks, 1),
        top10=share_in_top(ranks, 10),
        real_top1=share_in_top(real, 1),
        real_top10=share_in_top(real, 10),
        num_images=num_images,
        network_calls=output.plan.num_calls,
        solver=output.plan.solver,
        guidance_scale=pipe.scale_or_default(guidance_scale, conditional=True),
        cards=cards,
        notes=measured.notes,
    )
    write_json(RunFolder(run).path / "evaluation.json", asdict(report))
    shown = captioned_grid(output.tensor[::each][:_SHOWN], prompts[:_SHOWN], columns=8)
    shown.save(RunFolder(run).path / "prompts.png")
    return report
