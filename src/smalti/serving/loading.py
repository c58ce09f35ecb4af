"""From a run directory to an engine that is ready to serve: the pipeline, its card, exact batching, warm forwards."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from smalti import rng
from smalti.models.registry import count_parameters
from smalti.pipeline import Pipeline, load
from smalti.run_folder import RunFolder
from smalti.sampling.compiled import CompiledDenoiser, compiled_estimate
from smalti.sampling.masked import MASKED_SOLVER
from smalti.sampling.solvers import solver_names
from smalti.serving.engine import Engine, EngineSettings
from smalti.serving.exact_batching import shares_exactly, with_fixed_heights
from smalti.serving.faults import Faults
from smalti.serving.messages import ModelCard, PictureEvent
from smalti.serving.model_settings import ModelSettings

_REGISTERS = 6  # x, an anchor and history: the most that a solver keeps, and one to spare


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of all weights and buffers by name, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _version(pipeline: Pipeline, network: nn.Module) -> str:
    """Of the weights that make the pictures; of a masked model the tokenizer's too."""
    ours = weights_hash(network)
    if pipeline.tokenizer is not None:
        ours = hashlib.sha256(f"{ours} {pipeline.tokenizer.fingerprint}".encode()).hexdigest()
    return ours[:12]


def tokens_of(pipeline: Pipeline) -> int:
    """Tokens of a row: patches of what the network denoises."""
    model = pipeline.config.model
    patch = int(getattr(model, "patch_size", 1))
    return math.prod(model.image_size) // patch**2


def model_card(pipeline: Pipeline, name: str, created: int) -> ModelCard:
    """What a pipeline is, for those who do not hold it."""
    model, sampling = pipeline.config.model, pipeline.config.sampling
    network = pipeline.backbone
    assert isinstance(network, nn.Module)
    channels, height, width = pipeline.picture_shape
    # A token is an int64.
    values = math.prod(model.image_size) * (2 if pipeline.tokenizer is not None else model.in_channels)
    conditional = pipeline.num_classes > 0 or pipeline.encode_prompts is not None
    return ModelCard(
        name=name,
        version=_version(pipeline, network),
        created=created,
        architecture=type(model).kind,
        image_size=(height, width),
        channels=channels,
        num_classes=0 if pipeline.encode_prompts is not None else pipeline.num_classes,
        reads_prompts=pipeline.encode_prompts is not None,
        takes_pictures=pipeline.decode is None,
        takes_sizes=False,
        solvers=tuple(solver_names()) if pipeline.tokenizer is None else (MASKED_SOLVER,),
        solver=sampling.solver,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale if conditional else 1.0,
        tokens=tokens_of(pipeline),
        trajectory_bytes=4 * _REGISTERS * values + 256,
        parameters=sum(count_parameters(network).values()),
    )


def buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that forwards are padded to: powers of two, and max_rows."""
    return (*(2**i for i in range(math.ceil(math.log2(max_rows)))), max_rows)


def load_engine(settings: ModelSettings, emit: Callable[[PictureEvent], None], worker: int = 0) -> Engine:
    """An engine with warm forwards, on the device of the worker of that number.

    Raises UserError where the run cannot be served.
    """
    torch.set_num_threads(settings.threads)
    path = Path(settings.run)
    pipeline = load(path, device=settings.devices[worker % len(settings.devices)])
    network = pipeline.backbone
    assert isinstance(network, nn.Module)
    network.eval().requires_grad_(False)
    created = int(RunFolder(path).config.stat().st_mtime)
    card = model_card(pipeline, settings.name, created)
    engine_settings = EngineSettings(checkpoint_every=settings.checkpoint_every)
    scheduling = replace(
        engine_settings.scheduling,
        max_rows=settings.max_rows,
        express_calls=settings.express_calls,
        aged_seconds=settings.aged_seconds,
    )
    if not settings.compile:
        with_fixed_heights(network)
    engine_settings = replace(
        engine_settings,
        scheduling=scheduling,
        bucket_rows=buckets(settings.max_rows) if settings.compile else (),
        one_forward_each=not settings.compile and not _shares_exactly(pipeline, settings.max_rows),
    )
    faults = Faults() if settings.allow_faults else None
    engine = Engine(pipeline, card, emit, engine_settings, faults=faults)
    if settings.compile:
        engine.network = CompiledDenoiser(engine.network, compiled_estimate())
    for rows in engine_settings.bucket_rows or (settings.max_rows,):
        engine.warm_up(rows)
    return engine


def _shares_exactly(pipeline: Pipeline, max_rows: int) -> bool:
    rows = min(max_rows, 24)
    seeds = torch.arange(rows, device=pipeline.device)
    x = pipeline.start_noise(seeds)
    if pipeline.tokenizer is not None:  # at the start all grids are alike
        u = rng.uniform(tuple(x.shape[1:]), seed=seeds, purpose="serving/warm_up", device=pipeline.device)
        x = (u * pipeline.tokenizer.codebook_size).long()
    t = torch.linspace(0.02, 0.98, rows, dtype=rng.widest_float(pipeline.device), device=pipeline.device)
    cond = pipeline.null_condition(rows)
    return shares_exactly(pipeline.unguided(), x, t, cond, sizes=tuple(n for n in (2, 3, 5, 8, 16, rows) if n <= rows))
