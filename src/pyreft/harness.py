"""lm-eval's harness on adapted models: the model `reft`, and tasks run on an adapter.

lm-eval scores a continuation by a forward over context and continuation without labels, so the model cannot see where
the prompt ends. `ReftLM` hands it over: `l1` is the last token of the context, as it is in training. The package
`lm-eval` comes with `pyreft[eval]`; what a task asks, and how its answers are judged, is lm-eval's alone.

    python -m pyreft.harness run --model reft --model_args adapter=DIRECTORY --tasks arc_easy
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import ReftError
from .tuner.adapted import edits_of

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ReftError(f"harness: lm-eval is not installed ({error}); install pyreft[eval].") from None

Request = tuple[Any, list[int], list[int]]  # the texts, and the tokens of context and continuation


@register_model("reft")
class ReftLM(HFLM):
    """lm-eval's model for a causal language model with representation edits.

    Args:
        adapter: an adapter's directory; its base model is the one that it remembers.
        pretrained: the base model instead of that; without `adapter`, an adapted model, with its `tokenizer`.
        dtype: of the base model, see `loading.load_base`.
        **settings: see `lm_eval.models.huggingface.HFLM`, such as `batch_size`, `max_length`, `add_bos_token`.

    Raises:
        ReftError: neither an adapter nor an adapted model, or one that is not a causal language model.
    """

    def __init__(
        self,
        adapter: str | os.PathLike | None = None,
        pretrained: Any = None,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        if adapter is not None:
            from .loading import check_rules, load_adapted

            check_rules(adapter)
            pretrained, own = load_adapted(adapter, pretrained, dtype)
            tokenizer = tokenizer or own
        if not isinstance(pretrained, torch.nn.Module):
            raise ReftError(f"harness: expected adapter=<directory>, or an adapted model, got {pretrained!r}.")
        if (edits := edits_of(pretrained)) is None or list(edits.stacks) != [""] or not edits.causal:
            raise ReftError(
                f"harness: expected a causal language model with edits, got {type(pretrained).__name__} without, or "
                "one that reads apart from what it writes; use lm-eval's own model `hf` for it."
            )
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **settings)
        self.model.eval()

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is what the model would say.

        Continuations that differ in their last token alone, as the letters of a multiple choice do, share a forward.
        """
        shared: dict[tuple, list[int]] = {}  # context and continuation without its last token -> the requests
        for number, (_, context, continuation) in enumerate(requests):
            shared.setdefault((tuple(context), tuple(continuation[:-1])), []).append(number)
        groups = sorted(shared.values(), key=lambda group: -len(requests[group[0]][1]) - len(requests[group[0]][2]))
        firsts = [requests[group[0]] for group in groups]
        answers: dict[int, tuple[float, bool]] = {}
        start = 0
        while start < len(groups):
            size = override_bs or self.batch_size
            size = int(self._batch_scheduler(start, firsts) if size == "auto" else size)
            logits = self._continuations(firsts[start : start + size])
            for group, row in zip(groups[start : start + size], logits, strict=True):
                for number in group:
                    answers[number] = answer = _score(row, requests[number][2])
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            start += size
        return [answers[number] for number in range(len(requests))]

    def _continuations(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        """Return for each request the log-probabilities `[continuation, vocabulary]` at its continuation."""
        rows = [(context + continuation)[-(self.max_length + 1) : -1] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        # a row lacks the last token of its continuation, which nothing follows
        prompts = [len(row) + 1 - count for row, count in zip(rows, counts, strict=True)]
        kind, dtype = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            logits = self.model(input_ids=ids, attention_mask=mask, prompt_lengths=prompts).logits
        parts = (row[n - count : n] for row, n, count in zip(logits, map(len, rows), counts, strict=True))
        return [part.log_softmax(-1, dtype=self.softmax_dtype) for part in parts]


def _manager(tasks: Sequence[str], include_path: str | os.PathLike | None) -> TaskManager:
    """Tasks of one's own are found without reading the thousands that lm-eval brings."""
    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    return own if all(own.match_tasks([task]) for task in tasks) else TaskManager(include_path=str(include_path))


def _score(logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor(continuation, device=logits.device)
    chosen = logits.gather(1, tokens[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == tokens).all())


def evaluate(
    adapter: str | os.PathLike | torch.nn.Module,
    tasks: Sequence[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    tokenizer: Any = None,
    include_path: str | os.PathLike | None = None,
    batch_size: int | str = 16,
    limit: float | None = None,
    num_fewshot: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run tasks of lm-eval on an adapter and return its results.

    Args:
        adapter: an adapter's directory, or an adapted model, with its `tokenizer`.
        tasks: their names, as `lm_eval ls tasks` lists them.
        model: the base model, if not the one that the adapter remembers.
        dtype: of the base model, see `loading.load_base`; by default `"auto"`. An adapted model has its own.
        include_path: a directory with tasks of one's own, as YAML.
        limit: how many questions of each task, or below 1 which share of them.
        num_fewshot: how many examples to show before each question, if not what the task says.
        **settings: see `lm_eval.simple_evaluate`.

    Raises:
        ReftError: an unknown task, one whose data cannot be loaded, or an adapter that cannot be.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ReftError(f"expected a directory of tasks, {include_path} is none.", setting="include_path")
    manager = _manager(tasks, include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ReftError(f"lm-eval has none of the name {unknown[0]!r}; `lm_eval ls tasks` lists all.", setting="tasks")
    if isinstance(adapter, torch.nn.Module):
        lm = ReftLM(pretrained=adapter, tokenizer=tokenizer, batch_size=batch_size)
    else:
        lm = ReftLM(adapter, model, dtype=dtype or "auto", tokenizer=tokenizer, batch_size=batch_size)
    try:
        return simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot, **settings
        )
    except OSError as error:
        if error.errno is not None:  # of this machine, not of the hub
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReftError(f"lm-eval could not load the data of {', '.join(tasks)} ({first}).", setting="tasks") from None


if __name__ == "__main__":  # lm-eval has no way to name a module that brings a model
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ReftError as error:
        print(f"pyreft: {error}", file=sys.stderr)
        sys.exit(2)
