"""An earlier name of `pyreft.jobs.job` and `pyreft.jobs.settings`."""

from ..jobs.job import PreparedJob
from ..jobs.prepare import prepare
from ..jobs.settings import TrainingJob

__all__ = ["PreparedJob", "TrainingJob", "prepare"]
