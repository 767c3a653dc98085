"""How text becomes tokens: the one rule for documents in training, prompts and evaluation.

A document is its tokens between the tokenizer's BOS and EOS tokens. A prompt is the beginning of a
document, so it begins with BOS too; a model has rarely seen a text that does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

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
