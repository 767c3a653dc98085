"""`chat`: conversations in, the assistant's answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from fusedkv_jax.data.chat import ChatError, ChatTemplate, Message
from fusedkv_jax.data.chat_encoding import encode_chat
from fusedkv_jax.generation.api import generate
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.requests import OnError, TokenizerLike
from fusedkv_jax.generation.results import Completion
from fusedkv_jax.generation.settings import Settings, takes_settings
from fusedkv_jax.model import Decoder
from fusedkv_jax.validation import check_kind


@takes_settings
def chat(
    model: Decoder,
    conversations: Sequence[Message] | Sequence[Sequence[Message]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: TokenizerLike,
    template: ChatTemplate,
    on_error: OnError = "raise",
    **settings: Unpack[Settings],
) -> list[Completion]:
    """Answer conversations.

    Arguments that are not explained here are those of `generate`.

    Args:
        model: the model.
        conversations: one conversation or several; each is a sequence of messages, mappings with
            `role` and `content`.
        params: sampling parameters, one for all conversations or one for each.
        tokenizer: encodes prompts. Special tokens are those that the template spells out; what
            spells one in a message is ordinary text.
        template: makes the prompt; `fusedkv_jax.data.chat.load_template` reads a tokenizer's own.

    Returns:
        One completion per conversation, in order.

    Raises:
        ChatError: the template refuses a conversation. PromptError: as `generate`.
    """
    check_kind(
        "template", template, ChatTemplate, "ChatTemplate(...), or load_template(folder)", ChatError
    )
    if isinstance(conversations, Mapping | str) or not isinstance(conversations, Sequence):
        raise ChatError(
            f"conversations={conversations!r}; pass a list of messages, or a list of such lists"
        )
    if conversations and isinstance(conversations[0], Mapping):
        conversations = [conversations]  # type: ignore[list-item]
    for number, messages in enumerate(conversations):
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise ChatError(f"conversation {number} is {messages!r}; pass a list of messages")
    prompts = [encode_chat(tokenizer, template, list(messages)) for messages in conversations]  # type: ignore[arg-type]
    return generate(model, prompts, params, tokenizer=tokenizer, on_error=on_error, **settings)
