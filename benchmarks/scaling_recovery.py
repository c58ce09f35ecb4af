"""Does smalti.scaling recover a law that is known? Synthetic losses of a published law, with noise, fitted again.

    python benchmarks/scaling_recovery.py [--scenarios hoffmann-64] [--repetitions 100] [--seconds 80]

Each scenario has its grid: budgets spaced evenly in logarithms, for each of them sizes spaced evenly from 1/span to
span times the best one. Recorded: how often the 95 % intervals hold the true alpha, beta and exponent of N_opt, and how
far N_opt at 100 times the largest budget is off. A repetition that is in --rows is not made again; a call ends after
--seconds and the next goes on. --out has the summary of all that has been made.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from smalti.scaling.isoflop import frontier, minima, slices
from smalti.scaling.law import Law, Runs, fit
from smalti.scaling.prediction import predict
from smalti.scaling.published import BESIROGLU, HOFFMANN, TOKEN_COST

EXTRAPOLATED = 100


@dataclass(frozen=True)
class Scenario:
    law: Law
    lowest: float
    highest: float
    budgets: int
    sizes: int
    span: float
    without: tuple[int, ...] = ()  # cells of the grid that failed
    noise: float = 0.01

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n, d, flops) of its runs."""
        budgets = np.geomspace(self.lowest, self.highest, self.budgets)
        best = [self.law.best(budget, TOKEN_COST)[0] for budget in budgets]
        n = np.concatenate([size * np.geomspace(1 / self.span, self.span, self.sizes) for size in best])
        flops = np.repeat(budgets, self.sizes)
        kept = ~np.isin(np.arange(len(n)), self.without)
        return n[kept], (flops / (6 * n))[kept], flops[kept]


FAILED = (0, 12, 15)
SCENARIOS = {
    "hoffmann-64": Scenario(HOFFMANN, 1e14, 1e18, 8, 8, 16),
    "besiroglu-64": Scenario(BESIROGLU, 1e14, 1e18, 8, 8, 16),
    "hoffmann-64-of-large-runs": Scenario(HOFFMANN, 1e18, 1e21, 8, 8, 16),
    "hoffmann-64-of-near-sizes": Scenario(HOFFMANN, 1e14, 1e18, 8, 8, 4),
    "hoffmann-144": Scenario(HOFFMANN, 1e14, 1e18, 12, 12, 16),
    "hoffmann-36": Scenario(HOFFMANN, 1e14, 1e18, 6, 6, 16),
    "hoffmann-16": Scenario(HOFFMANN, 1e14, 1e18, 4, 4, 16),
    "hoffmann-13": Scenario(HOFFMANN, 1e14, 1e16, 4, 4, 8, FAILED),
    "hoffmann-13-over-30x": Scenario(HOFFMANN, 1e14, 3e15, 4, 4, 4, FAILED),
}


def repetition(scenario: Scenario, index: int) -> dict[str, object]:
    """Whether the intervals hold the truth, and the errors, of one draw of the noise."""
    law, (n, d, flops) = scenario.law, scenario.cells()
    rng = np.random.default_rng([20250, index])
    loss = law.loss(n, d) * np.exp(scenario.noise * rng.standard_normal(len(n)))
    runs = Runs(n, d, loss, flops)
    fitted = fit(runs, seed=index)
    budget = EXTRAPOLATED * scenario.highest
    true_n, _ = law.best(budget, TOKEN_COST)
    predicted = predict(fitted, budget)
    new_n, new_d = law.best(10 * scenario.highest, TOKEN_COST)
    new_loss = float(law.loss(new_n, new_d) * np.exp(scenario.noise * rng.standard_normal()))
    slopes = frontier(minima(slices(runs, list(flops)), seed=index)).n
    alpha, beta = fitted.interval(lambda one: one.alpha), fitted.interval(lambda one: one.beta)
    power = fitted.interval(lambda one: one.n_exponent(TOKEN_COST))
    return {
        "covered": {
            "alpha": law.alpha in alpha,
            "beta": law.beta in beta,
            "n_exponent": law.n_exponent(TOKEN_COST) in power,
            "n_at_100x": true_n in predicted.n,
            "loss_of_a_new_run_at_10x": new_loss in fitted.predict_loss(new_n, new_d),
            "n_exponent_by_parabolas": law.n_exponent(TOKEN_COST) in slopes.power(),
            "n_at_100x_by_parabolas": true_n in slopes.at(budget),
        },
        "widths": {"alpha": alpha.high - alpha.low, "beta": beta.high - beta.low, "n_exponent": power.high - power.low},
        "n_at_100x_error": predicted.n.value / true_n - 1,
        "n_at_100x_error_by_parabolas": slopes.at(budget).value / true_n - 1,
    }


def errors_summary(errors: list[float]) -> dict[str, float]:
    size = np.abs(errors)
    return {
        "median": float(np.median(size)),
        "worst": float(size.max()),
        "share_within_10_percent": float((size <= 0.1).mean()),
    }


def summary(scenario: Scenario, made: list[dict[str, object]]) -> dict[str, object]:
    def column(table: str) -> dict[str, list[float]]:
        return {key: [row[table][key] for row in made] for key in made[0][table]}

    return {
        "settings": {**asdict(scenario), "runs": len(scenario.cells()[0])},
        "repetitions": len(made),
        "held_by_95_percent_intervals": {key: int(sum(hits)) for key, hits in column("covered").items()},
        "median_width": {key: float(np.median(widths)) for key, widths in column("widths").items()},
        "n_at_100x_error": errors_summary([row["n_at_100x_error"] for row in made]),
        "n_at_100x_error_by_parabolas": errors_summary([row["n_at_100x_error_by_parabolas"] for row in made]),
    }


def main(
    scenarios: tuple[str, ...] = tuple(SCENARIOS),
    repetitions: int = 100,
    seconds: float = 80.0,
    rows: Path = Path("scaling_recovery_rows.jsonl"),
    out: Path = Path(__file__).parent / "results" / "scaling_recovery.json",
) -> None:
    """Make the repetitions that are missing and write the summary."""
    started = time.monotonic()
    made = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    there = {(row["scenario"], row["repetition"]) for row in made}
    missing = [(name, i) for name in scenarios for i in range(repetitions) if (name, i) not in there]
    with rows.open("a") as file:
        for name, i in missing:
            if time.monotonic() - started > seconds:
                break
            made.append({"scenario": name, "repetition": i, **repetition(SCENARIOS[name], i)})
            file.write(json.dumps(made[-1]) + "\n")
    summaries = {
        name: summary(SCENARIOS[name], of) for name in SCENARIOS if (of := [r for r in made if r["scenario"] == name])
    }
    out.write_text(json.dumps(summaries, indent=2) + "\n")
    left = len(missing) - (len(made) - len(there))
    print(f"{len(made)} repetitions made, {left} left")


if __name__ == "__main__":
    tyro.cli(main)
