"""From examples to token ids: how a prompt is written for a model, and where its answer begins.

Three formats: `text` is the prompt as it stands, `chat` the tokenizer's chat template around it, `alpaca` the
instruction template of the Alpaca data set.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ReftError, did_you_mean
from ..positions import IGNORED
from .files import FORMATS, Example, Format, alpaca_prompt


def default_format(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example] = ()) -> Format:
    """The format that examples have by themselves; plain prompts become a chat if the tokenizer has a template."""
    if examples and examples[0].format != "text":
        return examples[0].format
    return "chat" if tokenizer.chat_template else "text"


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str, form: Format, given: str = "") -> str:
    """Return what the model reads before it answers a prompt of one turn; `given` is an instruction's input.

    Raises:
        ReftError: another format, which the file of an adapter may name.
    """
    if form not in FORMATS:
        raise ReftError(f"expected {', '.join(FORMATS)}, got {form!r}.{did_you_mean(form, FORMATS)}", setting="format")
    if form == "alpaca":
        return alpaca_prompt(prompt, given)
    text = f"{prompt}\n\n{given}" if given else prompt
    return text if form == "text" else chat_text(tokenizer, [{"role": "user", "content": text}])


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Return a chat in the tokenizer's template, up to where the assistant speaks next."""
    if not tokenizer.chat_template:
        raise ReftError("The tokenizer has no chat template; give prompts as they stand, with the format 'text'.")
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text; one that begins with the BOS token, as chat templates write it, gets no second one."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not has_bos)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, form: Format, limit: int) -> dict[str, Any]:
    """Return `input_ids` and `labels`, which are -100 on the prompt; the answer ends with EOS, once.

    Args:
        limit: the most tokens that the model takes.

    Raises:
        ReftError: no EOS token, a template that rewrites the prompt, or a row that is too long.
    """
    if form == "chat":
        before = chat_text(tokenizer, example.messages[:-1])
        text = tokenizer.apply_chat_template(list(example.messages), tokenize=False).rstrip()
        if not text.startswith(before):
            raise ReftError(f"{example.where}: the chat template writes the prompt in another way once it is answered.")
    else:
        before, text = example.prompt, example.prompt + example.completion
    if not tokenizer.eos_token:
        raise ReftError("The tokenizer has no EOS token, so an answer would never end: set tokenizer.eos_token.")
    ids, length = token_ids(tokenizer, text), len(token_ids(tokenizer, before))
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    if length >= limit:
        raise ReftError(f"{example.where}: the prompt has {length} tokens, the context {limit}; shorten it.")
    if len(ids) > limit:
        raise ReftError(
            f"{example.where}: prompt and answer have {len(ids)} tokens ({length} and {len(ids) - length}), "
            f"the context {limit}; shorten the row."
        )
    return {"input_ids": ids, "labels": [IGNORED] * length + ids[length:]}


def context_length(model: Any, tokenizer: PreTrainedTokenizerBase, asked: int | None = None) -> int:
    """The most tokens that a model and its tokenizer take, or fewer if asked for."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    most = min(own, tokenizer.model_max_length)
    if asked is not None and not 1 < asked <= most:
        raise ReftError(f"expected 2 to {most}, the context of the model, got {asked}.", setting="max_length")
    return asked or most
