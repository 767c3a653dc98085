"""How text becomes tokens: the one rule for documents in training, prompts and evaluation; and how
what models write becomes text.

A document is its tokens between the tokenizer's BOS and EOS tokens. A prompt is the beginning of a
document, so it begins with BOS too; a model has rarely seen a text that does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fusedkv_jax.data.tokenizers import Tokenizer


@runtime_checkable
class Encoder(Protocol):
    """What makes tokens of text: a `Tokenizer`, or another library's."""

    def encode(self, text: str, /) -> Iterable[int]: ...


def encode_prompt(tokenizer: Encoder, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Tokens of a text that begins a document.

    Args:
        tokenizer: has `encode`; one without a `bos_id`, or where it is None, has no BOS token.
        text: text; what spells a special token is ordinary text.
        add_special_tokens: begin with the BOS token.
    """
    ids = [int(token) for token in tokenizer.encode(text)]
    return [*document_beginning(tokenizer), *ids] if add_special_tokens else ids


def document_beginning(tokenizer: object) -> list[int]:
    """What stands before a document's first token: BOS, or nothing if there is no such token."""
    bos = getattr(tokenizer, "bos_id", None)
    return [] if bos is None else [int(bos)]


def document_tokens(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """A whole document: BOS, the tokens of its text, EOS."""
    ends = document_beginning(tokenizer), [tokenizer.eos_id]
    before, after = (np.asarray(tokens, np.int32) for tokens in ends)
    return np.concatenate([before, ids, after])


def output_decoder(
    tokenizer: Any, *, skip_special_tokens: bool = True
) -> Callable[[Sequence[int]], str]:
    """How text is made of the tokens that a model writes.

    A model may have more rows than its tokenizer has ids (`tokenizers.check_vocab_size`); those of
    them that it writes have no text and are left out. `Tokenizer.decode` itself refuses them.

    Args:
        tokenizer: has `decode`; one that is no `Tokenizer` deals with such ids itself.
        skip_special_tokens: leave special tokens out; otherwise `decode` is called with that.
    """
    decode = tokenizer.decode
    if not skip_special_tokens:
        decode = functools.partial(decode, skip_special_tokens=False)
    if not isinstance(tokenizer, Tokenizer):  # others do not count added tokens as vocab_size
        return decode
    size = tokenizer.vocab_size
    return lambda ids: decode([token for token in ids if token < size])
