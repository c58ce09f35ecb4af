"""The benchmark of serving runs whole in seconds: every server draws, and the same; nothing is said of speed."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

for module in ("diffusers", "litserve", "fastapi", "psutil"):
    pytest.importorskip(module)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import serving  # noqa: E402


def test_every_server_answers_and_draws_the_same(tmp_path):
    out = tmp_path / "rows.jsonl"
    script = [sys.executable, str(BENCHMARKS / "serving.py"), "--quick", "--out", str(out)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = {row["load"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["saturated", "open-20", "probe"]
    for row in rows.values():
        assert list(row["results"]) == ["one at a time", "batched", "smalti"]
        assert row["largest_difference_of_255"] <= 1
        assert {"cpu", "cores", "torch", "versions", "seconds", "start_seconds"} <= set(row)
    for load in ("saturated", "open-20"):
        for name, result in rows[load]["results"].items():
            assert result["failed"] == 0
            assert result["images_per_second"] >= 0
            assert (result["rows_per_tick"] is not None) == (name == "smalti")
    assert rows["saturated"]["results"]["smalti"]["rows_per_tick"] > 1
    for result in rows["probe"]["results"].values():
        assert result["probes"] >= 1
        assert result["median_ratio"] > 0


def test_each_kind_of_request_comes_equally_often():
    requests = serving.mixed(45, call=0)
    assert set(Counter(requests).values()) == {3}
    assert requests[:15] != requests[15:30]
    assert requests == serving.mixed(45, call=0)
    assert requests != serving.mixed(45, call=1)


def test_arrivals_are_poissons():
    moments = serving.poisson_moments(50.0, 40.0, call=0)
    gaps = [b - a for a, b in pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2)
    assert max(moments) < 40


def test_a_disturbed_measurement_is_made_again():
    shares = iter([0.5, 0.3, 0.0, 0.0])
    assert serving.undisturbed(lambda: serving.Probed([], [], next(shares)), tries=2).other_cores == 0.3
    assert serving.undisturbed(lambda: serving.Probed([], [], next(shares)), tries=2).other_cores == 0.0
    assert list(shares) == [0.0]


def test_an_unknown_load_is_refused():
    assert serving.load_kind("open-2.5").rate == 2.5
    assert serving.load_kind("closed-3").outstanding == 3
    with pytest.raises(ValueError, match="closed-N"):
        serving.load_kind("heavy")
