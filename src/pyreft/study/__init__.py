"""Small adapters of the embedded model side by side: which method, rank, layers and tokens reach what at what cost.

The command `pyreft study` runs it; `run_study` does without the command. It knows the embedded model alone: other
models and tasks may rank otherwise.
"""

from .comparing import compare_rules, frontier, means, score_at
from .running import check_output, run_study
from .settings import FULL, QUICK, RULES, Plan, Setting
from .tasks import TASKS, Task, load_task, read_tasks

__all__ = [
    "FULL",
    "QUICK",
    "RULES",
    "TASKS",
    "Plan",
    "Setting",
    "Task",
    "check_output",
    "compare_rules",
    "frontier",
    "load_task",
    "means",
    "read_tasks",
    "run_study",
    "score_at",
]
