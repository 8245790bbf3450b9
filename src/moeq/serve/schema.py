"""The bodies of requests, as OpenAI's interface has them; what is not known is refused, not ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moeq.serve.choosing import Choosing

TOP: int = 20
"""Most tokens told beside each token."""
Short = Annotated[str, Field(max_length=256)]


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class Part(BaseModel):
    """A part of what was said; there is text only."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What somebody said."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Common(BaseModel):
    """What both kinds of requests have; the last group is not OpenAI's, but many clients send it."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    n: int = Field(default=1, ge=1, le=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Short | list[Short] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)

    @model_validator(mode="after")
    def _few_stops(self) -> "Common":
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise ValueError("stop: at most 16 strings")
        return self

    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def choosing(self, usual: Choosing, seed: int) -> Choosing:
        """How tokens are chosen, where the request says nothing as the model's own settings have it."""

        def asked(name: str, standard: Any) -> Any:
            value = getattr(self, name)
            return standard if value is None else value

        return Choosing(
            temperature=asked("temperature", usual.temperature),
            top_p=asked("top_p", usual.top_p),
            top_k=max(0, asked("top_k", usual.top_k)),
            min_p=asked("min_p", usual.min_p),
            repetition=asked("repetition_penalty", usual.repetition),
            presence=asked("presence_penalty", 0.0),
            frequency=asked("frequency_penalty", 0.0),
            bias=self.logit_bias or {},
            seed=seed,
        )


class CompletionBody(Common):
    """Of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=TOP)
    echo: bool | None = False
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]
        return list(self.prompt)  # type: ignore[arg-type]


class TextFormat(BaseModel):
    """The only form of an answer."""

    type: Literal["text"]


class ChatBody(Common):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def told(self) -> int | None:
        """Likeliest tokens to tell with each token; None for nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None
