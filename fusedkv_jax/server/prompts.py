"""Texts and conversations to tokens, in one thread beside the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fusedkv_jax.data.chat import ChatError, ChatTemplate
from fusedkv_jax.data.chat_encoding import encode_chat
from fusedkv_jax.data.encoding import document_beginning, output_decoder
from fusedkv_jax.generation.requests import Codec
from fusedkv_jax.server.errors import ApiError
from fusedkv_jax.server.places import Echo, Offsets

_T = TypeVar("_T")
_RESERVED = {"messages", "add_generation_prompt", "tools", "tokenizer", "template"}


class Spelled(NamedTuple):
    """A token as a client sees it.

    Attributes:
        text: U+FFFD where it is a part of a character.
        raw: its bytes, which join to the characters; None where the tokenizer does not tell them.
    """

    text: str
    raw: bytes | None


class Prompts:
    """Makes prompts; a long one does not hold up the streams of others.

    Args:
        tokenizer: as `fusedkv_jax.generate` takes it.
        template: of conversations; None for a model that has none.

    Attributes:
        spell: what a token is to a client, special ones included; empty where it has no text.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate | None):
        self.tokenizer, self.template = tokenizer, template
        self.spell = functools.lru_cache(1 << 16)(self._spell)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "prompts")

    async def texts(
        self, prompt: str | Sequence[str | int | Sequence[int]], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Tokens of a text, of several, of token ids, or of several lists of token ids.

        Raises:
            ApiError: empty, a mixture, or a text that is no Unicode.
        """
        several = [prompt] if isinstance(prompt, str) else list(prompt)
        kinds = {type(item) for item in several}
        if len(kinds) != 1:
            what = "is empty" if not several else "mixes texts and tokens"
            raise ApiError(400, f"prompt {what}; give a text, texts, or token ids", param="prompt")
        if kinds == {int}:
            return [several]  # pyright: ignore[reportReturnType]
        if kinds == {list}:
            return several  # pyright: ignore[reportReturnType]
        codec = Codec(self.tokenizer, add_special_tokens=add_special_tokens)
        return await self._apart(lambda: [codec.encode(str(text)) for text in several], "prompt")

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Tokens of a conversation; on request with the BOS token before those of the template,
        which most write themselves.

        Raises:
            ApiError: there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions, or serve it with one",
                code="no_chat_template",
            )
        variables = dict(variables or {})
        if taken := sorted(_RESERVED & variables.keys()):
            raise ApiError(400, f"{taken[0]} is no variable to set", param="chat_template_kwargs")
        if tools is not None:
            variables["tools"] = tools
        variables["add_generation_prompt"] = add_generation_prompt
        encode = functools.partial(encode_chat, self.tokenizer, self.template, **variables)
        beginning = document_beginning(self.tokenizer) if add_special_tokens else []
        plain = [_plain(message) for message in messages]
        read = [_with_read_calls(message) for message in plain]

        def work() -> list[int]:
            try:
                return beginning + encode(read)
            except ChatError:
                if read == plain:
                    raise
                # A few templates are written for the text of arguments.
                return beginning + encode(plain)

        return await self._apart(work, "messages")

    def _spell(self, token: int) -> Spelled:
        text = self.decoder(skip_special_tokens=False)([token])
        if not text:  # a model may have more tokens than its tokenizer
            return Spelled("", b"")
        if hasattr(self.tokenizer, "decode_bytes"):
            return Spelled(text, self.tokenizer.decode_bytes([token]) or text.encode())
        return Spelled(text, None if "\ufffd" in text else text.encode())

    async def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included, apart. Raises ApiError."""
        decode = functools.partial(self.tokenizer.decode, tokens, skip_special_tokens=False)
        return await self._apart(decode, "tokens")

    async def echo(self, given: object, tokens: Sequence[int], offsets: bool) -> Echo:
        """What is shown of a prompt: a text as it was given, without the BOS token before it."""
        is_text = isinstance(given, str)
        text = given if is_text else await self.decode(tokens)
        assert isinstance(text, str)
        find = Offsets(self.decoder(skip_special_tokens=is_text)).of
        found = await self._apart(lambda: find(tokens), "prompt") if offsets else ()
        return Echo(text, tokens, found)

    def decoder(self, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
        """Text of an output's tokens, as it is shown; none of a server without a tokenizer."""
        if self.tokenizer is None:
            return lambda tokens: ""
        return output_decoder(self.tokenizer, skip_special_tokens=skip_special_tokens)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _apart(self, work: Callable[[], _T], param: str) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (ChatError, ValueError) as error:  # UnicodeError is a ValueError
            reason = "it holds half of a surrogate pair"
            text = reason if isinstance(error, UnicodeError) else str(error)
            raise ApiError(400, f"{param}: {text}", param=param) from None


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content, if it comes in parts, is one text."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            text = part.get("text") if kind == "text" else None
            if not isinstance(text, str):
                raise ApiError(400, f"a part of type {kind!r}; use text parts", param="messages")
            texts.append(text)
        plain["content"] = "".join(texts)
    elif content is not None and not isinstance(content, str):
        raise ApiError(400, "content is no text; give a text or text parts", param="messages")
    return plain


def _with_read_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls of tools have their arguments as mappings, which most templates write
    as JSON; as the text that OpenAI has them in, they would be quoted once more."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_read_arguments(call) for call in calls]}


def _with_read_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        read = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call  # a call that a model has spoiled, as it has written it
    return {**call, "function": {**function, "arguments": read}} if isinstance(read, dict) else call
