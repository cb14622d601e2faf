"""A few answers of a job's model, as it was and as it is: to examples that it was not trained on, if there are any."""

from dataclasses import dataclass

from ..generation import answer_ids
from ..positions import IGNORED
from .job import PreparedJob

_TOKENS = 48  # of an answer


@dataclass(frozen=True)
class Sample:
    """A prompt with the base model's answer, the adapted model's, and the one in the data."""

    prompt: str
    before: str
    after: str
    expected: str


def samples(job: PreparedJob, most: int = 3) -> list[Sample]:
    """Return answers before and after the training of a job that is done; none for one of a suite."""
    if job.job.suite:
        return []
    examples, rows = (job.validation_examples, job.validation) if job.validation else (job.examples, job.rows)
    asked = [number for number, row in enumerate(rows) if row["labels"][0] == IGNORED]  # those with a prompt
    step = max((len(asked) - 1) / max(most - 1, 1), 1)
    chosen = [asked[at] for at in (round(n * step) for n in range(most)) if at < len(asked)]
    if not chosen:
        return []
    prompts = [rows[n]["input_ids"][: rows[n]["labels"].count(IGNORED)] for n in chosen]

    def ask() -> list[str]:
        found = answer_ids(job.model, job.tokenizer, prompts, max_new_tokens=_TOKENS)
        return [job.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in found]

    after = ask()
    with job.model.disable_adapter():
        before = ask()
    return [
        Sample(examples[n].messages[-2]["content"], old, new, examples[n].completion.strip())
        for n, old, new in zip(chosen, before, after, strict=True)
    ]
