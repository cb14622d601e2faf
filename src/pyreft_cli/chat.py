"""`pyreft chat`: a conversation with an adapted model."""

from typing import Any

from pyreft.errors import ReftError
from pyreft_cli import options
from pyreft_cli.ask import load
from pyreft_cli.console import console, hush
from pyreft_cli.lines import typed

CHAT_HELP = """Type a message and press return.
/base shows the base model's answer to your last message,
/reset forgets the conversation, /quit ends it."""


def chat(
    adapter: options.AdapterOption,
    model: options.AdapterModel = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    quiet: options.Quiet = False,
) -> None:
    """Talk to an adapted model; the answers appear as they are made."""
    hush()
    adapted, tokenizer, form = load(adapter, model)
    talk = _Conversation(adapted, tokenizer, form, {"max_new_tokens": max_new_tokens, "temperature": temperature})
    if not quiet:
        console.print(CHAT_HELP)
    for line in typed():
        if line == "/quit":
            break
        if line == "/reset":
            talk.turns.clear()
        elif line == "/base":
            talk.base()
        elif line.startswith("/"):
            console.print(CHAT_HELP)
        elif line:
            talk.say(line)


class _Conversation:
    """The turns so far, and how the next answer is made from them."""

    def __init__(self, model: Any, tokenizer: Any, form: Any, options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.form, self.options = model, tokenizer, form, options
        self.turns: list[dict[str, str]] = []

    def say(self, message: str) -> None:
        """Answer a message and remember both; one that cannot be answered ends no conversation."""
        self.turns.append({"role": "user", "content": message})
        try:
            answer = self._answer()
        except KeyboardInterrupt:
            console.print()
            answer = None
        except ReftError as error:
            console.print(f"({error})", markup=False)
            answer = None
        if answer is None:
            self.turns.pop()
        else:
            self.turns.append({"role": "assistant", "content": answer})

    def base(self) -> None:
        """Show the base model's answer to the last message."""
        if not self.turns:
            console.print("There is no message yet.")
            return
        answered = self.turns.pop()
        with self.model.disable_adapter():
            console.print("base: ", end="")
            self._answer()
        self.turns.append(answered)

    def _text(self) -> str:
        from pyreft.data.encode import chat_text, prompt_text

        if self.form == "chat":
            return chat_text(self.tokenizer, self.turns)
        return prompt_text(self.tokenizer, self.turns[-1]["content"], self.form)

    def _answer(self) -> str | None:
        """Stream an answer to the turns so far; where they outgrow the context, the oldest are dropped.

        None where the last message alone outgrows it.
        """
        import torch
        from transformers import TextStreamer

        from pyreft.data.encode import context_length, token_ids

        limit = context_length(self.model.get_base_model(), self.tokenizer)
        room = limit - self.options["max_new_tokens"]
        dropped = 0
        while len(ids := token_ids(self.tokenizer, self._text())) > max(room, 1) and len(self.turns) > 2:
            del self.turns[:2]
            dropped += 2
        if dropped:
            console.print(f"(The context is full: the first {dropped} turns were forgotten.)")
        if len(ids) >= limit:
            console.print(f"(The message has {len(ids)} tokens, the model's context {limit}; shorten it.)")
            return None
        temperature = self.options["temperature"]
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        rows = torch.tensor([ids], device=self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens = self.model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=min(self.options["max_new_tokens"], limit - len(ids)),
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
        return self.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
