"""`chat`: conversations in, the assistant's answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedkv_jax.data.chat import ChatTemplate, Message
from fusedkv_jax.generation.generate import generate
from fusedkv_jax.generation.params import SamplingParams
from fusedkv_jax.generation.results import Completion
from fusedkv_jax.model import Decoder


def chat(
    model: Decoder,
    conversations: Sequence[Message] | Sequence[Sequence[Message]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Any,
    template: ChatTemplate,
    **options: Any,
) -> list[Completion]:
    """Answer conversations.

    Args:
        model: the model.
        conversations: one conversation or several; each is a sequence of messages, mappings with
            `role` and `content`.
        params: sampling parameters, one for all conversations or one for each.
        tokenizer: encodes prompts (with special tokens, which templates spell out).
        template: makes the prompt; `fusedkv_jax.data.chat.load_template` reads a tokenizer's own.
        **options: as for `generate`.

    Returns:
        One completion per conversation, in order.

    Raises:
        ChatError: the template refuses a conversation. PromptError: as `generate`.
    """
    if conversations and isinstance(conversations[0], Mapping):
        conversations = [conversations]  # type: ignore[list-item]
    texts = [template.render(list(messages)) for messages in conversations]  # type: ignore[arg-type]
    prompts = [tokenizer.encode(text, allow_special=True) for text in texts]
    return generate(model, prompts, params, tokenizer=tokenizer, **options)
