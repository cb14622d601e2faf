"""Looking at an adapter: how large its edits are, what they write, how two adapters compare, what the strength does.

`inspect_adapter` does all of it for an adapter's directory. The functions behind it take a loaded model and return
plain data: `record_edits` first, then what is computed from its record. `pyreft.inspect.plots` draws the data.
"""

from .compare import Comparison, PlaceComparison, compare_edits
from .directions import Direction, WrittenDirections, singular_directions, written_directions
from .examples import read_rows, text_rows
from .recorded import Place, PlaceEdits, RecordedEdits, place_names, record_edits
from .report import Inspection, inspect_adapter
from .sizes import EditSizes, edit_sizes, mean_edit_sizes
from .strength import STRENGTHS, StrengthAnswers, StrengthCurve, answers_by_strength, loss_by_strength

__all__ = [
    "STRENGTHS",
    "Comparison",
    "Direction",
    "EditSizes",
    "Inspection",
    "Place",
    "PlaceComparison",
    "PlaceEdits",
    "RecordedEdits",
    "StrengthAnswers",
    "StrengthCurve",
    "WrittenDirections",
    "answers_by_strength",
    "compare_edits",
    "edit_sizes",
    "inspect_adapter",
    "loss_by_strength",
    "mean_edit_sizes",
    "place_names",
    "read_rows",
    "record_edits",
    "singular_directions",
    "text_rows",
    "written_directions",
]
