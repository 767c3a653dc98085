"""Bodies of requests: OpenAI's fields, with vLLM's names for what OpenAI does not have."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any, NoReturn, TypeVar

import msgspec

from fusedkv_jax.generation.params import SamplingError, SamplingParams
from fusedkv_jax.generation.structured import StructuredOutputsError, StructuredOutputsParams
from fusedkv_jax.server.errors import ApiError
from fusedkv_jax.server.tools import ForcedCalls

_MOST_LOGPROBS = 20  # OpenAI's bound, and vLLM's
_OTHERWISE = ("logprobs", "prompt_logprobs", "structured_outputs")  # set in ways of their own
_SAMPLING = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.name not in _OTHERWISE
)
_GUIDED = ("json", "regex", "choice", "grammar")
_log = logging.getLogger(__name__)
_logged: set[str] = set()


class StreamOptions(msgspec.Struct):
    """How a stream ends.

    Attributes:
        include_usage: the last chunk has the usage, and no choices.
        continuous_usage_stats: beside it, every chunk has the usage so far; vLLM's.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's field of this name; see `StructuredOutputsParams`."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def params(self) -> StructuredOutputsParams:
        """The engine's. Raises ApiError."""
        try:
            return StructuredOutputsParams(**msgspec.structs.asdict(self))
        except StructuredOutputsError as error:
            raise ApiError(400, str(error), param="structured_outputs") from None


class JsonSchema(msgspec.Struct):
    """A JSON schema; output is always held to it, whatever `strict` says."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """OpenAI's form of an answer."""

    type: str = "text"
    json_schema: JsonSchema | None = None

    def params(self) -> StructuredOutputsParams | None:
        """The engine's. Raises ApiError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type != "json_schema":
            _refuse("response_format", f"type={self.type!r}; use text, json_object or json_schema")
        if self.json_schema is None or self.json_schema.schema is None:
            _refuse("response_format", "response_format has no schema in its json_schema")
        return StructuredOutputs(json=self.json_schema.schema).params()


class _Asked(msgspec.Struct, kw_only=True):
    """What both routes take. None stands for a field that was left out."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's older names, which clients still send.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: int | None = None

    def check(self) -> None:
        """Raises ApiError for what is not built or makes no sense."""
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "stream_options need stream=true")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            _refuse("priority", f"priority={self.priority}; use a 32-bit number")
        _bounded("prompt_logprobs", self.prompt_logprobs)
        if self.prompt_logprobs is not None and self.stream:
            _refuse("prompt_logprobs", "prompt_logprobs are not streamed; leave out stream")

    def params(self, **changes: Any) -> SamplingParams:
        """The sampling parameters. Raises ApiError on a bad value."""
        values = {name: getattr(self, name) for name in _SAMPLING}
        values["structured_outputs"] = self._form()
        if self.seed is not None and -(2**63) <= self.seed < 2**63:
            values["seed"] = self.seed % 2**32  # OpenAI's seeds have 64 bits
        values |= changes
        given = {name: value for name, value in values.items() if value is not None}
        if "max_tokens" in values:
            given["max_tokens"] = values["max_tokens"]
        try:
            return SamplingParams(**given)
        except SamplingError as error:
            name = str(error).partition("=")[0]
            raise ApiError(400, str(error), param=name if name.isidentifier() else None) from None

    def _form(self) -> StructuredOutputsParams | None:
        """What the output is held to. Raises ApiError."""
        older = {name: getattr(self, f"guided_{name}") for name in _GUIDED}
        given = {name: value for name, value in older.items() if value is not None}
        forms = (
            None if self.response_format is None else self.response_format.params(),
            None if self.structured_outputs is None else self.structured_outputs.params(),
            StructuredOutputs(**given).params() if given else None,
        )
        found = [form for form in forms if form is not None]
        if len(found) > 1:
            _refuse(
                "structured_outputs", "give one of response_format, structured_outputs, guided_*"
            )
        return found[0] if found else None


class CompletionRequest(_Asked, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def sampling(self) -> SamplingParams:
        """The sampling parameters. Raises ApiError."""
        self.check()
        if self.suffix:
            _not_built("suffix", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            _not_built("best_of", f"best_of={self.best_of} other than n")
        logprobs = _bounded("logprobs", self.logprobs)
        wanted = [self.prompt_logprobs, logprobs if self.echo else None]
        return self.params(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=logprobs,
            prompt_logprobs=max((count for count in wanted if count is not None), default=None),
        )


class ChatRequest(_Asked, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    functions: Any = None
    function_call: Any = None

    def sampling(self) -> SamplingParams:
        """The sampling parameters; without a limit the answer may fill the context."""
        self.check()
        for name in ("functions", "function_call"):
            if getattr(self, name) is not None:
                _not_built(name, f"{name} (give tools)")
        if self.top_logprobs is not None and not self.logprobs:
            _refuse("top_logprobs", "top_logprobs need logprobs=true")
        top = self.top_logprobs if self.logprobs else None
        limit = self.max_completion_tokens
        return self.params(
            max_tokens=self.max_tokens if limit is None else limit,
            logprobs=_bounded("top_logprobs", (top or 0) if self.logprobs else None),
            prompt_logprobs=self.prompt_logprobs,
            **self._forced_form(),
        )

    def forced_calls(self) -> ForcedCalls | None:
        """The calls that the answer must consist of, if any. Raises ApiError."""
        parallel = self.parallel_tool_calls is not False
        return ForcedCalls.of(self.tools, self.tool_choice, parallel)

    def _forced_form(self) -> dict[str, StructuredOutputsParams]:
        calls = self.forced_calls()
        if calls is None:
            return {}
        if self._form() is not None:
            _refuse(
                "tool_choice", "tool_choice asks for a call; leave out other forms of an answer"
            )
        return {"structured_outputs": calls.form()}


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


_Body = TypeVar("_Body", bound=msgspec.Struct)


def decode(body: bytes, form: type[_Body]) -> _Body:
    """A body. Fields that the form does not have are ignored, and logged the first time.

    Raises:
        ApiError: not JSON, or not of this form; `param` names the field.
    """
    try:
        document = msgspec.json.decode(body)
        asked = msgspec.convert(document, form, str_keys=True)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at ")
        field = re.search(r"\$\.(\w+)", place) or re.search(r"field `(\w+)`", text)
        name = field and field.group(1)
        where = f"{name}: " if name and name not in text else ""
        raise ApiError(400, f"{where}{text}", param=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}") from None
    for name in sorted(_unknown(document, form) - _logged)[:32]:
        if len(_logged) < 1000:
            _logged.add(name)
            _log.info("requests have the field %.64r, which this server ignores", name)
    return asked


def _unknown(document: dict[str, Any], form: type[msgspec.Struct]) -> set[str]:
    options = document.get("stream_options")
    inner = options.keys() if isinstance(options, dict) else ()
    own = {
        f"stream_options.{name}" for name in inner if name not in StreamOptions.__struct_fields__
    }
    return own | document.keys() - set(form.__struct_fields__)


def _bounded(name: str, count: int | None) -> int | None:
    if count is not None and not 0 <= count <= _MOST_LOGPROBS:
        _refuse(name, f"{name}={count}; use 0 to {_MOST_LOGPROBS}")
    return count


def _refuse(param: str, message: str) -> NoReturn:
    raise ApiError(400, message, param=param)


def _not_built(param: str, what: str) -> NoReturn:
    raise ApiError(501, f"{what} is not built; leave it out", param=param)
