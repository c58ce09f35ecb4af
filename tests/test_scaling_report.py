"""What a study says: the law and its bends in sentences, a page in a browser, and bad input in words."""

import json
import re

import pytest
from quiet_page import lowest_label, quiet_page
from scaling_studies import LAW, law_with_noise, write_study

from smalti.cli import main as smalti_main
from smalti.errors import UserError
from smalti.run_folder import read_rows
from smalti.scaling.analysis import analyse, read_results, to_json
from smalti.scaling.bends import bends
from smalti.scaling.report import findings, write_report
from smalti.scaling.spec import bundled_specs

DIGITS = bundled_specs()["digits"]
SMALLEST = 1e12


def main(arguments):
    """The command's exit code."""
    with pytest.raises(SystemExit) as ended:
        smalti_main(arguments)
    return ended.value.code or 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of the digits whose losses are those of a known law."""
    folder = tmp_path_factory.mktemp("studies") / "digits"
    write_study(folder, DIGITS, SMALLEST, law_with_noise())
    return folder


@pytest.fixture(scope="module")
def analysis(study):
    return analyse(read_results(study))


def test_the_law_of_a_study_is_found(analysis):
    said = to_json(analysis)
    for name, true in (("alpha", LAW.alpha), ("beta", LAW.beta), ("e", LAW.e)):
        assert said["intervals"][name]["low"] <= true <= said["intervals"][name]["high"]
    assert analysis.held_out.inside
    assert said["held_out"]["inside"]
    assert said["scatter"] == pytest.approx(0.004, rel=0.5)
    assert len(analysis.rows) + 1 == len(read_rows_of(analysis))
    assert findings(analysis)[0].endswith(
        f"{analysis.held_out.predicted.low:.4f} to {analysis.held_out.predicted.high:.4f}."
    )
    assert "inside" in findings(analysis)[0]


def read_rows_of(analysis):
    return [*analysis.rows, analysis.held_out]


def test_a_held_out_run_beside_the_law_is_said_plainly(tmp_path):
    write_study(tmp_path, DIGITS, SMALLEST, law_with_noise(held_out=1.08))
    analysis = analyse(read_results(tmp_path))
    assert not analysis.held_out.inside
    assert "OUTSIDE" in findings(analysis)[0]
    said = bends(analysis)
    assert re.search(r"\d\.\d % above the law's .* outside its predicted interval", said[0])
    assert any("bend up from the law" in line for line in said)


def test_repeated_data_and_its_cost_are_said(study, tmp_path):
    assert any("It does not cost yet" in line for line in bends(analyse(read_results(study)), 100))
    rows = [
        {**row, "training_rows_loss": 0.9 * row["loss"]} if row["kind"] == "train" else row
        for row in read_rows(study / "results.jsonl")
    ]
    said = " ".join(bends(analyse(rows), 9000))
    assert "sees each of 9,000 pictures" in said
    assert "11.1 % higher on held-out pictures" in said
    assert not any("Data repeats" in line for line in bends(analyse(rows), 10**9))


def test_a_slice_whose_minimum_is_at_its_edge_is_named_with_the_size_to_add(tmp_path, capsys):
    def loss(cell):
        return law_with_noise()(cell) * (cell.size.parameters / 1e5) ** (-0.5 if cell.slice_number == 3 else 0)

    write_study(tmp_path, DIGITS, SMALLEST, loss)
    assert main(["scaling", "fit", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    named = f"slice {DIGITS.budgets(SMALLEST)[3]:.3g} FLOPs: its lowest loss is at its largest size N="
    assert re.search(re.escape(named) + r".*: add a size of about N=\d", out)


def test_failed_runs_are_shown_and_not_fitted(tmp_path):
    def loss(cell):
        return None if cell.size.width == 48 else law_with_noise()(cell)

    write_study(tmp_path, DIGITS, SMALLEST, loss)
    analysis = analyse(read_results(tmp_path))
    assert analysis.unfinished
    assert all(row["width"] != 48 for row in analysis.rows)
    assert "diverged" in write_report(tmp_path).read_text()


TABLE = "parameters,images,loss,flops\n" + "\n".join(
    f"{n},{d},{float(LAW.loss(n, d))},{600 * n * d}" for n in (1e5, 3e5, 1e6) for d in (1e4, 5e4, 2e5)
)


def changed(row, column, value):
    lines = TABLE.split("\n")
    cells = lines[row].split(",")
    cells[column] = value
    lines[row] = ",".join(cells)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n".join(TABLE.split("\n")[:5]), "4 runs are too few for a law of 5 constants: give 6 or more"),
        (changed(2, 2, "-0.3"), r"run 1 of 9 .*loss=-0\.3 must be finite and above 0"),
        (changed(2, 2, "nan"), r"run 1 of 9 .*loss=nan must be finite"),
        (changed(2, 2, "low"), "run 2: loss='low' must be a number"),
        (TABLE.replace("images", "pictures"), "no column 'images'"),
        ("", "0 runs are too few"),
        (
            "parameters,images,loss,flops\n" + "\n".join(f"{n}e5,{60 / n},0.{n}0,6e6" for n in (1, 2, 3, 4, 5, 6)),
            r"all 6 runs cost about 6e\+06 FLOPs: a law needs several budgets",
        ),
    ],
)
def test_tables_that_no_law_can_be_fitted_to(tmp_path, capsys, text, words):
    table = tmp_path / "mine.csv"
    table.write_text(text)
    assert main(["scaling", "fit", str(table)]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") <= 2
    assert not (tmp_path / "mine.fit.json").exists()


def test_a_table_of_ones_own_is_fitted_and_predicted_from(tmp_path, capsys):
    table = tmp_path / "mine.csv"
    table.write_text(TABLE)
    assert main(["scaling", "fit", str(table)]) == 0
    constants = json.loads((tmp_path / "mine.fit.json").read_text())["law"]
    assert constants["alpha"] == pytest.approx(LAW.alpha, rel=1e-3)
    capsys.readouterr()
    assert main(["scaling", "predict", str(table), "--flops", "1e15", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"]["low"] <= found["n"]["value"] <= found["n"]["high"]
    assert main(["scaling", "predict", str(table), "--flops", "1e30"]) == 0
    assert "times the largest measured budget: the intervals hold only if the law does" in capsys.readouterr().err
    assert main(["scaling", "predict", str(table), "--gpu-hours", "2", "--gpu", "h100"]) == 0
    assert main(["scaling", "predict", str(table), "--money", "5", "--gpu", "h100", "--price-per-hour", "2.5"]) == 0
    two_hours, five_dollars = capsys.readouterr().out.split("budget: ")[1:]
    assert two_hours == five_dollars


def test_without_budgets_the_runs_that_no_cheaper_one_beats_tell_what_compute_buys(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text(TABLE)
    best = analyse(read_results(table)).best_rows
    rows = read_results(table)
    for row in rows:
        beaten = any(other["flops"] <= row["flops"] and other["loss"] < row["loss"] for other in rows)
        assert beaten == (row["key"] not in {one["key"] for one in best})
    assert 3 <= len(best) < len(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "{study}"], "give one budget: --flops, --gpu-hours or --money"),
        (["predict", "{study}", "--flops", "1e15", "--money", "3"], "give one budget"),
        (["predict", "{study}", "--gpu-hours", "3"], "give --gpu"),
        (["predict", "{study}", "--flops", "-1"], "must be finite and above 0"),
        (["predict", "{study}", "--gpu-hours", "3", "--gpu", "h10"], "h100"),
        (["fit", "{tmp}"], "holds no results"),
        (["fit", "{tmp}/none.csv"], "does not exist"),
        (["report", "{tmp}"], "holds no scaling study"),
        (["run", "digits", "--budget", "soon"], "must be a time such as 60min"),
        (["run", "digit"], "did you mean"),
        (["run", "digits", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["run", "digits", "--give-up", "1"], "--give-up 1 must be above 1"),
        (["run", "digits", "--budget", "1e6"], "--budget is too small"),
        (["run", "digits", "--set", "widht=3"], "widht"),
    ],
)
def test_commands_that_cannot_be_done_are_told_in_a_line(study, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [a.format(study=study, tmp=tmp_path) for a in arguments]
    assert main(["scaling", *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_study_of_slices_without_scores_has_a_report(tmp_path):
    from dataclasses import replace

    write_study(tmp_path, replace(DIGITS, samples=0), SMALLEST, law_with_noise())
    page = write_report(tmp_path).read_text()
    assert "Curves of compute" in page
    assert "Frechet distance falls" not in page


@pytest.fixture(scope="module")
def report(study):
    return write_report(study)


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(browser, study, report, width, scheme):
    with quiet_page(browser, report, width, scheme) as page:
        assert page.inner_text("section.conclusion").startswith("Over 1")
        pictures = page.eval_on_selector_all(
            "figure", "all => all.map(f => [f.getAttribute('aria-label'), f.offsetWidth])"
        )
        assert len(pictures) == 5
        assert all(label and 200 < wide <= width for label, wide in pictures)
        assert lowest_label(page) >= 8  # pixels: labels can be read
        runs = len([row for row in read_rows(study / "results.jsonl") if row["kind"] == "train"])
        assert len(page.query_selector_all("table.costs tbody tr")) == runs
    assert len(list((study / "pictures").glob("*.png"))) == 5


def test_a_folder_of_something_else_is_no_study(tmp_path):
    (tmp_path / "results.txt").write_text("hello")
    with pytest.raises(UserError, match="must be a study's folder"):
        read_results(tmp_path / "results.txt")
