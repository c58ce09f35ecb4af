"""A comparison's folder, and the journal of what is done in it.

OUT/rows.jsonl        what was measured, as it came: the start, speeds, the plan, trainings, scores
OUT/runs/NAME         each contender's run directory
OUT/tokenizers/NAME   the tokenizer of each contender that predicts learned tokens
OUT/comparison.json   everything in one file, from which the report is written
OUT/report.html       the report
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.run_folder import append_row


@dataclass(frozen=True)
class ComparisonFolder:
    """The folder at a path, and where things are in it."""

    path: Path

    @property
    def rows(self) -> Path:
        """The journal's rows."""
        return self.path / "rows.jsonl"

    @property
    def runs(self) -> Path:
        """Run directories by contender."""
        return self.path / "runs"

    @property
    def tokenizers(self) -> Path:
        """Tokenizers by contender."""
        return self.path / "tokenizers"

    @property
    def comparison(self) -> Path:
        """The figures."""
        return self.path / "comparison.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def clear(self) -> None:
        """Remove all of these."""
        for path in (self.rows, self.runs, self.tokenizers, self.comparison, self.report):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass
class Journal:
    """The rows of a folder, each kept on the disk when it is added."""

    folder: ComparisonFolder
    rows: list[dict[str, Any]]

    def find(self, kind: str, **values: Any) -> dict[str, Any] | None:
        """The row of a kind with these values."""
        wanted = {"kind": kind, **values}
        return next((row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())), None)

    def add(self, kind: str, spent: float, **values: Any) -> dict[str, Any]:
        """spent: seconds that it took, of the budget."""
        row = {"kind": kind, **values, "spent": round(spent, 3)}
        append_row(self.folder.rows, row)
        self.rows.append(row)
        return row

    @property
    def spent(self) -> float:
        """Seconds of the budget that the rows took."""
        return float(sum(row["spent"] for row in self.rows))
