"""The arguments of each command; the docstrings are what `smalti COMMAND --help` prints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from smalti.cli_compare_arguments import Compare
from smalti.cli_data_arguments import Data
from smalti.cli_ema_arguments import Ema
from smalti.cli_evaluate_arguments import CompareCards, Eval, Sampler
from smalti.cli_latents_arguments import TrainAutoencoder, TrainTokenizer
from smalti.cli_mup_arguments import Mup
from smalti.cli_plan_arguments import Plan
from smalti.cli_scaling_arguments import Scaling
from smalti.cli_serve_arguments import Chaos, Replay, Serve, Top


@dataclass(frozen=True)
class Train:
    """Train a recipe into a run directory.

    Example: smalti train mnist --minutes 3 --out runs/mnist

    The run directory holds the full config, checkpoints, metrics (JSONL and TensorBoard) and sample grids. Ctrl-C saves
    and stops; --resume goes on where a run stopped, also after a crash. Recipes: mnist (the best three minutes on a
    CPU), mnist-ddpm (DiT's published recipe on the same digits), fashion (clothes by class), emoji-32 (text to image
    on emoji), folder (text to image on pictures of your own). `smalti doctor RECIPE` examines one before it trains;
    `smalti info RECIPE` shows every field --set takes.
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
    """Where to train: cpu, cuda, cuda:1, mps. With several processes cuda gives each its own GPU."""
    nproc: int | None = None
    """Processes on this machine that train the run together, each with its part of the batch, threads and GPUs. On
    several machines: torchrun ... -m smalti train."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: all weights in each (ddp), or a part of them in each (fsdp)."""


@dataclass(frozen=True)
class Sample:
    """Draw pictures from a run.

    Examples: smalti sample runs/mnist --class-labels 0 1 2 --num-images-per-label 8 --out samples
              smalti sample runs/emoji-32 --prompts "a red heart" "a cat with wry smile" --guidance-scale 4

    Writes 00000.png ..., grid.png and manifest.jsonl (a row a picture: file, label or prompt, seed, every setting). A
    picture depends on its own seed and label or prompt alone, so any row of a manifest can be drawn again by itself.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    class_labels: tuple[int, ...] = ()
    """Labels to draw (default: each class once)."""
    prompts: tuple[str, ...] = ()
    """What to draw, for a network that reads text."""
    num_images_per_label: Annotated[int, arg(aliases=["--num-images-per-prompt"])] = 8
    """Pictures for each label or prompt (or in all, for an unconditional network)."""
    sampler: Sampler = field(default_factory=Sampler)
    negative_class_labels: tuple[int, ...] = ()
    """Labels to move away from, in place of the null label: one for all, or one a picture."""
    negative_prompt: str | None = None
    """What to move away from, in place of the empty prompt."""
    image: Path | None = None
    """A picture to begin from (with --strength) or to keep a part of (with --mask)."""
    strength: float = 1.0
    """How far --image is noised, above 0 to 1; 1 leaves nothing of it and is for --mask."""
    mask: Path | None = None
    """A picture of the image's size: white where to paint, black where to keep --image."""
    image_size: tuple[int, int] | None = None
    """Height and width, for a network that takes others than it was trained at."""
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
class Explain:
    """Print a solver's table: where the network is called, and what becomes of its answers.

    Example: smalti explain --solver dpmpp_2m --steps 20 --process vp_cosine

    Every solver in smalti is such a table. x is where the network looks, x0 its estimate of the clean picture, h1 an
    earlier estimate, z fresh noise.
    """

    solver: str = "dpmpp_2m"
    """The solver's name, or `list` for all of them."""
    steps: Annotated[int, arg(aliases=["--num-inference-steps"])] = 20
    """Solver steps."""
    process: str = "rectified_flow"
    """The noise process: rectified_flow, vp_linear, vp_cosine ..."""
    spacing: str | None = None
    """Time grid: time, lambda, karras, quadratic, beta, ays ... (default: the solver's own)."""
    solver_options: tuple[str, ...] = ()
    """The solver's own options and the grid's as name=value: eta=1 shift=3 t_end=0.01."""
    plot: Path | None = None
    """Also draw it: grid, noise levels and coefficients, as PNG, SVG or PDF (needs matplotlib)."""


@dataclass(frozen=True)
class Tune:
    """Find the sampler settings that suit a run at a small number of network calls.

    Example: smalti tune runs/mnist --budget 10

    Searches solver x time grid x guidance scale and interval at --budget network calls by successive halving (few
    samples of every setting, more of the better ones), then runs the best settings at fewer calls. Prints the frontier
    of quality against calls beside the run's own setting; writes RUN/tune.json and RUN/tune.png.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    budget: int = 10
    """Network calls a picture."""
    num_images: int = 1000
    """Samples of the last round, and of the frontier."""
    seed: int = 0
    """Seed of the first sample."""
    checkpoint: str | None = None
    """A folder's name under checkpoints/ (default: the newest)."""
    threads: int | None = None
    """CPU threads (default: all cores)."""


@dataclass(frozen=True)
class Ems:
    """Measure the statistics of a run's network that the solver dpm_solver_v3 needs.

    Example: smalti ems runs/mnist

    Then: smalti sample runs/mnist --solver dpm_solver_v3 --solver-options ems=runs/mnist/ems.npz
    --num-inference-steps 8

    DPM-Solver-v3 splits each step into a linear part, solved exactly, and a rest that it extrapolates. Where the split
    lies is measured on the network, once for each run and guidance scale: how its estimate answers to a change of its
    input (l), and how the rest moves along the sampler's path (s, b). This costs about six network calls for each of
    --num-images pictures at each of --num-nodes noise levels. Where RUN/ems.npz is there, `smalti tune` tries the
    solver too.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    num_images: int = 128
    """Training digits to measure on."""
    num_nodes: int = 40
    """Intervals of log-SNR, from noise to data."""
    guidance_scale: float | None = None
    """Classifier-free guidance to measure at; 1 is off (default: the run's)."""
    secant_width: float = 0.3
    """Over how much of lambda (half the log-SNR) the estimate's change is taken; 0 is the paper's exact derivative,
    which on small networks is mostly noise."""
    out: Path | None = None
    """The file to write (default: RUN/ems.npz)."""
    seed: int = 0
    """Seed of the digits, the noise and the probes."""
    batch_size: int = 64
    """Pictures that share a forward."""
    checkpoint: str | None = None
    """A folder's name under checkpoints/ (default: the newest)."""
    threads: int | None = None
    """CPU threads (default: all cores)."""


@dataclass(frozen=True)
class Convert:
    """Rewrite a network's weights for smalti, diffusers or an original repository.

    Examples: smalti convert DiT-XL-2-256x256.pt dit-xl --to smalti
              smalti convert dit-xl dit.safetensors --to original

    Reads a smalti run or network, a diffusers folder (or a pipeline's), a .safetensors or .pt file of an original
    repository (of which only tensors are read, nothing is executed) or hf://owner/name. Reading is strict: missing,
    surplus and wrongly shaped tensors are listed. There and back gives the same bytes.
    """

    source: Annotated[Positional[str], arg(metavar="IN")]
    """A run, a folder, a file or hf://owner/name."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """A folder, or for --to original a .safetensors file."""
    to: Literal["smalti", "diffusers", "original"]
    """For whom to write."""
    format: str | None = None
    """Which original format, where an architecture has several."""
    prefix: str | None = None
    """What to put before each original name, such as model.diffusion_model. (default: what IN had)."""
    set: tuple[str, ...] = ()
    """Fields of the network's config to read otherwise, the weights staying as they are: num_heads=8 where a file does
    not say it; frequency_shift=1 mlp_norm_eps=1e-5 to write an original DiT for diffusers, which computes so."""
    checkpoint: str | None = None
    """Of a run: a folder's name under checkpoints/ (default: the newest)."""
    overwrite: bool = False
    """Replace OUT."""


@dataclass(frozen=True)
class Export:
    """Write a run as a folder that diffusers' own classes load: network, scheduler and, for DDIM, a pipeline.

    Example: smalti export runs/mnist-ddpm out

    A DiT must be one that diffusers can express: train with --set positions=sincos qk_norm=false activation=gelu_tanh
    frequency_shift=1 mlp_norm_eps=1e-5.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory."""
    out: Annotated[Positional[Path], arg(metavar="DIR")]
    """The folder to write."""
    to: Literal["diffusers"] = "diffusers"
    """For whom to write."""
    checkpoint: str | None = None
    """A folder's name under checkpoints/ (default: the newest)."""
    overwrite: bool = False
    """Replace DIR."""


@dataclass(frozen=True)
class Adapt:
    """Change a network's number of classes, resolution, patch size, depth or text width, keeping what can be kept.

    Example: smalti adapt runs/mnist wider --num-classes 20 --depth 6

    Takes a DiT, a U-ViT or an MM-DiT (of which the last has text for classes). Classes that both have are kept; tables
    of positions are interpolated; patch kernels are resized; a deeper network computes at first what the old one did;
    another text width starts with a fresh projection. Prints what became of each tensor; writes a network for `smalti
    train --set initial_weights=OUT`.
    """

    source: Annotated[Positional[str], arg(metavar="IN")]
    """A run, a folder, a file or hf://owner/name."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The folder to write."""
    num_classes: int | None = None
    """The new number of classes."""
    image_size: tuple[int, int] | None = None
    """The new height and width, in pixels or latents."""
    patch_size: int | None = None
    """The new patch size."""
    depth: int | None = None
    """The new number of blocks."""
    text_width: int | None = None
    """The new width of text tokens."""
    pooled_width: int | None = None
    """The new width of the pooled text vector."""
    seed: int = 0
    """Seed of what starts fresh."""
    checkpoint: str | None = None
    """Of a run: a folder's name under checkpoints/ (default: the newest)."""
    overwrite: bool = False
    """Replace OUT."""


@dataclass(frozen=True)
class Doctor:
    """Examine a recipe before it trains, on its real data, in seconds.

    Example: smalti doctor emoji-32 --set data.path=my-pictures

    Says what was found and skipped, how long captions are against what the encoder reads, how classes are spread, the
    values that the network will see, whether guidance can work, what a step costs and how long the budget takes. Exits
    with 1 where training would fail or be wasted.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name, such as emoji-32."""
    set: tuple[str, ...] = ()
    """Config fields as field=value, as for `smalti train`."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    device: str = "cpu"
    """Where it will be trained: cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True)
class ReplayNan:
    """Run the step again that stopped a run with a loss that was not finite, and say where that began.

    Example: smalti replay-nan runs/mnist

    Names the samples whose loss is not finite, the first module whose output is not, and the gradients that are not.
    Exits with 1 where the step is finite here.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run directory; its failure/ holds the batch and the weights."""
    rank: int = 0
    """Whose part of the batch, for a run of several processes."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    device: str = "cpu"
    """Where: cpu, cuda, cuda:1, mps."""


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


COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "train-autoencoder": TrainAutoencoder,
    "train-tokenizer": TrainTokenizer,
    "sample": Sample,
    "eval": Eval,
    "compare-cards": CompareCards,
    "explain": Explain,
    "tune": Tune,
    "ems": Ems,
    "ema": Ema,
    "convert": Convert,
    "export": Export,
    "adapt": Adapt,
    "data": Data,
    "doctor": Doctor,
    "replay-nan": ReplayNan,
    "serve": Serve,
    "replay": Replay,
    "chaos": Chaos,
    "top": Top,
    "mup": Mup,
    "compare": Compare,
    "scaling": Scaling,
    "plan": Plan,
    "info": Info,
    "completion": Completion,
}

DESCRIPTION = """smalti: train, sample, measure and serve diffusion transformers.

Five minutes, from nothing to judged digits:

    smalti train mnist --minutes 3       train DiT-Tiny on the bundled digits -> runs/mnist
    smalti sample runs/mnist             draw digits -> samples/grid.png
    smalti eval runs/mnist               how good are they?
    smalti explain --steps 5             what did the solver do?
    smalti tune runs/mnist --budget 10   which settings suit ten network calls?
    smalti serve runs/mnist              a page and an API that draw them
    smalti info runs/mnist               what is this model?

From a folder of pictures with captions to pictures of a prompt:

    smalti doctor folder --set data.path=my-pictures    will it work, how long will it take?
    smalti train folder --set data.path=my-pictures     train a text-to-image MM-DiT -> runs/folder
    smalti sample runs/folder --prompts "a red bicycle"

`smalti COMMAND --help` teaches each command."""
