"""Conversations to tokens, such that the template alone makes special tokens.

What a user writes must not end a turn or begin another one. So a mark is put into every place of a
message where a special token could be spelled, alone or together with what the template writes
around it; the marks go through the template with the text, and no special token reaches across one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fusedkv_jax.data.chat import ChatError, ChatTemplate, Message

# Marks are printable, as templates may show lists by their `repr`; one that is in no text is taken.
_MARKS = range(0x12000, 0x12400)  # cuneiform


@runtime_checkable
class ChatTokenizer(Protocol):
    """What chat needs of a tokenizer; `special_tokens` maps texts to ids."""

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, allow_special: bool = False) -> Sequence[int]: ...


def encode_chat(
    tokenizer: ChatTokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: object,
) -> list[int]:
    """Tokens of a conversation.

    Args:
        tokenizer: encodes what the template gives.
        template: makes the text; the special tokens that it writes become such.
        messages: the conversation. What spells a special token there is ordinary text.
        add_generation_prompt: end with what begins the assistant's answer.
        **variables: what else the template takes; texts within lists and mappings (such as
            `tools`) are taken as messages' are.

    Raises:
        ChatError: the template refuses the messages, or the tokenizer does not name its special
            tokens.
    """
    special = getattr(tokenizer, "special_tokens", None)
    if not isinstance(special, Mapping):
        raise ChatError(
            f"{type(tokenizer).__name__} has no special_tokens, so a message could not be kept from"
            " spelling them; give it that attribute, a mapping from texts to ids"
        )
    texts = sorted(filter(None, special), key=len, reverse=True)
    everything = f"{messages!r}{variables!r}{template!r}{special!r}"
    mark = next(chr(code) for code in _MARKS if chr(code) not in everything)
    marker = _Marker(mark, texts)
    marked = [marker.mark(message) for message in messages]
    named = {
        name: value if isinstance(value, str) else marker.mark(value)
        for name, value in variables.items()
    }
    text = template.render(marked, add_generation_prompt=add_generation_prompt, **named)
    plain = text.replace(mark, "")
    ids = list(tokenizer.encode(plain, allow_special=True))
    if not texts:
        return ids
    pattern = re.compile("|".join(map(re.escape, texts)))
    spelled = pattern.findall(text)  # by the template
    # The tokenizer may find more than is spelled, where it normalizes text before it looks.
    made = [token for token in ids if token in special.values()]
    if pattern.findall(plain) == spelled and made == [special[token] for token in spelled]:
        return ids
    ids, end = [], 0
    for match in [*pattern.finditer(text), None]:
        ordinary = text[end : None if match is None else match.start()].replace(mark, "")
        ids += tokenizer.encode(ordinary) if ordinary else ()
        if match is not None:
            ids.append(special[match.group()])
            end = match.end()
    return ids


@dataclass(frozen=True)
class _Marker:
    """Puts marks where special tokens are spelled, or may be begun or completed.

    Attributes:
        sign: the mark.
        special: texts of the special tokens.
    """

    sign: str
    special: Sequence[str]

    def mark(self, value: Any, ends: bool = True) -> Any:
        """The same with marks in all texts within it, keys that templates may name left out."""
        if isinstance(value, str):
            return self._text(value, ends)
        if isinstance(value, Mapping):
            # Templates compare roles and types, which a mark at an end would change.
            named = ("role", "type")
            return {
                self._key(key): self.mark(item, key not in named) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _key(self, key: Any) -> Any:
        return self._text(key, True) if isinstance(key, str) and not key.isidentifier() else key

    def _text(self, text: str, ends: bool) -> str:
        places = set()
        for token in self.special:
            start = text.find(token)
            while start >= 0:  # occurrences may overlap
                places.add(start + 1)
                start = text.find(token, start + 1)
            if not ends:
                continue
            # The template's text around may complete what is begun here.
            if any(text.endswith(token[:size]) for size in range(1, len(token))):
                places.add(len(text))
            if any(text.startswith(token[size:]) for size in range(1, len(token))):
                places.add(0)
        for place in sorted(places, reverse=True):
            text = f"{text[:place]}{self.sign}{text[place:]}"
        return text
