"""How a training step runs the network: precision of the products, and compiled blocks."""

from dataclasses import replace

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from smalti.config import Budget, LoopConfig
from smalti.models import DiTConfig, build_model
from smalti.recipes import recipe
from smalti.training.forward import (
    compile_blocks,
    missing_for_compilation,
    multiplies_bfloat16,
    product_precision,
    repays_compilation,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.bfloat16 if multiplies_bfloat16(CPU) else torch.float32),
    ],
)
def test_precision_is_that_of_the_products_alone(precision, dtype):
    model = build_model(DiTConfig(depth=1, width=32))
    seen = {}
    model.blocks[0].mlp.fc1.register_forward_hook(lambda layer, inputs, output: seen.update(product=output.dtype))
    model.blocks[0].register_forward_hook(lambda block, inputs, output: seen.update(residual=output.dtype))
    with product_precision(LoopConfig(precision=precision), CPU):
        loss = model(torch.randn(2, 1, 28, 28), torch.rand(2), model.null_condition(2)).float().square().mean()
    loss.backward()
    assert seen == {"product": dtype, "residual": torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_products_give_nearly_the_same_loss():
    """bfloat16 keeps 8 bits: outputs differ by well below a hundredth, and by more than float32's rounding."""
    model = build_model(DiTConfig(depth=2, width=32, qk_norm=True, positions="rope", activation="swiglu"))
    with torch.no_grad():
        model.modulation.weight.normal_(std=0.1)
        model.output.weight.normal_(std=0.1)
    x, t, cond = torch.randn(4, 1, 28, 28), 1000 * torch.rand(4), model.null_condition(4)
    exact = model(x, t, cond)
    with product_precision(LoopConfig(precision="bfloat16"), CPU):
        rounded = model(x, t, cond).float()
    difference = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < difference < 0.02


def test_compiled_blocks_share_one_graph(monkeypatch):
    """The blocks are compiled one by one, and the second finds the first one's code."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    model = build_model(DiTConfig(depth=3, width=32))
    compile_blocks(model)
    assert compiled == list(model.blocks)
    compiled.clear()
    compile_blocks(model.output)
    assert compiled == [model.output]


def test_short_runs_are_not_compiled():
    assert recipe("mnist").loop.compile
    assert not repays_compilation(Budget("minutes", 0.5))
    assert repays_compilation(Budget("minutes", 3.0))
    assert not repays_compilation(Budget("steps", 12))
    assert repays_compilation(replace(recipe("mnist").budget, unit="steps", amount=5000))


def test_what_compilation_needs_is_looked_for_beforehand(monkeypatch, tmp_path):
    """A machine without headers or compiler trains as it is instead of failing in the first step."""
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert missing_for_compilation(CPU) == "Python.h"
    (tmp_path / "Python.h").touch()
    assert missing_for_compilation(CPU) is None

    def none_found():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_found)
    assert missing_for_compilation(CPU) == "C++ compiler"
