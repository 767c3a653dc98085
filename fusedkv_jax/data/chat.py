"""Chat templates: messages to the text of a prompt, by the tokenizer's own template in a sandbox.

A template is a program in Jinja that comes with a tokenizer, so it is not trusted: it runs in
Jinja's immutable sandbox, where it can compute text and nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, object]
TEMPLATE_FILE = "chat_template.jinja"  # in a tokenizer's folder
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"


class ChatError(ValueError):
    """Messages or a template that give no prompt; the message says what is wrong."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes a prompt.

    Attributes:
        source: the template, in Jinja.
        special_tokens: names and texts that it may use, such as `bos_token`.
        tool_use: another template, for conversations with tools; None where `source` is for all.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    tool_use: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: each has `role` (system, user, assistant) and `content`.
            add_generation_prompt: end with what begins the assistant's answer.
            **variables: what else the template takes, such as `tools` or `enable_thinking`.

        Raises:
            ChatError: malformed messages, or a template that fails, refuses the messages, or tries
                to leave the sandbox.
        """
        import jinja2

        check_messages(messages)
        try:
            with_tools = self.tool_use is not None and variables.get("tools") is not None
            environment, template = self._tool_template if with_tools else self._template
            values = {
                # transformers gives templates both, and some ask whether they are none.
                "tools": None,
                "documents": None,
                # Calls of tools may come without content, which templates ask for all the same.
                "messages": [
                    {**message, "content": message.get("content")} for message in messages
                ],
                "add_generation_prompt": add_generation_prompt,
                **self.special_tokens,
                **variables,
            }
            return environment.render(template, values)
        except RecursionError:
            raise ChatError("the chat template calls itself without end") from None
        except MemoryError:
            raise ChatError("the chat template needs more memory than there is") from None
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"the chat template refuses the messages: {reason}") from None

    @functools.cached_property
    def _template(self) -> tuple[Any, Any]:
        return self._compiled(self.source)

    @functools.cached_property
    def _tool_template(self) -> tuple[Any, Any]:
        assert self.tool_use is not None
        return self._compiled(self.tool_use)

    @staticmethod
    def _compiled(source: str) -> tuple[Any, Any]:  # jinja2 is imported when there is a template
        import jinja2

        from fusedkv_jax.data.bounded_jinja import BoundedEnvironment

        environment = BoundedEnvironment({"tojson": _to_json})
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment, environment.from_string(source)
        except RecursionError:
            raise ChatError("the chat template is nested too deeply") from None
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            raise ChatError(message) from None


def load_template(tokenizer: str | pathlib.Path) -> ChatTemplate:
    """The template of a tokenizer, and where there is one another for conversations with tools.

    They are `chat_template.jinja` and `additional_chat_templates/tool_use.jinja` in its folder, or
    else `chat_template` in its `tokenizer_config.json`; of several that have names there, `default`
    and `tool_use`.

    Args:
        tokenizer: path of a `tokenizer.json`, or its folder.

    Raises:
        ChatError: it has none.
    """
    if tokenizer == "byte":
        raise ChatError("the byte tokenizer has no chat template; pass one")
    path = pathlib.Path(tokenizer).expanduser()
    folder = path if path.is_dir() else path.parent
    entries = _read_config(folder / "tokenizer_config.json")
    source = entries.get("chat_template")
    tool_use = None
    if isinstance(source, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source, tool_use = named.get("default"), named.get("tool_use")
    if (folder / TEMPLATE_FILE).is_file():
        source = read_text(folder / TEMPLATE_FILE)
        tool_file = folder / TOOL_TEMPLATE_FILE
        tool_use = read_text(tool_file) if tool_file.is_file() else None
    if not isinstance(source, str):
        raise ChatError(
            f"{folder}: the tokenizer has no chat template; add chat_template.jinja, or pass one"
        )
    special = {}
    for name, token in entries.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    return ChatTemplate(source, special, tool_use if isinstance(tool_use, str) else None)


def read_text(path: str | pathlib.Path) -> str:
    """A UTF-8 file.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not UTF-8; the message says where.
    """
    path = pathlib.Path(path).expanduser()
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start};"
            " convert the file to UTF-8"
        ) from None


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ChatError if these are not messages."""
    if not messages:
        raise ChatError("there are no messages; give at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {number} is {message!r}; use {{'role': ..., 'content': ...}}")
        if "content" not in message and not message.get("tool_calls"):
            raise ChatError(f"message {number} has no content")
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise ChatError(f"message {number} has content={message['content']!r}; use text")


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        entries = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ChatError(f"{path}: not a JSON object")
    return entries


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter with transformers' parameters; Jinja's own writes "<" as an escape."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
