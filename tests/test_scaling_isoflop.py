"""IsoFLOP parabolas: their minima, the power laws through them, and slices that have none."""

import numpy as np
import pytest

from smalti.errors import UserError
from smalti.scaling.isoflop import checked, frontier, minima, slices
from smalti.scaling.law import Runs

BUDGETS = np.array([1e12, 1e13, 1e14])


def parabolic(shifts=(0.0, 0.0, 0.0), sizes=5, noise=0.0, seed=0):
    """Runs whose ln loss is a parabola in ln N of minimum N = 0.1 C^0.5, their sizes shifted from it in ln N."""
    u = np.linspace(-1.5, 1.5, sizes)
    log_best = np.log(0.1 * BUDGETS**0.5)
    log_n = np.concatenate([best + shift + u for best, shift in zip(log_best, shifts, strict=True)])
    flops = np.repeat(BUDGETS, sizes)
    bowl = 0.05 * (log_n - np.repeat(log_best, sizes)) ** 2 - 0.05 * np.log(flops)
    n, draws = np.exp(log_n), np.random.default_rng(seed).standard_normal(len(flops))
    return Runs(n, flops / (6 * n), 10 * np.exp(bowl + noise * draws), flops), flops


def test_exact_minima_and_their_power_laws():
    runs, flops = parabolic(shifts=(0.3, -0.2, 0.1))
    found = checked(minima(slices(runs, flops)))
    for minimum, budget in zip(found, BUDGETS, strict=True):
        assert minimum.n.value == pytest.approx(0.1 * budget**0.5)
        assert minimum.d.value == pytest.approx(budget**0.5 / 0.6)
        assert minimum.loss.value == pytest.approx(10 * budget**-0.05)
    law = frontier(found)
    assert law.n.law.power == pytest.approx(0.5)
    assert law.n.law.factor == pytest.approx(0.1)
    assert law.d.law.power == pytest.approx(0.5)
    assert law.n.at(1e16).value == pytest.approx(1e7)


@pytest.mark.parametrize("sizes", [4, 6])
def test_intervals_hold_the_truth_as_often_as_they_say(sizes):
    held = dict.fromkeys(("n", "loss", "power", "far"), 0)
    for seed in range(60):
        runs, flops = parabolic(sizes=sizes, noise=0.01, seed=seed)
        found = checked(minima(slices(runs, flops), seed=seed))
        law = frontier(found)
        held["n"] += 1e6 in found[2].n
        held["loss"] += 10 * 1e14**-0.05 in found[2].loss
        held["power"] += 0.5 in law.n.power()
        held["far"] += 1e7 in law.n.at(1e16)
    assert min(held.values()) >= 52, held  # less has a probability of 0.4 % at 95 %


@pytest.mark.parametrize(
    ("shift", "edge", "below"), [(2.0, "smallest", True), (-2.0, "largest", False)], ids=["too large", "too small"]
)
def test_a_minimum_at_the_edge_names_the_size_to_add(shift, edge, below):
    runs, flops = parabolic(shifts=(0.0, shift, 0.0))
    found = minima(slices(runs, flops))
    assert [minimum.problem is None for minimum in found] == [True, False, True]
    assert found[1].problem.startswith(f"slice 1e+13 FLOPs: its lowest loss is at its {edge} size N=")
    assert f"add a size of about N={found[1].add_n:.2g}" in found[1].problem
    best = 0.1 * 1e13**0.5
    assert (found[1].add_n < best) if below else (found[1].add_n > best)
    assert 1 / 16 <= found[1].add_n / (found[1].slice.n[0] if below else found[1].slice.n[-1]) <= 16
    with pytest.raises(UserError, match=r"slice 1e\+13 FLOPs: its lowest loss"):
        checked(found)
    assert frontier(found).n.law.power == pytest.approx(0.5)  # through the other two


def test_the_added_size_gives_the_slice_its_minimum():
    runs, flops = parabolic(shifts=(0.0, 2.0, 0.0))
    n = minima(slices(runs, flops))[1].add_n
    log_best = np.log(0.1 * 1e13**0.5)
    loss = 10 * np.exp(0.05 * (np.log(n) - log_best) ** 2 - 0.05 * np.log(1e13))
    added = [(runs.n, n), (runs.d, 1e13 / 6 / n), (runs.loss, loss), (runs.flops, 1e13)]
    more = Runs(*(np.append(values, value) for values, value in added))
    assert minima(slices(more, np.append(flops, 1e13)))[1].n.value == pytest.approx(np.exp(log_best))


def test_a_slice_that_bends_the_wrong_way_or_has_two_sizes():
    runs, flops = parabolic()
    loss = runs.loss.copy()
    loss[5:10] = [5.0, 6.0, 4.9, 6.0, 5.0]
    found = minima(slices(Runs(runs.n, runs.d, loss, runs.flops), flops))
    assert "do not rise to both sides" in str(found[1].problem)
    kept = np.arange(15) > 2
    few = Runs(runs.n[kept], runs.d[kept], runs.loss[kept], runs.flops[kept])
    found = minima(slices(few, flops[kept]))
    assert "slice 1e+12 FLOPs: 2 sizes; a parabola needs 3" in str(found[0].problem)


def test_three_sizes_a_slice_need_the_noise_from_elsewhere():
    runs, flops = parabolic(sizes=3, noise=0.001)
    with pytest.raises(UserError, match="nothing tells the runs' noise"):
        minima(slices(runs, flops))
    narrow, wide = (minima(slices(runs, flops), noise=noise)[0].n for noise in (1e-4, 1e-3))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_other_bad_input():
    runs, flops = parabolic()
    with pytest.raises(UserError, match="14 budgets for 15 runs"):
        slices(runs, flops[1:])
    bad, flops = parabolic(shifts=(2.0, 2.0, 0.0))
    with pytest.raises(UserError, match=r"1 of 3 slices have a minimum.*smallest size"):
        frontier(minima(slices(bad, flops)))


def test_the_order_of_runs_does_not_matter():
    runs, flops = parabolic(noise=0.01)
    order = np.random.default_rng(0).permutation(15)
    shuffled = Runs(runs.n[order], runs.d[order], runs.loss[order], runs.flops[order])
    one, other = minima(slices(runs, flops)), minima(slices(shuffled, flops[order]))
    assert [minimum.n for minimum in one] == [minimum.n for minimum in other]
