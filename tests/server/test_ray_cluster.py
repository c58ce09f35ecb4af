"""Serving on a real Ray cluster: replicas and nodes are killed under load. See ray_rounds.py for what is done."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from training_runs import trained_config

ROUNDS = Path(__file__).parent / "ray_rounds.py"
# Its own process ids and its own loopback: Ray's ports meet nobody else's, and nothing of it outlives the test.
ALONE = ["unshare", "-rnpf", "--kill-child", "--mount-proc"]

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module", autouse=True)
def _machine():
    pytest.importorskip("ray.serve")
    if (
        not all(map(shutil.which, ("unshare", "ip")))
        or subprocess.run([*ALONE, "true"], capture_output=True).returncode
    ):
        pytest.skip("the kernel lets this user have no network namespace")


def ray_round(name, *runs):
    # Sockets' paths have room for about a hundred letters.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        environment = os.environ | {
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        script = 'ip link set lo up; exec "$@"'
        command = [*ALONE, "sh", "-c", script, "sh", sys.executable, str(ROUNDS), name, *map(str, runs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("lost", ["replica", "node"])
def test_no_request_is_lost_with_a_replica_or_its_node(lost, trained_run):
    told = ray_round(lost, trained_run)
    assert told["failed"] == []
    assert told["different"] == 0
    assert told["open"] >= 40  # it happened under load
    assert told["cost"] > 0
    assert told["replaced"] == 1


def test_arms_get_their_shares(trained_run, tmp_path):
    from smalti.config import apply_overrides
    from smalti.training.display import PlainDisplay
    from smalti.training.loop import train

    train(apply_overrides(trained_config(), ["seed=9"]), tmp_path / "other", display=PlainDisplay(1e9))
    told = ray_round("arms", trained_run, tmp_path / "other")
    assert told["shares"] == pytest.approx([0.05, 0.95], abs=0.02)
    assert (told["left"], told["still"]) == (1, True)
