"""A run on a Ray cluster: Ray Train starts the workers and joins them in a process group, and each calls train()."""

from pathlib import Path
from typing import Any

from smalti.config import RunConfig, from_json, to_json
from smalti.errors import UserError
from smalti.training.loop import train
from smalti.training.parallel import Sharding, check_divisible


def train_on_ray(
    config: RunConfig,
    out: Path,
    *,
    workers: int,
    gpus: bool = False,
    cpus_per_worker: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    sharding: Sharding = "ddp",
    restarts: int = 0,
) -> dict[str, Any]:
    """Train with so many Ray Train workers; returns what run.json says of it.

    out must be an absolute path that every machine of the cluster reaches. gpus: one for each worker. restarts: how
    often Ray starts the workers again after a failure; they go on from the newest checkpoint. An initialised Ray is
    used, else one is started on this machine. Raises UserError where Ray is missing or the arguments do not fit, and
    Ray's TrainingFailedError with the cause when the run fails.
    """
    try:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise UserError("Ray Train is not installed: pip install 'ray[train]'") from None
    if not out.is_absolute():
        raise UserError(f"out={out} must be an absolute path that all workers reach")
    check_divisible(config.loop.batch_size, config.loop.gradient_accumulation_steps, workers)
    arguments = {
        "config": to_json(config),
        "out": str(out),
        "resume": resume or restarts > 0,
        "overwrite": overwrite,
        "gpus": gpus,
        "threads": cpus_per_worker,
        "sharding": sharding,
    }
    if restarts and overwrite:
        raise UserError("overwrite=True would delete at a restart what the run has learnt: give restarts=0")
    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if gpus else {})}
    trainer = TorchTrainer(
        _train_as_worker,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=resources),
        run_config=RayRunConfig(
            storage_path=str(out.parent / "ray"), failure_config=FailureConfig(max_failures=restarts)
        ),
    )
    trainer.fit()
    from smalti.run_folder import RunFolder, read_record

    return read_record(RunFolder(out))


def _train_as_worker(arguments: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import get_device

    torch.set_num_threads(arguments["threads"])
    device = str(get_device()) if arguments["gpus"] else "cpu"
    train(
        from_json(RunConfig, arguments["config"]),
        Path(arguments["out"]),
        resume=arguments["resume"],
        overwrite=arguments["overwrite"],
        device=device,
        sharding=arguments["sharding"],
    )
