"""From the settings of a job to the job, checked and loaded: of a classifier or of a model that generates."""

from ..tasks.glue import find_task, read
from ..tasks.suites import GLUE, check_suite
from .classify import PreparedClassifier
from .job import PreparedJob
from .output import check_output
from .settings import TrainingJob, check_settings


def prepare(job: TrainingJob) -> PreparedJob:
    """Check a job and load all that it needs; a task of GLUE learns to classify, all else to generate.

    Raises:
        ReftError: whatever would stop it, before the training starts.
    """
    if job.suite is not None:
        check_suite(job.suite, "train")
    if job.suite != GLUE:
        return PreparedJob(job)
    return PreparedClassifier(job)


def check_files(job: TrainingJob) -> None:
    """Check what needs no model: the settings, the output, and of a task of GLUE the data.

    Raises:
        ReftError: what is wrong.
    """
    check_settings(job)
    check_output(job)
    if job.suite == GLUE and job.task:
        for split in ("train", "validation"):
            read(find_task(job.task), split, job.data_dir)
