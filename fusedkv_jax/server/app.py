"""The OpenAI API over an engine, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import pathlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fusedkv_jax.data.chat import ChatTemplate
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.server import answers, errors, protocol
from fusedkv_jax.server.access import Access, read_json
from fusedkv_jax.server.connection import Disconnected, EventStream, while_connected
from fusedkv_jax.server.errors import ApiError, overloaded
from fusedkv_jax.server.generation import Generation, Order
from fusedkv_jax.server.health import Health
from fusedkv_jax.server.metrics import CONTENT_TYPE, Metrics
from fusedkv_jax.server.prompts import Prompts
from fusedkv_jax.server.running import Running
from fusedkv_jax.server.statistics import log_statistics
from fusedkv_jax.server.tool_answers import ToolAnswer
from fusedkv_jax.serving import QueueFull

if TYPE_CHECKING:
    from fusedkv_jax.server.kv_events import KvEventPublisher
    from fusedkv_jax.serving import AsyncEngine

_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_PAGE = pathlib.Path(__file__).with_name("page.html")
_Form = TypeVar(
    "_Form",
    protocol.CompletionRequest,
    protocol.ChatRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What an operator may set.

    Attributes:
        api_keys: of clients, each a tenant of its own, in ASCII as a header has them; none lets
            everybody in.
        max_body_bytes: of a request.
        max_choices: outputs of a request, over all its prompts.
        health_timeout: seconds that the token of /health may take.
        log_interval: seconds between two lines of statistics; 0 for none.
    """

    api_keys: Sequence[str] = ()
    max_body_bytes: int = 8 << 20
    max_choices: int = 128
    health_timeout: float = 30.0
    log_interval: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.api_keys, str):
            raise ValueError("api_keys is one text; use a list of texts")
        for number, key in enumerate(self.api_keys, 1):  # which a log must not show
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"API key {number} of {len(self.api_keys)} cannot stand in a header; use"
                    " printable ASCII characters, with no space at its ends"
                )
        for name in ("max_body_bytes", "max_choices", "health_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}; use a number above 0")


class Server:
    """The routes.

    Args:
        engine: started and stopped with the application.
        template: of conversations; None for a model without one.
        settings: limits and keys.
        kv_events: the publisher that the engine reports to, closed with the application.

    Attributes:
        app: the ASGI application.
        running: what is being answered; `drain` before the end.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        template: ChatTemplate | None,
        settings: ServerSettings | None = None,
        kv_events: KvEventPublisher | None = None,
    ):
        self.engine, self.settings = engine, settings or ServerSettings()
        self.kv_events = kv_events
        self.prompts = Prompts(engine.tokenizer, template)
        self.metrics, self.running = Metrics(engine), Running(engine)
        self.health = Health(engine, self.settings.health_timeout)
        self._created, self._started = int(time.time()), False
        self.app = Starlette(
            routes=self._routes(),
            lifespan=self._lifespan,
            middleware=[Middleware(Access, keys=self.settings.api_keys)],
            exception_handlers={
                ApiError: errors.show_api_error,
                HTTPException: errors.show_http_error,
                ClientDisconnect: _show_nobody,
                Disconnected: _show_nobody,
                Exception: errors.show_bug,
            },
        )

    def _routes(self) -> list[Route]:
        post = ["POST"]
        return [
            Route("/", self._show_page),
            Route("/health", self._show_health),
            Route("/ready", self._show_ready),
            Route("/metrics", self._show_metrics),
            Route("/version", self._show_version),
            Route("/kv_event_sources", self._show_kv_event_sources),
            Route("/v1/models", self._show_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/completions", self._complete, methods=post),
            Route("/v1/chat/completions", self._chat, methods=post),
            Route("/tokenize", self._tokenize, methods=post),
            Route("/detokenize", self._detokenize, methods=post),
        ]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        await self.engine.start()
        self._started = True
        log = asyncio.create_task(log_statistics(self.engine, self.settings.log_interval))
        try:
            yield
        finally:
            self._started = self.running.open = False
            log.cancel()
            await self.engine.stop()
            if self.kv_events is not None:
                await asyncio.to_thread(self.kv_events.close)
            self.prompts.close()

    # What a model answers.

    async def _complete(self, request: Request) -> Response:
        asked = await self._read(request, protocol.CompletionRequest, self._check_room)
        params = asked.sampling()
        prompts = await self.prompts.texts(asked.prompt, asked.add_special_tokens is not False)
        self._check(prompts, params)
        given = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        pairs = zip(given, prompts, strict=False) if asked.echo else ()  # or one list of token ids
        echo = [await self.prompts.echo(*pair, asked.logprobs is not None) for pair in pairs]
        answer = answers.CompletionAnswer(
            f"cmpl-{uuid.uuid4().hex}",
            self.engine.model_name,
            answers.Asked(asked.logprobs, asked.prompt_logprobs),
            self.prompts.spell,
            decode=self.prompts.decoder(params.skip_special_tokens),
            echo=echo,
            n=params.n,
        )
        return await self._answer(request, asked, params, prompts, answer)

    async def _chat(self, request: Request) -> Response:
        asked = await self._read(request, protocol.ChatRequest, self._check_room)
        params = asked.sampling()
        prompt = await self.prompts.chat(
            asked.messages,
            None if asked.tool_choice == "none" else asked.tools,
            asked.add_generation_prompt is not False,
            asked.chat_template_kwargs,
            asked.add_special_tokens is True,
        )
        self._check([prompt], params)
        head = f"chatcmpl-{uuid.uuid4().hex}", self.engine.model_name
        shown = answers.Asked(params.logprobs, asked.prompt_logprobs), self.prompts.spell
        calls = asked.forced_calls()
        answer = (
            answers.ChatAnswer(*head, *shown) if calls is None else ToolAnswer(*head, *shown, calls)
        )
        return await self._answer(request, asked, params, [prompt], answer)

    async def _answer(
        self,
        request: Request,
        asked: protocol.CompletionRequest | protocol.ChatRequest,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        answer: answers.Answer,
    ) -> Response:
        try:
            await self.engine.prepare(params)
        except ValueError as error:
            raise ApiError(400, str(error), param="structured_outputs") from None
        key = request.state.tenant
        tenant = key + (f"/{asked.cache_salt}" if asked.cache_salt else "")
        with contextlib.ExitStack() as stack:
            generation = stack.enter_context(
                Generation(
                    *(self.engine, self.running, self.metrics, uuid.uuid4().hex),
                    # Who has a key has one share, however many salts.
                    Order(prompts, params, asked.priority or 0, tenant, key or tenant),
                )
            )
            if asked.stream:
                options = asked.stream_options or protocol.StreamOptions()
                events = _events(generation, answer, options)
                return EventStream(events, stack.pop_all().close)
            await while_connected(request.receive, _gather(generation, answer))
            return JSONResponse(answer.whole(generation))

    def _check_room(self) -> None:
        """Refuse while the queue is full, before a prompt is decoded and tokenized in vain."""
        try:
            self.engine.check_room()
        except QueueFull as error:
            raise overloaded(f"{error}", error.retry_after) from None

    async def _read(
        self, request: Request, form: type[_Form], check: Callable[[], None] = lambda: None
    ) -> _Form:
        body = await read_json(request, self.settings.max_body_bytes)
        check()
        asked = protocol.decode(body, form)
        if asked.model is not None and asked.model != self.engine.model_name:
            raise _no_model(asked.model, self.engine.model_name)
        return asked

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        choices, most = len(prompts) * params.n, self.settings.max_choices
        if choices > most:
            raise ApiError(400, f"{choices} outputs; ask for at most {most} at once", param="n")
        if not all(prompts):
            raise ApiError(400, "prompt is empty; give it at least a token", param="prompt")
        try:
            self.engine.check_together([len(prompt) for prompt in prompts])
        except ValueError as error:  # another time would be no better, so it is no 503
            raise ApiError(400, str(error), param="prompt") from None

    # What an operator asks.

    async def _show_page(self, request: Request) -> Response:
        del request
        chat = "chat" if self.prompts.template is not None else "completion"
        page = _PAGE.read_text(encoding="utf-8").replace("{{mode}}", chat)
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        policy += "connect-src 'self'; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def _show_health(self, request: Request) -> Response:
        del request
        if not await self.health.alive():
            raise ApiError(503, "the engine makes no tokens", code="unhealthy")
        return JSONResponse({"status": "ok"})

    async def _show_ready(self, request: Request) -> Response:
        del request
        if not (self._started and self.running.open):
            raise ApiError(503, "the server takes no requests now", code="not_ready")
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        del request
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _show_version(self, request: Request) -> Response:
        del request
        return JSONResponse({"version": importlib.metadata.version("fusedkv_jax")})

    async def _show_kv_event_sources(self, request: Request) -> Response:
        """Of each data-parallel rank; an engine is one."""
        del request
        sources = {} if self.kv_events is None else {"0": self.kv_events.source()}
        return JSONResponse(sources)

    async def _show_models(self, request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def _show_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.engine.model_name:
            raise _no_model(request.path_params["name"], self.engine.model_name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.engine.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "fusedkv_jax",
            "max_model_len": self.engine.max_length,
        }

    async def _tokenize(self, request: Request) -> Response:
        asked = await self._read(request, protocol.TokenizeRequest)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if asked.prompt is not None:
            texts = await self.prompts.texts(asked.prompt, asked.add_special_tokens is not False)
            tokens = texts[0]
        else:
            assert asked.messages is not None
            tokens = await self.prompts.chat(
                asked.messages,
                asked.tools,
                asked.add_generation_prompt is not False,
                asked.chat_template_kwargs,
                asked.add_special_tokens is True,
            )
        length = self.engine.max_length
        return JSONResponse({"count": len(tokens), "max_model_len": length, "tokens": tokens})

    async def _detokenize(self, request: Request) -> Response:
        asked = await self._read(request, protocol.DetokenizeRequest)
        return JSONResponse({"prompt": await self.prompts.decode(asked.tokens)})


async def _gather(generation: Generation, answer: answers.Answer) -> None:
    async for grown in generation:
        answer.add(grown)


async def _events(
    generation: Generation, answer: answers.Answer, options: protocol.StreamOptions
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; an error is one too."""
    more: dict[str, Any] = {"usage": None} if options.include_usage else {}
    try:
        async for grown in generation:
            if options.include_usage and options.continuous_usage_stats:
                more = {"usage": answers.usage(generation)}
            for chunk in answer.chunks(grown):
                yield answers.event({**chunk, **more})
        if options.include_usage:
            yield answers.event(answer.chunk([], usage=answers.usage(generation)))
    except ApiError as error:
        yield answers.event(error.document)
    except Exception:
        _log.exception("a stream failed")
        yield answers.event(ApiError(500, "the server failed; its log has the cause").document)
    yield answers.DONE


def _no_model(asked: str, name: str) -> ApiError:
    message = f"there is no model {asked!r}; this server has {name!r}"
    return ApiError(404, message, param="model", code="model_not_found")


async def _show_nobody(request: Request, error: Exception) -> Response:
    """Handler for clients that have gone: the answer reaches only the log."""
    del request, error
    return Response(status_code=499)
