"""Where a law does not hold: said in sentences, each with the numbers that it rests on."""

import math

import numpy as np

from smalti.scaling.analysis import Analysis, scatter

_OVERFITTED = 0.02  # of the loss on training rows, by which the held-out one lies above it
_BENT = 2.0  # standard errors of a curvature
_LOOSE = 3.0  # of an interval's ends, the upper over the lower: the constant is not determined


def bends(analysis: Analysis, training_rows: int | None = None) -> list[str]:
    """Sentences on where the results leave the law; never none, as it says so too where nothing does.

    training_rows: pictures in the data, by which repetitions are counted.
    """
    found = [
        *_held_out(analysis),
        *_curvature(analysis),
        *_of_compute(analysis),
        *_overfitting(analysis, training_rows),
        *_undetermined(analysis),
        *(f"{minimum.problem}." for minimum in analysis.minima if minimum.problem),
        *(f"Not fitted: {why}." for why in analysis.missing.values() if not any(m.problem for m in analysis.minima)),
    ]
    return found or ["Within these budgets nothing bends: residuals show no trend, and no data was seen too often."]


def _percent(value: float) -> str:
    return f"{100 * abs(value):.1f} %"


def _held_out(analysis: Analysis) -> list[str]:
    held = analysis.held_out
    if held is None:
        return []
    off = held.loss / held.predicted.value - 1
    where = "inside" if held.inside else "outside"
    times = held.flops / float(analysis.fitted.runs.flops.max())
    return [
        f"The held-out run, of {times:.1f} times the largest fitted budget, has a loss of {held.loss:.4f}: "
        f"{_percent(off)} {'above' if off > 0 else 'below'} the law's {held.predicted.value:.4f}, {where} its "
        f"predicted interval ({held.predicted.low:.4f} to {held.predicted.high:.4f})."
    ]


def _curvature(analysis: Analysis) -> list[str]:
    """A parabola in ln C through the residuals, the held-out run's among them."""
    x, y = np.log(analysis.fitted.runs.flops), analysis.fitted.residuals
    if analysis.held_out is not None:
        held = analysis.held_out
        x = np.append(x, math.log(held.flops))
        y = np.append(y, math.log(held.loss / held.predicted.value))
    if len(x) < 6:
        return []
    design = np.stack([np.ones_like(x), x - x.mean(), (x - x.mean()) ** 2], axis=1)
    constants, *_ = np.linalg.lstsq(design, y, rcond=None)
    noise = float(((y - design @ constants) ** 2).sum()) / (len(x) - 3)
    error = math.sqrt(noise * float(np.linalg.inv(design.T @ design)[2, 2]))
    if error == 0 or abs(constants[2]) < _BENT * error:
        return []
    return [
        f"Over all budgets the runs bend {'up' if constants[2] > 0 else 'down'} from the law: the curvature of its "
        f"residuals in ln C is {abs(constants[2]) / error:.1f} standard errors from none. "
        + ("The law promises too much beyond them." if constants[2] > 0 else "The law promises too little beyond them.")
    ]


def _of_compute(analysis: Analysis) -> list[str]:
    said = []
    for law, name in ((analysis.loss_of_compute, "loss"), (analysis.fd_of_compute, "Frechet distance")):
        if law is None:
            continue
        power = law.chosen.interval(lambda curve: curve.power)
        if power.low <= 0:
            said.append(
                f"The best {name} of a budget does not follow compute surely: its exponent may be {power.low:.2f} to "
                f"{power.high:.2f}."
            )
        elif law.asymptote_chosen:
            straight, bent = _percent(law.power.cv_error), _percent(law.with_asymptote.cv_error)
            said.append(
                f"The best {name} of a budget is no pure power of compute: it levels off towards "
                f"{law.chosen.curve.asymptote:.3g} (errors at budgets left out {bent}, {straight} without that)."
            )
    return said


def _overfitting(analysis: Analysis, training_rows: int | None) -> list[str]:
    runs = [*analysis.rows, *(row for row in analysis.best_rows if row.get("held_out"))]
    known = [(row, row["loss"] / row["training_rows_loss"] - 1) for row in runs if row.get("training_rows_loss")]
    if not known:
        return []
    most = max((row["images"] for row, _ in known), default=0)
    said = []
    if training_rows is not None and most > training_rows:
        said.append(
            f"Data repeats: the longest run sees each of {training_rows:,} pictures {most / training_rows:.0f} times, "
            "and the law counts repetitions like new pictures."
        )
    row, gap = max(known, key=lambda pair: pair[1])
    if gap > _OVERFITTED:
        said.append(
            f"That has begun to cost: at {row['flops']:.2g} FLOPs the loss of the network of {row['parameters']:,} "
            f"parameters is {_percent(gap)} higher on held-out pictures than on those it was trained on."
        )
    elif said:
        said.append(
            f"It does not cost yet: held-out losses are at most {_percent(max(gap, 0.0))} above those on training "
            "pictures."
        )
    return said


def _undetermined(analysis: Analysis) -> list[str]:
    said = []
    for name, what in (("alpha", "the exponent of N"), ("beta", "the exponent of D")):
        interval = analysis.fitted.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
        if interval.low <= 0 or interval.high / interval.low > _LOOSE:
            said.append(f"{what} ({name})")
    e = analysis.fitted.interval(lambda law: law.e)
    if e.low < 0.1 * e.high:
        said.append("the loss that remains (E)")
    if not said:
        return []
    return [
        f"These runs do not determine {' and '.join(said)}: the interval's ends differ by more than {_LOOSE:g} times. "
        f"What follows from the constants together, such as losses between the budgets, is known better: runs scatter "
        f"about the law by {_percent(scatter(analysis))}."
    ]
