"""The benchmark of training speed runs whole on a CPU, at a size of seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import train_throughput


def run_here(factories, rounds, threads):
    """In place of a process for each candidate: two steps of it, and made-up times."""
    results = {}
    for name, make in factories.items():
        step = make()
        step()
        step()
        results[name] = {"median": 0.5, "fastest": 0.25, "peak_memory_mib": 1.0}
    return results


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_rows_of_the_benchmark(monkeypatch, tmp_path, one_at_a_time):
    monkeypatch.setattr(train_throughput, "interleaved", run_here)
    monkeypatch.setattr(train_throughput, "matmul_peak", lambda device, dtype, seconds: 1e12)
    monkeypatch.setattr(train_throughput, "_PRODUCTS", 2)
    out = tmp_path / "results" / "rows.jsonl"
    train_throughput.main(
        cases=("smallest",), batch_size=4, rounds=1, compile=False, one_at_a_time=one_at_a_time, out=out
    )
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["batch_size"], row["device"]) == ("smallest", 4, "cpu")
    assert {"diffusers, float32", "reference, float32", "smalti, float32"} <= set(row["results"])
    # Two products of 1024 in half a second; the single product of 1000 is faster than the fastest round's.
    assert row["products_gflops"]["float32"] == 9
    assert row["products_gflops_fastest"]["float32"] == 1000
    for name, result in row["results"].items():
        assert (result["images_per_second"], result["images_per_second_fastest"]) == (8.0, 16.0)
        assert (result["against_reference"], result["peak_memory_mib"]) == (1.0, 1)
        assert f"mfu_of_{name.split(', ')[1]}" in result


def test_the_straightforward_dit_has_smaltis_blocks(monkeypatch):
    """The blocks of the straightforward DiT and of smalti's hold as many weights."""
    counts, models = {}, []
    adamw = torch.optim.AdamW

    def recorded(parameters, **options):
        optimizer = adamw(parameters, **options)
        models.append([p for group in optimizer.param_groups for p in group["params"] if p.requires_grad])
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", recorded)
    setting = train_throughput.Setting("digits", 4, "cpu", "float32", keep_memory=False)
    for name, (_, make) in train_throughput.candidates(setting, compile=False).items():
        make()
        counts[name] = sum(p.numel() for p in models[-1] if 512 in p.shape or 384 in p.shape)
    assert counts["reference, float32"] == counts["smalti, float32"] > 0


@pytest.mark.parametrize("factory", ["diffusers_step", "reference_step", "smalti_step"])
def test_candidates_multiply_in_the_precision_asked_for(factory):
    """bfloat16, as on a GPU: the products are, and a step still changes float32 weights."""
    setting = train_throughput.Setting("smallest", 2, "cpu", "bfloat16", keep_memory=False)
    arguments = {"diffusers_step": (), "reference_step": (False,), "smalti_step": ("no",)}[factory]
    step = getattr(train_throughput, factory)(setting, *arguments)
    seen = set()
    with _Recorder(seen):
        step()
    assert seen == {torch.bfloat16}


class _Recorder(torch.overrides.TorchFunctionMode):
    """Keeps the types of what F.linear returns."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            self.seen.add(result.dtype)
        return result
