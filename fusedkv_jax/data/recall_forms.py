"""How the facts of a recall task are written: as bare token ids, or as sentences of a tokenizer."""

import functools
from typing import Protocol, runtime_checkable

import numpy as np

from fusedkv_jax.data.encoding import document_beginning
from fusedkv_jax.data.tokenizers import Tokenizer


@runtime_checkable
class Form(Protocol):
    """Keys and values by number, written as token ids.

    Attributes:
      num_keys: keys 0 to num_keys - 1 can be written, each in another way.
      num_values: likewise values.
    """

    num_keys: int
    num_values: int

    def begin(self) -> list[int]:
        """What an example begins with."""
        ...

    def ask(self) -> list[int]:
        """What stands between the facts and the questions."""
        ...

    def fact(self, key: int, value: int) -> list[int]:
        """`key` has `value`."""
        ...

    def copy(self, key: int, source: int) -> list[int]:
        """`key` has the value of the key `source`."""
        ...

    def question(self, key: int) -> list[int]:
        """Which value does `key` have? The answer follows."""
        ...

    def start(self, key: int, value: int) -> list[int]:
        """`value` is given to `key`, from which others will copy it."""
        ...

    def trace(self, value: int) -> list[int]:
        """Which keys have `value`? Their names follow in the order of the copies."""
        ...

    def value(self, value: int) -> list[int]:
        """`value` as an answer."""
        ...

    def name(self, key: int) -> list[int]:
        """`key` as an answer."""
        ...

    def noise(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """`size` tokens that say nothing."""
        ...


class TokenForm:
    """One token for each key and value, for a vocabulary of any size.

    A fact is two tokens, the key and its value. Token 0 stands before the questions; of the
    others, equal thirds are keys, values and noise.

    Args:
      vocab_size: number of token ids, at least 49: some tasks need 16 keys.

    Raises:
      ValueError: a smaller vocabulary.
    """

    ASK = 0

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 49:
            raise ValueError(f"vocab_size={vocab_size} is too small for recall; use 49 or more")
        self.num_keys = self.num_values = (vocab_size - 1) // 3
        self._first_noise, self._end = 1 + 2 * self.num_keys, vocab_size

    def begin(self) -> list[int]:
        return []

    def ask(self) -> list[int]:
        return [self.ASK]

    def name(self, key: int) -> list[int]:
        return [1 + key]

    def value(self, value: int) -> list[int]:
        return [1 + self.num_keys + value]

    def fact(self, key: int, value: int) -> list[int]:
        return self.name(key) + self.value(value)

    def copy(self, key: int, source: int) -> list[int]:
        # The source first: who has found a name reads the next one after it.
        return self.name(source) + self.name(key)

    def start(self, key: int, value: int) -> list[int]:
        return self.value(value) + self.name(key)

    def question(self, key: int) -> list[int]:
        return self.name(key)

    def trace(self, value: int) -> list[int]:
        return self.value(value)

    def noise(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.integers(self._first_noise, self._end, size, np.int32)


class TextForm:
    """Sentences, for models of text: invented names as keys, five digits as values.

    A name and a value have the same ids in facts, questions and answers, whatever the tokenizer
    would join them with.

    Args:
      tokenizer: encodes the sentences.
    """

    _BEFORE = ("\n", ".")  # texts that a piece is encoded behind
    _SYLLABLES = tuple(c + v for c in "bdfgklmnprst" for v in "aeiou")
    _NOISE = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    )

    num_keys = len(_SYLLABLES) ** 3
    num_values = 90_000

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode = functools.cache(self._inside)
        self._beginning = document_beginning(tokenizer)

    def begin(self) -> list[int]:
        return list(self._beginning)

    def ask(self) -> list[int]:
        return self._ids("\nAnswer from the text above.")

    def name(self, key: int) -> list[int]:
        return self._ids(f" {self._word(key)}")

    def value(self, value: int) -> list[int]:
        return self._ids(f" {10_000 + value}")

    def fact(self, key: int, value: int) -> list[int]:
        return self.question(key) + self.value(value) + self._ids(". ")

    def copy(self, key: int, source: int) -> list[int]:
        whose = self._ids(" The number of") + self.name(source)
        return whose + self._ids(" is also that of") + self.name(key) + self._ids(". ")

    def start(self, key: int, value: int) -> list[int]:
        number = self._ids(" The number") + self.value(value)
        return number + self._ids(" is that of") + self.name(key) + self._ids(". ")

    def question(self, key: int) -> list[int]:
        return self._ids(" The number of") + self.name(key) + self._ids(" is")

    def trace(self, value: int) -> list[int]:
        number = self._ids(" The names with the number") + self.value(value)
        return number + self._ids(" are, in order,")

    def noise(self, rng: np.random.Generator, size: int) -> np.ndarray:
        sentence = np.asarray(self._encode(self._NOISE), np.int32)
        return np.resize(sentence, size)

    def _word(self, key: int) -> str:
        first, rest = divmod(key, len(self._SYLLABLES) ** 2)
        places = (first, *divmod(rest, len(self._SYLLABLES)))
        return "".join(self._SYLLABLES[place] for place in places)

    def _ids(self, text: str) -> list[int]:
        return list(self._encode(text))

    def _inside(self, text: str) -> tuple[int, ...]:
        """The ids of a piece as it stands within a text.

        Some tokenizers put a space before all that they encode, so a piece is encoded behind
        another one, whose ids are cut off.
        """
        for before in self._BEFORE:
            ids = self._tokenizer.encode(before)
            whole = self._tokenizer.encode(before + text)
            if whole[: len(ids)] == ids:
                return tuple(whole[len(ids) :])
        return tuple(self._tokenizer.encode(text))  # where it always joins with what is before it
