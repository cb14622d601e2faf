"""The paper's figures (arXiv 2404.03592, tables 1 to 4 and 13 to 15), in percent, for a row to be compared with.

The rows of FT, LoRA and the other methods are from the works that the paper cites; it did not run them again.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
# from the name of a base model to the paper's; the first that fits
_MODELS = (
    (r"llama-?2.*\b7b", "Llama-2 7B"),
    (r"llama-?3(?!\.).*\b8b", "Llama-3 8B"),
    (r"llama-?(1-)?7b", "LLaMA-7B"),
    (r"llama-?(1-)?13b", "LLaMA-13B"),
    (r"^roberta-base$", "RoBERTa base"),
    (r"^roberta-large$", "RoBERTa large"),
)


@dataclass(frozen=True)
class PaperRow:
    """One row of a table: the scores by task, the share of parameters and the average, all in percent."""

    model: str
    method: str
    params: float
    scores: dict[str, float]
    average: float


def paper_rows(suite: str) -> list[PaperRow]:
    """Every row of a suite's table."""
    with open(_HERE / f"{suite}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tasks = [name for name in rows[0] if name not in ("model", "method", "params", "average")]
    return [
        PaperRow(
            row["model"],
            row["method"],
            float(row["params"]),
            {task: float(row[task]) for task in tasks},
            float(row["average"]),
        )
        for row in rows
    ]


def paper_row(suite: str, model: str, method: str | None) -> PaperRow | None:
    """The row to compare with: of this base model if the paper has it, else of the first one that has the method.

    Args:
        model: the name or directory of the base model.
        method: `LoReFT`, `DiReFT` or `LoRA`; of another method there is no row.
    """
    rows = [row for row in paper_rows(suite) if row.method == method]
    base = Path(model.rstrip("/")).name.lower()
    name = next((title for pattern, title in _MODELS if re.search(pattern, base)), None)
    return next((row for row in rows if row.model == name), rows[0] if rows else None)
