"""What a request may hold. What is not here, or has a value that is not, is refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Token = Annotated[int, Field(ge=0)]
Stop = str | Annotated[list[str], Field(max_length=16)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """Fields of the right type and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """Whether a last event tells the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] = False


class Choosing(Body):
    """How an answer's tokens are chosen; what is not said is as the model's `generate` has it."""

    model: str
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    reft_strength: Annotated[float, Field(gt=-1e6, lt=1e6)] | None = None
    # what changes no answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class Generating(Choosing):
    """What chat and completions have in common."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Generating":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        if any(not stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or ())):
            raise ValueError("stop: expected texts that are not empty")
        return self


class TextPart(Body):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class CalledFunction(Body):
    """The function that a model called, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that a model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    """A function that a model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that a model may use."""

    type: Literal["function"]
    function: Function


class TextFormat(Body):
    """The form of an answer: text."""

    type: Literal["text"]


class ChatBody(Generating):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self


class CompletionBody(Generating):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _agrees(self) -> "CompletionBody":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: not supported, other than n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo=true")
        return self


class Item(Body):
    """One item of the input of `/v1/responses`: a message, a call of a function, or what came of it."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[TextPart] | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    namespace: str | None = None


class FlatTool(Function):
    """A tool, as `/v1/responses` writes it."""

    type: Literal["function"]
    defer_loading: Literal[False] | None = None


class Text(Body):
    """The form of an answer."""

    format: TextFormat | None = None


class ResponseBody(Choosing):
    """`POST /v1/responses`."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    background: Literal[False] | None = None


class LocateBody(Body):
    """`POST /v1/located_tokens`."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = None


class LoadBody(Body):
    """`POST /v1/load_adapter`."""

    adapter_name: str
    adapter_path: str


class UnloadBody(Body):
    """`POST /v1/unload_adapter`."""

    adapter_name: str
