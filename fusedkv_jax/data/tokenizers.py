"""Tokenizers: bytes with two special tokens, and Hugging Face `tokenizer.json` files."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fusedkv_jax.data import sources
from fusedkv_jax.validation import check_kind


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      name: "byte" or the path it was loaded from.
      vocab_size: one more than the largest id; a model needs at least as many rows.
      bos_id: the token before a document's first one (the end-of-text token where a
        vocabulary has no token of its own for that).
      eos_id: the token after a document's last one.
      pad_id: the padding token, or None. The batches of this package never contain it: padding
        is marked by loss_mask and segment_ids.
      special_tokens: the ids of special tokens by their texts; none that have no text.
      fingerprint: SHA-256 (hex) of what defines the mapping.
    """

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int | None
    fingerprint: str

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`, without BOS and EOS.

        Text that spells a special token ("</s>") is ordinary text unless `allow_special`,
        so that no document can end itself; chat prompts are the use for `allow_special`.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text as `encode` does, int32; in parallel if possible."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`, U+FFFD for bytes not in UTF-8. Special tokens that have a
        text are part of it unless they are to be skipped. Raises ValueError on ids outside the
        vocabulary; `encoding.output_decoder` is for what a model writes."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, BOS 256 and EOS 257: a vocabulary of exactly 258."""

    name = "byte"
    bos_id = 256
    eos_id = 257
    pad_id: int | None = None
    vocab_size = 258
    special_tokens: Mapping[str, int] = {}  # BOS and EOS have no text
    fingerprint = hashlib.sha256(b"utf-8 bytes, bos 256, eos 257").hexdigest()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the UTF-8 bytes of `text`; no text spells BOS or EOS."""
        del allow_special
        _check_text(text)
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the UTF-8 bytes of each text, int32."""
        _check_text(*texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the bytes of `ids` without BOS and EOS. Raises ValueError on other ids."""
        values = [int(token) for token in ids]
        _check_ids(values, self)
        return bytes(value for value in values if value < 256)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; U+FFFD stands for bytes that are not UTF-8."""
        del skip_special_tokens  # BOS and EOS have no text
        return self.decode_bytes(ids).decode("utf-8", "replace")


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library.

    The special tokens are those that a `tokenizer_config.json` beside the file names as
    bos_token, eos_token and pad_token, else the usual spellings; a BOS or padding token that it
    names null is missing. Truncation, padding and templates that the file prescribes are off: a
    document's ids are those of its text.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Loads the file.

        Raises:
          FileNotFoundError: no such file. ValueError: not a tokenizer, or no end-of-text token.
        """
        file = pathlib.Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
            if not file.exists():
                raise ValueError(
                    f"tokenizer={path}: the folder has no tokenizer.json; name one, or byte"
                )
        if not file.is_file():
            problem = sources.why_not_a_file(file)
            if problem:
                raise ValueError(f"tokenizer {str(path)!r} {problem}")
            raise FileNotFoundError(
                f"no such tokenizer: {str(path)!r}; it is 'byte' or a tokenizer.json"
            )
        self.name = str(path)
        self._file = file
        self._data = file.read_bytes()
        self.fingerprint = hashlib.sha256(self._data).hexdigest()
        self._text = self._parse()
        self._text.encode_special_tokens = True
        vocabulary = self._text.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{file}: the tokenizer's vocabulary is empty")
        # Ids may have gaps, so the count of entries is not enough.
        self.vocab_size = max(vocabulary.values()) + 1
        named = _special_token_names(file.parent / "tokenizer_config.json")
        if named.get("eos", "") is None:  # documents need one all the same
            del named["eos"]
        special = {
            kind: _find_id(vocabulary, [named[kind]] if kind in named else spellings)
            for kind, spellings in _SPELLINGS.items()
        }
        if special["eos"] is None:
            raise ValueError(
                f"{file}: no end-of-text token found; name it as eos_token in a "
                "tokenizer_config.json beside the file"
            )
        self.eos_id = special["eos"]
        self.bos_id = self.eos_id if special["bos"] is None else special["bos"]
        self.pad_id = special["pad"]
        added = self._text.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: number for number, token in added if token.special}

    def _parse(self) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(self._data)
        except Exception as error:  # The library raises bare Exception.
            reason = " ".join(str(error).split())
            raise ValueError(f"{self._file}: not a tokenizer.json: {reason}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _with_special(self) -> Any:
        # A second instance, because the setting belongs to the tokenizer and not to the call.
        return self._parse()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`; see `Tokenizer.encode`."""
        _check_text(text)
        tokenizer = self._with_special if allow_special else self._text
        return tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, number: int) -> str:
        """The vocabulary's entry of an id."""
        return self._text.id_to_token(number)

    def to_str(self) -> str:
        """Returns the `tokenizer.json`."""
        return self._data.decode()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32, by all threads of the library."""
        _check_text(*texts)
        encoded = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`; see `Tokenizer.decode`. ValueError on unknown ids."""
        values = [int(token) for token in ids]
        _check_ids(values, self)
        return self._text.decode(values, skip_special_tokens=skip_special_tokens)


def _check_text(*texts: str) -> None:
    for text in texts:
        check_kind("the text to encode", text, str, "text")


def load(name: str) -> Tokenizer:
    """Loads "byte" or the `tokenizer.json` at a path (or in a folder).

    Raises:
      FileNotFoundError: no such file. ValueError: not a usable tokenizer.
    """
    return ByteTokenizer() if name == "byte" else HuggingFaceTokenizer(name)


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if a model with `vocab_size` rows cannot take the tokenizer's ids."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has ids up to {tokenizer.vocab_size - 1}, outside "
            f"the model's vocabulary of {vocab_size}; use the model's own, or set vocab_size to at "
            f"least {tokenizer.vocab_size}"
        )


# In order of preference: a vocabulary with "<s>" may also have "[CLS]".
_SPELLINGS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]"),
}


def _find_id(vocabulary: Mapping[str, int], names: Sequence[str | None]) -> int | None:
    return next(
        (vocabulary[name] for name in names if name is not None and name in vocabulary), None
    )


def _special_token_names(config: pathlib.Path) -> dict[str, str | None]:
    """Reads {"bos": "<s>", "pad": None} from a tokenizer_config.json: None for a token that it says
    there is none of, nothing for what it does not name; empty if there is no such file."""
    if not config.is_file():
        return {}
    try:
        entries = json.loads(config.read_text(encoding="utf-8"))
        names = {kind: f"{kind}_token" for kind in _SPELLINGS}
        tokens = {kind: entries[name] for kind, name in names.items() if name in entries}
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{config}: not a JSON object") from None
    # An entry is a string, or an object (AddedToken) whose "content" is the string.
    texts = ((k, t.get("content") if isinstance(t, dict) else t) for k, t in tokens.items())
    return {kind: token for kind, token in texts if isinstance(token, str | None)}


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(
                f"token id {token} is outside the vocabulary of {tokenizer.vocab_size} "
                f"of tokenizer {tokenizer.name!r}"
            )
