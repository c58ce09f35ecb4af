"""A run on Ray Train's workers is the run of one process."""

import json
import os
from pathlib import Path

import pytest
from training_runs import tiny_config

from smalti.errors import UserError

PLAIN = ["precision=float32", "compile=false"]


def test_what_ray_cannot_do_is_said_first(tmp_path):
    pytest.importorskip("ray.train")
    from smalti.training.on_ray import train_on_ray

    with pytest.raises(UserError, match="absolute"):
        train_on_ray(tiny_config(2), Path("here"), workers=2)
    with pytest.raises(UserError, match="batch_size=8 must divide by"):
        train_on_ray(tiny_config(2), tmp_path / "run", workers=3)


@pytest.mark.slow
def test_two_ray_workers_train_as_one_process(tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train")
    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train
    from smalti.training.on_ray import train_on_ray

    config = tiny_config(6, *PLAIN)
    train(config, tmp_path / "one", display=PlainDisplay(1e9))
    ray.init(
        num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
    )
    try:
        record = train_on_ray(config, tmp_path / "two", workers=2)
    finally:
        ray.shutdown()
    assert (record["outcome"], record["step"], record["ranks"]) == ("finished", 6, 2)
    for one, two in zip(
        *((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")), strict=True
    ):
        ours, theirs = json.loads(one), json.loads(two)
        assert all(ours[name] == pytest.approx(theirs[name], abs=1e-5) for name in ours)
