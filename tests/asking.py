"""lm-eval's own client of the API, `local-completions`, beside this package's harness: what both are asked."""

import pytest

import pyreft
from pyreft import pocket

QUESTIONS = [pocket.PROMPT_TEMPLATE % row["prompt"] for row in pocket.emoji_questions()[:4]]
PAIRS = [(question, answer) for question in QUESTIONS for answer in (" A whale is large.", " 🐳")]
UNTIL = {"until": ["</s>", "."], "max_gen_toks": 12, "do_sample": False}


def both(url, root, name):
    """The client of a server and the harness itself, for an adapter below `root`, none for the base model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from pyreft.harness import ReftLM

    model, tokenizer = pocket.load()
    if name is not None:
        model = pyreft.ReftModel.from_pretrained(model, str(root / name)).eval()
    client = LocalCompletionsAPI(
        model=name or "pocket",
        base_url=f"{url}/v1/completions",
        tokenizer=pocket.path(),
        tokenizer_backend="huggingface",
        add_bos_token=True,
        batch_size=4,
    )
    return client, (HFLM if name is None else ReftLM)(pretrained=model, tokenizer=tokenizer)


def said(lm):
    """What is generated after each question."""
    return lm.generate_until(_requests("generate_until", [(one, UNTIL) for one in QUESTIONS]), disable_tqdm=True)


def scored(lm):
    """The log-probability of each given answer, and whether it is the greedy one."""
    return lm.loglikelihood(_requests("loglikelihood", PAIRS), disable_tqdm=True)


def close(one, two):
    """Of each pair of scores, whether they are the same but for rounding."""
    return [a[0] == pytest.approx(b[0], rel=1e-3) for a, b in zip(one, two, strict=True)]


def _requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=n) for n, pair in enumerate(arguments)]
