"""RunConfig: everything that defines a run, as frozen dataclasses; strict overrides by name; JSON round trip.

The parts sit beside the classes that they configure (models/dit.py, training/optim.py ...). A part with alternatives
(optimizer: adamw or muon) is a union of dataclasses that carry a `kind`. A field may say in its metadata that it is
read only if a neighbour has a certain value ("only_if"); setting it otherwise is an error, since it would do nothing.
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from smalti.autoencoders.registry import AutoencoderConfig, Pixels, TokenizerConfig
from smalti.conditioning.captions import CaptionPolicy
from smalti.conditioning.encoders import TextConfig
from smalti.conditioning.prompted import check_text_width
from smalti.conditioning.tiny import TinyTextConfig
from smalti.data.sources import DataConfig
from smalti.data.sources.digits import DigitsData
from smalti.diffusion.masking import Masking, masking_names
from smalti.diffusion.objective import Objective, check_objective
from smalti.diffusion.processes import make_process
from smalti.diffusion.timesteps import LogitNormalTimesteps, TimestepDensity, check_density
from smalti.errors import UserError, unknown_name
from smalti.models.dit import DiTConfig
from smalti.models.registry import LabelledModelConfig, ModelConfig, TrainableModelConfig
from smalti.optim.ema import EmaConfig, OptimizerAverage, PowerEma
from smalti.optim.mup import MuP, check_mup
from smalti.optim.optimizers import MuonConfig, OptimizerConfig
from smalti.optim.schedule import Schedule
from smalti.optim.schedule_free import ScheduleFreeConfig
from smalti.sampling.guided import GuidanceOptions

BudgetUnit = Literal["steps", "minutes", "epochs"]
WriterName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class Budget:
    """How long a run trains."""

    unit: BudgetUnit = "minutes"
    amount: float = 3.0

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise UserError(f"budget of {self.amount} {self.unit}: must be above 0")


@dataclass(frozen=True)
class LoopConfig:
    """The training loop: batch, regularisation, and what is written how often (in steps)."""

    batch_size: int = 64  # pictures an optimiser step, over all ranks and micro-batches
    gradient_accumulation_steps: int = 1  # micro-batches that a rank runs one after the other in a step
    label_dropout: float = 0.1
    stratified_timesteps: bool = False
    clip_norm: float = 1.0
    log_every: int = 10
    validate_every: int = 200
    checkpoint_every: int = 250
    preview_every: int = 500
    keep_checkpoints: int = 2
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"  # of the products: training/forward.py
    activation_checkpointing: bool = False  # run each block again in the backward pass in place of keeping its insides
    hang_seconds: float = 30.0  # of several ranks: how long one may stand still while others wait for it
    compile: bool = False  # torch.compile the blocks, in runs long enough to repay it
    writers: tuple[WriterName, ...] = ("tensorboard",)  # of metrics and pictures, beside the JSONL logs

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "gradient_accumulation_steps", "log_every", "validate_every", "checkpoint_every",
            "preview_every", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"loop.label_dropout={self.label_dropout} must lie in [0, 1)")
        if self.hang_seconds < 1:
            raise UserError(f"loop.hang_seconds={self.hang_seconds} must be at least 1")
        if self.clip_norm <= 0:
            raise UserError(f"loop.clip_norm={self.clip_norm} must be above 0")
        for writer in self.writers:
            if writer not in get_args(WriterName):
                raise unknown_name("writer in loop.writers", writer, get_args(WriterName))
        if len(set(self.writers)) != len(self.writers):
            raise UserError(f"loop.writers={','.join(self.writers)} names one twice")


@dataclass(frozen=True)
class BucketConfig:
    """Pictures of near shapes share batches of one size. token_budget: most tokens of a size, 0: the network's own.

    max_aspect: of the longer side to the shorter. step: sides are multiples of so many tokens.
    """

    kind: ClassVar[str] = "aspect"
    token_budget: int = 0
    max_aspect: float = 2.0
    step: int = 1

    def __post_init__(self) -> None:
        if self.token_budget < 0 or self.max_aspect < 1 or self.step < 1:
            raise UserError(
                f"buckets: token_budget={self.token_budget} must not be negative, max_aspect={self.max_aspect} and "
                f"step={self.step} must be at least 1"
            )


@dataclass(frozen=True)
class SamplingConfig:
    """How the run is sampled unless the caller says otherwise."""

    solver: str = "dpmpp_2m"
    num_inference_steps: int = 20
    spacing: str = "time"
    guidance_scale: float = 2.0
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    clip_x0: bool = False
    # Of masked tokens: of the draws, and of the noise on their confidence (sampling/masked.py).
    temperature: float = field(default=1.0, metadata={"only_if": ("solver", ("masked",))})
    choice_temperature: float = field(default=2.0, metadata={"only_if": ("solver", ("masked",))})

    def __post_init__(self) -> None:
        from smalti.sampling.grids import spacings
        from smalti.sampling.masked import MASKED_SOLVER
        from smalti.sampling.solvers import solver_entry

        if self.solver != MASKED_SOLVER:
            solver_entry(self.solver)
        if self.spacing not in spacings():
            raise unknown_name("spacing", self.spacing, spacings())
        for name in ("temperature", "choice_temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"sampling.{name}={getattr(self, name)} must be at least 0 and finite")
        if self.num_inference_steps < 1:
            raise UserError(f"sampling.num_inference_steps={self.num_inference_steps} must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. Written beside its weights as config.json."""

    recipe: str
    data: DataConfig = field(default_factory=DigitsData)
    buckets: BucketConfig | None = None  # sizes by aspect ratio in place of one; `--set buckets=aspect`
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    model: TrainableModelConfig = field(default_factory=DiTConfig)
    initial_weights: str | None = None  # what smalti.load_backbone reads: a network of this very config to start from
    autoencoder: AutoencoderConfig = field(
        default_factory=Pixels
    )  # what the network denoises: pixels, or whose latents
    text: TextConfig | None = None  # the text encoder of a network that reads prompts
    captions: CaptionPolicy = field(default_factory=CaptionPolicy)  # what a training step reads of them
    parametrisation: MuP | None = None  # rates and initial weights that follow the width; `--set parametrisation=mup`
    process: str = "rectified_flow"
    objective: Objective = field(default_factory=Objective)
    timesteps: TimestepDensity = field(default_factory=LogitNormalTimesteps)
    optimizer: OptimizerConfig = field(default_factory=MuonConfig)
    schedule: Schedule = field(default_factory=Schedule)
    ema: EmaConfig = field(default_factory=PowerEma)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def num_classes(self) -> int:
        """Classes that the network is told; 0 where it reads text or nothing."""
        return self.model.num_classes if isinstance(self.model, LabelledModelConfig) else 0

    @property
    def codebook_size(self) -> int | None:
        """Tokens that the network knows; None where it denoises pictures or latents."""
        return self.autoencoder.codebook_size if isinstance(self.autoencoder, TokenizerConfig) else None

    def __post_init__(self) -> None:
        process = make_process(self.process)  # raises for an unknown name
        check_objective(self.objective, process, getattr(self.model, "learn_sigma", False))
        check_density(self.timesteps, process)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must lie in 0 .. 2^63 - 1")
        if self.num_classes and self.loop.label_dropout and not getattr(self.model, "null_label", True):
            raise UserError(
                f"model.null_label=False: loop.label_dropout={self.loop.label_dropout} needs the null label"
            )


def check_parts(config: RunConfig) -> None:
    """Raise UserError where network, data, text encoder, optimiser and its schedule and average do not fit each other.

    Apart from RunConfig's own checks, since overrides come one by one and two parts fit when both are set.
    """
    model, text = config.model, config.text
    if config.parametrisation is not None:
        check_mup(config.parametrisation, model)
        if isinstance(config.optimizer, ScheduleFreeConfig):
            raise UserError("parametrisation=mup: optimizer=schedule_free has one rate for all; take adamw or muon")
    if isinstance(config.data, DigitsData) and isinstance(config.autoencoder, Pixels):
        _check_digits(config)
    if text is None:
        if hasattr(model, "text_width"):
            raise UserError(f"model={model.kind} reads text: set text=tiny, or another encoder")
    elif not hasattr(model, "text_width"):
        raise UserError(f"text={text.kind} has no effect: model={model.kind} reads no text")
    elif isinstance(text, TinyTextConfig):
        check_text_width(model, text.width)
    _check_schedule_free(config)
    _check_tokens(config)


def _check_tokens(config: RunConfig) -> None:
    """Tokenizer, masking, prediction and decoding go together, and what is about noise has no place beside them."""
    from smalti.sampling.masked import MASKED_SOLVER

    masking = isinstance(make_process(config.process), Masking)
    parts = {
        f"autoencoder={config.autoencoder.kind}": config.codebook_size is not None,
        f"process={config.process}": masking,
        f"objective.prediction_type={config.objective.prediction_type}": config.objective.prediction_type == "tokens",
        f"sampling.solver={config.sampling.solver}": config.sampling.solver == MASKED_SOLVER,
    }
    if any(parts.values()) and not all(parts.values()):
        of_tokens, others = ([name for name, token in parts.items() if token is wanted] for wanted in (True, False))
        raise UserError(
            f"{', '.join(of_tokens)} {'is' if len(of_tokens) == 1 else 'are'} of masked tokens and {', '.join(others)} "
            f"not: they go together, as in the recipe mnist-masked (process: {', '.join(masking_names())})"
        )
    if not masking:
        return
    if config.objective.weighting != "uniform" or config.objective.vlb_weight:
        raise UserError("objective.weighting and vlb_weight: masked tokens are all weighted alike; leave the defaults")
    options = replace(config.sampling.guidance, interval=(0.0, 1.0), schedule="constant")
    if config.sampling.clip_x0 or options != GuidanceOptions():
        raise UserError("sampling: clip_x0 and guidance's rescale, apg and pag have no meaning for logits of tokens")
    if config.parametrisation is not None:
        raise UserError("parametrisation=mup: its rules do not cover networks of tokens yet; leave it out")
    if config.buckets is not None:
        raise UserError("buckets: pictures of several sizes are not tokenized yet; leave it out")


def _check_schedule_free(config: RunConfig) -> None:
    free = isinstance(config.optimizer, ScheduleFreeConfig)
    if free != isinstance(config.ema, OptimizerAverage):
        raise UserError(
            f"optimizer={config.optimizer.kind} with ema={config.ema.kind}: "
            + ("it keeps its own average: set ema=by_optimizer" if free else "only schedule_free keeps an average")
        )
    if free and config.schedule.decay != "none":
        raise UserError(
            f"schedule.decay={config.schedule.decay}: optimizer=schedule_free averages in place of a decay: set "
            "schedule.decay=none"
        )


def _check_digits(config: RunConfig) -> None:
    model = config.model
    if config.num_classes and config.num_classes < 10:
        raise UserError(f"model.num_classes={config.num_classes}: the digits have 10 classes (or 0: none)")
    if (model.in_channels, model.image_size) != (1, (28, 28)):
        raise UserError(
            f"model.in_channels={model.in_channels}, model.image_size={model.image_size}: "
            "the digits are 1 channel of (28, 28)"
        )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union (without None), or the annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(a for a in get_args(annotation) if a is not type(None))
    return (annotation,)


def _may_be_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _dataclass_choices(annotation: Any) -> tuple[Any, ...]:
    return tuple(a for a in _alternatives(annotation) if is_dataclass(a))


def _kind(cls: Any) -> str:
    return str(getattr(cls, "kind", cls.__name__))


def to_json(config: Any) -> Any:
    """A config as plain dicts, lists and numbers; alternatives carry their kind."""
    if is_dataclass(config) and not isinstance(config, type):
        body = {f.name: to_json(getattr(config, f.name)) for f in fields(config)}
        return {"kind": config.kind, **body} if hasattr(config, "kind") else body
    if isinstance(config, (list, tuple)):
        return [to_json(item) for item in config]
    return config


def flat_json(config: Any) -> dict[str, Any]:
    """to_json's leaves by dotted path, in order."""

    def leaves(body: Any, path: str) -> dict[str, Any]:
        if not isinstance(body, dict):
            return {path: body}
        return {k: v for name, part in body.items() for k, v in leaves(part, f"{path}.{name}".lstrip(".")).items()}

    return leaves(to_json(config), "")


def _value_from_json(annotation: Any, value: Any, path: str) -> Any:
    choices = _dataclass_choices(annotation)
    if choices and not (value is None and _may_be_none(annotation)):
        by_kind = {_kind(c): c for c in choices}
        if isinstance(value, str) and value in by_kind:  # as "data": "digits" was written once
            return by_kind[value]()
        if not isinstance(value, Mapping):
            raise UserError(f"{path} must be an object, not {value!r}")
        # A model's config that was written when there was only one architecture has no kind.
        kind = value.get("kind", _kind(choices[0]) if len(choices) == 1 or path == "model" else None)
        if kind not in by_kind:
            raise UserError(f"{path}.kind is {kind!r}; known: {', '.join(by_kind)}")
        return from_json(by_kind[kind], {k: v for k, v in value.items() if k != "kind"}, path)
    if get_origin(annotation) is tuple and isinstance(value, list):
        return tuple(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def from_json(cls: Any, body: Mapping[str, Any], path: str = "") -> Any:
    """A dataclass from to_json's output. Unknown keys raise UserError; missing ones take their defaults."""
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(body) - names)
    if unknown:
        raise UserError(f"unknown key {path + '.' if path else ''}{unknown[0]}; known: {', '.join(sorted(names))}")
    return cls(**{k: _value_from_json(hints[k], v, f"{path}.{k}" if path else k) for k, v in body.items()})


def model_from_json(body: Mapping[str, Any]) -> ModelConfig:
    """A network's config from to_json's output. Raises UserError for an unknown kind or field."""
    config: ModelConfig = _value_from_json(ModelConfig, body, "model")
    return config


def _leaf_paths(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> annotation of each settable field of a config value, alternatives as the config has them."""
    hints, paths = get_type_hints(type(config)), {}
    for f in fields(config):
        path = f"{prefix}{f.name}"
        choices, value = _dataclass_choices(hints[f.name]), getattr(config, f.name)
        if len(choices) != 1 or _may_be_none(hints[f.name]):
            paths[path] = hints[f.name]
        if choices and value is not None:
            paths |= _leaf_paths(value, f"{path}.")
    return paths


def _unused_alternatives(config: Any) -> dict[str, tuple[str, str, str]]:
    """Dotted path of fields that only alternatives not chosen have -> (part, its kind now, the kinds that have it)."""
    hints, unused = get_type_hints(type(config)), dict[str, tuple[str, str, str]]()
    for f in fields(config):
        for choice in _dataclass_choices(hints[f.name]):
            current = getattr(config, f.name)
            if not isinstance(current, choice):
                now = "none" if current is None else _kind(type(current))
                for inner in fields(choice):
                    path = f"{f.name}.{inner.name}"
                    others = f"{unused[path][2]} or " if path in unused else ""
                    unused[path] = (f.name, now, others + _kind(choice))
    return unused


def _parse(annotation: Any, text: str, path: str) -> Any:
    """A command line's text as the field's type."""
    origin = get_origin(annotation)
    wanted = getattr(annotation, "__name__", str(annotation))
    try:
        if origin is Literal:
            allowed = {str(a): a for a in get_args(annotation)}
            if text not in allowed:
                raise UserError(f"{path}={text!r} must be one of {', '.join(allowed)}")
            return allowed[text]
        if origin in (Union, types.UnionType):  # X | None
            (member,) = _alternatives(annotation)
            return None if text.lower() == "none" else _parse(member, text, path)
        if origin is tuple:
            members = get_args(annotation)
            sizes = members[0] in (int, float)  # which are also written 28x28
            text = text.strip("()").replace("x", ",") if sizes else text.strip("()")
            parts = [part for part in text.split(",") if part]
            if members[-1] is Ellipsis:
                return tuple(_parse(members[0], part, path) for part in parts)
            wanted = f"{len(members)} values joined by commas"
            return tuple(t(p) for t, p in zip(members, parts, strict=True))
        if annotation is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return annotation(text)
    except UserError:
        raise
    except (ValueError, KeyError):
        raise UserError(f"{path}={text!r} must be {wanted}") from None


def parse_field(cls: Any, name: str, text: str) -> Any:
    """A command line's text as the type of a dataclass's field. Raises UserError for what does not parse."""
    return _parse(get_type_hints(cls)[name], text, name)


def _resolve(config: RunConfig, name: str) -> str:
    """The full dotted path that a field's name or dotted ending means."""
    paths = _leaf_paths(config)
    if name in paths:
        return name
    matches = [path for path in paths if path.endswith("." + name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"field {name!r} is ambiguous: {', '.join(matches)}; give the dotted path")
    for path, (part, now, needed) in _unused_alternatives(config).items():
        if path == name or path.endswith("." + name):
            raise UserError(
                f"field {name!r} has no effect: it belongs to {part}={needed} and this run has {part}={now}; "
                f"put {part}={needed} before it"
            )
    leaves = sorted({*paths, *(p.rsplit(".", 1)[-1] for p in paths)})
    near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`smalti info RECIPE` lists every field"
    raise UserError(f"unknown field {name!r}: {hint}")


def _replace_at(config: Any, path: Sequence[str], value: Any) -> Any:
    head, *rest = path
    return replace(config, **{head: _replace_at(getattr(config, head), rest, value) if rest else value})


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The config with each "field=value" applied in turn.

    field is a dotted path or a unique ending of one. A part with alternatives takes the kind (optimizer=adamw). Raises
    UserError for unknown, ambiguous and malformed ones, and for fields that the run would not read.
    """
    touched: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} must have the form field=value")
        path = _resolve(config, name.strip())
        if path == "recipe" or path.startswith("budget."):
            flag = "the recipe's name" if path == "recipe" else "--minutes, --steps or --epochs"
            raise UserError(f"{path} is not set by --set: give {flag}")
        annotation = _leaf_paths(config)[path]
        by_kind = {_kind(c): c for c in _dataclass_choices(annotation)}
        if by_kind and text.lower() == "none" and _may_be_none(annotation):
            value = None
        elif by_kind and text not in by_kind:
            raise UserError(f"{path}={text!r} must be one of {', '.join(by_kind)}")
        else:
            value = by_kind[text]() if by_kind else _parse(annotation, text, path)
        config = _replace_at(config, path.split("."), value)
        touched.append(path)
    for path in touched:
        _check_effect(config, path)
    check_parts(config)
    return config


def _check_effect(config: RunConfig, path: str) -> None:
    *parents, leaf = path.split(".")
    part: Any = config
    for name in parents:
        part = getattr(part, name)
    metadata = {f.name: f.metadata for f in fields(part)}.get(leaf)
    if metadata and "only_if" in metadata:
        neighbour, needed = metadata["only_if"]
        if getattr(part, neighbour) not in needed:
            raise UserError(
                f"field {path!r} has no effect while {neighbour}={getattr(part, neighbour)}: "
                f"it is read only if {neighbour} is {' or '.join(map(str, needed))}"
            )
