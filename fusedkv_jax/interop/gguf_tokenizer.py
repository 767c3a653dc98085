"""The tokenizer of a GGUF file as the files that Hugging Face libraries and ours read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedkv_jax.data.chat import TEMPLATE_FILE, TOOL_TEMPLATE_FILE
from fusedkv_jax.interop.gguf_file import GgufError, GgufFile

# How text is cut before byte-pair encoding, by llama.cpp's names: GPT-2's expression is that of
# the tokenizers library itself; Llama 3's takes up to three digits a piece, Qwen2's one.
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _WORDS % digits}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [cut, _GPT2 | {"use_regex": False}]


_PRE = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that are added to a vocabulary


def save_gguf_tokenizer(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates that there are.

    Args:
        path: the GGUF file.
        folder: where to, made if it does not exist.

    Raises:
        GgufError: the file is damaged, has no tokenizer, or one that is not supported.
        ImportError: the package `gguf` is missing.
    """
    with GgufFile(path) as file:
        _save(file, Path(folder))


def _save(file: GgufFile, folder: Path) -> None:
    known = file.metadata
    tokenizer = _tokenizer(file)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokens = known["tokenizer.ggml.tokens"]
    for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = known.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None:
            if type(index) is not int or index >= len(tokens):
                raise GgufError(
                    f"{file.path}: tokenizer.ggml.{name}_token_id={index!r} is no token"
                )
            config[f"{kind}_token"] = tokens[index]
    config |= {f"add_{kind}_token": added for kind, added in _adds(known).items()}
    templates = {TEMPLATE_FILE: "", TOOL_TEMPLATE_FILE: ".tool_use"}
    for name, key in templates.items():
        template = known.get(f"tokenizer.chat_template{key}")
        if isinstance(template, str):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(template, encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _adds(known: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a text gets "bos" and "eos" around it, by the file, else as llama.cpp does."""
    default = {"bos": known.get("tokenizer.ggml.pre") == "llama-bpe", "eos": False}
    return {
        kind: bool(known.get(f"tokenizer.ggml.add_{kind}_token", default[kind])) for kind in default
    }


def _post_processor(known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What libraries put around a text that is encoded with special tokens; None for nothing."""
    tokens, special = known["tokenizer.ggml.tokens"], {}
    pieces: dict[str, list[str]] = {"bos": [], "eos": []}
    for kind, added in _adds(known).items():
        index = known.get(f"tokenizer.ggml.{kind}_token_id")
        if added and type(index) is int and index < len(tokens):
            token = tokens[index]
            special[token] = {"id": token, "ids": [index], "tokens": [token]}
            pieces[kind].append(token)
    if not special:
        return None

    def around(text: str, number: int) -> list[dict[str, Any]]:
        added = lambda kind: [  # noqa: E731
            {"SpecialToken": {"id": token, "type_id": number}} for token in pieces[kind]
        ]
        return [*added("bos"), {"Sequence": {"id": text, "type_id": number}}, *added("eos")]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    """The content of tokenizer.json."""
    known = file.metadata
    kind, pre = known.get("tokenizer.ggml.model"), known.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE:
        raise GgufError(
            f"{file.path}: tokenizer.ggml.model={kind!r} with pre={pre!r} is not supported, only"
            f" gpt2 with {', '.join(_PRE)}; name the model's tokenizer.json with --tokenizer"
        )
    tokens, merges = (_strings(file, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    kinds = known.get("tokenizer.ggml.token_type", [])
    if len(kinds) != len(tokens):
        raise GgufError(f"{file.path}: {len(tokens)} tokens but {len(kinds)} token types")
    if len(set(tokens)) != len(tokens):
        raise GgufError(f"{file.path}: tokenizer.ggml.tokens has a token twice")
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(kinds[index] == _CONTROL),
        }
        for index, token in enumerate(tokens)
        if kinds[index] in (_CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "post_processor": _post_processor(known),
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [_merge(file.path, merge) for merge in merges],
        },
    }


def _strings(file: GgufFile, name: str) -> list[str]:
    found = file.metadata.get(name)
    if not isinstance(found, list) or not found:
        raise GgufError(f"{file.path} has no {name}: no tokenizer is in it")
    return found


def _merge(path: Path, merge: str) -> list[str]:
    # Not given the file: where arguments are checked against their types, a tensor of it is read.
    parts = merge.split(" ")
    if len(parts) != 2:
        raise GgufError(f"{path}: tokenizer.ggml.merges has {merge!r}, which is not a pair")
    return parts
