"""Small comparisons for tests: contenders of seconds, a plan that is given, and constructed results."""

import json

from smalti.comparison.budget import training_flops
from smalti.comparison.spec import ComparisonSpec, Contender
from smalti.evaluation.cards import Extractor, Reference, card_to_json, make_card
from smalti.evaluation.intervals import Estimate

SMALL = ("model.width=32", "depth=1", "num_heads=2", "batch_size=8", "warmup_steps=2", "log_every=1")


def small_spec(**changes) -> ComparisonSpec:
    """Two small DiTs at 2 and 3 calls of 100 pictures."""
    contenders = (Contender("narrow", set=SMALL), Contender("wide", set=(*SMALL, "model.width=64")))
    values = {"name": "small", "question": "Which of <two> & why?", "contenders": contenders, "calls": (2, 3)}
    return ComparisonSpec(**{**values, "num_samples": 100, **changes})


def given_plan(spec, out, steps=16, minutes=1.0) -> None:
    """Leave a folder as a process leaves it that was killed when it had planned `steps` steps for each."""
    names = [contender.name for contender in spec.contenders]
    speeds = [
        {
            "kind": "speed", "name": name, "step_seconds": 0.01, "call_seconds": 1e-4,
            "step_flops": training_flops(config), "run_seconds": 0.5, "spent": 1.0,
        }
        for name, config in spec.configs().items()
    ]  # fmt: skip
    rows = [
        {"kind": "start", "spec": spec.to_json(), "spent": 0.0},
        {"kind": "scoring", "seconds": 0.1, "spent": 0.1},
        *speeds,
        {
            "kind": "plan", "of_minutes": minutes, "samples": spec.num_samples, "steps": dict.fromkeys(names, steps),
            "minutes": None, "spent": 0.0,
        },
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cards(figures, count, judge="judge"):
    """The cards of figures, as comparison.json has them."""
    reference, extractor = Reference("held-out digits", 1000, "0"), Extractor(judge, judge)
    return [card_to_json(make_card(m, Estimate(**v), count, reference, extractor)) for m, v in figures.items()]


def figures(accuracy, fd, half=(0.01, 1.0)):
    """Figures with symmetric intervals, as comparison.json has them."""
    values = {"accuracy": (accuracy, half[0]), "fd": (fd, half[1]), "kid": (fd / 100, half[1] / 100)}
    return {name: {"value": v, "low": v - h, "high": v + h} for name, (v, h) in values.items()}
