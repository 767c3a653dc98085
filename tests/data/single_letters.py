"""A tokenizer of single letters, as a file of the library `tokenizers`."""

import pathlib

import tokenizers

WORDS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .\n"]


def save(folder: pathlib.Path) -> None:
    """Write tokenizer.json."""
    letters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=".")
    )
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    letters.add_special_tokens(["<s>", "</s>"])
    letters.save(str(folder / "tokenizer.json"))
