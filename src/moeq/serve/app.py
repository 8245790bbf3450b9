"""OpenAI's interface on an Engine: what comes in is checked, what goes out is what its clients read."""

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from moeq.runtime.load import NO_LIMIT
from moeq.serve import bodies
from moeq.serve.choosing import Choosing
from moeq.serve.engine import Ask, Engine, Job, Piece
from moeq.serve.schema import ChatBody, Common, CompletionBody

KINDS: Final = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
"""Status -> OpenAI's kind of an error; others are of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on.

    Attributes:
        key: what requests must bring as a bearer token; None lets everybody in.
        hosts: names that requests may call the server by; None for all. It keeps web pages from reaching a server on
            this machine through a name of their own.
        max_new_tokens: of one answer at most.
        waiting: answers that are made or wait at most; further ones are refused.
        body_bytes: of a request at most.
    """

    key: str | None = None
    hosts: tuple[str, ...] | None = None
    max_new_tokens: int = 4096
    waiting: int = 64
    body_bytes: int = 4 << 20


class Refused(HTTPException):
    """A request that is not served, with OpenAI's parameter and code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status in (429, 503) else None)
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def build_app(engine: Engine, name: str, limits: Limits) -> FastAPI:
    """The application; `name` is what the model is called."""
    app = FastAPI(title="moeq", docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, limits=limits)
    _errors(app)
    service = _Service(engine, name, limits)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{model:path}")(service.model)
    app.post("/v1/completions", response_model=None)(service.completions)
    app.post("/v1/chat/completions", response_model=None)(service.chat)
    return app


class _Guard:
    """Refuses requests without the key, too large ones, and those that a web page may have made.

    A browser lets any page send plain text to this machine, but not JSON; and it lets a page reach this machine by a
    name of the page's own, which the Host header tells.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (self._app if refused is None else _response(refused))(scope, receive, send)

    def _refusal(self, request: Request) -> Refused | None:
        limits = self._limits
        if limits.hosts is not None and request.url.hostname not in limits.hosts:
            return Refused(400, f"this server is not called {request.url.hostname!r}")
        if limits.key is not None and request.url.path != "/health":
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), limits.key.encode()):
                return Refused(401, "the API key is wrong or missing", code="invalid_api_key")
        if request.method == "POST":
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return Refused(415, "the body must be application/json")
            length = request.headers.get("content-length", "")
            if not length.isdigit():
                return Refused(411, "the request does not say how long its body is")
            if int(length) > limits.body_bytes:
                return Refused(413, f"the body has more than {limits.body_bytes} bytes")
        return None


def _response(error: AnyHTTPException) -> JSONResponse:
    param, code = (error.param, error.code) if isinstance(error, Refused) else (None, None)
    body = error_body(error.status_code, str(error.detail), param, code)
    return JSONResponse(body, error.status_code, error.headers)


def _errors(app: FastAPI) -> None:
    """All errors in OpenAI's form."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AnyHTTPException)
        return _response(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = max(error.errors(), key=lambda each: len(each["loc"]))  # of alternatives the one that came furthest
        where = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int)) or None
        message = "there is no such parameter" if first["type"] == "extra_forbidden" else str(first["msg"])
        return JSONResponse(error_body(400, f"{where}: {message}" if where else message, where), 400)

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)


class _Service:
    """What the paths answer."""

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self._engine, self._name, self._limits = engine, name, limits
        self._tokenizer, self._created = engine.tokenizer, int(time.time())
        config = engine.model.generation_config
        sampled = bool(config and config.do_sample)

        def own(key: str, otherwise: Any) -> Any:
            value = getattr(config, key, None) if sampled else None
            return otherwise if value is None else value

        self._usual = Choosing(
            temperature=own("temperature", 1.0), top_p=own("top_p", 1.0), top_k=own("top_k", 0), min_p=own("min_p", 0.0)
        )

    async def health(self) -> dict[str, Any]:
        """Whether it lives, and how much there is to do."""
        return {"status": "ok", "answers": self._engine.load}

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [await self.model(self._name)]}

    async def model(self, model: str) -> dict[str, Any]:
        """Facts of it."""
        self._check_name(model)
        limit = self._engine.limit
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "moeq",
            "max_model_len": limit if limit < NO_LIMIT else None,
        }

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continues texts."""
        self._check_name(body.model)
        prompts = [self._ids(prompt) for prompt in body.prompts()]
        if not prompts:
            raise Refused(400, "there is no prompt", "prompt")
        asked = 16 if body.max_tokens is None else body.max_tokens
        asks = [
            self._ask(body, ids, asked, body.logprobs, number, echo=bool(body.echo))
            for number, ids in enumerate(ids for ids in prompts for _ in range(body.n))
        ]
        head = bodies.Head(kind="text_completion", key=f"cmpl-{secrets.token_hex(12)}", model=self._name)
        prefix = [self._text(ask.ids) if body.echo else "" for ask in asks]
        return await self._answer(body, asks, prefix, head, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answers a conversation."""
        self._check_name(body.model)
        if not self._tokenizer.chat_template:
            raise Refused(400, "the model has no chat template; use /v1/completions", "messages")
        try:
            found = self._tokenizer.apply_chat_template(
                [message.plain() for message in body.messages],
                add_generation_prompt=True,
                return_dict=True,
                **(body.chat_template_kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError) as error:  # templates say in this way what they do not take
            raise Refused(400, f"the chat template refuses the messages: {error}", "messages") from error
        ids = list(found["input_ids"])
        self._check_length(ids, "messages")
        asked = body.max_completion_tokens or body.max_tokens or self._limits.max_new_tokens
        asks = [self._ask(body, ids, asked, body.told(), number) for number in range(body.n)]
        head = bodies.Head(kind="chat.completion", key=f"chatcmpl-{secrets.token_hex(12)}", model=self._name)
        return await self._answer(body, asks, [""] * len(asks), head, request)

    def _check_name(self, model: str | None) -> None:
        if model not in (None, "", self._name):
            raise Refused(404, f"there is no model {model!r}; it is {self._name!r}", "model", "model_not_found")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self._tokenizer(prompt, verbose=False)["input_ids"])
        else:
            ids, known = prompt, self._engine.model.get_input_embeddings().weight.shape[0]
            if any(not 0 <= token < known for token in ids):
                raise Refused(400, f"a token is not below {known}", "prompt")
        self._check_length(ids, "prompt")
        return ids

    def _check_length(self, ids: list[int], param: str) -> None:
        if not ids:
            raise Refused(400, "the prompt has no tokens", param)
        if len(ids) >= self._engine.limit:
            message = f"{len(ids)} tokens are more than the model can hold ({self._engine.limit})"
            raise Refused(400, message, param, "context_length_exceeded")

    def _text(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _ask(
        self, body: Common, ids: list[int], asked: int, logprobs: int | None, number: int, *, echo: bool = False
    ) -> Ask:
        vocabulary = self._engine.model.get_input_embeddings().weight.shape[0]
        if any(not 0 <= token < vocabulary for token in body.logit_bias or {}):
            raise Refused(400, f"a token is not below {vocabulary}", "logit_bias")
        seed = secrets.randbits(62) if body.seed is None else (body.seed + number) % 2**63
        return Ask(
            ids=tuple(ids),
            max_tokens=min(asked, self._limits.max_new_tokens, self._engine.limit - len(ids)),
            choosing=body.choosing(self._usual, seed),
            stop=body.stops(),
            logprobs=logprobs,
            echo=echo,
        )

    async def _answer(
        self, body: Common, asks: list[Ask], prefix: list[str], head: bodies.Head, request: Request
    ) -> Response:
        if len(asks) > self._limits.waiting:
            raise Refused(400, f"{len(asks)} answers at once are more than {self._limits.waiting}")
        if self._engine.load + len(asks) > self._limits.waiting:
            raise Refused(429, "too many answers are waiting; ask again later")
        answers = _Answers(self._engine, asks)
        choices = [bodies.Choice(n, self._tokenizer, text) for n, text in enumerate(prefix)]
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(_events(answers, choices, head, usage), media_type="text/event-stream")
        gone = asyncio.create_task(_gone(request))
        made = asyncio.create_task(answers.all(choices))
        try:
            await asyncio.wait((gone, made), return_when=asyncio.FIRST_COMPLETED)
            if not made.done():
                return Response(status_code=499)  # nobody hears it
            failed = await made
        finally:
            gone.cancel()
            made.cancel()
            answers.cancel()
        if failed is not None:
            raise failed
        return JSONResponse(bodies.whole(head, choices, answers.usage()))


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Answers:
    """The answers of one request, as their pieces come from the engine's thread."""

    def __init__(self, engine: Engine, asks: list[Ask]) -> None:
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def teller(number: int) -> Callable[[Piece], None]:
            def tell(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the server is gone
                    loop.call_soon_threadsafe(self._queue.put_nowait, (number, piece))

            return tell

        self._jobs: list[Job] = [engine.submit(ask, teller(number)) for number, ask in enumerate(asks)]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Number of the answer and its next piece, until all are complete."""
        left = len(self._jobs)
        while left:
            number, piece = await self._queue.get()
            left -= piece.finish is not None
            yield number, piece

    async def all(self, choices: list[bodies.Choice]) -> Refused | None:
        """Wait for everything; what went wrong, if anything did."""
        async for number, piece in self.pieces():
            choices[number].take(piece)
            if failed := failure(piece):
                return failed
        return None

    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them; a prompt counts once, however many answers it gets."""
        prompts = {job.ask.ids: (len(job.ask.ids), job.reused) for job in self._jobs}
        prompt, cached = (sum(column) for column in zip(*prompts.values(), strict=True))
        made = sum(len(job.made) for job in self._jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def cancel(self) -> None:
        """Nobody waits for them any more."""
        for job in self._jobs:
            job.cancel()


def failure(piece: Piece) -> Refused | None:
    """What a piece that is no good end means for the client."""
    match piece.finish:
        case "memory":
            return Refused(503, "there is not enough memory for this request", code="out_of_memory")
        case "fault":
            return Refused(500, "the model failed; the server's log says how")
        case "cancelled":
            return Refused(503, "the server is shutting down")
    return None


async def _events(
    answers: _Answers, choices: list[bodies.Choice], head: bodies.Head, usage: bool
) -> AsyncIterator[str]:
    try:
        for choice in choices:
            if first := bodies.opening(head, choice):
                yield _event(first)
        async for number, piece in answers.pieces():
            if failed := failure(piece):
                yield _event(error_body(failed.status_code, str(failed.detail), code=failed.code))
                return
            yield _event(bodies.part(head, choices[number], choices[number].take(piece)))
        if usage:
            yield _event(bodies.ending(head, answers.usage()))
        yield "data: [DONE]\n\n"
    finally:
        answers.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
