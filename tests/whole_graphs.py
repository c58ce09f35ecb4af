"""In a process without run-time shape checks: every network of the forward benchmark is one graph for torch.compile."""

import sys
from pathlib import Path

import torch

import smalti

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from forward_cases import CASES, randomised

for name, case in CASES.items():
    network, (x, t, cond) = smalti.load_backbone(randomised(case.reference())), case.inputs(1)
    with torch.inference_mode():
        expected = network(x, t, cond)
        # The graph as traced, run by PyTorch itself: what breaks it breaks it for every back end.
        output = torch.compile(network, fullgraph=True, backend="eager")(x, t, cond)
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    sys.stdout.write(f"{name}\n")
