"""torch.compile sees each network whole."""

import subprocess
import sys
from pathlib import Path


def test_every_network_is_one_graph():
    script = Path(__file__).parent / "whole_graphs.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.split()) >= 10
