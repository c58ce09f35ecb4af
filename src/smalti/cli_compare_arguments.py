"""The arguments of `smalti compare`; the docstring is what `smalti compare --help` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Compare:
    """Compare ways of making pictures on the same work: train each contender, sample each at several numbers of network
    calls, judge all with one judge, and write a report that says who is better where, with intervals.

    Examples: smalti compare unet-vs-dit --minutes 20
              smalti compare my-question.json --minutes 10 --out runs/my-question

    Bundled, on the digits: unet-vs-dit; dit-vs-sit-vs-edm (one network, three processes); diffusion-vs-masked;
    patch-size (2, 4, 7); depth (2, 4, 8 blocks); adaln-zero-vs-adaln-vs-cross-attention-vs-in-context (how a DiT is
    told time and label).

    --minutes is for everything: speeds are measured first, then the time is shared out so that each contender trains
    with the same FLOPs (or what the spec holds equal) and the pictures are drawn in what is left. After a crash or
    Ctrl-C the same command goes on. --out then holds report.html (one file, to be sent around), comparison.json, and
    each contender's run directory under runs/.

    A spec of your own is a JSON file: {"name": "rate", "question": "Which rate?", "match": "flops",
    "calls": [8, 16], "num_samples": 500, "contenders": [{"name": "low", "recipe": "mnist",
    "set": ["optimizer.learning_rate=2e-3"]}, {"name": "high", "recipe": "mnist"}]}. match: flops, parameters or
    minutes; set: as `smalti train RECIPE --set` takes it, sampling.guidance_scale and the like included.
    """

    spec: Annotated[Positional[str], arg(metavar="SPEC")]
    """A bundled comparison's name, or a .json file."""
    minutes: float = 20.0
    """For everything: training, sampling and judging of all contenders."""
    out: Path | None = None
    """The folder to write (default: runs/compare-NAME)."""
    overwrite: bool = False
    """Replace the comparison in --out."""
    report_only: bool = False
    """Only write report.html anew, from the comparison.json in --out."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
